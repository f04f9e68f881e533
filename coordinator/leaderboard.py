"""What the leaderboard says. Pure: numbers in, standings and their printed forms out.

Within a group (machine class, profile, rung) scores compare, so the best score leads; across groups they do not, and
what leads is the gain over the machine's own baseline, in the machine's own sigmas. A suspect result counts for
nothing until it is cleared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from shared.wire import Leaderboard, Standing
from worker.ratchet import PRIOR_DEGREES, prior_sigma
from worker.results import plain


def noise_floor(metric: str, machine_class: str, baseline: float | None, squares: float, degrees: int) -> float:
    """Sigma: as the machine itself has it (worker/ratchet.py, `pooled_sigma`), from sums over its reruns."""
    prior = prior_sigma(metric, machine_class, baseline if baseline is not None else 1.0)
    return math.sqrt((PRIOR_DEGREES * prior * prior + squares) / (PRIOR_DEGREES + degrees))


def spread(scores: Sequence[float]) -> tuple[float | None, float]:
    """(mean, sum of squared deviations from it) of one code's scores."""
    if not scores:
        return None, 0.0
    mean = math.fsum(scores) / len(scores)
    return mean, math.fsum((score - mean) ** 2 for score in scores)


def agrees(scores: Sequence[float], sigma: float, sign: int) -> bool:
    """Whether later runs of one code bear the first one out: their mean is not worse by more than two standard errors
    of such a difference. `sign` is 1 where lower is better."""
    first, again = scores[0], scores[1:]
    worse = sign * (math.fsum(again) / len(again) - first)
    return worse <= 2 * sigma * math.sqrt(1 + 1 / len(again))


_COLUMNS = (
    "rank",
    "machine",
    "machine_class",
    "profile",
    "rung",
    "best",
    "gain",
    "gain_sigmas",
    "confirmed",
    "keeps",
    "experiments",
    "lineage",
    "commit",
    "description",
)


def _cells(standing: Standing) -> Iterable[str]:
    for name in _COLUMNS:
        value = getattr(standing, name)
        match value:
            case None:
                yield "-"
            case bool():
                yield "yes" if value else "no"
            case float():
                yield f"{value:+.1f}" if name == "gain_sigmas" else f"{value:.6f}"
            case _:
                yield plain(str(value))


def to_tsv(board: Leaderboard) -> str:
    """Columns as in JSON, one line a standing."""
    return "".join("\t".join(cells) + "\n" for cells in (_COLUMNS, *(tuple(_cells(s)) for s in board.standings)))


def to_text(board: Leaderboard) -> str:
    """For people: aligned, headed, and what it means on the last line."""
    headings: tuple[str, ...] = (
        "#",
        "machine",
        "class",
        "profile",
        "rung",
        board.metric,
        "gain",
        "sigmas",
        "confirmed",
    )
    headings += ("keeps", "tried", "lineage", "commit", "description")
    rows = [headings]
    for standing in board.standings:
        cells = list(_cells(standing))
        cells[12] = cells[12][:7]
        rows.append(tuple(cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(headings))]
    right = {0, 5, 6, 7, 9, 10, 11}
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    better = "lower" if board.direction == "minimize" else "higher"
    order = "best first within its class" if board.order == "group" else "by gain in own sigmas"
    return "\n".join([*lines, f"{board.campaign}: {board.metric}, {better} is better; {order}", ""])
