"""The one thread that writes. Jobs that wait are committed together.

With a single writer, events get their positions in commit order on every database, SQLite never meets a lock, and one
fsync serves all that waited for the last one. A job is a function of a Transaction; it either happens whole, or raises
to its caller and leaves nothing. Where one of several fails all are run a second time, so that what a job changes in
memory comes by `after_commit`. A commit that failed may have happened all the same (the answer was lost), so the next
transaction first reads what is there. NOT covered: a second process writing to the same tables; the coordinator's lock
keeps one from starting.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, Executable, insert, select
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from shared.errors import SwarmError
from shared.wire import Event

from . import tables

BATCH = 64  #: jobs committed together at most

T = TypeVar("T")
Rows = dict[Executable, list[dict[str, Any]]]  #: by the statement that inserts them, in the order they came
TROUBLE = (OperationalError, InterfaceError, InternalError, PoolTimeout)  #: the database's, not a job's

log = logging.getLogger(__name__)

_INSERT_EVENT = insert(tables.table(tables.Event))


class StorageUnavailable(SwarmError):
    """The database took nothing (disk full, server away). What was sent may be sent again."""


@dataclass
class Transaction:
    """One job's writes. What it says happened becomes an event when, and only when, it is committed."""

    connection: Connection
    next_position: int
    at: int
    rows: Rows = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    consequences: list[Callable[[], object]] = field(default_factory=list)

    def later(self, insertion: Executable, row: dict[str, Any]) -> None:
        """A row that no job reads before the next `flush`: those of all jobs go to the database in one statement."""
        self.rows.setdefault(insertion, []).append(row)

    def record(self) -> None:
        for event in self.events:
            self.later(_INSERT_EVENT, event.model_dump())

    def flush(self) -> None:
        for insertion, rows in self.rows.items():
            self.connection.execute(insertion, rows)
        self.rows.clear()

    def after_commit(self, consequence: Callable[[], object]) -> None:
        """For what is kept in memory: called on the writer's thread, in commit order, and only if it is committed."""
        self.consequences.append(consequence)

    def event(self, kind: str, machine: str | None = None, /, **data: Any) -> Event:
        event = Event(position=self.next_position + len(self.events), kind=kind, at=self.at, machine=machine, data=data)
        self.events.append(event)
        return event


@dataclass
class _Job:
    run: Callable[[Transaction], Any]
    future: Future[Any] = field(default_factory=Future)


class _Failed(Exception):
    """One job of several failed; what all of them wrote is undone."""


@dataclass
class _Outcome:
    done: list[tuple[_Job, Any]] = field(default_factory=list)
    failed: list[tuple[_Job, Exception]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    consequences: list[Callable[[], object]] = field(default_factory=list)


class Writer:
    """Commits jobs in the order they came."""

    def __init__(
        self,
        engine: Engine,
        next_event: int,
        published: Callable[[list[Event]], None],
        recovered: Callable[[Connection], None] = lambda _: None,
    ) -> None:
        """`published` gets each commit's events, in order, on the writer's thread; it must not block. `recovered` is
        called there after a failed commit, before anything else is written: memory may lag behind what is stored."""
        self._engine, self._published, self._recovered = engine, published, recovered
        self._next_event = next_event
        self._in_doubt = False  #: the last commit failed; whether all of it did is not known
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self.fault: str | None = None  #: why the last commit failed; None when it worked
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    @property
    def last_event(self) -> int:
        """Position of the last event that is committed; 0 before the first."""
        return self._next_event - 1

    def submit(self, job: Callable[[Transaction], T]) -> Future[T]:
        """Queues a job. The future raises what the job raised, or StorageUnavailable."""
        work = _Job(job)
        with self._lock:
            if self._closed:
                raise StorageUnavailable("the coordinator is stopping")
            self._jobs.put(work)
        return work.future

    def call(self, job: Callable[[Transaction], T]) -> T:
        return self.submit(job).result()

    def close(self) -> None:
        """Commits what waits, then ends."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            batch: list[_Job] = []
            job = self._jobs.get()
            while job is not None:
                batch.append(job)
                if len(batch) == BATCH or self._jobs.empty():
                    break
                job = self._jobs.get()
            if batch:
                self._commit(batch)
            if job is None:
                return

    def _commit(self, batch: list[_Job]) -> None:
        batch = [job for job in batch if job.future.set_running_or_notify_cancel()]
        if not batch:
            return
        try:
            try:
                outcome = self._attempt(batch, apart=False)
            except _Failed:
                outcome = self._attempt(batch, apart=True)
        except Exception as error:  # jobs' own do not come here: whatever does kept the transaction from happening
            self._in_doubt = True
            self.fault = _first_cause(error)
            for job in batch:
                job.future.set_exception(StorageUnavailable(f"the database took nothing: {self.fault}"))
            return
        self._in_doubt, self.fault = False, None
        self._next_event += len(outcome.events)
        self._tell(outcome.events, outcome.consequences)
        for job, value in outcome.done:
            job.future.set_result(value)
        for job, problem in outcome.failed:
            job.future.set_exception(problem)

    def _attempt(self, batch: list[_Job], apart: bool) -> _Outcome:
        """Commits the jobs together. `apart`: each in a savepoint of its own, which costs two statements a job, so that
        one that fails leaves the others. Raises _Failed where one fails and they are not apart."""
        outcome = _Outcome()
        with self._engine.begin() as connection:
            if self._in_doubt:
                outcome.events += self._missed(connection)
            rows: Rows = {}
            for job in batch:
                transaction = Transaction(connection, self._next_event + len(outcome.events), int(time.time()), rows)
                try:
                    with connection.begin_nested() if apart else nullcontext():
                        value = job.run(transaction)
                        transaction.record()
                        if apart:
                            transaction.flush()
                except TROUBLE:
                    raise
                except Exception as error:
                    if not apart:
                        raise _Failed from error
                    rows.clear()
                    outcome.failed.append((job, error))
                else:
                    outcome.done.append((job, value))
                    outcome.events += transaction.events
                    outcome.consequences += transaction.consequences
            try:
                transaction.flush()
            except TROUBLE:
                raise
            except Exception as error:  # one job's row; apart, that job alone has it
                raise _Failed from error
        return outcome

    def _tell(self, events: list[Event], consequences: list[Callable[[], object]]) -> None:
        """The thread outlives a listener's fault: all that is written after it goes through here."""
        try:
            for consequence in consequences:
                consequence()
            if events:
                self._published(events)
        except Exception:
            log.exception("what was committed could not be told")

    def _missed(self, connection: Connection) -> list[Event]:
        """Events of a commit that failed as far as we knew, and was made."""
        self._recovered(connection)
        events = tables.Event.__table__
        query = select(events).where(events.c.position >= self._next_event).order_by(events.c.position)
        return [Event.model_validate(dict(row._mapping)) for row in connection.execute(query)]


def _first_cause(error: BaseException) -> str:
    """In words. A full SQLite has left the transaction, so undoing the savepoint fails too, and is raised last."""
    first, before = error, error.__context__
    while before is not None:
        first, before = before if isinstance(before, TROUBLE) else first, before.__context__
    return " ".join(str(getattr(first, "orig", None) or first).split())
