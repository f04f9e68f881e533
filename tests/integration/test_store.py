"""The store's contract, the same on SQLite and on PostgreSQL."""

from __future__ import annotations

import math
import random
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import ValidationError
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from coordinator.store import Conflict, Impossible, NotFound, Sanity, Store
from coordinator.tables import Token
from coordinator.writer import StorageUnavailable, Transaction
from shared import wire
from shared.errors import BadInput
from shared.wire import Event, Kind, MachineChange, MachineState, Status
from tests import postgres
from tests.reports import (
    BASE,
    PREFIX,
    Machine,
    commit,
    machine,
    opened,
    registration,
    report,
    run,
    standings,
    study,
)
from worker import results
from worker.journal import Journal


@pytest.fixture(params=postgres.KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield from postgres.fresh(request.param, request.config, tmp_path)


@pytest.fixture
def open_store(url: str) -> Iterator[Callable[..., Store]]:
    stores: list[Store] = []

    def make(**other: Any) -> Store:
        stores.append(opened(url, **other))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., Store]) -> Store:
    return open_store()


def row(store: Store, name: str = "m1", **where: Any) -> wire.Standing:
    (only,) = store.leaderboard("group", machine=name, **where).standings
    return only


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
    before = standings(first), first.writer.last_event, first.members(), first.experiments()
    first.close()
    second = open_store()
    assert (standings(second), second.writer.last_event, second.members(), second.experiments()) == before
    assert second.member("laptop") == paused
    assert [(row.id, row.hash) for row in second.tokens()] == [(token, "ab" * 32)]
    m1 = Machine(second, second.member("m1"), number=2)
    later = m1.tries(0.8)
    assert [e.id for e in second.experiments(limit=2).experiments] == [later, kept]
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
    assert store.members() == [again] == [store.member("m1")] == [store.member_by_id(m1.id)]
    (event_1, event_2) = store.events(0, 10)
    assert (event_1.data["new"], event_2.data["new"]) == (True, False)
    with pytest.raises(NotFound):
        store.member("other")


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
        store.member("m1")
    for taken in ("m2", "m1", "promoted", "self"):  # m1 is in the name of studio's branch
        with pytest.raises(Conflict, match="taken"):
            store.change(m2 if taken == "m1" else renamed, MachineChange(name=taken))
    assert store.register(registration("m1"), PREFIX).name == "m1-2"
    assert store.change(renamed, MachineChange(name="m1")).name == "m1"
    assert [(e.kind, e.machine, e.data) for e in store.events(0, 99) if e.kind == "renamed"] == [
        ("renamed", "studio", {"was": "m1"}),
        ("renamed", "m1", {"was": "studio"}),
    ]


def test_pausing(store: Store) -> None:
    m1 = machine(store).member
    assert store.change(m1, MachineChange(paused=True)).paused
    assert store.member("m1").paused
    assert not store.change(store.member("m1"), MachineChange(paused=False)).paused
    assert [e.kind for e in store.events(0, 9)] == ["registered", "paused", "resumed"]


def test_a_retired_machine_stays_retired(store: Store) -> None:
    m1 = machine(store)
    m1.tries(1.0)
    store.set_state(m1.member, MachineState.RETIRED)
    for state in (MachineState.ONLINE, MachineState.OFFLINE):  # a heartbeat, or the reaper, was on its way
        store.set_state(m1.member, state)
    assert store.member("m1").state is MachineState.RETIRED
    with pytest.raises(Conflict) as refused:
        store.register(registration("m1", uid=store.machine_rows()[0].uid), PREFIX)
    assert refused.value.kind == wire.RETIRED
    assert store.member("m1").incarnation == 1
    assert store.register(registration("m1"), PREFIX).name == "m1-2"
    assert row(store).best == 1.0  # its results stay


def test_a_transition_is_told_once(store: Store) -> None:
    m1 = machine(store).member
    for state in (MachineState.OFFLINE, MachineState.OFFLINE, MachineState.ONLINE, MachineState.ONLINE):
        store.set_state(m1, state)
    assert [e.kind for e in store.events(0, 9)] == ["registered", "offline", "online"]


