"""Tokens against a real database: roles, expiry, revocation, other processes, and what is written down."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.auth import ANYONE, LONGEST_S, MARKER, Caller, Tokens, hashed
from coordinator.database import NotFound
from coordinator.service import Service
from coordinator.store import Store
from coordinator.writer import StorageUnavailable
from shared.errors import BadInput
from shared.wire import MachineState, Role, TokenOrder
from tests import postgres
from tests.conftest import ROOT
from tests.hosting import hosted, registration, until


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with hosted(tmp_path) as made:
        yield made


def order(role: Role, **more: object) -> TokenOrder:
    return TokenOrder.model_validate({"role": role, **more})


def test_each_role_is_who_it_was_made_for(service: Service) -> None:
    tokens = service.tokens
    member = service.store.register(registration("m1"), "autoresearch")
    for role in (Role.JOIN, Role.VIEWER, Role.ADMIN):
        assert tokens.caller(tokens.make(order(role)).token) == Caller(role)
    made = tokens.make(order(Role.WORKER, machine="m1", label="by hand"))
    assert (made.machine, made.label) == ("m1", "by hand")
    assert tokens.caller(made.token) == Caller(Role.WORKER, member.id)
    assert Caller(Role.VIEWER).may(Role.ADMIN, Role.VIEWER)
    assert not Caller(Role.VIEWER).may(Role.ADMIN)


def test_a_token_is_long_and_says_what_it_is(service: Service) -> None:
    made = [service.tokens.make(order(Role.JOIN)).token for _ in range(20)]
    assert len(set(made)) == 20
    assert all(token.startswith("swarm_join_") and len(token) >= len("swarm_join_") + 43 for token in made)


def test_until_a_person_has_made_a_token_anyone_is_an_administrator_and_never_again(service: Service) -> None:
    tokens = service.tokens
    assert not tokens.needed
    assert tokens.caller(None) == tokens.caller("") == ANYONE
    assert tokens.caller("made up") is None
    service.store.register(registration("m1"), "autoresearch")
    tokens.for_machine(1)
    assert not tokens.needed  # that one was made by registering
    last = tokens.make(order(Role.ADMIN))
    assert tokens.needed
    assert tokens.caller(None) is None
    tokens.revoke(last.id)
    assert tokens.needed
    assert tokens.caller(None) is None
    assert Tokens(service.store, service.settings.state).needed  # also after a restart


def test_expiry(service: Service) -> None:
    tokens = service.tokens
    before = time.time()
    soon = tokens.make(order(Role.VIEWER, expires_s=0.2))
    assert tokens.caller(soon.token) is not None  # whole seconds are stored, and never fewer than were asked for
    assert soon.expires_at is not None
    assert before + 0.2 <= soon.expires_at <= before + 2.2
    until(lambda: tokens.caller(soon.token) is None)
    assert time.time() >= soon.expires_at
    assert not next(view for view in tokens.all() if view.id == soon.id).revoked
    endless = tokens.make(order(Role.VIEWER, expires_s=1e300))
    assert endless.expires_at is not None
    assert endless.expires_at <= time.time() + LONGEST_S + 2
    assert tokens.caller(endless.token) is not None


def test_revocation(service: Service) -> None:
    tokens = service.tokens
    made, other = tokens.make(order(Role.VIEWER)), tokens.make(order(Role.VIEWER))
    tokens.revoke(made.id)
    assert tokens.caller(made.token) is None
    assert tokens.caller(other.token) is not None
    for unknown in (made.id, 999):
        with pytest.raises(NotFound, match=f"no live token {unknown}"):
            tokens.revoke(unknown)
    assert [(view.id, view.revoked) for view in tokens.all()] == [(made.id, True), (other.id, False)]


def test_a_machine_has_one_token_and_none_once_it_is_retired(service: Service) -> None:
    tokens, member = service.tokens, service.store.register(registration("m1"), "autoresearch")
    first = tokens.for_machine(member.id)
    second = tokens.for_machine(member.id)
    assert tokens.caller(first) is None
    assert tokens.caller(second) == Caller(Role.WORKER, member.id)
    assert (tokens.former(first), tokens.former(second)) == (member.id, None)
    assert tokens.former(None) is tokens.former("made up") is None
    service.retire(member)
    assert tokens.caller(second) is None
    assert tokens.former(second) == member.id


@pytest.mark.parametrize("wrong", [{"role": Role.WORKER}, {"role": Role.ADMIN, "machine": "m1"}])
def test_a_workers_token_and_only_that_is_bound_to_a_machine(service: Service, wrong: dict[str, str]) -> None:
    service.store.register(registration("m1"), "autoresearch")
    with pytest.raises(BadInput, match="bound to a machine"):
        service.tokens.make(TokenOrder.model_validate(wrong))
    with pytest.raises(NotFound, match="no machine 'm9'"):
        service.tokens.make(order(Role.WORKER, machine="m9"))


@pytest.mark.parametrize("state", [MachineState.RETIRED, MachineState.IMPORTED])
def test_no_token_speaks_for_a_machine_that_is_not_at_work(service: Service, state: MachineState) -> None:
    service.store.register(registration("old"), "autoresearch", state)
    with pytest.raises(BadInput, match=f"old is {state}"):
        service.tokens.make(order(Role.WORKER, machine="old"))


def test_only_hashes_are_in_the_database(service: Service) -> None:
    made = [service.tokens.make(order(role)).token for role in (Role.JOIN, Role.VIEWER, Role.ADMIN)]
    service.store.register(registration("m1"), "autoresearch")
    made.append(service.tokens.for_machine(1))
    files = [path for path in service.settings.state.rglob("*") if path.is_file()]
    content = b"".join(path.read_bytes() for path in files)
    for token in made:
        assert hashed(token).encode() in content  # what is looked for can be found so
        assert token.encode() not in content
        assert token.rpartition("_")[2].encode() not in content


def test_what_another_process_makes_and_revokes_is_known_at_once(service: Service) -> None:
    """As `swarm token` does it, beside a running coordinator."""
    code = """
