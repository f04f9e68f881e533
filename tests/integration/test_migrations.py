"""Every schema that was ever released comes up to date, with its rows; and the models say what the schema is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from coordinator import migrations
from coordinator.database import migrate, open_engine
from coordinator.store import Store
from coordinator.tables import Base
from shared.errors import BadInput
from shared.wire import Status
from tests import postgres
from tests.reports import machine, opened, standings

SCRIPTS = ScriptDirectory(str(Path(migrations.__file__).parent))
FIRST = SCRIPTS.get_base()
HEAD = SCRIPTS.get_current_head()

#: One row of each table as the first release wrote it; machine 1's baseline, and a keep with a rerun.
ROWS = """
INSERT INTO campaign VALUES (1, 'fast', 't', 'loss', 'minimize', 'default', 'b0', NULL, 1790000000);
INSERT INTO machines VALUES (1, '{m}', 'm1', 'refs/heads/autoresearch/t-m1', 'refs/attic/m1', 'cpu', 'torch',
    '{{"host": "h"}}', '["explore"]', '0.1.0', 3, 'online', {no}, 1790000000);
INSERT INTO tokens VALUES (1, 'ab', 'worker', '', 1, 1790000000, NULL, NULL);
INSERT INTO branches VALUES (1, 'b0', NULL, 1790000000);
INSERT INTO ideas VALUES ('{i}', '1:ab', 'baseline', 1, 1, 2, 2);
INSERT INTO experiments VALUES (1, '{a}', 2, 1, 0, 'explore', '{i}', 'default', 'base', 'keep', 1.0, 1.0, 0.0, 1, 1,
    0.5, 2.0, 't0', 'b0', 'b0', 'baseline', 'p', '', {no}, {no}, {no}, {no}, 1, 1);
INSERT INTO experiments VALUES (2, '{b}', 3, 1, 1, 'explore', '{i}', 'default', 'base', 'keep', 0.9, 0.91, 0.0002, 2, 2,
    0.5, 4.0, 't1', 'b0', 'k1', 'better', 'p', '', {yes}, {no}, {no}, {no}, 2, 2);
INSERT INTO details VALUES (2, '1:ab', 'c', 0, NULL, '{{"A": 1}}', '{{}}', NULL, NULL);
INSERT INTO runs VALUES (2, 0, '{r}', 7, 0.9, NULL, '', 0.5, 2.0, NULL, NULL, '{{}}', '{{"loss": 0.9}}');
INSERT INTO leases VALUES ('{l}', 'replay', 'queued', 1, '{b}', 'base', NULL, NULL, NULL, 1);
INSERT INTO events VALUES (7, 'experiment', 1790000000, 'm1', '{{"number": 1}}');
INSERT INTO standings VALUES (1, 'default', 'base', 1.0, 0.91, 0.02, 4.5, 2, {yes}, 0, 1, 1, 2);
"""


@pytest.fixture(params=postgres.KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield from postgres.empty(request.param, request.config, tmp_path)


def test_the_first_release_comes_up_to_date_with_its_rows(url: str) -> None:
    assert FIRST is not None
    engine = open_engine(url)
    migrate(engine, FIRST)
    flags = {"yes": "true", "no": "false"} if engine.dialect.name == "postgresql" else {"yes": "1", "no": "0"}
    ids = {name: f"{number:032x}" for number, name in enumerate("mabirl", 1)}
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        for statement in ROWS.format(**flags, **ids).split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT setval(pg_get_serial_sequence('machines', 'id'), 1)")
    counts = rows(url)
    engine.dispose()
    store = opened(url, base="b0")
    assert rows(url) == counts == dict.fromkeys(counts, 1) | {"experiments": 2}
    assert store.members.named("m1").incarnation == 3
    (found,) = store.look.leaderboard("group").standings
    assert (found.best, found.baseline, found.runs, found.confirmed) == (0.91, 1.0, 2, True)
    assert store.look.experiment(store.look.find("0" * 31 + "3")).run_reports[0].metrics == {"loss": 0.9}
    m2 = machine(store, "m2")
    m2.tries(1.0)
    assert [e.position for e in store.look.events(0, 9)] == [7, 8, 9]
    assert store.look.experiments(limit=1).experiments[0].position == 3
    assert store.leases.has_work_for(m2.member)
    store.close()


def rows(url: str) -> dict[str, int]:
    engine = open_engine(url)
    with engine.connect() as connection:
        tables = sorted(Base.metadata.tables)
        counts = {name: connection.execute(text(f"SELECT count(*) FROM {name}")).scalar_one() for name in tables}
    engine.dispose()
    return counts


def test_models_and_schema_agree(url: str) -> None:
    engine = open_engine(url)
    migrate(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
    with engine.connect() as connection:  # what the comparison does not look at: the conditions of partial indexes
        made = conditions(connection)
    engine.dispose()
    assert len(made) == 3
    fresh = Path(url.removeprefix("sqlite:///")).with_name("models.db") if url.startswith("sqlite") else None
    if fresh is not None:
        engine = open_engine(f"sqlite:///{fresh}")
        with engine.connect().execution_options(writes=True) as connection, connection.begin():
            Base.metadata.create_all(connection)
            assert conditions(connection) == made
        engine.dispose()


def conditions(connection: Connection) -> dict[str, str]:
    """Of every partial index, as the database has it."""
    found = {}
    inspector = inspect(connection)
    for table in Base.metadata.tables:
        for index in inspector.get_indexes(table):
            options = index.get("dialect_options", {})
            condition = next((v for k, v in options.items() if k.endswith("_where")), None)
            if condition is not None:
                found[str(index["name"])] = str(condition)
    return found


def test_migrating_again_changes_nothing(url: str) -> None:
    store = opened(url)
    machine(store).tries(1.0, status=Status.KEEP)
    before = standings(store)
    store.close()
    for _ in range(2):
        store = Store(url)
        assert standings(store) == before
        store.close()


def test_a_database_of_a_newer_release_is_left_alone(url: str) -> None:
    opened(url).close()
    engine = open_engine(url)
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(BadInput, match=r"9999.*newer release, upgrade this one"):
        Store(url)
    engine = open_engine(url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one() == "9999"
    engine.dispose()


def test_revisions_are_one_line() -> None:
    revisions = [script.revision for script in SCRIPTS.walk_revisions()][::-1]
    assert revisions == [f"{number:04d}" for number in range(1, len(revisions) + 1)]
    assert revisions[-1] == HEAD
