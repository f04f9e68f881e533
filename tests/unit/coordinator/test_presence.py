"""Who is there and whose leases run, on a clock that the test moves."""

from __future__ import annotations

from uuid import UUID

import pytest

from coordinator.presence import HEARTBEATS_PER_S, Presence
from shared.wire import Activity, Heartbeat, Kind, LeaseRef

LEASE = UUID(int=1)
OTHER = UUID(int=2)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def presence(clock: Clock) -> Presence:
    return Presence(heartbeat_s=10.0, ttl_s=60.0, clock=clock)


def beat(presence: Presence, machine: int, *leases: tuple[UUID, int]) -> tuple[UUID, ...]:
    references = tuple(LeaseRef(id=lease, attempt=attempt) for lease, attempt in leases)
    return presence.beat(machine, Heartbeat(activity=Activity(state="running"), leases=references))


def test_three_heartbeats_and_the_grace(presence: Presence, clock: Clock) -> None:
    presence.arrived(1)
    clock.now = 35.0
    assert presence.due().silent == ()
    assert (presence.seen_s(1), presence.count()) == (35.0, 1)
    clock.now = 35.1
    assert presence.due().silent == (1,)
    assert presence.due().silent == (1,)  # until it is stored
    presence.forget_machine(1)
    assert presence.due().silent == ()
    assert (presence.seen_s(1), presence.activity(1)) == (None, None)


def test_a_heartbeat_says_what_a_machine_does(presence: Presence, clock: Clock) -> None:
    presence.arrived(1)
    assert presence.activity(1) is None
    clock.now = 30.0
    beat(presence, 1)
    activity = presence.activity(1)
    assert activity is not None
    assert activity.state == "running"
    clock.now = 60.0
    assert presence.due().silent == ()


@pytest.mark.parametrize(("machines", "interval"), [(1, 10.0), (1000, 10.0), (1001, 10.01), (5000, 50.0)])
def test_many_machines_are_asked_less_often(presence: Presence, machines: int, interval: float) -> None:
    for number in range(machines):
        presence.arrived(number)
    assert presence.interval_s == pytest.approx(interval)
    assert machines / presence.interval_s <= HEARTBEATS_PER_S * (1 + 1e-9)


def test_silence_and_terms_stretch_with_the_interval(presence: Presence, clock: Clock) -> None:
    for number in range(5000):
        presence.arrived(number)
    assert presence.ttl_s == 3 * 50.0 + 5.0  # never shorter than what makes a machine offline
    beat(presence, 1)
    presence.granted(LEASE, 1, 1, Kind.REPLAY)
    for number in range(5000):
        if number != 1:
            presence.left(number)
    assert (presence.interval_s, presence.ttl_s) == (10.0, 60.0)
    clock.now = 154.0
    assert presence.due() == presence.due()  # what was promised when it last called still holds
    assert presence.seen_s(1) is not None


def test_a_term_runs_out_unless_it_is_renewed(presence: Presence, clock: Clock) -> None:
    presence.granted(LEASE, 3, 1, Kind.REPLAY)
    presence.granted(OTHER, 1, 1, Kind.REPLAY)
    for now in (30.0, 60.0):
        clock.now = now
        assert beat(presence, 1, (LEASE, 3)) == ()
    clock.now = 61.0
    due = presence.due()
    assert (due.silent, due.expired) == ((), (LeaseRef(id=OTHER, attempt=1),))
    assert presence.due() == due  # until it is stored
    presence.forget_lease(due.expired[0])
    assert presence.due().expired == ()
    assert beat(presence, 1, (LEASE, 3), (OTHER, 1)) == (OTHER,)


def test_a_machine_heard_of_while_its_silence_is_stored_stays(presence: Presence, clock: Clock) -> None:
    presence.arrived(1)
    clock.now = 40.0
    assert presence.due().silent == (1,)
    beat(presence, 1)
    presence.forget_machine(1)
    assert presence.seen_s(1) is not None


@pytest.mark.parametrize(
    ("machine", "attempt", "lost"),
    [
        pytest.param(1, 2, (), id="its own"),
        pytest.param(1, 1, (LEASE,), id="an older attempt"),
        pytest.param(1, 3, (LEASE,), id="an attempt that was never granted"),
        pytest.param(2, 2, (LEASE,), id="another machine's"),
    ],
)
def test_what_a_machine_holds(
    presence: Presence, clock: Clock, machine: int, attempt: int, lost: tuple[UUID, ...]
) -> None:
    presence.granted(LEASE, 1, 2, Kind.REPLAY)
    presence.granted(LEASE, 2, 1, Kind.REPLAY)
    clock.now = 50.0
    assert beat(presence, machine, (LEASE, attempt)) == lost
    clock.now = 70.0
    assert presence.due().expired == (() if not lost else (LeaseRef(id=LEASE, attempt=2),))  # nobody else renews
    presence.granted(LEASE, 2, 1, Kind.REPLAY)
    assert presence.holds_lease(LEASE, attempt, machine) is (not lost)


def test_with_a_silent_machine_goes_what_it_held(presence: Presence, clock: Clock) -> None:
    """It may be back within its lease's term: then the lease is in the queue, and it must hear so."""
    presence.arrived(1)
    presence.granted(LEASE, 1, 1, Kind.PROMOTE)
    presence.granted(OTHER, 1, 2, Kind.REPLAY)
    assert presence.holds(1, Kind.PROMOTE)
    assert not presence.holds(1, Kind.REPLAY)
    clock.now = 40.0
    due = presence.due()
    assert (due.silent, due.expired) == ((1,), (LeaseRef(id=LEASE, attempt=1),))
    presence.forget_lease(due.expired[0])
    assert not presence.holds(1, Kind.PROMOTE)
    assert beat(presence, 1, (LEASE, 1)) == (LEASE,)
    assert presence.seen_s(1) is not None


def test_leaving_and_closing(presence: Presence) -> None:
    presence.arrived(1)
    presence.granted(LEASE, 1, 1, Kind.REPLAY)
    presence.granted(OTHER, 1, 1, Kind.CONFIRM)
    presence.closed(OTHER)
    presence.closed(OTHER)
    assert not presence.holds(1, Kind.CONFIRM)
    presence.left(1)
    presence.left(1)
    assert not presence.holds(1, Kind.REPLAY)
    assert presence.seen_s(1) is None


def test_after_a_restart_each_of_many_gets_the_full_term_of_so_many(presence: Presence, clock: Clock) -> None:
    presence.restarted(range(5000))
    assert presence.interval_s == 50.0
    clock.now = 154.0
    assert presence.due().silent == ()
    clock.now = 156.0
    assert len(presence.due().silent) == 5000
