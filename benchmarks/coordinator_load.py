"""What one coordinator holds on this computer, the load generator included.

    python benchmarks/coordinator_load.py                     # all parts, on SQLite
    python benchmarks/coordinator_load.py --db postgres       # on a PostgreSQL that it starts itself
    python benchmarks/coordinator_load.py load --machines 1000 5000 10000 --seconds 60

load         N simulated machines over real HTTP and git: heartbeats at the interval that the coordinator asks for, a
             report every 420 s, a push every 16 reports or keep (one report in six). A connection for every request,
             as a worker's client has at these intervals. Response times of heartbeats and reports, and of pushes.
             The pushing gits, which would be on other computers, are niced; all else here competes as it is.
reports      complete reports per second, 16 at a time, for 20 s.
leaderboard  response times of the leaderboard with 1,000,000 stored experiments of 1,000 machines.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import fast_task  # noqa: E402
from tests.served import served  # noqa: E402

REPORT_S = 420.0  #: between a machine's reports: a run of 5 minutes, and what surrounds it
PUSH_EVERY = 16
KEEP_SHARE = 1 / 6
PUSHERS = 300  #: machines with a clone of their own; all pushes come from these
API = "/api/v1"


@dataclass
class Times:
    """Response times in seconds, and what went wrong."""

    taken: list[float] = field(default_factory=list)
    failed: int = 0

    def line(self, name: str, seconds: float) -> dict[str, Any]:
        if not self.taken:
            return {"what": name, "count": 0, "failed": self.failed}
        ranked = sorted(self.taken)
        return {
            "what": name,
            "count": len(ranked),
            "per_s": round(len(ranked) / seconds, 1),
            "p50_ms": round(1000 * statistics.median(ranked), 1),
            "p99_ms": round(1000 * ranked[min(int(0.99 * len(ranked)), len(ranked) - 1)], 1),
            "failed": self.failed,
        }


class Http:
    """Just enough of a client: the load must cost less than what it loads."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = str(parts.hostname), int(parts.port or 80)

    async def call(self, method: str, path: str, body: bytes = b"", headers: str = "") -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            return await self.on(reader, writer, method, path, body, headers + "Connection: close\r\n")
        finally:
            writer.close()

    async def on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        method: str,
        path: str,
        body: bytes,
        headers: str,
    ) -> tuple[int, bytes]:
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n{headers}\r\n".encode()
            + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head[9:12])
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        return status, await reader.readexactly(length)


@dataclass
class Machine:
    name: str
    token: str
    incarnation: int
    branch: str
    attic: str
    number: int = 0
    since_push: int = 0

    @property
    def headers(self) -> str:
        return f"Authorization: Bearer {self.token}\r\nSwarm-Incarnation: {self.incarnation}\r\n"


DIFF = "".join(
    f"--- a/train.py\n+++ b/train.py\n@@ -{n},7 +{n},7 @@\n context line\n-LR = 0.0{n}\n+LR = 0.1{n}\n context\n"
    for n in range(12)
)
LOG = "".join(f"step {n:05d} | progress {n}.0 | loss 3.{n:04d} | dt 320 ms | tok/s 1638400\n" for n in range(50))


def report(machine: Machine, kept: bool) -> bytes:
    """As large as a real one: a diff, a log tail, one run with phases and metrics."""
    score = random.gauss(1.0, 0.02)
    commit = f"{random.getrandbits(160):040x}"
    return json.dumps(
        {
            "version": 4 if kept else 3,
            "number": machine.number,
            "idea": str(uuid4()),
            "fingerprint": f"1:{commit[:32]}",
            "tested": commit,
            "parent": f"{random.getrandbits(160):040x}",
            "kept": f"{random.getrandbits(160):040x}" if kept else None,
            "description": "MATRIX_LR 0.04 -> 0.031; WEIGHT_DECAY 0.2 -> 0.13",
            "proposer": "search",
            "edits": {"MATRIX_LR": 0.031, "WEIGHT_DECAY": 0.13},
            "params": {f"CONSTANT_{n}": 0.1 * n for n in range(12)},
            "nodes_added": 0,
            "code_state": commit + commit[:24],
            "status": "keep" if kept or machine.number == 0 else "discard",
            "reason": "0.001200 better (+0.6 sigma)",
            "decided_at": int(time.time()),
            "runs": [
                {
                    "id": str(uuid4()),
                    "seed": 1,
                    "score": score,
                    "memory_gb": 44.0,
                    "seconds": 371.0,
                    "phases": {"start": 12.0, "compile": 60.0, "train": 300.0, "evaluate": 8.0},
                    "metrics": {f"metric_{n}": 1.5 * n for n in range(9)},
                }
            ],
            "diff": DIFF,
            "log_tail": LOG,
        }
    ).encode()


