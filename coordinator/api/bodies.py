"""What JSON can say and a database cannot hold: checked before anything is stored, so that whoever reads can."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel

from ..database import Impossible

LARGEST = 2**63 - 1  #: that a database holds in an integer
LEVELS = 32  #: of lists and objects in each other


class TooLarge(Impossible):
    """More than one request may carry."""


def check(body: BaseModel) -> None:
    """Raises Impossible: Python's JSON reads NaN, half a surrogate pair, endless integers and 900 levels as well."""
    if not _holds(body.model_dump(), LEVELS):
        raise Impossible(f"a database holds finite numbers of 64 bits, whole characters and {LEVELS} levels, not this")


def _holds(value: Any, levels: int) -> bool:
    match value:
        case dict():
            return levels > 0 and all(_holds(key, 0) and _holds(inner, levels - 1) for key, inner in value.items())
        case list() | tuple():
            return levels > 0 and all(_holds(inner, levels - 1) for inner in value)
        case str():
            return value.isascii() or value.encode(errors="ignore").decode() == value
        case int():
            return -LARGEST <= value <= LARGEST
        case float():
            return math.isfinite(value)
    return True
