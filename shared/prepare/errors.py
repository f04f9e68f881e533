"""What can be wrong with the data, the model or the order of calls."""

from __future__ import annotations


class PrepareError(Exception):
    """Something a person or train.py has to mend; the message says what, where and how."""


class DataError(PrepareError):
    """The data, tokenizer or packed rows are missing or unusable."""


class MetricError(PrepareError):
    """The model cannot be scored: it looks ahead, or its scores are not finite."""
