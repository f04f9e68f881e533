"""The database, table by table. Queries: store.py and what it is made of. Changes of schema: migrations/.

Times are unix seconds of the coordinator's clock, but for `decided_at`, which is the machine's.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast
from uuid import UUID

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, LargeBinary, MetaData, String, Table, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
_Big = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts in 64 bits anyway, and only Integer is its row id


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=_NAMES)
    type_annotation_map: ClassVar[dict[Any, Any]] = {dict[str, Any]: JSON, list[str]: JSON, int: _Big}


def table(entity: type[Base]) -> Table:
    """The table itself: statements over it skip what only the ORM needs."""
    return cast(Table, entity.__table__)


class Campaign(Base):
    """The study that this database belongs to; one row."""

    __tablename__ = "campaign"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    tag: Mapped[str] = mapped_column(String(63))
    metric: Mapped[str] = mapped_column(String(200))
    direction: Mapped[str] = mapped_column(String(8))
    profile: Mapped[str] = mapped_column(String(63))
    base: Mapped[str] = mapped_column(String(40))
    digest: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[int]


class Machine(Base):
    __tablename__ = "machines"
    id: Mapped[int] = mapped_column(primary_key=True)
    uid: Mapped[UUID] = mapped_column(unique=True)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    branch: Mapped[str] = mapped_column(String(200))  #: set at registration; a new name does not move it
    attic: Mapped[str] = mapped_column(String(200))
    machine_class: Mapped[str] = mapped_column(String(63))
    backend: Mapped[str] = mapped_column(String(8))
    hardware: Mapped[dict[str, Any]]
    can: Mapped[list[str]]
    version: Mapped[str] = mapped_column(String(63))
    incarnation: Mapped[int]
    state: Mapped[str] = mapped_column(String(8))
    paused: Mapped[bool]
    registered_at: Mapped[int]


class Token(Base):
    """Only the hash of a token is stored."""

    __tablename__ = "tokens"
    id: Mapped[int] = mapped_column(primary_key=True)
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(8))
    label: Mapped[str] = mapped_column(String(100))
    machine_id: Mapped[int | None] = mapped_column(ForeignKey("machines.id"))
    created_at: Mapped[int]
    expires_at: Mapped[int | None]
    revoked_at: Mapped[int | None]


class Idea(Base):
    """A hypothesis with its edits; replays inherit it."""

    __tablename__ = "ideas"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(80))
    description: Mapped[str] = mapped_column(Text)
    machine_id: Mapped[int] = mapped_column(ForeignKey("machines.id"))
    position: Mapped[int] = mapped_column(index=True)  #: of the first experiment that tried it
    tried: Mapped[int]
    kept: Mapped[int]


class Experiment(Base):
    __tablename__ = "experiments"
    position: Mapped[int] = mapped_column(primary_key=True)  #: order of arrival
    id: Mapped[UUID] = mapped_column(unique=True)
    version: Mapped[int]  #: of the report that is stored
    machine_id: Mapped[int] = mapped_column(ForeignKey("machines.id"))
    number: Mapped[int]
    kind: Mapped[str] = mapped_column(String(8))
    idea: Mapped[UUID] = mapped_column(index=True)
    profile: Mapped[str] = mapped_column(String(63))
    rung: Mapped[str] = mapped_column(String(63))
    status: Mapped[str] = mapped_column(String(8))
    score: Mapped[float | None]  #: that it was decided on
    mean: Mapped[float | None]  #: of all runs with a score
    squares: Mapped[float]  #: sum of squared deviations from that mean
    scored: Mapped[int]  #: runs with a score
    runs: Mapped[int]
    memory_gb: Mapped[float]
    seconds: Mapped[float]  #: of all runs
    tested: Mapped[str] = mapped_column(String(40), index=True)
    parent: Mapped[str] = mapped_column(String(40))
    kept: Mapped[str | None] = mapped_column(String(40), index=True)
    description: Mapped[str] = mapped_column(Text)
    proposer: Mapped[str] = mapped_column(String(63))
    reason: Mapped[str] = mapped_column(Text)
    confirmed: Mapped[bool]
    suspect: Mapped[bool]
    cleared: Mapped[bool]  #: somebody looked at a suspect result and believes it
    pruned: Mapped[bool]
    decided_at: Mapped[int]
    received_at: Mapped[int]

    __table_args__ = (
        Index("ix_experiments_standing", "machine_id", "profile", "rung", "number"),
        # A condition stands as the queries have it: SQLite takes a partial index only where it finds the same words.
        Index(
            "ix_experiments_heads",
            "machine_id",
            "profile",
            "rung",
            "number",
            sqlite_where=text("status = 'keep' AND suspect = 0"),
            postgresql_where=text("status = 'keep' AND NOT suspect"),
        ),
        Index(  # in it is all that the noise floor is summed from, in the order of summing
            "ix_experiments_reruns",
            "machine_id",
            "profile",
            "rung",
            "position",
            "squares",
            "scored",
            sqlite_where=text("scored > 1 AND suspect = 0"),
            postgresql_where=text("scored > 1 AND NOT suspect"),
        ),
        Index(
            "ix_experiments_suspects",
            "machine_id",
            "profile",
            "rung",
            sqlite_where=text("suspect = 1"),
            postgresql_where=text("suspect"),
        ),
        Index("ix_experiments_machine", "machine_id", "position"),
        Index("ix_experiments_status", "status", "position"),
    )


class Detail(Base):
    """What only one experiment's own page shows; apart, so that lists stay small."""

    __tablename__ = "details"
    position: Mapped[int] = mapped_column(ForeignKey("experiments.position"), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(80))
    code_state: Mapped[str] = mapped_column(String(64))
    nodes_added: Mapped[int]
    digest: Mapped[str | None] = mapped_column(String(64))
    edits: Mapped[dict[str, Any]]
    params: Mapped[dict[str, Any]]
    diff: Mapped[bytes | None] = mapped_column(LargeBinary)  #: zlib
    log_tail: Mapped[bytes | None] = mapped_column(LargeBinary)  #: zlib


