"""The worktree in which experiments happen: apply, commit, keep, reset. The user's own checkout is never touched.

Invariants: only mutable files differ in a commit, beside results.tsv on a keep; in a monorepo only the task's directory
is staged; every tested commit T stays reachable from refs/attic/<machine>. NOT covered: what a run does outside the
worktree (docs/metric.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared import pyedit
from shared.errors import BadInput
from shared.git import GitError, Repo
from shared.task import TaskSpec

RESULTS = "results.tsv"
STALE_LOCK_S = 2.0  #: a git lock older than this, at start, has no owner: git calls here take milliseconds
EXCLUDED = (".swarm/", "run.log", "__pycache__/")  #: ignored in the campaign's clone, without a .gitignore of ours
LINE_NODES = 8  #: a line of a file that is not Python weighs as much as so many ast nodes

Files = Mapping[str, str]  #: mutable file -> its text


@dataclass(frozen=True)
class Committed:
    """A tested commit T and what it changes."""

    commit: str
    nodes_added: int
    code_state: str
    strays: tuple[str, ...]  #: files that were touched and may not be; restored


class Workspace:
    """One branch checked out in a worktree of its own."""

    def __init__(self, root: Path, task: TaskSpec, prefix: str, machine: str) -> None:
        """`root` is the worktree, `prefix` the task's directory in the repository ('' at its top)."""
        # Without its `.git` link a worktree is just a folder of the user's checkout, and git would work on that.
        self.repo = Repo(root, machine, ceiling=root.parent)
        self.root = root
        self.task_dir = root / prefix
        self.attic = f"refs/attic/{machine}"
        self._task = task
        self._prefix = f"{prefix}/" if prefix else ""
        self._immutable = ""
        self._link = ""  # what `.git` in the worktree says
        self.mended = ""  #: what `open` found and mended, in words

    def open(self, campaign: Path, branch: str, at: str) -> None:
        """Makes branch and worktree, or mends what a kill or a move left of them; ends at commit `at`, clean.

        Call with no process at work in the worktree, and with the slot's lock held. Nothing outside worktree and branch
        is touched, but for git's own lock files.
        """
        repo = Repo(campaign, self.repo.author)
        with repo.exclusively():  # workers of other slots may be starting in this campaign
            locks = repo.clear_locks(STALE_LOCK_S)
            repo.exclude(EXCLUDED)
            if not self._usable(repo, branch):
                self._forget(repo)
                new = [] if repo.resolve(f"refs/heads/{branch}") else ["-b", branch]
                repo.run("worktree", "add", "--quiet", "--force", *new, str(self.root), branch if not new else at)
            if locks := [*locks, *self.repo.clear_locks(STALE_LOCK_S)]:
                self.mended = f"removed {', '.join(locks)}, left by a killed git"
            self.repo.reset_hard(at)
            self.repo.run("clean", "--quiet", "-d", "--force")
        self._link = (self.root / ".git").read_text()
        self._immutable = self.immutable_digest()

    def _usable(self, repo: Repo, branch: str) -> bool:
        if not (self.root / ".git").is_file():
            return False
        try:
            repo.run("worktree", "repair", str(self.root))
            top = self.repo.run("rev-parse", "--show-toplevel")
            on = self.repo.run("symbolic-ref", "HEAD")
            self.repo.run("status", "--porcelain")
        except GitError:
            return False
        return Path(top).resolve() == self.root.resolve() and on == f"refs/heads/{branch}"

    def _forget(self, repo: Repo) -> None:
        """Removes the worktree and what the repository knows of it, in whatever state both are."""
        with contextlib.suppress(GitError):
            repo.run("worktree", "remove", "--force", "--force", str(self.root))
        shutil.rmtree(self.root, ignore_errors=True)
        for admin in Path(repo.run("rev-parse", "--path-format=absolute", "--git-path", "worktrees")).glob("*"):
            link = admin / "gitdir"
            if not link.exists() or Path(link.read_text().strip()).parent == self.root:
                shutil.rmtree(admin, ignore_errors=True)

    def sound(self) -> bool:
        """Whether the worktree is still one: a run may have removed or changed its link to the repository."""
        try:
            return (self.root / ".git").read_text() == self._link
        except OSError:
            return False

    def remove(self, campaign: Path, branch: str | None, attic: str | None, *, last: bool) -> None:
        """Takes back what a set-up made: the worktree, the branch unless None, and the attic's links beyond `attic`.

        `last`: no other state of ours is in the campaign, so its ignore rules go too.
        """
        repo = Repo(campaign)
        self._forget(repo)
        if branch is not None and repo.resolve(f"refs/heads/{branch}"):
            repo.run("branch", "-D", "--quiet", branch)
        if attic is not None:
            repo.run("update-ref", self.attic, attic)
        elif repo.resolve(self.attic):
            repo.run("update-ref", "-d", self.attic)
        if last:
            repo.include(EXCLUDED)

    # -- reading

    def files(self) -> dict[str, str]:
        """The mutable files as they stand. Raises BadInput for one that is no UTF-8 text."""
        texts = {}
        for name in self._task.mutable_files:
            try:
                texts[name] = (self.task_dir / name).read_bytes().decode()
            except UnicodeDecodeError:
                raise BadInput(f"mutable_files: {name}: not UTF-8 text") from None
        return texts

    def immutable_digest(self) -> str:
        """Digest over the immutable files and folders."""
        whole = hashlib.sha256()
        for name in sorted(self._task.immutable_files):
            path = self.task_dir / name
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file() and "__pycache__" not in file.parts:
                    whole.update(f"{file.relative_to(self.task_dir)}\0".encode())
                    whole.update(file.read_bytes())
        return whole.hexdigest()

    def drop_bytecode(self) -> None:
        """Removes compiled Python beside the immutable files: it is not in their digest, and Python would run it."""
        for name in self._task.immutable_files:
            path = self.task_dir / name
            for cache in path.rglob("__pycache__") if path.is_dir() else [path.parent / "__pycache__"]:
                shutil.rmtree(cache, ignore_errors=True)

    def immutable_changed(self) -> bool:
        """Whether a run or proposer has changed an immutable file since `create`."""
        try:
            return self.immutable_digest() != self._immutable
        except OSError:
            return True

    # -- the steps of an experiment

    def commit(self, files: Files, description: str, experiment: str, base: str) -> Committed:
        """Writes the files, restores whatever else is touched, commits T and links it to the attic.

        `base` is the attic's first parent when it has no link yet.
        """
        before = self.files()
        if files and all(before.get(name) == text for name, text in files.items()):
            raise ValueError(f"{description}: changes nothing")
        for name, text in files.items():
            if name not in before:
                raise ValueError(f"{name} is not a mutable file")
            (self.task_dir / name).write_bytes(text.encode())
        strays = self._restore_strays()
        names = [self._prefix + name for name in self._task.mutable_files]
        commit = self.repo.commit(names, f"experiment: {description}\n\nExperiment-Id: {experiment}")
        previous = self.repo.resolve(self.attic) or base
        self.repo.link(self.attic, commit, [previous, commit], f"attic: {description}")
        after = {**before, **files}
        return Committed(commit, nodes_added(before, after), code_state(after), strays)

    def keep(self, results: str, message: str, at: int) -> str:
        """Folds results.tsv into T and returns K. The same rows and time give the same K again."""
        self._write_results(results)
        return self.repo.amend([self._prefix + RESULTS], f"@{at} +0000", message)

    def reset(self, commit: str, results: str) -> None:
        """Back to a commit, hard; files that a run left behind go; results.tsv is written anew (its rows survive)."""
        self.repo.reset_hard(commit)
        if any(path != self._prefix + RESULTS for path in self.repo.changed_paths()):
            self.repo.run("clean", "--quiet", "-d", "--force")
        self._write_results(results)

    def _write_results(self, results: str) -> None:
        path = self.task_dir / RESULTS
        partial = path.with_suffix(".tsv.tmp")
        partial.write_text(results)
        partial.replace(path)

    def _restore_strays(self) -> tuple[str, ...]:
        allowed = {self._prefix + name for name in (*self._task.mutable_files, RESULTS)}
        strays = [path for path in self.repo.changed_paths() if path not in allowed]
        for path in strays:
            if self.repo.run("ls-files", "--", path):
                self.repo.run("checkout", "HEAD", "--", path)
            elif (self.root / path).is_dir():
                shutil.rmtree(self.root / path)
            else:
                (self.root / path).unlink(missing_ok=True)
        return tuple(strays)


def code_state(files: Files) -> str:
    """Hash of the mutable files' contents: the same on every machine, whatever the commit."""
    whole = hashlib.sha256()
    for name, text in sorted(files.items()):
        whole.update(f"{name}\0{len(text.encode())}\0".encode() + text.encode())
    return whole.hexdigest()


def nodes_added(before: Files, after: Files) -> int:
    """How much complexity was added: ast nodes in Python, LINE_NODES for each line elsewhere; negative for less."""
    return sum(_weight(name, after[name]) - _weight(name, before[name]) for name in _changed(before, after))


def _changed(before: Files, after: Files) -> Iterable[str]:
    return (name for name in after if after[name] != before[name])


def _weight(name: str, text: str) -> int:
    if name.endswith(".py"):
        try:
            return pyedit.node_count(text)
        except pyedit.EditError:
            pass  # it will crash when it runs; until then its lines say how big it is
    return LINE_NODES * sum(bool(line.strip()) for line in text.splitlines())
