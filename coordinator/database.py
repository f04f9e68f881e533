"""The database of one campaign: opening it, connections that read, the writer, and the study that it belongs to.

Everything that knows rows stands on this (store, reports, standings, leases, looking) and shares what is here: the
errors of a query, the form in which text is stored. Invariants: a database serves one study, whose tag and base never
change; all that is written is a job of the one writer (writer.py). NOT covered: a second process on the same database;
the coordinator's lock keeps one from starting.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, Engine, create_engine, event, func, insert, make_url, select, update
from sqlalchemy.exc import DBAPIError

from shared import wire
from shared.errors import BadInput, Refused, SwarmError

from .tables import Campaign, Event
from .writer import TROUBLE, StorageUnavailable, Writer

LISTED = 1000  #: rows in one page at most
POOL = {"pool_size": 8, "max_overflow": 40}  #: connections: the web server's 40 threads, the writer, some to spare


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


class Database:
    """Reads take a short connection of their own; writes are jobs of `writer`."""

    def __init__(
        self,
        url: str,
        published: Callable[[list[wire.Event]], None],
        remember: Callable[[Connection], None],
    ) -> None:
        """Opens and migrates it. `published`: see Writer. `remember` is for what is kept in memory: it is called now,
        and on the writer's thread after a failed commit, when memory may lag behind what is stored."""
        self.engine = open_engine(url)
        try:
            migrate(self.engine)
        except BadInput:
            self.engine.dispose()
            raise
        self._study: Study | None = None
        with self.read() as connection:
            last = connection.execute(select(func.max(Event.position))).scalar() or 0
            remember(connection)
            if (own := connection.execute(select(Campaign.__table__)).first()) is not None:
                self._study = Study(own.name, own.tag, own.metric, own.direction, own.profile, own.base, own.digest)
        self.writer = Writer(self.engine.execution_options(writes=True), last + 1, published, remember)

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


def clean(value: Any) -> Any:
    """Text that every database takes: PostgreSQL has no NUL, and nothing can encode half of a surrogate pair."""
    if isinstance(value, str):
        return value.replace("\0", "�").encode(errors="replace").decode()
    if isinstance(value, dict):
        return {clean(key): clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [clean(inner) for inner in value]
    return value


def packed(text: str | None) -> bytes | None:
    return None if text is None else zlib.compress(text.encode(), 6)


def unpacked(data: bytes | None) -> str | None:
    return None if data is None else zlib.decompress(data).decode()
