"""What takes minutes: the demo whole, and many kills. Run by `make test-system`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fast_task
from tests.conftest import ROOT

pytestmark = pytest.mark.system


def test_fifty_random_kills_lose_and_double_nothing() -> None:
    script = [sys.executable, "benchmarks/kill_restart.py", "--kills", "50"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"^([a-z ]+): (\d+)$", done.stdout, re.MULTILINE))
    assert len(counts) == 7
    assert set(counts.values()) == {"0"}
    assert "50 kills" in done.stdout


def test_the_benchmark_of_the_loop_still_runs() -> None:
    script = [sys.executable, "benchmarks/loop_overhead.py", "--experiments", "60"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"61 experiments\noverhead, all: median [\d.]+ s", done.stdout)


def test_the_demo_finds_something_better_than_the_baseline(tmp_path: Path) -> None:
    environment = {**os.environ, "AUTORESEARCH_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    script = [sys.executable, "-m", "coordinator.cli", "demo"]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    [campaign] = tmp_path.glob("swarm-demo-*/demo")
    show = [sys.executable, "-m", "coordinator.cli", "results", "--json", "--dir", str(campaign)]
    shown = json.loads(subprocess.run(show, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    standing = shown["standing"]
    assert standing["experiments"] == 10
    assert standing["keeps"] >= 1
    assert standing["gain_sigmas"] > 2
    assert len(shown["experiments"][0]["scores"]) == 2  # the baseline ran twice
    assert (campaign / "progress.png").read_bytes().startswith(b"\x89PNG")
    [branch] = fast_task.git(campaign, "for-each-ref", "--format=%(refname:short)", "refs/heads/autoresearch").split()
    subjects = fast_task.git(campaign, "log", "--format=%s", f"main..{branch}").splitlines()
    assert len(subjects) == 1 + standing["keeps"]
    assert all(subject.startswith("experiment: ") for subject in subjects)
