"""Shared fixtures: a cache with small data, prepared once per session by the real prepare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent
SMALL = "small"  #: data set of the fixture: two training shards and nine rows of validation


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AUTORESEARCH_CACHE with profile tiny packed for data set `small`."""
    from shared.prepare.data import cut

    cache = tmp_path_factory.mktemp("cache")
    folder = cache / "data" / SMALL
    folder.mkdir(parents=True)
    addresses = pq.read_table(ROOT / "shared" / "prepare" / "sotu.parquet")["text"].to_pylist()
    for number, group in enumerate((addresses[0:12], addresses[100:112])):
        texts = [piece for address in group for piece in cut(address, 160)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{number:05d}.parquet")
    pq.write_table(pa.table({"text": cut(addresses[200], 160)[:50]}), folder / "shard_00002.parquet")
    environment = {**os.environ, "AUTORESEARCH_CACHE": str(cache), "SWARM_PROFILE": "tiny", "SWARM_DATA": SMALL}
    command = [sys.executable, "-m", "shared.prepare"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    (cache / "digest").write_text(json.loads(done.stdout.splitlines()[-1])["digest"])
    return cache


@pytest.fixture
def bench(tmp_path: Path, small_cache: Path) -> Bench:
    return Bench(tmp_path, small_cache)


class Bench:
    """A folder with `prepare` in it, where a train.py runs as it would in a campaign."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.cache = cache
        self.digest = (cache / "digest").read_text()
        (folder / "prepare").symlink_to(ROOT / "shared" / "prepare", target_is_directory=True)

    def environment(self, **more: str) -> dict[str, str]:
        ours = {"AUTORESEARCH_CACHE": str(self.cache), "SWARM_PROFILE": "tiny", "SWARM_DATA": SMALL}
        return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **ours, **more}

    def python(self, code: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Runs code as train.py; the caller looks at the exit code."""
        (self.folder / "train.py").write_text(code)
        return subprocess.run(
            [sys.executable, "train.py"],
            cwd=self.folder,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
