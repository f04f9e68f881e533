"""An autoresearch branch: which of its commits are experiments, and what became of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shared.errors import BadInput
from shared.git import GitError, Repo
from shared.task import CONFIG_NAME, TaskSpec, parse_task
from shared.wire import Status
from worker.workspace import RESULTS, code_state, nodes_added

from .log import COLUMNS, Row, logged, parse_log
from .session import Attempt, Session

MAINS = ("refs/heads/main", "refs/heads/master", "refs/remotes/origin/main", "refs/remotes/origin/master")


@dataclass(frozen=True)
class Commit:
    """A commit on the branch, and what it does to the files that count."""

    hash: str
    at: int
    message: str
    changes: Mapping[str, tuple[str, str]]  #: path -> content's hash before and after


@dataclass(frozen=True)
class Step:
    """A commit that is an experiment."""

    commit: Commit
    parent: str  #: where the branch stood
    reverted_by: str | None = None  #: the commit that took it back


def steps_of(commits: Sequence[Commit], base: str, mutable: Sequence[str]) -> list[Step]:
    """Every change of the mutable files is an experiment, but for those that take one back.

    A commit takes back what came after the state that it returns to, or the last experiment where it says so.
    """
    first: dict[str, str] = {}
    for commit in commits:
        for path, (before, _) in commit.changes.items():
            first.setdefault(path, before)
    states = [{path: first[path] for path in mutable if path in first}]  # after each commit of the branch as it stands
    standing: list[int] = []  # the experiments of the branch as it stands
    steps: list[Step] = []
    for commit in commits:
        changed = {path: after for path, (before, after) in commit.changes.items() if path in mutable}
        if not changed:
            continue
        state = states[-1] | changed
        if state in states[:-1]:
            back = states.index(state)
        elif standing and _reverts(commit.message, steps[standing[-1]].commit.hash):
            back = len(standing) - 1
            states[back] = state
        else:
            parent = steps[standing[-1]].commit.hash if standing else base
            standing.append(len(steps))
            states.append(state)
            steps.append(Step(commit, parent))
            continue
        for index in standing[back:]:
            steps[index] = replace(steps[index], reverted_by=commit.hash)
        del standing[back:], states[back + 1 :]
    return steps


def _reverts(message: str, commit: str) -> bool:
    return any(commit.startswith(said) for said in re.findall(r"This reverts commit ([0-9a-f]{7,40})", message))


def score_in(message: str, metric: str) -> float | None:
    """From words like `val_bpb 0.9834`, `val_bpb: 0.9834`, `val_bpb 0.9911 -> 0.9834`."""
    value = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
    before = rf"(?:{value}\s*(?:->|→|to)\s*)?"
    found = re.search(rf"(?<!\w){re.escape(metric)}\s*[:=]?\s*{before}({value})", message)
    return float(found[1]) if found else None


class Branch:
    """A branch of a repository somewhere, and the task in it. Only read."""

    def __init__(self, path: Path, branch: str | None, metric: str) -> None:
        """Raises BadInput where there is no such branch, or nothing on it."""
        self._repo, self._path, self._metric = Repo(path), path, metric
        try:
            bare = self._repo.run("rev-parse", "--is-bare-repository") == "true"
            current = self._repo.run("rev-parse", "--symbolic-full-name", "HEAD")
        except GitError:
            raise BadInput(f"{path}: no results.tsv, and no git repository with a commit; name one of them") from None
        top = path if bare else self._repo.top() or path
        inside = path.resolve().relative_to(top.resolve()).as_posix()
        self._prefix = "" if inside == "." else f"{inside}/"
        self._repo = Repo(top)  # git takes the paths below as from its folder
        if branch is None and not current.startswith("refs/heads/"):
            raise BadInput(f"{path}: no branch is checked out; name one with --branch")
        named = [current] if branch is None else [f"refs/heads/{branch}", f"refs/remotes/{branch}"]
        ref = next((ref for ref in named if self._repo.resolve(ref)), None)
        if ref is None:
            raise BadInput(f"--branch {branch}: no such branch in {path}")
        self._is_current = ref == current and not bare
        self.tip = self._repo.resolve(ref) or ""
        self.short = re.sub(r"^refs/(heads|remotes/[^/]+)/", "", ref)
        self._base = self._fork(ref)
        self._mutable = [self._prefix + name for name in self._task_files()]
        self._log_path = self._prefix + RESULTS

    def _fork(self, ref: str) -> str:
        """Where it left main or master; without one, the first commit of all."""
        for main in MAINS:
            if main == ref or self._repo.resolve(main) is None:
                continue
            try:
                base = self._repo.run("merge-base", main, self.tip).split("\n")[0]
            except GitError:  # histories that never met
                continue
            if base == self.tip:
                raise BadInput(f"{self._path}: branch {self.short!r} has no commit that {main} has not; name another")
            return base
        return self._repo.run("rev-list", "--first-parent", "--max-parents=0", self.tip).split("\n")[-1]

    def _task_files(self) -> Sequence[str]:
        config = self._text(self.tip, self._prefix + CONFIG_NAME)
        if config is not None:
            task: TaskSpec = parse_task(config, f"{self.short}:{self._prefix}{CONFIG_NAME}")
            if task.metric != self._metric:
                raise BadInput(f"{self._path}: its metric is {task.metric!r}, the campaign's is {self._metric!r}")
            return task.mutable_files
        if self._text(self.tip, f"{self._prefix}train.py") is not None:
            return ("train.py",)
        raise BadInput(f"{self._path}: branch {self.short!r} has neither {CONFIG_NAME} nor train.py there")

    def _text(self, revision: str, path: str) -> str | None:
        try:
            return self._repo.show(revision, path)
        except GitError:
            return None

    def _commits(self) -> list[Commit]:
        """Those that change a mutable file or results.tsv, oldest first, without side branches."""
        how = ("--first-parent", "--diff-merges=first-parent", "--reverse", "--raw", "--no-abbrev", "--no-renames")
        what = ("--no-show-signature", "--no-notes", "--no-color", "--format=%x00%H%x00%ct%x00%B%x00")
        paths = (*self._mutable, self._log_path)
        # A message holds no NUL, so fields end at one.
        log = ("-c", "core.quotePath=false", "log")
        fields = self._repo.run(*log, *how, *what, f"{self._base}..{self.tip}", "--", *paths, strip=False).split("\0")
        commits = []
        for commit, at, message, raw in zip(fields[1::4], fields[2::4], fields[3::4], fields[4::4], strict=True):
            changes: dict[str, tuple[str, str]] = {}
            for line in raw.splitlines():
                if line.startswith(":"):
                    _, _, before, after, rest = line.split(" ", 4)
                    path = rest.partition("\t")[2]
                    if before != after:
                        changes[path] = before, after
            commits.append(Commit(commit, int(at), _clean(message), changes))
        return commits

    def _rows(self) -> list[Row]:
        """Of its results.tsv, without those that were there before it: the working copy's, the tip's, or the last."""
        text = None
        working = self._path / RESULTS
        if self._is_current and working.is_file():
            text = working.read_text(encoding="utf-8-sig", errors="replace")
        if text is None:
            text = self._text(self.tip, self._log_path)
        if text is None:
            last = ("log", "-1", "--format=%H", "--diff-filter=AM", f"{self._base}..{self.tip}", "--", self._log_path)
            text = self._text(self._repo.run(*last) or self.tip, self._log_path)
        older = self._text(self._base, self._log_path)
        where = f"{self.short}:{self._log_path}"
        before = parse_log(older, where, self._metric) if older and len(older.splitlines()) > 1 else []
        rows = parse_log(text, where, self._metric) if text and len(text.splitlines()) > 1 else []
        return rows[len(before) :] if rows[: len(before)] == before else rows

    def _row_of(self, commit: Commit, rows: Sequence[Row]) -> int | None:
        """By its abbreviated hash; in a keep that was amended with the log, by the log's last row."""
        by_hash = (n for n, row in enumerate(rows) if row.commit and commit.hash.startswith(row.commit))
        if (found := next(by_hash, None)) is not None or self._log_path not in commit.changes:
            return found
        own = (self._text(commit.hash, self._log_path) or "").strip().rpartition("\n")[2].split("\t")
        return next((n for n, row in enumerate(rows) if row.commit == own[0] and len(own) == len(COLUMNS)), None)

    def session(self, progress: Callable[[str, int, int], None]) -> Session:
        """Raises BadInput for a branch without experiments, or a results.tsv that cannot be read."""
        commits, rows = self._commits(), self._rows()
        steps = steps_of(commits, self._base, self._mutable)
        if not steps:
            raise BadInput(f"{self._path}: no commit of branch {self.short!r} changes {', '.join(self._mutable)}")
        places = [self._row_of(step.commit, rows) for step in steps]
        baseline = self._baseline(rows, places)
        attempts = [baseline] if baseline is not None else []
        left = [n for n in range(len(rows)) if n not in places and not (n == 0 and baseline is not None)]
        head = self._base
        for number, (step, place) in enumerate(zip(steps, places, strict=True), 1):
            while place is not None and left and left[0] < place:
                attempts.append(logged(rows[left[0]], f"row {left.pop(0)}", head))
            attempts.append(self._attempt(step, rows[place] if place is not None else None))
            head = attempts[-1].kept or head
            progress("reading", number, len(steps))
        attempts += [logged(rows[n], f"row {n}", head) for n in left]
        at = 0
        for index, attempt in enumerate(attempts):
            at = attempt.at or at or commits[0].at  # what only the log has was tried between its neighbours
            attempts[index] = replace(attempt, at=at)
        origin = f"branch {self.short} {self._base} {steps[0].commit.hash}"
        name = self.short.removeprefix("autoresearch/")
        return Session(origin, name, tuple(attempts), 0 if baseline else 1, (self._repo, self.tip))

    def _baseline(self, rows: Sequence[Row], places: Sequence[int | None]) -> Attempt | None:
        """The code that the branch began with, where its score is known."""
        row = rows[0] if rows and 0 not in places and rows[0].status is Status.KEEP else None
        message = _clean(self._repo.run("log", "-1", "--no-show-signature", "--format=%B", self._base))
        score = row.score if row else score_in(message, self._metric)
        if score is None:
            return None
        memory = row.memory_gb if row else 0.0
        words, base = row.description if row else "baseline", self._base
        return Attempt(
            "base", Status.KEEP, words, base, base, base, score, memory, "the code that the branch began with"
        )

    def _attempt(self, step: Step, row: Row | None) -> Attempt:
        commit = step.commit
        subject = commit.message.strip().partition("\n")[0]
        score = row.score if row is not None else score_in(commit.message, self._metric)
        if row is not None and row.status is Status.CRASH:
            status, score = Status.CRASH, None
            reason = "the log says crash"
        elif step.reverted_by is not None:
            status, reason = Status.DISCARD, f"taken back by {step.reverted_by[:7]}"
        else:
            status, reason = Status.KEEP, "it stands on the branch"
        before, after = self._files(f"{commit.hash}^"), self._files(commit.hash)
        return Attempt(
            commit.hash,
            status,
            (row.description if row else subject.removeprefix("experiment: "))[:2000],
            commit.hash,
            step.parent,
            kept=commit.hash if status is Status.KEEP else None,
            score=score,
            memory_gb=row.memory_gb if row else 0.0,
            reason=reason,
            at=commit.at,
            version=1 + (score is not None) + (step.reverted_by is not None),
            diff=_clean(self._repo.diff(f"{commit.hash}^", commit.hash, self._mutable)),
            code_state=code_state(after),
            nodes_added=nodes_added({name: before.get(name, "") for name in after}, after),
        )

    def _files(self, revision: str) -> dict[str, str]:
        texts = {path.removeprefix(self._prefix): self._text(revision, path) for path in self._mutable}
        return {name: _clean(text) for name, text in texts.items() if text is not None}


def _clean(text: str) -> str:
    """Bytes that are no UTF-8 cannot travel as JSON."""
    return text.encode(errors="replace").decode()
