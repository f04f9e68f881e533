"""One plain worker process per slot, started, adopted, restarted and drained. Knows nothing of Ray.

Invariants: a living worker in a slot is adopted, never doubled (worker/slot.py is the judge); workers are sessions of
their own and outlive the supervisor; every process that is started for a slot carries SWARM_SLOT, its runs too, and
stop() leaves none of them. NOT covered: a process that drops its environment.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

from shared.errors import Refused
from worker.slot import holder, lock_path

LOOK_S = 0.3  #: between looks at the workers
BACKOFF_MAX_S = 60.0  #: between starts of a worker that keeps ending; doubles from 1 s
STEADY_S = 60.0  #: a worker that lived this long has started well
NO_SPIN = (
    0,
    2,
    3,
)  #: exit codes of a worker that ended on purpose, has bad input, or is refused: repeating helps little
LOG_BYTES = 10_000_000  #: of a worker's log, when it is set aside at the next start


class State(StrEnum):
    STARTING = "starting"  #: the process lives and does not hold its slot yet
    RUNNING = "running"  #: the process holds its slot
    WAITING = "waiting"  #: ended; started again in a while
    REFUSED = "refused"  #: ended by itself, or somebody else's worker holds the slot; tried again every minute
    HELD = "held"  #: its accelerator is lent to a run on several of them
    STOPPED = "stopped"  #: the node is being stopped


@dataclass(frozen=True)
class Worker:
    """One slot, as its agent sees it."""

    name: str
    devices: tuple[str, ...]  #: CUDA device ids
    state: State
    pid: int | None
    note: str  #: in words, why it does not run


class _Slot:
    def __init__(self, name: str, devices: tuple[str, ...], held: Path) -> None:
        self.name, self.devices, self.held = name, devices, held
        self.process: psutil.Process | None = None
        self.state, self.note = State.WAITING, ""
        self.due = self.started = self.failures = 0.0


class Supervisor:
    """Keeps one worker process per slot. `foreign` says why a living worker is not to be adopted, None when it is."""

    def __init__(
        self,
        home: Path,
        slots: Mapping[str, tuple[str, ...]],
        command: Callable[[str], list[str]],
        environment: Mapping[str, str],
        foreign: Callable[[psutil.Process], str | None],
        drain_s: float,
        slow_s: float = 60.0,
    ) -> None:
        self._home, self._command, self._environment, self._foreign = home, command, environment, foreign
        self._drain_s, self._slow_s = drain_s, slow_s
        # That an accelerator is lent is a file beside the lock, so that the next agent knows it too.
        self._slots = [_Slot(n, ids, lock_path(home, n).with_suffix(".held")) for n, ids in slots.items()]
        self._lock, self._stopping, self._problem = threading.RLock(), False, ""

    def look_for_ever(self) -> None:
        if lent := [slot for slot in self._slots if slot.held.exists()]:
            self._drain(lent)  # an agent that was killed while it drained them
        while not self._stopping:
            try:
                self.look()
                self._problem = ""
            except Exception as problem:  # an agent that dies of a full disk would come back to the same
                self._problem = f"{type(problem).__name__}: {problem}"
                print(self._problem, flush=True)
            time.sleep(LOOK_S)

    def look(self) -> None:
        """Adopts, starts, and takes note of ended workers."""
        with self._lock:
            for slot in self._slots:
                if not self._stopping and not slot.held.exists():
                    self._look(slot)

    def _look(self, slot: _Slot) -> None:
        now = time.monotonic()
        if slot.process is not None and (code := _ended(slot.process)) is not None:
            self._take_note_of_end(slot, code, now)
        if slot.process is None:
            found = holder(self._home, slot.name)
            if found is None:
                if now >= slot.due:
                    self._start(slot, now)
            elif reason := self._foreign(found):
                slot.state, slot.note = State.REFUSED, f"worker {found.pid} holds the slot: {reason}"
                slot.due = now + self._slow_s
            else:
                self._say(slot, f"adopted, process {found.pid}")
                slot.process, slot.started = found, now
        elif slot.state is not State.RUNNING and holder(self._home, slot.name) is not None:
            slot.state, slot.note = State.RUNNING, ""

    def _start(self, slot: _Slot, now: float) -> None:
        log = self._home / "logs" / f"{slot.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(slot.devices), "SWARM_HOME": str(self._home)}
        with log.open("ab") as output:
            slot.process = psutil.Popen(
                self._command(slot.name),
                cwd=self._home,
                env={**self._environment, **visible, "SWARM_SLOT": self._mark(slot)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        slot.state, slot.started = State.STARTING, now
        self._say(slot, f"started, process {slot.process.pid}")

    def _take_note_of_end(self, slot: _Slot, code: int | str, now: float) -> None:
        slot.failures = 1 if now - slot.started > STEADY_S else slot.failures + 1
        wait = self._slow_s if code in NO_SPIN else min(2 ** (slot.failures - 1), BACKOFF_MAX_S)
        slot.process, slot.due = None, now + wait
        slot.state = State.REFUSED if code in NO_SPIN else State.WAITING
        slot.note = f"ended with {code}, started again after {wait:.0f} s; see {self._home}/logs/{slot.name}.log"
        self._say(slot, f"ended {code}")

    def status(self) -> tuple[tuple[Worker, ...], str]:
        with self._lock:
            return tuple(self._worker(slot) for slot in self._slots), self._problem

    def _worker(self, slot: _Slot) -> Worker:
        held = State.HELD if slot.held.exists() else slot.state
        state = State.STOPPED if self._stopping else held
        return Worker(slot.name, slot.devices, state, slot.process.pid if slot.process else None, slot.note)

    def hold(self, count: int) -> list[str]:
        """Stops `count` workers and returns their device ids, until release(). Raises Refused when fewer are free."""
        with self._lock:
            free = [slot for slot in self._slots if not slot.held.exists() and slot.state is not State.REFUSED]
            if self._stopping or len(free) < count:
                raise Refused(f"{len(free)} slots are free here, {count} are asked for")
            slots = free[len(free) - count :]
            for slot in slots:
                slot.held.parent.mkdir(parents=True, exist_ok=True)
                slot.held.touch()
        self._drain(slots)
        return [device for slot in slots for device in slot.devices]

    def release(self) -> None:
        with self._lock:
            for slot in self._slots:
                slot.held.unlink(missing_ok=True)
                slot.due = slot.failures = 0

    def stop(self) -> None:
        """Drains every worker of ours and ends what they leave. Nothing starts afterwards."""
        with self._lock:
            self._stopping = True
        self._drain(self._slots)
        self.release()

    def _drain(self, slots: Iterable[_Slot]) -> None:
        """SIGTERM, a bounded wait, SIGKILL; then whatever else was started for these slots, runs included."""
        slots = list(slots)
        found = {self._mark(slot): slot.process or holder(self._home, slot.name) for slot in slots}
        ours = [slot for slot in slots if slot.process or not (w := found[self._mark(slot)]) or not self._foreign(w)]
        marks = {self._mark(slot) for slot in ours}
        workers = [process for mark in marks if (process := found[mark]) is not None]
        for process in workers:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        psutil.wait_procs(workers, timeout=self._drain_s)
        for _ in range(3):  # what forks while one looks shows in the next
            psutil.wait_procs([*_kill_marked(marks), *workers], timeout=5)
        with self._lock:
            for slot in ours:
                slot.process, slot.state, slot.note = None, State.WAITING, ""

    def _mark(self, slot: _Slot) -> str:
        return str(lock_path(self._home, slot.name))

    def _say(self, slot: _Slot, what: str) -> None:
        print(f"worker {slot.name} {what}", flush=True)


def _ended(process: psutil.Process) -> int | str | None:
    """How a worker ended, None while it lives. Only of our own children the exit code is known."""
    if isinstance(process, psutil.Popen):
        code: int | None = process.poll()
        return code
    with contextlib.suppress(psutil.Error):
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return None
    return "an unknown exit code"


def _kill_marked(marks: set[str]) -> list[psutil.Process]:
    """Kills every process that was started for these slots, also what left its group. Returns them."""
    killed = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # gone, or not ours to look at
            if process.environ().get("SWARM_SLOT") in marks and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
                killed.append(process)
    return killed


def node_of(worker: psutil.Process) -> str | None:
    """The Ray node whose agent started it; None for a worker that somebody else started."""
    try:
        return worker.environ().get("SWARM_NODE")
    except psutil.Error:
        return None


def stop_here(home: Path, drain_s: float = 30.0) -> list[str]:
    """Drains what agents started under `home` on this computer, and names it: for a computer whose Ray is gone.

    While an agent lives here, it starts them again.
    """

    def foreign(worker: psutil.Process) -> str | None:
        return None if node_of(worker) else "no agent started it"

    names = sorted(path.stem for path in (home / "slots").glob("*.lock"))
    ours = [name for name in names if (worker := holder(home, name)) is not None and not foreign(worker)]
    Supervisor(home, dict.fromkeys(names, ()), lambda _: [], {}, foreign, drain_s).stop()
    return ours
