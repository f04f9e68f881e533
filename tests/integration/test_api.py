"""The API as machines, people and odd clients meet it; over real HTTP where the server's own part matters."""

from __future__ import annotations

import hashlib
import io
import json
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import event
from starlette.testclient import TestClient

from coordinator.app import create_app
from coordinator.reaper import transitions
from coordinator.service import VERSION, Files, Service
from coordinator.settings import Limits
from shared import wire
from shared.client import Away, CoordinatorClient, Rejected
from shared.wire import API, INCARNATION, Kind, MachineState, Role, Status, TokenOrder
from tests.hosting import LOCAL, hosted, http, listening, registration, report, talking, until

UNKNOWN = uuid.UUID(int=7)
PROBLEM = "application/problem+json"
BOUNDARY = 2 * 1024 * 1024  #: of a request


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with hosted(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """For calls that are refused and leave nothing."""
    with hosted(tmp_path_factory.mktemp("lasting")) as made:
        yield made


def told(answer: Any, status: int) -> wire.Problem:
    """The problem that an answer is; every error has this shape, and one line for people."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM
    problem = wire.Problem.model_validate(answer.json())
    assert problem.status == status
    assert problem.title
    assert problem.detail
    assert "\n" not in problem.detail
    assert ("Retry-After" in answer.headers) == problem.retry
    return problem


def token(service: Service, role: Role) -> str:
    return service.tokens.make(TokenOrder.model_validate({"role": role})).token


def member(service: Service, http: TestClient, name: str = "m1", uid: uuid.UUID | None = None) -> CoordinatorClient:
    """A machine that has registered, without a token of its own."""
    client = CoordinatorClient(LOCAL, http=http)
    client.register(registration(name, **({"uid": uid} if uid else {})))
    return client


def admin(http: TestClient) -> CoordinatorClient:
    """Anyone, while there is no token."""
    return CoordinatorClient(LOCAL, http=http)


def raw(client: CoordinatorClient) -> dict[str, str]:
    """The headers of a machine's calls, for bodies that the client would not send."""
    return {"Authorization": f"Bearer {client.token}", INCARNATION: str(client.incarnation)}


# -- registration


def test_a_machine_registers_and_learns_all_it_needs(service: Service) -> None:
    with talking(service) as client:
        answer = client.register(registration("mac"))
        study = service.store.study
        assert (answer.machine, answer.branch, answer.attic) == (
            "mac",
            "refs/heads/autoresearch/t-mac",
            "refs/attic/mac",
        )
        assert (answer.incarnation, answer.version, answer.epoch) == (1, VERSION, service.epoch)
        assert answer.campaign == client.campaign()
        assert (answer.campaign.base, answer.campaign.repository) == (study.base, "/git/fast.git")
        assert client.token == answer.token
        [view] = client.machines()
        assert (view.name, view.state, view.branch) == ("mac", MachineState.ONLINE, "autoresearch/t-mac")
        assert view.seen_s is not None
        client.token = None
        assert client.register(registration("mac")).machine == "mac-2"  # another uid is another machine


@pytest.mark.parametrize(("protocol", "older"), [(wire.PROTOCOL + 1, "coordinator"), (wire.PROTOCOL - 1, "worker")])
def test_another_protocol_says_which_side_to_upgrade(service: Service, protocol: int, older: str) -> None:
    with http(service) as client:
        body = registration().model_dump(mode="json") | {"protocol": protocol, "version": "9.9"}
        problem = told(client.post(f"{API}/machines", json=body), 409)
    assert problem.detail.endswith(f"upgrade the {older}")
    assert "9.9" in problem.detail
    assert VERSION in problem.detail
    assert service.store.members.all() == []


def test_registering_again(service: Service) -> None:
    join = token(service, Role.JOIN)
    uid = uuid.uuid4()
    with http(service) as inner:
        client = CoordinatorClient(LOCAL, join, http=inner)
        first = client.register(registration("mac", uid=uid))
        assert first.token is not None
        again = client.register(registration("other-name", uid=uid))  # with its own token
        assert (again.machine, again.incarnation, again.token) == ("mac", 2, None)
        assert client.token == first.token
        joined = CoordinatorClient(LOCAL, join, http=inner)
        third = joined.register(registration("mac", uid=uid))  # with a join token: its own was lost
        assert (third.machine, third.incarnation) == ("mac", 3)
        assert third.token not in (None, first.token)
        with pytest.raises(Rejected) as refused:
            client.heartbeat(wire.Heartbeat())
        assert refused.value.status == 401  # the lost one is worth nothing now
        stranger = CoordinatorClient(LOCAL, joined.token, http=inner)
        with pytest.raises(Rejected, match="bound to another machine") as refused:
            stranger.register(registration("third"))
        assert refused.value.status == 403
        assert [m.name for m in service.store.members.all()] == ["mac"]


def test_a_machine_that_a_person_took_out_is_told_so_whatever_it_comes_with(service: Service) -> None:
    join = token(service, Role.JOIN)
    with http(service) as inner:
        person = CoordinatorClient(LOCAL, token(service, Role.ADMIN), http=inner)
        client, uid = CoordinatorClient(LOCAL, join, http=inner), uuid.uuid4()
        client.register(registration("mac", uid=uid))
        person.retire("mac")
        for call in (lambda: client.heartbeat(wire.Heartbeat()), lambda: client.register(registration(uid=uid))):
            with pytest.raises(Rejected, match="mac was retired") as refused:
                call()
            assert refused.value.kind == wire.RETIRED
        with pytest.raises(Rejected, match="mac was retired"):
            CoordinatorClient(LOCAL, join, http=inner).register(registration("mac", uid=uid))


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "no such name!"), ("name", "x" * 64), ("name", ""), ("machine_class", "A B"), ("uid", 3), ("can", "x")],
)
def test_a_registration_that_is_none(lasting: Service, field: str, value: object) -> None:
    with http(lasting) as client:
        body = registration().model_dump(mode="json") | {field: value}
        assert f"body.{field}" in told(client.post(f"{API}/machines", json=body), 422).detail


