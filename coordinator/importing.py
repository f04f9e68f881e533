"""`swarm import PATH`: a session that was run elsewhere, from its results.tsv or git branch, as a machine of its own.

Invariants: importing the same session again changes nothing (ids come from its contents, never from its path); what a
log does not say is left out, not made up; the source is only read.
NOT covered: a row that was changed after it was imported; a log grows at its end.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated
from uuid import NAMESPACE_URL, UUID, uuid5

import typer
from pydantic import ValidationError

from shared import wire
from shared.client import CoordinatorClient, Rejected, client_from
from shared.errors import BadInput, Refused
from shared.git import GitError, Repo, http_environment
from shared.task import CONFIG_NAME, TaskSpec, parse_task
from shared.wire import NO_COMMIT, CampaignInfo, ExperimentReport, Hardware, Registration, RunReport, Status
from worker.machine import slug
from worker.reporting import fingerprint
from worker.results import plain
from worker.terminal import DataBar, Json, app, say
from worker.workspace import RESULTS, code_state, nodes_added

from .look import Coordinator, Token

ORIGIN = uuid5(NAMESPACE_URL, "urn:swarm:import")
COLUMNS = ("commit", "", "memory_gb", "status", "description")  #: the second one has the metric's name
MAINS = ("refs/heads/main", "refs/heads/master", "refs/remotes/origin/main", "refs/remotes/origin/master")


# -- results.tsv


@dataclass(frozen=True)
class Row:
    """A line of a results.tsv."""

    commit: str | None  #: abbreviated; None where the first row says a word ("baseline") instead
    score: float
    memory_gb: float
    status: Status
    description: str


def parse_log(text: str, where: str, metric: str) -> list[Row]:
    """Raises BadInput, one line with the line and column that is not as the reference has it."""
    header, *lines = (line.removesuffix("\r") for line in text.split("\n"))
    names = header.split("\t")
    for number, (name, expected) in enumerate(zip(names, COLUMNS, strict=False), 1):
        if name != (expected or metric):
            words = "the campaign's metric is" if not expected else "expected"
            raise _bad(where, 1, number, name, f"{words} {expected or metric!r}")
    if len(names) != len(COLUMNS):
        raise _bad(where, 1, len(names), names[-1], f"{len(COLUMNS)} columns separated by tabs are expected")
    rows: list[Row] = []
    for number, line in enumerate(lines, 2):
        if line.strip():
            rows.append(_row(line.split("\t"), where, number, metric, first=not rows))
    if not rows:
        raise BadInput(f"{where}: no experiment in it")
    return rows


def _row(cells: Sequence[str], where: str, line: int, metric: str, *, first: bool) -> Row:
    if len(cells) != len(COLUMNS):
        raise _bad(where, line, len(cells), cells[-1], f"{len(COLUMNS)} columns separated by tabs are expected")
    commit, score, memory, status, description = (cell.strip() for cell in cells)
    named = re.fullmatch(r"[0-9a-f]{7,40}", commit.lower())
    if not named and not first:
        raise _bad(where, line, 1, commit, "a commit has 7 to 40 hexadecimal digits")
    if status not in (Status.KEEP, Status.DISCARD, Status.CRASH):
        raise _bad(where, line, 4, status, "a status is keep, discard or crash")
    return Row(
        commit.lower() if named else None,
        _number(score, where, line, 2),
        _number(memory, where, line, 3),
        Status(status),
        description[:2000],
    )


def _number(cell: str, where: str, line: int, column: int) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _bad(where, line, column, cell, "a number is expected")
    return value


def _bad(where: str, line: int, column: int, cell: str, words: str) -> BadInput:
    return BadInput(f"{where}: line {line}, column {column}: {plain(cell)[:60]!r}; {words}")


# -- what is imported


@dataclass(frozen=True)
class Attempt:
    """One experiment of a session."""

    key: str  #: what it is known by within the session
    status: Status
    description: str
    tested: str
    parent: str
    kept: str | None = None
    score: float | None = None
    memory_gb: float = 0.0
    reason: str = ""
    at: int = 0  #: unix seconds
    version: int = 1  #: higher where more is known of it: a score, a revert
    diff: str = ""
    code_state: str = ""
    nodes_added: int = 0


@dataclass(frozen=True)
class Session:
    """All that one machine tried. Numbers begin at 0, the baseline; at 1 where the baseline's score is not known."""

    origin: str  #: what it is known by, however often and wherever from it is imported
    name: str
    attempts: tuple[Attempt, ...]
    first: int = 0  #: number of the first attempt
    branch: tuple[Repo, str] | None = None  #: to push: the repository, and the branch's tip


