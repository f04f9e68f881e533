"""The leaderboard's arithmetic and its printed forms."""

from __future__ import annotations

import math
from typing import Any, Literal
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.leaderboard import noise_floor, spread, to_text, to_tsv
from shared.wire import Leaderboard, Standing
from worker.ratchet import pooled_sigma, prior_sigma

scores = st.floats(0.001, 100.0)


def standing(rank: int = 1, **other: Any) -> Standing:
    facts: dict[str, Any] = {
        "rank": rank,
        "machine": f"m{rank}",
        "machine_class": "cuda-h100",
        "profile": "h100",
        "rung": "base",
        "best": 0.97,
        "baseline": 1.0,
        "gain": 0.03,
        "sigma": 0.002,
        "gain_sigmas": 15.0,
        "runs": 2,
        "confirmed": True,
        "suspects": 0,
        "experiments": 126,
        "keeps": 23,
        "lineage": 23,
        "commit": "0123456789" * 4,
        "experiment": uuid4(),
        "description": "halve the batch",
    }
    return Standing(**facts | other)


def board(
    *standings: Standing,
    direction: Literal["minimize", "maximize"] = "minimize",
    order: Literal["group", "sigmas"] = "group",
) -> Leaderboard:
    return Leaderboard(campaign="nano", metric="val_bpb", direction=direction, order=order, standings=standings)


# -- arithmetic


@given(st.lists(st.lists(scores, min_size=1, max_size=5), max_size=6), st.sampled_from(["cuda-h100", "mlx-m4", "cpu"]))
def test_sigma_is_the_machines_own(reruns: list[list[float]], machine_class: str) -> None:
    baseline = reruns[0][0] if reruns else 1.0
    spreads = [spread(each)[1] for each in reruns if len(each) > 1]
    degrees = sum(len(each) - 1 for each in reruns)
    for metric in ("val_bpb", "accuracy"):
        expected = pooled_sigma(reruns, prior_sigma(metric, machine_class, baseline))
        assert noise_floor(metric, machine_class, baseline, math.fsum(spreads), degrees) == pytest.approx(expected)


def test_sigma_before_the_baseline() -> None:
    assert noise_floor("accuracy", "cpu", None, 0.0, 0) == pytest.approx(0.01)
    assert noise_floor("val_bpb", "cuda-h100", None, 0.0, 0) == pytest.approx(0.002)


@given(st.lists(scores, min_size=1, max_size=20))
def test_spread_does_not_depend_on_the_order(values: list[float]) -> None:
    assert spread(values) == spread(sorted(values))


def test_spread() -> None:
    assert spread([]) == (None, 0.0)
    assert spread([0.5]) == (0.5, 0.0)
    assert spread([1.0, 2.0, 3.0]) == (2.0, 2.0)


# -- printed

BARE = standing(2, best=None, baseline=None, gain=None, gain_sigmas=None, confirmed=False, commit=None, description="")


def test_tsv() -> None:
    head, first, second, end = to_tsv(board(standing(), BARE)).split("\n")
    assert " ".join(head.split("\t")) == (
        "rank machine machine_class profile rung best gain gain_sigmas confirmed keeps experiments lineage commit "
        "description"
    )
    assert first.split("\t") == [
        *("1", "m1", "cuda-h100", "h100", "base", "0.970000", "0.030000", "+15.0", "yes", "23", "126", "23"),
        *("0123456789" * 4, "halve the batch"),
    ]
    assert second.split("\t")[5:9] == ["-", "-", "-", "no"]
    assert second.split("\t")[12:] == ["-", ""]
    assert end == ""


def test_text() -> None:
    lines = to_text(board(standing(), BARE)).splitlines()
    assert " ".join(lines[0].split()) == (
        "# machine class profile rung val_bpb gain sigmas confirmed keeps tried lineage commit description"
    )
    assert "0123456  halve the batch" in lines[1]
    for heading, value in (("val_bpb", "0.970000"), ("gain", "0.030000"), ("sigmas", "+15.0"), ("tried", "126")):
        assert lines[0].index(heading) + len(heading) == lines[1].index(value) + len(value)  # numbers end together
    assert lines[3] == "nano: val_bpb, lower is better; best first within its class"


def test_text_says_what_is_better_and_how_it_is_ordered() -> None:
    last = to_text(board(direction="maximize", order="sigmas")).splitlines()[-1]
    assert last == "nano: val_bpb, higher is better; by gain in own sigmas"


def test_an_empty_board_has_its_headings() -> None:
    assert to_tsv(board()).count("\n") == 1
    assert len(to_text(board()).splitlines()) == 2


@pytest.mark.parametrize("form", [to_tsv, to_text])
@given(st.text())
def test_a_description_stays_one_cell_and_does_nothing_to_a_terminal(form: Any, description: str) -> None:
    text = form(board(standing(description=description + "\x1b[2J\t\r\n\x9b\u202e\u2028 end")))
    rest = text.replace("\n", "").replace("\t", "")
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\u2028" for c in rest)
    assert len(text.split("\n")) == (3 if form is to_tsv else 4)
    if form is to_tsv:
        assert all(line.count("\t") == 13 for line in text.split("\n")[:-1])
