"""What takes minutes: the demo whole, and many kills. Run by `make test-system`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from shared.client import CoordinatorClient
from tests import fast_task
from tests.conftest import ROOT
from tests.served import command, environment, served, swarm

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


def test_the_demo_ends_with_a_leaderboard_that_the_endpoint_and_the_cli_show_alike(tmp_path: Path) -> None:
    more = {"AUTORESEARCH_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        command("demo", "--minutes", "1"),
        cwd=ROOT,
        env=environment(more),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    [campaign] = tmp_path.glob("swarm-demo-*/demo")
    with served(campaign) as (url, _), closing(CoordinatorClient(url)) as client:
        board = httpx.get(f"{url}/api/v1/leaderboard", headers={"Accept": "text/plain"}).text
        assert board.rstrip() in done.stdout
        shown = swarm("leaderboard", "--json", "--coordinator", url, cwd=tmp_path).stdout
        assert json.loads(shown) == httpx.get(f"{url}/api/v1/leaderboard").json()
        assert {standing.machine for standing in client.leaderboard().standings} == {"demo-1", "demo-2", "demo-3"}
        assert all(standing.best is not None for standing in client.leaderboard().standings)
        page = client.experiments(limit=1000)
        assert len(page.experiments) > 3  # more than the baselines
        repository = url + client.campaign().repository
        listed = fast_task.git(tmp_path, "ls-remote", repository, "refs/heads/autoresearch/*").split()[1::2]
        assert [ref.rpartition("-demo-")[2] for ref in listed] == ["1", "2", "3"]
        fast_task.git(tmp_path, "clone", "--quiet", repository, "copy")
        for experiment in page.experiments:
            fast_task.git(tmp_path / "copy", "fetch", "--quiet", "origin", experiment.tested)
            assert fast_task.git(tmp_path / "copy", "cat-file", "-t", experiment.tested) == "commit"