async def register(http: Http, count: int) -> list[Machine]:
    gate = asyncio.Semaphore(16)

    async def one(number: int) -> Machine:
        body = {
            "version": "0.1.0",
            "uid": str(uuid4()),
            "name": f"m{number}",
            "machine_class": ("cuda-h100", "mlx-m4max", "cpu")[number % 3],
        }
        async with gate:
            status, answer = await http.call("POST", f"{API}/machines", json.dumps(body).encode())
        assert status == 201, answer
        said = json.loads(answer)
        return Machine(said["machine"], said["token"], said["incarnation"], said["branch"], said["attic"])

    return list(await asyncio.gather(*(one(number) for number in range(count))))


class Pushers:
    """Real clones with real commits, made before the clock starts."""

    def __init__(self, folder: Path, url: str, machines: list[Machine], pushes: int) -> None:
        self._url, self._folder = url, folder
        self._ready: list[tuple[Machine, Path, str, str]] = []
        source = folder / "source"
        repository = f"{url}/git/fast.git"
        subprocess.run(["git", "clone", "--quiet", "--bare", repository, str(source)], check=True)
        self.repository = repository
        base = fast_task.git(source, "rev-parse", "main")
        text = (fast_task.git(source, "show", "main:train.py") + "\n").encode()
        for number in range(pushes):
            machine = machines[number % len(machines)]
            place = folder / machine.name
            if not place.exists():
                subprocess.run(["git", "clone", "--quiet", "--bare", "--shared", str(source), str(place)], check=True)
            kept, link = self._commits(place, machine, base, text + b"# %d\n" % number)
            self._ready.append((machine, place, kept, link))
        self._ready.reverse()

    @staticmethod
    def _commits(place: Path, machine: Machine, base: str, text: bytes) -> tuple[str, str]:
        """A keep on the branch and 16 attempts in the attic, as `Workspace` makes them."""

        def run(*arguments: str, data: bytes = b"") -> str:
            identity = ["-c", "user.name=m", "-c", "user.email=m@swarm"]
            done = subprocess.run(
                ["git", *identity, *arguments], cwd=place, input=data, check=True, capture_output=True
            )
            return done.stdout.decode().strip()

        def resolve(ref: str) -> str:
            found = subprocess.run(
                ["git", "rev-parse", "-q", "--verify", ref], cwd=place, capture_output=True, check=False
            )
            return found.stdout.decode().strip() or base

        branch, previous = resolve(machine.branch), resolve(machine.attic)
        tree = run("ls-tree", base)
        kept = branch
        for attempt in range(2):
            blob = run("hash-object", "-w", "--stdin", data=text + b"# try %d\n" % attempt)
            lines = [
                f"100644 blob {blob}\ttrain.py" if line.endswith("\ttrain.py") else line for line in tree.split("\n")
            ]
            made = run("mktree", data=("\n".join(lines) + "\n").encode())
            message = f"experiment: push\n\nExperiment-Id: {uuid4()}"
            tested = run("commit-tree", made, "-p", branch, "-m", message)
            previous = run("commit-tree", made, "-p", previous, "-p", tested, "-m", "attic: push")
            kept = tested
        run("update-ref", machine.branch, kept)
        run("update-ref", machine.attic, previous)
        return kept, previous

    async def push(self, times: Times) -> None:
        if not self._ready:
            times.failed += 1
            return
        machine, place, kept, link = self._ready.pop()
        credentials = base64.b64encode(f"swarm:{machine.token}".encode()).decode()
        environment = {
            **os.environ,
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "http.extraHeader",
            "GIT_CONFIG_VALUE_0": f"Authorization: Basic {credentials}",
        }
        refs = [f"{kept}:{machine.branch}", f"{link}:{machine.attic}"]
        started = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *("nice", "git", "push", "--quiet", "--atomic", self.repository, *refs), cwd=place, env=environment
        )
        if await process.wait():
            times.failed += 1
        times.taken.append(time.monotonic() - started)