# -- a machine's calls


def test_incarnations(service: Service) -> None:
    uid = uuid.uuid4()
    with http(service) as inner:
        older = member(service, inner, "m1", uid)
        newer = CoordinatorClient(LOCAL, older.token, http=inner)
        newer.register(registration("m1", uid=uid))
        assert newer.heartbeat(wire.Heartbeat()).lost == ()
        path = f"{API}/machines/self/heartbeat"
        for incarnation, kind in ((1, wire.SUPERSEDED), (3, wire.REGISTER), (None, wire.REGISTER)):
            headers = {"Authorization": f"Bearer {older.token}"}
            headers |= {INCARNATION: str(incarnation)} if incarnation else {}
            assert told(inner.post(path, json={}, headers=headers), 409).type == kind
        headers = {"Authorization": f"Bearer {older.token}", INCARNATION: "one"}
        assert "swarm-incarnation" in told(inner.post(path, json={}, headers=headers), 422).detail.lower()
        for call in (older.assignment, older.known, lambda: older.report(uuid.uuid4(), report())):
            with pytest.raises(Rejected) as refused:
                call()
            assert (refused.value.status, refused.value.kind) == (409, wire.SUPERSEDED)
        assert service.store.look.totals() == (0, 0)


def test_its_own_name_and_self_are_the_same_and_another_machines_is_not(service: Service) -> None:
    with http(service) as inner:
        one = member(service, inner, "m1")
        member(service, inner, "m2")
        for name in ("self", "m1"):
            assert inner.get(f"{API}/machines/{name}/known", headers=raw(one)).json() == {}
        problem = told(inner.get(f"{API}/machines/m2/known", headers=raw(one)), 403)
        assert problem.detail == "this token is m1's, not m2's"


def test_heartbeats(tmp_path: Path) -> None:
    with hosted(tmp_path, heartbeat_s=7.0) as service, http(service) as inner:
        client = member(service, inner)
        activity = wire.Activity(state="running", number=12, loss=3.2, share=0.5)
        reply = client.heartbeat(wire.Heartbeat(activity=activity))
        assert (reply.next_s, reply.epoch, reply.lost, reply.pause) == (7.0, service.epoch, (), False)
        [view] = client.machines()
        assert view.activity == activity
        unknown = wire.LeaseRef(id=uuid.uuid4(), attempt=1)
        assert client.heartbeat(wire.Heartbeat(leases=(unknown,))).lost == (unknown.id,)
        admin(inner).change("m1", wire.MachineChange(paused=True))
        assert client.heartbeat(wire.Heartbeat()).pause is True
        paused = client.assignment()
        assert isinstance(paused, wire.Explore)
        assert paused.wait_s > 0
        admin(inner).change("m1", wire.MachineChange(paused=False))
        assert client.heartbeat(wire.Heartbeat()).pause is False
        assert client.assignment() == wire.Explore()


def test_a_heartbeat_writes_nothing_until_it_brings_a_machine_back(service: Service) -> None:
    with http(service) as inner:
        client = member(service, inner)
        before = service.store.writer.last_event
        for _ in range(5):
            client.heartbeat(wire.Heartbeat())
        assert service.store.writer.last_event == before
        service.store.set_state(service.store.members.named("m1"), MachineState.OFFLINE)
        service.presence.left(service.store.members.named("m1").id)
        assert [m.state for m in client.machines()] == [MachineState.OFFLINE]
        client.heartbeat(wire.Heartbeat())
        [view] = client.machines()
        assert view.state is MachineState.ONLINE
        assert view.seen_s is not None
        transitions(service)
        assert [event.kind for event in service.store.look.events(before, 10)] == ["offline", "online"]


