"""One coordinator for a campaign's folder, and one for a database. Two writers would give out the same positions.

The folder's lock is the kernel's and lasts as long as this process. PostgreSQL's is a connection's, and connections end
(a restart of the server, a failover, an administrator): a thread looks after it, takes it again, and says so where
another has it. NOT covered: the seconds between a connection's end and that look.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from shared.errors import Refused

from .database import open_engine

LOOK_S = 2.0
_NUMBER = 8420  #: PostgreSQL's advisory locks have numbers


@contextmanager
def only_one(state: Path, database: str, lost: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Raises Refused where another is at work, at the start and, after the block, where one took over meanwhile;
    `lost` is called, in a thread, when that happens."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Refused(f"{state}: coordinator {file.read().strip() or '?'} is running here") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        if not database.startswith("postgres"):
            yield
            return
        with _Held(database, lost):
            yield


class _Held:
    """PostgreSQL's lock, while the block lasts."""

    def __init__(self, url: str, lost: Callable[[], None]) -> None:
        self._engine: Engine = open_engine(url).execution_options(isolation_level="AUTOCOMMIT")
        self._lost, self._taken = lost, False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="lock", daemon=True)

    def __enter__(self) -> None:
        try:
            connection = self._engine.connect()
            if not self._has(connection):
                raise _other()
        except BaseException:
            self._engine.dispose()
            raise
        self._connection = connection
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._connection.invalidate()
        self._engine.dispose()
        if self._taken:
            raise _other()

    @staticmethod
    def _has(connection: Connection) -> bool:
        """Takes it where it is free; taking it twice does no harm, and asks the server each time."""
        return bool(connection.exec_driver_sql(f"SELECT pg_try_advisory_lock({_NUMBER})").scalar())

    def _look_after(self) -> None:
        while not self._over.wait(LOOK_S):
            try:
                held = self._has(self._connection)
            except DBAPIError:
                held = self._again()
            if not held:
                self._taken = True
                self._lost()
                return

    def _again(self) -> bool:
        """By a new connection, as soon as the server is there; False where another was faster."""
        self._connection.invalidate()
        while not self._over.wait(LOOK_S / 10):
            try:
                self._connection = self._engine.connect()
                return self._has(self._connection)
            except DBAPIError:
                continue
        return True


def _other() -> Refused:
    return Refused("another coordinator works on this database; stop it, or give this one its own (--db)")
