"""Studies, machines and reports for tests of the coordinator: small, and each by name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

from coordinator.database import Conflict, Sanity, Study
from coordinator.members import Member
from coordinator.store import Store
from shared import wire
from shared.wire import Accepted, ExperimentReport, Kind, LeaseOrder, LeaseRef, Registration, RunReport, Status

PREFIX = "autoresearch"


def commit(of: object) -> str:
    return hashlib.sha1(str(of).encode()).hexdigest()


BASE = commit("base")


def study(**other: Any) -> Study:
    facts: dict[str, Any] = {
        "name": "fast",
        "tag": "t",
        "metric": "loss",
        "direction": "minimize",
        "profile": "default",
        "base": BASE,
        "digest": None,
        "sanity": Sanity(),
    }
    return Study(**facts | other)


def opened(url: str, **other: Any) -> Store:
    """A store with its study begun."""
    store = Store(url)
    store.begin(study(**other))
    return store


def registration(name: str = "m1", uid: UUID | None = None, **other: Any) -> Registration:
    facts = {"version": "0.1.0", "machine_class": "cpu", "can": tuple(Kind)} | other
    return Registration(uid=uid or uuid4(), name=name, **facts)


def run(score: float | None, **other: Any) -> RunReport:
    status = None if score is not None else Status.CRASH
    facts: dict[str, Any] = {"id": uuid4(), "seed": 7, "score": score, "status": status, "seconds": 2.0}
    return RunReport(**facts | other)


def report(
    number: int = 1, scores: Sequence[float | None] = (1.0,), status: Status = Status.KEEP, **other: Any
) -> ExperimentReport:
    tested = other.get("tested", commit(uuid4()))
    facts: dict[str, Any] = {
        "version": 1,
        "number": number,
        "idea": uuid4(),
        "tested": tested,
        "parent": BASE,
        "kept": commit(f"kept {tested}") if status is Status.KEEP else None,
        "description": f"idea {number}",
        "status": status,
        "decided_at": 1_790_000_000 + number,
        "runs": tuple(run(score) for score in scores),
    }
    return ExperimentReport(**facts | other)


def revised(report: ExperimentReport, **other: Any) -> ExperimentReport:
    """The same experiment, one version on."""
    facts = {"version": report.version + 1, **other}
    if "scores" in facts:
        facts["runs"] = tuple(run(score) for score in facts.pop("scores"))
    return report.model_copy(update=facts)


@dataclass
class Machine:
    """A registered machine that reports."""

    store: Store
    member: Member
    number: int = 0
    head: str = BASE
    reports: dict[UUID, ExperimentReport] = field(default_factory=dict)  #: the latest of each

    @property
    def name(self) -> str:
        return self.member.name

    def send(self, identity: UUID, report: ExperimentReport) -> Accepted:
        self.reports[identity] = report
        return self.store.writer.call(self.store.reports.job(self.member, identity, report))

    def tries(self, *scores: float | None, status: Status = Status.KEEP, **other: Any) -> UUID:
        """Reports its next experiment; the first one is the baseline."""
        identity = uuid4()
        made = report(self.number, scores, status, **{"parent": self.head, **other})
        if self.number == 0 and "kept" not in other:
            made = made.model_copy(update={"tested": BASE, "parent": BASE, "kept": BASE, "description": "baseline"})
        self.number += 1
        self.head = made.kept or self.head
        self.send(identity, made)
        return identity

    def again(self, identity: UUID, **other: Any) -> Accepted:
        """Reports an experiment once more, one version on."""
        return self.send(identity, revised(self.reports[identity], **other))

    def asked(self, identity: UUID) -> LeaseRef | None:
        """Is asked to confirm an experiment; None where it may not be."""
        try:
            self.store.leases.queue(order(identity, Kind.CONFIRM))
        except Conflict:
            return None
        granted = self.store.leases.grant(self.member)
        return LeaseRef(id=granted[0].id, attempt=granted[0].attempt) if granted else None

    def confirms(self, identity: UUID, *scores: float | None) -> Accepted:
        """Reports an experiment with the runs that it was asked for."""
        reference = self.asked(identity)
        assert reference is not None
        return self.again(identity, scores=scores, lease=reference)

    def leased(self, reference: LeaseRef) -> tuple[UUID, Accepted]:
        """Reports an experiment that a lease was for."""
        identity = uuid4()
        self.number += 1
        made = report(self.number, (1.0,), Status.DISCARD, lease=reference)
        return identity, self.send(identity, made)


def machine(store: Store, name: str = "m1", **other: Any) -> Machine:
    return Machine(store, store.register(registration(name, **other), PREFIX))


def order(experiment: UUID, kind: Kind = Kind.REPLAY, machine: str | None = None) -> LeaseOrder:
    return LeaseOrder(kind=kind, experiment=experiment, machine=machine)


def standings(store: Store) -> list[dict[str, Any]]:
    """The cache, row by row."""
    from coordinator.tables import Standing

    columns = Standing.__table__
    with store.read() as connection:
        rows = connection.execute(columns.select().order_by(*columns.primary_key.columns)).all()
    return [dict(row._mapping) for row in rows]


def row(store: Store, name: str = "m1", **where: Any) -> wire.Standing:
    """A machine's only line of the leaderboard."""
    (only,) = store.look.leaderboard("group", machine=name, **where).standings
    return only
