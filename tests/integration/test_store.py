"""The store's contract, the same on SQLite and on PostgreSQL: campaign, machines, branches, tokens, commits."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from coordinator.database import Conflict, NotFound, Sanity
from coordinator.store import Store
from coordinator.tables import Token
from coordinator.writer import StorageUnavailable, Transaction
from shared import wire
from shared.errors import BadInput
from shared.wire import Event, MachineChange, MachineState
from tests import postgres
from tests.reports import BASE, PREFIX, Machine, commit, machine, registration, report, row, standings, study


@contextmanager
def held(store: Store) -> Iterator[None]:
    """The writer is busy until the block ends; what is submitted meanwhile is one batch."""
    begun, go = threading.Event(), threading.Event()

    def wait(_: Transaction) -> None:
        begun.set()
        assert go.wait(30)

    store.writer.submit(wait)
    assert begun.wait(30)
    try:
        yield
    finally:
        go.set()


# -- the campaign


def test_a_database_belongs_to_one_campaign(url: str, open_store: Callable[..., Store]) -> None:
    open_store(digest="d" * 64).close()
    with pytest.raises(BadInput, match="metric 'loss', this one has 'accuracy'"):
        open_store(metric="accuracy")
    with pytest.raises(BadInput, match="prepare's digest is eeee"):
        open_store(digest="e" * 64)
    again = open_store(tag="another", base=commit("another"), sanity=Sanity(largest_step=0.5))
    assert (again.study.tag, again.study.base, again.study.digest) == ("t", BASE, "d" * 64)
    assert again.study.sanity.largest_step == 0.5


def test_a_digest_may_come_later(open_store: Callable[..., Store]) -> None:
    open_store().close()
    assert open_store(digest="d" * 64).study.digest == "d" * 64
    assert open_store().study.digest == "d" * 64


def test_a_second_opening_finds_everything(open_store: Callable[..., Store]) -> None:
    first = open_store()
    m1 = machine(first, "m1")
    paused = first.change(machine(first, "m2").member, MachineChange(name="laptop", paused=True))
    m1.tries(1.0)
    kept = m1.tries(0.9)
    token = first.add_token(token_values("ab" * 32, m1.member.id))
    before = standings(first), first.writer.last_event, first.members.all(), first.look.experiments()
    first.close()
    second = open_store()
    assert (standings(second), second.writer.last_event, second.members.all(), second.look.experiments()) == before
    assert second.members.named("laptop") == paused
    assert [(row.id, row.hash) for row in second.tokens()] == [(token, "ab" * 32)]
    m1 = Machine(second, second.members.named("m1"), number=2)
    later = m1.tries(0.8)
    assert [e.id for e in second.look.experiments(limit=2).experiments] == [later, kept]
    assert second.writer.last_event == before[1] + 2  # the experiment, and that it is the best


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_database_that_cannot_be_opened_is_named(url: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--db sqlite:.*nowhere.*unable to open"):
        Store(f"sqlite:///{tmp_path}/nowhere/swarm.db")
    (tmp_path / "noise").write_bytes(b"no database" * 1000)
    with pytest.raises(BadInput, match=r"--db sqlite:.*noise.*not a database"):
        Store(f"sqlite:///{tmp_path}/noise")
    with pytest.raises(BadInput, match=r"--db postgresql.*nobody:\*\*\*@127.0.0.1"):
        Store("postgresql://nobody:secret@127.0.0.1:9/none")
    with pytest.raises(BadInput, match=r"mysql://.*: sqlite:/// or postgresql:// is served"):
        Store("mysql://u:p@h/d")


# -- machines


def test_registering(store: Store) -> None:
    uid = uuid4()
    m1 = store.register(registration("m1", uid), PREFIX)
    assert (m1.name, m1.incarnation, m1.state) == ("m1", 1, MachineState.ONLINE)
    assert (m1.branch, m1.attic) == ("refs/heads/autoresearch/t-m1", "refs/attic/m1")
    again = store.register(registration("other", uid, machine_class="cuda-h100"), PREFIX)
    assert (again.id, again.name, again.incarnation, again.machine_class) == (m1.id, "m1", 2, "cuda-h100")
    assert store.members.all() == [again] == [store.members.named("m1")] == [store.members.by_id(m1.id)]
    (event_1, event_2) = store.look.events(0, 10)
    assert (event_1.data["new"], event_2.data["new"]) == (True, False)
    with pytest.raises(NotFound):
        store.members.named("other")


LONG = "a" * 57 + "-bcdef"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        pytest.param("m1", ["m1", "m1-2", "m1-3"], id="equal host names"),
        pytest.param("promoted", ["promoted-2", "promoted-3", "promoted-4"], id="the branch of promoted ideas"),
        pytest.param("self", ["self-2", "self-3", "self-4"], id="a word of the API"),
        pytest.param(LONG, [LONG, "a" * 57 + "-2", "a" * 57 + "-3"], id="too long for a number"),
    ],
)
def test_names_are_given_once(store: Store, wanted: str, expected: list[str]) -> None:
    names = [store.register(registration(wanted), PREFIX).name for _ in expected]
    assert names == expected
    assert all(registration(name).name == name for name in names)  # each is a Name


def test_a_name_between_numbers(store: Store) -> None:
    assert [store.register(registration(name), PREFIX).name for name in ("m1-2", "m1", "m1")] == ["m1-2", "m1", "m1-3"]


def test_renaming(store: Store) -> None:
    m1, m2 = machine(store, "m1").member, machine(store, "m2").member
    renamed = store.change(m1, MachineChange(name="studio"))
    assert (renamed.name, renamed.branch, renamed.attic) == ("studio", m1.branch, m1.attic)
    with pytest.raises(NotFound):
        store.members.named("m1")
    for taken in ("m2", "m1", "promoted", "self"):  # m1 is in the name of studio's branch
        with pytest.raises(Conflict, match="taken"):
            store.change(m2 if taken == "m1" else renamed, MachineChange(name=taken))
    assert store.register(registration("m1"), PREFIX).name == "m1-2"
    assert store.change(renamed, MachineChange(name="m1")).name == "m1"
    assert [(e.kind, e.machine, e.data) for e in store.look.events(0, 99) if e.kind == "renamed"] == [
        ("renamed", "studio", {"was": "m1"}),
        ("renamed", "m1", {"was": "studio"}),
    ]


def test_pausing(store: Store) -> None:
    m1 = machine(store).member
    assert store.change(m1, MachineChange(paused=True)).paused
    assert store.members.named("m1").paused
    assert not store.change(store.members.named("m1"), MachineChange(paused=False)).paused
    assert [e.kind for e in store.look.events(0, 9)] == ["registered", "paused", "resumed"]


def test_a_retired_machine_stays_retired(store: Store) -> None:
    m1 = machine(store)
    m1.tries(1.0)
    store.set_state(m1.member, MachineState.RETIRED)
    for state in (MachineState.ONLINE, MachineState.OFFLINE):  # a heartbeat, or the reaper, was on its way
        store.set_state(m1.member, state)
    assert store.members.named("m1").state is MachineState.RETIRED
    with pytest.raises(Conflict) as refused:
        store.register(registration("m1", uid=store.machine_rows()[0].uid), PREFIX)
    assert refused.value.kind == wire.RETIRED
    assert store.members.named("m1").incarnation == 1
    assert store.register(registration("m1"), PREFIX).name == "m1-2"
    assert row(store).best == 1.0  # its results stay


def test_a_transition_is_told_once(store: Store) -> None:
    m1 = machine(store).member
    for state in (MachineState.OFFLINE, MachineState.OFFLINE, MachineState.ONLINE, MachineState.ONLINE):
        store.set_state(m1, state)
    assert [e.kind for e in store.look.events(0, 9)] == ["registered", "offline", "online"]


def test_text_that_no_database_takes(store: Store) -> None:
    m1 = machine(store, version="0.1\0dev", hardware=wire.Hardware(host="a\0b"))
    identity = m1.tries(1.0, description="nul \0", proposer="p\0", reason="\0", code_state="\0", fingerprint="\0")
    view = store.look.experiment(identity)
    assert (view.reason, view.proposer) == ("�", "p�")
    for where in ({"profile": "\0"}, {"rung": "\0"}, {"machine_class": "\0"}):
        assert not store.look.leaderboard("group", **where).standings
        assert not store.look.experiments(**where).experiments
    assert not store.look.leaderboard("group", machine="\0").standings
    store.add_token(token_values("a" * 64, None) | {"label": "\0"})
    assert [row.label for row in store.tokens()] == ["�"]
    for ask in (store.look.lineage, store.look.find, lambda name: store.look.experiments(machine=name)):
        with pytest.raises(NotFound):
            ask("\0")


# -- branches and tokens


def test_branches(store: Store) -> None:
    m1 = machine(store).member
    store.pushed(m1, None, None)
    assert store.branches() == []
    store.pushed(m1, None, "a" * 40)
    store.pushed(m1, "c" * 40, "b" * 40)
    store.pushed(m1, "c" * 40, "d" * 40)
    (only,) = store.branches()
    assert (only.machine, only.ref, only.commit, only.attic) == ("m1", m1.branch, "c" * 40, "d" * 40)
    assert [e.data["commit"] for e in store.look.events(0, 9) if e.kind == "pushed"] == [None, "c" * 40]


def token_values(hash_: str, machine_id: int | None) -> dict[str, Any]:
    role = "worker" if machine_id else "viewer"
    times = {"created_at": 1, "expires_at": None, "revoked_at": None}
    return {"hash": hash_, "role": role, "label": "", "machine_id": machine_id, **times}


def test_tokens(store: Store) -> None:
    m1 = machine(store).member
    mine, theirs = store.add_token(token_values("a" * 64, m1.id)), store.add_token(token_values("b" * 64, None))
    assert store.revoke_tokens(Token.machine_id == m1.id) == 1
    assert store.revoke_tokens(Token.machine_id == m1.id) == 0
    assert {row.id: row.revoked_at is not None for row in store.tokens()} == {mine: True, theirs: False}


# -- commits


def test_events_are_contiguous_and_in_commit_order(url: str) -> None:
    told: list[Event] = []
    store = Store(url, told.extend)
    store.begin(study())
    machines = [machine(store, f"m{n}") for n in range(8)]

    def work(each: Machine) -> list[int]:
        after = []
        for n in range(25):
            each.tries(1.0 - n / 100)
            after.append(store.writer.last_event)
        return after

    with ThreadPoolExecutor(8) as pool:
        for after in pool.map(work, machines):
            assert after == sorted(after)
    stored = store.look.events(0, 10_000)
    store.close()
    assert [e.position for e in stored] == list(range(1, len(stored) + 1))
    assert len(stored) == 8 * (1 + 25 + 24)
    assert told == stored
    for each in machines:
        numbers = [e.data["number"] for e in stored if e.machine == each.name and e.kind == "experiment"]
        assert numbers == list(range(25))


def test_a_job_that_fails_leaves_nothing_and_disturbs_nobody(store: Store) -> None:
    m1 = machine(store)
    before = store.writer.last_event

    def bad(t: Transaction) -> None:
        store.reports.job(m1.member, uuid4(), report(7))(t)
        t.after_commit(lambda: pytest.fail("it was not committed"))
        raise ZeroDivisionError

    def worse(t: Transaction) -> None:
        """The same key twice: the database itself refuses."""
        for _ in range(2):
            t.connection.execute(Token.__table__.insert().values(**token_values("a" * 64, None)))

    with held(store):
        jobs = [store.writer.submit(store.reports.job(m1.member, uuid4(), report(n))) for n in (0, 1)]
        failing = [store.writer.submit(job) for job in (bad, worse)]
        jobs += [store.writer.submit(store.reports.job(m1.member, uuid4(), report(n))) for n in (2, 3)]
    assert all(job.result().stored for job in jobs)
    assert isinstance(failing[0].exception(), ZeroDivisionError)
    assert failing[1].exception() is not None
    for alone in (bad, worse):
        assert store.writer.submit(alone).exception() is not None
    assert sorted(e.number for e in store.look.experiments().experiments) == [0, 1, 2, 3]
    assert [e.position for e in store.look.events(0, 99)] == list(range(1, before + 5))
    assert store.writer.fault is None
    assert store.tokens() == []


@contextmanager
def outage(store: Store, config: pytest.Config) -> Iterator[None]:
    """A full disk (SQLite may not grow), or the server is away."""
    if store.engine.dialect.name == "postgresql":
        server = postgres.server(config)
        server.stop()
        try:
            yield
        finally:
            server.start()
        return

    def limit(connection: Any, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages}")

    pages = 1  # SQLite takes what it has now
    event.listen(store.engine, "checkout", limit)
    try:
        yield
    finally:
        pages = 2**32 - 2


WHY = {"sqlite": "disk is full", "postgresql": "terminating connection|connection failed|closed the connection"}


def test_an_outage_loses_nothing(url: str, open_store: Callable[..., Store], request: pytest.FixtureRequest) -> None:
    store = open_store()
    m1 = machine(store)
    m1.tries(1.0)
    noise = "".join(random.Random(1).choices("0123456789abcdef", k=200_000))  # a page or two would still fit
    waiting = {uuid4(): report(n, (1.0 - n / 100,), diff=noise) for n in range(1, 9)}
    big = registration("m2", hardware=wire.Hardware.model_construct(os=noise))
    lease = uuid4()

    def send() -> list[Any]:
        return [store.writer.submit(store.reports.job(m1.member, i, r)) for i, r in waiting.items()]

    before = store.writer.last_event, standings(store), store.members.all()
    with outage(store, request.config):
        for future in send():
            with pytest.raises(
                StorageUnavailable, match=f"the database took nothing: .*({WHY[url.partition(':')[0]]})"
            ):
                future.result()
        assert store.writer.fault
        with pytest.raises(StorageUnavailable):
            store.register(big, PREFIX)
        if store.engine.dialect.name == "postgresql":
            with pytest.raises(StorageUnavailable, match="the database gives nothing: "):
                store.look.events(0, 9)
        assert store.writer.last_event == before[0]
        assert store.members.all() == before[2]
    assert (standings(store), len(store.look.experiments().experiments)) == (before[1], 1)
    assert [future.result().stored for future in send()] == [True] * 8
    assert store.writer.fault is None
    assert store.register(big, PREFIX).name == "m2"
    assert [e.number for e in store.look.experiments(oldest_first=True).experiments] == list(range(9))
    assert [e.position for e in store.look.events(0, 99)] == list(range(1, store.writer.last_event + 1))
    assert row(store).best == 0.92
    assert lease not in {view.id for view in store.leases.all()}
    kept = standings(store)
    store.standings.rebuild()
    assert standings(store) == kept


def test_a_commit_whose_answer_was_lost(url: str) -> None:
    """The database took it, and said so to nobody: what was sent is sent again, and all goes on."""
    told: list[Event] = []
    store = Store(url, told.extend)
    store.begin(study())
    m1 = machine(store)
    uid, lose = uuid4(), False

    @event.listens_for(store.engine, "commit")
    def answer(connection: Any) -> None:
        nonlocal lose
        if lose:
            lose = False
            connection.connection.dbapi_connection.commit()
            raise OperationalError("COMMIT", None, Exception("the line went dead"))

    identity, first = uuid4(), report(0)
    lose = True
    with pytest.raises(StorageUnavailable, match="the line went dead"):
        m1.send(identity, first)
    assert not m1.send(identity, first).stored
    lose = True
    with pytest.raises(StorageUnavailable):
        store.register(registration("m2", uid), PREFIX)
    lose = True
    with pytest.raises(StorageUnavailable):
        store.change(m1.member, MachineChange(paused=True))
    m1.send(uuid4(), report(1))
    assert store.members.named("m1").paused
    assert store.members.named("m2").incarnation == 1
    assert store.register(registration("m2", uid), PREFIX).incarnation == 2
    stored = store.look.events(0, 99)
    assert told == stored
    assert [e.position for e in stored] == list(range(1, store.writer.last_event + 1))
    assert [e.kind for e in stored] == ["registered", "experiment", "registered", "paused", "experiment", "registered"]
    store.close()


def test_closing_commits_what_waits(open_store: Callable[..., Store]) -> None:
    store = open_store()
    m1 = machine(store)
    with held(store):
        jobs = [store.writer.submit(store.reports.job(m1.member, uuid4(), report(n))) for n in range(100)]
        closing = threading.Thread(target=store.close)
        closing.start()
    closing.join(30)
    assert all(job.result(0).stored for job in jobs)
    with pytest.raises(StorageUnavailable, match="stopping"):
        m1.tries(1.0)
    store.close()
    assert len(open_store().look.experiments(limit=1000).experiments) == 100