def test_an_assignment_is_given_held_given_back_and_closed(service: Service) -> None:
    with http(service) as inner:
        client = CoordinatorClient(LOCAL, http=inner)
        client.register(registration("m1", can=("explore", "confirm")))
        about, order = uuid.uuid4(), Kind.CONFIRM
        client.report(about, report(0))
        lease = admin(inner).queue(wire.LeaseOrder(kind=order, experiment=about))
        given = client.assignment()
        assert isinstance(given, wire.Confirm)
        assert (given.experiment, given.lease) == (about, wire.LeaseRef(id=lease, attempt=1))
        assert given.ttl_s > 0
        assert client.heartbeat(wire.Heartbeat(leases=(given.lease,))).lost == ()
        assert client.assignment() == wire.Explore()  # it has it already
        client.give_back(given.lease)
        client.give_back(given.lease)  # the answer may have been lost
        assert [(view.state, view.machine) for view in client.leases()] == [("queued", "m1")]
        second = client.assignment()
        assert isinstance(second, wire.Confirm)
        assert second.lease.attempt == 2
        client.give_back(given.lease)  # of the attempt before: it is not this one
        assert client.leases()[0].state == "granted"
        late = client.report(uuid.uuid4(), report(1, lease=given.lease))
        assert (late.stored, late.closed) == (True, False)
        assert client.report(uuid.uuid4(), report(2, lease=second.lease)).closed is True
        assert client.heartbeat(wire.Heartbeat(leases=(second.lease,))).lost == (second.lease.id,)
        assert client.leases()[0].state == "done"
        with pytest.raises(Rejected, match="it is done"):
            admin(inner).cancel(lease)
        admin(inner).cancel(admin(inner).queue(wire.LeaseOrder(kind=order, experiment=about)))
        assert client.leases()[0].state == "cancelled"


# -- reports


def test_a_report_twice_is_stored_once_and_a_later_version_replaces_it(service: Service) -> None:
    with http(service) as inner:
        client, name, first = member(service, inner), uuid.uuid4(), report(1)
        assert client.report(name, first).stored is True
        before = service.store.writer.last_event
        assert client.report(name, first).stored is False
        assert service.store.writer.last_event == before
        later = first.model_copy(update={"version": 2, "reason": "looked at again"})
        assert client.report(name, later).stored is True
        assert client.report(name, first).stored is False
        view = client.experiment(str(name))
        assert (view.reason, view.number, view.run_reports[0].score) == ("looked at again", 1, 1.5)
        assert client.diff(str(name)) == first.diff
        assert client.known() == {name: 2}
        other = member(service, inner, "m2")
        with pytest.raises(Rejected, match="belongs to another machine") as refused:
            other.report(name, first)
        assert refused.value.status == 409


