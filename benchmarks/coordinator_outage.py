"""Kills the coordinator with SIGKILL under busy workers, and takes it away for a while; counts what is lost or doubled.

    python benchmarks/coordinator_outage.py --kills 20 --away 60

Four real workers on a fast task, a real coordinator with its SQLite database and hub, all over loopback. In the end
every decided experiment of every machine's journal must be in the database exactly once at its latest version, every
kept commit on the hub, and no worker may have stopped. Exit 1 when a count is not 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from uuid import UUID

import httpx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import fast_task  # noqa: E402
from worker.journal import Journal  # noqa: E402


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def swarm(*arguments: str, log: Path, **more: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "coordinator.cli", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), **more},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=1).status_code == 200
    except httpx.HTTPError:
        return False


def wait(what: str, condition: object, patience_s: float = 60.0) -> None:
    until = time.monotonic() + patience_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > until:
            raise SystemExit(f"waited {patience_s:.0f} s for {what}")
        time.sleep(0.05)


def check(folder: Path, home: Path, names: list[str]) -> tuple[dict[str, int], int, int]:
    """(counts of what must not be, experiments decided, keeps)."""
    database = sqlite3.connect(folder / ".swarm" / "coordinator" / "swarm.sqlite")
    query = "SELECT e.id, e.version, m.name FROM experiments e JOIN machines m ON m.id = e.machine_id"
    rows = [(str(UUID(identity)), version, name) for identity, version, name in database.execute(query)]
    stored = {identity: (version, name) for identity, version, name in rows}
    hub = folder / ".swarm" / "coordinator" / "hub.git"
    counts = {"experiments lost": 0, "at an older version": 0, "keeps not on the hub": 0, "attempts not on the hub": 0}
    counts["experiments doubled"] = len(rows) - len(stored)
    mine: set[str] = set()
    keeps = 0
    for name in names:
        (state,) = (home / name).glob("*/.swarm/*")
        journal = Journal(state / "journal.jsonl")
        tips = fast_task.git(hub, "for-each-ref", "--format=%(objectname)", f"refs/heads/{journal.setup['branch']}")
        branch = set(fast_task.git(hub, "rev-list", *tips.split()).split()) if tips else set()
        attic = fast_task.git(hub, "rev-list", f"refs/attic/{name}").split()
        for experiment in journal.experiments:
            if experiment.status is None:
                continue
            mine.add(experiment.id)
            version, owner = stored.get(experiment.id, (0, ""))
            counts["experiments lost"] += owner != name
            counts["at an older version"] += bool(owner) and version < experiment.version
            counts["attempts not on the hub"] += experiment.tested not in attic
            if experiment.kept:
                keeps += 1
                counts["keeps not on the hub"] += experiment.kept not in branch
    counts["experiments from nowhere"] = len(set(stored) - mine)
    return counts, len(mine), keeps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--away", type=float, default=60.0, help="seconds without a coordinator, once")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        folder, home, log = fast_task.make(place / "task"), place / "home", place / "log"
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        names = [f"m{number}" for number in range(arguments.workers)]

        def serve() -> subprocess.Popen[bytes]:
            process = swarm("serve", str(folder), "--port", str(port), log=log)
            wait("the coordinator", lambda: answers(url) or process.poll() is not None)
            if process.poll() is not None:
                raise SystemExit(f"the coordinator ended with {process.returncode}:\n{log.read_text()[-2000:]}")
            return process

        def journals() -> int:
            return sum(path.stat().st_size for path in home.glob("*/*/.swarm/*/journal.jsonl"))

        coordinator = serve()
        workers = [
            swarm("worker", url, "--name", name, "--home", str(home), log=place / f"{name}.log", NAP="0.05")
            for name in names
        ]
        try:
            wait("all baselines", lambda: len(list(home.glob("*/*/.swarm/*/journal.jsonl"))) == len(names))
            stood_still = 0
            for kill in range(arguments.kills):
                time.sleep(draw.uniform(0.0, 2.5))
                coordinator.send_signal(signal.SIGKILL)
                coordinator.wait()
                if kill == arguments.kills // 2:
                    before = journals()
                    time.sleep(arguments.away)
                    stood_still += journals() == before
                coordinator = serve()
            time.sleep(2)
            stopped = sum(worker.poll() is not None for worker in workers)
            for worker in workers:
                worker.send_signal(signal.SIGINT)
            codes = [worker.wait(90) for worker in workers]
        finally:
            for process in (*workers, coordinator):
                if process.poll() is None:
                    process.send_signal(signal.SIGINT if process is coordinator else signal.SIGKILL)
                    process.wait(30)
        counts, decided, keeps = check(folder, home, names)
        counts["workers stopped"] = stopped
        counts["workers that ended badly"] = sum(code != 0 for code in codes)
        counts["stood still while it was away"] = stood_still
        if any(counts.values()):
            for name in names:
                print((place / f"{name}.log").read_text()[-1500:], file=sys.stderr)
    if arguments.json:
        print(json.dumps({"kills": arguments.kills, "decided": decided, "keeps": keeps, **counts}))
    else:
        print(f"{arguments.kills} kills and {arguments.away:.0f} s away: {decided} experiments decided, {keeps} kept")
        for name, count in counts.items():
            print(f"{name}: {count}")
    return int(any(counts.values()))


if __name__ == "__main__":
    sys.exit(main())
