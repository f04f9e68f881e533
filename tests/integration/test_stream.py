"""The event stream over real sockets: resuming, commit order, stalled listeners, and the end of the service."""

from __future__ import annotations

import random
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import func, select

from coordinator.service import Service
from coordinator.stream import LISTENERS
from coordinator.tables import Event, Experiment
from coordinator.writer import Transaction
from shared import wire
from shared.client import CoordinatorClient
from tests import fast_task
from tests.hosting import WAIT_S, hosted, http, listening, registration, report, until
from tests.served import served, stop

EVENTS = f"{wire.API}/events"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with hosted(tmp_path) as made:
        yield made


def note(service: Service, kind: str = "note", **data: Any) -> int:
    """Commits an event; returns its position."""
    return service.store.writer.call(lambda t: t.event(kind, **data)).position


@contextmanager
def noting(service: Service, per_s: float) -> Iterator[None]:
    """Events, all the time, from another thread."""
    ended = threading.Event()

    def go() -> None:
        while not ended.wait(1 / per_s):
            note(service)

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_fifty_reconnects_while_twenty_events_a_second_come(service: Service) -> None:
    seen: list[int] = []
    with listening(service) as url, noting(service, 20):
        client = CoordinatorClient(url)
        for number in range(50):
            wanted = random.randint(0, 3)
            feed = client.events(len(seen))
            # 0: leaves before anything came, at a moment between two events.
            for event in (next(feed) for _ in range(wanted)):
                seen.append(event.position)
            feed.close()
            if number % 10 == 0:
                until(lambda: service.store.writer.last_event > len(seen) + 2)
        last = service.store.writer.last_event
        feed = client.events(len(seen))
        while len(seen) < last:
            seen.append(next(feed).position)
        feed.close()
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) > 50


def test_from_now_on_from_the_first_and_by_kind(service: Service) -> None:
    with listening(service) as url:
        client = CoordinatorClient(url)
        first = min(note(service, kind) for kind in ("a", "b", "a"))

        def positions(query: str = "", **headers: Any) -> list[int]:
            """What comes up to a last event that is made once the line stands."""
            with httpx.stream("GET", f"{url}{EVENTS}{query}", headers=headers, timeout=WAIT_S) as answer:
                assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
                assert answer.headers["cache-control"] == "no-store"
                end = note(service, "a")
                found = []
                for line in answer.iter_lines():
                    if line.startswith("id: "):
                        found.append(int(line[4:]))
                        if found[-1] == end:
                            return found
            raise AssertionError("the stream ended")

        assert positions() == [4]
        assert positions("?after=0") == [1, 2, 3, 4, 5]
        assert positions("?after=0&kind=a") == [1, 3, 4, 5, 6]
        assert positions("?after=0&kind=a&kind=b") == list(range(1, 8))
        assert positions("?after=0", **{"Last-Event-ID": "5"}) == [6, 7, 8]  # the header is what a browser sends
        assert positions(**{"Last-Event-ID": "no number"}) == [9]
        assert positions(**{"Last-Event-ID": b"\xb2"}) == [10]  # a digit to Python, not to int()
        assert positions(**{"Last-Event-ID": "9" * 5000}) == [11]
        assert positions(**{"Last-Event-ID": "999999"}) == [12]  # of a coordinator since restored from a backup
        assert next(client.events(0)).position == first


def test_what_is_heard_of_is_committed_and_what_failed_is_not_heard_of(service: Service) -> None:
    def fails(t: Transaction) -> None:
        t.event("never")
        raise KeyError

    with listening(service) as url:
        client = CoordinatorClient(url)
        opened = threading.Event()
        wrong: list[str] = []

        def look() -> None:
            listener = CoordinatorClient(url)
            counted = 0
            for event in listener.events(opened=opened.set):
                with service.store.engine.connect() as connection:
                    stored = connection.execute(select(Event.kind).where(Event.position == event.position)).scalar()
                    counted += event.kind == "experiment"
                    there = connection.execute(select(func.count()).select_from(Experiment)).scalar() or 0
                if stored != event.kind or there < counted:
                    wrong.append(f"{event.position} {event.kind}")
                if event.kind == "end":
                    return

        thread = threading.Thread(target=look)
        thread.start()
        assert opened.wait(WAIT_S)
        client.register(registration())
        for number in range(30):
            client.report(uuid.uuid4(), report(number))
            failed = service.store.writer.submit(fails)
            with pytest.raises(KeyError):
                failed.result()
        note(service, "end")
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert wrong == []


