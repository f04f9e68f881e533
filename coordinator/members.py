"""The machines, in memory: what each request needs to know of them, without a query.

Invariants: what it says is committed. Only the writer's thread changes it, in commit order; whoever looks meanwhile
misses no machine. NOT covered: what only a list of machines shows (hardware, version), and who is there (presence.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, select

from shared.wire import MachineState

from .database import NotFound
from .tables import Machine
from .writer import Transaction

GONE = (MachineState.RETIRED, MachineState.IMPORTED)  #: such a machine never works again


@dataclass(frozen=True)
class Member:
    """A machine as the coordinator keeps it in memory: what each request needs to know."""

    id: int
    uid: UUID
    name: str
    branch: str
    attic: str
    machine_class: str
    incarnation: int
    state: MachineState
    paused: bool
    can: tuple[str, ...]

    @classmethod
    def of(cls, row: Row[Any]) -> Member:
        return cls(
            row.id,
            row.uid,
            row.name,
            row.branch,
            row.attic,
            row.machine_class,
            row.incarnation,
            MachineState(row.state),
            row.paused,
            tuple(row.can),
        )


class Members:
    """Every machine that was ever registered."""

    def __init__(self) -> None:
        self._by_name: dict[str, Member] = {}
        self._by_id: dict[int, Member] = {}
        self._by_uid: dict[UUID, Member] = {}

    def read(self, connection: Connection) -> None:
        """Remembers them as they are stored."""
        for row in connection.execute(select(Machine.__table__)):
            self._remember(Member.of(row))

    def changed(self, t: Transaction, machine_id: int) -> Member:
        """The machine as it now is; remembered once that is committed."""
        row = t.connection.execute(select(Machine.__table__).where(Machine.id == machine_id)).one()
        member = Member.of(row)
        t.after_commit(partial(self._remember, member))
        return member

    def _remember(self, member: Member) -> None:
        """Only the writer's thread comes here, in commit order. Nobody who looks meanwhile misses a machine."""
        before = self._by_id.get(member.id)
        self._by_id[member.id] = self._by_name[member.name] = self._by_uid[member.uid] = member
        if before is not None and before.name != member.name and self._by_name.get(before.name) is before:
            del self._by_name[before.name]

    def named(self, name: str) -> Member:
        """Raises NotFound."""
        try:
            return self._by_name[name]
        except KeyError:
            raise NotFound(f"no machine {name!r}") from None

    def by_id(self, machine_id: int) -> Member:
        return self._by_id[machine_id]

    def by_uid(self, uid: UUID) -> Member | None:
        return self._by_uid.get(uid)

    def all(self) -> list[Member]:
        return list(self._by_name.values())
