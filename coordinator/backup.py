"""`swarm backup` and `swarm restore`: database and hub in one tar file.

The database is taken first, in one transaction, then the hub: every commit that the database speaks of as pushed is in
the hub's part, which may hold a little more. What machines reported after the backup they send again by themselves when
a restored coordinator starts. Works while the coordinator runs; the file holds a SQLite database whatever the
coordinator's own is, so that a backup moves from one to the other. NOT covered: the campaign's repository and data.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path

from sqlalchemy import Connection, Engine, insert, select, text

from shared.errors import AlreadyThere, BadInput
from shared.git import GitError, Repo

from .auth import MARKER
from .database import migrate, open_engine
from .hub import Hub
from .settings import Settings, sqlite_url
from .tables import Base

FORMAT = 1
CHUNK = 2000  #: rows copied at a time
SHALLOW = "shallow"  #: git's file of where a campaign cloned with --depth ends; a bundle does not carry it


def backup(settings: Settings, out: Path) -> None:
    """Writes the file, whole or not at all. Raises AlreadyThere, or BadInput where there is no coordinator."""
    if out.exists():
        raise AlreadyThere(f"{out}: exists; name another file")
    if not (settings.state / "hub.git").is_dir():
        raise BadInput(f"{settings.state}: no coordinator has run here")
    out = out.absolute()
    if not out.parent.is_dir():
        raise BadInput(f"{out}: {out.parent} is no directory")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch)
        _copy(settings.database, sqlite_url(folder))
        hub = settings.state / "hub.git"
        Repo(hub).run("bundle", "create", "--quiet", str(folder / "hub.bundle"), "--all")
        (folder / "backup.json").write_text(json.dumps({"format": FORMAT, "campaign": settings.repository}))
        partial = folder / "backup.tar"
        with tarfile.open(partial, "w") as tar:
            for name in ("backup.json", "swarm.sqlite", "hub.bundle"):
                tar.add(folder / name, name)
            if (hub / SHALLOW).exists():
                tar.add(hub / SHALLOW, SHALLOW)
        partial.rename(out)


def restore(settings: Settings, source: Path) -> None:
    """Brings a campaign's coordinator back; call with its lock held, so that none runs. Raises AlreadyThere where it
    still has anything, BadInput for a file that is no backup of this campaign; then nothing has changed."""
    if not source.is_file():
        raise BadInput(f"{source}: no such file")
    settings.state.mkdir(parents=True, exist_ok=True)
    if (settings.state / "hub.git").exists():
        raise AlreadyThere(f"{settings.state}: a coordinator's state is here; move it aside first")
    if _holds_rows(settings.database):
        known = "the backup brings its own tokens, those made here meanwhile would end"
        if settings.database == sqlite_url(settings.state):
            raise AlreadyThere(f"{settings.state}: a coordinator's database is here; {known}: move it aside first")
        raise AlreadyThere(f"--db: that database holds a coordinator's state; {known}: name an empty one")
    with tempfile.TemporaryDirectory(dir=settings.state, prefix=".restore.") as scratch:
        folder = Path(scratch)
        try:
            with tarfile.open(source) as tar:
                tar.extractall(folder, filter="data")
            said = json.loads((folder / "backup.json").read_text())
        except (tarfile.TarError, OSError, ValueError) as error:
            raise BadInput(f"{source}: not a backup ({error})") from None
        if said.get("format") != FORMAT or said.get("campaign") != settings.repository:
            raise BadInput(f"{source}: holds campaign {said.get('campaign')!r}, this is {settings.repository!r}")
        hub = folder / "hub.git"
        try:
            shallow = folder / SHALLOW
            Hub.restore(hub, folder / "hub.bundle", shallow.read_text() if shallow.exists() else "")
        except GitError as error:
            raise BadInput(f"{source}: its hub is damaged: {error}") from None
        _copy(sqlite_url(folder), settings.database)
        hub.rename(settings.state / "hub.git")
        (settings.state / MARKER).touch()


def _holds_rows(url: str) -> bool:
    """Whether it is in use: by a campaign that was served, or for tokens made before that."""
    engine = open_engine(url)
    try:
        migrate(engine)
        with engine.connect() as connection:
            tables = Base.metadata.sorted_tables
            return any(connection.execute(select(table).limit(1)).first() for table in tables)
    finally:
        engine.dispose()


def _copy(source: str, target: str) -> None:
    """All rows, as they stood at one moment, into an empty database of the present schema."""
    before, after = open_engine(source), open_engine(target)
    try:
        migrate(after)
        with before.connect() as reading, after.connect().execution_options(writes=True) as writing:
            if before.dialect.name == "postgresql":
                reading = reading.execution_options(isolation_level="REPEATABLE READ")
            with reading.begin(), writing.begin():
                for table in Base.metadata.sorted_tables:
                    rows = reading.execution_options(stream_results=True).execute(select(table))
                    for chunk in rows.mappings().partitions(CHUNK):
                        writing.execute(insert(table), [dict(row) for row in chunk])
                _continue_ids(writing, after)
    finally:
        before.dispose()
        after.dispose()


def _continue_ids(connection: Connection, engine: Engine) -> None:
    """PostgreSQL counts ids in sequences, which know nothing of rows that came with theirs."""
    if engine.dialect.name != "postgresql":
        return
    for table in ("campaign", "machines", "tokens"):
        sequence = f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), coalesce(max(id), 1)) FROM {table}"
        connection.execute(text(sequence))
