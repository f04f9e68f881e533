"""What a person sees while the loop runs: one live line for the run in progress, one line for each verdict."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.text import Text

from shared.wire import Status

from .journal import Experiment
from .results import Standing, one_line, plain
from .runner import Progress

_STYLE = {Status.KEEP: "bold green", Status.DISCARD: "dim", Status.CRASH: "red", Status.TIMEOUT: "red"}
_BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 40  #: columns of the staircase


def staircase(levels: list[float], sign: int) -> str:
    """The level of HEAD after each experiment as a row of blocks, WIDTH at most."""
    if len(levels) > WIDTH:
        levels = [levels[i * len(levels) // WIDTH] for i in range(WIDTH - 1)] + levels[-1:]
    low, high = min(levels), max(levels)
    if high == low:
        return _BLOCKS[-1 if sign > 0 else 0] * len(levels)
    return "".join(_BLOCKS[round((level - low) / (high - low) * (len(_BLOCKS) - 1))] for level in levels)


class TerminalScreen:
    """Rich on a terminal; plain lines, one a verdict, anywhere else."""

    def __init__(self, console: Console, sign: int = 1) -> None:
        """`sign`: +1 where lower is better."""
        self._console, self._sign = console, sign
        self._live: Live | None = None
        self._current = ""
        self._levels: list[float] = []

    def resume(self, levels: list[float]) -> None:
        """Shows the staircase of earlier calls as well."""
        self._levels = list(levels)

    def __enter__(self) -> TerminalScreen:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def started(self, experiment: Experiment) -> None:
        self._current = f"#{experiment.number} {one_line(experiment.description)}"
        self.progress(Progress(0.0))

    def progress(self, progress: Progress) -> None:
        if not self._live:
            return
        parts = [f"{progress.seconds:.0f} s"]
        if progress.step is not None:
            parts.append(f"step {progress.step}")
        if progress.share is not None:
            parts.append(f"{100 * progress.share:.0f} %")
        if progress.loss is not None:
            parts.append(f"loss {progress.loss:.4f}")
        lines = [Text(f"{self._current}  {'  '.join(parts)}", style="cyan", no_wrap=True, overflow="ellipsis")]
        if len(self._levels) > 1:
            steps = staircase(self._levels, self._sign)
            lines.append(Text(f"{self._levels[0]:.4f} {steps} {self._levels[-1]:.4f}", style="green"))
        self._live.update(Text("\n").join(lines))

    def decided(self, experiment: Experiment, standing: Standing | None) -> None:
        score = "-" if experiment.score is None else f"{experiment.score:.6f}"
        assert experiment.status is not None
        line = f"{experiment.number:>4}  {score:>10}  {experiment.status:<8} {one_line(experiment.description)}"
        self._console.print(
            Text(line, style=_STYLE.get(experiment.status, "")),
            Text(f"({plain(experiment.reason)})", style="dim"),
            soft_wrap=True,
        )
        if standing:
            self._levels.append(standing.best)

    def note(self, text: str) -> None:
        self._console.print(Text(f"      {plain(text)}", style="yellow"), soft_wrap=True)
