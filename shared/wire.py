"""The vocabulary: every status, each explained where it is declared."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """What became of an experiment."""

    KEEP = "keep"  #: better here: the branch advanced to it
    DISCARD = "discard"  #: ran, not better enough: the branch was reset
    CRASH = "crash"  #: ended without a valid score
    TIMEOUT = "timeout"  #: killed at a deadline
    CONFLICT = "conflict"  #: a replayed diff that does not fit this machine's code
    VOID = "void"  #: a run that does not count (interrupted, the machine slept): repeated, no verdict
