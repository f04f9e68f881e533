"""Every query. Reads take a short connection of their own; writes are jobs of the one writer (writer.py).

Invariants: a report is stored whole or not at all, with its runs, idea, standing, lease and event in one commit; the
same report twice changes nothing; `standings` always equals what `rebuild_standings` would make of the experiments.
"""

from __future__ import annotations

import json
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid4

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Row,
    Select,
    and_,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    insert,
    literal_column,
    make_url,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError

from shared import wire
from shared.errors import BadInput, Refused, SwarmError
from shared.wire import ExperimentReport, Kind, LeaseState, MachineState, Registration, Status

from . import leaderboard, tables
from .tables import Branch, Campaign, Detail, Experiment, Idea, Lease, Machine, Run, Standing, Token, table
from .writer import TROUBLE, StorageUnavailable, Transaction, Writer

RESERVED = "promoted"  #: the branch of promoted ideas has this machine's name
LISTED = 1000  #: rows in one page at most
POOL = {"pool_size": 8, "max_overflow": 40}  #: connections: the web server's 40 threads, the writer, some to spare
HUGE = 1e100  #: no score, second or GiB is beyond it, so that sums and squares of them are finite
GONE = (MachineState.RETIRED, MachineState.IMPORTED)  #: such a machine never works again
#: What an experiment is and always was; a later version of a report may not say otherwise.
_IDENTITY = ("number", "idea", "profile", "rung", "tested")


class NotFound(SwarmError):
    """There is no such thing here."""


class Conflict(Refused):
    """It contradicts what is stored; the same request will be refused again."""

    def __init__(self, message: str, kind: str = "about:blank") -> None:
        """`kind`: the problem's type, where a worker acts on it (wire.py)."""
        super().__init__(message)
        self.kind = kind


class Impossible(BadInput):
    """A report that cannot be true or may not be stored."""


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


@dataclass(frozen=True)
class Sanity:
    """Beyond these a result is `suspect`: stored, and never best until it is cleared."""

    best_possible: float | None = None  #: a score better than this
    largest_step: float | None = None  #: one step better than HEAD by more than this


@dataclass(frozen=True)
class Study:
    """The campaign row, with what reports are checked against."""

    name: str
    tag: str
    metric: str
    direction: Literal["minimize", "maximize"]
    profile: str
    base: str
    digest: str | None
    sanity: Sanity = Sanity()

    @property
    def sign(self) -> int:
        return 1 if self.direction == "minimize" else -1


