"""The numbers that every run of a campaign is held to (reference, "System Parameters").

A profile bundles the constants that depend on the hardware. `h100` and `apple` are the reference's; `tiny` is for
CPU laptops and CI; docs/benchmarks.md has what it was chosen by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

VAL_SHARD: Final = 6542  #: climbmix's pinned validation shard; never trained on
MAX_SHARD: Final = 6542  #: climbmix's highest shard index
STARTUP_EXCLUDE_STEPS: Final = 1  #: steps before the clock starts (compilation)
BUFFER_DOCUMENTS: Final = 1000  #: documents that best-fit packing chooses from
TOKENIZER_CHARACTERS: Final = 1_000_000_000  #: at most so many characters train the tokenizer
SPECIAL_TOKENS: Final = ("<|bos|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>")


@dataclass(frozen=True)
class Profile:
    """The constants a campaign runs with on one kind of hardware."""

    name: str
    max_seq_len: int  #: tokens in a row's input
    time_budget_s: float  #: seconds of training, the untimed first step excluded
    eval_tokens: int  #: validation tokens scored, fewer where the validation text has fewer
    vocab_size: int  #: tokenizer vocabulary, the four special tokens included
    train_shards: int  #: shards packed by default
    document_characters: int  #: longest document cut from the embedded text
    startup_allowance_s: float  #: from the start to the end of the untimed step; beyond it counts as training
    evaluation_allowance_s: float  #: for the evaluation; beyond it counts as training
    cycle_allowance_s: float  #: start-up, compilation and evaluation together, on top of the budget
    threads: int | None  #: CPU threads of a run; None leaves the choice to the backend


PROFILES: Final = {
    p.name: p
    for p in (
        Profile(
            "h100",
            max_seq_len=2048,
            time_budget_s=300.0,
            eval_tokens=20_971_520,
            vocab_size=8192,
            train_shards=24,
            document_characters=3000,
            startup_allowance_s=180.0,
            evaluation_allowance_s=120.0,
            cycle_allowance_s=600.0,
            threads=None,
        ),
        Profile(
            "apple",
            max_seq_len=2048,
            time_budget_s=300.0,
            eval_tokens=1_572_864,
            vocab_size=8192,
            train_shards=24,
            document_characters=3000,
            startup_allowance_s=120.0,
            evaluation_allowance_s=240.0,
            cycle_allowance_s=600.0,
            threads=None,
        ),
        Profile(
            "tiny",
            max_seq_len=256,
            time_budget_s=9.0,
            eval_tokens=131_072,
            vocab_size=512,
            train_shards=4,
            document_characters=160,
            startup_allowance_s=10.0,
            evaluation_allowance_s=10.0,
            cycle_allowance_s=80.0,
            threads=1,
        ),
    )
}
