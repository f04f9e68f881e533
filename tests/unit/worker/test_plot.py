"""The progress picture is written for whatever a campaign may hold."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from shared.task import TaskSpec, parse_task
from shared.wire import Status
from tests.fast_task import CONFIG
from worker.journal import Experiment
from worker.plot import plot

from .test_results import experiment

TASK = parse_task(CONFIG, "fast")
MAXIMISE = TASK.model_copy(update={"metric": "speed", "metric_direction": "maximize"})
PNG = b"\x89PNG\r\n\x1a\n"

BASELINE = experiment(1.0)
MIXED = [
    BASELINE,
    experiment(1.3, Status.DISCARD, "worse", 1),
    experiment(None, Status.CRASH, "too big", 2),
    experiment(0.9, Status.KEEP, "better", 3),
    experiment(None, Status.TIMEOUT, "too slow", 4),
    experiment(None, Status.CONFLICT, "does not fit", 5),
    experiment(0.95, Status.DISCARD, "no better", 6),
    experiment(None, None, "in progress", 7),
]
CLIMB = [BASELINE, experiment(1.4, Status.KEEP, "faster", 1), experiment(0.2, Status.DISCARD, "slower", 2)]
ODD = ["costs $5", "between $5 and $10", r"$\frac$", r"\$", "naïve — ünïcode ±", "x" * 500, "", "a_b^c {d} %e"]


@pytest.mark.parametrize(
    ("experiments", "task"),
    [
        pytest.param([BASELINE], TASK, id="only a baseline"),
        pytest.param(MIXED, TASK, id="keeps, discards and crashes"),
        pytest.param(CLIMB, MAXIMISE, id="higher is better"),
        pytest.param([experiment(0.0)], MAXIMISE, id="a baseline of zero"),
        pytest.param([BASELINE, experiment(1.0, Status.KEEP, "shorter", 1)], TASK, id="a keep of the same score"),
        pytest.param(
            [BASELINE, *(experiment(0.9 - i / 100, description=text, number=i + 1) for i, text in enumerate(ODD))],
            TASK,
            id="odd descriptions",
        ),
    ],
)
def test_a_picture_is_written(tmp_path: Path, experiments: list[Experiment], task: TaskSpec) -> None:
    picture = tmp_path / "progress.png"
    plot(experiments, task, "mar5 on h100", picture)
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.parametrize("title", ["save $5 or $10", r"$\frac$", "ünïcode"])
def test_any_title_can_be_drawn(tmp_path: Path, title: str) -> None:
    plot(MIXED, TASK, title, tmp_path / "progress.png")
    assert (tmp_path / "progress.png").read_bytes().startswith(PNG)


def test_a_metric_with_dollars_can_be_drawn(tmp_path: Path) -> None:
    plot(MIXED, TASK.model_copy(update={"metric": r"$\frac$"}), "mar5", tmp_path / "progress.png")
    assert (tmp_path / "progress.png").read_bytes().startswith(PNG)


def test_the_ending_of_the_path_says_the_format(tmp_path: Path) -> None:
    plot(MIXED, TASK, "mar5", tmp_path / "progress.svg")
    assert ElementTree.parse(tmp_path / "progress.svg").getroot().tag.endswith("svg")


def words(path: Path) -> str:
    """An SVG's texts: matplotlib writes each beside its outline, as a comment."""
    return "\n".join(line for line in path.read_text().splitlines() if line.strip().startswith("<!--"))


def test_the_picture_counts_experiments_and_keeps_and_labels_the_keeps(tmp_path: Path) -> None:
    plot(MIXED, TASK, "mar5", tmp_path / "progress.svg")
    shown = words(tmp_path / "progress.svg")
    assert "mar5: 6 experiments, 1 kept" in shown
    assert "better" in shown and "baseline" in shown
    assert "worse" not in shown
    assert "val_bpb (lower is better)" in shown


def test_a_maximise_task_says_that_higher_is_better(tmp_path: Path) -> None:
    plot(CLIMB, MAXIMISE, "mar5", tmp_path / "progress.svg")
    assert "speed (higher is better)" in words(tmp_path / "progress.svg")


def test_a_dollar_in_a_label_stays_a_dollar(tmp_path: Path) -> None:
    plot([BASELINE, experiment(0.9, description="from $5 to $10", number=1)], TASK, "mar5", tmp_path / "progress.svg")
    assert "from $5 to $10" in words(tmp_path / "progress.svg").replace(r"\$", "$")


def test_a_long_label_is_cut(tmp_path: Path) -> None:
    plot([BASELINE, experiment(0.9, description="x" * 500, number=1)], TASK, "mar5", tmp_path / "progress.svg")
    shown = words(tmp_path / "progress.svg")
    assert "x" * 30 in shown and "x" * 60 not in shown
