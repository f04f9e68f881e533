"""The immutable half of a campaign: data, tokenizer, packed rows, the clock and the metric.

This package is copied into every campaign repository as `prepare/` and never edited there: a digest over it
travels with every result. train.py imports one backend (`prepare.torch_backend`) and nothing else of ours.
Importing this package itself does nothing.
"""
