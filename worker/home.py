"""Where a worker of a swarm keeps what it must not forget: who it is, and its tokens.

`<home>/<name>/machine.json` (0600) for each slot of this computer, the campaigns' clones beside it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import platformdirs

from shared.errors import BadInput

from .machine import slug


def default_home() -> Path:
    """SWARM_HOME, else the user's data folder."""
    chosen = os.environ.get("SWARM_HOME")
    return Path(chosen) if chosen else platformdirs.user_data_path("ratchet-swarm")


@dataclass(frozen=True)
class Membership:
    """What one coordinator told this machine at its first registration."""

    token: str | None
    machine: str  #: the name in its branch and attic; stays when a person renames the machine
    campaign: str
    tag: str
    repository: str
    folder: str  #: the task's directory in the repository


@dataclass(frozen=True)
class Identity:
    """One slot of this computer. The same uid is the same machine to every coordinator."""

    path: Path
    uid: UUID
    memberships: dict[str, Membership] = field(default_factory=dict)  #: by coordinator's address

    @classmethod
    def open(cls, home: Path, name: str) -> Identity:
        """Makes it at the first call. Raises BadInput for a damaged file."""
        path = home / slug(name) / "machine.json"
        if not path.exists():
            made = cls(path, uuid4())
            made.save()
            return made
        try:
            stored = json.loads(path.read_text())
            members = {url: _membership(member) for url, member in stored["memberships"].items()}
            return cls(path, UUID(stored["uid"]), members)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{path}: damaged; move it aside to join as a new machine") from None

    def save(self) -> None:
        """Whole or not at all, readable by its owner only."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        partial.unlink(missing_ok=True)  # a killed worker's: its mode would stay
        members = {url: asdict(member) for url, member in self.memberships.items()}
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({"uid": str(self.uid), "memberships": members}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def joined(self, url: str, membership: Membership) -> Identity:
        made = replace(self, memberships={**self.memberships, url: membership})
        made.save()
        return made

    def clone_folder(self, membership: Membership) -> Path:
        return self.path.parent / f"{slug(membership.campaign)}-{membership.tag}"


def _membership(stored: dict[str, Any]) -> Membership:
    """What a later version may have added is left out."""
    known = {name: value for name, value in stored.items() if name in Membership.__dataclass_fields__}
    if not all(isinstance(value, str) for name, value in known.items() if (name, value) != ("token", None)):
        raise TypeError
    return Membership(**known)
