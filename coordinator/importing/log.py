"""results.tsv, as the reference writes it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shared.errors import BadInput
from shared.wire import NO_COMMIT, Status
from worker.results import plain

from .session import Attempt, Session

COLUMNS = ("commit", "", "memory_gb", "status", "description")  #: the second one has the metric's name


@dataclass(frozen=True)
class Row:
    """A line of a results.tsv."""

    commit: str | None  #: abbreviated; None where the first row says a word ("baseline") instead
    score: float
    memory_gb: float
    status: Status
    description: str


def parse_log(text: str, where: str, metric: str) -> list[Row]:
    """Raises BadInput, one line with the line and column that is not as the reference has it."""
    header, *lines = (line.removesuffix("\r") for line in text.split("\n"))
    names = header.split("\t")
    for number, (name, expected) in enumerate(zip(names, COLUMNS, strict=False), 1):
        if name != (expected or metric):
            words = "the campaign's metric is" if not expected else "expected"
            raise _bad(where, 1, number, name, f"{words} {expected or metric!r}")
    if len(names) != len(COLUMNS):
        raise _bad(where, 1, len(names), names[-1], f"{len(COLUMNS)} columns separated by tabs are expected")
    rows: list[Row] = []
    for number, line in enumerate(lines, 2):
        if line.strip():
            rows.append(_row(line.split("\t"), where, number, metric, first=not rows))
    if not rows:
        raise BadInput(f"{where}: no experiment in it")
    return rows


def _row(cells: Sequence[str], where: str, line: int, metric: str, *, first: bool) -> Row:
    if len(cells) != len(COLUMNS):
        raise _bad(where, line, len(cells), cells[-1], f"{len(COLUMNS)} columns separated by tabs are expected")
    commit, score, memory, status, description = (cell.strip() for cell in cells)
    named = re.fullmatch(r"[0-9a-f]{7,40}", commit.lower())
    if not named and not first:
        raise _bad(where, line, 1, commit, "a commit has 7 to 40 hexadecimal digits")
    if status not in (Status.KEEP, Status.DISCARD, Status.CRASH):
        raise _bad(where, line, 4, status, "a status is keep, discard or crash")
    return Row(
        commit.lower() if named else None,
        _number(score, where, line, 2),
        _number(memory, where, line, 3),
        Status(status),
        description[:2000],
    )


def _number(cell: str, where: str, line: int, column: int) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _bad(where, line, column, cell, "a number is expected")
    return value


def _bad(where: str, line: int, column: int, cell: str, words: str) -> BadInput:
    return BadInput(f"{where}: line {line}, column {column}: {plain(cell)[:60]!r}; {words}")


def of_log(path: Path, metric: str) -> Session:
    """A results.tsv alone: no code, so no diffs. Its first two rows say which session it is. Raises BadInput."""
    data = path.read_bytes()
    try:
        rows = parse_log(data.decode("utf-8-sig"), str(path), metric)
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, before.rpartition(b"\n")[2].count(b"\t") + 1
        raise BadInput(f"{path}: line {line}, column {column}: not UTF-8") from None
    at = int(path.stat().st_mtime)  # a log does not say when: not later than this
    absolute = path.absolute()
    name = absolute.parent.name if absolute.stem == "results" else absolute.stem
    first_rows = [f"{row.commit} {row.score!r} {row.status} {row.description}" for row in rows[:2]]
    attempts, head = [], None
    for index, row in enumerate(rows):
        attempts.append(replace(logged(row, f"row {index}", head), at=at))
        head = attempts[-1].tested if row.status is Status.KEEP else head
    return Session("\n".join(["log", *first_rows]), name, tuple(attempts))


def logged(row: Row, key: str, head: str | None) -> Attempt:
    """As the log says; `head` is the keep before it."""
    tested = row.commit or NO_COMMIT
    keep = row.status is Status.KEEP
    return Attempt(
        key,
        row.status,
        row.description,
        tested,
        head or (tested if keep else NO_COMMIT),  # a baseline stands on itself
        kept=row.commit if keep else None,
        score=None if row.status is Status.CRASH else row.score,
        memory_gb=row.memory_gb,
        reason=f"the log says {row.status}",
    )
