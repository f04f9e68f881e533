"""results.tsv in the reference's format, and where a campaign stands."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.task import TaskSpec, parse_task
from shared.wire import Status
from tests.fast_task import CONFIG
from worker.journal import Experiment, Run
from worker.results import noise_floor, one_line, standing, to_dicts, to_tsv

from .test_journal import attempt, execute, opened, start

TASK = parse_task(CONFIG, "fast")
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


def experiment(
    score: float | None = 0.9979,
    status: Status | None = Status.KEEP,
    description: str = "baseline",
    number: int = 0,
    memory_gb: float = 44.0,
    tested: str = "a1b2c3d4e5f6",
) -> Experiment:
    """A decided experiment with one run."""
    run = Run(7, score, memory_gb if score is not None else 0.0, 300.0, None if score is not None else "crash", "", 1.0)
    return Experiment(
        id=f"id-{number}",
        number=number,
        tested=tested,
        description=description,
        proposer="search",
        edits={},
        params={},
        nodes_added=0,
        code_state=f"state-{number}",
        runs=[] if status is Status.CONFLICT else [run],
        status=status,
        reason="it was so",
        kept="kept" if status is Status.KEEP else None,
    )


def task(**changes: object) -> TaskSpec:
    return TASK.model_copy(update=changes)


# -- results.tsv


def test_the_references_own_log_comes_out_letter_by_letter() -> None:
    log = [
        experiment(0.9979, Status.KEEP, "baseline", 0, 44.0, "a1b2c3d" + "0" * 33),
        experiment(0.9932, Status.KEEP, "increase LR to 0.04", 1, 44.2, "b2c3d4e" + "0" * 33),
        experiment(1.005, Status.DISCARD, "switch to GeLU activation", 2, 44.0, "c3d4e5f" + "0" * 33),
        experiment(None, Status.CRASH, "double model width (OOM)", 3, 0.0, "d4e5f6a" + "0" * 33),
        experiment(0.9951, Status.DISCARD, "add residual scaling (marginal + complex)", 4, 44.1, "e5f6a7b" + "0" * 33),
    ]
    assert to_tsv(log, "val_bpb") == HEADER + (
        "a1b2c3d\t0.997900\t44.0\tkeep\tbaseline\n"
        "b2c3d4e\t0.993200\t44.2\tkeep\tincrease LR to 0.04\n"
        "c3d4e5f\t1.005000\t44.0\tdiscard\tswitch to GeLU activation\n"
        "d4e5f6a\t0.000000\t0.0\tcrash\tdouble model width (OOM)\n"
        "e5f6a7b\t0.995100\t44.1\tdiscard\tadd residual scaling (marginal + complex)\n"
    )


def test_without_experiments_there_is_the_header() -> None:
    assert to_tsv([], "val_bpb") == HEADER


def test_the_header_names_the_tasks_own_metric() -> None:
    assert to_tsv([], "tokens_per_second").split("\t")[1] == "tokens_per_second"


def test_scores_have_six_decimals_and_memory_one() -> None:
    row = to_tsv([experiment(1.23456789, memory_gb=27.28)], "val_bpb").splitlines()[1].split("\t")
    assert row[1:3] == ["1.234568", "27.3"]


@pytest.mark.parametrize("status", [Status.CRASH, Status.TIMEOUT, Status.CONFLICT])
def test_whatever_gave_no_score_is_a_crash_of_zero(status: Status) -> None:
    row = to_tsv([experiment(None, status, "too big")], "val_bpb").splitlines()[1].split("\t")
    assert row == ["a1b2c3d", "0.000000", "0.0", "crash", "too big"]


def test_a_crash_that_printed_a_score_is_still_a_crash_of_zero() -> None:
    row = to_tsv([experiment(-1.0, Status.CRASH)], "val_bpb").splitlines()[1].split("\t")
    assert row[1:4] == ["0.000000", "0.0", "crash"]


def test_an_undecided_experiment_is_absent() -> None:
    log = [experiment(), experiment(0.9, None, "in progress", 1)]
    assert to_tsv(log, "val_bpb") == to_tsv(log[:1], "val_bpb")


def test_the_score_is_the_one_it_was_decided_on_whatever_reruns_said() -> None:
    rerun = experiment(0.9)
    rerun.runs.append(Run(8, 0.95, 44.0, 300.0, None, "", 1.0))
    assert "\t0.900000\t" in to_tsv([rerun], "val_bpb")


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("LR\t0.1", "LR 0.1"),
        ("LR 0.1, WIDTH 8", "LR 0.1; WIDTH 8"),
        ("one\ntwo\r\nthree\rfour", "one two three four"),
        ("\x1b[31mred\x1b[0m", "[31mred [0m"),
        ("bell\x07 null\x00 delete\x7f next\x85line", "bell null delete next line"),
        ("line\u2028separator\u2029paragraph", "line separator paragraph"),
        ("  wide \u00a0  blanks  ", "wide blanks"),
        ("naïve ☃ stays", "naïve ☃ stays"),
        ("", ""),
    ],
)
def test_what_would_break_a_cell_is_replaced(text: str, cell: str) -> None:
    assert one_line(text) == cell


@given(st.lists(st.text(), max_size=4))
@settings(deadline=None)
def test_any_descriptions_make_a_table_of_five_columns_without_commas(texts: list[str]) -> None:
    log = [experiment(description=text, number=number) for number, text in enumerate(texts)]
    table = to_tsv(log, "val_bpb")
    lines = table.splitlines()  # also at the odd line ends of Unicode
    assert len(lines) == 1 + len(texts)
    assert all(line.count("\t") == 4 for line in lines)
    assert "," not in table


# -- standing


def test_there_is_no_standing_before_the_baseline(tmp_path: Path) -> None:
    journal = opened(tmp_path / "journal.jsonl")
    assert standing(journal, TASK) is None
    start(journal)
    assert standing(journal, TASK) is None


def test_standing_counts_and_means(tmp_path: Path) -> None:
    journal = opened(tmp_path / "journal.jsonl")
    attempt(journal, 1.0, Status.KEEP, "baseline")
    execute(journal, "id-0", 1.002)
    attempt(journal, 0.99, Status.KEEP, "better")
    attempt(journal, 1.2, Status.DISCARD)
    attempt(journal, None, Status.CRASH)
    execute(journal, "id-1", 0.994)
    start(journal)
    where = standing(journal, TASK)
    assert where is not None
    assert where.baseline == pytest.approx(1.001)
    assert where.best == pytest.approx(0.992)
    assert (where.best_runs, where.experiments, where.keeps) == (2, 3, 1)
    assert (where.commit, where.description) == (journal.experiments[1].kept, "better")
    assert where.sigma == noise_floor(journal, TASK)
    assert where.gain_sigmas == pytest.approx(0.009 / where.sigma)


def test_at_the_baseline_nothing_is_gained_or_kept(tmp_path: Path) -> None:
    journal = opened(tmp_path / "journal.jsonl")
    attempt(journal, 1.0, Status.KEEP, "baseline")
    where = standing(journal, TASK)
    assert where is not None
    assert (where.baseline, where.best, where.gain_sigmas, where.experiments, where.keeps) == (1.0, 1.0, 0.0, 0, 0)


@pytest.mark.parametrize(("direction", "sign"), [("minimize", 1), ("maximize", -1)])
def test_a_gain_is_positive_where_the_best_is_better(tmp_path: Path, direction: str, sign: int) -> None:
    journal = opened(tmp_path / "journal.jsonl")
    attempt(journal, 100.0, Status.KEEP)
    attempt(journal, 100.0 - sign * 5, Status.KEEP)
    where = standing(journal, task(metric="speed", metric_direction=direction))
    assert where is not None and where.gain_sigmas == pytest.approx(5.0)


# -- the noise floor


@pytest.mark.parametrize(("machine_class", "prior"), [("cuda-h100", 0.002), ("mps-m4max", 0.03), ("cpu", 0.01)])
def test_before_reruns_the_noise_floor_is_the_classs_prior(tmp_path: Path, machine_class: str, prior: float) -> None:
    journal = opened(tmp_path / "journal.jsonl", machine_class)
    attempt(journal, 1.0, Status.KEEP)
    attempt(journal, 3.0, Status.DISCARD)
    assert noise_floor(journal, TASK) == pytest.approx(prior)


def test_another_metrics_noise_floor_starts_at_one_percent_of_the_baseline(tmp_path: Path) -> None:
    journal = opened(tmp_path / "journal.jsonl")
    attempt(journal, 250.0, Status.KEEP)
    assert noise_floor(journal, task(metric="speed")) == pytest.approx(2.5)


def test_reruns_of_any_code_move_the_noise_floor(tmp_path: Path) -> None:
    journal = opened(tmp_path / "journal.jsonl")
    attempt(journal, 1.0, Status.KEEP)
    attempt(journal, 0.9, Status.KEEP)
    execute(journal, "id-0", 1.1)
    once = noise_floor(journal, TASK)
    execute(journal, "id-1", 1.0)
    assert 0.002 < once < noise_floor(journal, TASK)


def test_a_rerun_that_crashed_leaves_the_noise_floor(tmp_path: Path) -> None:
    journal = opened(tmp_path / "journal.jsonl")
    attempt(journal, 1.0, Status.KEEP)
    execute(journal, "id-0", None)
    assert noise_floor(journal, TASK) == pytest.approx(0.002)
    where = standing(journal, TASK)
    assert where is not None and math.isclose(where.best, 1.0) and where.best_runs == 1


# -- for --json


def test_to_dicts_is_json_with_everything_a_row_knows(tmp_path: Path) -> None:
    journal = opened(tmp_path / "journal.jsonl")
    attempt(journal, 1.0, Status.KEEP, "baseline")
    attempt(journal, None, Status.CRASH)
    attempt(journal, None, Status.CONFLICT)
    start(journal)
    execute(journal, "id-0", 1.5)
    rows = json.loads(json.dumps(to_dicts(journal.experiments), allow_nan=False))
    assert rows[0] == {
        "number": 0,
        "id": "id-0",
        "commit": journal.experiments[0].tested,
        "kept": journal.experiments[0].kept,
        "score": 1.0,
        "scores": [1.0, 1.5],
        "memory_gb": 44.0,
        "status": "keep",
        "reason": "it was so",
        "description": "baseline",
        "proposer": "search",
        "seeds": [7, 7],
        "digest": None,
        "epochs": None,
    }
    assert [row["status"] for row in rows] == ["keep", "crash", "conflict", None]
    assert [row["score"] for row in rows] == [1.0, None, None, None]
    assert [row["memory_gb"] for row in rows] == [44.0, 0.0, None, None]
