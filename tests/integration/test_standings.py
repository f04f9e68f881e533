"""The leaderboard's cache, kept report by report, is exactly what the experiments say: thousands of random reports."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from coordinator.store import Sanity, Store
from coordinator.tables import Experiment
from shared.wire import ExperimentReport, Kind, MachineState, Status
from tests import postgres
from tests.reports import PREFIX, Machine, machine, opened, registration, report, revised, standings

#: Steps, most of them a report (3 ms each on SQLite, 7 on PostgreSQL).
SOME = {"sqlite": 1_500, "postgresql": 400}
MANY = {"sqlite": 10_000, "postgresql": 2_000}
RUNGS = ("base", "base", "d8", "d12")


@pytest.fixture(params=postgres.KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield from postgres.fresh(request.param, request.config, tmp_path)


class Chaos:
    """Machines that report, in any order; what may happen to a swarm, happens."""

    def __init__(self, store: Store, seed: int) -> None:
        self.store, self.random = store, random.Random(seed)
        self.machines = [machine(store, f"m{n}", machine_class=("cuda-h100", "mlx-m4", "cpu")[n % 3]) for n in range(6)]
        self.ideas = [uuid4() for _ in range(40)]
        self.late: list[tuple[Machine, UUID, ExperimentReport]] = []  #: older versions that are still on their way
        self.numbers: Counter[tuple[str, str]] = Counter()
        self.waiting: list[Any] = []

    def submit(self, of: Machine, identity: UUID, made: ExperimentReport) -> None:
        """Not waited for, so that the writer commits several at once."""
        of.reports[identity] = max(made, of.reports.get(identity, made), key=lambda one: one.version)
        self.waiting.append(self.store.writer.submit(self.store.report(of.member, identity, made)))

    def score(self, number: int) -> float:
        wild = self.random.random() < 0.03
        return self.random.uniform(0.05, 0.6) if wild else 1.0 - 0.0002 * number + self.random.gauss(0, 0.01)

    def step(self) -> None:
        of = self.random.choice(self.machines)
        match self.random.random():
            case x if x < 0.60 or not of.reports:
                self.new(of)
            case x if x < 0.90:
                self.revise(of)
            case x if x < 0.96 and self.late:
                self.submit(*self.late.pop(self.random.randrange(len(self.late))))
            case x if x < 0.985:
                self.settle()
                suspects = self.store.experiments(machine=of.name, suspect=True, limit=20).experiments
                if suspects:
                    self.store.clear(self.random.choice(suspects).id)
            case x if x < 0.99:
                self.registers(of)
            case _:
                self.settle()
                state = self.random.choice([MachineState.OFFLINE, MachineState.ONLINE])
                self.store.set_state(of.member, state)

    def new(self, of: Machine) -> None:
        rung = self.random.choice(RUNGS)
        number = self.numbers[of.name, rung]
        if self.random.random() > 0.02:  # else the same number twice
            self.numbers[of.name, rung] += 1
        status = self.random.choices([Status.KEEP, Status.DISCARD, Status.CRASH, Status.TIMEOUT], [4, 10, 2, 1])[0]
        ran = status in (Status.KEEP, Status.DISCARD)
        scores = [self.score(number) for _ in range(self.random.choice([1, 1, 1, 2]))] if ran else [None]
        made = report(
            number, scores, status, rung=rung, idea=self.random.choice(self.ideas), kind=self.random.choice(list(Kind))
        )
        self.submit(of, uuid4(), made)

    def revise(self, of: Machine) -> None:
        """More runs, a confirmation, another verdict; sometimes the last version comes first."""
        identity = self.random.choice(list(of.reports))
        before = of.reports[identity]
        scores = [one.score for one in before.runs] + [self.score(before.number)]
        status = self.random.choices([before.status, Status.KEEP, Status.DISCARD], [8, 1, 1])[0]
        if status is Status.KEEP and scores[0] is None:
            status = before.status
        made = revised(before, scores=scores, status=status, confirmed=self.random.random() < 0.2)
        if self.random.random() < 0.2:
            self.late.append((of, identity, made))
            made = revised(made, scores=[*scores, self.score(before.number)])
        self.submit(of, identity, made)

    def registers(self, of: Machine) -> None:
        """Again, sometimes as another class; or a new one takes its place when it was retired."""
        self.settle()
        if self.random.random() < 0.2:
            self.store.set_state(of.member, MachineState.RETIRED)
            self.machines.remove(of)
            self.machines.append(machine(self.store, of.name))
            return
        class_ = self.random.choice(["cuda-h100", of.member.machine_class])
        of.member = self.store.register(registration(of.name, of.member.uid, machine_class=class_), PREFIX)

    def settle(self) -> None:
        for future in self.waiting:
            future.result()
        self.waiting.clear()


def ideas(store: Store) -> dict[UUID, tuple[int, int]]:
    """(tried, kept) of each, as counted."""
    found, _ = store.ideas(None, 1000)
    return {one.id: (one.tried, one.kept) for one in found}


@pytest.mark.parametrize(
    ("steps", "direction"),
    [
        pytest.param(SOME, "minimize", id="some"),
        pytest.param(SOME, "maximize", id="some-maximize"),
        pytest.param(MANY, "minimize", id="many", marks=pytest.mark.system),
    ],
)
def test_kept_equals_rebuilt(url: str, steps: dict[str, int], direction: str) -> None:
    kind = url.partition(":")[0]
    bounds = Sanity(0.3, 0.05) if direction == "minimize" else Sanity(1.5, 0.05)
    store = opened(url, metric="val_bpb", direction=direction, sanity=bounds)
    chaos = Chaos(store, seed=len(direction))
    for _ in range(steps[kind]):
        chaos.step()
    chaos.settle()
    kept = standings(store)
    assert len(kept) >= 18
    assert all(row["best"] is not None for row in kept if row["keeps"] > 5)
    assert any(row["suspects"] for row in kept)
    if kind == "postgresql":
        with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM FULL ANALYZE")  # other plans, and rows in another order
    store.rebuild_standings()
    assert standings(store) == kept
    with store.read() as connection:
        rows = connection.execute(Experiment.__table__.select()).all()
    tried = Counter(row.idea for row in rows)
    keeps = Counter(row.idea for row in rows if row.status == "keep")
    assert ideas(store) == {idea: (tried[idea], keeps[idea]) for idea in tried}
    decided = [row for row in rows if row.number > 0]
    assert store.totals() == (len(decided), sum(row.status == "keep" for row in decided))
    events = store.events(0, 100_000)
    assert [event.position for event in events] == list(range(1, len(events) + 1))
    store.close()
