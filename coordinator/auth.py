"""Tokens: who is calling, and what the role may do.

A token is 256 random bits; only its SHA-256 is stored (a slow hash protects weak secrets, and these are not weak).
All tokens' hashes are in memory, so that a check costs no query; `swarm token` beside a running coordinator adds to a
file, which makes it read them again. On loopback, until a person has made the first token, whoever can connect is an
administrator; revoking the last one locks everybody out, it does not open the door again.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import BadInput, Refused
from shared.wire import MachineState, Role, TokenMade, TokenOrder, TokenView

from .database import NotFound
from .store import Store
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


def token_of(authorization: str) -> str | None:
    """The token in a Bearer header, or the password of a Basic one (browsers and git)."""
    scheme, _, value = authorization.partition(" ")
    match scheme.lower():
        case "bearer":
            return value.strip() or None
        case "basic":
            try:
                return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
            except ValueError:  # also of what is not even ASCII
                return None
    return None


def hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _new(role: Role, label: str, machine_id: int | None, expires_s: float | None) -> tuple[str, dict[str, Any]]:
    """A token, and what is stored of it."""
    token = f"swarm_{role}_{secrets.token_urlsafe(32)}"
    values = {
        "hash": hashed(token),
        "role": role,
        "label": label,
        "machine_id": machine_id,
        "created_at": int(time.time()),
        "expires_at": None if expires_s is None else math.ceil(time.time() + min(expires_s, LONGEST_S)),
        "revoked_at": None,
    }
    return token, values


@dataclass(frozen=True)
class _Known:
    hash: str
    role: Role
    machine_id: int | None
    expires_at: int | None


class Tokens:
    """The tokens of one coordinator."""

    def __init__(self, store: Store, state: Path) -> None:
        self._store, self._marker = store, state / MARKER
        self._lock = threading.Lock()  # memory follows the database in steps that do not mix
        self._live: dict[str, _Known] = {}
        self._former: dict[str, int] = {}  #: revoked tokens of machines
        self._of_machine: dict[int, list[str]] = {}  #: hashes of live tokens
        self._needed = False
        self._seen = (-1, -1)
        self._load()

    def _load(self) -> None:
        """Raises StorageUnavailable; then the next call tries again."""
        with self._lock:
            seen = self._changed()  # first: a change that comes meanwhile is then seen at the next call
            rows = self._store.tokens()
            live: dict[str, _Known] = {}
            of_machine: dict[int, list[str]] = {}
            for row in rows:
                if row.revoked_at is None:
                    live[row.hash] = _Known(row.hash, Role(row.role), row.machine_id, row.expires_at)
                    if row.machine_id is not None:
                        of_machine.setdefault(row.machine_id, []).append(row.hash)
            self._needed = any(row.role != Role.WORKER for row in rows)
            self._former = {row.hash: row.machine_id for row in rows if row.revoked_at is not None and row.machine_id}
            self._live, self._of_machine, self._seen = live, of_machine, seen  # whole: others look without the lock

    def _forget(self, machine_id: int) -> None:
        for hash_ in self._of_machine.pop(machine_id, ()):
            self._live.pop(hash_, None)
            self._former[hash_] = machine_id

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
        return self.known(token)

    def known(self, token: str | None) -> Caller | None:
        """The same by what is in memory."""
        if not token:
            return None if self.needed else ANYONE
        wanted = hashed(token)
        known = self._live.get(wanted)
        if known is None or not hmac.compare_digest(known.hash, wanted):
            return None
        if known.expires_at is not None and known.expires_at <= time.time():
            return None
        return Caller(known.role, known.machine_id)

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
        machine = self._store.members.named(order.machine) if order.machine else None
        if machine is not None and machine.state in (MachineState.RETIRED, MachineState.IMPORTED):
            raise BadInput(f"{machine.name} is {machine.state}: nothing speaks for it any more")
        token, values = _new(order.role, order.label, machine.id if machine else None, order.expires_s)
        identity = self._store.add_token(values)
        self._tell()
        return TokenMade(
            id=identity,
            role=order.role,
            label=order.label,
            machine=machine.name if machine else None,
            created_at=values["created_at"],
            expires_at=values["expires_at"],
            revoked=False,
            token=token,
        )

    def for_machine(self, machine_id: int) -> str:
        """A new token for a machine; those it had before are revoked. Nobody else need read them all anew for this."""
        self.revoke_machine(machine_id)
        token, values = _new(Role.WORKER, "made at registration", machine_id, None)
        self._store.add_token(values)
        with self._lock:
            self._live[values["hash"]] = _Known(values["hash"], Role.WORKER, machine_id, None)
            self._of_machine.setdefault(machine_id, []).append(values["hash"])
        return token

    def revoke(self, identity: int) -> None:
        """Raises NotFound for one that is not there or is revoked."""
        if not self._store.revoke_tokens(Token.id == identity):
            raise NotFound(f"no live token {identity}")
        self._tell()

    def revoke_machine(self, machine_id: int) -> None:
        self._store.revoke_tokens(Token.machine_id == machine_id)
        with self._lock:
            self._forget(machine_id)

    def _tell(self) -> None:
        """Other processes too."""
        with self._marker.open("ab") as file:
            file.write(b".")
        self._load()

    def all(self) -> list[TokenView]:
        views = []
        for row in self._store.tokens():
            machine = self._store.members.by_id(row.machine_id).name if row.machine_id else None
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
