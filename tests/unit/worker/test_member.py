"""A machine's side of the swarm against a coordinator that follows a script: nothing lost, the loop never waits."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from shared import wire
from shared.client import Away, CoordinatorClient
from shared.errors import Refused
from shared.git import GitError, Repo
from shared.wire import Activity, Confirm, ExperimentReport, Explore, LeaseRef, Status
from tests import fast_task
from worker import member as members
from worker.journal import Experiment, Run
from worker.member import Member, Outbox, Remote

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

URL = "http://coordinator.test"
PATIENCE_S = 10.0

Answer = httpx.Response | Exception | Callable[[], httpx.Response]


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.005)


def decided(number: int, version: int = 3, **other: Any) -> Experiment:
    made = Experiment(
        id=str(uuid4()),
        number=number,
        tested=f"{number:040x}",
        description=f"try {number}",
        proposer="search",
        edits={},
        params={},
        nodes_added=0,
        code_state="",
        idea=str(uuid4()),
        parent="b" * 40,
        version=version,
        status=Status.DISCARD,
    )
    return replace(made, **other)


def as_report(experiment: Experiment) -> ExperimentReport:
    assert experiment.status is not None
    return ExperimentReport(
        version=experiment.version,
        number=experiment.number,
        idea=UUID(experiment.idea),
        tested=experiment.tested,
        parent=experiment.parent,
        description=experiment.description,
        status=experiment.status,
        decided_at=0,
        runs=tuple(wire.RunReport(id=uuid4(), seed=run.seed, score=run.score) for run in experiment.runs),
    )


def problem(status: int, kind: str = "about:blank", retry: bool = False, after: int | None = None) -> httpx.Response:
    body = wire.Problem(type=kind, title="no", status=status, detail=f"says {status}", retry=retry)
    headers = {} if after is None else {"Retry-After": str(after)}
    return httpx.Response(status, text=body.model_dump_json(), headers=headers)


def hanging(release: threading.Event) -> Callable[[], httpx.Response]:
    """An answer that does not come before `release`, and then is none."""

    def answer() -> httpx.Response:
        assert release.wait(PATIENCE_S)
        return problem(503, retry=True)

    return answer


class Coordinator:
    """Answers as a coordinator does, unless `script` has something else for a call: answers, first to last."""

    def __init__(self) -> None:
        self.script: dict[str, list[Answer]] = {}
        self.always: dict[str, Answer] = {}
        self.calls: list[tuple[str, float]] = []  #: what, when
        self.stored: dict[str, int] = {}
        self.taken: list[ExperimentReport] = []
        self.beats: list[dict[str, Any]] = []
        self.epoch = "first"
        self.incarnation = 0
        self.lost: list[str] = []
        self.assignment: dict[str, Any] = {"kind": "explore"}
        http = httpx.Client(transport=httpx.MockTransport(self._handle), base_url=URL)
        self.client = CoordinatorClient(URL, "a-token", http)

    def count(self, name: str) -> int:
        return sum(call == name for call, _ in list(self.calls))

    def numbers(self) -> list[int]:
        return [report.number for report in list(self.taken)]

    def register(self) -> wire.Registered:
        return self.client.register(wire.Registration(version="0", uid=uuid4(), name="mac", machine_class="cpu"))

    def _handle(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/api/v1/machines")
        parts = path.removeprefix("/self/").split("/")
        name = parts[0] or "register"
        self.calls.append((name, time.monotonic()))
        answer = self.script[name].pop(0) if self.script.get(name) else self.always.get(name)
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            return answer() if callable(answer) else answer
        return getattr(self, f"_{name}")(request, parts)

    def _register(self, request: httpx.Request, parts: list[str]) -> httpx.Response:
        self.incarnation += 1
        campaign = {"name": "c", "tag": "t", "branch_prefix": "a", "metric": "m", "direction": "minimize"}
        campaign |= {"profile": "default", "base": "b" * 40, "repository": "/git/c.git"}
        places = {"machine": "mac", "branch": "refs/heads/a/t-mac", "attic": "refs/attic/mac", "token": None}
        facts = {"incarnation": self.incarnation, "version": "0", "heartbeat_s": 0.02, "epoch": self.epoch}
        return httpx.Response(201, json={**places, **facts, "campaign": campaign})

    def _heartbeat(self, request: httpx.Request, parts: list[str]) -> httpx.Response:
        self.beats.append(json.loads(request.content))
        return httpx.Response(200, json={"next_s": 0.02, "epoch": self.epoch, "lost": self.lost})

    def _assignment(self, request: httpx.Request, parts: list[str]) -> httpx.Response:
        return httpx.Response(200, json=self.assignment)

    def _known(self, request: httpx.Request, parts: list[str]) -> httpx.Response:
        return httpx.Response(200, json=dict(self.stored))

    def _experiments(self, request: httpx.Request, parts: list[str]) -> httpx.Response:
        report = ExperimentReport.model_validate_json(request.content)
        stored = report.version > self.stored.get(parts[1], 0)
        if stored:
            self.stored[parts[1]] = report.version
        self.taken.append(report)
        return httpx.Response(200, json={"stored": stored})

    def _leases(self, request: httpx.Request, parts: list[str]) -> httpx.Response:
        return httpx.Response(204)


@dataclass
class Team:
    """A member at work, and what it said."""

    member: Member
    outbox: Outbox
    notes: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def noted(self, words: str) -> int:
        return sum(words in note for note in list(self.notes))


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "BACKOFF_S", (0.01, 0.05))
    monkeypatch.setattr(members, "AT_END_S", 0.01)
    monkeypatch.setattr(members, "OFTEN_S", 0.01)


@contextmanager
def at_work(
    coordinator: Coordinator,
    folder: Path,
    history: list[Experiment] | None = None,
    *,
    alone: bool = False,
    client: CoordinatorClient | None = None,
    to_report: Callable[[Experiment], ExperimentReport] = as_report,
    register: Callable[[], wire.Registered] | None = None,
    remote: Remote | None = None,
) -> Iterator[Team]:
    notes: list[str] = []
    stop = threading.Event()
    outbox = Outbox(folder / "refused.jsonl")
    member = Member(
        client or coordinator.client,
        register or coordinator.register,
        None if alone else coordinator.register(),
        remote or Remote(Repo(folder), URL, "refs/heads/b", "refs/attic/mac", lambda: None),
        outbox,
        to_report,
        notes.append,
        stop,
    )
    before = set(threading.enumerate())
    member.beat()
    member.start(history or [])
    try:
        yield Team(member, outbox, notes, stop)
    finally:
        member.close()
    left = [thread for thread in threading.enumerate() if thread not in before and thread.name in THREADS]
    for thread in left:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), thread.name


THREADS = ("heartbeat", "delivery")

AWAY = httpx.ConnectError("connection refused")


# -- the outbox


def test_the_latest_version_waits_in_the_place_of_the_first(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "refused")
    first, second = decided(1, version=3), decided(2)
    newer = replace(first, version=5)
    for experiment in (first, second, newer, replace(first, version=4)):
        outbox.put(experiment)
    assert len(outbox) == 2
    assert outbox.first() is newer
    outbox.done(newer)
    assert outbox.first() is second


def test_a_version_that_comes_while_another_is_on_its_way_stays(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "refused")
    outbox.put(under_way := decided(1, version=3))
    outbox.put(newer := replace(under_way, version=4))
    outbox.done(under_way)
    assert outbox.first() is newer


def test_after_a_gap_all_go_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "refused")
    outbox.put(last := decided(7))
    outbox.put_all([decided(3), decided(4), replace(last, version=1)])
    numbers = []
    while (first := outbox.first()) is not None:
        numbers.append((first.number, first.version))
        outbox.done(first)
    assert numbers == [(3, 3), (4, 3), (7, 3)]


def test_a_refused_report_is_not_sent_again_until_more_is_known(tmp_path: Path) -> None:
    refused = decided(1, version=3)
    outbox = Outbox(tmp_path / "refused")
    outbox.put(refused)
    outbox.refuse(refused, "no")
    for again in (outbox, Outbox(tmp_path / "refused")):
        again.put(refused)
        assert len(again) == 0
        again.put(newer := replace(refused, version=4))
        assert again.first() is newer
    (line,) = (tmp_path / "refused").read_text().splitlines()
    assert json.loads(line)["why"] == "no"


@pytest.mark.parametrize("torn", [b'{"experiment": "x", "ver', b"[]\n\xff{", b"null\n{}\n", b""])
def test_a_line_cut_short_by_a_kill_spoils_no_other(tmp_path: Path, torn: bytes) -> None:
    one, two = decided(1), decided(2)
    Outbox(tmp_path / "refused").refuse(one, "no")
    with (tmp_path / "refused").open("ab") as file:
        file.write(torn)
    Outbox(tmp_path / "refused").refuse(two, "no")
    outbox = Outbox(tmp_path / "refused")
    outbox.put(one)
    outbox.put(two)
    assert len(outbox) == 0


# -- reports


def test_reports_arrive_once_each_in_order(tmp_path: Path) -> None:
    coordinator = Coordinator()
    with at_work(coordinator, tmp_path) as team:
        for number in range(50):
            team.member.report(decided(number))
        until(lambda: len(coordinator.taken) == 50, "all reports")
    assert coordinator.numbers() == list(range(50))
    assert not team.notes


def test_what_is_sent_is_the_experiment_as_it_stood_when_it_was_reported(tmp_path: Path) -> None:
    """The journal raises the version before it adds the run; whoever reads in between must not send that."""
    coordinator = Coordinator()
    mine = decided(1, version=3)
    asked, go_on = threading.Event(), threading.Event()

    def known() -> httpx.Response:
        asked.set()
        assert go_on.wait(PATIENCE_S)
        return httpx.Response(200, json={})

    coordinator.script["known"] = [known]
    with at_work(coordinator, tmp_path, [mine]) as team:
        assert asked.wait(PATIENCE_S)
        mine.version = 4  # the loop's thread, in the middle of Journal.append
        go_on.set()
        until(lambda: coordinator.stored.get(mine.id), "the report")
        assert coordinator.stored[mine.id] == 3
        mine.runs.append(Run(7, 1.5, 0.0, 1.0, None, "", None))
        team.member.report(mine)
        until(lambda: coordinator.stored[mine.id] == 4, "its next version")
    assert [len(report.runs) for report in coordinator.taken] == [0, 1]


def test_while_the_coordinator_is_away_results_wait_and_arrive_in_order(tmp_path: Path) -> None:
    coordinator = Coordinator()
    with at_work(coordinator, tmp_path) as team:
        team.member.report(decided(0))
        until(lambda: coordinator.taken, "the first report")
        coordinator.always = dict.fromkeys(("heartbeat", "experiments", "known", "register", "assignment"), AWAY)
        for number in range(1, 20):
            team.member.report(decided(number))
        until(lambda: coordinator.count("experiments") > 3, "some attempts")
        assert len(team.outbox) == 19
        coordinator.always = {}
        until(lambda: len(coordinator.taken) == 20, "all reports")
        until(lambda: team.noted("is back"), "a word that it is back")
    assert coordinator.numbers() == list(range(20))
    assert (team.noted("going on alone"), team.noted("is back")) == (1, 1)


def test_a_coordinator_that_says_later_is_not_asked_before_that(tmp_path: Path) -> None:
    coordinator = Coordinator()
    coordinator.script["experiments"] = [problem(503, retry=True, after=1)]
    with at_work(coordinator, tmp_path) as team:
        team.member.report(decided(0))
        until(lambda: coordinator.taken, "the report")
        first, second = (at for name, at in coordinator.calls if name == "experiments")
        assert second - first >= 1.0
        assert coordinator.count("heartbeat") > 5
    assert (team.noted("going on alone"), team.noted("is back")) == (1, 1)


def test_a_wait_beyond_all_measure_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "LONGEST_S", 0.1)
    coordinator = Coordinator()
    coordinator.script["experiments"] = [problem(429, after=10**12)]
    coordinator.script["heartbeat"] = [
        problem(503, retry=True, after=10**12),
        httpx.Response(200, json={"next_s": 1e300, "epoch": "first"}),
        httpx.Response(200, json={"next_s": -5, "epoch": "first"}),
    ]
    with at_work(coordinator, tmp_path) as team:
        team.member.report(decided(0))
        until(lambda: coordinator.taken and coordinator.count("heartbeat") > 5, "the report and heartbeats")


def test_a_failing_heartbeat_between_failing_reports_is_one_absence(tmp_path: Path) -> None:
    """A full disk: heartbeats are taken, reports are not. That must not be told anew with each of them."""
    coordinator = Coordinator()
    coordinator.always["experiments"] = problem(503, retry=True)
    with at_work(coordinator, tmp_path) as team:
        team.member.report(decided(0))
        until(lambda: coordinator.count("experiments") > 5 and coordinator.count("heartbeat") > 5, "attempts")
        assert len(team.notes) == 1
        assert team.member.assignment() == Explore()
        assert coordinator.count("assignment") == 0
        coordinator.always.clear()
        until(lambda: coordinator.taken, "the report")


@pytest.mark.parametrize("status", [409, 413, 422])
def test_a_report_refused_for_good_is_put_aside_and_blocks_none(tmp_path: Path, status: int) -> None:
    coordinator = Coordinator()
    coordinator.script["experiments"] = [problem(status)]
    bad = decided(0)
    with at_work(coordinator, tmp_path) as team:
        team.member.report(bad)
        team.member.report(decided(1))
        until(lambda: coordinator.numbers() == [1], "the one behind it")
        assert team.noted(f"refuses #0: says {status}") == 1
    with at_work(coordinator, tmp_path, [bad]) as team:
        team.member.report(decided(2))
        until(lambda: 2 in coordinator.numbers(), "the next start's report")
        assert bad.id not in coordinator.stored
        team.member.report(replace(bad, version=9))
        until(lambda: coordinator.stored.get(bad.id) == 9, "its next version")


def test_what_only_a_proxy_refuses_is_not_given_up(tmp_path: Path) -> None:
    coordinator = Coordinator()
    nonsense = httpx.Response(404, text="<html>nothing here</html>")
    with at_work(coordinator, tmp_path) as team:
        until(lambda: coordinator.count("heartbeat"), "a heartbeat")
        coordinator.always = dict.fromkeys(("heartbeat", "experiments", "known", "register"), nonsense)
        for number in range(5):
            team.member.report(decided(number))
        until(lambda: len([name for name, _ in coordinator.calls if name == "register"]) > 4, "attempts")
        coordinator.always = {}
        until(lambda: len(coordinator.taken) == 5, "all reports")
    assert coordinator.numbers() == list(range(5))
    assert not (tmp_path / "refused.jsonl").exists()


def test_a_report_that_only_the_coordinator_fails_at_is_sent_again_at_the_next_start(tmp_path: Path) -> None:
    coordinator = Coordinator()
    coordinator.script["experiments"] = [problem(500), problem(500)]
    bad = decided(0)
    with at_work(coordinator, tmp_path) as team:
        team.member.report(bad)
        team.member.report(decided(1))
        until(lambda: coordinator.numbers() == [1], "the one behind it")
        assert team.noted("#0 is sent again at the next start") == 1
    with at_work(coordinator, tmp_path, [bad]):
        until(lambda: bad.id in coordinator.stored, "the next start's report")


@pytest.mark.parametrize("fault", [GitError("its commit is gone"), ValueError("nan")])
def test_a_report_that_cannot_be_made_blocks_none(tmp_path: Path, fault: Exception) -> None:
    coordinator = Coordinator()

    def to_report(experiment: Experiment) -> ExperimentReport:
        if experiment.number == 0:
            raise fault
        return as_report(experiment)

    with at_work(coordinator, tmp_path, to_report=to_report) as team:
        team.member.report(decided(0))
        team.member.report(decided(1))
        until(lambda: coordinator.numbers() == [1], "the one behind it")
        assert team.noted("#0 cannot be reported now") == 1


# -- registration


@pytest.mark.parametrize("refusal", [problem(401), problem(409, wire.REGISTER)])
@pytest.mark.parametrize("call", ["heartbeat", "experiments", "known"])
def test_a_coordinator_that_does_not_know_us_is_told_who_we_are_and_all_we_know(
    tmp_path: Path, call: str, refusal: httpx.Response
) -> None:
    coordinator = Coordinator()
    history = [decided(number) for number in range(4)]
    coordinator.stored = {history[0].id: 3, history[1].id: 2}
    coordinator.script[call] = [refusal]
    with at_work(coordinator, tmp_path, history) as team:
        team.member.report(decided(4))
        until(lambda: coordinator.incarnation == 2, "a second registration")
        until(lambda: {1, 2, 3, 4} <= set(coordinator.numbers()), "what was missing")
        assert 0 not in coordinator.numbers()
    assert team.member.fault is None
    assert not team.notes


def test_a_worker_that_started_alone_joins_when_the_coordinator_is_there(tmp_path: Path) -> None:
    coordinator = Coordinator()
    coordinator.script["register"] = [AWAY, AWAY]
    with at_work(coordinator, tmp_path, [decided(0)], alone=True) as team:
        assert team.member.assignment() == Explore()
        until(lambda: coordinator.taken and coordinator.beats, "a report and heartbeats")
    assert coordinator.incarnation == 1


def test_a_refused_registration_is_said_once_and_tried_again(tmp_path: Path) -> None:
    coordinator = Coordinator()
    coordinator.always = {"register": problem(401), "heartbeat": problem(401)}
    with at_work(coordinator, tmp_path, alone=True) as team:
        until(lambda: coordinator.count("register") > 3, "attempts")
        assert team.notes == ["says 401"]
        coordinator.always.clear()
        until(lambda: coordinator.beats, "a heartbeat")


@pytest.mark.parametrize("kind", [wire.SUPERSEDED, wire.RETIRED])
@pytest.mark.parametrize("call", ["heartbeat", "experiments"])
def test_a_machine_that_was_taken_over_stops_and_does_not_take_itself_back(
    tmp_path: Path, call: str, kind: str
) -> None:
    coordinator = Coordinator()
    with at_work(coordinator, tmp_path) as team:
        until(lambda: coordinator.count("known"), "the start")
        coordinator.always[call] = problem(409, kind)
        team.member.report(decided(0))
        assert team.stop.wait(PATIENCE_S)
        until(lambda: not any(thread.name in THREADS for thread in threading.enumerate()), "the threads' end")
    assert team.member.fault == "says 409"
    assert coordinator.incarnation == 1
    assert team.member.assignment() == Explore()


def test_an_address_with_another_campaign_ends_the_worker(tmp_path: Path) -> None:
    coordinator = Coordinator()

    def register() -> wire.Registered:
        raise Refused("another campaign")

    with at_work(coordinator, tmp_path, register=register) as team:
        coordinator.always["heartbeat"] = problem(401)
        assert team.stop.wait(PATIENCE_S)
    assert team.member.fault == "another campaign"


def test_an_answer_to_an_earlier_registration_does_not_end_the_worker(tmp_path: Path) -> None:
    """A heartbeat that the coordinator answers after we registered anew hears that it was superseded: by ourselves."""
    coordinator = Coordinator()
    came, answer = threading.Event(), threading.Event()

    def late() -> httpx.Response:
        came.set()
        assert answer.wait(PATIENCE_S)
        return problem(409, wire.SUPERSEDED)

    coordinator.script["heartbeat"] = [late]
    with at_work(coordinator, tmp_path) as team:
        assert came.wait(PATIENCE_S)
        coordinator.script["experiments"] = [problem(409, wire.REGISTER)]
        team.member.report(decided(0))
        until(lambda: coordinator.taken, "the report, after a registration")
        answer.set()
        until(lambda: coordinator.beats, "a heartbeat")
        assert not team.stop.is_set()
    assert coordinator.incarnation == 2


# -- another start of the coordinator


def test_after_the_coordinators_restart_only_what_it_lacks_is_sent_again(tmp_path: Path) -> None:
    coordinator = Coordinator()
    experiments = [decided(number) for number in range(6)]
    with at_work(coordinator, tmp_path, experiments[:2]) as team:
        for experiment in experiments[2:]:
            team.member.report(experiment)
        until(lambda: len(coordinator.taken) == 6, "all reports")
        coordinator.taken.clear()
        del coordinator.stored[experiments[1].id]
        coordinator.stored[experiments[4].id] -= 1
        coordinator.epoch = "second"
        until(lambda: len(coordinator.taken) == 2, "what it lacks")
        assert coordinator.numbers() == [1, 4]
        beats = len(coordinator.beats)
        until(lambda: len(coordinator.beats) > beats + 3, "more heartbeats")
        assert coordinator.count("known") == 2


def test_a_restart_between_what_it_knows_and_our_reading_it_is_not_missed(tmp_path: Path) -> None:
    coordinator = Coordinator()
    mine = decided(0)

    def known() -> httpx.Response:
        answer = httpx.Response(200, json={mine.id: 3})
        coordinator.epoch = "second"  # it is restored from a backup that lacks what it has just said
        beats = len(coordinator.beats)
        until(lambda: len(coordinator.beats) > beats + 2, "heartbeats with the new epoch")
        return answer

    coordinator.script["known"] = [known]
    with at_work(coordinator, tmp_path, [mine]):
        until(lambda: mine.id in coordinator.stored, "what the backup lacks")


# -- neither side waits for the other


def test_a_hanging_heartbeat_does_not_hold_up_reports(tmp_path: Path) -> None:
    coordinator = Coordinator()
    release = threading.Event()
    coordinator.script["heartbeat"] = [hanging(release)]
    with at_work(coordinator, tmp_path) as team:
        until(lambda: coordinator.count("heartbeat"), "the heartbeat")
        team.member.report(decided(0))
        until(lambda: coordinator.taken, "the report")
        assert not coordinator.beats
        release.set()


def test_a_hanging_report_does_not_hold_up_heartbeats(tmp_path: Path) -> None:
    coordinator = Coordinator()
    release = threading.Event()
    coordinator.script["experiments"] = [hanging(release)]
    with at_work(coordinator, tmp_path) as team:
        team.member.report(decided(0))
        until(lambda: coordinator.count("experiments"), "the report")
        beats = len(coordinator.beats)
        until(lambda: len(coordinator.beats) > beats + 3, "heartbeats")
        assert coordinator.beats[-1]["activity"]["outbox"] == 1
        release.set()
        until(lambda: coordinator.taken, "the report")


def test_answers_that_are_none_kill_no_thread(tmp_path: Path) -> None:
    coordinator = Coordinator()
    coordinator.script = {name: [httpx.Response(200, json=[1])] * 2 for name in ("heartbeat", "known", "experiments")}
    coordinator.script["register"] = [httpx.Response(200, json={}), OSError("disk full")]
    with at_work(coordinator, tmp_path, [decided(0)], alone=True):
        until(lambda: coordinator.taken and coordinator.beats, "report and heartbeats")


# -- assignments and leases


def leased(kind: str = "confirm", attempt: int = 1) -> dict[str, Any]:
    return {
        "kind": kind,
        "lease": {"id": "00000000-0000-0000-0000-000000000001", "attempt": attempt},
        "ttl_s": 30,
        "experiment": str(uuid4()),
    }


def test_the_lease_that_is_held_is_named_until_its_report(tmp_path: Path) -> None:
    coordinator = Coordinator()
    with at_work(coordinator, tmp_path) as team:
        coordinator.assignment = leased()
        given = team.member.assignment()
        assert isinstance(given, Confirm)
        until(lambda: coordinator.beats and coordinator.beats[-1]["leases"], "a heartbeat with it")
        assert coordinator.beats[-1]["leases"] == [coordinator.assignment["lease"]]
        team.member.report(decided(0, lease=coordinator.assignment["lease"]))
        until(lambda: not coordinator.beats[-1]["leases"], "a heartbeat without it")


def test_a_lost_lease_is_named_no_more(tmp_path: Path) -> None:
    coordinator = Coordinator()
    with at_work(coordinator, tmp_path) as team:
        coordinator.assignment = leased()
        team.member.assignment()
        until(lambda: coordinator.beats and coordinator.beats[-1]["leases"], "a heartbeat with it")
        coordinator.lost = [coordinator.assignment["lease"]["id"]]
        until(lambda: not coordinator.beats[-1]["leases"], "a heartbeat without it")
        team.member.report(decided(0, lease=coordinator.assignment["lease"]))
        until(lambda: coordinator.taken, "the late report")


def test_a_loss_that_is_heard_late_does_not_drop_the_next_attempt(tmp_path: Path) -> None:
    coordinator = Coordinator()
    with at_work(coordinator, tmp_path) as team:
        coordinator.assignment = leased()
        team.member.assignment()
        came, answer = threading.Event(), threading.Event()

        def late() -> httpx.Response:
            came.set()
            assert answer.wait(PATIENCE_S)
            return httpx.Response(
                200, json={"next_s": 0.02, "epoch": "first", "lost": [coordinator.assignment["lease"]["id"]]}
            )

        coordinator.script["heartbeat"] = [late]
        assert came.wait(PATIENCE_S)
        coordinator.assignment = leased(attempt=2)
        team.member.assignment()
        beats = len(coordinator.beats)
        answer.set()
        until(lambda: len(coordinator.beats) > beats, "the next heartbeat")
        assert coordinator.beats[-1]["leases"] == [coordinator.assignment["lease"]]


def test_a_lease_in_work_is_given_back_by_a_worker_that_stops(tmp_path: Path) -> None:
    coordinator = Coordinator()
    with at_work(coordinator, tmp_path) as team:
        coordinator.assignment = leased()
        team.member.assignment()
    assert coordinator.count("leases") == 1


@pytest.mark.parametrize("kind", ["juggle", 7, None])
def test_an_assignment_of_an_unknown_kind_means_explore(tmp_path: Path, kind: Any) -> None:
    coordinator = Coordinator()
    with at_work(coordinator, tmp_path) as team:
        coordinator.assignment = leased(kind)
        assert team.member.assignment() == Explore()
        until(lambda: coordinator.beats, "a heartbeat")
        assert not coordinator.beats[-1]["leases"]


def test_a_paused_machine_is_told_to_wait(tmp_path: Path) -> None:
    coordinator = Coordinator()
    with at_work(coordinator, tmp_path) as team:
        coordinator.assignment = {"kind": "explore", "wait_s": 30.0}
        assert team.member.assignment() == Explore(wait_s=30.0)


@pytest.mark.parametrize("answer", [problem(409), problem(500), httpx.Response(200, text="<html>"), AWAY])
def test_no_answer_to_an_assignment_means_explore(tmp_path: Path, answer: Answer) -> None:
    coordinator = Coordinator()
    coordinator.always["assignment"] = answer
    with at_work(coordinator, tmp_path) as team:
        assert team.member.assignment() == Explore()


def test_a_hanging_coordinator_is_waited_for_once_and_2_seconds(tmp_path: Path) -> None:
    coordinator = Coordinator()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hanging = CoordinatorClient(f"http://127.0.0.1:{silent.getsockname()[1]}")
        notes: list[str] = []
        member = Member(
            hanging,
            coordinator.register,
            coordinator.register(),
            Remote(Repo(tmp_path), URL, "b", "a", lambda: None),
            Outbox(tmp_path / "refused"),
            as_report,
            notes.append,
            threading.Event(),
        )
        before = time.monotonic()
        assert member.assignment() == Explore()
        between = time.monotonic()
        assert 1.9 < between - before < 3.0
        for _ in range(100):
            assert member.assignment() == Explore()
        assert time.monotonic() - between < 0.1
    assert len(notes) == 1


# -- the end


def test_what_waits_is_sent_before_the_end(tmp_path: Path) -> None:
    coordinator = Coordinator()
    release = threading.Event()
    coordinator.script["known"] = [hanging(release)]
    with at_work(coordinator, tmp_path) as team:
        for number in range(20):
            team.member.report(decided(number))
        threading.Timer(0.1, release.set).start()
    assert coordinator.numbers() == list(range(20))


def test_the_last_heartbeat_says_that_it_stops(tmp_path: Path) -> None:
    coordinator = Coordinator()
    with at_work(coordinator, tmp_path) as team:
        until(lambda: coordinator.beats, "a heartbeat")
        team.member.doing(Activity(state="running"))
    assert coordinator.beats[-1]["activity"]["state"] == "stopping"


def test_the_last_heartbeat_of_a_failed_worker_says_why(tmp_path: Path) -> None:
    coordinator = Coordinator()
    with at_work(coordinator, tmp_path) as team:
        team.member.doing(Activity(state="failed", note="the baseline gave no score"))
    assert coordinator.beats[-1]["activity"]["state"] == "failed"
    assert coordinator.beats[-1]["activity"]["note"] == "the baseline gave no score"


def test_ending_while_the_coordinator_is_away_does_not_wait_for_it(tmp_path: Path) -> None:
    coordinator = Coordinator()
    with at_work(coordinator, tmp_path) as team:
        until(lambda: coordinator.beats, "a heartbeat")
        coordinator.always = dict.fromkeys(("heartbeat", "experiments", "known", "register"), AWAY)
        team.member.report(decided(0))
        until(lambda: team.noted("going on alone"), "its absence")
        before = time.monotonic()
        team.member.close()
        assert time.monotonic() - before < 1.0
    assert len(team.outbox) == 1


def test_ending_in_the_middle_of_a_long_wait_tries_once_more(tmp_path: Path) -> None:
    coordinator = Coordinator()
    coordinator.script["experiments"] = [problem(503, retry=True, after=600)]
    with at_work(coordinator, tmp_path) as team:
        team.member.report(decided(0))
        until(lambda: team.noted("going on alone"), "the wait")
    assert coordinator.numbers() == [0]


@pytest.mark.parametrize("call", ["experiments", "register", "heartbeat"])
def test_ending_waits_for_no_call_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(members, "FLUSH_S", 0.5)
    coordinator = Coordinator()
    release = threading.Event()
    coordinator.always[call] = hanging(release)
    with at_work(coordinator, tmp_path, alone=call == "register") as team:
        team.member.report(decided(0))
        until(lambda: coordinator.count(call), "the call that hangs")
        before = time.monotonic()
        team.member.close()
        assert time.monotonic() - before < 1.0
        release.set()  # what it then brings must raise in no thread


# -- branch and attic


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[tuple[Repo, Path]]:
    """A campaign's clone, and the hub as a plain bare repository."""
    fast_task.make(tmp_path / "clone")
    fast_task.git(tmp_path, "init", "--quiet", "--bare", "hub")
    fast_task.git(tmp_path / "clone", "update-ref", "refs/attic/mac", "HEAD")
    yield Repo(tmp_path / "clone"), tmp_path / "hub"


