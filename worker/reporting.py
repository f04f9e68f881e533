"""An experiment of the journal, as a report to the coordinator."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from shared import wire
from shared.git import Repo
from shared.task import TaskSpec
from shared.wire import ExperimentReport, Kind, RunReport, Status

from .journal import Experiment, Run

TAIL_BYTES = 8192  #: of a run's log
FINGERPRINT = 1  #: version of how fingerprints are made


def report(experiment: Experiment, task: TaskSpec, prefix: str, repo: Repo, logs: Path) -> ExperimentReport:
    """Everything that is known of a decided experiment. Raises GitError when its commit cannot be read."""
    assert experiment.status is not None
    paths = [f"{prefix}/{name}" if prefix else name for name in task.mutable_files]
    diff = repo.diff(experiment.parent, experiment.tested, paths)
    oversized = len(diff.encode()) > wire.MAX_DIFF_BYTES
    return ExperimentReport(
        version=experiment.version,
        number=experiment.number,
        kind=Kind.EXPLORE,
        idea=UUID(experiment.idea),
        fingerprint=fingerprint(experiment.edits, diff),
        profile=task.profile or "default",
        tested=experiment.tested,
        parent=experiment.parent,
        kept=experiment.kept,
        description=experiment.description[:2000],
        proposer=experiment.proposer[:63],
        edits=experiment.edits,
        params=experiment.params,
        nodes_added=experiment.nodes_added,
        code_state=experiment.code_state,
        status=experiment.status,
        reason=experiment.reason[:2000],
        decided_at=experiment.decided_at,
        runs=tuple(_run(run) for run in experiment.runs),
        diff=None if oversized or not diff else diff,
        log_tail=_tail(experiment, logs) + (_OVERSIZED if oversized else ""),
        lease=wire.LeaseRef.model_validate(experiment.lease) if experiment.lease else None,
    )


_OVERSIZED = f"\n[the diff has more than {wire.MAX_DIFF_BYTES} bytes and was not sent; the commit has it]\n"


def _run(run: Run) -> RunReport:
    return RunReport(
        id=UUID(run.run),
        seed=run.seed,
        score=run.score,
        status=Status(run.status) if run.status else None,
        reason=run.reason[:2000],
        memory_gb=run.memory_gb,
        seconds=run.seconds,
        trained_share=run.trained_share,
        epochs=run.epochs,
        digest=run.digest,
        phases=run.phases,
        metrics=run.summary,
    )


def _tail(experiment: Experiment, logs: Path) -> str:
    """The end of its first run's log; where that is gone, what the journal has of it."""
    if not experiment.runs:
        return ""
    try:
        with (logs / f"{experiment.number:05d}-{experiment.runs[0].run[:8]}.log").open("rb") as file:
            file.seek(max(file.seek(0, 2) - TAIL_BYTES, 0))
            return file.read().decode(errors="replace")
    except OSError:
        return experiment.tail.encode()[-TAIL_BYTES:].decode(errors="replace")


def fingerprint(edits: Mapping[str, Any], diff: str) -> str:
    """The same for the same idea, wherever it was had: over the constants set, else over the changed lines."""
    if edits:
        what = json.dumps(sorted((name, "set", value) for name, value in edits.items()), default=str)
    else:
        what = "\n".join(line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---"))
    return f"{FINGERPRINT}:{hashlib.sha256(what.encode()).hexdigest()[:32]}"
