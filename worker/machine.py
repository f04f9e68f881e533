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

from shared.errors import BadInput


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


RESERVED = "promoted"  #: the branch of promoted ideas has this machine's name
LONGEST = 63  #: letters of a machine's name; wire.Name says so too


def detect(name: str | None = None) -> MachineProfile:
    """This machine. Without accelerator it is of class `cpu`. Raises BadInput for a name that is reserved or too long;
    a host's is cut, because nobody chose it for us."""
    if slug(name or "") == RESERVED:
        raise BadInput(f"--name {name}: reserved for the branch of promoted ideas; take another")
    if name and len(slug(name)) > LONGEST:
        raise BadInput(f"--name {name}: has {len(slug(name))} characters, {LONGEST} are the most")
    chip = _chip()
    gpu = _nvidia()
    apple = apple_chip(chip)
    return MachineProfile(
        name=short_slug(name or socket.gethostname().partition(".")[0]),
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


def short_slug(name: str, end: str = "") -> str:
    """A slug that the coordinator takes as a machine's name, cut where it is too long, with `end` whole at its end."""
    return slug(name)[: LONGEST - len(end)].rstrip("-") + end


_NOT_THE_MODEL = re.compile(r"nvidia|geforce|gpu|generation|pcie|sxm\d*|hbm\w*|\d+gb")


def cuda_class(gpu: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `h100`, `NVIDIA GeForce RTX 4090 Laptop GPU` -> `rtx4090laptop`."""
    words = re.split(r"[^a-z0-9]+", gpu.lower())
    return "".join(word for word in words if not _NOT_THE_MODEL.fullmatch(word)) or "unknown"


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


def _nvidia() -> tuple[str, float | None] | None:
    """(name, memory in GiB) of the first visible GPU; memory None where it is the host's own."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return None
    index = int(first) if visible and (first := visible.split(",")[0].strip()).isdigit() else 0
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(handle)
            return str(name), round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1)
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no driver, no library, no GPU: each version of NVML says it with another class
        lines = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits").splitlines()
    if index >= len(lines):
        return None
    name, _, memory = lines[index].rpartition(",")
    return name.strip(), round(float(memory) / 1024, 1) if memory.strip().isdigit() else None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
