"""`python -m prepare`: makes tokenizer and rows for SWARM_PROFILE and SWARM_DATA.

Prints progress and, last, the result as JSON lines; `swarm prepare` draws them. Exit 0 done, 2 bad data.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from . import packing
from .download import CLIMBMIX_URL, Source
from .errors import DataError
from .identity import digest
from .run import RUN


def main() -> int:
    def progress(stage: str, done: int, of: int) -> None:
        print(json.dumps({"stage": stage, "done": done, "of": of}), flush=True)

    source = Source(os.environ.get("SWARM_DATA_URL") or CLIMBMIX_URL, os.environ.get("SWARM_DATA_TOKEN"))
    name, data, cache = RUN.profile.name, RUN.data, RUN.cache
    try:
        manifest = packing.prepare(cache, name, data, RUN.train_shards, os.cpu_count() or 1, progress, source)
        rows = packing.rows_folder(cache, data, name, RUN.train_shards)
        value = digest(rows, packing.tokenizer_folder(cache, data, RUN.profile.vocab_size))
    except DataError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 2
    print(
        json.dumps(
            {
                "rows": str(rows),
                "digest": value,
                "lost_train": manifest.train.lost,
                "lost_validation": manifest.validation.lost,
                "manifest": asdict(manifest),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
