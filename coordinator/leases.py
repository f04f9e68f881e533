"""Leases: what is queued for machines, who has it, and what closes it (docs/decisions/0006-leases.md).

Invariants: one holder at a time; only the latest attempt closes; everything that arrives is stored, whatever its lease
has become. First queued, first granted. NOT covered: terms, which are counted in memory (presence.py) and whose end
the reaper brings here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from uuid import UUID, uuid4

from sqlalchemy import ColumnElement, Row, func, insert, or_, select, update

from shared import wire
from shared.wire import Kind, LeaseState

from .database import LISTED, Conflict, Database, NotFound
from .members import GONE, Member, Members
from .tables import Experiment, Lease, Machine
from .writer import Transaction


class Leases:
    """The leases of one campaign."""

    def __init__(self, database: Database, members: Members) -> None:
        self._database, self._members = database, members
        with database.read() as connection:
            self._last = connection.execute(select(func.max(Lease.position))).scalar() or 0

    def queue(self, order: wire.LeaseOrder) -> UUID:
        """Raises NotFound for what is unknown, Conflict for a Confirm that is not for its own machine, and for a
        machine that will never work again."""
        wanted = self._members.named(order.machine).id if order.machine else None

        def job(t: Transaction) -> UUID:
            only = self._only(t, order, wanted)
            identity = uuid4()
            self._last += 1  # only the writer's thread comes here
            t.connection.execute(
                insert(Lease).values(
                    id=identity,
                    kind=order.kind,
                    state=LeaseState.QUEUED,
                    attempt=0,
                    experiment=order.experiment,
                    rung=order.rung,
                    wanted_id=only,
                    holder_id=None,
                    closed_by=None,
                    position=self._last,
                )
            )
            t.event("queued", order.machine, lease=str(identity), kind=order.kind, experiment=str(order.experiment))
            return identity

        return self._database.writer.call(job)

    def _only(self, t: Transaction, order: wire.LeaseOrder, wanted: int | None) -> int | None:
        """The machine that alone may run it; None where any may. Raises NotFound or Conflict."""
        about = t.connection.execute(
            select(Experiment.machine_id, Experiment.tested).where(Experiment.id == order.experiment)
        ).first()
        if about is None:
            raise NotFound(f"no experiment {order.experiment}")
        owner: int = about.machine_id
        if order.kind is not Kind.CONFIRM and (len(about.tested) < 40 or about.tested == wire.NO_COMMIT):
            raise Conflict("its code is not on the hub: it was imported from a log that only has the results")
        if order.kind is Kind.CONFIRM and wanted not in (None, owner):
            raise Conflict("an experiment is confirmed on its own machine")
        only = owner if order.kind is Kind.CONFIRM else wanted
        if only is not None and (member := self._members.by_id(only)).state in GONE:
            raise Conflict(f"{member.name} is {member.state}: it runs nothing any more")
        return only

    def grant(self, machine: Member) -> tuple[Row[Any], Row[Any]] | None:
        """The first queued lease that this machine can run, now its own, and the experiment that it is about."""

        def job(t: Transaction) -> tuple[Row[Any], Row[Any]] | None:
            now = t.connection.execute(select(Machine.state, Machine.paused).where(Machine.id == machine.id)).one()
            if now.paused or now.state in GONE:  # since it asked
                return None
            query = select(Lease.__table__).where(*_waiting(machine)).order_by(Lease.position).limit(1)
            if (lease := t.connection.execute(query).first()) is None:
                return None
            t.connection.execute(
                update(Lease)
                .where(Lease.id == lease.id)
                .values(state=LeaseState.GRANTED, attempt=lease.attempt + 1, holder_id=machine.id)
            )
            t.event("granted", machine.name, lease=str(lease.id), kind=lease.kind, attempt=lease.attempt + 1)
            about = t.connection.execute(select(Experiment.__table__).where(Experiment.id == lease.experiment)).one()
            return t.connection.execute(select(Lease.__table__).where(Lease.id == lease.id)).one(), about

        return self._database.writer.call(job)

    def has_work_for(self, machine: Member) -> bool:
        """Whether a lease waits that this machine could run; a read, so that most asks write nothing."""
        with self._database.read() as connection:
            return connection.execute(select(Lease.id).where(*_waiting(machine)).limit(1)).first() is not None

    def granted(self) -> Sequence[Row[Any]]:
        with self._database.read() as connection:
            return connection.execute(select(Lease.__table__).where(Lease.state == LeaseState.GRANTED)).all()

    def give_back(self, lease: UUID, attempt: int, why: str) -> None:
        """Back into the queue, unless a later attempt has it or it is closed."""

        def job(t: Transaction) -> None:
            _return(t, (Lease.id == lease, Lease.attempt == attempt), why)

        self._database.writer.call(job)

    def cancel(self, lease: UUID) -> None:
        """Raises NotFound, or Conflict when it is done."""

        def job(t: Transaction) -> None:
            row = t.connection.execute(select(Lease.state).where(Lease.id == lease)).first()
            if row is None:
                raise NotFound(f"no lease {lease}")
            if row.state == LeaseState.DONE:
                raise Conflict("it is done")
            t.connection.execute(
                update(Lease).where(Lease.id == lease).values(state=LeaseState.CANCELLED, holder_id=None)
            )
            t.event("cancelled", lease=str(lease))

        self._database.writer.call(job)

    @staticmethod
    def release(t: Transaction, machine_id: int) -> None:
        """Returns all that a machine holds."""
        _return(t, (Lease.holder_id == machine_id,), "its machine is gone")

    @staticmethod
    def close(t: Transaction, machine: Member, identity: UUID, reference: wire.LeaseRef | None) -> Row[Any] | None:
        """The lease that a report closed (kind, experiment), if it closed its own: its attempt is the latest, also
        where its term has run out."""
        if reference is None or reference.attempt < 1:
            return None
        closed = t.connection.execute(
            update(Lease)
            .where(
                Lease.id == reference.id,
                Lease.attempt == reference.attempt,
                Lease.state.in_((LeaseState.GRANTED, LeaseState.QUEUED)),
                or_(Lease.holder_id == machine.id, Lease.holder_id.is_(None)),
            )
            .values(state=LeaseState.DONE, holder_id=None, closed_by=identity)
        )
        if not closed.rowcount:
            return None
        t.event("closed", lease=str(reference.id), attempt=reference.attempt, experiment=str(identity))
        about = select(Lease.kind, Lease.experiment).where(Lease.id == reference.id)
        return cast(Row[Any], t.connection.execute(about).one())

    def all(self, state: LeaseState | None = None) -> list[wire.LeaseView]:
        """The latest first, a page of them at most."""
        query = select(Lease.__table__).order_by(Lease.position.desc()).limit(LISTED)
        if state is not None:
            query = query.where(Lease.state == state)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        views = []
        for row in rows:
            machine = row.holder_id or row.wanted_id
            views.append(
                wire.LeaseView(
                    id=row.id,
                    kind=row.kind,
                    state=row.state,
                    attempt=row.attempt,
                    experiment=row.experiment,
                    rung=row.rung,
                    machine=self._members.by_id(machine).name if machine else None,
                    closed_by=row.closed_by,
                )
            )
        return views


def _waiting(machine: Member) -> tuple[ColumnElement[bool], ...]:
    return (
        Lease.state == LeaseState.QUEUED,
        Lease.kind.in_([kind for kind in Kind if kind in machine.can]),
        or_(Lease.wanted_id == machine.id, Lease.wanted_id.is_(None)),
    )


def _return(t: Transaction, where: tuple[ColumnElement[bool], ...], why: str) -> None:
    gone = t.connection.execute(
        select(Lease.id, Lease.attempt).where(Lease.state == LeaseState.GRANTED, *where).order_by(Lease.position)
    ).all()
    for row in gone:
        t.connection.execute(update(Lease).where(Lease.id == row.id).values(state=LeaseState.QUEUED, holder_id=None))
        t.event("returned", lease=str(row.id), attempt=row.attempt, why=why)