@pytest.mark.parametrize(
    ("field", "most", "words"), [("diff", wire.MAX_DIFF_BYTES, "diff"), ("log_tail", wire.MAX_LOG_BYTES, "log tail")]
)
def test_text_that_is_too_long(service: Service, field: str, most: int, words: str) -> None:
    with http(service) as inner:
        client = member(service, inner)
        path = f"{API}/machines/self/experiments/{uuid.uuid4()}"
        body = report().model_dump(mode="json")
        wide = "é" * (most // 2)  # bytes count, not characters
        assert inner.put(path, json=body | {field: wide}, headers=raw(client)).json()["stored"] is True
        problem = told(inner.put(path, json=body | {field: wide + "x", "version": 2}, headers=raw(client)), 413)
        assert problem.detail == f"the {words} has {most + 1} bytes, {most} is the most"
        assert client.known() == {uuid.UUID(path.rpartition("/")[2]): 1}


def test_a_body_that_is_too_long_with_and_without_its_length(service: Service) -> None:
    with listening(service) as url, httpx.Client(base_url=url) as inner:
        client = member(service, inner)  # type: ignore[arg-type]
        path = f"{API}/machines/self/experiments/{uuid.uuid4()}"
        headers = raw(client) | {"Content-Type": "application/json"}
        body = json.dumps(report().model_dump(mode="json") | {"more": "x" * BOUNDARY}).encode()

        def pieces() -> Iterator[bytes]:
            for start in range(0, len(body), 65536):
                yield body[start : start + 65536]

        for content in (body, pieces()):
            problem = told(inner.put(path, content=content, headers=headers), 413)
            assert str(BOUNDARY) in problem.detail
        assert client.known() == {}
        assert client.report(uuid.uuid4(), report()).stored  # and the next one, on the same connection, is taken
        fits = json.dumps(report(2).model_dump(mode="json") | {"more": "x" * (BOUNDARY - 5000)}).encode()
        assert inner.put(path, content=iter([fits]), headers=headers).json()["stored"] is True


ODD: dict[str, Any] = {
    "no JSON": b"{",
    "empty": b"",
    "a list": b"[]",
    "a word": b'"x"',
    "null": b"null",
    "not UTF-8": b'{"version": "\xff"}',
    "900 levels": b'{"edits":' + b'{"a":' * 900 + b"1" + b"}" * 901,
    "100,000 levels": b"[" * 100_000,
    "40 levels of edits": {"edits": json.loads("[" * 40 + "]" * 40)},
    "edits 40 deep": {"edits": {"a": json.loads("[" * 40 + "]" * 40)}},
    "NaN score": {"runs": [{"id": str(uuid.uuid4()), "seed": 1, "score": float("nan")}]},
    "infinite seconds": {"runs": [{"id": str(uuid.uuid4()), "seed": 1, "score": 1.0, "seconds": float("inf")}]},
    "NaN metric": {"runs": [{"id": str(uuid.uuid4()), "seed": 1, "score": 1.0, "metrics": {"x": float("nan")}}]},
    "NaN edit": {"edits": {"LR": float("nan")}},
    "infinite parameter": {"params": {"LR": [1, {"x": float("inf")}]}},
    "half a character in edits": {"edits": {"x": "\ud800"}},
    "half a character in their names": {"params": {"\udfff": 1}},
    "half a character": {"description": "\ud800"},
    "half a character in the diff": {"diff": "\ud800"},
    "half a character in the log": {"log_tail": "\ud800"},
    "half a character in a metric's name": {
        "runs": [{"id": str(uuid.uuid4()), "seed": 1, "score": 1.0, "metrics": {"\ud800": 1.0}}]
    },
    "a long seed": {"runs": [{"id": str(uuid.uuid4()), "seed": 2**64, "score": 1.0}]},
    "a long number": {"number": 2**63},
    "a long version": {"version": 2**63},
    "a long time": {"decided_at": -(2**70)},
    "many nodes": {"nodes_added": 10**30},
    "a negative number": {"number": -1},
    "version 0": {"version": 0},
    "an unknown status": {"status": "splendid"},
    "a void run": {"status": "void"},
    "a keep without a score": {"runs": []},
    "a score that bits per byte cannot have": {"runs": [{"id": str(uuid.uuid4()), "seed": 1, "score": -1.0}]},
    "no commit": {"tested": "HEAD"},
    "a long description": {"description": "x" * 2001},
}


@pytest.mark.parametrize("what", ODD)
def test_a_report_that_is_none_is_refused_and_leaves_nothing(lasting: Service, what: str) -> None:
    odd = ODD[what]
    body = odd if isinstance(odd, bytes) else json.dumps(report().model_dump(mode="json") | odd).encode()
    with http(lasting) as inner:
        client = member(lasting, inner)
        before = lasting.store.writer.last_event
        path = f"{API}/machines/self/experiments/{uuid.uuid4()}"
        headers = raw(client) | {"Content-Type": "application/json"}
        answer = inner.put(path, content=body, headers=headers)
        told(answer, answer.status_code)
        assert answer.status_code in (400, 422)
        assert client.known() == {}
        assert lasting.store.writer.last_event == before
        assert client.report(uuid.uuid4(), report()).stored


def test_a_body_that_does_not_say_it_is_json_is_refused(service: Service) -> None:
    """A page elsewhere may post text without asking; JSON it may not."""
    with http(service) as inner:
        for media in ("text/plain", "application/x-www-form-urlencoded", ""):
            headers = {"Content-Type": media} if media else {}
            told(inner.post(f"{API}/tokens", content=b'{"role": "admin"}', headers=headers), 422)
        assert service.tokens.all() == []


def test_fields_of_a_newer_worker_are_ignored(service: Service) -> None:
    with http(service) as inner:
        body = registration().model_dump(mode="json") | {"colour": "red", "hardware": {"host": "h", "fans": 3}}
        made = inner.post(f"{API}/machines", json=body)
        assert made.status_code == 201
        client = CoordinatorClient(LOCAL, made.json()["token"], http=inner)
        client.incarnation = 1
        odd = report().model_dump(mode="json") | {"mood": "good"}
        odd["runs"][0]["weather"] = "fine"
        path = f"{API}/machines/self/experiments/{uuid.uuid4()}"
        assert inner.put(path, json=odd, headers=raw(client)).json()["stored"] is True
        assert inner.post(f"{API}/machines/self/heartbeat", json={"x": 1}, headers=raw(client)).status_code == 200


def test_what_one_body_says_breaks_no_list(service: Service) -> None:
    """Half a character in a machine's hardware would make every answer that names it fail."""
    with http(service) as inner:
        client = member(service, inner)
        client.report(about := uuid.uuid4(), report())
        machine = registration("odd").model_dump(mode="json") | {"hardware": {"os": "\ud800"}}
        order = {"kind": "replay", "experiment": str(about), "rung": "\ud800"}
        headers = {"Content-Type": "application/json"}
        for path, body in (("machines", machine), ("import/machines", machine), ("leases", order)):
            told(inner.post(f"{API}/{path}", content=json.dumps(body), headers=headers), 422)
        assert [m.name for m in client.machines()] == ["m1"]
        assert client.leases() == []


# -- looking


def test_the_leaderboard_in_the_form_that_is_asked_for(service: Service) -> None:
    with http(service) as inner:
        client = member(service, inner)
        client.report(uuid.uuid4(), report(0, 1.6))
        client.report(uuid.uuid4(), report(1, 1.5, description="tab\there"))
        board = inner.get(f"{API}/leaderboard", headers={"Accept": "*/*"})
        assert board.headers["content-type"] == "application/json"
        assert board.headers["vary"] == "Accept"
        [standing] = wire.Leaderboard.model_validate_json(board.content).standings
        assert (standing.machine, standing.best, standing.baseline) == ("m1", 1.5, 1.6)
        tsv = inner.get(f"{API}/leaderboard", headers={"Accept": "text/tab-separated-values"})
        assert tsv.headers["content-type"] == "text/tab-separated-values; charset=utf-8"
        assert tsv.headers["vary"] == "Accept"
        names, values = (line.split("\t") for line in tsv.text.splitlines())
        row = dict(zip(names, values, strict=True))
        assert (row["machine"], row["best"], row["description"]) == ("m1", "1.500000", "tab here")
        accept = "application/json;q=0.5, text/plain;q=0.9"
        text = inner.get(f"{API}/leaderboard", headers={"Accept": accept})
        assert text.headers["content-type"] == "text/plain; charset=utf-8"
        assert text.text.splitlines()[0].split()[:3] == ["#", "machine", "class"]
        assert text.text.splitlines()[-1] == "fast: val_bpb, lower is better; best first within its class"
        assert client.leaderboard() == wire.Leaderboard.model_validate_json(board.content)


def test_pages(service: Service) -> None:
    with http(service) as inner:
        client = member(service, inner)
        for number in range(12):
            client.report(uuid.uuid4(), report(number, 2.0 - number / 100))
        for order in ("newest", "oldest"):
            found, after, pages = [], None, 0
            while True:
                page = client.experiments(order=order, after=after, limit=5)
                found += [row.number for row in page.experiments]
                pages += 1
                if (after := page.next) is None:
                    break
            assert found == (list(range(12)) if order == "oldest" else list(range(11, -1, -1)))
            assert pages == 3
        assert client.experiments(limit=12).next is None
        ideas = inner.get(f"{API}/ideas?limit=7").json()
        rest = inner.get(f"{API}/ideas", params={"limit": 7, "after": ideas["next"]}).json()
        assert len({idea["id"] for idea in ideas["ideas"] + rest["ideas"]}) == 12
        assert rest["next"] is None
        for number in range(6):
            other = member(service, inner, f"x{number}")
            other.report(uuid.uuid4(), report(0, 1.0 + number))
        first = client.leaderboard(limit=4)
        second = client.leaderboard(limit=4, after=first.next)
        assert [s.rank for s in first.standings + second.standings] == [1, 2, 3, 4, 5, 6, 7]
        assert second.next is None
        assert [s.machine for s in client.leaderboard(machine="x3").standings] == ["x3"]
        assert client.experiments(status="crash").experiments == ()


@pytest.mark.parametrize(
    "query",
    [
        "experiments?limit=0",
        "experiments?limit=1001",
        "experiments?after=x",
        f"experiments?after={2**63}",
        f"leaderboard?after={2**63}",
        f"ideas?after={2**63}",
        f"events?after={2**63}",
        "experiments?status=splendid",
        "experiments?idea=x",
        "experiments?order=random",
        "leaderboard?order=best",
        "export?format=csv",
        "leases?state=lost",
    ],
)
def test_a_question_that_is_none(lasting: Service, query: str) -> None:
    with http(lasting) as inner:
        assert told(inner.get(f"{API}/{query}"), 422).detail.startswith("query.")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", f"{API}/nothing", 404),
        ("GET", f"{API}/experiments/{UNKNOWN}", 404),
        ("GET", f"{API}/experiments/abcd", 404),
        ("GET", f"{API}/experiments/zz", 404),
        ("GET", f"{API}/experiments/abcd/diff", 404),
        ("POST", f"{API}/experiments/abcd/clear", 404),
        ("GET", f"{API}/experiments?machine=nobody", 404),
        ("GET", f"{API}/lineage/abcdef", 404),
        ("GET", f"{API}/data/nothing", 404),
        ("GET", f"{API}/data/../../etc/passwd", 404),
        ("PATCH", f"{API}/machines/nobody", 404),
        ("DELETE", f"{API}/machines/nobody", 404),
        ("DELETE", f"{API}/leases/{UNKNOWN}", 404),
        ("DELETE", f"{API}/leases/x", 422),
        ("DELETE", f"{API}/tokens/999999", 404),
        ("DELETE", f"{API}/tokens/{2**63}", 422),
        ("DELETE", f"{API}/tokens/x", 422),
        ("PUT", f"{API}/leaderboard", 405),
        ("DELETE", "/healthz", 405),
    ],
)
def test_what_is_not_there(lasting: Service, method: str, path: str, status: int) -> None:
    with http(lasting) as inner:
        answer = inner.request(method, path, **({"json": {}} if method == "PATCH" else {}))
        told(answer, status)
        assert status != 405 or answer.headers["allow"]