import sys
from pathlib import Path
from coordinator.auth import Tokens
from coordinator.store import Store
from coordinator.writer import StorageUnavailable
from shared.wire import TokenOrder
store = Store(sys.argv[1])
tokens = Tokens(store, Path(sys.argv[2]))
print(*(tokens.make(TokenOrder(role="viewer")).token for _ in range(3)), sep="\\n")
tokens.revoke(2)
store.close()
"""
    arguments = [sys.executable, "-c", code, service.settings.database, str(service.settings.state)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    first, second, third = done.stdout.split()
    assert service.tokens.caller(first) == service.tokens.caller(third) == Caller(Role.VIEWER)
    assert service.tokens.caller(second) is None
    assert service.tokens.caller(None) is None


def test_two_changes_in_one_tick_of_the_clock_are_both_seen(service: Service) -> None:
    """The marker's time alone would not tell them apart."""
    other_store = Store(service.settings.database)
    try:
        other = Tokens(other_store, service.settings.state)
        marker = service.settings.state / MARKER
        made = other.make(order(Role.VIEWER))
        os.utime(marker, ns=(1, 1))
        assert service.tokens.caller(made.token) is not None
        other.revoke(made.id)
        os.utime(marker, ns=(1, 1))
        assert service.tokens.caller(made.token) is None
    finally:
        other_store.close()


def test_a_machine_is_known_while_tokens_are_read_anew(service: Service) -> None:
    tokens = service.tokens
    for number in range(50):
        service.store.register(registration(f"m{number}"), "autoresearch")
    ours = [tokens.for_machine(number) for number in range(1, 51)]
    over = threading.Event()
    unknown: list[int] = []

    def ask() -> None:
        while not over.is_set():
            unknown.extend(n for n, token in enumerate(ours) if tokens.known(token) is None)

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(30):
        tokens.make(order(Role.VIEWER))
    over.set()
    asking.join()
    assert unknown == []


def test_a_revocation_that_could_not_be_read_is_read_again(tmp_path: Path) -> None:
    try:
        server = postgres.Server()
    except postgres.Missing as missing:
        pytest.skip(str(missing))
    try:
        with hosted(tmp_path, database=server.database()) as service:
            made = service.tokens.make(order(Role.ADMIN))
            assert service.tokens.caller(made.token)
            Tokens(service.store, service.settings.state).revoke(made.id)  # as `swarm token revoke` does
            server.stop()
            with pytest.raises(StorageUnavailable):
                service.tokens.caller(made.token)
            server.start()
            assert service.tokens.caller(made.token) is None
    finally:
        server.remove()
