"""`swarm demo`: a coordinator, a local Ray with three machines, a few minutes of research; then the leaderboard."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from shared import wire
from shared.client import Away, CoordinatorClient
from shared.errors import SwarmError
from worker import campaign as campaigns
from worker.results import plain

from . import fleet, leaderboard
from .serving import PORT

MACHINES = ("demo-1", "demo-2", "demo-3")
START_S = 300.0  #: for the coordinator to answer; the first time it packs the data
STYLE = {"keep": "green", "crash": "red", "timeout": "red"}


def demo(minutes: float, console: Console) -> None:
    """Leaves the campaign's folder behind, so that its results can be looked at. Raises SwarmError when it fails."""
    folder = Path(tempfile.mkdtemp(prefix="swarm-demo-"))
    campaign = campaigns.create(folder / "demo", "tiny", "torch", "sotu")
    log = folder / "coordinator.log"
    with _coordinator(campaign.folder, log) as url:
        console.print(f"coordinator  {url}/api/v1/leaderboard  (its log: {log})")
        client = CoordinatorClient(url)
        plan = fleet.Plan(url, None, home=folder / "machines", slots=1, cpus=0.5)
        with fleet.local(MACHINES, num_cpus=1), _told(client, console):
            nodes = fleet.up(plan, lambda line: console.print(Text(line, style="dim")))
            console.print(
                f"machines     {', '.join(node.host for node in nodes)}, placed by Ray; logs {plan.home}/logs"
            )
            _until_baselines(client, START_S)
            console.print(f"every machine has its baseline; {minutes:g} minutes of research from here")
            time.sleep(minutes * 60)
            fleet.down(lambda line: console.print(Text(line, style="dim")))
        board = client.leaderboard()
        console.print(Text(leaderboard.to_text(board).rstrip()), soft_wrap=True)
        tried = sum(standing.experiments for standing in board.standings)
        repository = client.campaign().repository
        console.print(f"{tried} experiments; each machine's branch on the hub:")
        for branch in client.branches():
            console.print(f"  {branch.ref.removeprefix('refs/heads/')}  {branch.commit[:7]}")
    console.print(f"the coordinator has stopped; look again: swarm serve {campaign.folder}", soft_wrap=True)
    console.print(f"and then: swarm leaderboard; git clone http://127.0.0.1:{PORT}{repository}", soft_wrap=True)


@contextmanager
def _coordinator(folder: Path, log: Path) -> Iterator[str]:
    """`swarm serve` as a process of its own; yields its address."""
    command = [sys.executable, "-m", "coordinator.cli", "serve", str(folder), "--port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        until = time.monotonic() + START_S
        while not (found := re.search(r"(https?://\S+)\s*$", log.read_text(), re.MULTILINE)):
            if process.poll() is not None or time.monotonic() > until:
                raise SwarmError(f"the coordinator did not start: {log.read_text().strip()[-500:]}")
            time.sleep(0.1)
        yield found[1]
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _told(client: CoordinatorClient, console: Console) -> Iterator[None]:
    """Prints experiments as they come."""
    over = threading.Event()

    def follow() -> None:
        with contextlib.suppress(Away):
            for event in client.events(0):
                if over.is_set():
                    return
                if event.kind == "experiment":
                    console.print(line_of(event), soft_wrap=True)

    threading.Thread(target=follow, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def line_of(event: wire.Event) -> Text:
    """One experiment, as it came, on one line."""
    data = event.data
    score = f"{data['score']:.6f}" if data.get("score") is not None else "-"
    status = str(data.get("status"))
    words = f"{event.machine or '-':<10} {data.get('number'):>4}  {score:>10}  {status:<8} {plain(data['description'])}"
    return Text(words, style=STYLE.get(status, "dim"))


def _until_baselines(client: CoordinatorClient, patience_s: float) -> None:
    until = time.monotonic() + patience_s
    while sum(standing.best is not None for standing in client.leaderboard().standings) < len(MACHINES):
        if time.monotonic() > until:
            raise SwarmError(f"not every machine had its baseline after {patience_s:.0f} s; their logs say why")
        time.sleep(0.5)
