"""Shards over HTTP: parallel, resumable, whole or not there at all (reference, "Download System").

A shard is fetched to `<name>.tmp` and renamed when it is complete: as long as the server said, and readable parquet.
What a broken connection left in the .tmp is continued with a Range request where the server takes one. Standard
library only, because prepare stands alone.
"""

from __future__ import annotations

import http.client
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .constants import MAX_SHARD, VAL_SHARD
from .errors import DataError

CLIMBMIX = "climbmix"  #: the data set's name
CLIMBMIX_URL = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main"
PARALLEL = 8
ATTEMPTS = 5
TIMEOUT_S = 60.0  #: without a byte
BLOCK = 1 << 20


def shard_name(number: int) -> str:
    return f"shard_{number:05d}.parquet"


def climbmix_shards(train_shards: int) -> list[str]:
    """The first training shards and the pinned validation shard. Raises DataError beyond what there is."""
    if not 1 <= train_shards <= MAX_SHARD:
        raise DataError(f"train_shards is {train_shards}: climbmix has 1 to {MAX_SHARD}")
    return [*(shard_name(n) for n in range(train_shards)), shard_name(VAL_SHARD)]


@dataclass(frozen=True)
class Source:
    """Where climbmix's shards come from: its home, or a mirror."""

    url: str  #: shards are at <url>/<name>
    token: str | None = None  #: sent as a bearer token
    wait_s: Callable[[int], float] = lambda attempt: 2.0**attempt  #: before the attempt after this one (from 1)


DEFAULT_SOURCE = Source(CLIMBMIX_URL)


class _Broken(Exception):
    """An attempt that failed in a way that another one may not."""


def fetch(names: Iterable[str], folder: Path, source: Source, progress: Callable[[str, int, int], None]) -> None:
    """Brings the shards that are not there yet. Raises DataError when one cannot be had; whole ones stay.

    After the first shard that is given up no further one is begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not (folder / name).exists()]
    giving_up = threading.Event()
    done = 0
    with ThreadPoolExecutor(PARALLEL) as pool:
        pending = {pool.submit(_fetch_one, name, folder, source, giving_up) for name in missing}
        while pending:
            progress("download", done, len(missing))
            finished, pending = wait(pending, return_when=FIRST_EXCEPTION, timeout=0.5)
            for future in finished:
                if error := future.exception():
                    giving_up.set()
                    pool.shutdown(cancel_futures=True)
                    raise error
            done += len(finished)


def _fetch_one(name: str, folder: Path, source: Source, giving_up: threading.Event) -> None:
    partial = folder / f"{name}.tmp"
    for attempt in range(1, ATTEMPTS + 1):
        if giving_up.is_set():
            return
        try:
            _attempt(f"{source.url.rstrip('/')}/{name}", partial, source.token)
            partial.replace(folder / name)
            return
        except _Broken as error:
            reason = str(error)
        if attempt < ATTEMPTS:
            giving_up.wait(source.wait_s(attempt))
    partial.unlink(missing_ok=True)
    raise DataError(f"{source.url}/{name}: not to be had after {ATTEMPTS} attempts: {reason}")


def _attempt(url: str, partial: Path, token: str | None) -> None:
    """Continues or begins the download; returns when the file is complete. Raises _Broken, or DataError for good."""
    have = partial.stat().st_size if partial.exists() else 0
    headers = {"User-Agent": "ratchet-swarm"}
    if have:
        headers["Range"] = f"bytes={have}-"
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S) as answer:
            going_on = answer.status == 206
            length = answer.headers.get("Content-Length")
            with partial.open("ab" if going_on else "wb") as file:
                while block := answer.read(BLOCK):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            expected = int(length) + (have if going_on else 0) if length else size
    except urllib.error.HTTPError as error:
        if error.code == 416:  # what is there is no beginning of what the server has
            partial.unlink(missing_ok=True)
        elif error.code in (401, 403, 404, 410):
            partial.unlink(missing_ok=True)
            raise DataError(
                f"{url}: the server says {error.code} {error.reason}; check the URL and the token"
            ) from None
        raise _Broken(f"the server says {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Broken(str(error) or type(error).__name__) from None
    if size < expected:
        raise _Broken(f"{size} of {expected} bytes came")
    try:
        pq.ParquetFile(partial).close()
    except (OSError, pa.ArrowException):
        partial.unlink(missing_ok=True)
        raise _Broken("what came is no whole parquet file") from None
