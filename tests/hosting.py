"""A coordinator inside the test's own process: its service for looking behind the API, and a server in a thread."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from coordinator.app import create_app
from coordinator.service import NO_FILES, Files, Service
from coordinator.serving import Address, server_of
from coordinator.settings import Limits, Settings, sqlite_url
from shared import wire
from shared.client import CoordinatorClient
from tests import fast_task
from worker.campaign import Campaign

LOCAL = "http://localhost"
WAIT_S = 20.0


@contextmanager
def hosted(folder: Path, files: Files = NO_FILES, **changes: Any) -> Iterator[Service]:
    """The service of a new campaign below `folder`; `changes` are of its Settings."""
    campaign = Campaign.open(fast_task.make(folder / "campaign"))
    state = folder / "state"
    settings = replace(Settings(state, sqlite_url(state), "fast", limits=Limits(free_bytes=0)), **changes)
    service = Service(campaign, "t", fast_task.git(campaign.root, "rev-parse", "HEAD"), settings, files)
    try:
        yield service
    finally:
        service.close()


@contextmanager
def talking(service: Service, token: str | None = None, *, loopback: bool = True) -> Iterator[CoordinatorClient]:
    """A client that calls the application without a network; its reaper and stream run."""
    with http(service, loopback=loopback) as inner:
        yield CoordinatorClient(LOCAL, token, http=inner)


@contextmanager
def http(service: Service, *, loopback: bool = True) -> Iterator[TestClient]:
    """The same for calls that no client of ours would make."""
    app = create_app(service, loopback=loopback)
    with TestClient(app, base_url=LOCAL, raise_server_exceptions=False) as inner:
        yield inner


@contextmanager
def listening(service: Service, host: str = "127.0.0.1", **more: Any) -> Iterator[str]:
    """The address of a real server in a thread, made as `swarm serve` makes it. It must end in time."""
    address = Address(host, 0, **more)
    server = server_of(service, address)
    listener = socket.create_server((host, 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield address.url(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        listener.close()
        assert not thread.is_alive()


def until(condition: Any, seconds: float = WAIT_S) -> None:
    """Waits for a condition, and fails without it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def registration(name: str = "mac", **changes: Any) -> wire.Registration:
    made = wire.Registration(version="0.1.0", uid=uuid.uuid4(), name=name, machine_class="cpu")
    return made.model_copy(update=changes)


def report(number: int = 1, score: float | None = 1.5, **changes: Any) -> wire.ExperimentReport:
    """A kept experiment; give what should differ."""
    run = wire.RunReport(id=uuid.uuid4(), seed=number, score=score)
    made = wire.ExperimentReport(
        version=1,
        number=number,
        idea=uuid.uuid4(),
        tested=f"{number:040x}",
        parent="b" * 40,
        kept=f"{number + 1_000_000:040x}",
        description=f"try {number}",
        status=wire.Status.KEEP,
        decided_at=1_790_000_000 + number,
        runs=(run,),
        diff="--- a/train.py\n+++ b/train.py\n",
    )
    return made.model_copy(update=changes)
