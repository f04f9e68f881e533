"""results.tsv, and the same as a table: derived from the journal, never the other way round."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from shared.task import TaskSpec
from shared.wire import Status

from .journal import Experiment, Journal
from .ratchet import pooled_sigma, prior_sigma

#: The reference's three statuses; ours that it does not know are crashes to its readers.
_TSV_STATUS = {Status.KEEP: "keep", Status.DISCARD: "discard"}


def plain(text: str) -> str:
    """One line of text that does nothing to a terminal: control characters and bidirectional overrides are gone."""
    return " ".join(
        re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]", " ", text).split()
    )


@lru_cache(maxsize=1 << 16)  # all rows are rendered anew each time: 2 ms of 2,000 rows without it
def one_line(text: str) -> str:
    """A description that fits a TSV cell: `plain`, and no commas."""
    return plain(text.replace(",", ";"))


def to_tsv(experiments: Iterable[Experiment], metric: str) -> str:
    """The reference's log: five columns, scores to 6 decimals, memory (GiB) to 1; decided experiments only."""
    rows = [f"commit\t{metric}\tmemory_gb\tstatus\tdescription\n"]
    for e in experiments:
        if e.status is None:
            continue
        status = _TSV_STATUS.get(e.status, "crash")
        score, memory = (0.0, 0.0) if status == "crash" else (e.score or 0.0, e.runs[0].memory_gb)
        rows.append(f"{e.tested[:7]}\t{score:.6f}\t{memory:.1f}\t{status}\t{one_line(e.description)}\n")
    return "".join(rows)


@dataclass(frozen=True)
class Standing:
    """Where the campaign stands on this machine."""

    baseline: float
    best: float
    best_runs: int
    sigma: float
    gain_sigmas: float  #: of best over baseline, positive where better
    experiments: int
    keeps: int  #: the baseline not counted
    commit: str
    description: str


def standing(journal: Journal, task: TaskSpec) -> Standing | None:
    """None before the baseline is in."""
    if journal.head is None:
        return None
    first = journal.experiments[0].scores
    baseline = math.fsum(first) / len(first)
    head = journal.head.scores
    best = math.fsum(head) / len(head)
    sigma = noise_floor(journal, task)
    decided = [e for e in journal.experiments[1:] if e.status is not None]
    return Standing(
        baseline,
        best,
        len(head),
        sigma,
        task.sign * (baseline - best) / sigma,
        len(decided),
        sum(e.status is Status.KEEP for e in decided),
        journal.head.kept or journal.head.tested,
        journal.head.description,
    )


def levels(journal: Journal) -> list[float]:
    """The score of HEAD's code after each decided experiment, reruns not counted: the staircase so far."""
    steps: list[float] = []
    for e in journal.experiments:
        if e.status is Status.KEEP and e.score is not None:
            steps.append(e.score)
        elif steps and e.status is not None:
            steps.append(steps[-1])
    return steps


def noise_floor(journal: Journal, task: TaskSpec) -> float:
    """Sigma: pooled over this machine's reruns, shrunk toward its class's prior."""
    baseline = journal.experiments[0].scores[0]
    prior = prior_sigma(task.metric, journal.setup["machine_class"], baseline)
    return pooled_sigma(journal.reruns(), prior)


def to_dicts(experiments: Iterable[Experiment]) -> list[dict[str, Any]]:
    """For --json: everything a row knows."""
    return [
        {
            "number": e.number,
            "id": e.id,
            "commit": e.tested,
            "kept": e.kept,
            "score": e.score,
            "scores": e.scores,
            "memory_gb": e.runs[0].memory_gb if e.runs else None,
            "status": e.status,
            "reason": e.reason,
            "description": e.description,
            "proposer": e.proposer,
            "seeds": [run.seed for run in e.runs],
            "digest": e.runs[0].digest if e.runs else None,
            "epochs": e.runs[0].epochs if e.runs else None,
        }
        for e in experiments
    ]
