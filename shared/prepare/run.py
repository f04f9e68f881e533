"""What this one process was ordered to do, fixed before train.py can say otherwise.

Invariant: budget, seed, profile and data come from the environment that the process was STARTED with. On Linux that is
read from /proc/self/environ, which later changes to os.environ do not touch; elsewhere from os.environ at import. The
runner compares what it ordered with what the record says, so a change that slips past this module costs the run its
result instead of bending it. NOT covered: code in the same process that patches this module; see docs/metric.md.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .constants import PROFILES, STARTUP_EXCLUDE_STEPS, Profile
from .errors import PrepareError
from .run_environment import cache_root, initial_environment


@dataclass(frozen=True)
class Run:
    """The order for this process."""

    profile: Profile
    data: str  #: name of the data set below the cache
    train_shards: int | None  #: training shards that were packed; None for the profile's number
    budget_s: float
    seed: int
    cache: Path
    record: Path | None  #: where events go, one JSON object a line; None when run by hand
    steps: int | None  #: benchmark mode: that many steps instead of seconds; such a run is never a result

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Run:
        """Raises PrepareError for an unknown profile or a number that is none."""
        name = environment.get("SWARM_PROFILE", "")
        if name not in PROFILES:
            raise PrepareError(
                f"SWARM_PROFILE is {name!r}: set it to one of {', '.join(PROFILES)} (`swarm run` does so by itself)"
            )
        profile = PROFILES[name]
        record = environment.get("SWARM_RECORD")
        steps = environment.get("SWARM_BENCHMARK_STEPS")
        shards = environment.get("SWARM_TRAIN_SHARDS")
        try:
            return cls(
                profile=profile,
                data=environment.get("SWARM_DATA", "sotu"),
                train_shards=int(shards) if shards else None,
                budget_s=float(environment.get("SWARM_BUDGET_S", profile.time_budget_s)),
                seed=int(environment.get("SWARM_SEED", "42")),
                cache=cache_root(environment),
                record=Path(record) if record else None,
                steps=int(steps) if steps else None,
            )
        except ValueError as error:
            raise PrepareError(f"the SWARM_ settings of budget, seed, shards and steps are numbers: {error}") from None


OVERRUN: Final = 1.03  #: training is ended before a step that would take it beyond this x the budget


class Record:
    """The events of this run, told to the runner as they happen (it puts its own clock beside each).

    Without a path the events are dropped: the run was started by hand.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("a", encoding="utf-8") if path else None

    def tell(self, event: str, **values: object) -> None:
        if self._file:
            self._file.write(json.dumps({"event": event, **values}, allow_nan=False) + "\n")
            self._file.flush()


class Clock:
    """Training time, owned by prepare: train.py asks for progress and whether to stop.

    Call `step()` after each optimizer step, once its work on the device is finished. The clock starts at the end of
    the first step (STARTUP_EXCLUDE_STEPS), as in the reference, so compilation is not charged to the idea. Its reading
    of the time is bound at import; the runner measures the same stretch from outside.
    """

    _now = staticmethod(time.perf_counter)

    def __init__(self, run: Run, record: Record) -> None:
        self._run, self._record = run, record
        self._started: float | None = None
        self._stopped = False
        self.steps = 0  #: optimizer steps taken, the untimed one included
        self.training_s = 0.0  #: timed seconds of training so far
        self.drawn = 0  #: training tokens handed out by the loader
        self._last = 0.0  # training_s at the step before

    @property
    def progress(self) -> float:
        """How much of the budget is used, 0 to 1; drives every schedule."""
        if self._run.steps is not None:
            timed = max(self.steps - STARTUP_EXCLUDE_STEPS, 0)
            return min(timed / max(self._run.steps - STARTUP_EXCLUDE_STEPS, 1), 1.0)
        return min(self.training_s / self._run.budget_s, 1.0)

    def step(self) -> bool:
        """Counts one finished optimizer step; False when training has to end.

        That is at the budget, or before it where another step like the last would overrun it by more than OVERRUN.
        """
        now = self._now()
        self.steps += 1
        if self._started is None and self.steps >= STARTUP_EXCLUDE_STEPS:
            self._started = now
            self._record.tell("clock", drawn=self.drawn)
        self.training_s = now - self._started if self._started is not None else 0.0
        step_s, self._last = self.training_s - self._last, self.training_s
        fits = self._run.steps is not None or self.training_s + step_s <= OVERRUN * self._run.budget_s
        going_on = self.progress < 1.0 and fits
        if not going_on and not self._stopped:
            self._stopped = True
            self._record.tell("trained", training_s=self.training_s, steps=self.steps)
        return going_on


try:
    RUN: Final = Run.from_environment(initial_environment())
    RECORD: Final = Record(RUN.record)
except (PrepareError, OSError) as problem:
    sys.exit(f"prepare: {problem}")

RECORD.tell("start", profile=RUN.profile.name, data=RUN.data, budget_s=RUN.budget_s, seed=RUN.seed, steps=RUN.steps)
