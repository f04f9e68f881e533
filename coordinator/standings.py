"""Standings: each machine's baseline, HEAD, noise and counts, by profile and rung; the leaderboard's cache.

Invariants: `standings` always equals what `rebuild` would make of the experiments, to the last bit of a float; a
suspect counts for nothing. They change in the transaction of the report that changes them. NOT covered: what the
numbers mean (leaderboard.py), and which results are suspect (reports.py).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal_column,
    select,
    update,
)

from shared.wire import ExperimentReport, Status

from . import leaderboard
from .database import Database
from .members import Member
from .tables import Experiment, Machine, Standing, table
from .writer import Transaction

Group = tuple[int, str, str]  #: machine, profile and rung: what one standing is about

# A report's statements, made once: building one anew and asking SQLAlchemy's cache for it is most of its cost.
_OF_STANDING = (
    Standing.machine_id == bindparam("of_machine"),
    Standing.profile == bindparam("of_profile"),
    Standing.rung == bindparam("of_rung"),
)
_STANDING = select(Standing.__table__).where(*_OF_STANDING)
_ONE_MORE = update(table(Standing)).where(*_OF_STANDING).values(experiments=Standing.experiments + 1)


class Standings:
    """The standings of one campaign."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @staticmethod
    def of(connection: Connection, group: Group) -> Row[Any] | None:
        return connection.execute(_STANDING, _where(group)).first()

    def reported(
        self,
        t: Transaction,
        machine: Member,
        report: ExperimentReport,
        standing: Row[Any] | None,
        before: str | None,
        suspect: bool,
        others: bool,
    ) -> None:
        """Counts by one; levels from the few rows that they depend on, where this report can have changed them.
        `standing` and `before` (the experiment's status, if it was stored) are from before this report. `others`:
        it changed what is believed of other experiments."""
        group = (machine.id, report.profile, report.rung)
        new = before is None and report.number > 0
        alone = report.status is not Status.KEEP and len(report.runs) < 2 and not suspect and not others
        if standing is not None and new and alone:
            # The common case, a discard: neither HEAD nor baseline nor a rerun, so it moves one number.
            t.connection.execute(_ONE_MORE, _where(group))
            return
        kept = report.number > 0 and (report.status is Status.KEEP) - (before == Status.KEEP)
        values = self._levels(t.connection, group)
        values["experiments"] = (standing.experiments if standing is not None else 0) + int(new)
        values["keeps"] = (standing.keeps if standing is not None else 0) + int(kept)
        self._put(t.connection, group, values, standing is None)
        best, was = values["best"], standing.best if standing is not None else None
        if best is not None and was is not None and self._database.study.sign * (was - best) > 0:
            t.event("best", machine.name, score=best, was=was, profile=report.profile, rung=report.rung)

    def renew(self, connection: Connection, group: Group) -> None:
        """The levels of one that is there; what it counts stays."""
        self._put(connection, group, self._levels(connection, group), False)

    def renew_all(self, connection: Connection, machine_id: int) -> None:
        """Of all that a machine has."""
        query = select(Standing.profile, Standing.rung).where(Standing.machine_id == machine_id)
        for row in connection.execute(query).all():
            self.renew(connection, (machine_id, row.profile, row.rung))

    def rebuild(self) -> None:
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
            for row in groups:
                group = (row.machine_id, row.profile, row.rung)
                values = self._levels(t.connection, group)
                values |= {"experiments": row.experiments, "keeps": row.keeps}
                self._put(t.connection, group, values, True)

        self._database.writer.call(job)

    def _levels(self, connection: Connection, group: Group) -> dict[str, Any]:
        """Baseline, HEAD and noise of one machine; all but the counts of a standing. Suspects count for nothing."""
        sign, here = self._database.study.sign, here_of(group)
        columns = (Experiment.position, Experiment.score, Experiment.mean, Experiment.scored, Experiment.confirmed)
        # Scored: a baseline that failed, on a machine that has been mended since, is no level.
        firsts = select(*columns).where(
            *here, ~Experiment.suspect, Experiment.number == 0, Experiment.mean.is_not(None)
        )
        first = connection.execute(firsts.order_by(Experiment.position).limit(1)).first()
        head = connection.execute(heads(here, *columns)).first()
        baseline = first.mean if first is not None else None
        best = head.mean if head is not None else None
        first_score = first.score if first is not None else None  # the machine's own prior goes by its first run
        sigma, suspects = self._noise(connection, group[0], here, first_score)
        gain = None if baseline is None or best is None else sign * (baseline - best)
        return {
            "baseline": baseline,
            "best": best,
            "sigma": sigma,
            "gain_sigmas": None if gain is None or not sigma else gain / sigma,
            "runs": head.scored if head is not None else 0,
            "confirmed": bool(head is not None and head.confirmed),
            "suspects": suspects,
            "head": head.position if head is not None else None,
        }

    def _noise(
        self, connection: Connection, machine_id: int, here: tuple[ColumnElement[bool], ...], first: float | None
    ) -> tuple[float, int]:
        """(sigma, suspects): the noise of a machine's reruns, and how many of its results are not believed."""
        # In one order: sums of the same floats must be the same float, whichever way the database finds them.
        reruns = (
            select(Experiment.squares, Experiment.scored)
            .where(*here, ~Experiment.suspect, Experiment.scored > literal_column("1"))
            .order_by(Experiment.position)
            .subquery()
        )
        noise = connection.execute(select(func.sum(reruns.c.squares), func.sum(reruns.c.scored - 1))).one()
        suspects = select(func.count()).where(*here, Experiment.suspect).scalar_subquery().label("suspects")
        machine = connection.execute(select(Machine.machine_class, suspects).where(Machine.id == machine_id)).one()
        metric = self._database.study.metric
        sigma = leaderboard.noise_floor(metric, machine.machine_class, first, noise[0] or 0.0, int(noise[1] or 0))
        return sigma, machine.suspects

    @staticmethod
    def _put(connection: Connection, group: Group, values: dict[str, Any], new: bool) -> None:
        names = dict(zip(("machine_id", "profile", "rung"), group, strict=True))
        if new:
            connection.execute(insert(Standing), {**names, **values})
        else:
            row = update(Standing).where(*(getattr(Standing, name) == value for name, value in names.items()))
            connection.execute(row, values)


def here_of(group: Group) -> tuple[ColumnElement[bool], ...]:
    """The experiments that one standing is about."""
    machine_id, profile, rung = group
    return (Experiment.machine_id == machine_id, Experiment.profile == profile, Experiment.rung == rung)


def heads(here: tuple[ColumnElement[bool], ...], *columns: Any) -> Select[Any]:
    """The last keep that is believed."""
    kept = Experiment.status == literal_column("'keep'")  # no parameter: the partial index has the word
    keeps = select(*columns).where(*here, kept, ~Experiment.suspect)
    return keeps.order_by(Experiment.number.desc(), Experiment.position.desc()).limit(1)


def _where(group: Group) -> dict[str, Any]:
    return dict(zip(("of_machine", "of_profile", "of_rung"), group, strict=True))
