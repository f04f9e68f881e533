"""An experiment of the journal, as a report to the coordinator."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

from shared import wire
from shared.git import Repo
from shared.task import TaskSpec
from shared.wire import ExperimentReport, Kind, RunReport, Status

from .journal import Experiment

TAIL_BYTES = 8192  #: of a run's log
FINGERPRINT = 1  #: version of how fingerprints are made


def report(experiment: Experiment, task: TaskSpec, prefix: str, repo: Repo, logs: Path) -> ExperimentReport:
    """Everything that is known of a decided experiment.

    Raises GitError when its commit cannot be read, ValueError for a number that is not finite.
    """
    assert experiment.status is not None
    paths = [f"{prefix}/{name}" if prefix else name for name in task.mutable_files]
    diff = repo.diff(experiment.parent, experiment.tested, paths)
    unsent = _unsent(diff)
    json.dumps([experiment.edits, experiment.params], allow_nan=False)
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
        description=_whole(experiment.description)[:2000],
        proposer=experiment.proposer[:63],
        edits=experiment.edits,
        params=experiment.params,
        nodes_added=experiment.nodes_added,
        code_state=experiment.code_state,
        status=experiment.status,
        reason=_whole(experiment.reason)[:2000],
        decided_at=experiment.decided_at,
        runs=tuple(_run(experiment, number) for number in range(len(experiment.runs))),
        diff=None if unsent or not diff else diff,
        log_tail=_tail(experiment, logs)
        + (f"\n[the diff {unsent} and was not sent; the commit has it]\n" * bool(unsent)),
        lease=wire.LeaseRef.model_validate(experiment.lease) if experiment.lease else None,
    )


def _unsent(diff: str) -> str:
    """Why this diff cannot travel, in words; empty where it can."""
    try:
        size = len(diff.encode())
    except UnicodeEncodeError:  # git's output has bytes that are no UTF-8, which JSON cannot carry
        return "is no UTF-8 text"
    return f"has {size} bytes, more than {wire.MAX_DIFF_BYTES}," if size > wire.MAX_DIFF_BYTES else ""


def _whole(text: str) -> str:
    """Without halves of characters, which no encoding has."""
    return text.encode(errors="replace").decode()


def _run(experiment: Experiment, number: int) -> RunReport:
    run = experiment.runs[number]
    return RunReport(
        # Journals of before runs had ids: the same one each time that it is sent.
        id=UUID(run.run) if run.run else uuid5(UUID(experiment.id), str(number)),
        seed=run.seed,
        score=run.score,
        status=Status(run.status) if run.status else None,
        reason=_whole(run.reason)[:2000],
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
        return experiment.tail.encode(errors="replace")[-TAIL_BYTES:].decode(errors="replace")


def fingerprint(edits: Mapping[str, Any], diff: str) -> str:
    """The same for the same idea, wherever it was had: over the constants set, else over the changed lines."""
    if edits:
        what = json.dumps(sorted((name, "set", value) for name, value in edits.items()), default=str)
    else:
        what = "\n".join(_changed(diff))
    return f"{FINGERPRINT}:{hashlib.sha256(what.encode(errors='surrogateescape')).hexdigest()[:32]}"


def _changed(diff: str) -> Iterator[str]:
    """Each file's name and its changed lines; positions, context and hashes are not the same on two machines."""
    in_hunk = False
    for line in diff.split("\n"):
        if line.startswith(("diff --git ", "@@ ")):
            in_hunk = line.startswith("@@ ")
            if not in_hunk:
                yield line
        elif in_hunk and line.startswith(("+", "-")):
            yield line
