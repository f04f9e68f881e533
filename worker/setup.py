"""The set-up before the loop (reference, "The Setup Phase"): tag, branch, data, results.tsv, baseline, approval.

State lies in `<campaign>/.swarm/<tag>-<machine>/`: journal.jsonl, the worktree `work/`, `logs/`, and a lock that one
worker holds. A set-up whose baseline fails is undone, so that nothing is left on disk.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from shared import git
from shared.errors import AlreadyThere, BadInput, Refused
from shared.prepare.constants import PROFILES
from shared.task import CONFIG_NAME, TaskSpec
from shared.wire import Status

from .campaign import Campaign
from .journal import Journal
from .loop import Alone, Limits, Link, Loop, Screen
from .machine import MachineProfile, slug
from .preparing import Prepared, prepare
from .proposers import Proposer
from .proposers.search import unknown_constants
from .runner import Deadlines, Expected, end_strays
from .workspace import Workspace

DEFAULT_MEMORY_SHARE = 0.9  #: of the host's memory, where the task sets no memory_limit_gb
STATE = ".swarm"

Bar = Callable[[str, int, int], None]  #: what is being made, how much is done, of how much


def state_folder(campaign: Campaign, tag: str, machine: str) -> Path:
    return campaign.root / STATE / f"{tag}-{machine}"


def latest_state(campaign: Campaign, machine: str | None) -> Path | None:
    """The state folder used last, of this machine or of any."""
    journals = [
        path
        for path in (campaign.root / STATE).glob("*/journal.jsonl")
        if (of := _machine_of(path)) is not None and machine in (None, of)
    ]
    return max(journals, key=lambda path: path.stat().st_mtime).parent if journals else None


def _machine_of(journal: Path) -> str | None:
    """Whose journal it is; None for one whose first line was never finished."""
    try:
        with journal.open() as file:
            return str(json.loads(file.readline())["machine"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def date_tag(today: datetime.date) -> str:
    """As in the reference: `mar5`."""
    return f"{today:%b}{today.day}".lower()


def propose_tag(campaign: Campaign, machine: str, today: datetime.date) -> str:
    """The day's tag, numbered where the branch exists already."""
    plain = date_tag(today)
    repo, number, tag = git.Repo(campaign.root), 1, plain
    while repo.resolve(f"refs/heads/{branch_name(campaign, tag, machine)}"):
        number += 1
        tag = f"{plain}-{number}"
    return tag


def branch_name(campaign: Campaign, tag: str, machine: str) -> str:
    return f"{campaign.task.branch_prefix}/{tag}-{machine}"


