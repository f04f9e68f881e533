"""The journal: the truth of a machine's loop, one JSON object a line, appended and fsynced, outside the worktree.

results.tsv, the resume after a kill and the search's memory are all derived from it. A line that was cut short by a
kill is dropped at the next start: what it would have said had not happened yet.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import SwarmError
from shared.wire import Status

from .ratchet import Best


@dataclass(frozen=True)
class Run:
    """One execution that counts."""

    seed: int
    score: float | None
    memory_gb: float
    seconds: float
    status: str | None  #: crash or timeout; None where there is a score
    reason: str  #: what happened, in words, where there is no score
    trained_share: float | None
    tail: str = ""  #: the last lines of its log, where it failed


@dataclass
class Experiment:
    """One idea tried here, as far as it has come."""

    id: str
    number: int  #: 0 is the baseline
    tested: str  #: T, the commit that ran
    description: str
    proposer: str
    edits: dict[str, Any]  #: constants set, by name; empty where the proposer edits text
    params: dict[str, Any]  #: all searched constants as they then stood
    nodes_added: int
    code_state: str
    runs: list[Run] = field(default_factory=list)
    status: Status | None = None  #: None until it is decided
    reason: str = ""
    decided_at: int = 0  #: unix seconds
    kept: str | None = None  #: K, the commit on the branch

    @property
    def score(self) -> float | None:
        """The score it was decided on."""
        return self.runs[0].score if self.runs else None

    @property
    def tail(self) -> str:
        return self.runs[0].tail if self.runs else ""

    @property
    def scores(self) -> tuple[float, ...]:
        return tuple(run.score for run in self.runs if run.score is not None)


class Journal:
    """Appends events and folds them into the machine's present standing."""

    def __init__(self, path: Path) -> None:
        """Opens or makes it. Raises SwarmError for a damaged line that is not the last."""
        self._path = path
        self.setup: dict[str, Any] = {}
        self.experiments: list[Experiment] = []
        self.head: Experiment | None = None  #: the last keep
        self.since_keep = 0  #: decided experiments since then, reruns of HEAD not counted
        self.voids = 0
        self.approved = False  #: a person said that the loop may go on by itself
        self._reran_at = 0
        self._by_id: dict[str, Experiment] = {}
        for event in self._read():
            self._fold(event)
        self._file = path.open("a", encoding="utf-8")

    def _read(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self._path, whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise SwarmError(
                    f"{self._path}:{number}: damaged journal line; move the file aside to start anew"
                ) from None

    def append(self, event: str, **values: Any) -> None:
        """Durable when it returns."""
        entry = {"event": event, "at": int(time.time()), **values}
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._fold(entry)

    def close(self) -> None:
        self._file.close()

    def _fold(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "setup":
                self.setup = event
            case "experiment":
                names = Experiment.__dataclass_fields__.keys() & event.keys()
                experiment = Experiment(**{name: event[name] for name in names})
                self.experiments.append(experiment)
                self._by_id[experiment.id] = experiment
            case "run":
                experiment = self._by_id[event["experiment"]]
                if experiment.status is not None:
                    self._reran_at = self.since_keep
                experiment.runs.append(Run(**{name: event[name] for name in Run.__dataclass_fields__}))
            case "void":
                self.voids += 1
            case "approved":
                self.approved = True
            case "decision":
                experiment = self._by_id[event["experiment"]]
                experiment.status, experiment.reason = Status(event["status"]), event["reason"]
                experiment.decided_at = event["at"]
                if experiment.status is not Status.KEEP:
                    self.since_keep += 1
            case "kept":
                self.head = self._by_id[event["experiment"]]
                self.head.kept = event["commit"]
                self.since_keep = self._reran_at = 0

    @property
    def pending(self) -> Experiment | None:
        """The experiment that was started and is not wholly done: undecided, or decided `keep` and not folded in."""
        last = self.experiments[-1] if self.experiments else None
        if last and (last.status is None or (last.status is Status.KEEP and last.kept is None)):
            return last
        return None

    @property
    def since_rerun(self) -> int:
        """Experiments decided since HEAD's code last ran."""
        return self.since_keep - self._reran_at

    def best(self) -> Best:
        """HEAD's code on this machine. Only after the baseline."""
        assert self.head is not None
        return Best(self.head.scores, self.head.runs[0].memory_gb)

    def reruns(self) -> list[tuple[float, ...]]:
        """Scores of every code that ran more than once, for the noise floor."""
        return [e.scores for e in self.experiments if len(e.runs) > 1]
