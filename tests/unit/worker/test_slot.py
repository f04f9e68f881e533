"""The slot's lock between real processes: workers are killed, their runs live on, starters race."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from shared.errors import Refused
from worker import slot

WORKER = """
import subprocess, sys, time
from pathlib import Path
from shared.errors import Refused
from worker.slot import hold
try:
    with hold(Path(sys.argv[1]), "mini") as held:
        run = subprocess.Popen(["sleep", "60"], pass_fds=[held.fd], start_new_session=True)
        print("holds", run.pid, flush=True)
        time.sleep(60)
except Refused as refusal:
    print("refused", refusal, flush=True)
"""

Start = Callable[[], tuple[subprocess.Popen[str], list[str]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a worker on slot `mini` and returns it with the words of its first line."""
    started: list[subprocess.Popen[str]] = []
    runs: list[int] = []

    def one() -> tuple[subprocess.Popen[str], list[str]]:
        process = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if words[0] == "holds":
            runs.append(int(words[1]))
        return process, words

    yield one
    for run in runs:  # before the workers: runs hold the other end of their pipes too
        with contextlib.suppress(ProcessLookupError):
            os.kill(run, signal.SIGKILL)
    for process in started:
        process.kill()
        process.communicate()


def test_a_held_slot_refuses_another_worker_and_names_the_first(tmp_path: Path, start: Start) -> None:
    first, words = start()
    assert words[0] == "holds"
    with pytest.raises(Refused, match=f"worker {first.pid} is running here"), slot.hold(tmp_path, "mini"):
        pass
    found = slot.holder(tmp_path, "mini")
    assert found is not None and found.pid == first.pid


def test_slots_of_one_home_do_not_meet(tmp_path: Path) -> None:
    with slot.hold(tmp_path, "mini-0"), slot.hold(tmp_path, "mini-1"):
        assert slot.lock_path(tmp_path, "Mini_0") == slot.lock_path(tmp_path, "mini-0")


def test_a_slot_that_was_given_back_has_no_holder_and_is_free(tmp_path: Path) -> None:
    with slot.hold(tmp_path, "mini"):
        assert slot.holder(tmp_path, "mini") == psutil.Process()
    assert slot.holder(tmp_path, "mini") is None
    with slot.hold(tmp_path, "mini"):
        pass


def test_the_run_of_a_killed_worker_keeps_the_slot_until_it_is_ended(tmp_path: Path, start: Start) -> None:
    worker, words = start()
    run = int(words[1])
    worker.kill()
    worker.wait()
    assert slot.holder(tmp_path, "mini") is None
    calls = []

    def end_left() -> int:
        calls.append(psutil.pid_exists(run))
        with contextlib.suppress(ProcessLookupError):
            os.kill(run, signal.SIGKILL)
        return 1

    with slot.hold(tmp_path, "mini", end_left):
        assert calls[0]
        assert slot.holder(tmp_path, "mini") == psutil.Process()


def test_a_run_that_does_not_end_is_a_refusal_in_bounded_time(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "LEFT_S", 0.3)
    worker, _ = start()
    worker.kill()
    worker.wait()
    with pytest.raises(Refused, match="a dead worker's run holds"), slot.hold(tmp_path, "mini"):
        pass


@pytest.mark.parametrize("content", [b"", b'{"pid": 1', b'{"pid": 1, "born": "0"}', b'{"pid": true}', b"[]", b"\xff"])
def test_neither_half_a_line_nor_a_process_with_a_reused_id_is_a_worker(tmp_path: Path, content: bytes) -> None:
    path = slot.lock_path(tmp_path, "mini")
    path.parent.mkdir()
    path.write_bytes(content)
    assert slot.holder(tmp_path, "mini") is None
    with slot.hold(tmp_path, "mini"):
        pass


def test_a_living_process_that_the_file_names_holds_nothing_without_the_lock(tmp_path: Path) -> None:
    path = slot.lock_path(tmp_path, "mini")
    path.parent.mkdir()
    path.write_text(json.dumps({"pid": os.getpid(), "born": slot.born(psutil.Process())}))
    assert slot.holder(tmp_path, "mini") is None


def test_of_many_starters_at_once_exactly_one_holds_and_none_ends_its_run(tmp_path: Path) -> None:
    ended, outcomes, together = [], [], threading.Barrier(8)
    release = threading.Event()

    def starter() -> None:
        together.wait()
        try:
            with slot.hold(tmp_path, "mini", lambda: ended.append(1) or 1):
                outcomes.append("holds")
                release.wait(20)
        except Refused:
            outcomes.append("refused")

    threads = [threading.Thread(target=starter) for _ in range(8)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 10
    while len(outcomes) < 8 and time.monotonic() < until:
        time.sleep(0.01)
    release.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["holds"] + ["refused"] * 7
    assert not ended, "a starter took another one for a dead worker's run"


def test_a_starter_killed_at_the_gate_does_not_shut_it(tmp_path: Path) -> None:
    path = slot.lock_path(tmp_path, "mini")
    path.parent.mkdir()
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(1, flush=True); time.sleep(9)"
    process = subprocess.Popen([sys.executable, "-c", code, path.with_suffix(".gate")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    threading.Timer(0.3, process.kill).start()
    with slot.hold(tmp_path, "mini"):
        pass
    process.communicate()