def refs(hub: Path) -> dict[str, str]:
    lines = fast_task.git(hub, "for-each-ref", "--format=%(refname) %(objectname)").splitlines()
    return dict(line.split() for line in lines)


def test_branch_and_attic_are_pushed_on_a_keep_and_every_16_attempts(tmp_path: Path, clone: tuple[Repo, Path]) -> None:
    coordinator = Coordinator()
    repo, hub = clone
    kept: list[str] = []
    remote = Remote(repo, str(hub), "refs/heads/b", "refs/attic/mac", lambda: kept[-1] if kept else None)
    with at_work(coordinator, tmp_path, remote=remote) as team:
        team.member.report(decided(0))
        until(lambda: coordinator.taken, "the first report")
        assert not refs(hub), "before a baseline nothing is on the hub"
        kept.append(repo.head())
        team.member.report(decided(1, kept=repo.head()))
        until(lambda: refs(hub) == {"refs/heads/b": repo.head(), "refs/attic/mac": repo.head()}, "the push")
        repo.link("refs/attic/mac", repo.head(), [repo.head()], "an attempt")
        for number in range(members.PUSH_EVERY - 1):
            team.member.report(decided(2 + number))
        until(lambda: len(team.outbox) == 0, "the reports")
        before = refs(hub)
        team.member.report(decided(99))
        until(lambda: refs(hub) != before, "the push of attempts")
        assert refs(hub)["refs/heads/b"] == repo.head()
        assert before["refs/attic/mac"] == repo.head()


