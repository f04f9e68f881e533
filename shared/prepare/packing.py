"""Rows of tokens, packed once and memory-mapped ever after.

BOS-aligned best-fit packing (reference, "BOS-Aligned Best-Fit Packing"): every row holds exactly seq_len + 1 tokens and
starts with BOS; the largest buffered document that fits goes in next; where none fits, the shortest is cropped to fill
the row. Utilisation is 100 %, what is cropped is lost and counted. Packing runs shard by shard with an empty buffer at
each shard's start, so a killed preparation resumes at a shard's boundary and ends in the same bytes.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from .constants import BUFFER_DOCUMENTS, PROFILES, Profile
from .data import EMBEDDED, Folder, Shard, documents, write_embedded
from .download import CLIMBMIX, DEFAULT_SOURCE, Source, climbmix_shards, fetch
from .errors import DataError
from .tokenizer import Tokenizer
from .tokenizer import train as train_tokenizer

FORMAT = 1  #: version of the rows' format; other versions are packed again
TOKENIZER_SHARDS = 24  #: the tokenizer is trained on the first shards only, so more training rows keep the vocabulary

Progress = Callable[[str, int, int], None]  #: what is being made, how much is done, of how much
Rows = np.ndarray[tuple[int, int], np.dtype[np.uint16]]


def best_fit(texts: Iterable[list[int]], row_tokens: int, buffer_documents: int) -> Iterator[tuple[list[int], int]]:
    """Yields full rows of `row_tokens` ids, each with the number of tokens that were cropped away to fill it.

    Among documents of one length the one that came first goes first, so the order is a function of the input alone.
    The unfinished last row comes as ([], its tokens): all of it is lost.
    """
    source = iter(texts)
    waiting: list[tuple[int, int]] = []  # (length, arrival), sorted
    ids: dict[int, list[int]] = {}
    arrivals = 0
    row: list[int] = []
    cropped = 0
    while True:
        while len(waiting) < buffer_documents and (text := next(source, None)) is not None:
            bisect.insort(waiting, (len(text), arrivals))
            ids[arrivals] = text
            arrivals += 1
        if not waiting:
            yield [], len(row) + cropped
            return
        space = row_tokens - len(row)
        above = bisect.bisect_left(waiting, (space + 1, -1))
        at = bisect.bisect_left(waiting, (waiting[above - 1][0], -1)) if above else 0
        length, arrival = waiting.pop(at)
        row += ids.pop(arrival)[:space]
        cropped += max(length - space, 0)
        if len(row) == row_tokens:
            yield row, cropped
            row, cropped = [], 0


@dataclass(frozen=True)
class Packed:
    """One side (train or validation) of a packed data set."""

    rows: int
    tokens_kept: int  #: tokens that are in rows
    tokens_lost: int  #: tokens cropped to fill a row, or in the unfinished last row of a shard
    shards: tuple[Shard, ...]

    @property
    def lost(self) -> float:
        """Share of the packed documents' tokens that is in no row."""
        return self.tokens_lost / max(self.tokens_kept + self.tokens_lost, 1)


@dataclass(frozen=True)
class Manifest:
    """What lies in a rows folder, written last: where it exists the rows are whole."""

    format: int
    profile: str
    data: str
    row_tokens: int
    vocab_size: int
    tokenizer_sha256: str
    train: Packed
    validation: Packed

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Raises DataError when the folder has no whole rows of this format."""
        try:
            stored = json.loads((folder / "manifest.json").read_text())
        except FileNotFoundError:
            raise DataError(f"{folder}: no packed rows; run `swarm prepare`") from None
        if stored["format"] != FORMAT:
            raise DataError(f"{folder}: rows of format {stored['format']}, need {FORMAT}; run `swarm prepare`")
        return cls(**{**stored, **{side: _packed(stored[side]) for side in ("train", "validation")}})


def _packed(stored: dict[str, Any]) -> Packed:
    return Packed(**{**stored, "shards": tuple(Shard(**shard) for shard in stored["shards"])})


def rows_folder(cache: Path, data: str, profile: str, train_shards: int | None = None) -> Path:
    """The rows of a data set for a profile; other numbers of shards than the profile's have a folder of their own."""
    number = f"-{train_shards}" if train_shards and train_shards != PROFILES[profile].train_shards else ""
    return cache / "rows" / f"{data}-{profile}{number}"


def tokenizer_folder(cache: Path, data: str, vocab_size: int) -> Path:
    return cache / "tokenizer" / f"{data}-{vocab_size}"


def data_folder(cache: Path, data: str, profile: Profile) -> Path:
    """The data set's shards. The embedded text is cut to suit the profile's rows: a folder for each length."""
    return cache / "data" / (f"{EMBEDDED}-{profile.document_characters}" if data == EMBEDDED else data)


