"""One execution of the task's command: deadlines, memory limit, live progress, and what it produced -> RunOutcome.

The process is a group of its own and writes straight to run.log; this module only watches. Failures of the agent's code
are data: every way to end is an outcome in words. Training time is measured from outside, by this process's clock, from
the events that prepare writes. NOT covered: what the process may read or reach (docs/metric.md).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from shared.wire import Status

MARK = "SWARM_RUN"  #: environment variable by which every process of a run is found again, also after a double fork
TAIL_LINES = 50  #: lines of run.log that a crash is diagnosed from (reference, "Crash Handling Protocol")
POLL_S = 0.05
MEMORY_EVERY_S = 0.25
STRAY_PASSES = 10  #: looks for what a run left behind, at most
GONE_S = 5.0  #: for killed processes to be gone; memory-rich ones take a while
EVAL_COMMAND_S = 60.0  #: an eval command reads a log; longer than this it hangs
UNTIMED_STEPS = 3  #: tokens drawn before the clock starts: one step's worth, and what a loader reads ahead

_REDIRECT = re.compile(r"\s*(?:>\s*run\.log\s+2>&1|&>\s*run\.log)\s*$")
_FLOAT = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf)"
_SUMMARY = re.compile(rf"^([A-Za-z_][\w.@/-]*):\s+({_FLOAT})\s*$", re.MULTILINE)
_PROGRESS = re.compile(rf"step (\d+) \|(?: progress (\d+\.?\d*) \|)? loss ({_FLOAT})(?=\s|$)")
_OOM = re.compile(r"OutOfMemoryError|CUDA out of memory|MemoryError|Cannot allocate memory|bad_alloc")
_NUMBER = re.compile(_FLOAT)


@dataclass(frozen=True)
class Deadlines:
    """When a run is killed, in seconds."""

    training: float | None  #: from the end of the untimed step to the evaluation; None where there is no clock
    cycle: float  #: from start to exit

    @classmethod
    def of(cls, budget_s: float, backend: str, cycle_allowance_s: float | None) -> Deadlines:
        """The reference's: training at 2 x the budget (3 x on MLX), the cycle at 15 minutes for a budget of 5.

        With `cycle_allowance_s` (a profile's) there is a clock to measure training by.
        """
        if cycle_allowance_s is None:
            return cls(None, max(3 * budget_s, budget_s + 60))
        return cls((3 if backend == "mlx" else 2) * budget_s, budget_s + cycle_allowance_s)


@dataclass(frozen=True)
class Expected:
    """What the record of a run must say, else it measured something else than it was told to."""

    profile: str
    budget_s: float
    digest: str
    startup_allowance_s: float
    evaluation_allowance_s: float


@dataclass(frozen=True)
class Order:
    """One run to make."""

    command: str
    cwd: Path
    metric: str
    eval_command: str | None
    deadlines: Deadlines
    environment: Mapping[str, str]  #: added to this process's
    run_id: str
    seed: int
    record: Path  #: where prepare writes its events
    memory_limit_gb: float
    expected: Expected | None = None  #: set where prepare measures the score
    inherit: tuple[int, ...] = ()  #: descriptors that it gets: what they lock stays locked while it lives


@dataclass(frozen=True)
class Progress:
    """Where the run is."""

    seconds: float
    step: int | None = None
    share: float | None = None  #: of the budget
    loss: float | None = None


@dataclass(frozen=True)
class RunOutcome:
    """What one execution produced, before judgement. `status` is None when there is a valid score."""

    status: Status | None
    score: float | None
    reason: str  #: in words, where there is no score
    memory_gb: float
    seconds: float
    seed: int
    exit_code: int | None
    trained_share: float | None = None  #: training measured from outside / budget
    summary: dict[str, float] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)  #: seconds: start, compile, train, evaluate
    digest: str | None = None
    epochs: float | None = None
    tail: str = ""  #: the last 50 lines of run.log, where it failed


class Interrupted(Exception):
    """The person stopped the worker during a run; the run is dead and does not count."""


def run(order: Order, stop: threading.Event, watch: Callable[[Progress], None] = lambda _: None) -> RunOutcome:
    """Executes the order and waits for its end. Raises Interrupted when `stop` is set meanwhile."""
    log = order.cwd / "run.log"
    order.record.unlink(missing_ok=True)
    order.record.touch()
    started = time.monotonic()
    log.write_bytes(b"")
    lines = log.open("rb")  # before the run can remove it
    with log.open("ab") as output:  # appending, so that a command's own redirection to run.log does no harm
        process = subprocess.Popen(
            ["/bin/sh", "-c", _REDIRECT.sub("", order.command)],
            cwd=order.cwd,
            env=_environment(order),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=order.inherit,
        )
    try:
        with order.record.open("rb") as events, lines:
            watcher = _Watcher(order, process, events, lines, started)
            try:
                killed = watcher.until_end(stop, watch)
            finally:
                kill_group(process.pid)
                process.wait()
            if killed == "stopped" or (stop.is_set() and process.returncode == -signal.SIGINT):
                raise Interrupted  # the latter: Ctrl-C met it between fork and exec
            lines.seek(0)  # through this handle also where the run has removed its log
            return _outcome(order, lines.read().decode(errors="replace"), watcher, killed, process.returncode)
    finally:
        end_strays(order.run_id)


def _environment(order: Order) -> dict[str, str]:
    environment = {**os.environ, **order.environment, MARK: order.run_id}
    for name in ("SWARM_DATA_TOKEN", "SWARM_TOKEN"):  # for us, not for agents' code
        environment.pop(name, None)
    # `python` in the task's command is the interpreter that we run on, which has the task's packages.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment["SWARM_RECORD"] = str(order.record)
    environment["SWARM_SEED"] = str(order.seed)
    return environment


class _Watcher:
    """Follows one process: its events with our clock beside them, its progress lines, its memory."""

    def __init__(
        self, order: Order, process: subprocess.Popen[bytes], events: IO[bytes], lines: IO[bytes], started: float
    ) -> None:
        self._order, self._process, self._events, self._lines = order, process, events, lines
        self._partial_event = b""
        self.started = started
        self.seen: dict[str, float] = {}  # event -> seconds since the start, first occurrence
        self.drawn: dict[str, int] = {}  # event -> training tokens handed out by then
        self.steps = 0
        self.result: dict[str, Any] | None = None
        self.peak_gb = 0.0
        self.ended = 0.0
        self._gone = threading.Event()

    def until_end(self, stop: threading.Event, watch: Callable[[Progress], None]) -> str | None:
        """Waits; returns why the process has to be killed, None when it ended by itself."""
        threading.Thread(target=self._wait, daemon=True).start()
        next_look = 0.0
        while not self._gone.wait(POLL_S):
            now = time.monotonic() - self.started
            self._read_events(now)
            if stop.is_set():
                return "stopped"
            if reason := self._overdue(now):
                return reason
            if now >= next_look:
                next_look = now + MEMORY_EVERY_S
                self.peak_gb = max(self.peak_gb, memory_gb(self._process.pid))
                if self.peak_gb > self._order.memory_limit_gb:
                    return f"memory: {self.peak_gb:.1f} GiB, the limit is {self._order.memory_limit_gb:.1f}"
                watch(self._progress(now))
        self.ended = time.monotonic() - self.started
        self._read_events(self.ended)
        return None

    def _wait(self) -> None:
        self._process.wait()
        self._gone.set()

    def _overdue(self, now: float) -> str | None:
        deadlines = self._order.deadlines
        if now > deadlines.cycle:
            return f"timeout: not finished after {deadlines.cycle:.0f} s"
        training = "clock" in self.seen and "evaluate" not in self.seen
        if deadlines.training is not None and training and now - self.seen["clock"] > deadlines.training:
            return f"timeout: still training after {deadlines.training:.0f} s"
        return None

    def _read_events(self, now: float) -> None:
        *whole, self._partial_event = (self._partial_event + self._events.read()).split(b"\n")
        for line in whole:
            try:
                event = json.loads(line)
                name = str(event["event"])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # not written by prepare; a run without a result is a crash anyway
            if name not in self.seen:
                self.seen[name] = now
                self.drawn[name] = int(_finite(event.get("drawn")) or 0)
                self.steps = max(self.steps, int(_finite(event.get("steps")) or 0))
            if name == "result" and self.result is None:
                self.result = event

    def _progress(self, now: float) -> Progress:
        end = self._lines.seek(0, os.SEEK_END)
        self._lines.seek(max(end - 2000, 0))
        lines = _PROGRESS.findall(self._lines.read().decode(errors="replace"))
        if not lines:
            return Progress(now)
        step, share, loss = lines[-1]
        return Progress(now, int(step), float(share) if share else None, float(loss))


def _finite(value: object) -> float | None:
    """A number from what a run wrote; None for anything else."""
    try:
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def memory_gb(pid: int) -> float:
    """Resident memory of a process and its descendants, GiB; 0 when it is gone."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += member.memory_info().rss
    return total / 2**30


def kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def end_strays(run_id: str | None, worktree: Path | None = None) -> int:
    """Kills what is left of a run, also what left its process group. Returns how many there were.

    With `worktree` instead of a run's id: whatever any run left behind in that worktree, after a killed worker.
    """
    ended: set[psutil.Process] = set()
    empty = 0
    for _ in range(STRAY_PASSES):  # until two find nothing: what forks and exits while one looks shows in the next
        found = {process for process in psutil.process_iter() if _is_stray(process, run_id, worktree)} - ended
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        ended |= found
        empty = 0 if found else empty + 1
        if empty == 2:
            break
        _wait_until_gone(found)
    return len(ended)


def _wait_until_gone(killed: set[psutil.Process]) -> None:
    """Returns when none of them runs any more, GONE_S at the latest: a kill takes effect a little after it is sent."""
    until = time.monotonic() + GONE_S
    while time.monotonic() < until and any(_runs(process) for process in killed):
        time.sleep(0.005)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_stray(process: psutil.Process, run_id: str | None, worktree: Path | None) -> bool:
    try:
        environment = process.environ()
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE or MARK not in environment:
            return False
    except psutil.Error:
        return False  # gone, or not ours to look at
    if run_id is not None:
        return environment[MARK] == run_id
    return worktree is not None and environment.get("SWARM_WORKTREE") == str(worktree)


def _outcome(order: Order, text: str, watcher: _Watcher, killed: str | None, exit_code: int) -> RunOutcome:
    tail = "\n".join(text.splitlines()[-TAIL_LINES:])
    printed = {name: float(value) for name, value in _SUMMARY.findall(text)}
    summary = {name: value for name, value in printed.items() if math.isfinite(value)}
    memory = summary["peak_vram_mb"] / 1024 if summary.get("peak_vram_mb", 0) > 0 else watcher.peak_gb
    common: dict[str, Any] = {
        "seconds": round(time.monotonic() - watcher.started, 3),
        "seed": order.seed,
        "exit_code": exit_code,
        "summary": summary,
        "phases": _phases(watcher),
    }

    def failed(status: Status, reason: str) -> RunOutcome:
        return RunOutcome(status, None, reason, 0.0, tail=tail, **common)

    if killed:
        status = Status.TIMEOUT if killed.startswith("timeout") else Status.CRASH
        return failed(status, killed.removeprefix("timeout: "))
    if exit_code != 0:
        return failed(Status.CRASH, _why(exit_code, text))
    if order.expected is None:
        score = _printed_score(order, text)
        problem = None if score is not None else f"no '{order.metric}:' line in run.log"
    else:
        score, problem = _measured_score(order.expected, order, watcher, printed)
    if problem or score is None:
        return failed(Status.CRASH, problem or "no score")
    if not math.isfinite(score):
        return failed(Status.CRASH, f"{order.metric} is {score}")
    result = watcher.result or {}
    return RunOutcome(
        None,
        score,
        "",
        memory,
        trained_share=_trained_share(order, watcher),
        digest=order.expected.digest if order.expected else None,
        epochs=_finite(result.get("epochs")),
        **common,
    )


def _why(exit_code: int, text: str) -> str:
    """The reason for a non-zero exit, from the log's last words."""
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
    if _OOM.search(text):
        return f"out of memory: {last[:160]}"
    if exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "killed by the system (SIGKILL), probably out of memory"
    return f"exit {exit_code}: {last[:160]}"


def _printed_score(order: Order, text: str) -> float | None:
    """The metric as the command printed it: by the eval command where there is one, else the last `metric: x` line."""
    if order.eval_command:
        text = _evaluated(order, order.eval_command)
    lines = re.findall(rf"^{re.escape(order.metric)}\s*[:=]\s*(\S+)", text, re.MULTILINE)
    numbers = lines[-1:] or (_NUMBER.findall(text)[-1:] if order.eval_command else [])
    try:
        return float(numbers[0]) if numbers else None
    except ValueError:
        return None


def _evaluated(order: Order, command: str) -> str:
    """What the eval command prints; nothing when it does not come back."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        cwd=order.cwd,
        env=_environment(order),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=EVAL_COMMAND_S)[0]
    except subprocess.TimeoutExpired:
        return ""
    finally:
        kill_group(process.pid)
        process.wait()


def _measured_score(
    expected: Expected, order: Order, watcher: _Watcher, summary: Mapping[str, float]
) -> tuple[float | None, str | None]:
    """prepare's own score, and what is wrong with it."""
    result = watcher.result
    if result is None:
        return None, "evaluate_bpb never gave a score"
    told = {"profile": expected.profile, "budget_s": expected.budget_s, "seed": order.seed, "steps_mode": False}
    for name, value in told.items():
        if result.get(name) != value:
            return None, f"the run was told {name} {value} and measured with {result.get(name)}"
    if result.get("digest") != expected.digest:
        return None, f"digest {str(result.get('digest'))[:12]} is not the campaign's {expected.digest[:12]}"
    score = _finite(result.get("score"))
    if score is None:
        return None, f"the record's score is {result.get('score')!r}"
    if watcher.drawn.get("result", 0) > watcher.drawn.get("evaluate", 0):
        return None, "training batches were drawn during the evaluation"
    printed = summary.get(order.metric)
    if printed is not None and not abs(printed - score) <= 1e-6 + 1e-6 * abs(score):
        return None, f"printed {order.metric} {printed}, prepare measured {score:.6f}"
    return score, None


def _trained_share(order: Order, watcher: _Watcher) -> float | None:
    """Training as seen from outside, over the budget.

    From the end of the untimed step to the evaluation. What start-up and evaluation take beyond their allowances counts
    as training too. Where train.py used no clock, or drew more than UNTIMED_STEPS steps' worth of tokens before
    starting it, all counts from the first batch.
    """
    expected = order.expected
    if expected is None:
        return None
    seen, end = watcher.seen, watcher.seen.get("evaluate", watcher.ended)
    first = seen.get("batch", seen.get("start", 0.0))
    clock = seen.get("clock", first)
    before = watcher.drawn.get("clock", 0)
    a_step = (watcher.drawn.get("evaluate", 0) - before) / max(watcher.steps - 1, 1)
    if before > UNTIMED_STEPS * a_step:
        clock = first
    hidden = max(clock - expected.startup_allowance_s, 0.0)
    hidden += max(seen.get("result", end) - end - expected.evaluation_allowance_s, 0.0)
    return (end - clock + hidden) / expected.budget_s


def _phases(watcher: _Watcher) -> dict[str, float]:
    marks = [0.0, *(watcher.seen.get(name) for name in ("batch", "clock", "evaluate", "result"))]
    names = ("start", "compile", "train", "evaluate")
    return {
        name: round(to - since, 3)
        for name, since, to in zip(names, marks, marks[1:], strict=False)
        if since is not None and to is not None
    }