def test_the_last_push_is_made_at_the_end(tmp_path: Path, clone: tuple[Repo, Path]) -> None:
    coordinator = Coordinator()
    repo, hub = clone
    remote = Remote(repo, str(hub), "refs/heads/b", "refs/attic/mac", repo.head)
    with at_work(coordinator, tmp_path, remote=remote) as team:
        until(lambda: refs(hub), "the first push")
        attic = repo.link("refs/attic/mac", repo.head(), [repo.head()], "an attempt")
        team.member.report(decided(0))
    assert refs(hub)["refs/attic/mac"] == attic


def test_a_push_that_fails_is_tried_again_and_holds_up_neither_reports_nor_assignments(
    tmp_path: Path, clone: tuple[Repo, Path]
) -> None:
    coordinator = Coordinator()
    repo, hub = clone
    hub.rename(tmp_path / "elsewhere")
    remote = Remote(repo, str(hub), "refs/heads/b", "refs/attic/mac", repo.head)
    with at_work(coordinator, tmp_path, remote=remote) as team:
        until(lambda: team.notes, "the failure")
        coordinator.assignment = {"kind": "explore", "wait_s": 1.0}
        for number in range(3):
            team.member.report(decided(number))
            assert team.member.assignment() == Explore(wait_s=1.0)
        until(lambda: len(coordinator.taken) == 3, "the reports")
        (tmp_path / "elsewhere").rename(hub)
        until(lambda: refs(hub), "the push")
        until(lambda: team.noted("is back"), "a word")
        assert len(team.notes) == 2


