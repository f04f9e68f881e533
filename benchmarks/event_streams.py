"""A thousand listeners on one coordinator: does it still answer, and does each get every event exactly once?

    python benchmarks/event_streams.py --clients 1000 --rate 10 --seconds 15

A real `swarm serve` and real sockets on this computer, so the load of the clients is part of the figures. Some clients
leave at random moments and come back with Last-Event-ID; some never read, and must be dropped and gone. Meanwhile a
process of its own asks for /healthz. Ends with exit code 1 where an event was missed or doubled.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import random
import re
import resource
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent))

from shared import wire
from shared.client import CoordinatorClient
from tests import fast_task
from tests.served import served

ASK_EVERY_S = 0.02
PRELOAD = 1300  #: events of 2.3 KB: the kernel takes some 2.3 MB for a client that never reads before it stalls
PATIENCE_S = 30.0  #: for what must come about at the end
POSITION = re.compile(rb"^id: (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Figures:
    clients: int
    events: int
    expected: int  #: deliveries, of all clients together
    delivered: int
    missed_or_doubled: int
    reconnects: int
    slow: int
    slow_dropped: int
    healthz_idle_p50_ms: float
    healthz_idle_p99_ms: float
    healthz_p50_ms: float
    healthz_p99_ms: float
    healthz_asked: int
    deliveries_per_s: float


@dataclass
class Listener(asyncio.Protocol):
    """One client: where it stands, and how often an event was not the next one."""

    host: str
    after: int
    wrong: int = 0
    got: int = 0
    rest: bytes = b""
    transport: asyncio.Transport | None = None
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.rest = transport, b""
        transport.write(request(self.host, self.after))

    def data_received(self, data: bytes) -> None:
        whole, found, self.rest = (self.rest + data).rpartition(b"\n\n")
        if found:
            self.opened.set()
            for position in map(int, POSITION.findall(whole + found)):
                self.wrong += position != self.after + 1
                self.after = position
                self.got += 1


def request(host: str, after: int) -> bytes:
    return f"GET {wire.API}/events HTTP/1.1\r\nHost: {host}\r\nLast-Event-ID: {after}\r\n\r\n".encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=10.0, help="reports a second")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long reports come")
    parser.add_argument("--slow", type=int, default=20, help="clients that never read")
    parser.add_argument("--reconnects", type=int, default=50)
    parser.add_argument("--json", action="store_true", dest="as_json")
    parser.add_argument("--ask", metavar="URL", help=argparse.SUPPRESS)  # the process that asks for /healthz
    options = parser.parse_args()
    if options.ask:
        ask(options.ask)
        return
    wanted = options.clients + options.slow + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted if hard == -1 else min(wanted, hard)), hard))
    with tempfile.TemporaryDirectory(prefix="swarm-events-") as folder:
        campaign = fast_task.make(Path(folder) / "campaign")
        with served(campaign) as (url, _):
            figures = asyncio.run(measure(url, options))
    if options.as_json:
        print(json.dumps(asdict(figures)))
    else:
        for name, value in asdict(figures).items():
            print(f"{name.replace('_', ' '):<24}{value:>12,}")
    sys.exit(bool(figures.missed_or_doubled or figures.delivered != figures.expected))


async def measure(url: str, options: argparse.Namespace) -> Figures:
    host = urlsplit(url).netloc
    client = CoordinatorClient(url)
    client.register(wire.Registration(version="0", uid=uuid.uuid4(), name="source", machine_class="cpu"))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: send(client, number, "x" * 2000), range(PRELOAD)))
    start = client.last_event()
    idle = await asked(url, 3.0)

    listeners = [Listener(host, start) for _ in range(options.clients)]
    for first in range(0, len(listeners), 100):
        await asyncio.gather(*(connect(listener) for listener in listeners[first : first + 100]))
    slow = [stalled(host) for _ in range(options.slow)]

    asking = asyncio.create_task(asked(url, options.seconds))
    leaving = asyncio.create_task(leave_and_return(listeners, options.reconnects, options.seconds))
    began = time.perf_counter()
    for number in range(round(options.rate * options.seconds)):
        await asyncio.sleep(max(0.0, began + number / options.rate - time.perf_counter()))
        await asyncio.to_thread(send, client, PRELOAD + number, "one more")
    await leaving
    busy = await asking
    end = client.last_event()
    await until(lambda: all(listener.after >= end for listener in listeners))
    took = time.perf_counter() - began
    delivered = sum(listener.got for listener in listeners)
    await until(lambda: dropped(client) >= len(slow))
    for connection in slow:
        connection.close()
    return Figures(
        clients=len(listeners),
        events=end - start,
        expected=(end - start) * len(listeners),
        delivered=delivered,
        missed_or_doubled=sum(listener.wrong for listener in listeners),
        reconnects=options.reconnects,
        slow=len(slow),
        slow_dropped=dropped(client),
        healthz_idle_p50_ms=percentile(idle, 50),
        healthz_idle_p99_ms=percentile(idle, 99),
        healthz_p50_ms=percentile(busy, 50),
        healthz_p99_ms=percentile(busy, 99),
        healthz_asked=len(busy),
        deliveries_per_s=round(delivered / took),
    )


def send(client: CoordinatorClient, number: int, words: str) -> None:
    report = wire.ExperimentReport(
        version=1,
        number=number,
        idea=uuid.uuid4(),
        tested="a" * 40,
        parent="b" * 40,
        description=words,
        status=wire.Status.DISCARD,
        decided_at=int(time.time()),
        runs=(wire.RunReport(id=uuid.uuid4(), seed=number, score=1.5),),
    )
    client.report(uuid.uuid4(), report)


async def connect(listener: Listener) -> None:
    name, _, port = listener.host.partition(":")
    listener.opened.clear()
    await asyncio.get_running_loop().create_connection(lambda: listener, name, int(port))
    await asyncio.wait_for(listener.opened.wait(), PATIENCE_S)


async def leave_and_return(listeners: list[Listener], times: int, seconds: float) -> None:
    began = time.perf_counter()
    for moment in sorted(random.uniform(0, seconds) for _ in range(times)):
        await asyncio.sleep(max(0.0, began + moment - time.perf_counter()))
        listener = random.choice(listeners)
        assert listener.transport is not None
        listener.transport.abort()
        await connect(listener)


def stalled(host: str) -> socket.socket:
    """Asks for everything there ever was, with little room for it, and reads nothing."""
    name, _, port = host.partition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((name, int(port)))
    connection.sendall(request(host, 0))
    return connection


async def asked(url: str, seconds: float) -> list[float]:
    """Milliseconds of each /healthz, seen by another process."""
    script = [sys.executable, __file__, "--ask", url]
    process = await asyncio.create_subprocess_exec(*script, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    await asyncio.sleep(seconds)
    said, _ = await process.communicate(b"enough")
    return [float(line) for line in said.split()]


def ask(url: str) -> None:
    """Asks until something comes on stdin."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    while not select.select([sys.stdin], [], [], ASK_EVERY_S)[0]:
        began = time.perf_counter()
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
        print((time.perf_counter() - began) * 1000)


def dropped(client: CoordinatorClient) -> int:
    """As /metrics counts them."""
    connection = http.client.HTTPConnection(urlsplit(client.url).netloc, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    found = re.search(r"^swarm_listeners_dropped_total (\S+)$", text, re.MULTILINE)
    return int(float(found[1])) if found else 0


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and not condition():
        await asyncio.sleep(0.05)


def percentile(values: list[float], which: int) -> float:
    return round(statistics.quantiles(values, n=100, method="inclusive")[which - 1], 2)


if __name__ == "__main__":
    main()
