"""Who is there, and whose leases still run: in memory only, on this process's own monotonic clock.

A heartbeat writes nothing to the database (a committed one saturates at some 300/s). What must last are transitions:
`due()` names them and the reaper stores them. After a restart every machine that was online, and every granted lease,
gets one full term. NOT covered: anything that must survive a restart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from uuid import UUID

from shared.wire import Activity, Heartbeat, Kind, LeaseRef

HEARTBEATS_PER_S = 100  #: asked for at most, of all machines together; more machines are asked less often
MISSED = 3  #: heartbeats, after which a machine counts as offline
GRACE_S = 5.0  #: on top of that, for a slow network


@dataclass
class _Seen:
    at: float
    until: float
    activity: Activity | None


@dataclass
class Term:
    """A granted lease."""

    attempt: int
    machine_id: int
    kind: Kind
    until: float


@dataclass(frozen=True)
class Due:
    """What time has brought about."""

    silent: tuple[int, ...]  #: machine ids
    expired: tuple[LeaseRef, ...]


class Presence:
    """Heartbeats and lease terms. Thread-safe."""

    def __init__(self, heartbeat_s: float, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._heartbeat_s, self._ttl_s, self._clock = heartbeat_s, ttl_s, clock
        self._seen: dict[int, _Seen] = {}
        self._terms: dict[UUID, Term] = {}
        self._lock = threading.Lock()

    @property
    def interval_s(self) -> float:
        """Seconds between a machine's heartbeats, stretched so that all together stay below HEARTBEATS_PER_S."""
        return max(self._heartbeat_s, len(self._seen) / HEARTBEATS_PER_S)

    @property
    def ttl_s(self) -> float:
        """A lease's term: never shorter than what makes a machine offline."""
        return max(self._ttl_s, self._silence_s)

    @property
    def _silence_s(self) -> float:
        return MISSED * self.interval_s + GRACE_S

    def arrived(self, machine_id: int, activity: Activity | None = None) -> None:
        now = self._clock()
        with self._lock:
            self._seen[machine_id] = _Seen(now, now + self._silence_s, activity)

    def restarted(self, machine_ids: Iterable[int]) -> None:
        """All that were here before this process: each gets the full term of a swarm of that size."""
        now = self._clock()
        with self._lock:
            self._seen.update((machine_id, _Seen(now, now, None)) for machine_id in machine_ids)
            until = now + self._silence_s
            for seen in self._seen.values():
                seen.until = until

    def left(self, machine_id: int) -> None:
        with self._lock:
            self._seen.pop(machine_id, None)
            self._terms = {lease: term for lease, term in self._terms.items() if term.machine_id != machine_id}

    def beat(self, machine_id: int, heartbeat: Heartbeat) -> tuple[UUID, ...]:
        """Renews the machine and the leases that it holds; returns those that it holds no longer."""
        self.arrived(machine_id, heartbeat.activity)
        lost = []
        with self._lock:
            for reference in heartbeat.leases:
                term = self._terms.get(reference.id)
                if term and (term.attempt, term.machine_id) == (reference.attempt, machine_id):
                    term.until = self._clock() + self.ttl_s
                else:
                    lost.append(reference.id)
        return tuple(lost)

    def granted(self, lease: UUID, attempt: int, machine_id: int, kind: Kind) -> None:
        with self._lock:
            self._terms[lease] = Term(attempt, machine_id, kind, self._clock() + self.ttl_s)

    def closed(self, lease: UUID) -> None:
        with self._lock:
            self._terms.pop(lease, None)

    def has_term(self, lease: UUID) -> bool:
        return lease in self._terms

    def holds_lease(self, lease: UUID, attempt: int, machine_id: int) -> bool:
        """Whether this grant is the machine's, and still running."""
        with self._lock:
            term = self._terms.get(lease)
            return term is not None and (term.attempt, term.machine_id) == (attempt, machine_id)

    def holds(self, machine_id: int, kind: Kind) -> bool:
        """Whether a machine has a running lease of this kind."""
        with self._lock:
            return any(term.machine_id == machine_id and term.kind == kind for term in self._terms.values())

    def due(self) -> Due:
        """What has run out by now, each until it is told to `forget`; with a silent machine goes all that it held, so
        that it learns when it is back which leases are no longer its own."""
        now = self._clock()
        with self._lock:
            silent = {machine for machine, seen in self._seen.items() if seen.until < now}
            expired = {
                lease: term for lease, term in self._terms.items() if term.until < now or term.machine_id in silent
            }
        return Due(tuple(silent), tuple(LeaseRef(id=lease, attempt=term.attempt) for lease, term in expired.items()))

    def forget_lease(self, lease: LeaseRef) -> None:
        """It is stored that this grant has run out."""
        with self._lock:
            if (term := self._terms.get(lease.id)) and term.attempt == lease.attempt:
                del self._terms[lease.id]

    def forget_machine(self, machine_id: int) -> None:
        """It is stored that this machine is silent, unless it has been heard of meanwhile."""
        now = self._clock()
        with self._lock:
            if (seen := self._seen.get(machine_id)) and seen.until < now:
                del self._seen[machine_id]

    def seen_s(self, machine_id: int) -> float | None:
        """Seconds since it was heard of; None when it is not here."""
        seen = self._seen.get(machine_id)
        return None if seen is None else self._clock() - seen.at

    def activity(self, machine_id: int) -> Activity | None:
        seen = self._seen.get(machine_id)
        return seen.activity if seen else None

    def count(self) -> int:
        return len(self._seen)
