"""The arithmetic of the score and the probe for models that look ahead."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.prepare.bpb import PROBE_POSITIONS, Probe, Score, scored_rows
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


@given(st.integers(1, 8), st.integers(2, 40), st.integers(2, 500))
def test_a_probe_changes_every_later_token_and_looks_only_before(rows: int, length: int, vocab: int) -> None:
    inputs = np.random.default_rng(0).integers(0, vocab, size=(rows, length))
    probe = Probe.of(inputs, vocab)
    same = probe.changed == inputs
    for row in range(rows):
        cut = int(same[row].sum())
        assert 1 <= cut < length
        assert same[row, :cut].all()
        assert (probe.positions[row] < cut).all()
        assert cut - 1 in probe.positions[row]
    assert probe.positions.shape == (rows, PROBE_POSITIONS)
    assert probe.changed.min() >= 0
    assert probe.changed.max() < vocab
