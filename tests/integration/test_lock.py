"""One coordinator for a folder, and one for a database, also when the database's connections end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.database import open_engine
from coordinator.lock import only_one
from shared.errors import Refused
from tests import postgres
from tests.hosting import until

HOLDERS = "FROM pg_locks WHERE locktype = 'advisory' AND objid = 8420 AND granted"


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield from postgres.empty("postgresql", request.config, tmp_path)


def asked(url: str, query: str) -> object:
    engine = open_engine(url)
    try:
        with engine.connect() as connection:
            return connection.exec_driver_sql(query).scalar()
    finally:
        engine.dispose()


def cut(url: str) -> None:
    """As an administrator, or a server that restarts."""
    assert asked(url, f"SELECT pg_terminate_backend(pid) {HOLDERS}") is True


def refused(state: Path, url: str, why: str = "another coordinator works on this database") -> None:
    with pytest.raises(Refused, match=why), only_one(state, url):
        pass


def test_a_folder_has_one(tmp_path: Path) -> None:
    with only_one(tmp_path, "sqlite:///x"):
        refused(tmp_path, "sqlite:///x", r"coordinator \d+ is running here")
    with only_one(tmp_path, "sqlite:///x"):
        pass


def test_a_database_has_one(database: str, tmp_path: Path) -> None:
    with only_one(tmp_path / "a", database):
        refused(tmp_path, database)
    assert asked(database, f"SELECT count(*) {HOLDERS}") == 0
    with only_one(tmp_path, database):
        pass


def test_a_lock_whose_connection_ended_is_taken_again(database: str, tmp_path: Path) -> None:
    lost = threading.Event()
    with only_one(tmp_path / "a", database, lost.set):
        pid = asked(database, f"SELECT pid {HOLDERS}")
        cut(database)
        until(lambda: asked(database, f"SELECT pid {HOLDERS}") not in (None, pid))
        assert not lost.is_set()
        refused(tmp_path / "b", database)


def test_who_lost_it_to_another_hears_so(database: str, tmp_path: Path) -> None:
    lost = threading.Event()
    engine = open_engine(database).execution_options(isolation_level="AUTOCOMMIT")
    other = engine.connect()
    with pytest.raises(Refused, match="another coordinator"), only_one(tmp_path, database, lost.set):
        cut(database)
        until(lambda: other.exec_driver_sql("SELECT pg_try_advisory_lock(8420)").scalar())
        assert lost.wait(20)
    other.close()
    engine.dispose()
