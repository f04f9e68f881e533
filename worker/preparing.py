"""Makes a campaign's data ready by running the campaign's own prepare, and names data sets in the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shared.errors import BadInput, SwarmError
from shared.prepare.constants import PROFILES
from shared.prepare.data import EMBEDDED, Folder
from shared.prepare.download import CLIMBMIX
from shared.prepare.errors import DataError
from shared.prepare.run_environment import cache_root
from shared.task import TaskSpec

from .machine import slug


@dataclass(frozen=True)
class Prepared:
    """What a profile's runs will measure with."""

    digest: str
    rows: str  #: folder of the packed rows
    train_rows: int
    validation_rows: int
    lost_train: float  #: share of the training tokens lost in packing
    lost_validation: float


def prepare(task_dir: Path, task: TaskSpec, profile: str, progress: Callable[[str, int, int], None]) -> Prepared:
    """Runs `python -m prepare` of the campaign; quick when the rows are there. Raises BadInput for unusable data."""
    environment = {
        **os.environ,
        "SWARM_PROFILE": profile,
        "SWARM_DATA": task.data,
        "SWARM_TRAIN_SHARDS": str(task.train_shards or PROFILES[profile].train_shards),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "prepare"]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command,
            cwd=task_dir,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            result = None
            try:
                for line in process.stdout:
                    message = json.loads(line)
                    if "stage" in message:
                        progress(message["stage"], message["done"], message["of"])
                    elif "error" in message:
                        raise BadInput(f"data: {message['error']}")
                    else:
                        result = message
            except BaseException:  # Ctrl-C too: it resumes where it was when it is called again
                process.kill()
                raise
        errors.seek(0)
        last_words = errors.read().strip()
    if result is None:
        raise SwarmError(f"prepare failed: {last_words.splitlines()[-1] if last_words else process.returncode}")
    manifest = result["manifest"]
    return Prepared(
        result["digest"],
        result["rows"],
        manifest["train"]["rows"],
        manifest["validation"]["rows"],
        result["lost_train"],
        result["lost_validation"],
    )


def data_name(given: str | None) -> str:
    """The data set that --data names: climbmix, a folder of parquet shards, or by default the embedded text."""
    if given is None:
        return EMBEDDED
    return CLIMBMIX if given == CLIMBMIX and not Path(given).exists() else register_data(Path(given))


def register_data(path: Path) -> str:
    """Gives a folder of parquet shards a name in the cache, by a link. Raises BadInput when it is unusable."""
    folder = path.expanduser().resolve()
    try:
        Folder.open(folder)
    except DataError as error:
        raise BadInput(f"--data {error}") from None
    name = slug(folder.name)
    if name in (EMBEDDED, CLIMBMIX):
        raise BadInput(f"--data {folder}: the name {name!r} is taken; rename the folder")
    link = cache_root(os.environ) / "data" / name
    if link.exists() or link.is_symlink():
        if link.resolve() == folder:
            return name
        raise BadInput(f"--data {folder}: {link} already stands for {link.resolve()}; remove it or rename the folder")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(folder, target_is_directory=True)
    return name
