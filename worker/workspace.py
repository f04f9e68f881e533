"""The worktree in which experiments happen: apply, commit, keep, reset. The user's own checkout is never touched.

Invariants: only mutable files differ in a commit, beside results.tsv on a keep; in a monorepo only the task's directory
is staged; every tested commit T stays reachable from refs/attic/<machine>. NOT covered: what a run does outside the
worktree (docs/metric.md).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared import pyedit
from shared.errors import BadInput
from shared.git import Repo
from shared.task import TaskSpec

RESULTS = "results.tsv"
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
        self.repo = Repo(root, machine)
        self.root = root
        self.task_dir = root / prefix
        self.attic = f"refs/attic/{machine}"
        self._task = task
        self._prefix = f"{prefix}/" if prefix else ""
        self._immutable = ""

    @classmethod
    def create(cls, campaign: Path, root: Path, task: TaskSpec, prefix: str, machine: str, branch: str) -> Workspace:
        """Makes branch and worktree from the campaign's HEAD; continues the branch where it exists."""
        repo = Repo(campaign, machine)
        repo.exclude(EXCLUDED)
        repo.run("worktree", "prune")
        if not root.exists():
            new = [] if repo.resolve(f"refs/heads/{branch}") else ["-b", branch]
            repo.run("worktree", "add", "--quiet", "--force", *new, str(root), branch if not new else "HEAD")
        workspace = cls(root, task, prefix, machine)
        workspace._immutable = workspace.immutable_digest()
        return workspace

    def remove(self, campaign: Path, branch: str) -> None:
        """Undoes `create`."""
        repo = Repo(campaign)
        repo.run("worktree", "remove", "--force", str(self.root))
        repo.run("branch", "-D", "--quiet", branch)
        repo.run("update-ref", "-d", self.attic)
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