def test_an_export_is_read_by_pyarrow_and_as_tsv(service: Service) -> None:
    with http(service) as inner:
        client = member(service, inner)
        empty = pq.read_table(io.BytesIO(b"".join(client.export("parquet"))))
        assert empty.num_rows == 0
        names = [uuid.uuid4() for _ in range(3)]
        edits = {"LR": 0.03, "NAME": "ü"}
        client.report(names[0], report(0, 1.6, description="a\tb\nc", edits=edits))
        client.report(names[1], report(1, None, status=Status.CRASH, kept=None, diff=None))
        client.report(names[2], report(2, 1.4))
        table = pq.read_table(io.BytesIO(b"".join(client.export("parquet"))))
        rows = table.to_pylist()
        assert table.schema == empty.schema
        assert [row["id"] for row in rows] == [str(name) for name in names]
        assert [row["score"] for row in rows] == [1.6, None, 1.4]
        assert [row["diff"] is None for row in rows] == [False, True, False]
        assert json.loads(rows[0]["edits"]) == edits
        head, *lines = [line.split("\t") for line in b"".join(client.export("tsv")).decode().splitlines()]
        assert head == [name for name in table.schema.names if name != "diff"]
        assert len(lines) == 3
        first = dict(zip(head, lines[0], strict=True))
        assert (first["description"], first["score"]) == ("a b c", "1.6")
        assert dict(zip(head, lines[1], strict=True))["score"] == ""


