"""The runner against real processes: every way to end is an outcome in words, and nothing is left running."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from shared.wire import Status
from worker import runner
from worker.runner import MARK, Deadlines, Expected, Interrupted, Order, Progress, RunOutcome, end_strays, run


@pytest.fixture
def order(tmp_path: Path) -> Order:
    return Order(
        command="true",
        cwd=tmp_path,
        metric="val_bpb",
        eval_command=None,
        deadlines=Deadlines(None, 30.0),
        environment={"SWARM_WORKTREE": str(tmp_path)},
        run_id=f"test-{tmp_path.name}",
        seed=5,
        record=tmp_path / "record.jsonl",
        memory_limit_gb=4.0,
    )


def go(order: Order, command: str, **changes: object) -> RunOutcome:
    return run(replace(order, command=command, **changes), threading.Event())  # type: ignore[arg-type]


def python(code: str) -> str:
    return f"{sys.executable} -c '{code}'"


def test_a_printed_score_is_read_from_the_log(order: Order) -> None:
    outcome = go(order, "echo 'step 1'; echo 'val_bpb: 1.25'; echo 'peak_vram_mb: 2048.0'; echo 'depth: 8'")
    assert (outcome.status, outcome.score, outcome.memory_gb) == (None, 1.25, 2.0)
    assert outcome.summary == {"val_bpb": 1.25, "peak_vram_mb": 2048.0, "depth": 8.0}
    assert outcome.seed == 5


def test_the_references_redirection_is_understood(order: Order) -> None:
    outcome = go(order, "echo 'val_bpb: 1.5' > run.log 2>&1")
    assert outcome.score == 1.5
    assert (order.cwd / "run.log").read_text() == "val_bpb: 1.5\n"


def test_an_eval_command_finds_the_metric(order: Order) -> None:
    outcome = go(order, "echo 'throughput = 120 per s'", metric="throughput", eval_command="grep throughput run.log")
    assert outcome.score == 120.0


def test_an_eval_command_that_prints_a_bare_number_is_enough(order: Order) -> None:
    outcome = go(order, "echo a 7", metric="speed", eval_command="awk '{print $2}' run.log")
    assert outcome.score == 7.0


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo one; echo 'ValueError: two' >&2; exit 3", "exit 3: ValueError: two"),
        ("exit 1", "exit 1: no output"),
        ("echo fine", "no 'val_bpb:' line in run.log"),
        ("echo 'val_bpb: nan'", "val_bpb is nan"),
        ("echo 'val_bpb: inf'", "val_bpb is inf"),
        ("echo 'torch.OutOfMemoryError: CUDA out of memory'; exit 1", "out of memory: torch.OutOfMemoryError"),
        ("kill -9 $$", "killed by the system (SIGKILL)"),
    ],
)
def test_each_failure_is_a_crash_in_words(order: Order, command: str, reason: str) -> None:
    outcome = go(order, command)
    assert outcome.status is Status.CRASH
    assert outcome.reason.startswith(reason)
    assert outcome.score is None
    assert outcome.memory_gb == 0.0


@pytest.mark.parametrize(
    "line",
    [
        "echo 'torch: 2.13.0'",
        "echo 'step 3 | loss ...'; sleep 0.4",
        "echo 'step 3 | progress 0.5.5 | loss 1.2.3 | x'; sleep 0.4",
        "echo 'peak_vram_mb: nan'",
        "echo 'depth: inf'",
        "rm run.log",
        "printf '\\377\\376\\n'",
        """echo '{"event": "clock", "drawn": null}' >> $SWARM_RECORD""",
        """echo '{"event": "batch", "drawn": "x", "steps": []}' >> $SWARM_RECORD""",
        f"""echo '{{"event": "batch", "drawn": 1{"0" * 400}}}' >> $SWARM_RECORD""",
        "echo '[1]' >> $SWARM_RECORD; echo 17 >> $SWARM_RECORD; rm $SWARM_RECORD",
    ],
)
def test_whatever_a_run_prints_or_removes_it_is_scored(order: Order, line: str) -> None:
    outcome = go(order, f"echo 'val_bpb: 1.25'; {line}")
    assert (outcome.status, outcome.score) == (None, 1.25), outcome.reason
    json.dumps(outcome.summary, allow_nan=False)


def test_an_eval_command_that_hangs_leaves_nothing(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "EVAL_COMMAND_S", 0.5)
    outcome = go(order, "true", eval_command="sleep 77 & sleep 78")
    assert outcome.reason == "no 'val_bpb:' line in run.log"
    assert marked(order.run_id) == []


def test_a_crash_keeps_the_last_fifty_lines(order: Order) -> None:
    outcome = go(order, "seq 1 80; exit 1")
    assert outcome.tail.splitlines() == [str(n) for n in range(31, 81)]


def test_a_run_past_its_cycle_is_a_timeout(order: Order) -> None:
    outcome = go(order, "sleep 60", deadlines=Deadlines(None, 0.5))
    assert (outcome.status, outcome.reason) == (Status.TIMEOUT, "not finished after 0 s")
    assert outcome.seconds < 20


def test_training_past_its_deadline_is_a_timeout_before_the_cycle_ends(order: Order) -> None:
    command = """echo '{"event": "clock"}' >> $SWARM_RECORD; sleep 60"""
    outcome = go(order, command, deadlines=Deadlines(0.5, 30.0))
    assert (outcome.status, outcome.reason) == (Status.TIMEOUT, "still training after 0 s")


def test_evaluation_may_take_longer_than_the_training_deadline(order: Order) -> None:
    command = """echo '{"event": "clock"}\n{"event": "evaluate"}' >> $SWARM_RECORD; sleep 1; echo 'val_bpb: 1.0'"""
    assert go(order, command, deadlines=Deadlines(0.5, 30.0)).score == 1.0


def test_deadlines_are_the_references() -> None:
    assert Deadlines.of(300, "torch", 600) == Deadlines(600, 900)
    assert Deadlines.of(300, "mlx", 600) == Deadlines(900, 900)
    assert Deadlines.of(300, "torch", None) == Deadlines(None, 900)


def test_memory_beyond_the_limit_ends_the_run(order: Order) -> None:
    hog = python("import time; block = bytearray(400 << 20); time.sleep(60)")
    outcome = go(order, hog, memory_limit_gb=0.2)
    assert outcome.status is Status.CRASH
    assert outcome.reason.startswith("memory: 0.")
    assert outcome.reason.endswith("the limit is 0.2")


def marked(run_id: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == run_id:
                found.append(process)
        except psutil.Error:
            continue
    return found


ESCAPE = "import os, time; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); time.sleep(300)"


def test_a_process_that_left_its_group_is_ended_too(order: Order) -> None:
    outcome = go(order, f"{python(ESCAPE)}; sleep 0.3; echo 'val_bpb: 1.0'")
    assert outcome.score == 1.0
    assert marked(order.run_id) == []


def test_background_children_are_ended(order: Order) -> None:
    assert go(order, "sleep 300 & echo 'val_bpb: 1.0'").score == 1.0
    assert marked(order.run_id) == []


def test_what_a_killed_worker_left_is_found_by_its_worktree(order: Order) -> None:
    environment = {MARK: "of-a-dead-worker", "SWARM_WORKTREE": str(order.cwd), "PATH": "/usr/bin:/bin"}
    left = psutil.Popen(["sleep", "300"], env=environment, start_new_session=True)
    other = psutil.Popen(["sleep", "300"], env={**environment, "SWARM_WORKTREE": "/elsewhere"}, start_new_session=True)
    try:
        until = time.monotonic() + 30
        while not left.environ() and time.monotonic() < until:
            time.sleep(0.01)  # until exec has put its environment in place
        assert end_strays(None, order.cwd) == 1
        assert left.wait(10) == -9
        assert other.is_running()
    finally:
        other.kill()
        other.wait()


def test_a_stop_ends_the_run_and_is_no_outcome(order: Order) -> None:
    stop = threading.Event()
    with pytest.raises(Interrupted):
        run(replace(order, command="sleep 300"), stop, lambda progress: stop.set())
    assert marked(order.run_id) == []


@pytest.mark.parametrize(
    ("line", "step", "share", "loss"),
    [
        ("step 12 | progress 0.2500 | loss 3.5000 | lr 1e-2 | 100 tokens/s | epoch 1", 12, 0.25, 3.5),
        ("step 2 | loss 10.87 | lr 2.4e-04 | 2.4k tokens/s", 2, None, 10.87),  # the reference's own
    ],
)
def test_progress_lines_are_followed_live(order: Order, line: str, step: int, share: float | None, loss: float) -> None:
    seen: list[Progress] = []
    stop = threading.Event()

    def watch(progress: Progress) -> None:
        seen.append(progress)
        if progress.step is not None:
            stop.set()

    with pytest.raises(Interrupted):
        run(replace(order, command=f"echo '{line}'; sleep 300"), stop, watch)
    assert (seen[-1].step, seen[-1].share, seen[-1].loss) == (step, share, loss)


EXPECTED = Expected("tiny", 9.0, "d1", 3.0, 3.0)
RESULT = '{"event": "result", "score": 2.0, "profile": "tiny", "budget_s": 9.0, "seed": 5, "steps_mode": false, %s}'


def record(line: str) -> str:
    return f"echo '{line}' >> $SWARM_RECORD; echo 'val_bpb: 2.000000'"


def test_the_measured_score_counts(order: Order) -> None:
    outcome = go(order, record(RESULT % '"digest": "d1"'), expected=EXPECTED)
    assert (outcome.status, outcome.score, outcome.digest) == (None, 2.0, "d1")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo 'val_bpb: 0.5'", "evaluate_bpb never gave a score"),
        (record(RESULT % '"digest": "other"'), "digest other is not the campaign's d1"),
        (record((RESULT % '"digest": "d1"').replace("9.0", "90.0")), "the run was told budget_s 9.0"),
        (record((RESULT % '"digest": "d1"').replace('"seed": 5', '"seed": 6')), "the run was told seed 5"),
        (record((RESULT % '"digest": "d1"').replace("2.0", "null")), "the record's score is None"),
        (record(RESULT % '"digest": "d1", "drawn": 5'), "training batches were drawn during the evaluation"),
        (record((RESULT % '"digest": "d1"').replace("false", "true")), "the run was told steps_mode False"),
        (
            record(RESULT % '"digest": "d1"').replace("2.000000", "0.500000"),
            "printed val_bpb 0.5, prepare measured 2.0",
        ),
    ],
)
def test_a_score_measured_otherwise_is_refused(order: Order, command: str, reason: str) -> None:
    outcome = go(order, command, expected=EXPECTED)
    assert outcome.status is Status.CRASH
    assert outcome.reason.startswith(reason)
