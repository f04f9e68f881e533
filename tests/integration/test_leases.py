"""Leases (decision 11), case by case, on both databases; time is a number that the test moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest

from coordinator.database import Conflict, NotFound
from coordinator.presence import Presence
from coordinator.reaper import transitions
from shared.wire import (
    NO_COMMIT,
    Accepted,
    Activity,
    Heartbeat,
    Kind,
    LeaseRef,
    LeaseState,
    LeaseView,
    MachineChange,
    MachineState,
)
from tests import postgres
from tests.reports import PREFIX, Machine, commit, machine, opened, order, registration, report

HEARTBEAT_S, TTL_S = 10.0, 60.0
SILENCE_S = 35.0  #: three heartbeats and the grace


@dataclass
class Swarm:
    """Store, presence and reaper as the service puts them together, on a clock of its own."""

    url: str
    now: float = 1000.0
    machines: dict[str, Machine] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = opened(self.url)
        self.presence = self._presence()

    def _presence(self) -> Presence:
        """As at a start of the service: what was there gets one full term."""
        presence = Presence(HEARTBEAT_S, TTL_S, lambda: self.now)
        for member in self.store.members.all():
            if member.state is MachineState.ONLINE:
                presence.arrived(member.id)
        for lease in self.store.leases.granted():
            presence.granted(lease.id, lease.attempt, lease.holder_id, Kind(lease.kind))
        return presence

    def restart(self) -> None:
        self.store.close()
        self.__post_init__()
        for each in self.machines.values():
            each.store, each.member = self.store, self.store.members.named(each.name)

    def joins(self, name: str, **other: Any) -> Machine:
        """A machine with a baseline."""
        self.machines[name] = machine(self.store, name, **other)
        self.machines[name].tries(1.0)
        self.presence.arrived(self.machines[name].member.id)
        return self.machines[name]

    def queues(self, of: Machine, kind: Kind = Kind.REPLAY, only: str | None = None) -> UUID:
        return self.store.leases.queue(order(next(iter(of.reports)), kind, only))

    def grants(self, to: Machine) -> LeaseRef | None:
        member = self.store.members.named(to.name)
        if not self.store.leases.has_work_for(member) or (granted := self.store.leases.grant(member)) is None:
            return None
        lease = granted[0]
        self.presence.granted(lease.id, lease.attempt, member.id, Kind(lease.kind))
        return LeaseRef(id=lease.id, attempt=lease.attempt)

    def beats(self, of: Machine, *leases: LeaseRef) -> tuple[UUID, ...]:
        lost = self.presence.beat(of.member.id, Heartbeat(activity=Activity(state="running"), leases=leases))
        if self.store.members.named(of.name).state is MachineState.OFFLINE:
            self.store.set_state(self.store.members.named(of.name), MachineState.ONLINE)
        return lost

    def reports(self, of: Machine, lease: LeaseRef) -> tuple[UUID, Accepted]:
        identity, accepted = of.leased(lease)
        if accepted.closed:
            self.presence.closed(lease.id)
        return identity, accepted

    def passes(self, seconds: float, *alive: Machine) -> None:
        """Time goes by; those that are alive beat (and hold nothing)."""
        self.now += seconds
        for each in alive:
            self.beats(each)
        service = SimpleNamespace(store=self.store, presence=self.presence, hub_noted=True)
        transitions(service)  # type: ignore[arg-type]

    def lease(self, identity: UUID) -> LeaseView:
        return next(view for view in self.store.leases.all() if view.id == identity)

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [e.data for e in self.store.look.events(0, 999) if e.kind == kind]


@pytest.fixture(params=postgres.KINDS)
def swarm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Swarm]:
    for url in postgres.fresh(request.param, request.config, tmp_path):
        made = Swarm(url)
        yield made
        made.store.close()


# -- granting


def test_a_lease_is_granted_once_and_in_order(swarm: Swarm) -> None:
    a, b = swarm.joins("a"), swarm.joins("b")
    first, second = swarm.queues(a), swarm.queues(a)
    assert swarm.grants(b) == LeaseRef(id=first, attempt=1)
    assert swarm.grants(a) == LeaseRef(id=second, attempt=1)
    assert swarm.grants(b) is None
    assert (swarm.lease(first).state, swarm.lease(first).machine) == (LeaseState.GRANTED, "b")


def test_a_lease_for_one_machine(swarm: Swarm) -> None:
    a, b = swarm.joins("a"), swarm.joins("b")
    wanted, anybodys = swarm.queues(a, only="b"), swarm.queues(a)
    assert swarm.lease(wanted).machine == "b"
    assert swarm.grants(a) == LeaseRef(id=anybodys, attempt=1)
    assert swarm.grants(a) is None
    assert swarm.grants(b) == LeaseRef(id=wanted, attempt=1)


@pytest.mark.parametrize("can", [(), ("explore",), ("explore", "confirm", "of-a-later-version")])
def test_a_machine_gets_only_what_it_can_run(swarm: Swarm, can: tuple[str, ...]) -> None:
    a, old = swarm.joins("a"), swarm.joins("old", can=can)
    replay = swarm.queues(a, Kind.REPLAY)
    assert not swarm.store.leases.has_work_for(old.member)
    assert swarm.grants(old) is None
    confirm = swarm.queues(old, Kind.CONFIRM)
    assert swarm.grants(old) == (LeaseRef(id=confirm, attempt=1) if "confirm" in can else None)
    assert swarm.grants(a) == LeaseRef(id=replay, attempt=1)


def test_an_experiment_is_confirmed_on_its_own_machine(swarm: Swarm) -> None:
    a, b = swarm.joins("a"), swarm.joins("b")
    with pytest.raises(Conflict, match="own machine"):
        swarm.queues(a, Kind.CONFIRM, only="b")
    lease = swarm.queues(a, Kind.CONFIRM)
    assert swarm.grants(b) is None
    assert swarm.grants(a) == LeaseRef(id=lease, attempt=1)


def test_what_nothing_could_ever_run_is_not_queued(swarm: Swarm) -> None:
    a, gone = swarm.joins("a"), swarm.joins("gone")
    swarm.store.set_state(gone.member, MachineState.RETIRED)
    log = swarm.store.register(registration("log"), PREFIX, MachineState.IMPORTED)
    for only in ("gone", log.name):
        with pytest.raises(Conflict, match="runs nothing any more"):
            swarm.queues(a, only=only)
    with pytest.raises(Conflict, match="runs nothing any more"):
        swarm.queues(gone, Kind.CONFIRM)
    with pytest.raises(NotFound):
        swarm.queues(a, only="nobody")
    with pytest.raises(NotFound):
        swarm.store.leases.queue(order(uuid4()))
    for unknown in (NO_COMMIT, commit("t")[:7]):
        identity = uuid4()
        gone.send(identity, report(7, tested=unknown))
        for kind in (Kind.REPLAY, Kind.PROMOTE):
            with pytest.raises(Conflict, match="code is not on the hub"):
                swarm.store.leases.queue(order(identity, kind))
    assert swarm.store.leases.all() == []
    assert swarm.queues(gone, Kind.REPLAY) == swarm.store.leases.all()[0].id  # others may try its ideas


@pytest.mark.parametrize("out", ["paused", "retired"])
def test_a_machine_that_was_taken_out_since_it_asked_gets_nothing(swarm: Swarm, out: str) -> None:
    a = swarm.joins("a")
    lease = swarm.queues(a)
    if out == "paused":
        swarm.store.change(a.member, MachineChange(paused=True))
    else:
        swarm.store.set_state(a.member, MachineState.RETIRED)
    assert swarm.store.leases.grant(a.member) is None
    assert swarm.lease(lease).state is LeaseState.QUEUED
    if out == "paused":
        swarm.store.change(a.member, MachineChange(paused=False))
        assert swarm.grants(a) == LeaseRef(id=lease, attempt=1)


# -- closing: each case makes what happens before, and says whether the report of attempt 1 (by a) closes


def reported_at_once(swarm: Swarm, a: Machine, b: Machine, lease: LeaseRef) -> None:
    pass


def ran_out(swarm: Swarm, a: Machine, b: Machine, lease: LeaseRef) -> None:
    for _ in range(3):
        swarm.passes(SILENCE_S - 1, a, b)
    assert swarm.lease(lease.id).state is LeaseState.QUEUED


def granted_again(swarm: Swarm, a: Machine, b: Machine, lease: LeaseRef) -> None:
    ran_out(swarm, a, b, lease)
    assert swarm.grants(b) == LeaseRef(id=lease.id, attempt=2)


def granted_again_and_ran_out_again(swarm: Swarm, a: Machine, b: Machine, lease: LeaseRef) -> None:
    granted_again(swarm, a, b, lease)
    ran_out(swarm, a, b, lease)


def granted_to_the_same_again(swarm: Swarm, a: Machine, b: Machine, lease: LeaseRef) -> None:
    ran_out(swarm, a, b, lease)
    assert swarm.grants(a) == LeaseRef(id=lease.id, attempt=2)


def cancelled(swarm: Swarm, a: Machine, b: Machine, lease: LeaseRef) -> None:
    swarm.store.leases.cancel(lease.id)
    swarm.presence.closed(lease.id)


def closed_before(swarm: Swarm, a: Machine, b: Machine, lease: LeaseRef) -> None:
    assert swarm.reports(a, lease)[1].closed


def given_back(swarm: Swarm, a: Machine, b: Machine, lease: LeaseRef) -> None:
    assert swarm.presence.holds_lease(lease.id, lease.attempt, a.member.id)
    swarm.store.leases.give_back(lease.id, lease.attempt, "a gave it back")
    swarm.presence.forget_lease(lease)


def went_offline(swarm: Swarm, a: Machine, b: Machine, lease: LeaseRef) -> None:
    swarm.passes(SILENCE_S + 1, b)
    assert swarm.store.members.named("a").state is MachineState.OFFLINE


def registered_again(swarm: Swarm, a: Machine, b: Machine, lease: LeaseRef) -> None:
    uid = swarm.store.machine_rows()[0].uid
    a.member = swarm.store.register(registration("a", uid), PREFIX)


def restarted(swarm: Swarm, a: Machine, b: Machine, lease: LeaseRef) -> None:
    swarm.restart()


@pytest.mark.parametrize(
    ("before", "closes"),
    [
        (reported_at_once, True),
        (ran_out, True),
        (granted_again, False),
        (granted_again_and_ran_out_again, False),
        (granted_to_the_same_again, False),
        (cancelled, False),
        (closed_before, False),
        (given_back, True),
        (went_offline, True),
        (registered_again, True),
        (restarted, True),
    ],
)
def test_only_the_latest_attempt_closes(
    swarm: Swarm, before: Callable[[Swarm, Machine, Machine, LeaseRef], None], closes: bool
) -> None:
    a, b = swarm.joins("a"), swarm.joins("b")
    swarm.queues(a)
    lease = swarm.grants(a)
    assert lease is not None
    before(swarm, a, b, lease)
    was = swarm.lease(lease.id)
    identity, accepted = swarm.reports(a, lease)
    assert (accepted.stored, accepted.closed) == (True, closes)  # whatever comes is stored
    now = swarm.lease(lease.id)
    if closes:
        assert (now.state, now.closed_by, now.machine) == (LeaseState.DONE, identity, None)
    else:
        assert now == was
    assert not swarm.reports(a, lease)[1].closed
    if before is granted_again:
        assert swarm.reports(b, LeaseRef(id=lease.id, attempt=2))[1].closed
    assert len(swarm.told("closed")) == (swarm.lease(lease.id).state is LeaseState.DONE)


def test_the_same_report_again_closes_nothing_more(swarm: Swarm) -> None:
    a = swarm.joins("a")
    swarm.queues(a)
    lease = swarm.grants(a)
    assert lease is not None
    identity, first = swarm.reports(a, lease)
    again = a.send(identity, a.reports[identity])
    assert (first.stored, first.closed, again.stored, again.closed) == (True, True, False, False)
    assert len(swarm.told("closed")) == 1


def test_a_report_that_came_before_its_lease_was_known(swarm: Swarm) -> None:
    """The version that names the lease is a later one: a confirmation of an experiment that is stored."""
    a = swarm.joins("a")
    swarm.queues(a, Kind.CONFIRM)
    lease = swarm.grants(a)
    (experiment,) = a.reports
    accepted = a.again(experiment, scores=(1.0, 1.01), lease=lease)
    assert (accepted.stored, accepted.closed) == (True, True)


@pytest.mark.parametrize("case", ["unknown", "never granted", "another machine's", "of the future"])
def test_what_closes_nothing(swarm: Swarm, case: str) -> None:
    a, b = swarm.joins("a"), swarm.joins("b")
    lease = swarm.queues(a)
    if case not in ("unknown", "never granted"):
        assert swarm.grants(a)
    wrong = {
        "unknown": LeaseRef(id=uuid4(), attempt=1),
        "never granted": LeaseRef(id=lease, attempt=0),
        "another machine's": LeaseRef(id=lease, attempt=1),
        "of the future": LeaseRef(id=lease, attempt=2),
    }[case]
    before = swarm.lease(lease)
    _, accepted = swarm.reports(b if case == "another machine's" else a, wrong)
    assert (accepted.stored, accepted.closed) == (True, False)
    assert swarm.lease(lease) == before


def test_cancelling(swarm: Swarm) -> None:
    a = swarm.joins("a")
    lease = swarm.queues(a)
    swarm.store.leases.cancel(lease)
    assert swarm.grants(a) is None
    assert swarm.lease(lease).state is LeaseState.CANCELLED
    done = swarm.queues(a)
    reference = swarm.grants(a)
    assert reference is not None
    swarm.reports(a, reference)
    with pytest.raises(Conflict, match="done"):
        swarm.store.leases.cancel(done)
    with pytest.raises(NotFound):
        swarm.store.leases.cancel(uuid4())


# -- terms


def test_a_heartbeat_renews(swarm: Swarm) -> None:
    a = swarm.joins("a")
    lease = swarm.queues(a)
    reference = swarm.grants(a)
    assert reference is not None
    for _ in range(10):
        swarm.now += SILENCE_S - 1
        assert swarm.beats(a, reference) == ()
        swarm.passes(0)
    assert swarm.lease(lease).state is LeaseState.GRANTED
    for _ in range(3):
        swarm.passes(SILENCE_S - 1, a)  # it beats, and does not name the lease
    assert swarm.lease(lease).state is LeaseState.QUEUED
    assert swarm.told("returned") == [{"lease": str(lease), "attempt": 1, "why": "its term ran out"}]
    assert swarm.beats(a, reference) == (lease,)


def test_a_heartbeat_hears_what_it_lost(swarm: Swarm) -> None:
    a, b = swarm.joins("a"), swarm.joins("b")
    swarm.queues(a)
    first = swarm.grants(a)
    assert first is not None
    ran_out(swarm, a, b, first)
    second = swarm.grants(a)
    assert second == LeaseRef(id=first.id, attempt=2)
    unknown = uuid4()
    assert swarm.beats(a, first, second, LeaseRef(id=unknown, attempt=1)) == (first.id, unknown)
    assert swarm.beats(b, second) == (second.id,)
    swarm.presence.closed(second.id)
    assert swarm.beats(a, second) == (second.id,)


def test_a_silent_machine_holds_nothing(swarm: Swarm) -> None:
    a, b = swarm.joins("a"), swarm.joins("b")
    lease = swarm.queues(a, Kind.PROMOTE)
    first = swarm.grants(a)
    assert first is not None
    assert swarm.presence.holds(a.member.id, Kind.PROMOTE)
    swarm.passes(SILENCE_S + 1, b)
    assert swarm.store.members.named("a").state is MachineState.OFFLINE
    assert not swarm.presence.holds(a.member.id, Kind.PROMOTE)
    assert len(swarm.told("returned")) == 1
    assert swarm.beats(a, first) == (lease,)  # it is back, within the lease's own term
    assert swarm.store.members.named("a").state is MachineState.ONLINE
    assert swarm.grants(b) == LeaseRef(id=lease, attempt=2)


def test_a_machine_that_was_retired_holds_nothing(swarm: Swarm) -> None:
    a, b = swarm.joins("a"), swarm.joins("b")
    lease = swarm.queues(a)
    swarm.grants(a)
    swarm.store.set_state(a.member, MachineState.RETIRED)
    swarm.presence.left(a.member.id)
    assert swarm.grants(b) == LeaseRef(id=lease, attempt=2)


def test_registering_again_returns(swarm: Swarm) -> None:
    a, b = swarm.joins("a"), swarm.joins("b")
    mine, other = swarm.queues(a), swarm.queues(a)
    assert swarm.grants(a)
    assert swarm.grants(b)
    swarm.store.register(registration("a", swarm.store.machine_rows()[0].uid), PREFIX)
    assert (swarm.lease(mine).state, swarm.lease(other).state) == (LeaseState.QUEUED, LeaseState.GRANTED)


def test_a_grant_whose_answer_was_lost_runs_out(swarm: Swarm) -> None:
    """It is stored, and no term was ever counted."""
    a = swarm.joins("a")
    lease = swarm.queues(a)
    assert swarm.store.leases.grant(a.member)
    swarm.passes(1.0, a)
    for _ in range(3):
        swarm.passes(SILENCE_S - 1, a)
    assert swarm.lease(lease).state is LeaseState.QUEUED


def test_a_restart_gives_one_full_term(swarm: Swarm) -> None:
    a, b = swarm.joins("a"), swarm.joins("b")
    lease = swarm.queues(a)
    reference = swarm.grants(a)
    assert reference is not None
    swarm.now += 10_000.0  # the coordinator was away
    swarm.restart()
    swarm.passes(SILENCE_S - 1, b)
    assert swarm.store.members.named("a").state is MachineState.ONLINE
    assert swarm.lease(lease).state is LeaseState.GRANTED
    assert swarm.beats(a, reference) == ()
    swarm.restart()
    for _ in range(2):
        swarm.passes(SILENCE_S - 1, a, b)
    assert swarm.lease(lease).state is LeaseState.QUEUED
    assert swarm.grants(b) == LeaseRef(id=lease, attempt=2)


def test_a_lease_returns_only_where_it_is_still_this_attempts(swarm: Swarm) -> None:
    a = swarm.joins("a")
    lease = swarm.queues(a)
    swarm.grants(a)
    swarm.store.leases.give_back(lease, 1, "given back")
    swarm.grants(a)
    swarm.store.leases.give_back(lease, 1, "too late")
    assert (swarm.lease(lease).state, swarm.lease(lease).attempt) == (LeaseState.GRANTED, 2)
    assert len(swarm.told("returned")) == 1


def test_positions_go_on_after_a_restart(swarm: Swarm) -> None:
    a = swarm.joins("a")
    first = swarm.queues(a)
    swarm.restart()
    second = swarm.queues(a)
    assert [swarm.grants(a), swarm.grants(a)] == [LeaseRef(id=first, attempt=1), LeaseRef(id=second, attempt=1)]


def test_leases_by_state(swarm: Swarm) -> None:
    a = swarm.joins("a")
    leases = [swarm.queues(a) for _ in range(3)]
    swarm.grants(a)
    assert [view.id for view in swarm.store.leases.all()] == leases[::-1]
    assert [view.id for view in swarm.store.leases.all(LeaseState.GRANTED)] == leases[:1]