# -- the API's own description


def test_every_example_of_the_description_is_true(tmp_path: Path) -> None:
    """Requests are sent and taken; answers fit their schema."""
    with hosted(tmp_path) as service, http(service) as inner:
        described = inner.get(f"{API}/openapi.json").json()
        client = member(service, inner, "first")
        about = {"name": "self", "experiment": str(uuid.uuid4())}
        sent = checked = 0
        for path, operations in described["paths"].items():
            for method, operation in operations.items():
                where = f"{method} {path}"
                media = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
                for example in examples(media, described):
                    headers = raw(client) if "{name}" in path else {}
                    answer = inner.request(method, path.format(**about), json=example, headers=headers)
                    assert answer.status_code in (200, 201), (where, answer.text)
                    sent += 1
                for status, described_answer in operation["responses"].items():
                    content = described_answer.get("content", {}).get("application/json", {})
                    for example in examples(content, described):
                        schema = content["schema"] | {"components": described["components"]}
                        jsonschema.Draft202012Validator(schema).validate(example)
                        assert status == "200", where
                        checked += 1
                assert "application/problem+json" in operation["responses"]["default"]["content"], where
                assert operation["tags"], where
        assert (sent, checked) == (3, 2)


def examples(media: dict[str, Any], described: dict[str, Any]) -> list[Any]:
    found = [media["example"]] if "example" in media else []
    found += [one["value"] for one in media.get("examples", {}).values()]
    schema = media.get("schema", {})
    if "$ref" in schema:
        found += described["components"]["schemas"][schema["$ref"].rpartition("/")[2]].get("examples", [])
    return found + schema.get("examples", [])


# -- storage


