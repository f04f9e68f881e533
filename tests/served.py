"""A real coordinator for tests: `swarm serve` as a process of its own, and `swarm` beside it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.conftest import ROOT

START_S = 60.0  #: for a coordinator to answer; it takes about 2 s here
STOP_S = 30.0


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, without what a person's shell may say to `swarm`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SWARM_")}
    return {**inherited, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT), **(more or {})}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "coordinator.cli", *map(str, arguments)]


def swarm(*arguments: str | Path, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """One command, to its end; the caller looks at the exit code."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(more),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@contextmanager
def served(
    campaign: Path, *options: str, env: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`swarm serve` on a free port (or `--port`) until the block ends: (address, process), once /healthz answers.

    The test may end the process itself. What it said is shown where it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="swarm-served-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command("serve", campaign, "--port", "0", *options),
                env=environment(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield _address(process, log), process
        finally:
            stop(process)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """As it was printed, once /healthz answers there."""
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"^coordinator of .*: (https?://\S+)$", log.read_text(), re.MULTILINE):
            try:
                httpx.get(f"{found[1]}/healthz", timeout=5.0, verify=False)
                return found[1]
            except httpx.TransportError:
                pass
        time.sleep(0.02)
    raise AssertionError(f"no coordinator: exit {process.poll()}\n{log.read_text()}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and waits for it; one that does not go by itself is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