def test_every_listener_gets_a_proper_end_when_the_server_stops(service: Service) -> None:
    """httpx raises for a chunked answer that was cut."""
    ended: list[str] = []
    opened = threading.Barrier(21)

    def listen(url: str) -> None:
        with httpx.stream("GET", url + EVENTS, timeout=WAIT_S) as answer:
            lines = answer.iter_lines()
            next(lines)
            opened.wait(WAIT_S)
            ended.append("".join(lines))

    with listening(service) as url:
        threads = [threading.Thread(target=listen, args=(url,)) for _ in range(20)]
        for thread in threads:
            thread.start()
        opened.wait(WAIT_S)
        assert service.stream.listeners == 20
    for thread in threads:
        thread.join(WAIT_S)
    assert ended == [""] * 20
    assert service.stream.listeners == 0


def test_serve_ends_its_listeners_at_sigterm(tmp_path: Path) -> None:
    campaign = fast_task.make(tmp_path / "campaign")
    with (
        served(campaign) as (url, process),
        httpx.stream("GET", url + EVENTS, timeout=WAIT_S) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        stop(process)
        assert "".join(lines) == ""
        assert process.returncode == 0


def stalled(url: str) -> socket.socket:
    """Asks for every event, with little room for them, and reads nothing."""
    host = url.removeprefix("http://")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((host.partition(":")[0], int(host.partition(":")[2])))
    connection.sendall(f"GET {EVENTS}?after=0 HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    return connection


def held(peer: socket.socket) -> Callable[[], bool]:
    """Whether this process still has the server's end of a connection."""
    name = peer.getsockname()
    return lambda: any(c.raddr and tuple(c.raddr) == name for c in psutil.Process().net_connections("tcp4"))


def test_who_reads_nothing_is_dropped_and_its_socket_is_gone(
    service: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    service.stream.stall_s = service.stream.keepalive_s = 0.3
    with listening(service) as url:
        for _ in range(60):  # 6 MB: the kernel takes 2.3 for a peer that never reads
            note(service, "bulk", text="x" * 100_000)
        connection = stalled(url)
        there = held(connection)
        until(there)
        until(lambda: service.stream.dropped == 1)
        until(lambda: not there())
        until(lambda: service.stream.listeners == 0)
        with pytest.raises(ConnectionResetError):  # nothing lingers in the kernel either
            while connection.recv(65536):
                pass
        connection.close()
        text = httpx.get(f"{url}/metrics").text
        assert re.search(r"^swarm_listeners_dropped_total 1\.0$", text, re.MULTILINE)
        assert httpx.get(f"{url}/healthz").status_code == 200
    assert capfd.readouterr().err == ""


def test_who_reads_slowly_is_not_dropped(service: Service) -> None:
    service.stream.stall_s = 2.0
    with listening(service) as url:
        for _ in range(40):
            last = note(service, "bulk", text="x" * 100_000)
        connection = stalled(url)
        read = b""
        end = time.monotonic() + WAIT_S
        while f"id: {last}\n".encode() not in read[-200_000:] and time.monotonic() < end:
            read += connection.recv(65536)
        connection.close()
        assert [int(n) for n in re.findall(rb"\bid: (\d+)\n", read)] == list(range(1, last + 1))
        assert service.stream.dropped == 0
        until(lambda: service.stream.listeners == 0)


def test_a_client_that_leaves_is_forgotten(service: Service) -> None:
    with listening(service) as url:
        feed = CoordinatorClient(url).events(0)
        note(service)
        next(feed)
        assert service.stream.listeners == 1
        feed.close()
        until(lambda: service.stream.listeners == 0)
        until(lambda: not service.stream._waiters)
        assert service.stream.dropped == 0


def test_too_many_listeners_are_asked_to_come_later(service: Service) -> None:
    service.stream.listeners = LISTENERS
    with http(service) as client:
        answer = client.get(EVENTS)
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.json()["retry"] is True
