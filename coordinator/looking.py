"""Looking: every question that people and machines ask of the results. Nothing here writes.

Invariants: no page has more than LISTED rows; pages of experiments and ideas neither repeat nor miss a row while others
arrive; text that no database takes finds nothing. NOT covered: a leaderboard that changes between two of its pages; how
answers are written (api/experiments.py, leaderboard.py); who may look.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Row, Select, func, literal_column, select

from shared import wire

from .database import LISTED, Conflict, Database, NotFound, clean, unpacked
from .members import Members
from .tables import Detail, Event, Experiment, Idea, Machine, Run, Standing


class Looking:
    """The results of one campaign, read."""

    def __init__(self, database: Database, members: Members) -> None:
        self._database, self._members = database, members

    # -- standings

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
        study, board = self._database.study, Standing.__table__
        query = _where(
            _board(),
            (Machine.machine_class, machine_class),
            (board.c.profile, profile),
            (board.c.rung, rung),
            (Machine.name, machine),
        )
        group = (Machine.machine_class, board.c.profile, board.c.rung)
        if order == "group":
            best = (board.c.best if study.sign > 0 else board.c.best.desc()).nulls_last()
            rank = func.row_number().over(partition_by=group, order_by=(best, Machine.name))
            ordered = query.add_columns(rank.label("rank")).order_by(*group, best, Machine.name)
        else:
            ordered = query.order_by(board.c.gain_sigmas.desc().nulls_last(), Machine.name, *group[1:])
        limit = min(limit, LISTED)
        with self._database.read() as connection:
            rows = connection.execute(ordered.offset(after).limit(limit + 1)).all()
        page = rows[:limit]
        ranked = [(row, row.rank if order == "group" else place) for place, row in enumerate(page, after + 1)]
        return wire.Leaderboard(
            campaign=study.name,
            metric=study.metric,
            direction=study.direction,
            order=order,
            standings=tuple(_standing_view(row, rank, study.sign) for row, rank in ranked),
            next=after + limit if len(rows) > len(page) else None,
        )

    def totals(self) -> tuple[int, int]:
        """(experiments decided, keeps), baselines not counted; from the standings, so at no cost."""
        with self._database.read() as connection:
            row = connection.execute(select(func.sum(Standing.experiments), func.sum(Standing.keeps))).one()
        return int(row[0] or 0), int(row[1] or 0)

    # -- experiments

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
        query = _where(
            select(Experiment.__table__, Machine.name, Machine.machine_class).join(Machine),
            (Experiment.machine_id, None if machine is None else self._members.named(machine).id),
            (Experiment.profile, profile),
            (Experiment.rung, rung),
            (Experiment.kind, kind),
            (Experiment.idea, idea),
            (Experiment.suspect, suspect),
        )
        if machine_class is not None:
            ids = [member.id for member in self._members.all() if member.machine_class == machine_class]
            query = query.where(Experiment.machine_id.in_(ids))
        if status:
            query = query.where(self._status_in(status))
        if after is not None:
            query = query.where(Experiment.position > after if oldest_first else Experiment.position < after)
        limit = min(limit, LISTED)
        by = Experiment.position if oldest_first else Experiment.position.desc()
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(by).limit(limit + 1)).all()
        page = rows[:limit]
        return wire.ExperimentPage(
            experiments=tuple(wire.ExperimentRow.model_validate(_row(row)) for row in page),
            next=page[-1].position if len(rows) > limit else None,
        )

    def _status_in(self, status: Sequence[str]) -> ColumnElement[bool]:
        of_any: ColumnElement[str] = Experiment.status.expression
        if len(status) > 1 and self._database.engine.dialect.name == "sqlite":
            of_any = literal_column("+experiments.status")  # else it sorts all of them: 460 ms of 200,000, not 3
        return of_any.in_(status)

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
        with self._database.read() as connection:  # one query a way: each has an index
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
        with self._database.read() as connection:
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
                "log_tail": unpacked(detail.log_tail) or "",
                "has_diff": detail.diff is not None,
                "run_reports": [{**run._mapping, "digest": detail.digest} for run in runs],
            }
        )

    def diff(self, identity: UUID) -> str:
        """The patch of its mutable files, '' where nothing changed. Raises NotFound."""
        query = select(Detail.diff).join(Experiment, Experiment.position == Detail.position)
        with self._database.read() as connection:
            row = connection.execute(query.where(Experiment.id == identity)).first()
        if row is None:
            raise NotFound(f"no experiment {identity}")
        return unpacked(row.diff) or ""

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
            with self._database.read() as connection:
                page = query.where(Experiment.position > after).order_by(Experiment.position).limit(size)
                rows = connection.execute(page).all()
            if not rows:
                return
            after = rows[-1].position
            yield [{**_row(row), "diff": unpacked(row.diff)} for row in rows]

    # -- commits, ideas, events

    def lineage(self, commit: str, limit: int = LISTED) -> list[wire.LineageStep]:
        """From a kept commit (or the beginning of one) back to the base, newest first. Raises NotFound for a commit
        that no machine kept, Conflict for the beginning of several."""
        steps: list[wire.LineageStep] = []
        machine, limit = None, min(limit, LISTED)
        with self._database.read() as connection:
            at = _kept(connection, commit)
            while at is not None and len(steps) < limit:
                # Many machines kept the base: the one whose line this is comes first.
                query = select(Experiment.__table__, Machine.name).join(Machine).where(Experiment.kept == at)
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
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        page = rows[: min(limit, LISTED)]
        views = [
            wire.IdeaView(
                id=row.id,
                fingerprint=row.fingerprint,
                description=row.description,
                machine=self._members.by_id(row.machine_id).name,
                tried=row.tried,
                kept=row.kept,
            )
            for row in page
        ]
        return views, page[-1].position if len(rows) > len(page) else None

    def events(self, after: int, limit: int) -> list[wire.Event]:
        query = select(Event.__table__).where(Event.position > after)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(Event.position).limit(limit)).all()
        return [wire.Event.model_validate(dict(row._mapping)) for row in rows]


def _where(query: Select[Any], *wanted: tuple[Any, Any]) -> Select[Any]:
    """The rows in which each column has its value; None asks for nothing."""
    for column, value in wanted:
        if value is not None:
            query = query.where(column == clean(value))
    return query


def _board() -> Select[Any]:
    """Every standing, with its machine and what HEAD is."""
    board, head = Standing.__table__, Experiment.__table__
    columns = (Machine.name, Machine.machine_class, head.c.kept, head.c.id.label("experiment"), head.c.description)
    return (
        select(*board.c, *columns)
        .join(Machine, Machine.id == board.c.machine_id)
        .outerjoin(head, head.c.position == board.c.head)
    )


def _standing_view(row: Row[Any], rank: int, sign: int) -> wire.Standing:
    gain = None if row.baseline is None or row.best is None else sign * (row.baseline - row.best)
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


def _kept(connection: Connection, beginning: str) -> str | None:
    """The kept commit that begins so. Raises Conflict for several."""
    kept, low = Experiment.kept, clean(beginning)
    commits = connection.execute(select(kept).where(kept.between(low, low + "g")).distinct().limit(2)).scalars().all()
    if len(commits) > 1:
        raise Conflict(f"{beginning!r} is the beginning of several commits; give more of it")
    return commits[0] if commits else None


def _row(row: Row[Any]) -> dict[str, Any]:
    return {**row._mapping, "machine": row.name}
