"""What every command shares: the application, the console, messages instead of tracebacks, progress, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from shared import git
from shared.errors import BadInput, SwarmError

app = typer.Typer(
    help="Autoresearch on your own machines: an agent edits, a fixed-budget run scores, git keeps the gain.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def run_app() -> None:
    """Runs the commands: messages instead of tracebacks for what a person can mend."""
    git.forget_caller()
    try:
        code = app(standalone_mode=False)  # Typer returns the code of a command that Ctrl-C ended
        sys.exit(code if isinstance(code, int) else 0)
    except SwarmError as error:
        print(f"swarm: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except BrokenPipeError:  # `swarm log | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        sys.exit(0)
    except OSError as error:
        print(f"swarm: {error}", file=sys.stderr)
        sys.exit(BadInput.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        print("swarm: stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's own usage errors
            error.show()
            sys.exit(error.exit_code)
        raise


def say(as_json: bool, value: dict[str, Any], text: str) -> None:
    print(json.dumps(value) if as_json else text)


class DataBar:
    """A progress bar for data preparation, on a terminal only; errors and results go elsewhere."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> DataBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, stage: str, done: int, of: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=of)
        self._progress.update(self._tasks[stage], completed=done, total=of)


@contextmanager
def stopping(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run in progress cleanly; a second one ends us at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
