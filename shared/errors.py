"""What can go wrong for a person, and the exit code that says so.

    SwarmError          1   ours
    ├── BadInput        2   a file, option or machine that the person has to mend
    ├── Refused         3   asked for something that is not allowed now
    └── AlreadyThere    4   what was asked for exists

Every message is one line: what, where, how to mend it. Failures of the agent's code are data (RunOutcome), never these.
"""

from __future__ import annotations

from typing import ClassVar


class SwarmError(Exception):
    """Anything that ends a command with a message instead of a traceback."""

    exit_code: ClassVar[int] = 1


class BadInput(SwarmError):
    """A file, option or machine is not as it must be."""

    exit_code = 2


class Refused(SwarmError):
    """The request is understood and not granted."""

    exit_code = 3


class AlreadyThere(SwarmError):
    """The thing to be made exists."""

    exit_code = 4
