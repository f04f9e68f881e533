"""What a coordinator is started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STATE = ".swarm/coordinator"  #: below the campaign's repository


@dataclass(frozen=True)
class Limits:
    """What one request may carry, and how long things are kept."""

    report_bytes: int = 2 * 1024 * 1024  #: of a whole request
    free_bytes: int = 64 * 1024 * 1024  #: less than this left on the disk counts as full
    keep_logs_days: float | None = None  #: log tails are dropped after so long; None keeps them
    keep_attic_days: float | None = None  #: attempts' code likewise


@dataclass(frozen=True)
class Settings:
    """One coordinator's settings; `swarm serve` makes them."""

    state: Path  #: folder for database, hub, lock
    database: str  #: SQLAlchemy URL
    repository: str  #: the campaign's name in the hub's URL
    heartbeat_s: float = 10.0  #: between heartbeats, stretched under load
    lease_ttl_s: float = 120.0
    limits: Limits = Limits()


def sqlite_url(state: Path) -> str:
    return f"sqlite:///{state / 'swarm.sqlite'}"