def of_log(path: Path, metric: str) -> Session:
    """A results.tsv alone: no code, so no diffs. Its first two rows say which session it is. Raises BadInput."""
    data = path.read_bytes()
    try:
        rows = parse_log(data.decode("utf-8-sig"), str(path), metric)
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, before.rpartition(b"\n")[2].count(b"\t") + 1
        raise BadInput(f"{path}: line {line}, column {column}: not UTF-8") from None
    at = int(path.stat().st_mtime)  # a log does not say when: not later than this
    absolute = path.absolute()
    name = absolute.parent.name if absolute.stem == "results" else absolute.stem
    first_rows = [f"{row.commit} {row.score!r} {row.status} {row.description}" for row in rows[:2]]
    attempts, head = [], None
    for index, row in enumerate(rows):
        attempts.append(replace(_logged(row, f"row {index}", head), at=at))
        head = attempts[-1].tested if row.status is Status.KEEP else head
    return Session("\n".join(["log", *first_rows]), name, tuple(attempts))


def _logged(row: Row, key: str, head: str | None) -> Attempt:
    """As the log says; `head` is the keep before it."""
    tested = row.commit or NO_COMMIT
    keep = row.status is Status.KEEP
    return Attempt(
        key,
        row.status,
        row.description,
        tested,
        head or (tested if keep else NO_COMMIT),  # a baseline stands on itself
        kept=row.commit if keep else None,
        score=None if row.status is Status.CRASH else row.score,
        memory_gb=row.memory_gb,
        reason=f"the log says {row.status}",
    )


# -- a branch


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
                attempts.append(_logged(rows[left[0]], f"row {left.pop(0)}", head))
            attempts.append(self._attempt(step, rows[place] if place is not None else None))
            head = attempts[-1].kept or head
            progress("reading", number, len(steps))
        attempts += [_logged(rows[n], f"row {n}", head) for n in left]
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


# -- sending it


@dataclass(frozen=True)
class Labels:
    """What a person says of a session."""

    name: str | None
    machine_class: str | None
    profile: str | None


@dataclass(frozen=True)
class Imported:
    """What became of a session."""

    machine: str
    best: float | None  #: as the leaderboard has it
    keeps: int  #: the baseline counted
    tried: int  #: as the leaderboard counts: without the baseline
    improvements: int  #: keeps as the leaderboard counts them: without the baseline
    new: int  #: that were not there before
    refused: tuple[str, ...]


def registration_of(session: Session, labels: Labels) -> Registration:
    """Without a class it gets one of its own: nothing says that its scores compare with others'."""
    name = slug(labels.name or session.name)[:63].strip("-")
    machine_class = labels.machine_class or name
    try:
        return Registration(
            version=version("ratchet-swarm"),
            uid=uuid5(ORIGIN, session.origin),
            name=name,
            machine_class=machine_class,
            backend="mlx" if machine_class.startswith("mlx") else "torch",
            hardware=Hardware(),
            can=(),
        )
    except ValidationError as error:
        problem = error.errors()[0]
        where = "--class" if problem["loc"] == ("machine_class",) else "--name"
        raise BadInput(f"{where}: {problem['msg']}, found {problem['input']!r}") from None


def report_of(attempt: Attempt, uid: UUID, number: int, profile: str) -> tuple[UUID, ExperimentReport]:
    """Its id and report. Raises ValidationError for what no report can say."""
    identity = uuid5(uid, attempt.key)
    ran = attempt.score is not None or attempt.status is Status.CRASH
    run = RunReport(
        id=uuid5(identity, "run"),
        seed=0,
        score=attempt.score,
        status=Status.CRASH if attempt.status is Status.CRASH else None,
        memory_gb=attempt.memory_gb,
    )
    return identity, ExperimentReport(
        version=attempt.version,
        number=number,
        idea=uuid5(identity, "idea"),
        fingerprint=fingerprint({}, attempt.diff) if attempt.diff else "",
        profile=profile,
        tested=attempt.tested,
        parent=attempt.parent,
        kept=attempt.kept,
        description=attempt.description,
        proposer="import",
        nodes_added=attempt.nodes_added,
        code_state=attempt.code_state,
        status=attempt.status,
        reason=attempt.reason,
        decided_at=attempt.at,
        runs=(run,) if ran else (),
        diff=attempt.diff or None,
    )


