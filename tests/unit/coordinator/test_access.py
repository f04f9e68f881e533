"""Who a request says that it is: Authorization headers, and the name and incarnation of a machine."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from coordinator.api.access import LOOK
from coordinator.api.experiments import preferred
from coordinator.app import _from_elsewhere, _is_local, _is_ours
from coordinator.auth import Caller, Forbidden, token_of
from coordinator.database import Conflict
from coordinator.members import Member
from coordinator.service import Service
from shared import wire
from shared.wire import MachineState, Role
from tests.hosting import hosted, registration


def basic(text: bytes) -> str:
    return f"Basic {base64.b64encode(text).decode()}"


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("", None),
        ("Bearer", None),
        ("Bearer   ", None),
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        (basic(b"swarm:abc"), "abc"),
        (basic(b":abc"), "abc"),
        (basic(b"swarm:a:b"), "a:b"),
        (basic(b"abc"), None),
        (basic(b"swarm:"), None),
        (basic(b"swarm:\xff"), None),
        ("Basic not base64!", None),
        ("Basic \xff", None),
        ("Basic ", None),
        ("Digest abc", None),
        ("abc", None),
    ],
)
def test_the_token_in_a_header(header: str, token: str | None) -> None:
    assert token_of(header) == token


MEMBER = Member(7, uuid4(), "m1", "refs/heads/b", "refs/attic/m1", "cpu", 3, MachineState.ONLINE, False, ("explore",))


@pytest.mark.parametrize("state", [MachineState.ONLINE, MachineState.OFFLINE])
def test_the_present_incarnation_is_heard(state: MachineState) -> None:
    Service.current(replace(MEMBER, state=state), 3)


@pytest.mark.parametrize(
    ("state", "incarnation", "kind"),
    [
        (MachineState.ONLINE, 2, wire.SUPERSEDED),
        (MachineState.ONLINE, 0, wire.SUPERSEDED),
        (MachineState.ONLINE, 4, wire.REGISTER),
        (MachineState.ONLINE, None, wire.REGISTER),
        (MachineState.RETIRED, 3, wire.RETIRED),
        (MachineState.RETIRED, 2, wire.RETIRED),
    ],
)
def test_another_incarnation_is_told_what_to_do(state: MachineState, incarnation: int | None, kind: str) -> None:
    with pytest.raises(Conflict) as told:
        Service.current(replace(MEMBER, state=state), incarnation)
    assert told.value.kind == kind
    assert "m1" in str(told.value)


def test_a_machine_speaks_for_itself_by_either_name(tmp_path: Path) -> None:
    with hosted(tmp_path) as service:
        one, two = (service.store.register(registration(name), "autoresearch") for name in ("m1", "m2"))
        for name in ("self", "m1"):
            assert service.speaker(Caller(Role.WORKER, one.id), name) == one
        with pytest.raises(Forbidden, match="this token is m2's, not m1's"):
            service.speaker(Caller(Role.WORKER, two.id), "m1")
        for caller in (Caller(Role.ADMIN), Caller(Role.VIEWER), Caller(Role.JOIN), Caller(Role.WORKER)):
            with pytest.raises(Forbidden, match="only a machine's own token"):
                service.speaker(caller, "self")


def test_a_join_token_does_not_look() -> None:
    assert set(LOOK) == set(Role) - {Role.JOIN}


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("localhost:8420", True),
        ("LOCALHOST:8420", True),
        ("127.0.0.1", True),
        ("127.0.0.1:80", True),
        ("[::1]", True),
        ("[::1]:8420", True),
        ("", False),
        ("evil.example:8420", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:8420", False),
        ("evil.example/localhost", False),
        ("localhost@evil.example", False),
        ("evil@localhost", False),
        ("[::1", False),
        ("null", False),
        ("testserver", False),
        ("0.0.0.0:8420", False),
    ],
)
def test_which_host_is_this_computer(host: str, local: bool) -> None:
    assert _is_local(host.encode()) is local


@pytest.mark.parametrize(
    ("origin", "ours"),
    [
        (None, True),
        (b"http://localhost:8420", True),
        (b"http://127.0.0.1:3000", True),
        (b"https://evil.example", False),
        (b"null", False),
        (b"", False),
        (b"localhost", False),
    ],
)
def test_a_page_from_elsewhere_is_not_ours_though_it_asks_by_our_name(origin: bytes | None, ours: bool) -> None:
    headers = {b"host": b"localhost:8420"} | ({b"origin": origin} if origin is not None else {})
    assert _is_ours(headers) is ours


JSON, TSV, TEXT = "application/json", "text/tab-separated-values", "text/plain"


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", JSON),
        ("*/*", JSON),
        (JSON, JSON),
        (TSV, TSV),
        (TEXT, TEXT),
        ("Text/Plain", TEXT),
        ("text/plain; charset=utf-8", TEXT),
        ("text/*", TEXT),
        ("text/*;q=0.5, text/tab-separated-values", TSV),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", JSON),
        ("text/plain;q=0.5, text/tab-separated-values;q=0.9", TSV),
        ("text/plain;q=0.5, */*", JSON),
        ("text/plain;q=0.5, application/*;q=0.9", JSON),
        ("text/plain, application/json;q=0.9", TEXT),
        ("text/plain;q=0.9, application/json", JSON),
        ("application/json;q=0, */*", TEXT),
        ("application/json;q=0, text/plain;q=0, */*;q=0.1", TSV),
        ("text/plain;q=0", JSON),
        ("image/png", JSON),
        ("text/plain;q=nonsense", JSON),
        ("text/plain;q=1e9", JSON),
        ("text/plain ; Q=0.3 , application/json ; q=0.2", TEXT),
        (";;,,;q=", JSON),
    ],
)
def test_the_form_that_is_liked_best(accept: str, form: str) -> None:
    assert preferred(accept) == form


@pytest.mark.parametrize(
    ("method", "authorization", "origin", "refused"),
    [
        ("POST", b"Basic eDp5", b"https://evil.example", True),
        ("DELETE", b"basic eDp5", b"null", True),
        ("PATCH", b"Basic eDp5", b"http://swarm.example:9999", True),  # another port is another origin
        ("POST", b"Basic eDp5", b"http://SWARM.example:8765", False),
        ("POST", b"Basic eDp5", None, False),  # no browser: git, curl
        ("GET", b"Basic eDp5", b"https://evil.example", False),  # it changes nothing, and the page may not read it
        ("POST", b"Bearer abc", b"https://evil.example", False),  # no browser adds that by itself
    ],
)
def test_a_page_elsewhere_may_not_use_a_password_that_the_browser_keeps(
    method: str, authorization: bytes, origin: bytes | None, refused: bool
) -> None:
    headers = {b"host": b"swarm.example:8765", b"authorization": authorization}
    assert _from_elsewhere(method, headers if origin is None else headers | {b"origin": origin}) is refused
