"""What the loop itself costs an experiment: wall time less the run, with a no-op command and a trivial proposer.

    python benchmarks/loop_overhead.py --experiments 2000

Real git, real journal, real processes. The no-op command's own time (measured beside it) is subtracted. `search` is
timed apart, on the same history. Prints medians over the windows around experiment 100 and at the end, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from shared.task import load_task
from tests import fast_task
from worker.campaign import Campaign
from worker.journal import Experiment
from worker.loop import Screen
from worker.machine import detect
from worker.proposers import Proposal
from worker.proposers.search import Search
from worker.runner import Progress
from worker.setup import Setup, locked
from worker.workspace import Files

NOOP = "echo 'val_bpb: 1.0' > run.log"


class Counting:
    """Writes another number each time: the cheapest new idea there is."""

    name = "counting"

    def params(self, files: Files) -> dict[str, object]:
        return {}

    def propose(self, files: Files, history: Sequence[Experiment]) -> Proposal:
        number = len(history)
        return Proposal(f"number {number}", {"train.py": files["train.py"] + f"# {number}\n"}, self.name)


class Stopwatch(Screen):
    """Notes when each verdict is in."""

    def __init__(self) -> None:
        self.at = [time.perf_counter()]

    def started(self, experiment: Experiment) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def note(self, text: str) -> None: ...
    def decided(self, experiment: Experiment, standing: object) -> None:
        self.at.append(time.perf_counter())


def command_alone(folder: Path) -> float:
    times = []
    for _ in range(200):
        began = time.perf_counter()
        subprocess.run(["/bin/sh", "-c", NOOP], cwd=folder, check=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        config = fast_task.CONFIG.replace("sh score.sh > run.log 2>&1", "echo 'val_bpb: 1.0'")
        config = config.replace("eval_command: \"grep '^val_bpb:' run.log\"\n", "")
        # every score is equal; the plain rule never reruns HEAD, so each verdict is one run
        folder = fast_task.make(Path(temporary) / "task", config + "ratchet: {policy: strict}\n")
        campaign = Campaign.open(folder)
        alone = command_alone(folder)
        watch = Stopwatch()
        setup = Setup(campaign, replace(detect(), name="bench"), "overhead")
        with locked(setup.state):
            loop = setup.loop(Counting(), watch, threading.Event(), lambda *_: None)
            loop.establish()
            loop.go(arguments.experiments)
        spent = [after - before - alone for before, after in zip(watch.at, watch.at[1:], strict=False)]
        early, late = statistics.median(spent[50:150]), statistics.median(spent[-100:])
        print(f"the command alone {alone * 1e3:.1f} ms; {len(spent)} experiments")
        print(
            f"overhead, all: median {statistics.median(spent):.3f} s, p95 {sorted(spent)[int(0.95 * len(spent))]:.3f} s"
        )
        print(f"around experiment 100: {early:.3f} s; last 100: {late:.3f} s; ratio {late / early:.2f}")

        search = Search(load_task(folder), seed=1)
        history = [replace(e, params=search.params({"train.py": fast_task.TRAIN})) for e in setup.journal.experiments]
        for count in (100, len(history)):
            times = []
            for _ in range(10):
                began = time.perf_counter()
                search.propose({"train.py": fast_task.TRAIN}, history[:count])
                times.append(time.perf_counter() - began)
            print(f"search, one proposal after {count} experiments: median {statistics.median(times):.3f} s")


if __name__ == "__main__":
    main()