@contextmanager
def full(service: Service) -> Iterator[None]:
    """SQLite says that its disk is full, as a real one would: no page more than there are."""

    def limit(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA max_page_count=1")

    engine = service.store.engine
    event.listen(engine, "connect", limit)
    engine.dispose()  # each connection has its own limit
    try:
        yield
    finally:
        event.remove(engine, "connect", limit)
        engine.dispose()


def test_a_full_database_is_told_and_reports_wait(service: Service) -> None:
    with http(service) as inner:
        client = member(service, inner)
        health = inner.get("/healthz")
        assert health.json() == {"status": "ok", "version": VERSION, "campaign": "fast"}
        name, long = uuid.uuid4(), report(1, diff="\n".join(str(uuid.uuid4()) for _ in range(10_000)))
        with full(service):
            path = f"{API}/machines/self/experiments/{name}"
            answer = inner.put(
                path, content=long.model_dump_json(), headers=raw(client) | {"Content-Type": "application/json"}
            )
            problem = told(answer, 503)
            assert "full" in problem.detail
            assert problem.retry
            with pytest.raises(Away) as away:
                client.report(name, long)
            assert away.value.retry_after_s == 5
            failing = inner.get("/healthz")
            assert failing.status_code == 503
            assert failing.json()["status"] == "failing"
            assert failing.json()["storage"] in problem.detail
            assert client.health() == failing.json()
            assert metric(inner, "swarm_storage_ok") == 0
            assert client.heartbeat(wire.Heartbeat()).next_s > 0  # that needs no storage
            assert client.known() == {}
        assert client.report(name, long).stored
        assert inner.get("/healthz").status_code == 200
        assert metric(inner, "swarm_storage_ok") == 1


def test_a_full_disk_is_told_and_reports_wait(tmp_path: Path) -> None:
    with hosted(tmp_path) as service, http(service) as inner:
        client = member(service, inner)
        service.settings = replace(service.settings, limits=Limits(free_bytes=2**62))
        with pytest.raises(Away, match="disk is full"):
            client.report(uuid.uuid4(), report())
        health = inner.get("/healthz")
        assert health.status_code == 503
        assert "disk is full" in health.json()["storage"]


def test_what_ails_storage_is_for_those_who_may_look(tmp_path: Path) -> None:
    """A database's address is in such words."""
    with hosted(tmp_path) as service, http(service, loopback=False) as inner:
        service.settings = replace(service.settings, limits=Limits(free_bytes=2**62))
        viewer = {"Authorization": f"Bearer {token(service, Role.VIEWER)}"}
        joins = {"Authorization": f"Bearer {token(service, Role.JOIN)}"}
        told = [inner.get("/healthz", headers=headers) for headers in ({}, joins, viewer)]
        assert [answer.status_code for answer in told] == [503, 503, 503]
        assert ["disk is full" in answer.json()["storage"] for answer in told] == [False, False, True]


def metric(inner: Any, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(inner.get("/metrics").text)
    [value] = [s.value for family in families for s in family.samples if s.name == name and s.labels == labels]
    return float(value)


def test_metrics_are_what_prometheus_reads(service: Service) -> None:
    with http(service) as inner:
        client = member(service, inner)
        for number, status in enumerate((Status.KEEP, Status.KEEP, Status.DISCARD)):
            client.report(uuid.uuid4(), report(number, status=status))
        answer = inner.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        families = {family.name: family for family in text_string_to_metric_families(answer.text)}
        assert all(family.documentation for family in families.values())
        assert metric(inner, "swarm_machines", state="online") == 1
        assert metric(inner, "swarm_experiments_total") == 2  # the baseline is none
        assert metric(inner, "swarm_keeps_total") == 1
        assert metric(inner, "swarm_events_total") == client.last_event() == service.store.writer.last_event
        assert metric(inner, "swarm_heartbeat_seconds") == 10
        assert metric(inner, "swarm_listeners") == metric(inner, "swarm_listeners_dropped_total") == 0


# -- who is answered at all


def test_without_tokens_only_this_computers_own_names_are_answered(service: Service) -> None:
    """A page elsewhere may point its name at 127.0.0.1 and so reach, through a browser, what listens there."""
    with listening(service) as url:
        port = url.rpartition(":")[2]
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", "localhost", f"[::1]:{port}"):
            assert httpx.get(f"{url}/healthz", headers={"Host": host}).status_code == 200
        for host in (f"evil.example:{port}", "evil.example", f"localhost.evil.example:{port}", ""):
            for path in ("/healthz", f"{API}/tokens", "/git/fast.git/info/refs?service=git-upload-pack"):
                problem = told(httpx.get(url + path, headers={"Host": host}), 403)
                assert "localhost" in problem.detail
        elsewhere = {"Origin": "https://evil.example"}
        told(httpx.post(f"{url}{API}/experiments/abcd/clear", headers=elsewhere), 403)
        assert httpx.get(f"{url}/healthz", headers={"Origin": url}).status_code == 200
        admin = {"Authorization": f"Bearer {token(service, Role.ADMIN)}"}
        assert httpx.get(f"{url}{API}/machines", headers={"Host": "any.example"} | admin).status_code == 200


def test_other_computers_are_answered_by_any_name_but_not_without_a_token(service: Service) -> None:
    token(service, Role.ADMIN)
    with http(service, loopback=False) as inner:
        assert inner.get("/healthz", headers={"Host": "swarm.example"}).status_code == 200
        answer = inner.get(f"{API}/machines", headers={"Host": "swarm.example"})
        told(answer, 401)
        assert answer.headers["www-authenticate"] == 'Basic realm="swarm"'


def test_a_browser_says_its_token_as_a_password(service: Service) -> None:
    viewer = token(service, Role.VIEWER)
    with http(service) as inner:
        assert inner.get(f"{API}/machines", auth=("anyone", viewer)).status_code == 200
        assert "not known here" in told(inner.get(f"{API}/machines", auth=("anyone", "wrong")), 401).detail


def test_a_fault_of_ours_is_a_problem_too_and_says_nothing_of_the_inside(service: Service) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret\nof two lines")

    service.views = broken  # type: ignore[method-assign, assignment]
    with http(service) as inner:
        problem = told(inner.get(f"{API}/machines"), 500)
    assert "secret" not in problem.detail


def test_odd_headers_do_no_harm(service: Service) -> None:
    with http(service) as inner:
        told(inner.get(f"{API}/leaderboard", headers={"Content-Length": "x"}), 400)
        told(inner.get(f"{API}/leaderboard", headers={"Authorization": b"Bearer \xff"}), 401)
        for headers in ({"Accept": b"\xff"}, {"Authorization": b"Basic \xff"}, {"Content-Length": ""}):
            assert inner.get(f"{API}/leaderboard", headers=headers).status_code == 200


# -- data


def test_data_files_whole_and_in_ranges(tmp_path: Path) -> None:
    content = hashlib.sha256(b"seed").digest() * 10_000
    shard, gone = tmp_path / "shard.bin", tmp_path / "gone.bin"
    shard.write_bytes(content)
    files = Files(None, {"shards/shard.bin": shard, "rows/val.bin": gone}, None)
    with hosted(tmp_path, files) as service, listening(service) as url:
        at = f"{url}{API}/data/shards/shard.bin"
        assert CoordinatorClient(url).data("shards/shard.bin") == content
        assert CoordinatorClient(url).data_url() == f"{url}{API}/data"
        whole = httpx.get(at)
        assert whole.headers["accept-ranges"] == "bytes"
        part = httpx.get(at, headers={"Range": "bytes=1000-"})
        assert (part.status_code, part.content) == (206, content[1000:])
        assert part.headers["content-range"] == f"bytes 1000-{len(content) - 1}/{len(content)}"
        assert httpx.get(at, headers={"Range": "bytes=-10"}).content == content[-10:]
        assert httpx.get(at, headers={"Range": "bytes=5-9"}).content == content[5:10]
        assert httpx.head(at).status_code in (200, 405)
        past = httpx.get(at, headers={"Range": f"bytes={len(content)}-"})
        assert "no such range" in told(past, 416).detail
        assert past.headers["content-range"] == f"bytes */{len(content)}"
        told(httpx.get(at, headers={"Range": "lines=1-2"}), 400)
        assert httpx.get(at, headers={"Range": "bytes=0-1", "If-Range": '"another"'}).content == content
        problem = told(httpx.get(f"{url}{API}/data/nothing"), 404)
        assert "shards/shard.bin" in problem.detail
        told(httpx.get(f"{url}{API}/data/rows/val.bin"), 404)  # it was there at the start


# -- administration


def test_a_machine_is_renamed_paused_and_retired(service: Service) -> None:
    with http(service) as inner:
        client = member(service, inner)
        member(service, inner, "m2")
        view = admin(inner).change("m1", wire.MachineChange(name="studio", paused=True))
        assert (view.name, view.paused, view.branch) == ("studio", True, "autoresearch/t-m1")
        for taken in ("m2", "promoted", "self"):
            with pytest.raises(Rejected, match="taken"):
                admin(inner).change("studio", wire.MachineChange(name=taken))
        assert inner.get(f"{API}/machines/studio/known", headers=raw(client)).status_code == 200
        admin(inner).retire("studio")
        assert {m.name: m.state for m in admin(inner).machines()} == {"studio": "retired", "m2": "online"}


def test_results_from_elsewhere(service: Service) -> None:
    with http(service) as inner:
        client = member(service, inner, "m1", uid := uuid.uuid4())
        old = registration("old", uid=uuid.uuid4())
        person, name, log = admin(inner), uuid.uuid4(), report()
        assert person.import_machine(old) == "old"
        assert person.import_experiment("old", name, log).stored
        assert person.import_machine(old) == "old"  # again: the same machine
        assert not person.import_experiment("old", name, log).stored
        with pytest.raises(Rejected, match="only imported ones"):
            person.import_experiment("m1", uuid.uuid4(), log)
        with pytest.raises(Rejected, match="is a machine of this swarm"):
            person.import_machine(registration("m1", uid=uid))
        assert client.heartbeat(wire.Heartbeat()).pause is False
        assert {m.name: m.state for m in client.machines()} == {"m1": "online", "old": "imported"}


def test_a_token_is_shown_once(service: Service) -> None:
    with http(service) as inner:
        made = admin(inner).make_token(TokenOrder(role=Role.ADMIN, label="me", expires_s=60))
        person = CoordinatorClient(LOCAL, made.token, http=inner)
        listed = inner.get(f"{API}/tokens", headers={"Authorization": f"Bearer {made.token}"})
        assert made.token not in listed.text
        [view] = listed.json()
        assert (view["role"], view["label"], view["revoked"]) == ("admin", "me", False)
        assert inner.delete(f"{API}/tokens/{made.id}", headers=raw(person)).status_code == 204
        with pytest.raises(Rejected) as refused:
            person.machines()
        assert refused.value.status == 401


def test_many_at_once(service: Service) -> None:
    """Reports of eight threads, each sent twice: all there, once."""
    with listening(service) as url:
        done: list[uuid.UUID] = []

        def work(name: str) -> None:
            client = CoordinatorClient(url)
            client.register(registration(name))
            for number in range(10):
                identity, sent = uuid.uuid4(), report(number)
                assert client.report(identity, sent).stored
                assert not client.report(identity, sent).stored
                done.append(identity)

        threads = [threading.Thread(target=work, args=(f"m{n}",)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        page = CoordinatorClient(url).experiments(limit=1000)
        assert {row.id for row in page.experiments} == set(done)
        assert len(done) == len(page.experiments) == 80
        until(lambda: service.store.writer.last_event >= 88)


def test_making_the_application_starts_nothing(service: Service) -> None:
    before = threading.active_count()
    create_app(service)
    assert threading.active_count() == before