def open_rows(folder: Path, side: str, row_tokens: int) -> Rows:
    """Memory-maps `train` or `val` rows, shape (rows, seq_len + 1), uint16, read-only."""
    path = folder / f"{side}.bin"
    if not path.exists():
        raise DataError(f"{path}: missing; run `swarm prepare`")
    return np.memmap(path, dtype=np.uint16, mode="r").reshape(-1, row_tokens)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare(
    cache: Path,
    profile_name: str,
    data: str,
    train_shards: int | None,
    threads: int,
    progress: Progress,
    source: Source = DEFAULT_SOURCE,
) -> Manifest:
    """Makes or downloads shards (embedded text, climbmix), then tokenizer and rows; whatever is whole already stays.

    Raises DataError when the data set is missing or unusable. Resumable: killed at any moment, a second call continues
    after the last whole shard. One at a time for each cache: a second call waits for the first. `progress` is called
    often.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        where = data_folder(cache, data, PROFILES[profile_name])
        _bring(
            where, data, train_shards or PROFILES[profile_name].train_shards, PROFILES[profile_name], source, progress
        )
        return _pack(cache, Folder.open(where), profile_name, data, train_shards, threads, progress)


def _bring(where: Path, data: str, train_shards: int, profile: Profile, source: Source, progress: Progress) -> None:
    """Makes sure of the data set's shards."""
    if data == EMBEDDED:
        progress("text", 0, 1)
        write_embedded(where, profile.document_characters)
    elif data == CLIMBMIX:
        fetch(climbmix_shards(train_shards), where, source, progress)
    elif not where.exists():
        raise DataError(f"data set {data!r} is not in {where.parent}; name its folder: `swarm prepare --data PATH`")


def _pack(
    cache: Path,
    folder: Folder,
    profile_name: str,
    data: str,
    train_shards: int | None,
    threads: int,
    progress: Progress,
) -> Manifest:
    profile = PROFILES[profile_name]
    chosen = folder.train[: train_shards or profile.train_shards]
    tokenizer = _tokenizer(tokenizer_folder(cache, data, profile.vocab_size), folder, profile, progress)

    rows = rows_folder(cache, data, profile_name, train_shards)
    order = {
        "format": FORMAT,
        "shards": [[shard.name, pq.read_metadata(shard).num_rows] for shard in (*chosen, folder.validation)],
        "tokenizer_sha256": sha256_of(tokenizer_folder(cache, data, profile.vocab_size) / "ranks.json"),
    }
    if (rows / "manifest.json").exists() and _read_json(rows / "order.json") == order:
        return Manifest.load(rows)
    if _read_json(rows / "order.json") != order:
        rows.mkdir(parents=True, exist_ok=True)
        for stale in rows.iterdir():
            stale.unlink()
        _write_json(rows / "order.json", order)

    most = profile.eval_tokens // profile.max_seq_len
    packer = _Packer(tokenizer, profile.max_seq_len + 1, threads, progress)
    validation = packer.pack(rows, "val", (folder.validation,), most_rows=most)
    train = packer.pack(rows, "train", chosen, most_rows=None)
    if not train.rows or not validation.rows:
        raise DataError(
            f"{folder.validation.parent}: too little text for one row of {profile.max_seq_len + 1} tokens on each side"
        )
    manifest = Manifest(
        FORMAT,
        profile_name,
        data,
        profile.max_seq_len + 1,
        tokenizer.vocab_size,
        order["tokenizer_sha256"],  # type: ignore[arg-type]  # a str among the order's values
        train,
        validation,
    )
    _write_json(rows / "manifest.json", asdict(manifest))
    return manifest


def _tokenizer(where: Path, folder: Folder, profile: Profile, progress: Progress) -> Tokenizer:
    shards = folder.train[:TOKENIZER_SHARDS]
    order = [[shard.name, pq.read_metadata(shard).num_rows] for shard in shards]
    if not (where / "ranks.json").exists() or _read_json(where / "shards.json") != order:
        progress("tokenizer", 0, 1)
        train_tokenizer(shards, profile.vocab_size).save(where)
        _write_json(where / "shards.json", order)
    return Tokenizer.load(where)


@dataclass(frozen=True)
class _Packer:
    tokenizer: Tokenizer
    row_tokens: int
    threads: int
    progress: Progress

    def pack(self, folder: Path, side: str, shards: tuple[Path, ...], most_rows: int | None) -> Packed:
        """Appends shard after shard to `<side>.part`; renames it to `<side>.bin` when all are in.

        `<side>.done.json` holds what is safely in the part file; bytes beyond it are of an unfinished shard.
        """
        part, done_file, whole = folder / f"{side}.part", folder / f"{side}.done.json", folder / f"{side}.bin"
        done = Packed(0, 0, 0, ()) if (stored := _read_json(done_file)) is None else _packed(stored)
        if whole.exists():
            return done
        part.touch()
        os.truncate(part, done.rows * self.row_tokens * 2)
        for number in range(len(done.shards), len(shards)):
            self.progress(side, number, len(shards))
            done = self._shard(part, shards[number], done, most_rows)
            _write_json(done_file, asdict(done))
        part.replace(whole)
        return done

    def _shard(self, part: Path, shard: Path, before: Packed, most_rows: int | None) -> Packed:
        seen = {"documents": 0, "characters": 0}

        def texts() -> Iterator[list[int]]:
            for group in documents(shard):
                encoded = self.tokenizer.encode_documents(group, self.threads)
                seen["documents"] += len(group)
                seen["characters"] += sum(map(len, group))
                yield from encoded

        rows = lost = 0
        with part.open("ab") as file:
            for row, cropped in best_fit(texts(), self.row_tokens, BUFFER_DOCUMENTS):
                file.write(np.array(row, dtype=np.uint16).tobytes())
                rows += bool(row)
                lost += cropped
                if most_rows is not None and rows == most_rows:
                    break
            file.flush()
            os.fsync(file.fileno())
        return Packed(
            before.rows + rows,
            before.tokens_kept + rows * self.row_tokens,
            before.tokens_lost + lost,
            (*before.shards, Shard(shard.name, seen["documents"], seen["characters"])),
        )


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _write_json(path: Path, value: object) -> None:
    partial = path.with_suffix(".tmp")
    with partial.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
