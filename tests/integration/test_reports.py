"""Reports: what is stored of them, what is refused, and which results are suspect; on both databases."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import ValidationError

from coordinator.database import Conflict, Impossible, NotFound, Sanity
from coordinator.store import Store
from shared import wire
from shared.wire import Kind, Status
from tests.reports import Machine, commit, machine, report, row, run, standings

# -- storing


def test_the_same_report_twice_changes_nothing(store: Store) -> None:
    m1, identity = machine(store), uuid4()
    first = report(1, (1.0,), version=2)
    assert m1.send(identity, first).stored
    before = store.look.experiment(identity), standings(store), store.writer.last_event
    for version in (2, 1):
        again = m1.send(identity, first.model_copy(update={"version": version, "status": Status.DISCARD}))
        assert not again.stored
    assert (store.look.experiment(identity), standings(store), store.writer.last_event) == before
    assert store.reports.known(m1.member) == {identity: 2}


def test_a_later_version_replaces(store: Store) -> None:
    m1 = machine(store)
    m1.tries(1.0)
    identity = m1.tries(0.9)
    assert m1.again(identity, scores=(0.9, 0.94)).stored
    view = store.look.experiment(identity)
    assert (view.score, view.mean, view.runs, view.confirmed) == (0.9, math.fsum((0.9, 0.94)) / 2, 2, False)
    assert [each.score for each in view.run_reports] == [0.9, 0.94]
    assert store.reports.known(m1.member)[identity] == 2
    assert [e.kind for e in store.look.events(0, 9)] == ["registered", "experiment", "experiment", "best", "revised"]
    assert m1.again(identity, status=Status.DISCARD, kept=None).stored
    assert row(store).keeps == 0
    assert row(store).best == 1.0


def test_an_experiment_has_one_machine(store: Store) -> None:
    m1, m2 = machine(store, "m1"), machine(store, "m2")
    identity = m1.tries(1.0)
    with pytest.raises(Conflict, match="belongs to another machine"):
        m2.send(identity, m1.reports[identity].model_copy(update={"version": 9}))
    assert store.reports.known(m2.member) == {}


@pytest.mark.parametrize(
    "other", [{"number": 5}, {"idea": UUID(int=1)}, {"profile": "h100"}, {"rung": "d12"}, {"tested": commit("other")}]
)
def test_what_an_experiment_is_does_not_change(store: Store, other: dict[str, Any]) -> None:
    m1 = machine(store)
    identity = m1.tries(1.0)
    before = standings(store), store.writer.last_event
    with pytest.raises(Conflict, match=f"another {next(iter(other))}"):
        m1.again(identity, **other)
    assert (standings(store), store.writer.last_event) == before


@pytest.mark.parametrize(
    ("of", "message"),
    [
        pytest.param({"scores": (0.0,), "metric": "val_bpb"}, "bits per byte", id="bpb of 0"),
        pytest.param({"scores": (0.9, -37.8), "metric": "val_bpb"}, "bits per byte", id="negative bpb in a rerun"),
        pytest.param({"scores": ()}, "keep without a score", id="keep without runs"),
        pytest.param({"scores": (None, 1.0)}, "keep without a score", id="keep decided on a crash"),
        pytest.param({"status": Status.VOID}, "void", id="void"),
        pytest.param({"runs": (run(1.0, digest="e" * 64),)}, "digest", id="measured with something else"),
        pytest.param({"scores": (1e200,)}, "beyond", id="a score whose square is infinite"),
        pytest.param({"runs": (run(1.0, seconds=1e308), run(1.0, seconds=1e308))}, "beyond", id="endless seconds"),
        pytest.param({"runs": (run(1.0, seed=2**63),)}, "64 bits", id="a seed beyond 64 bits"),
        pytest.param({"number": 10**30}, "64 bits", id="a number beyond 64 bits"),
        pytest.param({"lease": wire.LeaseRef(id=uuid4(), attempt=2**64)}, "64 bits", id="an attempt beyond 64 bits"),
        pytest.param({"edits": {"LR": math.nan}}, "finite", id="an edit that is no number"),
        pytest.param({"params": {"a": [{"b": math.inf}]}}, "finite", id="an infinite parameter"),
        pytest.param({"rung": "d\0"}, "NUL", id="a rung that no database takes"),
    ],
)
def test_what_cannot_be_is_refused(open_store: Callable[..., Store], of: dict[str, Any], message: str) -> None:
    of = dict(of)
    store = open_store(metric=of.pop("metric", "loss"), digest="d" * 64)
    m1 = machine(store)
    with pytest.raises(Impossible, match=message):
        m1.send(uuid4(), report(**of))
    assert store.look.experiments().experiments == ()
    assert standings(store) == []


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_scores_are_finite(score: float) -> None:
    with pytest.raises(ValidationError):
        run(score)


def test_a_digest_is_held_against_its_profile_only(open_store: Callable[..., Store]) -> None:
    store = open_store(digest="d" * 64)
    m1 = machine(store)
    for profile, digest in (("default", "d" * 64), ("default", None), ("h100", "e" * 64)):
        identity = m1.tries(1.0, profile=profile, runs=(run(1.0, digest=digest),))
        assert store.look.experiment(identity).digest == digest


def test_whatever_the_report_says_can_be_read_again(store: Store) -> None:
    m1 = machine(store)
    made = report(
        2**62,
        (1.0, None),
        description="\t🧪 ünïcode \u202e",
        edits={"A": 1.5, "\0": ["x\0", None, True, 10**30], "half": "\ud800"},
        params={"DEPTH": 4},
        nodes_added=-3,
        proposer="search",
        reason="because",
        fingerprint="1:ab",
        code_state="c" * 64,
        log_tail="Traceback 🧪\0",
        kind=Kind.REPLAY,
        pruned=True,
    )
    m1.send(identity := uuid4(), made)
    view = store.look.experiment(identity)
    for name in (
        "number",
        "kind",
        "idea",
        "tested",
        "parent",
        "kept",
        "description",
        "params",
        "nodes_added",
        "status",
    ):
        assert getattr(view, name) == getattr(made, name), name
    assert view.edits == {"A": 1.5, "�": ["x�", None, True, 10**30], "half": "?"}
    assert view.log_tail == made.log_tail
    assert view.run_reports == made.runs
    assert wire.ExperimentView.model_validate_json(view.model_dump_json()) == view


@pytest.mark.parametrize(
    "diff",
    [
        pytest.param(None, id="none"),
        pytest.param("", id="empty"),
        pytest.param("+nul \0 and 🧪 and \r\n and \x1b[31m\n", id="odd characters"),
        pytest.param("".join(random.Random(1).choices("+-abc \n€", k=250_000))[:250_000], id="500 KB"),
    ],
)
def test_diffs_and_logs_come_back_as_they_went(store: Store, diff: str | None) -> None:
    m1 = machine(store)
    identity = m1.tries(1.0, diff=diff, log_tail=diff or "")
    assert store.look.diff(identity) == (diff or "")
    view = store.look.experiment(identity)
    assert (view.log_tail, view.has_diff) == (diff or "", diff is not None)
    store.drop_logs(older_than=2**40)
    assert (store.look.diff(identity), store.look.experiment(identity).log_tail) == (diff or "", "")
    with pytest.raises(NotFound):
        store.look.diff(uuid4())


def test_ideas_are_counted_once_an_experiment(store: Store) -> None:
    m1, m2 = machine(store, "m1"), machine(store, "m2")
    first = m1.tries(1.0)
    idea = m1.reports[first].idea
    replay = m2.tries(1.1, status=Status.DISCARD, idea=idea, kind=Kind.REPLAY, description="as there")
    other = m2.tries(1.0)
    found, following = store.look.ideas(None, 10)
    assert following is None
    assert [(i.id, i.machine, i.tried, i.kept) for i in found] == [
        (m2.reports[other].idea, "m2", 1, 1),
        (idea, "m1", 2, 1),
    ]
    assert found[1].description == "baseline"
    m2.again(replay, status=Status.KEEP, kept=commit("kept"))
    m2.again(replay, status=Status.KEEP, kept=commit("kept"))
    assert [(i.tried, i.kept) for i in store.look.ideas(None, 10)[0]] == [(1, 1), (2, 2)]
    m1.again(first, status=Status.DISCARD, kept=None)
    assert [(i.tried, i.kept) for i in store.look.ideas(None, 10)[0]] == [(1, 1), (2, 1)]
    page, following = store.look.ideas(None, 1)
    assert page == store.look.ideas(None, 10)[0][:1]
    assert store.look.ideas(following, 1) == (store.look.ideas(None, 10)[0][1:], None)


# -- suspects

BOUNDS = Sanity(best_possible=0.5, largest_step=0.1)


@pytest.fixture
def bounded(open_store: Callable[..., Store]) -> Machine:
    """A machine of a study with bounds; its baseline is 1.0."""
    m1 = machine(open_store(sanity=BOUNDS))
    m1.tries(1.0)
    return m1


@pytest.mark.parametrize(
    ("scores", "suspect"),
    [
        pytest.param((0.91,), False, id="a step"),
        pytest.param((0.89,), True, id="a step too large"),
        pytest.param((1.5,), False, id="much worse"),
        pytest.param((0.95, -37.8), True, id="its rerun makes the mean impossible"),
    ],
)
def test_suspects(bounded: Machine, scores: tuple[float, ...], suspect: bool) -> None:
    identity = uuid4()
    assert bounded.send(identity, report(1, scores)).suspect is suspect
    assert bounded.store.look.experiment(identity).suspect is suspect
    assert row(bounded.store).suspects == suspect
    if suspect:
        assert row(bounded.store).best == 1.0
        assert [e.id for e in bounded.store.look.experiments(suspect=True).experiments] == [identity]


def test_a_rerun_can_make_suspect(bounded: Machine) -> None:
    head = bounded.tries(0.95)
    assert bounded.again(head, scores=(0.95, 0.2)).suspect
    assert (row(bounded.store).best, row(bounded.store).suspects) == (1.0, 1)


def test_a_suspect_baseline_is_none(open_store: Callable[..., Store]) -> None:
    store = open_store(sanity=BOUNDS)
    m1 = machine(store)
    baseline = m1.tries(0.4, 0.1)
    now = row(store)
    assert (now.baseline, now.best, now.gain, now.suspects) == (None, None, None, 1)
    assert now.sigma == pytest.approx(0.01)  # nor do its reruns say what noise is
    store.reports.clear(baseline)
    assert (row(store).baseline, row(store).best) == (0.25, 0.25)


def test_bounds_where_higher_is_better(open_store: Callable[..., Store]) -> None:
    store = open_store(direction="maximize", sanity=Sanity(best_possible=0.99, largest_step=0.1))
    m1 = machine(store)
    m1.tries(0.5)
    assert [m1.send(uuid4(), report(1, (s,), Status.DISCARD)).suspect for s in (0.1, 0.59, 0.61, 1.0)] == [
        False,
        False,
        True,
        True,
    ]


def test_a_cleared_suspect_counts_and_later_ones_are_looked_at_again(bounded: Machine) -> None:
    store = bounded.store
    first = bounded.tries(0.85)
    next_ = bounded.tries(0.82)
    wild = bounded.tries(0.45, status=Status.DISCARD)
    last = bounded.tries(0.80)
    assert (row(store).suspects, row(store).best, row(store).keeps) == (4, 1.0, 3)
    store.reports.clear(first)
    assert {i: store.look.experiment(i).suspect for i in (first, next_, wild, last)} == {
        first: False,
        next_: False,
        wild: True,
        last: False,
    }
    assert (row(store).best, row(store).suspects) == (0.80, 1)
    assert not bounded.again(first, scores=(0.85, 0.3)).suspect  # somebody believes it
    with pytest.raises(NotFound):
        store.reports.clear(uuid4())


def test_clearing_a_later_one_says_nothing_about_earlier_ones(bounded: Machine) -> None:
    first, second = bounded.tries(0.85), bounded.tries(0.7)
    bounded.store.reports.clear(second)
    assert [bounded.store.look.experiment(i).suspect for i in (first, second)] == [True, False]
    assert row(bounded.store).best == 0.7


def test_a_confirmed_suspect_is_believed(bounded: Machine) -> None:
    store = bounded.store
    first, second = bounded.tries(0.85), bounded.tries(0.8)
    assert row(store).suspects == 2
    assert not bounded.confirms(first, 0.85, 0.86, 0.84).suspect
    assert store.look.experiment(first).confirmed
    assert [store.look.experiment(i).suspect for i in (first, second)] == [False, False]
    assert row(store).best == 0.8
    assert not bounded.again(second, scores=(0.8, 0.2)).suspect or store.look.experiment(second).suspect


def test_runs_that_nobody_asked_for_or_that_disagree_confirm_nothing(bounded: Machine) -> None:
    store = bounded.store
    first = bounded.tries(0.85)
    assert bounded.again(first, scores=(0.85, 0.85)).suspect  # its own runs: nobody asked
    other = bounded.asked(first)
    second = bounded.tries(0.84)
    assert bounded.again(second, scores=(0.84, 0.84), lease=other).suspect  # asked for another
    assert bounded.confirms(first, 0.85).suspect  # no other run
    assert bounded.confirms(first, 0.85, None).suspect
    assert bounded.confirms(first, 0.85, 5.0).suspect  # far off
    assert not any(store.look.experiment(each).confirmed for each in (first, second))
    assert not bounded.confirms(first, 0.85, 0.85).suspect
    assert bounded.again(first, scores=(0.85, 0.85, 0.9)).stored
    assert store.look.experiment(first).confirmed  # it stays


def test_a_baseline_that_failed_first_is_no_level(store: Store) -> None:
    """A machine without what the task needs reports a baseline that crashed; once mended it begins again."""
    m1 = machine(store)
    m1.tries(None, status=Status.CRASH, kept=None)
    m1.number = 0
    m1.tries(1.0)
    m1.tries(0.8)
    assert (row(store).baseline, row(store).best, row(store).gain) == (1.0, 0.8, pytest.approx(0.2))
    before = standings(store)
    store.standings.rebuild()
    assert standings(store) == before


def test_a_suspect_that_an_earlier_one_clears_counts_at_once(bounded: Machine) -> None:
    """Reports that come late and out of order: a plain discard may change what is believed of others."""
    store = bounded.store
    m1 = machine(store, "m2")
    m1.send(uuid4(), report(0, (0.9,)))
    last, late = uuid4(), uuid4()
    m1.send(last, report(10, (0.9,)))
    m1.again(last, scores=(0.9, 1.1))
    assert m1.send(late, report(5, (0.85,))).suspect  # HEAD stands at 1.0 now
    m1.send(uuid4(), report(3, (0.95,), Status.DISCARD))
    assert not store.look.experiment(late).suspect  # when it was tried HEAD stood at 0.9
    before = standings(store)
    store.standings.rebuild()
    assert standings(store) == before


def test_a_suspect_that_lost_its_runs(bounded: Machine) -> None:
    first, second = bounded.tries(0.85), bounded.tries(0.8)
    assert bounded.again(second, scores=(), status=Status.CRASH, kept=None).suspect
    bounded.store.reports.clear(first)
    assert row(bounded.store).suspects == 0
