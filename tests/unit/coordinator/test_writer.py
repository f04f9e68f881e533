"""The writer's thread: it commits in order, and nothing that a job, a caller or a listener does ends it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, insert, select
from sqlalchemy.exc import IntegrityError

from coordinator.database import migrate, open_engine
from coordinator.tables import Event as Row
from coordinator.tables import table
from coordinator.writer import BATCH, StorageUnavailable, Transaction, Writer
from shared.wire import Event


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = open_engine(f"sqlite:///{tmp_path / 'swarm.db'}")
    migrate(made)
    yield made.execution_options(writes=True)
    made.dispose()


Open = Callable[..., Writer]


@pytest.fixture
def writer(engine: Engine) -> Iterator[Open]:
    writers: list[Writer] = []

    def make(published: Callable[[list[Event]], None] = lambda _: None, **other: Any) -> Writer:
        writers.append(Writer(other.pop("engine", engine), 1, published, **other))
        return writers[-1]

    yield make
    for each in writers:
        each.close()


def says(kind: str) -> Callable[[Transaction], str]:
    def job(t: Transaction) -> str:
        t.event(kind)
        return kind

    return job


def fails(_: Transaction) -> None:
    raise ZeroDivisionError("this job is at fault")


@contextmanager
def held(writer: Writer) -> Iterator[None]:
    """The writer is busy until the block ends."""
    begun, go = threading.Event(), threading.Event()

    def wait(_: Transaction) -> None:
        begun.set()
        assert go.wait(30)

    writer.submit(wait)
    assert begun.wait(30)
    try:
        yield
    finally:
        go.set()


def stored(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        rows = connection.execute(select(Row.position, Row.kind).order_by(Row.position)).all()
    assert [row.position for row in rows] == list(range(1, len(rows) + 1))
    return [row.kind for row in rows]


def test_jobs_are_committed_in_their_order(writer: Open, engine: Engine) -> None:
    told: list[Event] = []
    open_ = writer(told.extend)
    futures = [open_.submit(says(f"e{n}")) for n in range(200)]
    assert [future.result() for future in futures] == [f"e{n}" for n in range(200)]
    assert stored(engine) == [e.kind for e in told] == [f"e{n}" for n in range(200)]
    assert open_.last_event == 200


def test_what_waits_is_committed_together(writer: Open, engine: Engine) -> None:
    commits = 0

    @event.listens_for(engine, "commit")
    def count(_: object) -> None:
        nonlocal commits
        commits += 1

    open_ = writer()
    with held(open_):
        futures = [open_.submit(says("e")) for _ in range(3 * BATCH)]
    for future in futures:
        future.result()
    assert commits == 1 + 3


def test_a_row_that_the_database_refuses_fails_its_own_job_only(writer: Open, engine: Engine) -> None:
    """Though the rows of all jobs go there together."""
    row = {"position": 1, "kind": "double", "at": 0, "machine": None, "data": {}}
    open_ = writer()
    with held(open_):
        good, bad = open_.submit(says("good")), open_.submit(lambda t: t.later(insert(table(Row)), row))
        after = open_.submit(says("after"))
    assert (good.result(), after.result()) == ("good", "after")
    with pytest.raises(IntegrityError):
        bad.result()
    assert stored(engine) == ["good", "after"]


@pytest.mark.parametrize("alone", [True, False])
def test_a_job_that_fails(writer: Open, engine: Engine, alone: bool) -> None:
    """Its caller hears; what it said did not happen."""
    told: list[Event] = []
    open_ = writer(told.extend)

    def half(t: Transaction) -> None:
        t.event("half")
        t.after_commit(lambda: told.append("never"))  # type: ignore[arg-type]
        t.connection.execute(Row.__table__.insert().values(position=99, kind="half", at=0, machine=None, data={}))
        raise ZeroDivisionError

    with held(open_):
        before = None if alone else open_.submit(says("before"))
        failing = open_.submit(half)
        after = None if alone else open_.submit(says("after"))
    with pytest.raises(ZeroDivisionError):
        failing.result()
    kinds = [] if before is None or after is None else [before.result(), after.result()]
    assert stored(engine) == [e.kind for e in told] == kinds
    assert open_.fault is None


def test_a_caller_that_went_away(writer: Open, engine: Engine) -> None:
    """A request that was cancelled while its job waited: nothing of it happens, and all goes on."""
    open_ = writer()
    with held(open_):
        futures = [open_.submit(says(kind)) for kind in ("one", "two", "three")]
        assert futures[1].cancel()
    assert futures[2].result(30) == "three"
    assert stored(engine) == ["one", "three"]


def test_a_running_job_cannot_be_cancelled(writer: Open) -> None:
    open_ = writer()
    begun, go = threading.Event(), threading.Event()

    def job(_: Transaction) -> int:
        begun.set()
        assert go.wait(30)
        return 1

    future = open_.submit(job)
    assert begun.wait(30)
    assert not future.cancel()
    go.set()
    assert future.result(30) == 1


def test_a_listener_that_fails(writer: Open, engine: Engine) -> None:
    def published(events: list[Event]) -> None:
        raise RuntimeError(f"no loop for {len(events)} events")

    open_ = writer(published)
    assert [open_.call(says(kind)) for kind in ("one", "two")] == ["one", "two"]
    assert stored(engine) == ["one", "two"]


def test_consequences_come_before_the_answer(writer: Open) -> None:
    seen: list[str] = []
    open_ = writer(lambda events: seen.extend(e.kind for e in events))

    def job(t: Transaction) -> list[str]:
        t.event("told")
        t.after_commit(lambda: seen.append("remembered"))
        return list(seen)

    assert open_.call(job) == []
    assert seen == ["remembered", "told"]


def test_no_connection_is_storage_trouble(writer: Open, engine: Engine) -> None:
    """Readers have them all: whoever waits may send again, and the thread lives."""
    small = create_engine(engine.url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    recovered: list[int] = []
    open_ = writer(engine=small, recovered=lambda _: recovered.append(1))
    with small.connect(), pytest.raises(StorageUnavailable, match="the database took nothing: QueuePool limit"):
        open_.call(says("lost"))
    assert open_.fault
    with pytest.raises(ZeroDivisionError):
        open_.call(fails)
    assert open_.call(says("kept")) == "kept"
    assert open_.fault is None
    assert recovered
    assert stored(engine) == ["kept"]
    small.dispose()


def test_a_fault_that_is_nobodys(writer: Open, engine: Engine) -> None:
    """Not the database's, not a job's: the commit did not happen, so it is told as such."""
    broken = True

    @event.listens_for(engine, "begin")
    def begin(_: object) -> None:
        if broken:
            raise ValueError("a driver's bug")

    open_ = writer()
    with pytest.raises(StorageUnavailable, match="a driver's bug"):
        open_.call(says("lost"))
    broken = False
    assert open_.call(says("kept")) == "kept"
    assert stored(engine) == ["kept"]


def test_closing(writer: Open, engine: Engine) -> None:
    open_ = writer()
    with held(open_):
        futures = [open_.submit(says("e")) for _ in range(2 * BATCH)]
        closing = threading.Thread(target=open_.close)
        closing.start()
    closing.join(30)
    assert all(future.done() for future in futures)
    assert len(stored(engine)) == 2 * BATCH
    with pytest.raises(StorageUnavailable, match="stopping"):
        open_.submit(fails)
    open_.close()
