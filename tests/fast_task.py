"""A task that runs in milliseconds: a quadratic with known optimum and seeded noise, in the common shape.

Used wherever the loop is the subject and training is not. The command is a shell script with awk, so that a run costs a
few milliseconds and no Python start-up.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

TRAIN = """\
# The one file to edit.
LR = 0.5
WIDTH = 64
DECAY = 0.1

TAIL = "kept as it is"   # a comment
"""

#: Optimum at LR 0.2, WIDTH 128, DECAY 0.05: 1.0; noise +-0.002 from the seed.
SCORE = r"""#!/bin/sh
sleep ${NAP:-0}
awk -v seed="${SWARM_SEED:-1}" '
  /^LR/ {lr = $3} /^WIDTH/ {w = $3} /^DECAY/ {d = $3} /^CRASH/ {exit 1}
  END {
    srand(seed); noise = 0.004 * (rand() - 0.5)
    score = 1 + (log(lr / 0.2)) ^ 2 / 10 + (log(w / 128)) ^ 2 / 10 + (d - 0.05) ^ 2 * 10 + noise
    print "---"; printf "val_bpb: %.6f\n", score; print "peak_vram_mb: 100.0"
  }' train.py
"""

CONFIG = """\
name: fast
metric: val_bpb
metric_direction: minimize
mutable_files: [train.py]
immutable_files: [score.sh]
run_command: "sh score.sh > run.log 2>&1"
eval_command: "grep '^val_bpb:' run.log"
budget_minutes: 0.02
branch_prefix: autoresearch
rules: ["Only modify files listed in mutable_files"]
search_space:
  LR: {low: 0.01, high: 1.0, log: true}
  WIDTH: {choices: [32, 64, 128, 256]}
  DECAY: {low: 0.0, high: 0.2}
"""


def make(folder: Path, config: str = CONFIG, prefix: str = "") -> Path:
    """A committed repository with this task in `prefix`; returns the task's directory."""
    inside = folder / prefix
    inside.mkdir(parents=True)
    (inside / "train.py").write_text(TRAIN)
    (inside / "score.sh").write_text(SCORE)
    (inside / "autoresearch-config.yaml").write_text(config)
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "the task")
    return inside


def git(folder: Path, *arguments: str) -> str:
    """Plain git, as a user would run it."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()
