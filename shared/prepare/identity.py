"""One digest for all that a score depends on besides train.py and the machine.

It covers prepare's own code, the tokenizer, the validation rows and the list of training shards (name, documents,
characters). Computed when the score is computed, from what lies on disk at that moment.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from .packing import Manifest, sha256_of


def code_files() -> list[Path]:
    """Prepare's own source files, in a fixed order."""
    return sorted(Path(__file__).parent.glob("*.py"))


def digest(rows: Path, tokenizer: Path) -> str:
    """sha256, hex. Reads about 42 MB for profile h100; 0.1 s."""
    parts = {path.name: sha256_of(path) for path in code_files()}
    parts |= {"tokenizer": sha256_of(tokenizer / "ranks.json"), "validation": sha256_of(rows / "val.bin")}
    shards = [asdict(shard) for shard in Manifest.load(rows).train.shards]
    return hashlib.sha256(json.dumps([parts, shards], sort_keys=True).encode()).hexdigest()