def test_text_that_no_database_takes(store: Store) -> None:
    m1 = machine(store, version="0.1\0dev", hardware=wire.Hardware(host="a\0b"))
    identity = m1.tries(1.0, description="nul \0", proposer="p\0", reason="\0", code_state="\0", fingerprint="\0")
    view = store.experiment(identity)
    assert (view.reason, view.proposer) == ("�", "p�")
    for where in ({"profile": "\0"}, {"rung": "\0"}, {"machine_class": "\0"}):
        assert not store.leaderboard("group", **where).standings
        assert not store.experiments(**where).experiments
    assert not store.leaderboard("group", machine="\0").standings
    store.add_token(token_values("a" * 64, None) | {"label": "\0"})
    assert [row.label for row in store.tokens()] == ["�"]
    for ask in (store.lineage, store.find, lambda name: store.experiments(machine=name)):
        with pytest.raises(NotFound):
            ask("\0")


# -- reports


def test_the_same_report_twice_changes_nothing(store: Store) -> None:
    m1, identity = machine(store), uuid4()
    first = report(1, (1.0,), version=2)
    assert m1.send(identity, first).stored
    before = store.experiment(identity), standings(store), store.writer.last_event
    for version in (2, 1):
        again = m1.send(identity, first.model_copy(update={"version": version, "status": Status.DISCARD}))
        assert not again.stored
    assert (store.experiment(identity), standings(store), store.writer.last_event) == before
    assert store.known(m1.member) == {identity: 2}


def test_a_later_version_replaces(store: Store) -> None:
    m1 = machine(store)
    m1.tries(1.0)
    identity = m1.tries(0.9)
    assert m1.again(identity, scores=(0.9, 0.94), confirmed=True).stored
    view = store.experiment(identity)
    assert (view.score, view.mean, view.runs, view.confirmed) == (0.9, math.fsum((0.9, 0.94)) / 2, 2, True)
    assert [each.score for each in view.run_reports] == [0.9, 0.94]
    assert store.known(m1.member)[identity] == 2
    assert [e.kind for e in store.events(0, 9)] == ["registered", "experiment", "experiment", "best", "revised"]
    assert m1.again(identity, status=Status.DISCARD, kept=None).stored
    assert row(store).keeps == 0
    assert row(store).best == 1.0


def test_an_experiment_has_one_machine(store: Store) -> None:
    m1, m2 = machine(store, "m1"), machine(store, "m2")
    identity = m1.tries(1.0)
    with pytest.raises(Conflict, match="belongs to another machine"):
        m2.send(identity, m1.reports[identity].model_copy(update={"version": 9}))
    assert store.known(m2.member) == {}


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
    assert store.experiments().experiments == ()
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
        assert store.experiment(identity).digest == digest


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
    view = store.experiment(identity)
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
    assert store.diff(identity) == (diff or "")
    view = store.experiment(identity)
    assert (view.log_tail, view.has_diff) == (diff or "", diff is not None)
    store.drop_logs(older_than=2**40)
    assert (store.diff(identity), store.experiment(identity).log_tail) == (diff or "", "")
    with pytest.raises(NotFound):
        store.diff(uuid4())


def test_ideas_are_counted_once_an_experiment(store: Store) -> None:
    m1, m2 = machine(store, "m1"), machine(store, "m2")
    first = m1.tries(1.0)
    idea = m1.reports[first].idea
    replay = m2.tries(1.1, status=Status.DISCARD, idea=idea, kind=Kind.REPLAY, description="as there")
    other = m2.tries(1.0)
    found, following = store.ideas(None, 10)
    assert following is None
    assert [(i.id, i.machine, i.tried, i.kept) for i in found] == [
        (m2.reports[other].idea, "m2", 1, 1),
        (idea, "m1", 2, 1),
    ]
    assert found[1].description == "baseline"
    m2.again(replay, status=Status.KEEP, kept=commit("kept"))
    m2.again(replay, status=Status.KEEP, kept=commit("kept"))
    assert [(i.tried, i.kept) for i in store.ideas(None, 10)[0]] == [(1, 1), (2, 2)]
    m1.again(first, status=Status.DISCARD, kept=None)
    assert [(i.tried, i.kept) for i in store.ideas(None, 10)[0]] == [(1, 1), (2, 1)]
    page, following = store.ideas(None, 1)
    assert page == store.ideas(None, 10)[0][:1]
    assert store.ideas(following, 1) == (store.ideas(None, 10)[0][1:], None)


