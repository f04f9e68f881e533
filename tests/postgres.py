"""A real PostgreSQL for tests: started once in a session, stopped and removed at its end; a fresh database per test."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from coordinator.database import migrate, open_engine

KINDS = ("sqlite", "postgresql")


class Missing(Exception):
    """What a PostgreSQL of our own needs and this machine does not have."""


class Server:
    """One server on a unix socket and a free loopback port, for whoever is on this machine."""

    def __init__(self, fsync: bool = False) -> None:
        """Without `fsync` a power cut may take what was committed, as a test may. Raises Missing."""
        try:
            import psycopg
        except ImportError:
            raise Missing("no PostgreSQL here: psycopg is not installed (extra `postgres`)") from None
        self._connect = psycopg.connect
        self._programs = _programs()
        self._user = _user()
        self._fsync = "on" if fsync else "off"
        self._folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path has 107 bytes at most
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._numbers = count(1)
        options = ("-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "-D", "data")
        try:
            self._run("initdb", *options)
            self.start()
        except Exception:
            shutil.rmtree(self._folder)
            raise

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def database(self, template: str = "template0") -> str:
        """The address of a new one; `template`: the name of the one that it is a copy of."""
        name = f"t{next(self._numbers)}"
        with self._connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def drop(self, url: str) -> None:
        with self._connect(self.url(), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def start(self) -> None:
        settings = f"-p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1 -c max_connections=100"
        settings += f" -c fsync={self._fsync}"
        self._run("pg_ctl", "start", "-w", "-D", "data", "-l", "log", "-o", settings)

    def stop(self) -> None:
        """As when an administrator stops it: connections are cut."""
        self._run("pg_ctl", "stop", "-w", "-m", "fast", "-D", "data")

    def remove(self) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self._folder)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            cwd=self._folder,
            user=self._user,
            extra_groups=None if self._user is None else [],
            env={"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(self._folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would be inherited by the server, and never end
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
        if done.returncode:
            log = self._folder / "log"
            raise RuntimeError(f"{program} failed ({done.returncode}): {log.read_text() if log.exists() else ''}")


def _programs() -> Path:
    if (found := shutil.which("pg_ctl")) and (beside := Path(found).resolve().parent / "initdb").exists():
        return beside.parent
    newest = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    if not newest:
        raise Missing("no PostgreSQL here: initdb and pg_ctl are neither on PATH nor in /usr/lib/postgresql/*/bin")
    return newest[-1].parent


def _user() -> str | None:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam("nobody")
    except KeyError:
        raise Missing("no PostgreSQL here: it refuses to run as root, and there is no user nobody") from None
    return "nobody"


_STARTED = pytest.StashKey[Server]()
_MADE = pytest.StashKey[dict[str, Any]]()  #: what `fresh` copies, by kind


def server(config: pytest.Config) -> Server:
    """The session's, started when first asked for. Skips the test where there is none."""
    if _STARTED not in config.stash:
        try:
            config.stash[_STARTED] = Server()
        except Missing as missing:
            pytest.skip(str(missing))
        config.add_cleanup(config.stash[_STARTED].remove)
    return config.stash[_STARTED]


def empty(kind: str, config: pytest.Config, folder: Path) -> Iterator[str]:
    """The address of an empty database of one of KINDS, for one test; a fixture yields from this."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'swarm.db'}"
        return
    running = server(config)
    url = running.database()
    yield url
    running.drop(url)


def fresh(kind: str, config: pytest.Config, folder: Path) -> Iterator[str]:
    """As `empty`, its tables made: a copy of one that was migrated once, which saves each test 40 ms."""
    made = config.stash.setdefault(_MADE, {})
    if kind == "sqlite":
        path = folder / "swarm.db"
        if kind not in made:
            _make(f"sqlite:///{path}")
            made[kind] = path.read_bytes()
        path.write_bytes(made[kind])
        yield f"sqlite:///{path}"
        return
    running = server(config)
    if kind not in made:
        url = running.database()
        _make(url)
        made[kind] = url.rpartition("/")[2]
    url = running.database(made[kind])
    yield url
    running.drop(url)


def _make(url: str) -> None:
    engine = open_engine(url)
    migrate(engine)
    engine.dispose()  # the last connection of SQLite brings its log into the file; PostgreSQL copies what nobody uses
