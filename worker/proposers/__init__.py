"""Where ideas come from. A proposer turns the code as it stands into a Proposal and learns from what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..journal import Experiment
from ..workspace import Files


@dataclass(frozen=True)
class Proposal:
    """An idea and its edits, ready to be committed."""

    description: str
    files: Files  #: new text of the mutable files that change
    proposer: str
    edits: Mapping[str, Any] = field(default_factory=dict)  #: constants set, by name
    params: Mapping[str, Any] = field(default_factory=dict)  #: all searched constants after the edits


class Proposer(Protocol):
    """The seam for `search`, CLI agents and API models.

    Stateless on purpose: all that a proposer may learn from is handed in, so a restart forgets nothing.
    """

    name: str

    def propose(self, files: Files, history: Sequence[Experiment]) -> Proposal | None:
        """The next idea for these files, or None when it has none left.

        `history` is every experiment of this machine, in order. Never returns a diff or a code that was tried.
        """
        ...

    def params(self, files: Files) -> dict[str, Any]:
        """The searched constants as they stand in the files; empty where a proposer searches none."""
        ...
