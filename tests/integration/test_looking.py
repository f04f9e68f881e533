"""What can be asked of the results: leaderboard, lists and their pages, finding, lineage, export; on both databases."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event

from coordinator.database import Conflict, NotFound
from coordinator.store import Store
from shared import wire
from shared.wire import Kind, Status
from tests.reports import BASE, commit, machine, report


def test_the_leaderboard(open_store: Callable[..., Store]) -> None:
    store = open_store(metric="val_bpb")
    for name, machine_class, baseline, best in (
        ("a", "cuda", 1.0, 0.99),
        ("b", "cuda", 1.0, 0.98),
        ("c", "mlx", 1.5, 1.2),
        ("d", "cuda", 1.0, 0.99),
    ):
        each = machine(store, name, machine_class=machine_class)
        each.tries(baseline)
        each.tries(best)
    machine(store, "e", machine_class="cuda").tries(None, status=Status.CRASH, kept=None)
    board = store.look.leaderboard("group")
    assert [(s.rank, s.machine) for s in board.standings] == [(1, "b"), (2, "a"), (3, "d"), (4, "e"), (1, "c")]
    assert (board.campaign, board.metric, board.direction, board.next) == ("fast", "val_bpb", "minimize", None)
    assert board.standings[3].best is None
    by_sigmas = store.look.leaderboard("sigmas")
    assert [(s.rank, s.machine) for s in by_sigmas.standings] == [(1, "b"), (2, "c"), (3, "a"), (4, "d"), (5, "e")]
    assert [s.machine for s in store.look.leaderboard("group", machine_class="mlx").standings] == ["c"]
    assert [s.machine for s in store.look.leaderboard("group", profile="other").standings] == []
    assert [s.machine for s in store.look.leaderboard("group", rung="base", machine="a").standings] == ["a"]


@pytest.mark.parametrize("order", ["group", "sigmas"])
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_pages_of_the_leaderboard(open_store: Callable[..., Store], order: Any, direction: str) -> None:
    store = open_store(direction=direction)
    for name in "abcd":
        each = machine(store, name)
        for rung in ("base", "d8", "d12"):
            each.tries(1.0 if name < "c" else 2.0, rung=rung)
    whole = store.look.leaderboard(order)
    assert len(whole.standings) == 12
    assert whole.standings[0].machine == ("a" if direction == "minimize" or order == "sigmas" else "c")
    paged: list[wire.Standing] = []
    after: int | None = 0
    while after is not None:
        page = store.look.leaderboard(order, after=after, limit=5)
        paged += page.standings
        after = page.next
    assert tuple(paged) == whole.standings
    assert store.look.leaderboard(order, after=50).standings == ()


def test_filters_of_experiments(store: Store) -> None:
    m1, m2 = machine(store, "m1", machine_class="cuda"), machine(store, "m2")
    kept = m1.tries(1.0)
    crash = m2.tries(None, status=Status.CRASH, kept=None)
    replay = m2.tries(1.1, status=Status.DISCARD, kind=Kind.REPLAY, rung="d8", profile="h100")

    def ids(**where: Any) -> list[UUID]:
        return [e.id for e in store.look.experiments(**where).experiments]

    assert ids() == [replay, crash, kept]
    assert ids(oldest_first=True) == [kept, crash, replay]
    assert ids(machine="m2") == [replay, crash]
    assert ids(machine_class="cuda") == [kept]
    assert ids(status=["keep", "crash"]) == [crash, kept]
    assert ids(profile="h100") == ids(rung="d8") == ids(kind="replay") == [replay]
    assert ids(idea=m1.reports[kept].idea) == [kept]
    assert ids(suspect=False, machine="m2", status=["crash"]) == [crash]
    assert ids(suspect=True) == []
    with pytest.raises(NotFound):
        ids(machine="m3")


@pytest.mark.parametrize("oldest_first", [True, False])
def test_pages_while_rows_arrive(store: Store, oldest_first: bool) -> None:
    m1, m2 = machine(store, "m1"), machine(store, "m2")
    for _ in range(20):
        m1.tries(1.0, status=Status.DISCARD)

    def arrive() -> None:
        for _ in range(60):
            m2.tries(1.0, status=Status.DISCARD)

    writing = threading.Thread(target=arrive)
    writing.start()
    seen: list[int] = []
    after = None
    while True:
        alive = writing.is_alive()  # before the page: after the last row came, one page more is read
        page = store.look.experiments(after=after, limit=7, oldest_first=oldest_first)
        seen += [e.position for e in page.experiments]
        after = seen[-1]
        if page.next is None and not (oldest_first and alive):
            break
    writing.join()
    if oldest_first:
        assert seen == list(range(1, 81))
    else:
        assert seen == list(range(seen[0], 0, -1))
        assert seen[0] >= 20


def test_finding_by_a_beginning(store: Store) -> None:
    m1 = machine(store)
    ids = [UUID("abcd1234-0000-4000-8000-000000000001"), UUID("abcd5678-0000-4000-8000-000000000002")]
    for number, identity in enumerate(ids, 1):
        m1.send(identity, report(number, tested=commit(f"t{number}"), kept=commit(f"k{number}")))
    for text in (str(ids[0]), ids[0].hex, str(ids[0]).upper(), "abcd12", "ABCD-12", commit("t1"), commit("k1")[:9]):
        assert store.look.find(text) == ids[0], text
    assert store.look.find(commit("t2")[:7]) == ids[1]
    with pytest.raises(Conflict, match="several"):
        store.look.find("abcd")
    for text in ("abcd9", "abc", "----", "----------", "no", "g" * 8, "", "é" * 8, commit("other")):
        with pytest.raises(NotFound):
            store.look.find(text)
    with pytest.raises(NotFound):
        store.look.experiment(store.look.find(str(uuid4())))
    abbreviated = m1.send(uuid4(), report(3, tested=commit("t3")[:7], kept=commit("t3")[:7]))
    assert abbreviated.stored
    for text in (commit("t3"), commit("t3")[:12], commit("t3")[:7], commit("t3")[:5]):
        assert store.look.find(text) == list(m1.reports)[-1], text


def test_lineage(store: Store) -> None:
    m1, m2 = machine(store, "m1"), machine(store, "m2")
    m1.tries(1.0)
    base = m2.tries(1.0)
    kept = [base, m2.tries(0.9), m2.tries(0.8)]
    m2.tries(0.85, status=Status.DISCARD)
    m1.tries(0.95)
    steps = store.look.lineage(m2.head)
    assert [step.experiment for step in steps] == kept[::-1]
    assert {step.machine for step in steps} == {"m2"}  # also where both machines kept the base
    assert [step.commit for step in steps] == [m2.head, steps[0].parent, BASE]
    assert store.look.lineage(m2.head[:8], limit=2) == steps[:2]
    with pytest.raises(NotFound):
        store.look.lineage(commit("other"))
    with pytest.raises(Conflict, match="several"):
        store.look.lineage("")


def test_a_lineage_that_bites_its_tail_ends(store: Store) -> None:
    m1 = machine(store)
    for here, there in (("a", "b"), ("b", "a")):
        m1.tries(1.0, kept=commit(here), parent=commit(there))
    assert len(store.look.lineage(commit("a"), limit=10)) == 10


def test_export(store: Store) -> None:
    m1 = machine(store)
    ids = [m1.tries(1.0, status=Status.DISCARD, diff=f"+{n}\n", edits={"N": n}) for n in range(20)]
    chunks = list(store.look.export(size=7))
    assert [len(chunk) for chunk in chunks] == [7, 7, 6]
    rows = [row for chunk in chunks for row in chunk]
    assert [row["id"] for row in rows] == ids
    assert [(row["diff"], row["edits"], row["machine"]) for row in rows[:2]] == [
        ("+0\n", {"N": 0}, "m1"),
        ("+1\n", {"N": 1}, "m1"),
    ]
    assert list(store.look.export(size=20)) == [rows]


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_indexes_are_used(store: Store) -> None:
    """SQLite passes a partial index over in silence where a query is worded in another way (77 ms a report, not 9)."""
    m1 = machine(store)
    asked: list[tuple[str, Any]] = []

    @event.listens_for(store.engine, "before_cursor_execute")
    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: Any) -> None:
        if statement.startswith("SELECT"):
            asked.append((statement, parameters))

    identity = m1.tries(1.0, 1.1)
    store.look.find(str(identity)[:8])
    store.look.experiment(identity)
    store.look.diff(identity)
    store.look.lineage(BASE)
    for where in ({"machine": "m1"}, {"status": ["keep"]}, {"idea": m1.reports[identity].idea}):
        store.look.experiments(**where)
    event.remove(store.engine, "before_cursor_execute", note)
    with store.read() as connection:
        plans = [
            " ".join(row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters))
            for statement, parameters in asked
        ]
    assert not [plan for plan in plans if re.search(r"SCAN (experiments|details|runs|machines|ideas)", plan)]
    used = set(re.findall(r"ix_experiments_\w+", " ".join(plans)))
    assert used >= {f"ix_experiments_{name}" for name in ("heads", "reruns", "suspects", "tested", "kept", "status")}
