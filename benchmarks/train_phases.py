"""Runs a train template once per seed, outside any loop, and prints where the seconds go.

    python benchmarks/train_phases.py --profile h100 --data techdocs --budget 60 --seeds 42,43
    python benchmarks/train_phases.py --profile h100 --data techdocs --steps 199 --seeds 42

Needs only what train.py needs (no package of ours but prepare). The rows must have been made with `python -m prepare`
or `swarm prepare`; the cache is AUTORESEARCH_CACHE. Phases are measured from outside, by watching the record.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def one_run(folder: Path, environment: dict[str, str], log: Path) -> dict[str, object]:
    record = folder / "record.jsonl"
    record.touch()
    seen: dict[str, float] = {}
    with log.open("w") as output, record.open() as events:
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "train.py"],
            cwd=folder,
            env={**environment, "SWARM_RECORD": str(record)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while True:
            ended = process.poll() is not None
            for line in events:
                seen.setdefault(json.loads(line)["event"], time.monotonic() - began)
            if ended:
                break
            time.sleep(0.02)
    seen["end"] = time.monotonic() - began
    record.unlink()
    marks = [("start_s", "batch", None), ("compile_s", "clock", "batch"), ("train_s", "evaluate", "clock")]
    marks += [("evaluate_s", "result", "evaluate"), ("exit_s", "end", "result")]
    phases = {
        name: round(seen[to] - (seen[since] if since else 0.0), 2)
        for name, to, since in marks
        if to in seen and (since is None or since in seen)
    }
    text = log.read_text()
    summary = {key: float(value) for key, value in re.findall(r"^(\w+): ([-\d.]+)$", text, re.M)}
    speeds = sorted(float(value) for value in re.findall(r"\| (\d+) tokens/s", text))
    return {
        "exit": process.returncode,
        **summary,
        "median_tokens_per_s": speeds[len(speeds) // 2] if speeds else None,
        **phases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--data", default="sotu")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--budget", type=float)
    parser.add_argument("--steps", type=int, help="so many steps instead of seconds")
    parser.add_argument("--seeds", default="42")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a constant of train.py")
    parser.add_argument("--untimed", type=int, help="steps before the clock starts; the reference's code had 11")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()

    environment = {**os.environ, "SWARM_PROFILE": arguments.profile, "SWARM_DATA": arguments.data}
    if arguments.budget:
        environment["SWARM_BUDGET_S"] = str(arguments.budget)
    if arguments.steps:
        environment["SWARM_BENCHMARK_STEPS"] = str(arguments.steps)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(ROOT / "shared" / "prepare", folder / "prepare", ignore=shutil.ignore_patterns("__pycache__"))
        if arguments.untimed:
            constants = folder / "prepare" / "constants.py"
            excluded = f"STARTUP_EXCLUDE_STEPS: Final = {arguments.untimed}"
            constants.write_text(re.sub(r"STARTUP_EXCLUDE_STEPS: Final = \d+", excluded, constants.read_text()))
        source = (ROOT / "shared" / "train_template" / arguments.backend / "train.py").read_text()
        for assignment in arguments.set:
            name, _, value = assignment.partition("=")
            source, found = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value}  ", source, flags=re.M)
            if found != 1:
                parser.error(f"--set {name}: no such constant")
        (folder / "train.py").write_text(source)
        for seed in arguments.seeds.split(","):
            log = arguments.logs / f"train-{arguments.profile}-{seed}-{arguments.steps or arguments.budget}.log"
            result = one_run(folder, {**environment, "SWARM_SEED": seed}, log)
            print(json.dumps({"seed": int(seed), **result}), flush=True)
            if result["exit"]:
                print(log.read_text()[-3000:], flush=True)


if __name__ == "__main__":
    main()
