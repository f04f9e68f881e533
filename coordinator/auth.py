"""Tokens: who is calling, and what the role may do.

A token is 256 random bits; only its SHA-256 is stored (a slow hash protects weak secrets, and these are not weak).
All tokens' hashes are in memory, so that a check costs no query; `swarm token` beside a running coordinator adds to a
file, which makes it read them again. On loopback, until a person has made the first token, whoever can connect is an
administrator; revoking the last one locks everybody out, it does not open the door again.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Row

from shared.errors import BadInput, Refused
from shared.wire import MachineState, Role, TokenMade, TokenOrder, TokenView

from .store import NotFound, Store
from .tables import Token

MARKER = "tokens.changed"  #: grows by a byte whenever tokens change, in whatever process
LONGEST_S = 100 * 365 * 86400.0  #: that a token may be good for


class Unauthorized(Refused):
    """No token, or one that is not (or no longer) known."""


class Forbidden(Refused):
    """A known token whose role does not allow this."""


@dataclass(frozen=True)
class Caller:
    """Who is calling."""

    role: Role
    machine_id: int | None = None  #: for role worker

    def may(self, *roles: Role) -> bool:
        return self.role in roles


ANYONE = Caller(Role.ADMIN)  #: on loopback, while no person has made a token


def hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class Tokens:
    """The tokens of one coordinator."""

    def __init__(self, store: Store, state: Path) -> None:
        self._store, self._marker = store, state / MARKER
        self._live: dict[str, Row[Any]] = {}
        self._former: dict[str, int] = {}  #: revoked tokens of machines
        self._needed = False
        self._seen = (-1, -1)
        self._load()

    def _load(self) -> None:
        self._seen = self._changed()  # first: a change that comes meanwhile is then seen at the next call
        rows = self._store.tokens()
        self._needed = any(row.role != Role.WORKER for row in rows)
        self._former = {row.hash: row.machine_id for row in rows if row.revoked_at is not None and row.machine_id}
        self._live = {row.hash: row for row in rows if row.revoked_at is None}

    def _changed(self) -> tuple[int, int]:
        """Also its size: two changes may fall into one tick of the file system's clock (4 ms)."""
        try:
            found = self._marker.stat()
        except OSError:
            return 0, 0
        return found.st_size, found.st_mtime_ns

    def caller(self, token: str | None) -> Caller | None:
        """None for a token that is unknown, expired or revoked, and for none at all where one is needed."""
        if self._changed() != self._seen:
            self._load()
        if not token:
            return None if self.needed else ANYONE
        wanted = hashed(token)
        row = self._live.get(wanted)
        if row is None or not hmac.compare_digest(row.hash, wanted):
            return None
        if row.expires_at is not None and row.expires_at <= time.time():
            return None
        return Caller(Role(row.role), row.machine_id)

    def former(self, token: str | None) -> int | None:
        """The machine that a revoked token spoke for."""
        return self._former.get(hashed(token)) if token else None

    @property
    def needed(self) -> bool:
        """Whether a person has ever made a token; from then on there is no entry without one."""
        return self._needed

    def make(self, order: TokenOrder) -> TokenMade:
        """The only time that the token itself is seen. Raises NotFound for an unknown machine, BadInput for one that
        no token can speak for."""
        if (order.role is Role.WORKER) != (order.machine is not None):
            raise BadInput("a worker's token is bound to a machine, and only a worker's: name one with --machine")
        machine = self._store.member(order.machine) if order.machine else None
        if machine is not None and machine.state in (MachineState.RETIRED, MachineState.IMPORTED):
            raise BadInput(f"{machine.name} is {machine.state}: nothing speaks for it any more")
        return self._make(order.role, order.label, machine.id if machine else None, order.expires_s)

    def for_machine(self, machine_id: int) -> str:
        """A new token for a machine; those it had before are revoked."""
        self._store.revoke_tokens(Token.machine_id == machine_id)
        return self._make(Role.WORKER, "made at registration", machine_id, None).token

    def _make(self, role: Role, label: str, machine_id: int | None, expires_s: float | None) -> TokenMade:
        token = f"swarm_{role}_{secrets.token_urlsafe(32)}"
        now = int(time.time())
        expires = None if expires_s is None else math.ceil(time.time() + min(expires_s, LONGEST_S))
        values = {
            "hash": hashed(token),
            "role": role,
            "label": label,
            "machine_id": machine_id,
            "created_at": now,
            "expires_at": expires,
            "revoked_at": None,
        }
        identity = self._store.add_token(values)
        self._tell()
        machine = self._store.member_by_id(machine_id).name if machine_id else None
        return TokenMade(
            id=identity,
            role=role,
            label=label,
            machine=machine,
            created_at=now,
            expires_at=expires,
            revoked=False,
            token=token,
        )

    def revoke(self, identity: int) -> None:
        """Raises NotFound for one that is not there or is revoked."""
        if not self._store.revoke_tokens(Token.id == identity):
            raise NotFound(f"no live token {identity}")
        self._tell()

    def revoke_machine(self, machine_id: int) -> None:
        self._store.revoke_tokens(Token.machine_id == machine_id)
        self._tell()

    def _tell(self) -> None:
        """Other processes too."""
        with self._marker.open("ab") as file:
            file.write(b".")
        self._load()

    def all(self) -> list[TokenView]:
        views = []
        for row in self._store.tokens():
            machine = self._store.member_by_id(row.machine_id).name if row.machine_id else None
            views.append(
                TokenView(
                    id=row.id,
                    role=Role(row.role),
                    label=row.label,
                    machine=machine,
                    created_at=row.created_at,
                    expires_at=row.expires_at,
                    revoked=row.revoked_at is not None,
                )
            )
        return views
