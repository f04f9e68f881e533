"""The journal: the truth of a machine's loop, one JSON object a line, appended and fsynced, outside the worktree.

results.tsv, the resume after a kill and the search's memory are all derived from it. A line that was cut short by a
kill is dropped at the next start: what it would have said had not happened yet.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

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
    digest: str | None = None  #: of all that the score depends on besides the mutable files; None without a profile
    epochs: float | None = None  #: passes over the training rows
    tail: str = ""  #: the last lines of its log, where it failed
    phases: dict[str, float] = field(default_factory=dict)  #: seconds: start, compile, train, evaluate
    summary: dict[str, float] = field(default_factory=dict)  #: what it printed
    run: str = ""  #: its id


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
    idea: str = ""  #: its hypothesis; replays inherit it
    parent: str = ""  #: where the branch stood when it was tried
    version: int = 0  #: grows with all that becomes known of it
    lease: dict[str, Any] | None = None  #: what its last run was leased for
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
        """Reads it; the file is made or changed by the first `append`. Raises SwarmError for a damaged line."""
        self._path = path
        self.setup: dict[str, Any] = {}
        self.experiments: list[Experiment] = []
        self.head: Experiment | None = None  #: the last keep
        self.since_keep = 0  #: decided experiments since then, reruns of HEAD not counted
        self.interrupted = False  #: the last thing that happened is a run that does not count
        self.digest: str | None = None  #: what this branch is measured with
        self.approved = False  #: a person said that the loop may go on by itself
        self._reran_at = 0
        self._by_id: dict[str, Experiment] = {}
        self._whole = 0  #: bytes of whole lines when it was read
        self._file: TextIO | None = None
        for number, line in enumerate(self._lines(), 1):
            try:
                self._fold(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise SwarmError(f"{path}:{number}: damaged journal line; move the file aside to start anew") from None

    def _lines(self) -> list[bytes]:
        data = self._path.read_bytes() if self._path.exists() else b""
        self._whole = data.rfind(b"\n") + 1
        return data[: self._whole].split(b"\n")[:-1]

    def append(self, event: str, **values: Any) -> None:
        """Durable when it returns. Raises ValueError for a number that is none; then nothing is written."""
        entry = {"event": event, "at": int(time.time()), **values}
        line = json.dumps(entry, allow_nan=False) + "\n"
        if self._file is None:  # only who writes may cut a torn line off: a reader may be looking at one in the making
            if self._path.exists():
                os.truncate(self._path, self._whole)
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._fold(entry)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _fold(self, event: dict[str, Any]) -> None:
        self.interrupted = event["event"] == "void"
        match event["event"]:
            case "setup":
                self.setup = event
            case "experiment":
                names = Experiment.__dataclass_fields__.keys() & event.keys()
                experiment = Experiment(**{name: event[name] for name in names})
                experiment.version = 1
                experiment.parent = experiment.parent or self.commit
                experiment.idea = experiment.idea or experiment.id
                self.experiments.append(experiment)
                self._by_id[experiment.id] = experiment
            case "run":
                experiment = self._by_id[event["experiment"]]
                experiment.version += 1
                experiment.lease = event.get("lease")
                if experiment is self.head:
                    self._reran_at = self.since_keep
                fields = Run.__dataclass_fields__.keys() & event.keys()
                experiment.runs.append(Run(**{name: event[name] for name in fields}))
            case "digest":
                self.digest = str(event["digest"])
            case "approved":
                self.approved = True
            case "decision":
                experiment = self._by_id[event["experiment"]]
                experiment.status, experiment.reason = Status(event["status"]), event["reason"]
                experiment.decided_at = event["at"]
                experiment.version += 1
                if experiment.status is not Status.KEEP:
                    self.since_keep += 1
            case "kept":
                self.head = self._by_id[event["experiment"]]
                self.head.kept = event["commit"]
                self.head.version += 1
                self.since_keep = self._reran_at = 0

    def find(self, identity: str) -> Experiment | None:
        return self._by_id.get(identity)

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

    @property
    def commit(self) -> str:
        """Where the branch stands between experiments: the last keep, at first the base."""
        return self.head.kept if self.head and self.head.kept else str(self.setup["base"])

    def best(self) -> Best:
        """HEAD's code on this machine. Only after the baseline."""
        assert self.head is not None
        return Best(self.head.scores, self.head.runs[0].memory_gb)

    def reruns(self) -> list[tuple[float, ...]]:
        """Scores of every code that ran more than once, for the noise floor."""
        return [e.scores for e in self.experiments if len(e.runs) > 1]