# -- standings


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
    m1.again(head, scores=(0.75, 0.25, None), confirmed=True)
    now = row(store)
    assert (now.baseline, now.best, now.gain, now.runs, now.confirmed) == (1.25, 0.5, 0.75, 2, True)
    assert (now.experiments, now.keeps, now.lineage, now.experiment) == (2, 1, 1, head)


def test_profiles_and_rungs_stand_apart(store: Store) -> None:
    m1 = machine(store)
    m1.tries(1.0)
    m1.tries(0.5, rung="d12")
    m1.tries(0.25, profile="h100")
    found = {(s.profile, s.rung): (s.best, s.baseline) for s in store.leaderboard("group").standings}
    assert found == {("default", "base"): (1.0, 1.0), ("default", "d12"): (0.5, None), ("h100", "base"): (0.25, None)}
    assert store.totals() == (2, 2)


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
    store.rebuild_standings()
    assert standings(store) == before


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
    assert bounded.store.experiment(identity).suspect is suspect
    assert row(bounded.store).suspects == suspect
    if suspect:
        assert row(bounded.store).best == 1.0
        assert [e.id for e in bounded.store.experiments(suspect=True).experiments] == [identity]


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
    store.clear(baseline)
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
    store.clear(first)
    assert {i: store.experiment(i).suspect for i in (first, next_, wild, last)} == {
        first: False,
        next_: False,
        wild: True,
        last: False,
    }
    assert (row(store).best, row(store).suspects) == (0.80, 1)
    assert not bounded.again(first, scores=(0.85, 0.3)).suspect  # somebody believes it
    with pytest.raises(NotFound):
        store.clear(uuid4())


def test_clearing_a_later_one_says_nothing_about_earlier_ones(bounded: Machine) -> None:
    first, second = bounded.tries(0.85), bounded.tries(0.7)
    bounded.store.clear(second)
    assert [bounded.store.experiment(i).suspect for i in (first, second)] == [True, False]
    assert row(bounded.store).best == 0.7


def test_a_confirmed_suspect_is_believed(bounded: Machine) -> None:
    store = bounded.store
    first, second = bounded.tries(0.85), bounded.tries(0.8)
    assert row(store).suspects == 2
    assert not bounded.again(first, scores=(0.85, 0.86, 0.84), confirmed=True).suspect
    assert [store.experiment(i).suspect for i in (first, second)] == [False, False]
    assert row(store).best == 0.8
    assert not bounded.again(second, scores=(0.8, 0.2)).suspect or store.experiment(second).suspect


def test_a_suspect_that_lost_its_runs(bounded: Machine) -> None:
    first, second = bounded.tries(0.85), bounded.tries(0.8)
    assert bounded.again(second, scores=(), status=Status.CRASH, kept=None).suspect
    bounded.store.clear(first)
    assert row(bounded.store).suspects == 0


# -- looking


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
    board = store.leaderboard("group")
    assert [(s.rank, s.machine) for s in board.standings] == [(1, "b"), (2, "a"), (3, "d"), (4, "e"), (1, "c")]
    assert (board.campaign, board.metric, board.direction, board.next) == ("fast", "val_bpb", "minimize", None)
    assert board.standings[3].best is None
    by_sigmas = store.leaderboard("sigmas")
    assert [(s.rank, s.machine) for s in by_sigmas.standings] == [(1, "b"), (2, "c"), (3, "a"), (4, "d"), (5, "e")]
    assert [s.machine for s in store.leaderboard("group", machine_class="mlx").standings] == ["c"]
    assert [s.machine for s in store.leaderboard("group", profile="other").standings] == []
    assert [s.machine for s in store.leaderboard("group", rung="base", machine="a").standings] == ["a"]


