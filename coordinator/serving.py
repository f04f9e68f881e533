"""`swarm serve DIR`: one coordinator process over one campaign."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from shared import git
from shared.errors import BadInput, Refused
from shared.prepare.constants import PROFILES
from shared.prepare.data import EMBEDDED, Folder
from shared.prepare.download import CLIMBMIX
from shared.prepare.packing import data_folder, tokenizer_folder
from shared.prepare.run_environment import cache_root
from shared.wire import DataInfo
from worker.campaign import Campaign
from worker.machine import slug
from worker.preparing import prepare
from worker.setup import Bar, date_tag

from .app import create_app
from .lock import only_one
from .service import NO_FILES, Files, Service
from .settings import STATE, Limits, Settings, sqlite_url
from .stream import Stream

PORT = 8420
BACKLOG = 2048
SWITCH_S = 0.001  #: how long a thread keeps the interpreter while another wants it: the loop answers between its bursts


@dataclass(frozen=True)
class Address:
    """Where to listen."""

    host: str = "127.0.0.1"
    port: int = PORT
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @property
    def loopback(self) -> bool:
        if self.host == "localhost":
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return False

    def url(self, port: int) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_cert else 'http'}://{host}:{port}"


def settings_of(campaign: Campaign, database: str | None, limits: Limits | None = None) -> Settings:
    """Raises BadInput for an environment variable that is no number of seconds."""
    state = campaign.root / STATE
    return Settings(
        state,
        database or sqlite_url(state),
        slug(campaign.task.name),
        _seconds("SWARM_HEARTBEAT_S", Settings.heartbeat_s),
        _seconds("SWARM_LEASE_S", Settings.lease_ttl_s),
        limits or Limits(),
    )


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 86400:
        raise BadInput(f"{name}={text}: seconds, above 0 and below a day")
    return value


def served_files(campaign: Campaign, progress: Bar) -> Files:
    """Prepares the campaign's data here, so that its digest is known and every machine can get the same."""
    task = campaign.task
    if task.profile is None:
        return NO_FILES
    made = prepare(campaign.folder, task, task.profile, progress)
    cache, profile = cache_root(os.environ), PROFILES[task.profile]
    tokenizer = tokenizer_folder(cache, task.data, profile.vocab_size)
    paths = {f"tokenizer/{name}": tokenizer / name for name in ("ranks.json", "shards.json")}
    paths |= {f"rows/{name}": Path(made.rows) / name for name in ("val.bin", "manifest.json")}
    shards: tuple[Path, ...] = ()
    if task.data not in (EMBEDDED, CLIMBMIX):
        folder = Folder.open(data_folder(cache, task.data, profile))
        shards = (*folder.train[: task.train_shards or profile.train_shards], folder.validation)
        paths |= {f"shards/{shard.name}": shard for shard in shards}
    info = DataInfo(name=task.data, served=tuple(shard.name for shard in shards), tokenizer=True)
    return Files(info, paths, made.digest)


def serve(
    campaign: Campaign,
    address: Address,
    settings: Settings,
    progress: Bar,
    ready: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Until SIGINT or SIGTERM. `ready` gets the service's address. Raises Refused or BadInput."""
    base = git.Repo(campaign.root).resolve("HEAD")
    if base is None:
        raise BadInput(f"{campaign.root}: no commit yet; commit the task's files first")
    if bool(address.tls_cert) != bool(address.tls_key):
        raise BadInput("--tls-cert and --tls-key belong together; give both")
    for option, file in (("--tls-cert", address.tls_cert), ("--tls-key", address.tls_key)):
        if file is not None and not file.is_file():
            raise BadInput(f"{option} {file}: no such file")
    over = threading.Event()  # another coordinator has the database
    with only_one(settings.state, settings.database, over.set):
        service = Service(campaign, date_tag(datetime.date.today()), base, settings, served_files(campaign, progress))
        try:
            if not address.loopback:
                if not service.tokens.needed:
                    raise Refused(
                        f"--host {address.host}: other computers could connect, and there is no token yet; make them "
                        "first: `swarm token create --role admin` and `--role join`"
                    )
                if not address.tls_cert:
                    warn("tokens and results travel unencrypted; --tls-cert and --tls-key change that")
            with _socket(address) as listener:
                url = address.url(listener.getsockname()[1])
                ready(url)
                sys.setswitchinterval(SWITCH_S)
                server_of(service, address, over).run(sockets=[listener])
        finally:
            service.close()


class _Server(uvicorn.Server):
    """Ends the event streams first: uvicorn waits for open responses before it tells the application.

    And returns: uvicorn raises the signal again that stopped it, which would end us with the database still open.
    """

    def __init__(self, config: uvicorn.Config, stream: Stream, over: threading.Event) -> None:
        super().__init__(config)
        self._stream, self._over = stream, over

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._over.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stream.end()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def server_of(service: Service, address: Address, over: threading.Event | None = None) -> uvicorn.Server:
    """`over`: ends it, as a signal does."""
    config = uvicorn.Config(
        create_app(service, loopback=address.loopback),
        loop="uvloop",
        http="httptools",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
        timeout_keep_alive=75,
        backlog=BACKLOG,
        ssl_certfile=address.tls_cert,
        ssl_keyfile=address.tls_key,
    )
    return _Server(config, service.stream, over or threading.Event())


def _socket(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
        listener.listen(BACKLOG)  # who connects before the server runs waits instead of being refused
    except OSError as error:
        listener.close()
        words = error.strerror or str(error)
        raise BadInput(f"--host {address.host} --port {address.port}: {words}; take another --port") from None
    listener.set_inheritable(False)
    return listener
