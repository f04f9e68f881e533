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
OWN_NOISE = 0.1  #: what a logit may differ by between two calls on the same input
PROBES = 256  #: rows in which later tokens are changed, each at another place


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


class Probes:
    """Which rows are probed for looking ahead, and from which position on their tokens are changed.

    The rows are drawn at random and the cuts spread evenly over the positions: a model that looks one token ahead at a
    share f of the positions goes unseen with a chance of (1 - f) ** PROBES. Unseeded on purpose: train.py cannot know
    which calls are probes.
    """

    def __init__(self, rows: int, seq_len: int) -> None:
        self._random = np.random.default_rng()
        count = min(PROBES, rows)
        spread = (np.arange(count) + self._random.random()) * (seq_len - 1) / count
        cuts = 1 + self._random.permutation(spread.astype(np.int64))
        self.cuts = dict(zip(self._random.permutation(rows)[:count].tolist(), cuts.tolist(), strict=True))

    def change(
        self, inputs: np.ndarray[tuple[int, int], np.dtype[np.int64]], cuts: list[int], vocab_size: int
    ) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """The inputs, shape (rows, seq_len), with every token from its row's cut on replaced by another one."""
        shift = self._random.integers(1, vocab_size, size=inputs.shape)
        after = np.arange(inputs.shape[1])[None, :] >= np.array(cuts)[:, None]
        return np.where(after, (inputs + shift) % vocab_size, inputs)

    def first(self) -> bool:
        """Whether a batch's changed inputs are shown before the real ones."""
        return bool(self._random.random() < 0.5)