@pytest.mark.parametrize("order", ["group", "sigmas"])
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_pages_of_the_leaderboard(open_store: Callable[..., Store], order: Any, direction: str) -> None:
    store = open_store(direction=direction)
    for name in "abcd":
        each = machine(store, name)
        for rung in ("base", "d8", "d12"):
            each.tries(1.0 if name < "c" else 2.0, rung=rung)
    whole = store.leaderboard(order)
    assert len(whole.standings) == 12
    assert whole.standings[0].machine == ("a" if direction == "minimize" or order == "sigmas" else "c")
    paged: list[wire.Standing] = []
    after: int | None = 0
    while after is not None:
        page = store.leaderboard(order, after=after, limit=5)
        paged += page.standings
        after = page.next
    assert tuple(paged) == whole.standings
    assert store.leaderboard(order, after=50).standings == ()


def test_filters_of_experiments(store: Store) -> None:
    m1, m2 = machine(store, "m1", machine_class="cuda"), machine(store, "m2")
    kept = m1.tries(1.0)
    crash = m2.tries(None, status=Status.CRASH, kept=None)
    replay = m2.tries(1.1, status=Status.DISCARD, kind=Kind.REPLAY, rung="d8", profile="h100")

    def ids(**where: Any) -> list[UUID]:
        return [e.id for e in store.experiments(**where).experiments]

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
        page = store.experiments(after=after, limit=7, oldest_first=oldest_first)
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
        assert store.find(text) == ids[0], text
    assert store.find(commit("t2")[:7]) == ids[1]
    with pytest.raises(Conflict, match="several"):
        store.find("abcd")
    for text in ("abcd9", "abc", "----", "----------", "no", "g" * 8, "", "é" * 8, commit("other")):
        with pytest.raises(NotFound):
            store.find(text)
    with pytest.raises(NotFound):
        store.experiment(store.find(str(uuid4())))
    abbreviated = m1.send(uuid4(), report(3, tested=commit("t3")[:7], kept=commit("t3")[:7]))
    assert abbreviated.stored
    for text in (commit("t3"), commit("t3")[:12], commit("t3")[:7], commit("t3")[:5]):
        assert store.find(text) == list(m1.reports)[-1], text


def test_lineage(store: Store) -> None:
    m1, m2 = machine(store, "m1"), machine(store, "m2")
    m1.tries(1.0)
    base = m2.tries(1.0)
    kept = [base, m2.tries(0.9), m2.tries(0.8)]
    m2.tries(0.85, status=Status.DISCARD)
    m1.tries(0.95)
    steps = store.lineage(m2.head)
    assert [step.experiment for step in steps] == kept[::-1]
    assert {step.machine for step in steps} == {"m2"}  # also where both machines kept the base
    assert [step.commit for step in steps] == [m2.head, steps[0].parent, BASE]
    assert store.lineage(m2.head[:8], limit=2) == steps[:2]
    with pytest.raises(NotFound):
        store.lineage(commit("other"))
    with pytest.raises(Conflict, match="several"):
        store.lineage("")


def test_a_lineage_that_bites_its_tail_ends(store: Store) -> None:
    m1 = machine(store)
    for here, there in (("a", "b"), ("b", "a")):
        m1.tries(1.0, kept=commit(here), parent=commit(there))
    assert len(store.lineage(commit("a"), limit=10)) == 10


def test_export(store: Store) -> None:
    m1 = machine(store)
    ids = [m1.tries(1.0, status=Status.DISCARD, diff=f"+{n}\n", edits={"N": n}) for n in range(20)]
    chunks = list(store.export(size=7))
    assert [len(chunk) for chunk in chunks] == [7, 7, 6]
    rows = [row for chunk in chunks for row in chunk]
    assert [row["id"] for row in rows] == ids
    assert [(row["diff"], row["edits"], row["machine"]) for row in rows[:2]] == [
        ("+0\n", {"N": 0}, "m1"),
        ("+1\n", {"N": 1}, "m1"),
    ]
    assert list(store.export(size=20)) == [rows]