class Run(Base):
    __tablename__ = "runs"
    position: Mapped[int] = mapped_column(ForeignKey("experiments.position"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)  #: within its experiment
    id: Mapped[UUID]
    seed: Mapped[int]
    score: Mapped[float | None]
    status: Mapped[str | None] = mapped_column(String(8))
    reason: Mapped[str] = mapped_column(Text)
    memory_gb: Mapped[float]
    seconds: Mapped[float]
    trained_share: Mapped[float | None]
    epochs: Mapped[float | None]
    phases: Mapped[dict[str, Any]]
    metrics: Mapped[dict[str, Any]]


class Branch(Base):
    """What the hub holds of a machine."""

    __tablename__ = "branches"
    machine_id: Mapped[int] = mapped_column(ForeignKey("machines.id"), primary_key=True)
    commit: Mapped[str] = mapped_column(String(40))
    attic: Mapped[str | None] = mapped_column(String(40))
    pushed_at: Mapped[int]


class Lease(Base):
    """An assignment's claim. When a grant runs out is kept in memory: every grant gets one full term at a start."""

    __tablename__ = "leases"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(8))
    state: Mapped[str] = mapped_column(String(9))
    attempt: Mapped[int]  #: grants so far
    experiment: Mapped[UUID]
    rung: Mapped[str] = mapped_column(String(63))
    wanted_id: Mapped[int | None] = mapped_column(ForeignKey("machines.id"))  #: the machine that it is for
    holder_id: Mapped[int | None] = mapped_column(ForeignKey("machines.id"))  #: of the present grant
    closed_by: Mapped[UUID | None]
    position: Mapped[int] = mapped_column(unique=True)  #: first queued, first granted

    __table_args__ = (Index("ix_leases_open", "state", "position"),)


class Event(Base):
    __tablename__ = "events"
    position: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    at: Mapped[int]
    machine: Mapped[str | None] = mapped_column(String(63))  #: its name then
    data: Mapped[dict[str, Any]]


class Standing(Base):
    """The leaderboard's cache, updated in the transaction of each report; leaderboard.py says what it means."""

    __tablename__ = "standings"
    machine_id: Mapped[int] = mapped_column(ForeignKey("machines.id"), primary_key=True)
    profile: Mapped[str] = mapped_column(String(63), primary_key=True)
    rung: Mapped[str] = mapped_column(String(63), primary_key=True)
    baseline: Mapped[float | None]
    best: Mapped[float | None]
    sigma: Mapped[float]
    gain_sigmas: Mapped[float | None] = mapped_column(index=True)
    runs: Mapped[int]
    confirmed: Mapped[bool]
    suspects: Mapped[int]
    experiments: Mapped[int]
    keeps: Mapped[int]
    head: Mapped[int | None]  #: position of the experiment that HEAD is
