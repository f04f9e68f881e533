"""`prepare` killed at random moments resumes to the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from shared.prepare.packing import rows_folder, sha256_of
from tests.conftest import ROOT

KILLS = 10


def command(cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shared.prepare"],
        cwd=ROOT,
        env={**os.environ, "AUTORESEARCH_CACHE": str(cache), "SWARM_PROFILE": "tiny"},
        stdout=subprocess.PIPE,
        text=True,
    )


def contents(cache: Path) -> dict[str, str]:
    return {p.name: sha256_of(p) for p in rows_folder(cache, "sotu", "tiny").iterdir() if p.suffix in (".bin", ".json")}


def test_killed_ten_times_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole = command(tmp_path / "whole")
    last = (whole.communicate()[0]).splitlines()[-1]
    stages = {"text", "tokenizer", "val", "train"}
    draw = random.Random(4)
    killed = 0
    while killed < KILLS:
        process = command(tmp_path / "killed")
        assert process.stdout is not None
        # Kill after a random number of its progress lines and a random delay: in every stage, and in mid-shard.
        for _ in range(draw.randint(1, 7)):
            if not (line := process.stdout.readline()) or "digest" in line:
                break
            assert json.loads(line)["stage"] in stages
        try:
            process.wait(draw.uniform(0, 0.4))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        killed += 1
        process.stdout.close()
    final = command(tmp_path / "killed")
    result = json.loads(final.communicate()[0].splitlines()[-1])
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert result["digest"] == json.loads(last)["digest"]
    assert result["lost_train"] < 0.05
    leftovers = [p for p in rows_folder(tmp_path / "killed", "sotu", "tiny").iterdir() if p.suffix in (".part", ".tmp")]
    assert leftovers == []
