"""What hardware this is: MachineProfile.

Reads NVML (or nvidia-smi), sysctl on macOS, /proc/cpuinfo on Linux. Nothing here imports torch or mlx.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class MachineProfile:
    """One accelerator slot and the host around it."""

    name: str
    os: str
    chip: str  #: CPU, or Apple's chip
    cores: int
    memory_gb: float  #: the host's, GiB
    accelerator: str | None
    accelerator_memory_gb: float | None
    backend: str  #: `torch` or `mlx`
    machine_class: str  #: hardware within which scores compare, e.g. `cuda-h100`, `mps-m4max`, `cpu`


def detect(name: str | None = None) -> MachineProfile:
    """This machine. Without accelerator it is of class `cpu`."""
    chip = _chip()
    gpu = _nvidia()
    apple = apple_chip(chip)
    return MachineProfile(
        name=slug(name or socket.gethostname().partition(".")[0]),
        os=f"{platform.system()} {platform.release()}",
        chip=chip,
        cores=os.cpu_count() or 1,
        memory_gb=round(psutil.virtual_memory().total / 2**30, 1),
        accelerator=gpu[0] if gpu else chip if apple else None,
        accelerator_memory_gb=gpu[1] if gpu else None,
        backend="torch",
        machine_class=f"cuda-{cuda_class(gpu[0])}" if gpu else f"mps-{apple}" if apple else "cpu",
    )


def slug(name: str) -> str:
    """A machine name that fits a git branch: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "machine"


def cuda_class(gpu: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `h100`, `NVIDIA GeForce RTX 4090` -> `rtx4090`."""
    words = [
        w for w in gpu.lower().replace("nvidia", "").replace("geforce", "").split() if not re.match(r"\d+gb|hbm", w)
    ]
    joined = "".join(words[:2]) if words and words[0] in ("rtx", "gtx", "tesla") else (words or ["unknown"])[0]
    return slug(joined.partition("-")[0])


def apple_chip(chip: str) -> str | None:
    """`Apple M4 Max` -> `m4max`; None for any other chip."""
    match = re.match(r"Apple (M\d+)(?: (Pro|Max|Ultra))?", chip)
    return (match[1] + (match[2] or "")).lower() if match else None


def _chip() -> str:
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _nvidia() -> tuple[str, float] | None:
    """(name, memory in GiB) of the first visible GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            name = pynvml.nvmlDeviceGetName(handle)
            return str(name), round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1)
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no driver, no library, no GPU: each version of NVML says it with another class
        line = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    if not line:
        return None
    name, _, memory = line.splitlines()[0].rpartition(",")
    return name.strip(), round(float(memory) / 1024, 1)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