def open_engine(url: str) -> Engine:
    """An engine for SQLite or PostgreSQL, with the pragmas and the transactions that the writer counts on."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
        try:
            return create_engine(parsed, pool_pre_ping=True, **POOL)
        except ModuleNotFoundError:
            raise BadInput("--db: PostgreSQL needs psycopg: pip install 'ratchet-swarm[postgres]'") from None
    if parsed.get_backend_name() != "sqlite":
        raise BadInput(f"--db {parsed.render_as_string(hide_password=True)}: sqlite:/// or postgresql:// is served")
    engine = create_engine(parsed, connect_args={"check_same_thread": False, "timeout": 30}, **POOL)

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",  # a report that was acknowledged survives a power cut
            "foreign_keys=ON",
            "busy_timeout=30000",
            "cache_size=-16384",
            "temp_store=MEMORY",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def migrate(engine: Engine, to: str = "head") -> None:
    """Brings the schema up to date. Raises BadInput for a database of a newer release, and for none at all."""
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    try:
        with engine.connect().execution_options(writes=True) as connection, connection.begin():
            config.attributes["connection"] = connection
            command.upgrade(config, to)
    except CommandError as error:
        raise BadInput(f"--db: {error}; the database was made by a newer release, upgrade this one") from None
    except DBAPIError as error:
        raise BadInput(f"--db {engine.url}: {' '.join(str(error.orig).split())}") from None


class Store:
    """The database of one campaign."""

    def __init__(self, url: str, published: Callable[[list[wire.Event]], None] = lambda _: None) -> None:
        """Opens and migrates it. `published`: see Writer."""
        self.engine = open_engine(url)
        try:
            migrate(self.engine)
        except BadInput:
            self.engine.dispose()
            raise
        self._count = _counting(self.engine.dialect.name)
        self._study: Study | None = None
        self._members: dict[str, Member] = {}
        self._ids: dict[int, Member] = {}
        self._uids: dict[UUID, Member] = {}
        with self.read() as connection:
            last = connection.execute(select(func.max(tables.Event.position))).scalar() or 0
            self._experiments = connection.execute(select(func.max(Experiment.position))).scalar() or 0
            self._leases = connection.execute(select(func.max(Lease.position))).scalar() or 0
            self._read_members(connection)
            if (own := connection.execute(select(Campaign.__table__)).first()) is not None:
                self._study = Study(own.name, own.tag, own.metric, own.direction, own.profile, own.base, own.digest)
        self.writer = Writer(self.engine.execution_options(writes=True), last + 1, published, self._read_members)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Raises StorageUnavailable."""
        try:
            with self.engine.connect() as connection:
                yield connection
        except TROUBLE as error:
            cause = " ".join(str(getattr(error, "orig", None) or error).split())
            raise StorageUnavailable(f"the database gives nothing: {cause}") from None

    def close(self) -> None:
        self.writer.close()
        self.engine.dispose()

    # -- the campaign

    @property
    def study(self) -> Study:
        assert self._study is not None, "begin() comes first"
        return self._study

    def begin(self, study: Study) -> Study:
        """Makes this the database of a study, or finds it again; tag and base stay. Raises BadInput for another's."""
        stored = self._study
        if stored is None:
            values = {k: getattr(study, k) for k in ("name", "tag", "metric", "direction", "profile", "base", "digest")}
            now = int(time.time())
            self.writer.call(lambda t: t.connection.execute(insert(Campaign).values(id=1, created_at=now, **values)))
            stored = study
        for key in ("name", "metric", "direction", "profile"):
            if getattr(stored, key) != getattr(study, key):
                raise BadInput(
                    f"the database belongs to a campaign with {key} {getattr(stored, key)!r}, "
                    f"this one has {getattr(study, key)!r}; give it a database of its own (--db)"
                )
        if study.digest is not None and stored.digest != study.digest:
            if stored.digest is not None:
                raise BadInput(
                    f"prepare's digest is {study.digest[:12]}, the database's results were measured with "
                    f"{stored.digest[:12]}; restore prepare and data, or begin anew (--db)"
                )
            self.writer.call(lambda t: t.connection.execute(update(Campaign).values(digest=study.digest)))
        self._study = Study(
            stored.name, stored.tag, stored.metric, stored.direction, stored.profile, stored.base,
            study.digest or stored.digest, study.sanity,
        )  # fmt: skip
        return self._study

    # -- machines

    def _read_members(self, connection: Connection) -> None:
        for row in connection.execute(select(Machine.__table__)):
            self._remember(Member.of(row))

    def _remember(self, member: Member) -> None:
        """Only the writer's thread comes here, in commit order. Nobody who looks meanwhile misses a machine."""
        before = self._ids.get(member.id)
        self._ids[member.id] = self._members[member.name] = self._uids[member.uid] = member
        if before is not None and before.name != member.name:
            del self._members[before.name]

    def _changed(self, t: Transaction, machine_id: int) -> Member:
        """The machine as it now is; remembered once that is committed."""
        row = t.connection.execute(select(Machine.__table__).where(Machine.id == machine_id)).one()
        member = Member.of(row)
        t.after_commit(partial(self._remember, member))
        return member

    def member(self, name: str) -> Member:
        """Raises NotFound."""
        try:
            return self._members[name]
        except KeyError:
            raise NotFound(f"no machine {name!r}") from None

    def member_by_id(self, machine_id: int) -> Member:
        return self._ids[machine_id]

    def member_by_uid(self, uid: UUID) -> Member | None:
        return self._uids.get(uid)

    def members(self) -> list[Member]:
        return list(self._members.values())

    def register(
        self, registration: Registration, branch_prefix: str, state: MachineState = MachineState.ONLINE
    ) -> Member:
        """A new machine, or the next incarnation of a known one. A name that another machine has gets a number.
        Raises Conflict for a machine that was retired."""

        def job(t: Transaction) -> Member:
            known = t.connection.execute(select(Machine.__table__).where(Machine.uid == registration.uid)).first()
            facts = {
                "machine_class": registration.machine_class,
                "backend": registration.backend,
                "hardware": registration.hardware.model_dump(),
                "can": list(registration.can),
                "version": _clean(registration.version[:63]),
            }
            if known is not None:
                if known.state == MachineState.RETIRED:
                    raise Conflict(f"{known.name} was retired", wire.RETIRED)
                t.connection.execute(
                    update(Machine)
                    .where(Machine.id == known.id)
                    .values(incarnation=known.incarnation + 1, state=state, **facts)
                )
                machine_id, name = known.id, known.name
                self._release(t, known.id, frozenset(registration.holds))
                if known.machine_class != registration.machine_class:  # another class has another prior for sigma
                    self._update_levels(t.connection, known.id)
            else:
                name = self._free_name(t.connection, registration.name)
                branch = f"refs/heads/{branch_prefix}/{self.study.tag}-{name}"
                machine_id = t.connection.execute(
                    insert(Machine).values(
                        uid=registration.uid,
                        name=name,
                        branch=f"{wire.IMPORTED}{name}" if state is MachineState.IMPORTED else branch,
                        attic=f"refs/attic/{name}",
                        incarnation=1,
                        state=state,
                        paused=False,
                        registered_at=t.at,
                        **facts,
                    )
                ).inserted_primary_key[0]  # type: ignore[index]
            t.event("registered", name, machine_class=registration.machine_class, new=known is None)
            return self._changed(t, machine_id)

        return self.writer.call(job)

    @staticmethod
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

    def set_state(self, machine: Member, state: MachineState) -> None:
        """A transition, with its event. A machine that is not at work holds no leases; one that was retired stays so,
        also where a heartbeat of it was on its way."""

        def job(t: Transaction) -> None:
            now = t.connection.execute(select(Machine.state).where(Machine.id == machine.id)).scalar_one()
            if now in (state, MachineState.RETIRED):
                return
            t.connection.execute(update(Machine).where(Machine.id == machine.id).values(state=state))
            if state is not MachineState.ONLINE:
                self._release(t, machine.id, frozenset())
            t.event(str(state), machine.name)
            self._changed(t, machine.id)

        self.writer.call(job)

    def change(self, machine: Member, change: wire.MachineChange) -> Member:
        """Raises Conflict for a name that is taken."""

        def job(t: Transaction) -> Member:
            row = update(Machine).where(Machine.id == machine.id)
            now = t.connection.execute(select(Machine.name, Machine.paused).where(Machine.id == machine.id)).one()
            if change.name is not None and change.name != now.name:
                if change.name != self._free_name(t.connection, change.name, but=machine.id):
                    raise Conflict(f"the name {change.name!r} is taken; choose another")
                t.connection.execute(row.values(name=change.name))
                t.event("renamed", change.name, was=now.name)
            if change.paused is not None and change.paused != now.paused:
                t.connection.execute(row.values(paused=change.paused))
                t.event("paused" if change.paused else "resumed", change.name or now.name)
            return self._changed(t, machine.id)

        return self.writer.call(job)

    def machine_rows(self) -> Sequence[Row[Any]]:
        with self.read() as connection:
            return connection.execute(select(Machine.__table__).order_by(Machine.id)).all()

    def known(self, machine: Member) -> dict[UUID, int]:
        """The version of each of its experiments that is stored: what it need not send again."""
        with self.read() as connection:
            query = select(Experiment.id, Experiment.version).where(Experiment.machine_id == machine.id)
            return {row.id: row.version for row in connection.execute(query)}

    # -- reports

    def report(
        self, machine: Member, identity: UUID, report: ExperimentReport
    ) -> Callable[[Transaction], wire.Accepted]:
        """The job that stores a report. Raises Impossible, here, for one that cannot be true."""
        self._check(report)
        return partial(self._store_report, machine=machine, identity=identity, report=report)

    def _check(self, report: ExperimentReport) -> None:
        study = self.study
        whole = [report.version, report.number, report.nodes_added, report.decided_at]
        whole += [run.seed for run in report.runs] + ([report.lease.attempt] if report.lease else [])
        if any(abs(number) >= 2**63 for number in whole):
            raise Impossible("a whole number beyond 64 bits")
        if any(abs(value) > HUGE for run in report.runs for value in (run.score or 0.0, run.memory_gb, run.seconds)):
            raise Impossible(f"a score, time or memory beyond {HUGE:g}")
        if "\0" in report.profile + report.rung:
            raise Impossible("a NUL character in the name of a profile or rung")
        try:
            json.dumps([report.edits, report.params], allow_nan=False)
        except ValueError:
            raise Impossible("edits or params: a number that is not finite") from None
        for run in report.runs:
            if run.score is not None and study.metric.endswith("bpb") and run.score <= 0:
                raise Impossible(f"score {run.score:.6f}: bits per byte are above 0")
            expected = study.digest if report.profile == study.profile else None
            if run.score is not None and expected is not None and run.digest not in (None, expected):
                raise Impossible(
                    f"measured with digest {str(run.digest)[:12]}, the campaign's for profile {report.profile} is "
                    f"{expected[:12]}; bring prepare and data in step with the campaign"
                )
        if report.status is Status.KEEP and report.score is None:
            raise Impossible("a keep without a score")
        if report.status is Status.VOID:
            raise Impossible("a void run is no result; it is run again")

    def _store_report(self, t: Transaction, machine: Member, identity: UUID, report: ExperimentReport) -> wire.Accepted:
        stored = t.connection.execute(_STORED, {"id": identity}).first()
        if stored is not None and stored.machine_id != machine.id:
            raise Conflict(f"experiment {identity} belongs to another machine")
        for name in _IDENTITY if stored is not None else ():
            if getattr(stored, name) != getattr(report, name):
                raise Conflict(f"experiment {identity} was reported with another {name} before")
        if stored is not None and stored.version >= report.version:
            closed = self._close_lease(t, machine, identity, report)
            return wire.Accepted(stored=False, suspect=stored.suspect, closed=closed)
        mean, squares = leaderboard.spread([run.score for run in report.runs if run.score is not None])
        standing = self._standing(t.connection, machine.id, report.profile, report.rung)
        cleared = report.confirmed or (stored is not None and stored.cleared)
        level = standing.best if standing is not None else None
        suspect = not cleared and (
            (stored is not None and stored.suspect) or self._beyond(report.score, level) or self._beyond(mean, level)
        )
        values = {
            "version": report.version,
            "status": report.status,
            "score": report.score,
            "mean": mean,
            "squares": squares,
            "scored": sum(run.score is not None for run in report.runs),
            "runs": len(report.runs),
            "memory_gb": report.runs[0].memory_gb if report.runs else 0.0,
            "seconds": sum(run.seconds for run in report.runs),
            "kept": report.kept,
            "reason": _clean(report.reason),
            "confirmed": report.confirmed,
            "suspect": suspect,
            "cleared": cleared,
            "pruned": report.pruned,
            "decided_at": report.decided_at,
        }
        if stored is None:
            position = self._insert_experiment(t, machine, identity, report, values)
        else:
            position = stored.position
            t.connection.execute(update(Experiment).where(Experiment.position == position).values(**values))
            t.flush()  # the runs may be from a job of the same commit
            t.connection.execute(delete(Run).where(Run.position == position))
        for number, run in enumerate(report.runs):
            t.later(_INSERT_RUN, _run_row(position, number, run))
        self._count_idea(t, machine, report, position, stored.status if stored is not None else None)
        t.event(
            "experiment" if stored is None else "revised",
            machine.name,
            id=str(identity),
            number=report.number,
            kind=report.kind,
            status=report.status,
            score=report.score,
            description=_clean(report.description),
            profile=report.profile,
            rung=report.rung,
            suspect=suspect,
            confirmed=report.confirmed,
        )
        if standing is not None and standing.suspects and not suspect and (stored is None or stored.suspect):
            self._believe_later(t, machine.id, report.profile, report.rung, report.number)
        self._update_standing(t, machine, report, standing, stored.status if stored is not None else None, suspect)
        return wire.Accepted(stored=True, suspect=suspect, closed=self._close_lease(t, machine, identity, report))

    def _insert_experiment(
        self, t: Transaction, machine: Member, identity: UUID, report: ExperimentReport, values: dict[str, Any]
    ) -> int:
        self._experiments += 1  # only the writer's thread comes here; a gap after a failed commit does no harm
        position = self._experiments
        # As parameters: with values() SQLAlchemy makes an object of each, half a millisecond a row.
        experiment = {
            "position": position,
            "id": identity,
            "machine_id": machine.id,
            "number": report.number,
            "kind": report.kind,
            "idea": report.idea,
            "profile": report.profile,
            "rung": report.rung,
            "tested": report.tested,
            "parent": report.parent,
            "description": _clean(report.description),
            "proposer": _clean(report.proposer),
            "received_at": t.at,
            **values,
        }
        t.connection.execute(_INSERT_EXPERIMENT, experiment)
        detail = {
            "position": position,
            "fingerprint": _clean(report.fingerprint),
            "code_state": _clean(report.code_state),
            "nodes_added": report.nodes_added,
            "digest": next((_clean(run.digest) for run in report.runs if run.digest), None),
            "edits": _clean(report.edits),
            "params": _clean(report.params),
            "diff": _packed(report.diff),
            "log_tail": _packed(report.log_tail or None),
        }
        t.later(_INSERT_DETAIL, detail)
        return position

    def _count_idea(
        self, t: Transaction, machine: Member, report: ExperimentReport, position: int, before: str | None
    ) -> None:
        kept = (report.status is Status.KEEP) - (before == Status.KEEP)
        tried = int(before is None)
        if kept or tried:
            idea = {
                "id": report.idea,
                "fingerprint": _clean(report.fingerprint),
                "description": _clean(report.description),
                "machine_id": machine.id,
                "position": position,
                "tried": tried,
                "kept": kept,
            }
            t.later(self._count, idea)

    # -- standings

    @staticmethod
    def _standing(connection: Connection, machine_id: int, profile: str, rung: str) -> Row[Any] | None:
        return connection.execute(_STANDING, {"of_machine": machine_id, "of_profile": profile, "of_rung": rung}).first()

    def _update_standing(
        self,
        t: Transaction,
        machine: Member,
        report: ExperimentReport,
        standing: Row[Any] | None,
        before: str | None,
        suspect: bool,
    ) -> None:
        """Counts by one; levels from the few rows that they depend on, where this report can have changed them."""
        key = (machine.id, report.profile, report.rung)
        new = before is None and report.number > 0
        if standing is not None and new and not suspect and report.status is not Status.KEEP and len(report.runs) < 2:
            # The common case, a discard: neither HEAD nor baseline nor a rerun, so it moves one number.
            where = {"of_machine": machine.id, "of_profile": report.profile, "of_rung": report.rung}
            t.connection.execute(_ONE_MORE, where)
            return
        kept = report.number > 0 and (report.status is Status.KEEP) - (before == Status.KEEP)
        values = self._levels(t.connection, *key)
        values["experiments"] = (standing.experiments if standing is not None else 0) + int(new)
        values["keeps"] = (standing.keeps if standing is not None else 0) + int(kept)
        self._put_standing(t.connection, key, values, standing is None)
        best, was = values["best"], standing.best if standing is not None else None
        if best is not None and was is not None and self.study.sign * (was - best) > 0:
            t.event("best", machine.name, score=best, was=was, profile=report.profile, rung=report.rung)

    @staticmethod
    def _put_standing(connection: Connection, key: tuple[int, str, str], values: dict[str, Any], new: bool) -> None:
        names = dict(zip(("machine_id", "profile", "rung"), key, strict=True))
        if new:
            connection.execute(insert(Standing), {**names, **values})
        else:
            row = update(Standing).where(*(getattr(Standing, name) == value for name, value in names.items()))
            connection.execute(row, values)

    def _levels(self, connection: Connection, machine_id: int, profile: str, rung: str) -> dict[str, Any]:
        """Baseline, HEAD and noise of one machine; all but the counts of a standing. Suspects count for nothing."""
        here = _here(machine_id, profile, rung)
        believed = (*here, ~Experiment.suspect)
        columns = (Experiment.position, Experiment.score, Experiment.mean, Experiment.scored, Experiment.confirmed)
        firsts = select(*columns).where(*believed, Experiment.number == 0).order_by(Experiment.position)
        first = connection.execute(firsts.limit(1)).first()
        head = connection.execute(self._heads(here, *columns)).first()
        # In one order: sums of the same floats must be the same float, whichever way the database finds them.
        reruns = (
            select(Experiment.squares, Experiment.scored)
            .where(*believed, Experiment.scored > literal_column("1"))
            .order_by(Experiment.position)
            .subquery()
        )
        noise = connection.execute(select(func.sum(reruns.c.squares), func.sum(reruns.c.scored - 1))).one()
        suspects = select(func.count()).where(*here, Experiment.suspect).scalar_subquery().label("suspects")
        machine = connection.execute(select(Machine.machine_class, suspects).where(Machine.id == machine_id)).one()
        baseline = first.mean if first is not None else None
        best = head.mean if head is not None else None
        first_score = first.score if first is not None else None  # the machine's own prior goes by its first run
        sigma = leaderboard.noise_floor(
            self.study.metric, machine.machine_class, first_score, noise[0] or 0.0, int(noise[1] or 0)
        )
        gain = None if baseline is None or best is None else self.study.sign * (baseline - best)
        return {
            "baseline": baseline,
            "best": best,
            "sigma": sigma,
            "gain_sigmas": None if gain is None or not sigma else gain / sigma,
            "runs": head.scored if head is not None else 0,
            "confirmed": bool(head is not None and head.confirmed),
            "suspects": machine.suspects,
            "head": head.position if head is not None else None,
        }

    @staticmethod
    def _heads(here: tuple[ColumnElement[bool], ...], *columns: Any) -> Select[Any]:
        """The last keep that is believed."""
        kept = Experiment.status == literal_column("'keep'")  # no parameter: the partial index has the word
        keeps = select(*columns).where(*here, kept, ~Experiment.suspect)
        return keeps.order_by(Experiment.number.desc(), Experiment.position.desc()).limit(1)

    def _update_levels(self, connection: Connection, machine_id: int) -> None:
        """Of all its standings."""
        query = select(Standing.profile, Standing.rung).where(Standing.machine_id == machine_id)
        for row in connection.execute(query).all():
            key = (machine_id, row.profile, row.rung)
            self._put_standing(connection, key, self._levels(connection, *key), False)

    def rebuild_standings(self) -> None:
        """Makes the cache anew from the experiments."""

        def job(t: Transaction) -> None:
            t.connection.execute(delete(Standing))
            groups = t.connection.execute(
                select(
                    Experiment.machine_id,
                    Experiment.profile,
                    Experiment.rung,
                    func.count().filter(Experiment.number > 0).label("experiments"),
                    func.count().filter(and_(Experiment.number > 0, Experiment.status == "keep")).label("keeps"),
                ).group_by(Experiment.machine_id, Experiment.profile, Experiment.rung)
            ).all()
            for group in groups:
                key = (group.machine_id, group.profile, group.rung)
                values = self._levels(t.connection, *key)
                values |= {"experiments": group.experiments, "keeps": group.keeps}
                self._put_standing(t.connection, key, values, True)

        self.writer.call(job)

    def clear(self, identity: UUID) -> None:
        """Believes a suspect result, and looks anew at the later ones of its machine that were held against it."""

        def job(t: Transaction) -> None:
            row = t.connection.execute(select(Experiment.__table__).where(Experiment.id == identity)).first()
            if row is None:
                raise NotFound(f"no experiment {identity}")
            t.connection.execute(
                update(Experiment).where(Experiment.position == row.position).values(suspect=False, cleared=True)
            )
            key = (row.machine_id, row.profile, row.rung)
            self._believe_later(t, *key, row.number)
            self._put_standing(t.connection, key, self._levels(t.connection, *key), False)
            t.event("cleared", self._ids[row.machine_id].name, id=str(identity))

        self.writer.call(job)

    def _believe_later(self, t: Transaction, machine_id: int, profile: str, rung: str, number: int) -> None:
        """Looks again at the suspects after a result that now counts: they were held against an older HEAD."""
        here = _here(machine_id, profile, rung)
        later = t.connection.execute(
            select(Experiment.position, Experiment.number, Experiment.score, Experiment.mean)
            .where(*here, Experiment.suspect, Experiment.number > number)
            .order_by(Experiment.number, Experiment.position)
        ).all()
        for other in later:
            heads = self._heads((*here, Experiment.number < other.number), Experiment.mean)
            level = t.connection.execute(heads).scalar()
            if not self._beyond(other.score, level) and not self._beyond(other.mean, level):
                t.connection.execute(
                    update(Experiment).where(Experiment.position == other.position).values(suspect=False)
                )

    def _beyond(self, score: float | None, level: float | None) -> bool:
        """Whether a score is better than the sanity bounds allow, HEAD being at `level`."""
        sanity, sign = self.study.sanity, self.study.sign
        if score is None:
            return False
        if sanity.best_possible is not None and sign * (sanity.best_possible - score) > 0:
            return True
        return bool(
            sanity.largest_step is not None and level is not None and sign * (level - score) > sanity.largest_step
        )

    # -- leases: decision 11. Only the latest attempt closes; everything that arrives is stored.

    def queue_lease(self, order: wire.LeaseOrder) -> UUID:
        """Raises NotFound for what is unknown, Conflict for a Confirm that is not for its own machine, and for a
        machine that will never work again."""
        wanted = self.member(order.machine).id if order.machine else None

        def job(t: Transaction) -> UUID:
            about = t.connection.execute(
                select(Experiment.machine_id, Experiment.tested).where(Experiment.id == order.experiment)
            ).first()
            if about is None:
                raise NotFound(f"no experiment {order.experiment}")
            owner = about.machine_id
            if order.kind is not Kind.CONFIRM and (len(about.tested) < 40 or about.tested == wire.NO_COMMIT):
                raise Conflict("its code is not on the hub: it was imported from a log that only has the results")
            if order.kind is Kind.CONFIRM and wanted not in (None, owner):
                raise Conflict("an experiment is confirmed on its own machine")
            only = owner if order.kind is Kind.CONFIRM else wanted
            if only is not None and self._ids[only].state in GONE:
                raise Conflict(f"{self._ids[only].name} is {self._ids[only].state}: it runs nothing any more")
            identity = uuid4()
            self._leases += 1
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
                    position=self._leases,
                )
            )
            t.event("queued", order.machine, lease=str(identity), kind=order.kind, experiment=str(order.experiment))
            return identity

        return self.writer.call(job)

    def grant(self, machine: Member) -> tuple[Row[Any], Row[Any]] | None:
        """The first queued lease that this machine can run, now its own, and the experiment that it is about."""

        def job(t: Transaction) -> tuple[Row[Any], Row[Any]] | None:
            now = t.connection.execute(select(Machine.state, Machine.paused).where(Machine.id == machine.id)).one()
            if now.paused or now.state in GONE:  # since it asked
                return None
            query = select(Lease.__table__).where(*self._waiting(machine)).order_by(Lease.position).limit(1)
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

        return self.writer.call(job)

    def has_work_for(self, machine: Member) -> bool:
        """Whether a lease waits that this machine could run; a read, so that most asks write nothing."""
        with self.read() as connection:
            return connection.execute(select(Lease.id).where(*self._waiting(machine)).limit(1)).first() is not None

    @staticmethod
    def _waiting(machine: Member) -> tuple[ColumnElement[bool], ...]:
        return (
            Lease.state == LeaseState.QUEUED,
            Lease.kind.in_([kind for kind in Kind if kind in machine.can]),
            or_(Lease.wanted_id == machine.id, Lease.wanted_id.is_(None)),
        )

    def granted(self) -> Sequence[Row[Any]]:
        with self.read() as connection:
            return connection.execute(select(Lease.__table__).where(Lease.state == LeaseState.GRANTED)).all()

    def return_lease(self, lease: UUID, attempt: int, why: str) -> None:
        """Back into the queue, unless a later attempt has it or it is closed."""

        def job(t: Transaction) -> None:
            self._return(t, (Lease.id == lease, Lease.attempt == attempt), why)

        self.writer.call(job)

    def cancel_lease(self, lease: UUID) -> None:
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

        self.writer.call(job)

    def _release(self, t: Transaction, machine_id: int, keep: frozenset[UUID]) -> None:
        """Returns what a machine holds, but for what it says it still works on."""
        self._return(t, (Lease.holder_id == machine_id,), "its machine is gone", keep)

    @staticmethod
    def _return(
        t: Transaction, where: tuple[ColumnElement[bool], ...], why: str, keep: frozenset[UUID] = frozenset()
    ) -> None:
        gone = t.connection.execute(
            select(Lease.id, Lease.attempt).where(Lease.state == LeaseState.GRANTED, *where).order_by(Lease.position)
        ).all()
        for row in gone:
            if row.id in keep:
                continue
            t.connection.execute(
                update(Lease).where(Lease.id == row.id).values(state=LeaseState.QUEUED, holder_id=None)
            )
            t.event("returned", lease=str(row.id), attempt=row.attempt, why=why)

    @staticmethod
    def _close_lease(t: Transaction, machine: Member, identity: UUID, report: ExperimentReport) -> bool:
        """Whether this report closed its lease: its attempt is the latest, also where its term has run out."""
        if report.lease is None or report.lease.attempt < 1:
            return False
        closed = t.connection.execute(
            update(Lease)
            .where(
                Lease.id == report.lease.id,
                Lease.attempt == report.lease.attempt,
                Lease.state.in_((LeaseState.GRANTED, LeaseState.QUEUED)),
                or_(Lease.holder_id == machine.id, Lease.holder_id.is_(None)),
            )
            .values(state=LeaseState.DONE, holder_id=None, closed_by=identity)
        )
        if closed.rowcount:
            t.event("closed", lease=str(report.lease.id), attempt=report.lease.attempt, experiment=str(identity))
        return bool(closed.rowcount)

    def leases(self, state: LeaseState | None = None) -> list[wire.LeaseView]:
        query = select(Lease.__table__).order_by(Lease.position.desc()).limit(LISTED)
        if state is not None:
            query = query.where(Lease.state == state)
        with self.read() as connection:
            rows = connection.execute(query).all()
        views = []
        for row in rows:
            machine = self._ids.get(row.holder_id or row.wanted_id or -1)
            views.append(
                wire.LeaseView(
                    id=row.id,
                    kind=row.kind,
                    state=row.state,
                    attempt=row.attempt,
                    experiment=row.experiment,
                    rung=row.rung,
                    machine=machine.name if machine else None,
                    closed_by=row.closed_by,
                )
            )
        return views

    # -- looking

    def leaderboard(
        self,
        order: Literal["group", "sigmas"],
        machine_class: str | None = None,
        profile: str | None = None,
        rung: str | None = None,
        machine: str | None = None,
        after: int = 0,
        limit: int = 100,
    ) -> wire.Leaderboard:
        """Ranks count the whole filtered list, not the page; `group` ranks within class, profile and rung."""
        board, head = Standing.__table__, Experiment.__table__
        query = (
            select(
                *board.c,
                Machine.name,
                Machine.machine_class,
                head.c.kept,
                head.c.id.label("experiment"),
                head.c.description,
            )
            .join(Machine, Machine.id == board.c.machine_id)
            .outerjoin(head, head.c.position == board.c.head)
        )
        for column, value in (
            (Machine.machine_class, machine_class),
            (board.c.profile, profile),
            (board.c.rung, rung),
            (Machine.name, machine),
        ):
            if value is not None:
                query = query.where(column == _clean(value))
        group = (Machine.machine_class, board.c.profile, board.c.rung)
        best = board.c.best if self.study.sign > 0 else board.c.best.desc()
        if order == "group":
            rank = func.row_number().over(partition_by=group, order_by=(best.nulls_last(), Machine.name))
            ordered = query.add_columns(rank.label("rank")).order_by(*group, best.nulls_last(), Machine.name)
        else:
            ordered = query.order_by(board.c.gain_sigmas.desc().nulls_last(), Machine.name, *group[1:])
        limit = min(limit, LISTED)
        with self.read() as connection:
            rows = connection.execute(ordered.offset(after).limit(limit + 1)).all()
        page = rows[:limit]
        return wire.Leaderboard(
            campaign=self.study.name,
            metric=self.study.metric,
            direction=self.study.direction,
            order=order,
            standings=tuple(
                self._standing_view(row, row.rank if order == "group" else after + index)
                for index, row in enumerate(page, 1)
            ),
            next=after + limit if len(rows) > len(page) else None,
        )

    def _standing_view(self, row: Row[Any], rank: int) -> wire.Standing:
        gain = None if row.baseline is None or row.best is None else self.study.sign * (row.baseline - row.best)
        return wire.Standing(
            rank=rank,
            machine=row.name,
            machine_class=row.machine_class,
            profile=row.profile,
            rung=row.rung,
            best=row.best,
            baseline=row.baseline,
            gain=gain,
            sigma=row.sigma,
            gain_sigmas=row.gain_sigmas,
            runs=row.runs,
            confirmed=row.confirmed,
            suspects=row.suspects,
            experiments=row.experiments,
            keeps=row.keeps,
            lineage=row.keeps,
            commit=row.kept,
            experiment=row.experiment,
            description=row.description or "",
        )

    def experiments(
        self,
        *,
        machine: str | None = None,
        machine_class: str | None = None,
        status: Sequence[str] = (),
        profile: str | None = None,
        rung: str | None = None,
        kind: str | None = None,
        idea: UUID | None = None,
        suspect: bool | None = None,
        after: int | None = None,
        limit: int = 100,
        oldest_first: bool = False,
    ) -> wire.ExperimentPage:
        """Newest first by default; `after` is the last position of the page before."""
        query = select(Experiment.__table__, Machine.name, Machine.machine_class).join(Machine)
        if machine is not None:
            query = query.where(Experiment.machine_id == self.member(machine).id)
        if machine_class is not None:
            ids = [member.id for member in self._ids.values() if member.machine_class == machine_class]
            query = query.where(Experiment.machine_id.in_(ids))
        if status:
            of_any: ColumnElement[str] = Experiment.status.expression
            if len(status) > 1 and self.engine.dialect.name == "sqlite":
                of_any = literal_column("+experiments.status")  # else it sorts all of them: 460 ms of 200,000, not 3
            query = query.where(of_any.in_(status))
        for column, value in (
            (Experiment.profile, profile),
            (Experiment.rung, rung),
            (Experiment.kind, kind),
            (Experiment.idea, idea),
            (Experiment.suspect, suspect),
        ):
            if value is not None:
                query = query.where(column == _clean(value))
        if after is not None:
            query = query.where(Experiment.position > after if oldest_first else Experiment.position < after)
        limit = min(limit, LISTED)
        by = Experiment.position if oldest_first else Experiment.position.desc()
        with self.read() as connection:
            rows = connection.execute(query.order_by(by).limit(limit + 1)).all()
        page = rows[:limit]
        return wire.ExperimentPage(
            experiments=tuple(wire.ExperimentRow.model_validate(_row(row)) for row in page),
            next=page[-1].position if len(rows) > limit else None,
        )

    def find(self, identity: str) -> UUID:
        """An experiment by its id, the beginning of it, or of its commit. Raises NotFound, or Conflict for several."""
        text = identity.lower()
        if re.fullmatch(r"[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}", text):
            return UUID(text)
        if not re.fullmatch(r"([0-9a-f]-?){4,40}", text):
            raise NotFound(f"no experiment {identity!r}: give its id, or 4 characters or more of it or of its commit")
        low = text.replace("-", "")
        commits = (Experiment.tested, Experiment.kept)
        ways = [column.between(low, low + "g") for column in commits]
        # A log from elsewhere has abbreviated commits.
        ways += [column.in_([low[:length] for length in range(7, len(low))]) for column in commits if len(low) > 7]
        if len(low) <= 32:
            ways.append(Experiment.id.between(UUID(low.ljust(32, "0")), UUID(low.ljust(32, "f"))))
        with self.read() as connection:  # one query a way: each has an index
            found: set[UUID] = set()
            for way in ways:
                found.update(connection.execute(select(Experiment.id).where(way).limit(2)).scalars())
        if not found:
            raise NotFound(f"no experiment {identity!r}")
        if len(found) > 1:
            raise Conflict(f"{identity!r} is the beginning of several experiments; give more of it")
        return found.pop()

    def experiment(self, identity: UUID) -> wire.ExperimentView:
        """Raises NotFound."""
        query = (
            select(Experiment.__table__, Machine.name, Machine.machine_class)
            .join(Machine)
            .where(Experiment.id == identity)
        )
        with self.read() as connection:
            row = connection.execute(query).first()
            if row is None:
                raise NotFound(f"no experiment {identity}")
            detail = connection.execute(select(Detail.__table__).where(Detail.position == row.position)).one()
            runs = connection.execute(
                select(Run.__table__).where(Run.position == row.position).order_by(Run.number)
            ).all()
        return wire.ExperimentView.model_validate(
            {
                **_row(row),
                "fingerprint": detail.fingerprint,
                "code_state": detail.code_state,
                "nodes_added": detail.nodes_added,
                "digest": detail.digest,
                "edits": detail.edits,
                "params": detail.params,
                "log_tail": _unpacked(detail.log_tail) or "",
                "has_diff": detail.diff is not None,
                "run_reports": [{**run._mapping, "digest": detail.digest} for run in runs],
            }
        )

    def diff(self, identity: UUID) -> str:
        """The patch of its mutable files, '' where nothing changed. Raises NotFound."""
        query = select(Detail.diff).join(Experiment, Experiment.position == Detail.position)
        with self.read() as connection:
            row = connection.execute(query.where(Experiment.id == identity)).first()
        if row is None:
            raise NotFound(f"no experiment {identity}")
        return _unpacked(row.diff) or ""

    def lineage(self, commit: str, limit: int = LISTED) -> list[wire.LineageStep]:
        """From a kept commit (or the beginning of one) back to the base, newest first. Raises NotFound for a commit
        that no machine kept, Conflict for the beginning of several."""
        steps: list[wire.LineageStep] = []
        kept, machine, limit = Experiment.kept, None, min(limit, LISTED)
        with self.read() as connection:
            begun = select(kept).where(kept.between(_clean(commit), _clean(commit) + "g")).distinct().limit(2)
            commits = connection.execute(begun).scalars().all()
            if len(commits) > 1:
                raise Conflict(f"{commit!r} is the beginning of several commits; give more of it")
            at = commits[0] if commits else None
            while at is not None and len(steps) < limit:
                # Many machines kept the base: the one whose line this is comes first.
                query = select(Experiment.__table__, Machine.name).join(Machine).where(kept == at)
                row = connection.execute(query.order_by(Experiment.machine_id != machine, Experiment.position)).first()
                if row is None:
                    break
                steps.append(
                    wire.LineageStep(
                        commit=row.kept,
                        parent=row.parent,
                        machine=row.name,
                        experiment=row.id,
                        description=row.description,
                        score=row.score,
                    )
                )
                machine, at = row.machine_id, None if row.parent == row.kept else row.parent
        if not steps:
            raise NotFound(f"no machine kept a commit {commit!r}")
        return steps

    def ideas(self, after: int | None, limit: int) -> tuple[list[wire.IdeaView], int | None]:
        """Newest first."""
        query = select(Idea.__table__).order_by(Idea.position.desc()).limit(min(limit, LISTED) + 1)
        if after is not None:
            query = query.where(Idea.position < after)
        with self.read() as connection:
            rows = connection.execute(query).all()
        page = rows[: min(limit, LISTED)]
        views = [
            wire.IdeaView(
                id=row.id,
                fingerprint=row.fingerprint,
                description=row.description,
                machine=self._ids[row.machine_id].name,
                tried=row.tried,
                kept=row.kept,
            )
            for row in page
        ]
        return views, page[-1].position if len(rows) > len(page) else None

    def events(self, after: int, limit: int) -> list[wire.Event]:
        query = select(tables.Event.__table__).where(tables.Event.position > after)
        with self.read() as connection:
            rows = connection.execute(query.order_by(tables.Event.position).limit(limit)).all()
        return [wire.Event.model_validate(dict(row._mapping)) for row in rows]

    def export(self, size: int = 5000) -> Iterator[list[dict[str, Any]]]:
        """Every experiment, oldest first, in chunks; details included, logs not."""
        query: Select[Any] = (
            select(
                Experiment.__table__,
                Machine.name,
                Machine.machine_class,
                Detail.fingerprint,
                Detail.code_state,
                Detail.nodes_added,
                Detail.digest,
                Detail.edits,
                Detail.diff,
            )
            .join(Machine)
            .join(Detail, Detail.position == Experiment.position)
        )
        after = 0
        while True:
            with self.read() as connection:
                page = query.where(Experiment.position > after).order_by(Experiment.position).limit(size)
                rows = connection.execute(page).all()
            if not rows:
                return
            after = rows[-1].position
            yield [{**_row(row), "diff": _unpacked(row.diff)} for row in rows]

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
            added = t.connection.execute(insert(Token).values(**values | {"label": _clean(values["label"])}))
            return int(added.inserted_primary_key[0])  # type: ignore[index]

        return self.writer.call(job)

    def revoke_tokens(self, where: ColumnElement[bool]) -> int:
        def job(t: Transaction) -> int:
            return t.connection.execute(
                update(Token).where(where, Token.revoked_at.is_(None)).values(revoked_at=t.at)
            ).rowcount

        return self.writer.call(job)

    # -- upkeep

    def drop_logs(self, older_than: int) -> int:
        """Removes log tails of experiments that arrived before a time."""
        old = select(Experiment.position).where(Experiment.received_at < older_than)

        def job(t: Transaction) -> int:
            gone = update(Detail).where(Detail.position.in_(old), Detail.log_tail.is_not(None))
            return t.connection.execute(gone.values(log_tail=None)).rowcount

        return self.writer.call(job)

    def totals(self) -> tuple[int, int]:
        """(experiments decided, keeps), baselines not counted; from the standings, so at no cost."""
        with self.read() as connection:
            row = connection.execute(select(func.sum(Standing.experiments), func.sum(Standing.keeps))).one()
        return int(row[0] or 0), int(row[1] or 0)


