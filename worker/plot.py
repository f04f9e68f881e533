"""The progress picture: every experiment a point, keeps labelled, the running best a staircase."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from shared.task import TaskSpec
from shared.wire import Status

from .journal import Experiment
from .results import one_line

LABEL_CHARACTERS = 48
OUTSIDE = 0.35  #: discards further from the best than this x the range of keeps are drawn at the picture's edge


def plot(experiments: Sequence[Experiment], task: TaskSpec, title: str, path: Path) -> None:
    """Writes the picture (PNG, SVG or PDF by the path's ending). Experiments without a score are marks on the axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    decided = [e for e in experiments if e.status is not None]
    keeps = [e for e in decided if e.status is Status.KEEP and e.score is not None]
    discards = [e for e in decided if e.status is Status.DISCARD and e.score is not None]
    failures = [e for e in decided if e.score is None]
    figure, axes = pyplot.subplots(figsize=(12, 6.5), layout="constrained")

    kept_scores = [e.score for e in keeps if e.score is not None]
    top, bottom = max(kept_scores), min(kept_scores)
    margin = (top - bottom) or abs(top) * 0.01 or 1.0
    low, high = bottom - OUTSIDE * margin, top + OUTSIDE * margin
    clipped = [min(max(e.score or 0.0, low), high) for e in discards]
    axes.scatter([e.number for e in discards], clipped, s=18, color="#b8b8b8", label="discarded", zorder=2)
    if failures:
        axes.scatter(
            [e.number for e in failures], [high] * len(failures), marker="x", s=28, color="#c0392b", label="no score"
        )
    best: list[float] = []
    for e in keeps:
        score = e.score or math.nan
        best.append(score if not best else (min if task.sign > 0 else max)(best[-1], score))
    end = decided[-1].number
    axes.step(
        [*(e.number for e in keeps), end], [*best, best[-1]], where="post", color="#1e8449", linewidth=1.8, zorder=3
    )
    axes.scatter([e.number for e in keeps], kept_scores, s=34, color="#1e8449", label="kept", zorder=4)
    for e in keeps:
        text = one_line(e.description)
        short = text if len(text) <= LABEL_CHARACTERS else text[: LABEL_CHARACTERS - 1] + "…"
        axes.annotate(
            short,
            (e.number, e.score or 0.0),
            parse_math=False,
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=7.5,
            rotation=20,
            color="#145a32",
        )
    axes.set_ylim(low - 0.03 * margin, high + 0.15 * margin)
    axes.set_xlim(-0.5, end + max(3.0, 0.18 * end))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("experiment")
    axes.set_ylabel(f"{task.metric} ({'lower' if task.sign > 0 else 'higher'} is better)", parse_math=False)
    axes.set_title(f"{title}: {len(decided) - 1} experiments, {len(keeps) - 1} kept", parse_math=False)
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
