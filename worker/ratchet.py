"""The ratchet: keep or not, as a pure function (reference, "Decision Framework").

A score is held against the MEAN of the runs of HEAD's code (policy `rerun-best`) or against the score that HEAD was
kept with (`strict`). "Lower" means lower by more than the gain that added complexity and memory ask for, which is 0
when neither grew; "equal" means within `equal_within` sigmas. docs/ratchet.md derives the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from shared.wire import Status

PRIOR_DEGREES = 4.0  #: the prior sigma counts as so many reruns' worth of evidence
OVERTIME = 1.05  #: a run that trained longer than this x its budget is never a keep


@dataclass(frozen=True)
class Policy:
    """How strict the ratchet is; gains are in sigmas."""

    name: Literal["rerun-best", "strict"] = "rerun-best"
    rerun_after: int = 8  #: experiments without a keep, after which HEAD is run once more (`rerun-best` only)
    sigma_per_node: float = 0.01  #: a: gain asked for each ast node added
    sigma_per_gb: float = 0.2  #: b: gain asked for each GiB of memory added
    equal_within: float = 0.25  #: scores this close are equal
    sign: int = 1  #: +1 where lower is better, -1 where higher is
    positive: bool = True  #: a score <= 0 is impossible (bits per byte)


@dataclass(frozen=True)
class Best:
    """HEAD's code on this machine."""

    scores: tuple[float, ...]  #: all its runs, the one it was kept with first
    memory_gb: float

    def level(self, policy: Policy) -> float:
        """The score to beat."""
        return self.scores[0] if policy.name == "strict" else math.fsum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class Trial:
    """One run of changed code."""

    score: float
    memory_gb: float
    nodes_added: int  #: ast nodes added to the mutable files, negative when the code got simpler
    trained_share: float | None = None  #: training time measured from outside / budget; None where it has no clock


@dataclass(frozen=True)
class Decision:
    """The verdict, with its reason in words."""

    status: Status
    reason: str


def required_gain(trial: Trial, best: Best, policy: Policy) -> float:
    """The gain, in sigmas, that added complexity and memory ask for; 0 when neither grew."""
    return policy.sigma_per_node * max(trial.nodes_added, 0) + policy.sigma_per_gb * max(_added_gb(trial, best), 0.0)


def _added_gb(trial: Trial, best: Best) -> float:
    """Memory added, GiB, negative when less; 0 within the 1 % that reruns of the same code differ by."""
    added = trial.memory_gb - best.memory_gb
    return added if abs(added) > 0.01 * best.memory_gb else 0.0


def unfit(trial: Trial, policy: Policy) -> Decision | None:
    """Why a run can never be a keep, the baseline included, whatever it is held against; None when it can."""
    if not math.isfinite(trial.score) or (policy.positive and trial.score <= 0):
        return Decision(Status.CRASH, f"score {trial.score:.6f} is impossible")
    if trial.trained_share is not None and trial.trained_share > OVERTIME:
        return Decision(Status.DISCARD, f"trained {trial.trained_share:.2f} x its budget, {OVERTIME} is the most")
    return None


def decide(best: Best, trial: Trial, sigma: float, policy: Policy) -> Decision:
    """Keep, discard or crash. Monotone: a better score, less code or less memory never turns a keep into a discard.

    Raises ValueError for a sigma that is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}; it must be above 0")
    if fault := unfit(trial, policy):
        return fault
    gain = policy.sign * (best.level(policy) - trial.score)
    sigmas = gain / sigma
    required = required_gain(trial, best, policy)
    change = f"{abs(gain):.6f} {'better' if gain > 0 else 'worse'} ({sigmas:+.1f} sigma)"
    if gain > 0 and sigmas > required:
        return Decision(Status.KEEP, change + (f", enough for {_added(trial, best)}" if required >= 0.05 else ""))
    nodes, memory = trial.nodes_added, _added_gb(trial, best)
    if abs(sigmas) <= policy.equal_within and nodes <= 0 and memory <= 0 and (nodes < 0 or memory < 0):
        return Decision(Status.KEEP, f"equal within {policy.equal_within} sigma and {_saved(trial, best)}")
    if gain > 0:
        return Decision(Status.DISCARD, f"{change}, {required:.2f} asked for {_added(trial, best)}")
    return Decision(Status.DISCARD, change if gain else "no change in score")


def _added(trial: Trial, best: Best) -> str:
    nodes, memory = trial.nodes_added, _added_gb(trial, best)
    parts = [f"{nodes} nodes more code"] * (nodes > 0) + [f"{memory:.1f} GiB more memory"] * (memory > 0)
    return " and ".join(parts)


def _saved(trial: Trial, best: Best) -> str:
    nodes, memory = -trial.nodes_added, -_added_gb(trial, best)
    parts = [f"{nodes} nodes less code"] * (nodes > 0) + [f"{memory:.1f} GiB less memory"] * (memory > 0)
    return " and ".join(parts)


def pooled_sigma(reruns: Iterable[Sequence[float]], prior: float) -> float:
    """Noise floor: pooled over the reruns of each code state, shrunk toward the machine class's prior.

    Each inner sequence holds the scores of one code state; single runs carry no information and are skipped. The
    result is never 0.
    """
    squares, degrees = PRIOR_DEGREES * prior * prior, PRIOR_DEGREES
    for scores in reruns:
        if len(scores) > 1:
            mean = math.fsum(scores) / len(scores)
            squares += math.fsum((score - mean) ** 2 for score in scores)
            degrees += len(scores) - 1
    return math.sqrt(squares / degrees)


def prior_sigma(metric: str, machine_class: str, baseline: float) -> float:
    """What reruns differ by before this machine has measured it: for val_bpb by class, else 1 % of the baseline."""
    if metric == "val_bpb":
        if machine_class.startswith("cuda"):
            return 0.002
        if machine_class.startswith(("mlx", "mps")):
            return 0.03
        return 0.01
    return 0.01 * abs(baseline) or 0.01


def rerun_due(since_rerun: int, policy: Policy) -> bool:
    """Whether HEAD is run once more now: a lucky best would block the way. `since_rerun`: experiments since it ran."""
    return policy.name == "rerun-best" and since_rerun >= policy.rerun_after
