"""The arithmetic of the score and the probe for models that look ahead."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.prepare.bpb import PROBES, Probes, Score, scored_rows
from shared.prepare.errors import MetricError


def test_bits_per_byte_is_nats_over_ln2_and_bytes() -> None:
    assert Score(nats=math.log(2) * 300, bytes=100, tokens=50, rows=1).bpb == pytest.approx(3.0)


@pytest.mark.parametrize(("nats", "size"), [(math.nan, 10), (math.inf, 10), (-1.0, 10), (1.0, 0)])
def test_what_is_no_score_is_refused(nats: float, size: int) -> None:
    with pytest.raises(MetricError):
        _ = Score(nats, size, 5, 1).bpb


@pytest.mark.parametrize(("eval_tokens", "rows"), [(64, 2), (95, 2), (96, 3), (10**9, 7)])
def test_the_rows_scored_are_fixed_and_never_looped(eval_tokens: int, rows: int) -> None:
    packed = np.arange(7 * 33, dtype=np.uint16).reshape(7, 33)
    assert np.array_equal(scored_rows(packed, eval_tokens), packed[:rows])


@given(st.integers(1, 600), st.integers(2, 300))
def test_probes_are_rows_that_exist_with_cuts_that_have_a_before_and_an_after(rows: int, length: int) -> None:
    probes = Probes(rows, length)
    assert len(probes.cuts) == min(PROBES, rows)
    assert all(0 <= row < rows and 1 <= cut < length for row, cut in probes.cuts.items())


def test_cuts_are_spread_over_all_positions() -> None:
    cuts = sorted(Probes(512, 257).cuts.values())
    assert len(cuts) == PROBES == 256
    assert cuts == list(range(1, 257))  # at 256 probes each position is looked at once
    assert Probes(512, 257).cuts != Probes(512, 257).cuts  # and nobody knows in which row


@given(st.integers(1, 8), st.integers(2, 40), st.integers(2, 500))
def test_a_change_is_of_every_token_from_the_cut_on_and_of_none_before(rows: int, length: int, vocab: int) -> None:
    inputs = np.random.default_rng(0).integers(0, vocab, size=(rows, length))
    cuts = [1 + row % length for row in range(rows)]
    changed = Probes(rows, length).change(inputs, cuts, vocab)
    for row, cut in enumerate(cuts):
        assert (changed[row, :cut] == inputs[row, :cut]).all()
        assert (changed[row, cut:] != inputs[row, cut:]).all()
    assert changed.min() >= 0
    assert changed.max() < vocab
