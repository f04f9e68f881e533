"""What a run is ordered to do, and the clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shared.prepare.constants import PROFILES
from tests.conftest import ROOT

READ = """
import json, sys
from shared.prepare import run
print(json.dumps([run.RUN.profile.name, run.RUN.budget_s, run.RUN.seed, str(run.RUN.cache)]))
"""


def ask(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"HOME": "/home/somebody", "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_budget_seed_profile_and_cache_come_from_the_environment() -> None:
    done = ask(READ, SWARM_PROFILE="tiny", SWARM_BUDGET_S="3.5", SWARM_SEED="7", AUTORESEARCH_CACHE="/c")
    assert json.loads(done.stdout) == ["tiny", 3.5, 7, "/c"]


def test_without_orders_the_profile_decides() -> None:
    done = ask(READ, SWARM_PROFILE="h100")
    assert json.loads(done.stdout) == ["h100", 300.0, 42, "/home/somebody/.cache/autoresearch"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the runner's cross-check of the record holds instead")
def test_changing_the_environment_before_the_import_changes_nothing() -> None:
    forged = "import os; os.environ.update(SWARM_BUDGET_S='999', SWARM_SEED='1', SWARM_PROFILE='h100')\n" + READ
    done = ask(forged, SWARM_PROFILE="tiny", SWARM_BUDGET_S="3.5", SWARM_SEED="7")
    assert json.loads(done.stdout)[:3] == ["tiny", 3.5, 7]


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [({}, "SWARM_PROFILE is ''"), ({"SWARM_PROFILE": "tiny", "SWARM_SEED": "x"}, "are numbers")],
)
def test_an_unusable_order_ends_with_one_line(environment: dict[str, str], complaint: str) -> None:
    done = ask(READ, **environment)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


CLOCK = """
import json
from shared.prepare.run import RUN, Clock, Record
told = []
class Told(Record):
    def __init__(self): pass
    def tell(self, event, **values): told.append(event)
clock = Clock(RUN, Told())
now = iter({times})
Clock._now = staticmethod(lambda: next(now))
seen = [[clock.step(), round(clock.progress, 3), clock.training_s] for _ in range({steps})]
print(json.dumps([seen, told]))
"""


def test_the_first_step_is_untimed_and_the_budget_ends_training() -> None:
    done = ask(CLOCK.format(times=[100.0, 101.0, 103.0, 104.1], steps=4), SWARM_PROFILE="tiny", SWARM_BUDGET_S="4")
    steps, told = json.loads(done.stdout)
    assert [going_on for going_on, *_ in steps] == [True, True, False, False]  # another 2 s would have been 5 of 4
    assert [progress for _, progress, _ in steps] == [0.0, 0.25, 0.75, 1.0]
    assert [training_s for *_, training_s in steps] == pytest.approx([0.0, 1.0, 3.0, 4.1])
    assert told == ["clock", "trained"]


def test_short_steps_use_the_whole_budget() -> None:
    times = [10 + n / 10 for n in range(60)]
    done = ask(CLOCK.format(times=times, steps=41), SWARM_PROFILE="tiny", SWARM_BUDGET_S="4")
    steps, _ = json.loads(done.stdout)
    assert [going_on for going_on, *_ in steps] == [True] * 40 + [False]


def test_benchmark_mode_goes_by_steps() -> None:
    done = ask(CLOCK.format(times=[1.0] * 5, steps=5), SWARM_PROFILE="tiny", SWARM_BENCHMARK_STEPS="5")
    steps, _ = json.loads(done.stdout)
    assert [going_on for going_on, *_ in steps] == [True, True, True, True, False]
    assert [progress for _, progress, _ in steps] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_profiles_hold_the_references_system_parameters() -> None:
    h100, apple, tiny = (PROFILES[name] for name in ("h100", "apple", "tiny"))
    assert (h100.max_seq_len, h100.time_budget_s, h100.eval_tokens, h100.vocab_size) == (2048, 300, 20_971_520, 8192)
    assert (apple.max_seq_len, apple.time_budget_s, apple.eval_tokens, apple.vocab_size) == (2048, 300, 1_572_864, 8192)
    assert tiny.vocab_size <= 512
    assert 8 <= tiny.time_budget_s <= 10
    assert all(p.eval_tokens % p.max_seq_len == 0 for p in PROFILES.values())


def test_the_record_holds_one_json_object_a_line(tmp_path: Path) -> None:
    record = tmp_path / "record"
    ask("import shared.prepare.run", SWARM_PROFILE="tiny", SWARM_RECORD=str(record), SWARM_SEED="9")
    [line] = record.read_text().splitlines()
    assert json.loads(line)["event"] == "start"
    assert json.loads(line)["seed"] == 9
