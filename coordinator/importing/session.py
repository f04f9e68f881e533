"""A session that was run elsewhere, whatever it was read from."""

from __future__ import annotations

from dataclasses import dataclass

from shared.git import Repo
from shared.wire import Status


@dataclass(frozen=True)
class Attempt:
    """One experiment of a session."""

    key: str  #: what it is known by within the session
    status: Status
    description: str
    tested: str
    parent: str
    kept: str | None = None
    score: float | None = None
    memory_gb: float = 0.0
    reason: str = ""
    at: int = 0  #: unix seconds
    version: int = 1  #: higher where more is known of it: a score, a revert
    diff: str = ""
    code_state: str = ""
    nodes_added: int = 0


@dataclass(frozen=True)
class Session:
    """All that one machine tried. Numbers begin at 0, the baseline; at 1 where the baseline's score is not known."""

    origin: str  #: what it is known by, however often and wherever from it is imported
    name: str
    attempts: tuple[Attempt, ...]
    first: int = 0  #: number of the first attempt
    branch: tuple[Repo, str] | None = None  #: to push: the repository, and the branch's tip