def test_a_refused_push_is_said_and_not_repeated_until_there_is_more(tmp_path: Path, clone: tuple[Repo, Path]) -> None:
    coordinator = Coordinator()
    repo, hub = clone
    hook = hub / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho 'swarm hub: not yours' >&2\nexit 1\n")
    hook.chmod(0o755)
    remote = Remote(repo, str(hub), "refs/heads/b", "refs/attic/mac", repo.head)
    with at_work(coordinator, tmp_path, remote=remote) as team:
        until(lambda: team.noted("the hub refuses a push"), "the refusal")
        for number in range(3):
            team.member.report(decided(number))
        until(lambda: len(coordinator.taken) == 3, "the reports")
        assert len(team.notes) == 1
        hook.unlink()
        team.member.report(decided(3, kept=repo.head()))
        until(lambda: refs(hub), "the push of the next keep")


def test_ending_does_not_wait_for_a_push_that_hangs(
    tmp_path: Path, clone: tuple[Repo, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "FLUSH_S", 1.0)
    coordinator = Coordinator()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/git/c.git"
        with at_work(coordinator, tmp_path, remote=Remote(clone[0], url, "b", "a", clone[0].head)) as team:
            connection, _ = silent.accept()  # git is there, and hears nothing
            before = time.monotonic()
            team.member.close()
            assert time.monotonic() - before < 2.0
            connection.close()
            silent.close()


def test_a_member_that_never_started_closes(tmp_path: Path) -> None:
    coordinator = Coordinator()
    made = Member(
        coordinator.client,
        coordinator.register,
        None,
        Remote(Repo(tmp_path), URL, "b", "a", lambda: None),
        Outbox(tmp_path / "refused"),
        as_report,
        lambda text: None,
        threading.Event(),
    )
    made.close()
    made.give_back(LeaseRef(id=uuid4(), attempt=1), "not mine")
    assert issubclass(Away, Exception)