# The statements of a report, made once: building one anew and asking SQLAlchemy's cache for it is most of its cost.
_STORED = select(
    Experiment.position,
    Experiment.version,
    Experiment.machine_id,
    Experiment.suspect,
    Experiment.cleared,
    Experiment.status,
    *(getattr(Experiment, name) for name in _IDENTITY),
).where(Experiment.id == bindparam("id"))
_INSERT_EXPERIMENT = insert(table(Experiment))
_INSERT_DETAIL = insert(table(Detail))
_INSERT_RUN = insert(table(Run))
_OF_STANDING = (
    Standing.machine_id == bindparam("of_machine"),
    Standing.profile == bindparam("of_profile"),
    Standing.rung == bindparam("of_rung"),
)
_STANDING = select(Standing.__table__).where(*_OF_STANDING)
_ONE_MORE = update(table(Standing)).where(*_OF_STANDING).values(experiments=Standing.experiments + 1)


def _counting(dialect: str) -> Executable:
    """Inserts an idea, or adds to the counts of one that is known; the first report of it stays its description."""
    upsert = (postgresql if dialect == "postgresql" else sqlite).insert(table(Idea))
    more = upsert.excluded
    counts = {"tried": Idea.tried + more.tried, "kept": Idea.kept + more.kept}
    counting: Executable = upsert.on_conflict_do_update(index_elements=["id"], set_=counts)
    return counting


def _here(machine_id: int, profile: str, rung: str) -> tuple[ColumnElement[bool], ...]:
    """What one standing is about."""
    return (Experiment.machine_id == machine_id, Experiment.profile == profile, Experiment.rung == rung)


def _row(row: Row[Any]) -> dict[str, Any]:
    return {**row._mapping, "machine": row.name}


def _run_row(position: int, number: int, run: wire.RunReport) -> dict[str, Any]:
    values = run.model_dump(exclude={"digest"})
    return {**values, "position": position, "number": number, "reason": _clean(run.reason)}


def _clean(value: Any) -> Any:
    """Text that every database takes: PostgreSQL has no NUL, and nothing can encode half of a surrogate pair."""
    if isinstance(value, str):
        return value.replace("\0", "�").encode(errors="replace").decode()
    if isinstance(value, dict):
        return {_clean(key): _clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    return value


def _packed(text: str | None) -> bytes | None:
    return None if text is None else zlib.compress(text.encode(), 6)


def _unpacked(data: bytes | None) -> str | None:
    return None if data is None else zlib.decompress(data).decode()


__all__ = ["Conflict", "Impossible", "Member", "NotFound", "Sanity", "Store", "Study", "migrate"]
