"""The environment that a run was started with, and where the cache lies. Importing this decides nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def initial_environment() -> dict[str, str]:
    """The environment at process start."""
    try:
        raw = Path("/proc/self/environ").read_bytes()
    except OSError:
        return dict(os.environ)
    pairs = (entry.partition(b"=") for entry in raw.split(b"\0") if entry)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def cache_root(environment: Mapping[str, str]) -> Path:
    """Where data, tokenizers and rows live: AUTORESEARCH_CACHE, by default ~/.cache/autoresearch."""
    set_by_user = environment.get("AUTORESEARCH_CACHE")
    return Path(set_by_user) if set_by_user else Path.home() / ".cache" / "autoresearch"