def send(
    client: CoordinatorClient,
    campaign: CampaignInfo,
    session: Session,
    labels: Labels,
    progress: Callable[[str, int, int], None],
) -> Imported:
    """Raises Rejected where this caller may not import at all; a refusal of one experiment is part of the answer."""
    registration = registration_of(session, labels)
    profile = labels.profile or campaign.profile
    machine = client.import_machine(registration)
    refused: list[str] = []
    if session.branch is not None:
        repo, tip = session.branch
        refused += _push(repo, f"{tip}:{wire.IMPORTED}{machine}", client, campaign)
    new = 0
    for index, attempt in enumerate(session.attempts):
        number = session.first + index
        try:
            identity, report = report_of(attempt, registration.uid, number, profile)
            new += client.import_experiment(machine, identity, report).stored
        except (Rejected, ValidationError) as error:
            if isinstance(error, Rejected) and error.status in (401, 403):
                raise
            words = str(error) if isinstance(error, Rejected) else error.errors()[0]["msg"]
            refused.append(f"#{number} {attempt.tested[:7]} {plain(attempt.description)[:60]}: {words}")
        progress("import", index + 1, len(session.attempts))
    board = client.leaderboard(machine=machine, profile=profile).standings
    first = client.experiments(machine=machine, profile=profile, order="oldest", limit=1).experiments
    baseline = sum(row.number == 0 and row.status is Status.KEEP for row in first)
    tried, kept = (board[0].experiments, board[0].keeps) if board else (0, 0)
    return Imported(machine, board[0].best if board else None, kept + baseline, tried, kept, new, tuple(refused))


def _push(repo: Repo, what: str, client: CoordinatorClient, campaign: CampaignInfo) -> list[str]:
    """Its commits to the hub; why not, where it refused."""
    how = ("push", "--quiet", "--no-follow-tags", "--no-signed", "--recurse-submodules=no")
    try:
        environment = http_environment(client.url, client.token)
        repo.run(*how, client.url + campaign.repository, what, environment=environment)
    except GitError as error:
        return [f"the branch: {plain(str(error))}"]
    return []


@app.command("import")
def import_session(
    path: Annotated[Path, typer.Argument(help="A results.tsv, or a git repository with an autoresearch branch.")],
    name: Annotated[str | None, typer.Option(help="The machine's name; by default the file's or the branch's.")] = None,
    machine_class: Annotated[
        str | None, typer.Option("--class", help="What it ran on, e.g. cuda-h100; a class of its own if left out.")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="The profile it ran with; the campaign's if left out.")] = None,
    branch: Annotated[str | None, typer.Option(help="Which branch; by default the one checked out.")] = None,
    coordinator: Coordinator = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Bring in a session that was run elsewhere, as a machine of its own. Doing it again adds only what is new."""
    if not path.exists():
        raise BadInput(f"{path}: no such file or directory")
    if branch is not None and path.is_file():
        raise BadInput(f"--branch {branch}: {path} is a file, it has no branches")
    client = client_from(coordinator, token)
    try:
        with DataBar() as bar:
            campaign = client.campaign()
            if path.is_file():
                session = of_log(path, campaign.metric)
            else:
                session = Branch(path, branch, campaign.metric).session(bar.update)
            done = send(client, campaign, session, Labels(name, machine_class, profile), bar.update)
    finally:
        client.close()
    facts = asdict(done) | {"experiments": len(session.attempts)}
    baseline = done.keeps - done.improvements
    counted = "the baseline among them; " if baseline else "no baseline; "
    best = "no best" if done.best is None else f"best {done.best:.6f}"
    say(
        as_json,
        facts,
        f"{len(session.attempts)} experiments, {done.keeps} keeps, {best} as machine {done.machine}\n"
        f"({counted}the leaderboard counts {done.improvements} keeps of {done.tried} tried; {done.new} were new here)",
    )
    for words in done.refused:
        print(f"refused: {words}", file=sys.stderr)
    if done.refused:
        raise Refused(f"{len(done.refused)} of {path} refused; the rest is in")