async def load(url: str, count: int, seconds: float, folder: Path) -> dict[str, Any]:
    http = Http(url)
    started = time.monotonic()
    machines = await register(http, count)
    registering = time.monotonic() - started
    beats, reports, pushes = Times(), Times(), Times()
    expected = int(count / REPORT_S * seconds * (KEEP_SHARE + 1 / PUSH_EVERY) * 1.5) + 20
    pushers = Pushers(folder, url, machines[:PUSHERS], expected)
    over = asyncio.Event()
    asked = [0.0]

    async def timed(times: Times, *call: Any) -> bytes:
        began = time.monotonic()
        try:
            status, answer = await http.call(*call)
            times.failed += status not in (200, 201)
        except (OSError, asyncio.IncompleteReadError):
            times.failed += 1
            answer = b"{}"
        times.taken.append(time.monotonic() - began)
        return answer

    async def beat(machine: Machine) -> None:
        body = json.dumps({"activity": {"state": "running", "step": 100, "share": 0.4, "loss": 3.1}}).encode()
        wait = random.uniform(0, max(10.0, count / 100))
        while not await _waited(over, wait):
            answer = await timed(beats, "POST", f"{API}/machines/self/heartbeat", body, machine.headers)
            wait = asked[0] = float(json.loads(answer).get("next_s", 10.0))

    async def work(machine: Machine) -> None:
        wait = random.uniform(0, REPORT_S)
        while not await _waited(over, wait):
            kept = machine.number == 0 or random.random() < KEEP_SHARE
            await timed(
                reports, "PUT", f"{API}/machines/self/experiments/{uuid4()}", report(machine, kept), machine.headers
            )
            machine.number += 1
            machine.since_push += 1
            if kept or machine.since_push >= PUSH_EVERY:
                machine.since_push = 0
                await pushers.push(pushes)
            wait = REPORT_S

    for machine in machines:
        machine.number = random.randint(0, 30)
        machine.since_push = random.randint(0, PUSH_EVERY - 1)
    tasks = [asyncio.create_task(job(machine)) for machine in machines for job in (beat, work)]
    began = time.monotonic()
    await asyncio.sleep(seconds)
    over.set()
    await asyncio.gather(*tasks)
    took = time.monotonic() - began
    both = Times(beats.taken + reports.taken, beats.failed + reports.failed)
    return {
        "machines": count,
        "registered_per_s": round(count / registering, 1),
        "heartbeat_every_s": round(asked[0], 1),
        "parts": [
            both.line("heartbeats and reports", took),
            beats.line("heartbeats", took),
            reports.line("reports", took),
            pushes.line("pushes", took),
        ],
    }


