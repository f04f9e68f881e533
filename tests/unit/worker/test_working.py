"""A first start whose coordinator goes away in the middle: what is tried again, and what ends it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from shared.client import Away, CoordinatorClient
from shared.errors import Refused
from shared.git import GitError
from worker import working
from worker.home import Identity, Membership
from worker.machine import detect

THERE = Membership("secret", "mac", "fast", "mar5", "/git/fast.git", "")


@contextmanager
def answering(status: int, body: bytes = b"", length: int | None = None) -> Iterator[str]:
    """A server that says only this, and closes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/x-git-upload-pack-advertisement")
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def clone(home: Path, url: str) -> None:
    (home / "mac").mkdir(exist_ok=True)
    place = working.Place(CoordinatorClient(url), Identity(home / "mac" / "machine.json", uuid4()), detect("mac"), None)
    try:
        working._clone(place, THERE, None)
    finally:
        assert list((home / "mac").iterdir()) == []


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_hub_that_says_later_is_away(tmp_path: Path, status: int) -> None:
    with answering(status) as url, pytest.raises(Away, match=str(status)):
        clone(tmp_path, url)


def test_a_hub_that_is_gone_or_breaks_off_is_away(tmp_path: Path) -> None:
    with answering(200, b"001e# service=git-upload-pack\n0000", length=5000) as url, pytest.raises(Away):
        clone(tmp_path, url)
    with pytest.raises(Away, match="unable to access"):
        clone(tmp_path, url)


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 410])
def test_a_hub_that_says_no_ends_it_in_one_line(tmp_path: Path, status: int) -> None:
    with answering(status) as url, pytest.raises(Refused, match=r"^the hub refuses the campaign's code") as caught:
        clone(tmp_path, url)
    assert "secret" not in str(caught.value) and len(str(caught.value).splitlines()) == 1


class Impatient:
    """A screen on which a person reads one note, and presses Ctrl-C."""

    def __init__(self) -> None:
        self.stop, self.notes = threading.Event(), list[str]()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.stop.set()


def test_waiting_for_a_hub_that_is_gone_can_be_stopped(tmp_path: Path) -> None:
    screen: Any = Impatient()
    with pytest.raises(working._Stopped):
        working._patiently(lambda: clone(tmp_path, "http://127.0.0.1:9"), screen, screen.stop)
    [note] = screen.notes
    assert "unable to access" in note and note.endswith("; trying again in 1 s")


def test_what_is_wrong_here_is_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GitError, match="not installed"):
        clone(tmp_path, "http://127.0.0.1:9")
