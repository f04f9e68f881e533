"""A Ray of this computer alone, for `swarm up` where no cluster is: it outlives the command, and `down` stops it.

Imports no ray. NOT covered: listening on the loopback only. Ray's head advertises a loopback address here, but its
ports listen on all interfaces (seen in 2.60), behind the token.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from shared.errors import SwarmError
from worker.slot import born


def use_token(home: Path) -> None:
    """Every Ray process that starts from here asks for the token. To be called before ray is imported: it looks once.

    Without these variables a later `ray start` may take up a token that others do not know (measured).
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    path = home / "ray" / "token"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        contextlib.suppress(FileExistsError),
        os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file,
    ):
        file.write(secrets.token_hex(32))
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(path))


FOLDER = "/tmp/swarm-ray-"  #: before the sessions of a Ray that swarm starts; short, sockets' paths have 104 bytes


@dataclass(frozen=True)
class Head:
    """The Ray that swarm started on this computer."""

    process: psutil.Process
    address: str
    folder: str  #: its sessions


def running_head(home: Path) -> Head | None:
    """None when it is gone, or never was."""
    try:
        said = json.loads((home / "ray" / "head.json").read_text())
        process = psutil.Process(said["pid"])
        return Head(process, said["address"], said["folder"]) if born(process) == said["born"] else None
    except (OSError, ValueError, KeyError, psutil.Error):
        return None


def is_ray_here() -> bool:
    """Whether a Ray runs on this computer that a driver may join: not a demo's, nor that of another swarm home."""
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):
            if process.info["name"] == "raylet" and FOLDER not in " ".join(process.cmdline()):
                return True
    return False


def start_head(home: Path) -> str:
    """`ray start --block` in a session of its own: one process whose descendants are all that it started."""
    # Ray puts the computer's outside address in place of 127.0.0.1; on Linux all of 127.0.0.0/8 is the loopback.
    ip = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
    with socket.socket() as first, socket.socket() as second:
        first.bind((ip, 0))
        second.bind((ip, 0))
        port, client = (
            first.getsockname()[1],
            second.getsockname()[1],
        )  # 10001, the client's default, may be another Ray's
    options = ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=150000000"]
    ports = [f"--node-ip-address={ip}", f"--port={port}", f"--ray-client-server-port={client}"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *ports, *options]
    # Not Ray's own folder: a dead cluster's address in there keeps the next driver trying for minutes (measured).
    folder = tempfile.mkdtemp(prefix=FOLDER)
    log = home / "ray" / "head.log"
    with log.open("wb") as output:
        process = psutil.Popen(
            command,
            env={**os.environ, "RAY_TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    said = {"pid": process.pid, "born": born(process), "address": f"{ip}:{port}", "folder": folder}
    (home / "ray" / "head.json").write_text(json.dumps(said))
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if "will now block" in log.read_text(errors="replace"):
            return f"{ip}:{port}"
        time.sleep(0.2)
    stop_head(home)
    raise SwarmError(f"Ray did not start on this computer; see {log}")


def stop_head(home: Path) -> None:
    """Ends what start_head() started, and nothing of another Ray here, as `ray stop` would."""
    if head := running_head(home):
        family = [head.process, *head.process.children(recursive=True)]
        head.process.terminate()
        _, alive = psutil.wait_procs(family, timeout=15)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
        shutil.rmtree(head.folder, ignore_errors=True)
    (home / "ray" / "head.json").unlink(missing_ok=True)
