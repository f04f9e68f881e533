"""The ratchet loop of one machine, whole: propose -> commit -> run -> decide -> keep or reset, for ever.

(Reference, "The Experiment Loop".) Each step is made durable in the journal before the next one starts, so a kill at
any moment loses at most the run in progress, and that run is made again. Between runs HEAD of the branch is the last
keep.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from shared import wire
from shared.errors import BadInput, SwarmError
from shared.task import CONFIG_NAME, TaskSpec
from shared.wire import Status

from . import ratchet, results
from .journal import Experiment, Journal
from .proposers import Proposal, Proposer
from .ratchet import Decision, Policy, Trial
from .runner import Deadlines, Expected, Interrupted, Order, Progress, RunOutcome, run
from .workspace import Workspace


class BaselineFailed(BadInput):
    """The unmodified code gave no score; there is nothing to climb from."""


class Link(Protocol):
    """The seam to a coordinator. No call may fail, or take longer than 2 s: research goes on without one."""

    def assignment(self) -> wire.Explore | wire.Confirm | wire.Replay | wire.Promote: ...
    def report(self, experiment: Experiment) -> None: ...
    def give_back(self, lease: wire.LeaseRef, why: str) -> None: ...


class Alone:
    """No coordinator: explore, and tell nobody."""

    def assignment(self) -> wire.Explore:
        return wire.Explore()

    def report(self, experiment: Experiment) -> None:
        pass

    def give_back(self, lease: wire.LeaseRef, why: str) -> None:
        pass


class Screen(Protocol):
    """Who watches. Every call is a fact that is already in the journal, but for progress."""

    def started(self, experiment: Experiment) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def decided(self, experiment: Experiment, standing: results.Standing | None) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Limits:
    """What every run of this loop is held to."""

    deadlines: Deadlines
    memory_limit_gb: float
    environment: Mapping[str, str]
    expected: Expected | None  #: set where our prepare measures the score
    inherit: tuple[int, ...] = ()  #: descriptors that every run gets


class Loop:
    """One machine's loop over one branch."""

    def __init__(
        self,
        task: TaskSpec,
        workspace: Workspace,
        journal: Journal,
        proposer: Proposer,
        limits: Limits,
        state: Path,
        screen: Screen,
        stop: threading.Event,
        link: Link,
    ) -> None:
        """`state` is `<campaign>/.swarm/<name>`, the folder for logs and the record, outside the worktree."""
        self._campaign = state.parent.parent
        self._task, self._workspace, self._journal, self._proposer = task, workspace, journal, proposer
        self._limits, self._state, self._screen, self._stop, self._link = limits, state, screen, stop, link
        settings = task.ratchet
        self._policy = Policy(
            settings.policy,
            settings.rerun_after,
            settings.sigma_per_node,
            settings.sigma_per_gb,
            settings.equal_within,
            task.sign,
            positive=task.metric.endswith("bpb"),
        )

    # -- the story

    def establish(self) -> None:
        """Picks up what a kill left, then makes sure of the baseline. Raises BaselineFailed."""
        try:
            self._recover()
            if self._journal.head is None and not self._journal.experiments:
                self._try(Proposal("baseline", {}, "baseline", {}, self._proposer.params(self._workspace.files())))
            if self._journal.head is None:
                reason = self._journal.experiments[0].reason
                key = "metric" if self._task.metric in reason else "run_command"
                raise BaselineFailed(f"{CONFIG_NAME}: {key}: the baseline gave no score: {reason}")
            while len(self._journal.experiments[0].runs) < self._task.ratchet.baseline_runs:
                if len(self._journal.experiments) > 1:
                    break  # HEAD has moved on
                self._rerun()
        except Interrupted:
            self._void("stopped by hand")

    def go(self, experiments: int | None) -> None:
        """Tries ideas until stopped, or until so many experiments more are decided."""
        until = None if experiments is None else len(self._journal.experiments) + experiments
        try:
            while not self._stop.is_set() and (until is None or len(self._journal.experiments) < until):
                if ratchet.rerun_due(self._journal.since_rerun, self._policy):
                    self._rerun()
                    continue
                if not self._run_assignment(self._link.assignment()):
                    return
        except Interrupted:
            self._void("stopped by hand")

    def _run_assignment(self, assignment: wire.Explore | wire.Confirm | wire.Replay | wire.Promote) -> bool:
        """Whether to go on; False when there is nothing left to try."""
        match assignment:
            case wire.Confirm():
                self._confirm(assignment)
            case wire.Explore(wait_s=wait) if wait > 0:
                self._stop.wait(wait)
            case wire.Explore():
                proposal = self._proposer.propose(self._workspace.files(), self._journal.experiments)
                if proposal is None:
                    self._screen.note(f"{self._proposer.name} has nothing left to try; widen search_space")
                    return False
                self._try(proposal)
            case _:
                self._link.give_back(assignment.lease, f"this version runs no {assignment.kind}")
        return True

    # -- its steps

    def _try(self, proposal: Proposal) -> None:
        """One experiment, from proposal to verdict."""
        identity = str(uuid.uuid4())
        base = self._journal.setup["base"]
        committed = self._workspace.commit(proposal.files, results.one_line(proposal.description), identity, base)
        if committed.strays:
            self._screen.note(f"{proposal.proposer} touched {', '.join(committed.strays)}: restored")
        self._journal.append(
            "experiment",
            id=identity,
            number=len(self._journal.experiments),
            tested=committed.commit,
            description=proposal.description,
            proposer=proposal.proposer,
            edits=dict(proposal.edits),
            params=dict(proposal.params),
            nodes_added=committed.nodes_added,
            code_state=committed.code_state,
        )
        self._finish(self._journal.experiments[-1])

    def _finish(self, experiment: Experiment) -> None:
        """Runs, judges and files an experiment whose commit T is checked out."""
        self._screen.started(experiment)
        outcome = self._run(experiment)
        decision = self._judge(experiment, outcome)
        self._journal.append("decision", experiment=experiment.id, status=decision.status, reason=decision.reason)
        self._file(experiment)
        self._link.report(experiment)
        self._screen.decided(experiment, results.standing(self._journal, self._task))

    def _confirm(self, assignment: wire.Confirm) -> None:
        """The code of an experiment once more, whatever became of it."""
        experiment = self._journal.find(str(assignment.experiment))
        if experiment is None or experiment.status is None:
            self._link.give_back(assignment.lease, "not an experiment of this machine")
            return
        self._screen.note(f"running #{experiment.number} again ({experiment.description})")
        rows = results.to_tsv(self._journal.experiments, self._task.metric)
        self._workspace.reset(experiment.tested, rows)
        outcome = self._run(experiment, assignment.lease)
        self._workspace.reset(self._journal.commit, rows)
        self._link.report(experiment)
        level = outcome.reason if outcome.score is None else f"{outcome.score:.6f}"
        self._screen.note(f"#{experiment.number} again: {level}")

    def _run(self, experiment: Experiment, lease: wire.LeaseRef | None = None) -> RunOutcome:
        if self._workspace.immutable_changed():
            raise SwarmError(f"immutable files in {self._workspace.task_dir} differ from when this worker started")
        self._workspace.drop_bytecode()
        run_id = str(uuid.uuid4())
        order = Order(
            self._task.run_command,
            self._workspace.task_dir,
            self._task.metric,
            self._task.eval_command,
            self._limits.deadlines,
            self._limits.environment,
            run_id,
            secrets.randbelow(2**31),
            self._state / "record.jsonl",
            self._limits.memory_limit_gb,
            self._limits.expected,
            self._limits.inherit,
        )
        outcome = run(order, self._stop, self._screen.progress)
        if not self._workspace.sound():
            outcome = replace(outcome, status=Status.CRASH, score=None, reason="it broke its worktree")
            self._workspace.open(self._campaign, self._journal.setup["branch"], experiment.tested)
        elif outcome.status is None and self._workspace.immutable_changed():
            outcome = replace(outcome, status=Status.CRASH, score=None, reason="it changed an immutable file")
        self._keep_log(order.cwd / "run.log", f"{experiment.number:05d}-{run_id[:8]}.log")
        fields = {name: value for name, value in asdict(outcome).items() if name != "status"}
        leased = {"lease": lease.model_dump(mode="json")} if lease else {}
        self._journal.append("run", experiment=experiment.id, run=run_id, status=outcome.status, **fields, **leased)
        return outcome

    def _keep_log(self, log: Path, name: str) -> None:
        """Copies the run's log away, unless the run has removed it."""
        folder = self._state / "logs"
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(log, folder / name)

    def _judge(self, experiment: Experiment, outcome: RunOutcome) -> Decision:
        if outcome.status is not None or outcome.score is None:
            return Decision(outcome.status or Status.CRASH, outcome.reason)
        if self._journal.head is None:
            trial = Trial(outcome.score, outcome.memory_gb, 0, outcome.trained_share)
            fault = ratchet.unfit(trial, self._policy)
            return fault or Decision(Status.KEEP, "the baseline")
        trial = Trial(outcome.score, outcome.memory_gb, experiment.nodes_added, outcome.trained_share)
        sigma = results.noise_floor(self._journal, self._task)
        return ratchet.decide(self._journal.best(), trial, sigma, self._policy)

    def _file(self, experiment: Experiment) -> None:
        """Advances the branch to a keep, or resets it. Safe to repeat after a kill."""
        rows = results.to_tsv(self._journal.experiments, self._task.metric)
        if experiment.status is Status.KEEP:
            message = (
                f"experiment: {results.one_line(experiment.description)}\n\n"
                f"{self._task.metric}: {experiment.score:.6f}, {experiment.reason}\n\nExperiment-Id: {experiment.id}"
            )
            kept = self._workspace.keep(rows, message, experiment.decided_at)
            self._journal.append("kept", experiment=experiment.id, commit=kept)
        self._workspace.reset(self._journal.commit, rows)

    def _rerun(self) -> None:
        """HEAD's code once more: its level is the mean of its runs, so luck wears off."""
        head = self._journal.head
        assert head is not None
        self._screen.note(f"running HEAD again ({head.description})")
        outcome = self._run(head)
        self._workspace.reset(self._journal.commit, results.to_tsv(self._journal.experiments, self._task.metric))
        self._link.report(head)
        level = "no score" if outcome.score is None else f"{outcome.score:.6f}"
        self._screen.note(f"HEAD again: {level}; mean of its {len(head.scores)} runs is the level to beat")

    # -- after an interruption

    def _recover(self) -> None:
        """Brings branch and worktree back in step with the journal after a killed worker."""
        rows = results.to_tsv(self._journal.experiments, self._task.metric)
        pending = self._journal.pending
        if pending is None:
            self._workspace.reset(self._journal.commit, rows)
            return
        self._workspace.reset(pending.tested, rows)
        if pending.status is Status.KEEP:
            self._file(pending)
            self._link.report(pending)
        elif pending.runs:
            last = pending.runs[-1]
            status = None if last.score is not None else Status(last.status or Status.CRASH)
            outcome = RunOutcome(
                status, last.score, last.reason, last.memory_gb, last.seconds, last.seed, None, last.trained_share
            )
            decision = self._judge(pending, outcome)
            self._journal.append("decision", experiment=pending.id, status=decision.status, reason=decision.reason)
            self._file(pending)
            self._link.report(pending)
            self._screen.decided(pending, results.standing(self._journal, self._task))
        else:
            if not self._journal.interrupted:
                self._void("the worker ended during the run")
            self._screen.note(f"running again: {pending.description}")
            self._workspace.reset(pending.tested, rows)
            self._finish(pending)

    def _void(self, reason: str) -> None:
        """The run in progress does not count; its experiment is tried again at the next start."""
        pending = self._journal.pending
        self._journal.append("void", experiment=pending.id if pending else None, status=Status.VOID, reason=reason)
        self._workspace.reset(self._journal.commit, results.to_tsv(self._journal.experiments, self._task.metric))
        if pending:
            self._screen.note(f"{reason}: {pending.description} will be tried again")
