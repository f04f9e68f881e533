"""Kills `swarm run` with SIGKILL at random moments and restarts it; counts what is lost or doubled.

    python benchmarks/kill_restart.py --kills 50

A fast task (milliseconds a run), real git, real processes; the first kills hit the first set-up. After each kill it
restarts the worker; in the end it lets it finish one experiment and checks: every decided experiment of the journal
stands in results.tsv exactly once, HEAD is the last keep, no process of a run is left, every tested commit is
reachable. Exit 1 when a count is not 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import fast_task  # noqa: E402


def swarm(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "coordinator.cli", *arguments, "--dir", str(folder)]


def survivors(worktree: Path) -> int:
    count = 0
    for process in psutil.process_iter():
        try:
            count += process.environ().get("SWARM_WORKTREE") == str(worktree)
        except psutil.Error:
            continue
    return count


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def check(folder: Path, state: Path) -> dict[str, int]:
    """Counts of what must not be; all 0 when the state is right."""
    events = [json.loads(line) for line in (state / "journal.jsonl").read_text().splitlines()]
    experiments = {e["id"]: e for e in events if e["event"] == "experiment"}
    decided = [e["experiment"] for e in events if e["event"] == "decision"]
    kept = [e["commit"] for e in events if e["event"] == "kept"]
    rows = (state / "work" / "results.tsv").read_text().splitlines()[1:]
    commits = Counter(row.split("\t")[0] for row in rows)
    expected = Counter(experiments[identity]["tested"][:7] for identity in decided)
    attic = fast_task.git(folder, "rev-list", f"refs/attic/{events[0]['machine']}").split()
    head = fast_task.git(state / "work", "rev-parse", "HEAD")
    log = fast_task.git(folder, "log", "--format=%H", "main.." + events[0]["branch"]).split()
    return {
        "rows lost": sum((expected - commits).values()),
        "rows doubled": sum((commits - expected).values()),
        "decided twice": len(decided) - len(set(decided)),
        "head is not the last keep": int(head != kept[-1]),
        "keeps missing on the branch": int(log[::-1] != kept),
        "tested commits unreachable": sum(e["tested"] not in attic for e in experiments.values()),
        "processes left": survivors(state / "work"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = fast_task.make(Path(temporary) / "task")
        environment = {**os.environ, "NAP": "0.05", "PYTHONPATH": str(ROOT)}
        one = swarm(folder, "run", "--yes", "--name", "bench", "--tag", "kill", "--experiments", "1")
        state = folder / ".swarm" / "kill-bench"
        journal = state / "journal.jsonl"
        for kill in range(arguments.kills):
            worker = subprocess.Popen(
                [part for part in one if part not in ("--experiments", "1")],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
            )
            before = size_of(journal)
            patience = time.monotonic() + 60
            if kill % 2:  # anywhere, also while it starts and picks up what the last kill left
                time.sleep(draw.uniform(0, 1.5))
            while not kill % 2 and size_of(journal) == before and time.monotonic() < patience:
                time.sleep(0.01)  # it is at work once the journal grows
            time.sleep(0 if kill % 2 else draw.uniform(0, 0.6))
            worker.send_signal(signal.SIGKILL)
            if worker.wait() != -signal.SIGKILL:
                print(f"kill {kill}: the worker had ended by itself with {worker.returncode}")
                return 1
        subprocess.run(one, env=environment, check=True, stdout=subprocess.DEVNULL)
        counts = check(folder, state)
        events = [json.loads(line)["event"] for line in (state / "journal.jsonl").read_text().splitlines()]
    finished = Counter(events)
    print(
        f"{arguments.kills} kills, {finished['decision']} experiments decided, {finished['kept']} kept, "
        f"{finished['void']} runs in progress when killed and made again"
    )
    for name, count in counts.items():
        print(f"{name}: {count}")
    return int(any(counts.values()))


if __name__ == "__main__":
    sys.exit(main())
