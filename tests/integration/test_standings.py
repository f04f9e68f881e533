"""Standings: what they say, case by case; and over thousands of random reports the cache is what experiments say."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest

from coordinator.database import Sanity
from coordinator.store import Store
from coordinator.tables import Experiment
from shared.wire import ExperimentReport, Kind, MachineState, Status
from tests.reports import BASE, PREFIX, Machine, machine, opened, registration, report, revised, row, standings
from worker import results
from worker.journal import Journal

#: Steps, most of them a report (3 ms each on SQLite, 7 on PostgreSQL).
SOME = {"sqlite": 1_500, "postgresql": 400}
MANY = {"sqlite": 10_000, "postgresql": 2_000}
RUNGS = ("base", "base", "d8", "d12")


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
        self.waiting.append(self.store.writer.submit(self.store.reports.job(of.member, identity, made)))

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
                suspects = self.store.look.experiments(machine=of.name, suspect=True, limit=20).experiments
                if suspects:
                    self.store.reports.clear(self.random.choice(suspects).id)
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
        lease = of.asked(identity) if self.random.random() < 0.2 else None
        made = revised(before, scores=scores, status=status, lease=lease)
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
    found, _ = store.look.ideas(None, 1000)
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
    store.standings.rebuild()
    assert standings(store) == kept
    with store.read() as connection:
        rows = connection.execute(Experiment.__table__.select()).all()
    tried = Counter(row.idea for row in rows)
    keeps = Counter(row.idea for row in rows if row.status == "keep")
    assert ideas(store) == {idea: (tried[idea], keeps[idea]) for idea in tried}
    decided = [row for row in rows if row.number > 0]
    assert store.look.totals() == (len(decided), sum(row.status == "keep" for row in decided))
    events = store.look.events(0, 100_000)
    assert [event.position for event in events] == list(range(1, len(events) + 1))
    store.close()


# -- case by case


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize(
    ("metric", "machine_class"), [("val_bpb", "cuda-h100"), ("val_bpb", "mlx-m4"), ("accuracy", "cpu")]
)
def test_a_standing_is_what_the_machine_says_itself(
    open_store: Callable[..., Store], tmp_path: Path, direction: str, metric: str, machine_class: str
) -> None:
    store = open_store(metric=metric, direction=direction)
    m1, sign = machine(store, machine_class=machine_class), 1 if direction == "minimize" else -1
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("setup", machine_class=machine_class, base=BASE)
    script = [(1.0, 1.02), (0.95,), (1.2,), (None,), (0.9, 0.91, 0.87), (0.93, 0.99), (0.88, 0.89)]
    level = math.inf
    for number, scores in enumerate(script):
        first = scores[0]
        keep = first is not None and first * sign < level * sign if number else True
        status = Status.CRASH if first is None else Status.KEEP if keep else Status.DISCARD
        level = first if keep and first is not None else level
        identity = m1.tries(*scores, status=status)
        made = m1.reports[identity]
        about = {"proposer": "", "edits": {}, "params": {}, "nodes_added": 0, "code_state": "", "parent": made.parent}
        journal.append(
            "experiment", id=str(identity), number=number, tested=made.tested, description=made.description, **about
        )
        for score in scores:
            facts = {"memory_gb": 0.0, "seconds": 1.0, "status": None, "reason": "", "trained_share": None}
            journal.append("run", experiment=str(identity), seed=1, score=score, **facts)
        journal.append("decision", experiment=str(identity), status=status, reason="")
        if keep:
            journal.append("kept", experiment=str(identity), commit=made.kept)
    task: Any = SimpleNamespace(metric=metric, sign=sign)
    own = results.standing(journal, task)
    journal.close()
    assert own is not None
    ours = row(store)
    assert (ours.baseline, ours.best, ours.runs) == (own.baseline, own.best, own.best_runs)
    assert ours.sigma == pytest.approx(results.noise_floor(journal, task), rel=1e-12)
    assert ours.gain_sigmas == pytest.approx(own.gain_sigmas, rel=1e-12)
    assert (ours.experiments, ours.keeps, ours.commit) == (own.experiments, own.keeps, own.commit)
    assert ours.gain == sign * (own.baseline - own.best)
    assert ours.gain > 0
    assert ours.description == own.description


def test_baseline_and_best_are_means(store: Store) -> None:
    m1 = machine(store)
    baseline = m1.tries(1.0)
    assert (row(store).baseline, row(store).best, row(store).gain) == (1.0, 1.0, 0.0)
    m1.again(baseline, scores=(1.0, 1.5))
    assert (row(store).baseline, row(store).best, row(store).runs) == (1.25, 1.25, 2)
    head = m1.tries(0.75)
    m1.tries(0.5, status=Status.DISCARD)
    m1.confirms(head, 0.75, 0.25, None)
    now = row(store)
    assert (now.baseline, now.best, now.gain, now.runs, now.confirmed) == (1.25, 0.5, 0.75, 2, True)
    assert (now.experiments, now.keeps, now.lineage, now.experiment) == (2, 1, 1, head)


def test_profiles_and_rungs_stand_apart(store: Store) -> None:
    m1 = machine(store)
    m1.tries(1.0)
    m1.tries(0.5, rung="d12")
    m1.tries(0.25, profile="h100")
    found = {(s.profile, s.rung): (s.best, s.baseline) for s in store.look.leaderboard("group").standings}
    assert found == {("default", "base"): (1.0, 1.0), ("default", "d12"): (0.5, None), ("h100", "base"): (0.25, None)}
    assert store.look.totals() == (2, 2)


def test_head_is_the_last_keep_whatever_comes_first(store: Store) -> None:
    m1 = machine(store)
    for number in (0, 3, 1, 2):
        m1.send(uuid4(), report(number, (1.0 - number / 10,)))
    assert row(store).best == 0.7


def test_two_baselines_of_one_machine(store: Store) -> None:
    """A journal was lost, its folder's uid was not: what arrived first stays the baseline, the last arrived is HEAD."""
    m1 = machine(store)
    for score in (1.0, 0.8, 0.9):
        m1.send(uuid4(), report(0, (score,)))
    assert (row(store).baseline, row(store).best) == (1.0, 0.9)


def test_a_metric_next_to_nothing(store: Store) -> None:
    """Its squares are 0 in floating point, and so is sigma."""
    m1 = machine(store)
    m1.tries(1e-200)
    m1.tries(1e-201)
    assert (row(store).gain_sigmas, row(store).best) == (None, 1e-201)


def test_another_class_is_another_prior(open_store: Callable[..., Store]) -> None:
    store = open_store(metric="val_bpb")
    m1 = machine(store, machine_class="cpu")
    m1.tries(1.0)
    assert row(store).sigma == pytest.approx(0.01)
    store.register(registration("m1", store.machine_rows()[0].uid, machine_class="cuda-h100"), PREFIX)
    assert row(store).sigma == pytest.approx(0.002)
    before = standings(store)
    store.standings.rebuild()
    assert standings(store) == before