async def _waited(over: asyncio.Event, seconds: float) -> bool:
    """True when it is over."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(over.wait(), seconds)
    return over.is_set()


async def throughput(url: str, seconds: float, at_once: int = 16) -> dict[str, Any]:
    http = Http(url)
    machines = await register(http, at_once)
    times = Times()
    until = time.monotonic() + seconds

    async def work(machine: Machine) -> None:
        reader, writer = await asyncio.open_connection(http.host, http.port)
        while time.monotonic() < until:
            body = report(machine, machine.number % 6 == 0)
            path = f"{API}/machines/self/experiments/{uuid4()}"
            began = time.monotonic()
            status, _ = await http.on(reader, writer, "PUT", path, body, machine.headers)
            times.taken.append(time.monotonic() - began)
            times.failed += status != 200
            machine.number += 1
        writer.close()

    began = time.monotonic()
    await asyncio.gather(*(work(machine) for machine in machines))
    return times.line("complete reports", time.monotonic() - began)


def fill(database: str, experiments: int, machines: int) -> None:
    """Rows as reports leave them, written in bulk, then the standings made from them."""
    from sqlalchemy import func, insert, select

    from coordinator import tables
    from coordinator.store import Store

    store = Store(database)
    with store.read() as connection:
        known = [row.id for row in connection.execute(select(tables.Machine.id))][:machines]
        position = connection.execute(select(func.max(tables.Experiment.position))).scalar() or 0
    each = experiments // len(known)
    draw = random.Random(1)
    for machine in known:
        rows, details = [], []
        level = 1.0 + draw.uniform(0, 0.4)
        for number in range(each):
            position += 1
            kept = number % 6 == 0
            level -= 0.002 if kept else 0.0
            commit = f"{draw.getrandbits(160):040x}"
            rows.append(
                {
                    "position": position, "id": UUID(int=draw.getrandbits(128)), "version": 4, "machine_id": machine,
                    "number": number, "kind": "explore", "idea": UUID(int=draw.getrandbits(128)), "profile": "default",
                    "rung": "base", "status": "keep" if kept else "discard", "score": level, "mean": level,
                    "squares": 0.00001 if number % 24 == 0 else 0.0, "scored": 2 if number % 24 == 0 else 1, "runs": 1,
                    "memory_gb": 44.0, "seconds": 371.0, "tested": commit, "parent": commit,
                    "kept": commit if kept else None, "description": "MATRIX_LR 0.04 -> 0.031", "proposer": "search",
                    "reason": "0.0012 better", "confirmed": False, "suspect": False, "cleared": False, "pruned": False,
                    "decided_at": 1, "received_at": 1,
                }
            )  # fmt: skip
            details.append(
                {
                    "position": position, "fingerprint": "", "code_state": commit, "nodes_added": 0, "digest": None,
                    "edits": {"MATRIX_LR": 0.031}, "params": {}, "diff": None, "log_tail": None,
                }
            )  # fmt: skip

        def job(t: Any, rows: list[Any] = rows, details: list[Any] = details) -> None:
            t.connection.execute(insert(tables.Experiment), rows)
            t.connection.execute(insert(tables.Detail), details)

        store.writer.call(job)
    store.standings.rebuild()
    store.close()


async def leaderboard(url: str, requests: int) -> list[dict[str, Any]]:
    http = Http(url)
    lines = []
    for name, query in (
        ("leaderboard, 100 of its lines", "limit=100"),
        ("leaderboard across classes", "order=sigmas&limit=100"),
        ("leaderboard of one class", "machine_class=cpu&limit=100"),
    ):
        times = Times()
        began = time.monotonic()
        for _ in range(requests):
            started = time.monotonic()
            status, _ = await http.call("GET", f"{API}/leaderboard?{query}")
            times.taken.append(time.monotonic() - started)
            times.failed += status != 200
        lines.append(times.line(name, time.monotonic() - began))
    return lines


@contextlib.contextmanager
def database(kind: str) -> Iterator[str | None]:
    if kind == "sqlite":
        yield None
        return
    from tests.postgres import Server

    server = Server(fsync=True)
    try:
        yield server.database()
    finally:
        server.remove()


def show(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        if line["count"]:
            print(
                f"  {line['what']:<32} {line['count']:>7}  {line['per_s']:>8}/s  p50 {line['p50_ms']:>7} ms  "
                f"p99 {line['p99_ms']:>7} ms  failed {line['failed']}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=["load", "reports", "leaderboard", []], default=[])
    parser.add_argument("--machines", type=int, nargs="+", default=[1000, 5000, 10000])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--experiments", type=int, default=1_000_000)
    parser.add_argument("--db", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    parts = arguments.part or ["load", "reports", "leaderboard"]
    found: dict[str, Any] = {"db": arguments.db}
    failed = 0
    if "load" in parts:
        found["load"] = []
        for count in arguments.machines:
            with tempfile.TemporaryDirectory() as temporary, database(arguments.db) as url:
                folder = fast_task.make(Path(temporary) / "task")
                options = ["--db", url] if url else []
                with served(folder, *options) as (address, _):
                    seen = asyncio.run(load(address, count, arguments.seconds, Path(temporary)))
                found["load"].append(seen)
                failed += sum(line["failed"] for line in seen["parts"])
                if not arguments.json:
                    print(
                        f"{count} machines on {arguments.db}, heartbeat every {seen['heartbeat_every_s']} s, "
                        f"registered {seen['registered_per_s']}/s"
                    )
                    show(seen["parts"])
    if "reports" in parts:
        with tempfile.TemporaryDirectory() as temporary, database(arguments.db) as url:
            folder = fast_task.make(Path(temporary) / "task")
            with served(folder, *(["--db", url] if url else [])) as (address, _):
                found["reports"] = asyncio.run(throughput(address, 20.0))
            failed += found["reports"]["failed"]
            if not arguments.json:
                print(f"reports on {arguments.db}")
                show([found["reports"]])
    if "leaderboard" in parts:
        with tempfile.TemporaryDirectory() as temporary, database(arguments.db) as url:
            folder = fast_task.make(Path(temporary) / "task")
            options = ["--db", url] if url else []
            with served(folder, *options) as (address, _):
                asyncio.run(register(Http(address), 1000))
            fill(url or f"sqlite:///{folder}/.swarm/coordinator/swarm.sqlite", arguments.experiments, 1000)
            with served(folder, *options) as (address, _):
                found["leaderboard"] = asyncio.run(leaderboard(address, 300))
            failed += sum(line["failed"] for line in found["leaderboard"])
            if not arguments.json:
                print(f"{arguments.experiments} experiments of 1000 machines on {arguments.db}")
                show(found["leaderboard"])
    if arguments.json:
        print(json.dumps(found))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