def test_branches(store: Store) -> None:
    m1 = machine(store).member
    store.pushed(m1, None, None)
    assert store.branches() == []
    store.pushed(m1, None, "a" * 40)
    store.pushed(m1, "c" * 40, "b" * 40)
    store.pushed(m1, "c" * 40, "d" * 40)
    (only,) = store.branches()
    assert (only.machine, only.ref, only.commit, only.attic) == ("m1", m1.branch, "c" * 40, "d" * 40)
    assert [e.data["commit"] for e in store.events(0, 9) if e.kind == "pushed"] == [None, "c" * 40]


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
    store.find(str(identity)[:8])
    store.experiment(identity)
    store.diff(identity)
    store.lineage(BASE)
    for where in ({"machine": "m1"}, {"status": ["keep"]}, {"idea": m1.reports[identity].idea}):
        store.experiments(**where)
    event.remove(store.engine, "before_cursor_execute", note)
    with store.read() as connection:
        plans = [
            " ".join(row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters))
            for statement, parameters in asked
        ]
    assert not [plan for plan in plans if re.search(r"SCAN (experiments|details|runs|machines|ideas)", plan)]
    used = set(re.findall(r"ix_experiments_\w+", " ".join(plans)))
    assert used >= {f"ix_experiments_{name}" for name in ("heads", "reruns", "suspects", "tested", "kept", "status")}


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
    stored = store.events(0, 10_000)
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
        store.report(m1.member, uuid4(), report(7))(t)
        t.after_commit(lambda: pytest.fail("it was not committed"))
        raise ZeroDivisionError

    def worse(t: Transaction) -> None:
        """The same key twice: the database itself refuses."""
        for _ in range(2):
            t.connection.execute(Token.__table__.insert().values(**token_values("a" * 64, None)))

    with held(store):
        jobs = [store.writer.submit(store.report(m1.member, uuid4(), report(n))) for n in (0, 1)]
        failing = [store.writer.submit(job) for job in (bad, worse)]
        jobs += [store.writer.submit(store.report(m1.member, uuid4(), report(n))) for n in (2, 3)]
    assert all(job.result().stored for job in jobs)
    assert isinstance(failing[0].exception(), ZeroDivisionError)
    assert failing[1].exception() is not None
    for alone in (bad, worse):
        assert store.writer.submit(alone).exception() is not None
    assert sorted(e.number for e in store.experiments().experiments) == [0, 1, 2, 3]
    assert [e.position for e in store.events(0, 99)] == list(range(1, before + 5))
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
    big = registration("m2", hardware=wire.Hardware(os=noise))
    lease = uuid4()

    def send() -> list[Any]:
        return [store.writer.submit(store.report(m1.member, i, r)) for i, r in waiting.items()]

    before = store.writer.last_event, standings(store), store.members()
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
                store.events(0, 9)
        assert store.writer.last_event == before[0]
        assert store.members() == before[2]
    assert (standings(store), len(store.experiments().experiments)) == (before[1], 1)
    assert [future.result().stored for future in send()] == [True] * 8
    assert store.writer.fault is None
    assert store.register(big, PREFIX).name == "m2"
    assert [e.number for e in store.experiments(oldest_first=True).experiments] == list(range(9))
    assert [e.position for e in store.events(0, 99)] == list(range(1, store.writer.last_event + 1))
    assert row(store).best == 0.92
    assert lease not in {view.id for view in store.leases()}
    kept = standings(store)
    store.rebuild_standings()
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
    assert store.member("m1").paused
    assert store.member("m2").incarnation == 1
    assert store.register(registration("m2", uid), PREFIX).incarnation == 2
    stored = store.events(0, 99)
    assert told == stored
    assert [e.position for e in stored] == list(range(1, store.writer.last_event + 1))
    assert [e.kind for e in stored] == ["registered", "experiment", "registered", "paused", "experiment", "registered"]
    store.close()


def test_closing_commits_what_waits(open_store: Callable[..., Store]) -> None:
    store = open_store()
    m1 = machine(store)
    with held(store):
        jobs = [store.writer.submit(store.report(m1.member, uuid4(), report(n))) for n in range(100)]
        closing = threading.Thread(target=store.close)
        closing.start()
    closing.join(30)
    assert all(job.result(0).stored for job in jobs)
    with pytest.raises(StorageUnavailable, match="stopping"):
        m1.tries(1.0)
    store.close()
    assert len(open_store().experiments(limit=1000).experiments) == 100
