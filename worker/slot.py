"""The lock of one accelerator slot: at most one worker on it, and no new one while a dead worker's run still uses it.

`<home>/slots/<name>.lock` is locked with flock by the worker and, through the descriptor that it hands to its runs, by
them too: the lock is free when the last of them is gone, however they ended. The file says who the worker is. Starters
take turns behind a second file (`.gate`), so a starter that finds the lock taken and no living worker in the file has
met a left-over run, never another starter between locking and writing. NOT covered: a home on NFS (flock and process
ids end at the computer), a lock file removed by hand, and runs that close the descriptor.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from shared.errors import Refused

from .machine import slug

LEFT_S = 10.0  #: for what a dead worker left behind to be gone, once ended
GATE_S = LEFT_S + 5.0  #: a starter that ends left-over runs holds the gate for that long
POLL_S = 0.05


@dataclass(frozen=True)
class Held:
    """A slot that this process holds."""

    fd: int  #: for `pass_fds` of every run: the lock stays held while one of them lives
    path: Path


def lock_path(home: Path, name: str) -> Path:
    return home / "slots" / f"{slug(name)}.lock"


@contextmanager
def hold(home: Path, name: str, end_left: Callable[[], int] = lambda: 0) -> Iterator[Held]:
    """Holds the slot. Raises Refused when a living worker does, or when what a dead one left does not end.

    `end_left` ends the left-over runs of a dead worker and says how many; it is called only when no worker lives.
    """
    path = lock_path(home, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = _open(path)
    try:
        with _gate(path, name):
            _take(fd, path, name, end_left)
        try:
            yield Held(fd, path)
        finally:
            os.ftruncate(fd, 0)  # before the lock goes: a name in the file means that its worker holds it
    finally:
        os.close(fd)


def holder(home: Path, name: str) -> psutil.Process | None:
    """The living worker that holds this slot, None while there is none or it has not written its name yet."""
    path = lock_path(home, name)
    if not path.exists():
        return None
    fd = _open(path)
    try:
        worker = _worker(fd)
        # Locking last, and only where a worker lives: a probe never takes a free lock from under a starter.
        return None if worker is None or _lock(fd) else worker
    finally:
        os.close(fd)


def born(process: psutil.Process) -> str:
    """What tells a process from a later one with its id.

    On Linux clock ticks since boot: psutil's create_time() moves with the system clock (measured: it adds /proc/stat's
    btime), and a worker that seems dead after a clock step would lose its runs.
    """
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return f"{process.create_time():.2f}"


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _gate(path: Path, name: str) -> Iterator[None]:
    fd = _open(path.with_suffix(".gate"))
    try:
        until = time.monotonic() + GATE_S
        while not _lock(fd):
            if time.monotonic() > until:
                raise Refused(f"slot {name}: another worker has been starting here for {GATE_S:.0f} s; try again")
            time.sleep(POLL_S)
        yield
    finally:
        os.close(fd)


def _take(fd: int, path: Path, name: str, end_left: Callable[[], int]) -> None:
    until = time.monotonic() + LEFT_S
    while not _lock(fd):
        if worker := _worker(fd):
            raise Refused(f"slot {name}: worker {worker.pid} is running here; stop it first, or take another --name")
        end_left()
        if time.monotonic() > until:
            raise Refused(f"slot {name}: a dead worker's run holds {path} and does not end; `lsof {path}` names it")
        time.sleep(POLL_S)
    ours = psutil.Process()
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps({"pid": ours.pid, "born": born(ours)}).encode(), 0)


def _worker(fd: int) -> psutil.Process | None:
    """The worker that the file names, if it lives; half a line names nobody."""
    with contextlib.suppress(ValueError, KeyError, TypeError, psutil.Error):
        said = json.loads(os.pread(fd, 1000, 0))
        process = psutil.Process(int(said["pid"]))
        if born(process) == said["born"] and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None
