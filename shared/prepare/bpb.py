"""Bits per byte: val_bpb = nats / (ln 2 x bytes), special tokens excluded (reference, "The Metric: val_bpb").

Also which rows are scored, and how a model that looks ahead is found out. No backend is imported here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .errors import MetricError
from .packing import Rows

LEAK_TOLERANCE = 1e-4  #: change in an earlier logit above which a model is taken to see later tokens
PROBE_POSITIONS = 16  #: logits compared in a row: the last ones before the change, where looking ahead pays most


@dataclass(frozen=True)
class Score:
    """Sums over the scored tokens."""

    nats: float
    bytes: int
    tokens: int
    rows: int

    @property
    def bpb(self) -> float:
        """Raises MetricError when the sums are not those of a probability distribution over real text."""
        if not math.isfinite(self.nats) or self.nats < 0 or self.bytes <= 0:
            raise MetricError(f"the model's loss over the validation rows is {self.nats} nats: not a score")
        return self.nats / (math.log(2) * self.bytes)


def scored_rows(rows: Rows, eval_tokens: int) -> Rows:
    """The fixed rows that every evaluation scores: the first eval_tokens / seq_len, or all there are; never looped."""
    return rows[: eval_tokens // (rows.shape[1] - 1)]


@dataclass(frozen=True)
class Probe:
    """Inputs whose tails were changed, and the positions whose logits must not have moved."""

    changed: np.ndarray[tuple[int, int], np.dtype[np.int64]]  #: shape (rows, seq_len)
    positions: np.ndarray[tuple[int, int], np.dtype[np.int64]]  #: shape (rows, PROBE_POSITIONS), all before the change

    @classmethod
    def of(cls, inputs: np.ndarray[tuple[int, int], np.dtype[np.int64]], vocab_size: int) -> Probe:
        """Changes every token from a random position on, another one for each row.

        Unseeded on purpose: train.py cannot know the positions.
        """
        random = np.random.default_rng()
        rows, length = inputs.shape
        cuts = random.integers(1, length, size=(rows, 1))
        shift = random.integers(1, vocab_size, size=inputs.shape)
        after = np.arange(length)[None, :] >= cuts
        near = cuts - 1 - np.arange(PROBE_POSITIONS // 2)[None, :]
        far = random.integers(0, cuts, size=(rows, PROBE_POSITIONS // 2))
        positions = np.maximum(np.concatenate([near, far], axis=1), 0)
        return cls(np.where(after, (inputs + shift) % vocab_size, inputs), positions)