@contextmanager
def locked(state: Path) -> Iterator[None]:
    """Holds the slot's lock. Raises Refused when another worker holds it."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Refused(f"{state}: worker {file.read().strip() or '?'} is running here; stop it first") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class Setup:
    """Everything a loop stands on, made or found again."""

    def __init__(self, campaign: Campaign, machine: MachineProfile, tag: str, inherit: tuple[int, ...] = ()) -> None:
        """`inherit`: descriptors that every run gets (the slot's lock)."""
        self._inherit = inherit
        self.campaign, self.machine, self.tag = campaign, machine, slug(tag)
        self.branch = branch_name(campaign, self.tag, machine.name)
        self.state = state_folder(campaign, self.tag, machine.name)
        self.workspace = Workspace(self.state / "work", campaign.task, campaign.prefix, machine.name)
        self.prepared: Prepared | None = None
        self._journal: Journal | None = None

    @property
    def journal(self) -> Journal:
        assert self._journal is not None, "loop() comes first"
        return self._journal

    def loop(
        self, proposer: Proposer, screen: Screen, stop: threading.Event, progress: Bar, link: Link | None = None
    ) -> Loop:
        """Branch, worktree, data and journal, in step with each other. Call with the slot's lock held.

        Raises BadInput, Refused or AlreadyThere; whatever a set-up without a baseline made is then undone.
        """
        self._journal = Journal(self.state / "journal.jsonl")
        try:
            if not self._journal.setup:
                self._begin(self._journal)
            return self._loop(self._journal, proposer, screen, stop, progress, link or Alone())
        except BaseException:
            self.undo_without_baseline()
            raise

    def _begin(self, journal: Journal) -> None:
        """The journal's first line: what this branch starts from and is measured by. Nothing else is made yet."""
        repo, task = git.Repo(self.campaign.root), self.campaign.task
        base = repo.resolve("HEAD")
        if base is None:
            raise BadInput(f"{self.campaign.root}: no commit yet; commit the task's files first")
        prefix = f"{self.campaign.prefix}/" if self.campaign.prefix else ""
        ours = tuple(prefix + name for name in (CONFIG_NAME, *task.mutable_files, *task.immutable_files))
        if dirty := [
            path for path in repo.changed_paths() if path in ours or path.startswith(tuple(f"{n}/" for n in ours))
        ]:
            raise BadInput(
                f"{dirty[0]}: not committed in {self.campaign.root}; runs start from commits, so commit it first"
            )
        tip = repo.resolve(f"refs/heads/{self.branch}")
        if tip is not None and not repo.is_ancestor(tip, base):
            raise AlreadyThere(
                f"branch {self.branch} exists, but its state in {self.state} is gone; take another --tag"
            )
        journal.append(
            "setup",
            tag=self.tag,
            machine=self.machine.name,
            branch=self.branch,
            base=base,
            attic=repo.resolve(self.workspace.attic),
            task=_measured_by(task),
            **{name: value for name, value in asdict(self.machine).items() if name != "name"},
        )

    def _loop(
        self,
        journal: Journal,
        proposer: Proposer,
        screen: Screen,
        stop: threading.Event,
        progress: Bar,
        link: Link,
    ) -> Loop:
        task, workspace = self.campaign.task, self.workspace
        for key, value in _measured_by(task).items():
            if journal.setup["task"][key] != value:
                raise BadInput(
                    f"{CONFIG_NAME}: {key} is {value!r}, {self.branch} was measured with "
                    f"{journal.setup['task'][key]!r}; change it back, or start anew with --tag"
                )
        if strays := end_strays(None, workspace.root):
            screen.note(f"ended {strays} processes of an earlier run")
        workspace.open(self.campaign.root, self.branch, journal.commit)
        if workspace.mended:
            screen.note(workspace.mended)
        for name in (*task.mutable_files, *task.immutable_files):
            if not (workspace.task_dir / name).exists():
                raise BadInput(f"{name!r} is not committed in {self.campaign.root}; commit it first")
        if journal.head is None and (unknown := unknown_constants(task, workspace.files())):
            raise BadInput(f"{CONFIG_NAME}: search_space: {unknown}")
        expected, environment = self._prepare(journal, progress)
        allowance = PROFILES[task.profile].cycle_allowance_s if task.profile else None
        limits = Limits(
            Deadlines.of(task.budget_s, self.machine.backend, allowance),
            task.memory_limit_gb or DEFAULT_MEMORY_SHARE * psutil.virtual_memory().total / 2**30,
            {"SWARM_WORKTREE": str(workspace.root), **environment},
            expected,
            self._inherit,
        )
        return Loop(task, workspace, journal, proposer, limits, self.state, screen, stop, link)

    def _prepare(self, journal: Journal, progress: Bar) -> tuple[Expected | None, dict[str, str]]:
        """Makes or checks the data of the task's profile: what runs must be measured with, and what they are told."""
        task = self.campaign.task
        if task.profile is None:
            return None, {}
        profile = PROFILES[task.profile]
        self.prepared = prepare(self.workspace.task_dir, task, task.profile, progress)
        if journal.digest is None:
            journal.append("digest", digest=self.prepared.digest)
        elif journal.digest != self.prepared.digest:
            raise BadInput(
                f"prepare's digest is {self.prepared.digest[:12]}, {self.branch} was measured with "
                f"{journal.digest[:12]}; restore prepare and data, or start anew with --tag"
            )
        environment = {
            "SWARM_PROFILE": task.profile,
            "SWARM_DATA": task.data,
            "SWARM_BUDGET_S": repr(task.budget_s),
            "SWARM_TRAIN_SHARDS": str(task.train_shards or profile.train_shards),
        }
        if profile.threads:
            environment["OMP_NUM_THREADS"] = str(profile.threads)
        allowances = profile.startup_allowance_s, profile.evaluation_allowance_s
        return Expected(task.profile, task.budget_s, self.prepared.digest, *allowances), environment

    def undo_without_baseline(self) -> None:
        """Removes what this set-up made, if it never came to a baseline; with one, everything stays."""
        if self.journal.head is not None or any(e.status == Status.KEEP for e in self.journal.experiments):
            return
        self.journal.close()
        others = [path for path in self.state.parent.iterdir() if path != self.state]
        if self.journal.setup:
            self.workspace.remove(self.campaign.root, self.branch, self.journal.setup["attic"], last=not others)
        shutil.rmtree(self.state, ignore_errors=True)
        if not others:
            self.state.parent.rmdir()


def _measured_by(task: TaskSpec) -> dict[str, Any]:
    """The keys of the task that scores depend on: with another value they do not compare."""
    keys = (
        "metric",
        "metric_direction",
        "budget_minutes",
        "run_command",
        "eval_command",
        "profile",
        "data",
        "train_shards",
    )
    return {key: getattr(task, key) for key in keys}
