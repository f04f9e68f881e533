"""The torch template in the real runner: it trains, keeps to its budget, and cannot train longer unseen."""

from __future__ import annotations

import re
import threading

import pytest
import yaml

from shared import pyedit
from tests.conftest import ROOT, SMALL, Bench
from worker.ratchet import Best, Policy, Trial, decide
from worker.runner import Deadlines, Expected, Order, RunOutcome, run

TEMPLATE = (ROOT / "shared" / "train_template" / "torch" / "train.py").read_text()
SETTINGS = yaml.safe_load((ROOT / "shared" / "train_template" / "profiles.yaml").read_text())
TINY = pyedit.set_constants(TEMPLATE, {**SETTINGS["tiny"]["set"], "TOTAL_BATCH_SIZE": 1024, "DEVICE_BATCH_SIZE": 4})


def train(bench: Bench, code: str, budget_s: float = 2.0) -> RunOutcome:
    (bench.folder / "train.py").write_text(code)
    environment = bench.environment(SWARM_BUDGET_S=repr(budget_s), SWARM_WORKTREE=str(bench.folder))
    order = Order(
        "python train.py > run.log 2>&1",
        bench.folder,
        "val_bpb",
        "grep '^val_bpb:' run.log",
        Deadlines.of(budget_s, "torch", 60.0),
        environment,
        f"train-{bench.folder.name}",
        11,
        bench.folder / "record.jsonl",
        8.0,
        Expected("tiny", budget_s, bench.digest, 10.0, 3.0),
    )
    return run(order, threading.Event())


def test_it_trains_scores_and_prints_the_exact_summary(bench: Bench) -> None:
    outcome = train(bench, TINY)
    assert outcome.status is None, outcome.tail
    assert outcome.score is not None
    assert 1.5 < outcome.score < 4.5
    assert outcome.trained_share is not None
    assert 0.9 < outcome.trained_share < 1.5
    assert set(outcome.phases) == {"start", "compile", "train", "evaluate"}
    log = (bench.folder / "run.log").read_text()
    block = log.split("\n---\n")[1]
    assert re.fullmatch(
        r"val_bpb: \d\.\d{6}\ntraining_seconds: \d+\.\d\ntotal_seconds: \d+\.\d\npeak_vram_mb: \d+\.\d\n"
        r"mfu_percent: \d+\.\d\d\ntotal_tokens_M: \d+\.\d\nnum_steps: \d+\nnum_params_M: \d+\.\d\ndepth: 2\n",
        block,
    )
    steps = re.findall(r"^step (\d+) \| progress ([\d.]+) \| loss [\d.]+ \| lr \S+ \| \d+ tokens/s", log, re.M)
    assert [int(step) for step, _ in steps] == list(range(1, len(steps) + 1))
    assert float(steps[-1][1]) == 1.0


def test_the_same_seed_gives_the_same_losses(bench: Bench) -> None:
    losses = []
    for _ in range(2):
        done = bench.python(TINY, SWARM_SEED="3", SWARM_BENCHMARK_STEPS="5")
        losses.append(re.findall(r"loss ([\d.]+)", done.stdout))
    assert len(losses[0]) == 5
    assert losses[0] == losses[1]
    other = bench.python(TINY, SWARM_SEED="4", SWARM_BENCHMARK_STEPS="5")
    assert re.findall(r"loss ([\d.]+)", other.stdout) != losses[0]


OVERLONG = {
    "it ignores the clock": ("going_on = clock.step()", "clock.step(); going_on = clock.training_s < 2.8"),
    "its own time stands still": (
        "import gc\n",
        "import gc\nimport time\n_real = time.perf_counter\ntime.perf_counter = lambda: _real() / 1.5\n",
    ),
    "it trains before the clock starts": (
        "        going_on = clock.step()",
        "        import os\n        warm = globals().setdefault('warm', time.perf_counter())\n"
        "        going_on = True if time.perf_counter() - warm < 1.5 else clock.step()",
    ),
    "it trains before the clock starts, and calls it only twice": (
        "        going_on = clock.step()",
        "        warm = globals().setdefault('warm', time.perf_counter())\n"
        "        going_on = time.perf_counter() - warm < 2.8 or (clock.step() and (time.sleep(2) or clock.step()))",
    ),
    "it trains beyond the start-up allowance on rows of its own": (
        "    smooth, going_on = 0.0, True",
        "    time.sleep(12 - (time.perf_counter() - STARTED))  # as good as training\n    smooth, going_on = 0.0, True",
    ),
    "it trains in the evaluation": (
        "        if targets is None:",
        "        if targets is None:\n            time.sleep(2.0)",
    ),
}


@pytest.mark.parametrize(("before", "after"), OVERLONG.values(), ids=list(OVERLONG))
def test_training_past_the_budget_is_never_kept(bench: Bench, before: str, after: str) -> None:
    assert before in TINY
    code = TINY.replace(before, after, 1).replace("step = clock.steps\n", "step = max(clock.steps, 1)\n")
    outcome = train(bench, code)
    assert outcome.status is None, outcome.tail
    assert outcome.score is not None
    assert outcome.trained_share is not None
    assert outcome.trained_share > 1.3
    trial = Trial(outcome.score, outcome.memory_gb, 0, outcome.trained_share)
    assert decide(Best((9.0,), 9.0), trial, 0.01, Policy()).status == "discard"


def test_editing_the_environment_changes_nothing(bench: Bench) -> None:
    forged = (
        "import os\nos.environ.update(SWARM_BUDGET_S='8', SWARM_SEED='1', SWARM_PROFILE='h100', SWARM_DATA='x')\n"
        + TINY
    )
    outcome = train(bench, forged)
    assert outcome.status is None, outcome.tail
    assert outcome.trained_share is not None
    assert outcome.trained_share < 1.5


def test_drawing_batches_in_the_evaluation_is_a_crash(bench: Bench) -> None:
    forward = "    def forward(self, tokens, targets=None):"
    assert forward in TINY
    cheat = TINY.replace("    smooth, going_on", "    globals()['more'] = loader\n    smooth, going_on").replace(
        "        if targets is None:", "        if targets is None:\n            next(more)"
    )
    outcome = train(bench, cheat)
    assert outcome.status == "crash"
    assert outcome.reason == "training batches were drawn during the evaluation"


def test_long_steps_end_before_the_budget_is_overrun(bench: Bench) -> None:
    outcome = train(bench, TINY.replace("        train_loss =", "        time.sleep(0.7)\n        train_loss ="))
    assert outcome.status is None, outcome.tail
    assert outcome.trained_share is not None
    assert outcome.trained_share < 1.05


def test_divergence_ends_the_run_at_once(bench: Bench) -> None:
    outcome = train(bench, TINY.replace("train_loss = loss.item()", "train_loss = float('nan')"), budget_s=30.0)
    assert outcome.status == "crash"
    assert "FAIL: loss nan at step 1" in outcome.reason
    assert outcome.seconds < 25


def test_each_profile_sets_constants_that_the_template_has() -> None:
    present = pyedit.constants(TEMPLATE)
    for name, profile in SETTINGS.items():
        assert set(profile["set"]) <= set(present), name
        assert set(profile["search_space"]) <= set(present), name
    assert SMALL not in SETTINGS
