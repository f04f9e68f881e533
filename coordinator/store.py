"""Store: a campaign's whole database. Machines, branches and tokens are here; the rest has files of its own.

`members` (who is known, in memory), `reports`, `standings`, `leases` and `look` share one database and know each other
only in that order: a report closes leases and moves standings, a registration returns leases. Reads take a short
connection of their own; writes are jobs of the one writer (writer.py). Invariants: a name is given once, also after its
machine got another; a machine that was retired never works again; only hashes of tokens come here. NOT covered: who may
do it (service.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, delete, insert, or_, select, update

from shared import wire
from shared.wire import MachineState, Registration

from .database import Conflict, Database, Study, clean
from .leases import Leases
from .looking import Looking
from .members import Member, Members
from .reports import Reports
from .standings import Standings
from .tables import Branch, Detail, Event, Experiment, Machine, Token, table
from .writer import Transaction

RESERVED = "promoted"  #: the branch of promoted ideas has this machine's name


class Store:
    """The database of one campaign, and all that is asked of it."""

    def __init__(self, url: str, published: Callable[[list[wire.Event]], None] = lambda _: None) -> None:
        """Opens and migrates it. `published`: see Writer."""
        self.members = Members()
        self._database = database = Database(url, published, self.members.read)
        self.engine, self.writer, self.read = database.engine, database.writer, database.read
        self.leases = Leases(database, self.members)
        self.standings = Standings(database)
        self.reports = Reports(database, self.members, self.leases, self.standings)
        self.look = Looking(database, self.members)

    def close(self) -> None:
        self._database.close()

    @property
    def study(self) -> Study:
        return self._database.study

    def begin(self, study: Study) -> Study:
        """Raises BadInput for the database of another campaign."""
        return self._database.begin(study)

    # -- machines

    def register(
        self, registration: Registration, branch_prefix: str, state: MachineState = MachineState.ONLINE
    ) -> Member:
        """A new machine, or the next incarnation of a known one. A name that another machine has gets a number.
        Raises Conflict for a machine that was retired."""

        def job(t: Transaction) -> Member:
            known = t.connection.execute(select(Machine.__table__).where(Machine.uid == registration.uid)).first()
            if known is None:
                machine_id = self._joins(t, registration, branch_prefix, state)
            else:
                machine_id = self._comes_back(t, known, registration, state)
            member = self.members.changed(t, machine_id)
            t.event("registered", member.name, machine_class=registration.machine_class, new=known is None)
            return member

        return self.writer.call(job)

    def _joins(self, t: Transaction, registration: Registration, branch_prefix: str, state: MachineState) -> int:
        name = _free_name(t.connection, registration.name)
        branch = f"refs/heads/{branch_prefix}/{self.study.tag}-{name}"
        added = t.connection.execute(
            insert(Machine).values(
                uid=registration.uid,
                name=name,
                branch=f"{wire.IMPORTED}{name}" if state is MachineState.IMPORTED else branch,
                attic=f"refs/attic/{name}",
                incarnation=1,
                state=state,
                paused=False,
                registered_at=t.at,
                **_facts(registration),
            )
        )
        return int(added.inserted_primary_key[0])  # type: ignore[index]

    def _comes_back(self, t: Transaction, known: Row[Any], registration: Registration, state: MachineState) -> int:
        if known.state == MachineState.RETIRED:
            raise Conflict(f"{known.name} was retired", wire.RETIRED)
        machine_id: int = known.id
        t.connection.execute(
            update(Machine)
            .where(Machine.id == machine_id)
            .values(incarnation=known.incarnation + 1, state=state, **_facts(registration))
        )
        self.leases.release(t, machine_id)
        if known.machine_class != registration.machine_class:  # another class has another prior for sigma
            self.standings.renew_all(t.connection, machine_id)
        return machine_id

    def set_state(self, machine: Member, state: MachineState) -> None:
        """A transition, with its event. A machine that is not at work holds no leases; one that was retired stays so,
        also where a heartbeat of it was on its way."""

        def job(t: Transaction) -> None:
            now = t.connection.execute(select(Machine.state).where(Machine.id == machine.id)).scalar_one()
            if now in (state, MachineState.RETIRED):
                return
            t.connection.execute(update(Machine).where(Machine.id == machine.id).values(state=state))
            if state is not MachineState.ONLINE:
                self.leases.release(t, machine.id)
            t.event(str(state), machine.name)
            self.members.changed(t, machine.id)

        self.writer.call(job)

    def change(self, machine: Member, change: wire.MachineChange) -> Member:
        """Raises Conflict for a name that is taken."""

        def job(t: Transaction) -> Member:
            row = update(Machine).where(Machine.id == machine.id)
            now = t.connection.execute(select(Machine.name, Machine.paused).where(Machine.id == machine.id)).one()
            if change.name is not None and change.name != now.name:
                if change.name != _free_name(t.connection, change.name, but=machine.id):
                    raise Conflict(f"the name {change.name!r} is taken; choose another")
                t.connection.execute(row.values(name=change.name))
                t.event("renamed", change.name, was=now.name)
            if change.paused is not None and change.paused != now.paused:
                t.connection.execute(row.values(paused=change.paused))
                t.event("paused" if change.paused else "resumed", change.name or now.name)
            return self.members.changed(t, machine.id)

        return self.writer.call(job)

    def machine_rows(self) -> Sequence[Row[Any]]:
        with self.read() as connection:
            return connection.execute(select(Machine.__table__).order_by(Machine.id)).all()

    # -- branches

    def branches(self) -> list[wire.Branch]:
        query = select(Branch.__table__, Machine.name, Machine.branch).join(Machine).order_by(Machine.id)
        with self.read() as connection:
            rows = connection.execute(query).all()
        return [
            wire.Branch(machine=row.name, ref=row.branch, commit=row.commit, attic=row.attic, pushed_at=row.pushed_at)
            for row in rows
        ]

    def pushed(self, machine: Member, commit: str | None, attic: str | None) -> None:
        """Records what the hub holds of a machine."""
        if commit is None and attic is None:
            return

        def job(t: Transaction) -> None:
            row = t.connection.execute(select(Branch.commit).where(Branch.machine_id == machine.id)).first()
            values = {"commit": commit or self.study.base, "attic": attic, "pushed_at": t.at}
            if row is None:
                t.connection.execute(insert(Branch).values(machine_id=machine.id, **values))
            else:
                t.connection.execute(update(Branch).where(Branch.machine_id == machine.id).values(**values))
            if row is None or row.commit != values["commit"]:
                t.event("pushed", machine.name, commit=commit)

        self.writer.call(job)

    # -- tokens: only hashes come here

    def tokens(self) -> Sequence[Row[Any]]:
        with self.read() as connection:
            return connection.execute(select(Token.__table__).order_by(Token.id)).all()

    def add_token(self, values: dict[str, Any]) -> int:
        def job(t: Transaction) -> int:
            added = t.connection.execute(insert(Token).values(**values | {"label": clean(values["label"])}))
            return int(added.inserted_primary_key[0])  # type: ignore[index]

        return self.writer.call(job)

    def revoke_tokens(self, where: ColumnElement[bool]) -> int:
        def job(t: Transaction) -> int:
            return t.connection.execute(
                update(Token).where(where, Token.revoked_at.is_(None)).values(revoked_at=t.at)
            ).rowcount

        return self.writer.call(job)

    # -- upkeep

    def touch(self) -> None:
        """Writes as much as a report is, and leaves nothing. Raises StorageUnavailable."""

        def job(t: Transaction) -> None:
            row = {"position": 0, "kind": "touch", "at": t.at, "machine": None, "data": {"": "x" * 65536}}
            t.connection.execute(insert(table(Event)), row)
            t.connection.execute(delete(Event).where(Event.position == 0))

        self.writer.call(job)

    def drop_logs(self, older_than: int) -> int:
        """Removes log tails of experiments that arrived before a time."""
        old = select(Experiment.position).where(Experiment.received_at < older_than)

        def job(t: Transaction) -> int:
            gone = update(Detail).where(Detail.position.in_(old), Detail.log_tail.is_not(None))
            return t.connection.execute(gone.values(log_tail=None)).rowcount

        return self.writer.call(job)


def _facts(registration: Registration) -> dict[str, Any]:
    """What a machine says of itself anew at each start."""
    return {
        "machine_class": registration.machine_class,
        "backend": registration.backend,
        "hardware": registration.hardware.model_dump(),
        "can": list(registration.can),
        "version": clean(registration.version[:63]),
    }


def _free_name(connection: Connection, wanted: str, but: int | None = None) -> str:
    """What is wanted, or that with a number. `but`: a machine whose own names are free to it."""
    stem = wanted[:58].rstrip("-")  # room for a number
    # A branch never moves with its machine's name, so names that a branch still carries are taken as well.
    query = select(Machine.name, Machine.attic).where(
        or_(Machine.name.like(f"{stem}%"), Machine.attic.like(f"refs/attic/{stem}%"))
    )
    if but is not None:
        query = query.where(Machine.id != but)
    taken = {RESERVED, wire.SELF}
    for row in connection.execute(query):
        taken |= {row.name, row.attic.rpartition("/")[2]}
    if wanted not in taken:
        return wanted
    number = 2
    while (name := f"{stem}-{number}") in taken:
        number += 1
    return name
