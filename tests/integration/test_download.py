"""Downloads against a real HTTP server that misbehaves: every shard whole in the end, or nothing and a clear error."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.prepare.download import ATTEMPTS, Source, climbmix_shards, fetch
from shared.prepare.errors import DataError
from tests.conftest import ROOT


def parquet(number: int) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": [f"document {number} {i} " * 50 for i in range(400)]}), out, compression="none")
    return out.getvalue()


SHARDS = {name: parquet(n) for n, name in enumerate(climbmix_shards(11))}


class Server(ThreadingHTTPServer):
    """Serves SHARDS; each path has a list of misdeeds, one for each request, after which it behaves."""

    daemon_threads = True

    def __init__(self, misdeeds: dict[str, list[str]], port: int = 0) -> None:
        self.misdeeds = {path: iter(deeds) for path, deeds in misdeeds.items()}
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.tokens: set[str | None] = set()
        self.active = itertools.count()
        super().__init__(("127.0.0.1", port), Handler)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.requests[name] += 1
        self.server.tokens.add(self.headers.get("Authorization"))
        deed = next(self.server.misdeeds.get(name, iter(())), "serve")
        body = SHARDS.get(name, b"")
        if deed == "404" or not body:
            self.answer(404, b"")
        elif deed == "503":
            self.answer(503, b"later")
        elif deed == "stop midway":
            self.answer(200, body[: len(body) // 2], len(body))
            self.close_connection = True
        elif deed == "truncate":  # says that half is all there is
            self.answer(200, body[: len(body) // 2])
        elif deed == "garbage":
            self.answer(200, b"x" * len(body))
        else:
            asked = self.headers.get("Range")
            if asked and deed != "ignore range":
                self.server.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                self.answer(206 if start < len(body) else 416, body[start:])
            else:
                self.answer(200, body)

    def answer(self, status: int, body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[object]:
    servers: list[Server] = []

    def start(misdeeds: dict[str, list[str]], port: int = 0) -> Server:
        server = Server(misdeeds, port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def source(server: Server, **more: object) -> Source:
    return Source(f"http://127.0.0.1:{server.server_port}/data", wait_s=lambda attempt: 0.01, **more)  # type: ignore[arg-type]


def get(server: Server, folder: Path, names: list[str] | None = None, **more: object) -> None:
    fetch(names or list(SHARDS), folder, source(server, **more), lambda *_: None)


def whole(folder: Path) -> bool:
    return {p.name: p.read_bytes() for p in folder.iterdir()} == SHARDS


def test_every_shard_arrives_whole_from_a_server_that_misbehaves(tmp_path: Path, serve) -> None:  # type: ignore[no-untyped-def]
    names = list(SHARDS)
    deeds = [
        ["503", "503"],
        ["stop midway"],
        ["truncate"],
        ["garbage"],
        ["stop midway", "ignore range"],
        ["stop midway", "503", "stop midway", "503"],
        ["truncate", "garbage", "stop midway", "503"],
    ]
    server = serve(dict(zip(names, deeds, strict=False)))
    get(server, tmp_path / "data")
    assert whole(tmp_path / "data")
    assert server.ranges  # what a broken connection left was continued


def test_what_is_there_is_not_fetched_again(tmp_path: Path, serve) -> None:  # type: ignore[no-untyped-def]
    server = serve({})
    names = list(SHARDS)
    get(server, tmp_path, names[:3])
    get(server, tmp_path)
    assert set(server.requests.values()) == {1}
    assert whole(tmp_path)


def test_a_server_that_dies_and_comes_back_is_waited_for(tmp_path: Path, serve) -> None:  # type: ignore[no-untyped-def]
    first = serve({name: ["stop midway"] * 9 for name in SHARDS})
    port = first.server_port
    back = threading.Event()

    def wait_s(attempt: int) -> float:
        if not back.is_set():  # the first failure: the server is ended, and another takes its port
            back.set()
            first.shutdown()
            first.server_close()
            serve({}, port)
        return 0.05

    fetch(list(SHARDS), tmp_path, Source(f"http://127.0.0.1:{port}", wait_s=wait_s), lambda *_: None)
    assert whole(tmp_path)


@pytest.mark.parametrize("deed", ["503", "stop midway", "truncate", "garbage"])
def test_one_that_never_recovers_is_a_clear_error_and_leaves_nothing_half_written(
    tmp_path: Path,
    serve,  # type: ignore[no-untyped-def]
    deed: str,
) -> None:
    names = list(SHARDS)
    server = serve({names[4]: [deed] * 100})
    if deed == "stop midway":  # each attempt would get further by a Range; a server without Ranges never finishes
        server.misdeeds[names[4]] = itertools.repeat(deed)
    with pytest.raises(DataError, match=rf"data/{names[4]}: not to be had after {ATTEMPTS} attempts"):
        get(server, tmp_path)
    assert server.requests[names[4]] == ATTEMPTS
    assert not (tmp_path / names[4]).exists()
    assert all(path.read_bytes() == SHARDS[path.name] for path in tmp_path.glob("*.parquet"))
    assert not (tmp_path / f"{names[4]}.tmp").exists()


def test_what_does_not_exist_is_not_tried_five_times(tmp_path: Path, serve) -> None:  # type: ignore[no-untyped-def]
    server = serve({})
    with pytest.raises(DataError, match=r"the server says 404 .*; check the URL and the token"):
        get(server, tmp_path, ["shard_09999.parquet"])
    assert server.requests["shard_09999.parquet"] == 1
    assert list(tmp_path.iterdir()) == []


def test_the_token_is_sent(tmp_path: Path, serve) -> None:  # type: ignore[no-untyped-def]
    server = serve({})
    get(server, tmp_path, list(SHARDS)[:1], token="secret")
    assert server.tokens == {"Bearer secret"}


def test_no_server_is_a_clear_error(tmp_path: Path) -> None:
    nowhere = Source("http://127.0.0.1:9", wait_s=lambda attempt: 0.0)
    with pytest.raises(DataError, match=r"not to be had after 5 attempts: .*refused"):
        fetch(["shard_00000.parquet"], tmp_path, nowhere, lambda *_: None)


def test_the_waits_are_powers_of_two() -> None:
    assert [Source("x").wait_s(attempt) for attempt in range(1, 5)] == [2, 4, 8, 16]


def test_climbmix_is_its_first_shards_and_the_pinned_one() -> None:
    assert climbmix_shards(2) == ["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"]
    assert len(climbmix_shards(6542)) == 6543
    for wrong in (0, 6543):
        with pytest.raises(DataError, match="1 to 6542"):
            climbmix_shards(wrong)


def test_climbmix_is_downloaded_and_packed_by_prepare(tmp_path: Path, serve) -> None:  # type: ignore[no-untyped-def]
    server = serve({"shard_00001.parquet": ["503"]})
    environment = {
        **os.environ,
        "AUTORESEARCH_CACHE": str(tmp_path),
        "SWARM_PROFILE": "tiny",
        "SWARM_DATA": "climbmix",
        "SWARM_TRAIN_SHARDS": "2",
        "SWARM_DATA_URL": f"http://127.0.0.1:{server.server_port}/mirror",
    }
    command = [sys.executable, "-m", "shared.prepare"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    last = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 2  # the test's shards repeat a few words: too few for a vocabulary of 512
    assert "the training text gives only" in last["error"]
    assert sorted(p.name for p in (tmp_path / "data/climbmix").iterdir()) == climbmix_shards(2)
    assert server.requests["shard_00001.parquet"] == 2
