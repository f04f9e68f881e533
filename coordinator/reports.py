"""Reports: checked, stored, and believed or not.

Invariants: a report is stored whole or not at all, with its runs, idea, standing, lease and event in one commit; the
same report twice changes nothing; what an experiment is (machine, number, idea, profile, rung, code) never changes. A
result beyond the study's bounds is suspect until it is confirmed (by runs that a lease asked for, never by a machine's
own word), somebody clears it, or an earlier one that now counts
puts it within them. NOT covered: who may report (service.py) and how much (api/machines.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy import Executable, Row, bindparam, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from shared import wire
from shared.wire import ExperimentReport, Kind, Status

from . import leaderboard
from .database import Conflict, Database, Impossible, NotFound, clean, packed
from .leases import Leases
from .members import Member, Members
from .standings import Group, Standings, heads, here_of
from .tables import Detail, Experiment, Idea, Run, table
from .writer import Transaction

HUGE = 1e100  #: no score, second or GiB is beyond it, so that sums and squares of them are finite
#: What an experiment is and always was; a later version of a report may not say otherwise.
_IDENTITY = ("number", "idea", "profile", "rung", "tested")

# The statements of a report, made once: building one anew and asking SQLAlchemy's cache for it is most of its cost.
_STORED = select(
    Experiment.position,
    Experiment.version,
    Experiment.machine_id,
    Experiment.suspect,
    Experiment.cleared,
    Experiment.confirmed,
    Experiment.status,
    *(getattr(Experiment, name) for name in _IDENTITY),
).where(Experiment.id == bindparam("id"))
_INSERT_EXPERIMENT = insert(table(Experiment))
_INSERT_DETAIL = insert(table(Detail))
_INSERT_RUN = insert(table(Run))


class Reports:
    """The reports of one campaign."""

    def __init__(self, database: Database, members: Members, leases: Leases, standings: Standings) -> None:
        self._database, self._members, self._leases, self._standings = database, members, leases, standings
        self._count = _counting(database.engine.dialect.name)
        with database.read() as connection:
            self._last = connection.execute(select(func.max(Experiment.position))).scalar() or 0

    def job(self, machine: Member, identity: UUID, report: ExperimentReport) -> Callable[[Transaction], wire.Accepted]:
        """The job that stores a report. Raises Impossible, here, for one that cannot be true."""
        self._check(report)
        return partial(self._store, machine=machine, identity=identity, report=report)

    def known(self, machine: Member) -> dict[UUID, int]:
        """The version of each of its experiments that is stored: what it need not send again."""
        with self._database.read() as connection:
            query = select(Experiment.id, Experiment.version).where(Experiment.machine_id == machine.id)
            return {row.id: row.version for row in connection.execute(query)}

    def clear(self, identity: UUID) -> None:
        """Believes a suspect result, and looks anew at the later ones of its machine that were held against it."""

        def job(t: Transaction) -> None:
            row = t.connection.execute(select(Experiment.__table__).where(Experiment.id == identity)).first()
            if row is None:
                raise NotFound(f"no experiment {identity}")
            t.connection.execute(
                update(Experiment).where(Experiment.position == row.position).values(suspect=False, cleared=True)
            )
            group = (row.machine_id, row.profile, row.rung)
            self._believe_later(t, group, row.number)
            self._standings.renew(t.connection, group)
            t.event("cleared", self._members.by_id(row.machine_id).name, id=str(identity))

        self._database.writer.call(job)

    # -- checking

    def _check(self, report: ExperimentReport) -> None:
        study = self._database.study
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

    # -- storing

    def _store(self, t: Transaction, machine: Member, identity: UUID, report: ExperimentReport) -> wire.Accepted:
        stored = self._stored(t, machine, identity, report)
        closed = self._leases.close(t, machine, identity, report.lease)
        if stored is not None and stored.version >= report.version:
            return wire.Accepted(stored=False, suspect=stored.suspect, closed=closed is not None)
        before = stored.status if stored is not None else None
        group = (machine.id, report.profile, report.rung)
        standing = self._standings.of(t.connection, group)
        confirms = closed is not None and (closed.kind, closed.experiment) == (Kind.CONFIRM, identity)
        confirmed = (stored is not None and stored.confirmed) or (confirms and self._agrees(report, standing))
        values = self._values(report, stored, standing.best if standing is not None else None, confirmed)
        suspect: bool = values["suspect"]
        if stored is None:
            position = self._insert(t, machine, identity, report, values)
        else:
            position = stored.position
            t.connection.execute(update(Experiment).where(Experiment.position == position).values(**values))
            t.flush()  # the runs may be from a job of the same commit
            t.connection.execute(delete(Run).where(Run.position == position))
        for number, run in enumerate(report.runs):
            t.later(_INSERT_RUN, _run_row(position, number, run))
        self._count_idea(t, machine, report, position, before)
        _tell(t, machine, identity, report, stored is None, suspect, confirmed)
        counts = not suspect and (stored is None or stored.suspect)
        others = standing is not None and standing.suspects > 0 and counts
        others = others and self._believe_later(t, group, report.number)
        self._standings.reported(t, machine, report, standing, before, suspect, others)
        return wire.Accepted(stored=True, suspect=suspect, closed=closed is not None)

    def _agrees(self, report: ExperimentReport, standing: Row[Any] | None) -> bool:
        """Whether the runs of a confirmation bear the first one out."""
        scores = [run.score for run in report.runs if run.score is not None]
        if standing is None or not standing.sigma or report.score is None or len(scores) < 2:
            return False
        return leaderboard.agrees(scores, standing.sigma, self._database.study.sign)

    @staticmethod
    def _stored(t: Transaction, machine: Member, identity: UUID, report: ExperimentReport) -> Row[Any] | None:
        """What is there of this experiment. Raises Conflict where the report speaks of another one."""
        stored = t.connection.execute(_STORED, {"id": identity}).first()
        if stored is not None and stored.machine_id != machine.id:
            raise Conflict(f"experiment {identity} belongs to another machine")
        for name in _IDENTITY if stored is not None else ():
            if getattr(stored, name) != getattr(report, name):
                raise Conflict(f"experiment {identity} was reported with another {name} before")
        return stored

    def _values(
        self, report: ExperimentReport, stored: Row[Any] | None, level: float | None, confirmed: bool
    ) -> dict[str, Any]:
        """What a version of a report sets. `level`: of HEAD, before it."""
        mean, squares = leaderboard.spread([run.score for run in report.runs if run.score is not None])
        cleared = confirmed or (stored is not None and stored.cleared)
        suspect = not cleared and (
            (stored is not None and stored.suspect) or self._beyond(report.score, level) or self._beyond(mean, level)
        )
        return {
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
            "reason": clean(report.reason),
            "confirmed": confirmed,
            "suspect": suspect,
            "cleared": cleared,
            "pruned": report.pruned,
            "decided_at": report.decided_at,
        }

    def _insert(
        self, t: Transaction, machine: Member, identity: UUID, report: ExperimentReport, values: dict[str, Any]
    ) -> int:
        self._last += 1  # only the writer's thread comes here; a gap after a failed commit does no harm
        position = self._last
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
            "description": clean(report.description),
            "proposer": clean(report.proposer),
            "received_at": t.at,
            **values,
        }
        t.connection.execute(_INSERT_EXPERIMENT, experiment)
        t.later(_INSERT_DETAIL, _detail_row(position, report))
        return position

    def _count_idea(
        self, t: Transaction, machine: Member, report: ExperimentReport, position: int, before: str | None
    ) -> None:
        kept = (report.status is Status.KEEP) - (before == Status.KEEP)
        tried = int(before is None)
        if kept or tried:
            idea = {
                "id": report.idea,
                "fingerprint": clean(report.fingerprint),
                "description": clean(report.description),
                "machine_id": machine.id,
                "position": position,
                "tried": tried,
                "kept": kept,
            }
            t.later(self._count, idea)

    # -- suspects

    def _believe_later(self, t: Transaction, group: Group, number: int) -> bool:
        """Looks again at the suspects after a result that now counts: they were held against an older HEAD. Whether
        one of them counts now too."""
        found = False
        here = here_of(group)
        later = t.connection.execute(
            select(Experiment.position, Experiment.number, Experiment.score, Experiment.mean)
            .where(*here, Experiment.suspect, Experiment.number > number)
            .order_by(Experiment.number, Experiment.position)
        ).all()
        for other in later:
            level = t.connection.execute(heads((*here, Experiment.number < other.number), Experiment.mean)).scalar()
            if not self._beyond(other.score, level) and not self._beyond(other.mean, level):
                t.connection.execute(
                    update(Experiment).where(Experiment.position == other.position).values(suspect=False)
                )
                found = True
        return found

    def _beyond(self, score: float | None, level: float | None) -> bool:
        """Whether a score is better than the sanity bounds allow, HEAD being at `level`."""
        study = self._database.study
        sanity, sign = study.sanity, study.sign
        if score is None:
            return False
        if sanity.best_possible is not None and sign * (sanity.best_possible - score) > 0:
            return True
        return bool(
            sanity.largest_step is not None and level is not None and sign * (level - score) > sanity.largest_step
        )


def _tell(
    t: Transaction,
    machine: Member,
    identity: UUID,
    report: ExperimentReport,
    new: bool,
    suspect: bool,
    confirmed: bool,
) -> None:
    t.event(
        "experiment" if new else "revised",
        machine.name,
        id=str(identity),
        number=report.number,
        kind=report.kind,
        status=report.status,
        score=report.score,
        description=clean(report.description),
        profile=report.profile,
        rung=report.rung,
        suspect=suspect,
        confirmed=confirmed,
    )


def _detail_row(position: int, report: ExperimentReport) -> dict[str, Any]:
    return {
        "position": position,
        "fingerprint": clean(report.fingerprint),
        "code_state": clean(report.code_state),
        "nodes_added": report.nodes_added,
        "digest": next((clean(run.digest) for run in report.runs if run.digest), None),
        "edits": clean(report.edits),
        "params": clean(report.params),
        "diff": packed(report.diff),
        "log_tail": packed(report.log_tail or None),
    }


def _run_row(position: int, number: int, run: wire.RunReport) -> dict[str, Any]:
    values = run.model_dump(exclude={"digest"})
    return {**values, "position": position, "number": number, "reason": clean(run.reason)}


def _counting(dialect: str) -> Executable:
    """Inserts an idea, or adds to the counts of one that is known; the first report of it stays its description."""
    upsert = (postgresql if dialect == "postgresql" else sqlite).insert(table(Idea))
    more = upsert.excluded
    counts = {"tried": Idea.tried + more.tried, "kept": Idea.kept + more.kept}
    counting: Executable = upsert.on_conflict_do_update(index_elements=["id"], set_=counts)
    return counting
