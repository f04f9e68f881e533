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

import psutil

from shared import git
from shared.errors import BadInput, Refused
from shared.prepare.constants import PROFILES

from .campaign import Campaign
from .journal import Journal
from .loop import Limits, Loop, Screen
from .machine import MachineProfile, slug
from .preparing import Prepared, prepare
from .proposers import Proposer
from .runner import Deadlines, Expected
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
        if machine is None or json.loads(path.open().readline() or "{}").get("machine") == machine
    ]
    return max(journals, key=lambda path: path.stat().st_mtime).parent if journals else None


def propose_tag(campaign: Campaign, machine: str, today: datetime.date) -> str:
    """A date tag as in the reference (`mar5`), numbered where the branch exists already."""
    plain = f"{today:%b}".lower() + str(today.day)
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

    def __init__(self, campaign: Campaign, machine: MachineProfile, tag: str) -> None:
        self.campaign, self.machine, self.tag = campaign, machine, slug(tag)
        self.branch = branch_name(campaign, self.tag, machine.name)
        self.state = state_folder(campaign, self.tag, machine.name)
        self.fresh = not (self.state / "journal.jsonl").exists()
        self.prepared: Prepared | None = None

    def loop(self, proposer: Proposer, screen: Screen, stop: threading.Event, progress: Bar) -> tuple[Loop, Journal]:
        """Branch, worktree, data and journal; raises BadInput, after undoing what a fresh set-up made."""
        try:
            return self._loop(proposer, screen, stop, progress)
        except BaseException:
            self.undo_if_fresh()
            raise

    def _loop(self, proposer: Proposer, screen: Screen, stop: threading.Event, progress: Bar) -> tuple[Loop, Journal]:
        task = self.campaign.task
        base = git.Repo(self.campaign.root).resolve("HEAD")
        if base is None:
            raise BadInput(f"{self.campaign.root}: no commit yet; commit the task's files first")
        workspace = Workspace.create(
            self.campaign.root, self.state / "work", task, self.campaign.prefix, self.machine.name, self.branch
        )
        for name in (*task.mutable_files, *task.immutable_files):
            if not (workspace.task_dir / name).exists():
                raise BadInput(f"{name!r} is not committed in {self.campaign.root}; commit it first")
        environment = {"SWARM_WORKTREE": str(workspace.root)}
        expected, allowance = None, None
        if task.profile is not None:
            profile = PROFILES[task.profile]
            self.prepared = prepare(workspace.task_dir, task, task.profile, progress)
            expected = Expected(task.profile, task.budget_s, self.prepared.digest, profile.startup_allowance_s)
            allowance = profile.cycle_allowance_s
            environment |= {
                "SWARM_PROFILE": task.profile,
                "SWARM_DATA": task.data,
                "SWARM_BUDGET_S": repr(task.budget_s),
            }
            if profile.threads:
                environment["OMP_NUM_THREADS"] = str(profile.threads)
        journal = Journal(self.state / "journal.jsonl")
        if not journal.setup:
            profile_of_machine = {k: v for k, v in asdict(self.machine).items() if k != "name"}
            journal.append(
                "setup",
                tag=self.tag,
                machine=self.machine.name,
                branch=self.branch,
                base=base,
                metric=task.metric,
                digest=self.prepared.digest if self.prepared else None,
                **profile_of_machine,
            )
        elif self.prepared and journal.setup["digest"] != self.prepared.digest:
            raise BadInput(
                f"prepare's digest is {self.prepared.digest[:12]}, this branch was measured with "
                f"{str(journal.setup['digest'])[:12]}; restore prepare and data, or start anew with --tag"
            )
        limits = Limits(
            Deadlines.of(task.budget_s, self.machine.backend, allowance),
            task.memory_limit_gb or DEFAULT_MEMORY_SHARE * psutil.virtual_memory().total / 2**30,
            environment,
            expected,
        )
        return Loop(task, workspace, journal, proposer, limits, self.state, screen, stop), journal

    def undo(self) -> None:
        """Removes branch, worktree and state."""
        workspace = Workspace(self.state / "work", self.campaign.task, self.campaign.prefix, self.machine.name)
        if workspace.root.exists():
            workspace.remove(self.campaign.root, self.branch)
        shutil.rmtree(self.state, ignore_errors=True)
        with_others = self.state.parent
        if with_others.exists() and not any(with_others.iterdir()):
            with_others.rmdir()

    def undo_if_fresh(self) -> None:
        """Undoes a set-up that has no baseline yet and was made by this call."""
        if self.fresh:
            self.undo()
