"""A campaign's data comes from its coordinator: a machine with an empty cache measures with the same, or not at all."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.client import CoordinatorClient
from tests import fast_task
from tests.conftest import SMALL
from tests.e2e.test_swarm import until, worker
from tests.served import served, swarm

SHARDS = ("shard_00000.parquet", "shard_00001.parquet", "shard_00002.parquet")
TOKENIZER = ("ranks.json", "shards.json")


class Relay(ThreadingHTTPServer):
    """Between a worker and its coordinator: writes down what is asked for, and breaks a shard's first download."""

    daemon_threads = True

    def __init__(self, to: str, breaks: str = "") -> None:
        self.to, self.breaks = urlsplit(to), breaks
        self.asked: list[tuple[str, Mapping[str, str]]] = []  #: path, headers
        super().__init__(("127.0.0.1", 0), _Passing)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def data(self) -> list[tuple[str, Mapping[str, str]]]:
        below = "/api/v1/data/"
        return [(path.removeprefix(below), headers) for path, headers in list(self.asked) if path.startswith(below)]


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Relay

    def _pass(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert self.server.to.hostname is not None
        onward = http.client.HTTPConnection(self.server.to.hostname, self.server.to.port, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        onward.request(self.command, self.path, body, headers)
        answer = onward.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.server.breaks and self.path.endswith(self.server.breaks):
            self.server.breaks = ""
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)
        onward.close()

    do_GET = do_POST = do_PUT = do_DELETE = _pass

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def relayed(to: str, breaks: str = "") -> Iterator[Relay]:
    relay = Relay(to, breaks)
    thread = threading.Thread(target=relay.serve_forever)
    thread.start()
    try:
        yield relay
    finally:
        relay.shutdown()
        thread.join()
        relay.server_close()


@pytest.fixture
def campaign(tmp_path: Path, small_cache: Path) -> Path:
    """Of profile tiny, on data set `small`, whose folder and rows are in `small_cache`."""
    data = small_cache / "data" / SMALL
    made = swarm(
        "init",
        tmp_path / "study",
        "--profile",
        "tiny",
        "--data",
        data,
        cwd=tmp_path,
        AUTORESEARCH_CACHE=str(small_cache),
    )
    assert made.returncode == 0, made.stderr
    return tmp_path / "study"


def digest_in(home: Path) -> Callable[[], str | None]:
    def look() -> str | None:
        for path in home.glob("*/*/.swarm/*/journal.jsonl"):
            for line in path.read_text().splitlines():
                event = json.loads(line)
                if event["event"] == "digest":
                    return str(event["digest"])
        return None

    return look


def test_a_machine_with_an_empty_cache_measures_with_the_same(
    campaign: Path, small_cache: Path, tmp_path: Path
) -> None:
    """Also over a line that breaks, and where tokens are needed: the machine's own goes with every request for data."""
    home, cache = tmp_path / "home", tmp_path / "empty"
    join = swarm("token", "create", "--role", "join", "--dir", campaign, cwd=tmp_path).stdout.strip()
    with (
        served(campaign, env={"AUTORESEARCH_CACHE": str(small_cache)}) as (url, _),
        relayed(url, breaks=SHARDS[0]) as relay,
        worker(relay.url, "mac", home, AUTORESEARCH_CACHE=str(cache), SWARM_TOKEN=join) as process,
    ):
        until(lambda: digest_in(home)() or process.poll() is not None, "the digest")
        log = (home / "mac.log").read_text()
        assert httpx.get(f"{url}/api/v1/data/shards/{SHARDS[0]}").status_code == 401
    assert digest_in(home)() == (small_cache / "digest").read_text(), log
    for name in SHARDS:
        here, there = cache / "data" / SMALL / name, small_cache / "data" / SMALL / name
        assert here.read_bytes() == there.read_bytes()
    asked = relay.data()
    assert {path for path, _ in asked} == {f"shards/{n}" for n in SHARDS} | {f"tokenizer/{n}" for n in TOKENIZER}
    resumed = [headers.get("Range", "") for path, headers in asked if path == f"shards/{SHARDS[0]}"]
    size = (small_cache / "data" / SMALL / SHARDS[0]).stat().st_size
    assert resumed == ["", f"bytes={size // 2}-"]
    own = json.loads((home / "mac" / "machine.json").read_text())["memberships"][relay.url]["token"]
    sent = {headers.get("Authorization") or headers.get("authorization") for _, headers in asked}
    assert sent == {f"Bearer {own}"}
    assert own != join
    assert not list(cache.rglob("*.tmp")) + list(cache.rglob("*.partial"))
    # The pickle that other tools expect lies here too, made here: the coordinator has none to give.
    (tokenizer,) = (cache / "tokenizer").iterdir()
    assert (tokenizer / "tokenizer.pkl").exists()


def test_the_coordinator_gives_out_no_pickle(campaign: Path, small_cache: Path) -> None:
    with served(campaign, env={"AUTORESEARCH_CACHE": str(small_cache)}) as (url, _):
        for name in ("tokenizer/tokenizer.pkl", "tokenizer/../tokenizer/tokenizer.pkl", "shards/%2e%2e/x"):
            assert httpx.get(f"{url}/api/v1/data/{name}").status_code == 404
        info = CoordinatorClient(url).campaign().data
        assert info is not None and info.tokenizer
        assert info.served == SHARDS


def test_a_machine_with_other_shards_is_refused_and_leaves_nothing_behind(
    campaign: Path, small_cache: Path, tmp_path: Path
) -> None:
    home, cache = tmp_path / "home", tmp_path / "other"
    shutil.copytree(small_cache / "data" / SMALL, cache / "data" / SMALL)
    shard = cache / "data" / SMALL / SHARDS[0]
    texts = pq.read_table(shard)["text"].to_pylist()
    pq.write_table(pa.table({"text": [text.replace("the", "a") for text in texts]}), shard)
    with served(campaign, env={"AUTORESEARCH_CACHE": str(small_cache)}) as (url, _):
        environment = {"AUTORESEARCH_CACHE": str(cache)}
        for _ in range(2):
            done = swarm("worker", url, "--name", "mac", "--home", home, cwd=tmp_path, **environment)
            assert done.returncode == 2, done.stdout + done.stderr
            (line,) = done.stderr.splitlines()
            assert re.match(r"swarm: prepare's digest here is [0-9a-f]{12}, the campaign's is [0-9a-f]{12}: ", line)
            assert str(cache) in line and repr(SMALL) in line
            (clone,) = [path for path in (home / "mac").iterdir() if path.is_dir()]
            assert not (clone / ".swarm").exists()
            assert not fast_task.git(clone, "for-each-ref", "refs/heads/autoresearch", "refs/attic")
            assert not fast_task.git(clone, "status", "--porcelain")
        client = CoordinatorClient(url)
        (machine,) = client.machines()
        assert machine.activity is not None and machine.activity.state == "failed"
        assert line.removeprefix("swarm: ") == machine.activity.note
        assert not client.branches()
        assert not client.experiments().experiments


def test_data_that_is_embedded_is_made_and_only_the_tokenizer_fetched(tmp_path: Path) -> None:
    home = tmp_path / "home"
    here, there = tmp_path / "here", tmp_path / "there"
    made = swarm("init", tmp_path / "study", "--profile", "tiny", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    with (
        served(tmp_path / "study", env={"AUTORESEARCH_CACHE": str(there)}) as (url, _),
        relayed(url) as relay,
        worker(relay.url, "mac", home, AUTORESEARCH_CACHE=str(here)) as process,
    ):
        until(lambda: digest_in(home)() or process.poll() is not None, "the digest", 120.0)
        assert digest_in(home)() == CoordinatorClient(url).campaign().digest
    assert {path for path, _ in relay.data()} == {f"tokenizer/{name}" for name in TOKENIZER}
