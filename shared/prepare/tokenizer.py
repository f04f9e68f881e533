"""Byte-pair tokenizer: trained by rustbpe on a fixed list of shards, run by tiktoken.

What is read back is a JSON of the ranks. The reference's tokenizer.pkl is written beside it for tools that expect it,
and never read here: unpickling runs code.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken

from .constants import SPECIAL_TOKENS, TOKENIZER_CHARACTERS
from .data import documents
from .errors import DataError

#: Pre-tokenizer: GPT-4's pattern with numbers in groups of two digits at most, which suits small vocabularies.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to token ids and back. Ids 0..n-1 are merges by rank, the last four are special."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            name=f"swarm-{len(ranks) + len(special)}",
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens=special,
        )
        self.bos = special[SPECIAL_TOKENS[0]]
        self._ranks = ranks

    @property
    def vocab_size(self) -> int:
        return len(self._ranks) + len(SPECIAL_TOKENS)

    def get_vocab_size(self) -> int:
        """The reference's name for `vocab_size`."""
        return self.vocab_size

    def encode_documents(self, texts: list[str], threads: int) -> list[list[int]]:
        """Token ids of each text, BOS first. Special tokens written out in a text are plain text."""
        return [[self.bos, *ids] for ids in self.encoding.encode_ordinary_batch(texts, num_threads=threads)]

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    def token_bytes(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """UTF-8 bytes of each token, shape (vocab_size,), int32; special tokens 0.

        Counted on the token's own bytes: decoding to str first would turn a partial UTF-8 sequence into U+FFFD, which
        has three bytes.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self._ranks.items():
            lengths[rank] = len(token)
        return lengths

    def save(self, folder: Path) -> None:
        """Writes ranks.json, token_bytes.npy and tokenizer.pkl; ranks.json last, by rename: it marks completeness."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "token_bytes.npy", self.token_bytes())
        (folder / "tokenizer.pkl").write_bytes(pickle.dumps(self.encoding))
        in_order = sorted(self._ranks, key=self._ranks.__getitem__)
        partial = folder / f"ranks.{os.getpid()}.tmp"
        partial.write_text(
            json.dumps({"pattern": PATTERN, "ranks": [base64.b64encode(token).decode() for token in in_order]})
        )
        partial.replace(folder / "ranks.json")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Raises DataError when the folder holds no tokenizer of this version."""
        try:
            stored = json.loads((folder / "ranks.json").read_text())
        except FileNotFoundError:
            raise DataError(f"{folder}: no tokenizer; run `swarm prepare`") from None
        if stored["pattern"] != PATTERN:
            raise DataError(f"{folder}: made with another pre-tokenizer; remove it and run `swarm prepare`")
        return cls({base64.b64decode(token): rank for rank, token in enumerate(stored["ranks"])})


def train(shards: Iterable[Path], vocab_size: int) -> Tokenizer:
    """Trains on the shards in order, at most TOKENIZER_CHARACTERS characters; `vocab_size` includes the specials.

    Raises DataError when the text has too few distinct pairs for the vocabulary.
    """
    import rustbpe

    def texts() -> Iterator[str]:
        left = TOKENIZER_CHARACTERS
        for shard in shards:
            for group in documents(shard):
                for text in group:
                    yield text[:left]
                    left -= len(text)
                    if left <= 0:
                        return

    trainer = rustbpe.Tokenizer()
    merges = vocab_size - len(SPECIAL_TOKENS)
    trainer.train_from_iterator(texts(), vocab_size=merges, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) != merges:
        raise DataError(f"the training text gives only {len(ranks)} tokens, the profile asks for {merges}: add text")
    return Tokenizer(ranks)
