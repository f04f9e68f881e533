"""`swarm`: the whole command line; the coordinator's commands beside those of one machine (worker/cli.py)."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

import worker.cli  # the commands of one machine
from shared import git
from shared.client import client_from, request_of
from shared.errors import BadInput, Refused
from shared.wire import Role, TokenOrder
from worker.campaign import Campaign
from worker.home import default_home
from worker.machine import detect
from worker.results import plain
from worker.screen import TerminalScreen
from worker.terminal import DataBar, Json, app, console, run_app, say, stopping

from . import administer, look
from .importing import command as importing

if TYPE_CHECKING:
    from .auth import Tokens
    from .fleet import Node

CampaignDir = Annotated[Path, typer.Argument(help="The campaign's directory, made by `swarm init`.")]
Database = Annotated[
    str | None, typer.Option("--db", help="Database URL; SQLite below the campaign if left out.", envvar="SWARM_DB")
]

Home = Annotated[Path | None, typer.Option(help="Where machines keep their state.", envvar="SWARM_HOME")]
JoinToken = Annotated[str | None, typer.Option("--token", help="A join token.", envvar="SWARM_TOKEN")]
Coordinator = Annotated[
    str | None, typer.Option("--coordinator", help="The coordinator's address.", envvar="SWARM_COORDINATOR")
]

COMMANDS = (worker.cli, look, administer, importing)  #: importing them is what registers their commands


def main() -> None:
    """The entry point."""
    run_app()


@app.command()
def serve(
    directory: CampaignDir = Path(),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8420,
    db: Database = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    keep_logs: Annotated[
        float | None, typer.Option(min=0, help="Days that log tails are kept; for ever if left out.")
    ] = None,
    keep_attic: Annotated[
        float | None,
        typer.Option(min=0, help="Days that attempts' code of machines gone is kept; for ever if left out."),
    ] = None,
) -> None:
    """Host a campaign: its results, every machine's branch, the leaderboard. Until Ctrl-C."""
    from . import serving
    from .settings import Limits

    git.check_version()
    campaign = Campaign.open(directory)
    settings = serving.settings_of(campaign, db, Limits(keep_logs_days=keep_logs, keep_attic_days=keep_attic))
    with DataBar() as bar:
        serving.serve(
            campaign,
            serving.Address(host, port, tls_cert, tls_key),
            settings,
            bar.update,
            lambda url: print(f"coordinator of {campaign.task.name!r}: {url}", flush=True),
            lambda text: print(f"swarm: {text}", file=sys.stderr),
        )


@app.command("worker")
def be_worker(
    url: Annotated[str, typer.Argument(help="The coordinator's address.")],
    name: Annotated[str | None, typer.Option(help="This machine's name; by default the host's.")] = None,
    home: Annotated[
        Path | None,
        typer.Option(help="Where this machine keeps its state.", envvar="SWARM_HOME", show_default="data folder"),
    ] = None,
    token: Annotated[str | None, typer.Option(help="A join token, for the first time.", envvar="SWARM_TOKEN")] = None,
) -> None:
    """Be one machine of a swarm, in the foreground, until Ctrl-C. Started again, it goes on where it was."""
    from worker.working import work

    os.environ.pop("SWARM_TOKEN", None)  # for us, not for what we start
    git.check_version()
    stop = threading.Event()
    machine = detect(name)
    console.print(f"{machine.name} on {machine.accelerator or machine.chip} ({machine.machine_class}), for {url}")
    screen = TerminalScreen(console)
    with screen, stopping(stop), DataBar() as bar:
        work(url.rstrip("/"), token, home or default_home(), machine, screen, stop, bar.update)


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(min=0, help="How long to research after the baselines.")] = 3.0,
) -> None:
    """The whole swarm on this computer, in a new temporary directory: coordinator, local Ray, three machines."""
    from .demo import demo as show

    git.check_version()
    show(minutes, console)


@app.command()
def up(
    slots: Annotated[int | None, typer.Option(min=1, help="Machines on each node without accelerators.")] = None,
    accelerators: Annotated[int | None, typer.Option(min=1, help="Ask the cluster's autoscaler for so many.")] = None,
    address: Annotated[str | None, typer.Option(help="The Ray cluster, HOST:6379; else the one found here.")] = None,
    home: Home = None,
    coordinator: Coordinator = None,
    token: JoinToken = None,
    as_json: Json = False,
) -> None:
    """Put a worker on every accelerator of a Ray cluster; without one, start Ray on this computer."""
    from . import fleet

    place = home or default_home()
    url = client_from(coordinator, None).url
    fleet.connect(address, home=place, start_local=True)
    plan = fleet.Plan(url, token, home=home, slots=slots, accelerators=accelerators)
    nodes = fleet.up(plan, lambda line: print(line, file=sys.stderr))
    _show_nodes(nodes, as_json)
    if not any(node.workers for node in nodes):
        raise Refused("no node has an accelerator; --slots N puts N workers on each node's CPU")


@app.command()
def down(
    address: Annotated[str | None, typer.Option(help="The Ray cluster, HOST:6379; else the one found here.")] = None,
    home: Home = None,
) -> None:
    """Stop the workers of a Ray cluster; each ends its run and sends what it has. Their state stays."""
    from . import fleet, supervisor

    place = home or default_home()
    try:
        fleet.connect(address, home=place)
    except fleet.NoCluster:
        for name in supervisor.stop_here(place):
            print(f"{name}: stopped; its Ray was gone", file=sys.stderr)
        print("no Ray cluster is running here; nothing is left to stop")
        return
    fleet.down(lambda line: print(line, file=sys.stderr), place)


def _show_nodes(nodes: list[Node], as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(node) for node in nodes]))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("host", "machine", "state", "devices", "note"):
        table.add_column(column)
    for node in nodes:
        for slot in node.workers:
            cells = [node.host, slot.name, str(slot.state), ",".join(slot.devices) or "cpu", slot.note]
            table.add_row(*(Text(cell) for cell in cells))
        if not node.workers:
            table.add_row(Text(node.host), "-", "-", "-", Text(node.note))
    console.print(table)


tokens = typer.Typer(help="Tokens of a coordinator; run beside it, on its computer.", no_args_is_help=True)
app.add_typer(tokens, name="token")
OfCampaign = Annotated[Path, typer.Option("--dir", "-C", help="The served campaign's directory.", show_default="here")]


@contextmanager
def _tokens(directory: Path, db: str | None) -> Iterator[Tokens]:
    """The tokens of a campaign's coordinator, whether it is running or not."""
    from . import serving
    from .auth import Tokens
    from .store import Store

    settings = serving.settings_of(Campaign.open(directory), db)
    settings.state.mkdir(parents=True, exist_ok=True)
    store = Store(settings.database)
    try:
        yield Tokens(store, settings.state)
    finally:
        store.close()


@tokens.command("create")
def create_token(
    role: Annotated[Role, typer.Option(help="What its bearer may do.")],
    label: Annotated[str, typer.Option(help="A note for people.")] = "",
    expires: Annotated[float | None, typer.Option(help="Days that it is good for; for ever if left out.")] = None,
    machine: Annotated[str | None, typer.Option(help="For role worker: the machine it is bound to.")] = None,
    directory: OfCampaign = Path(),
    db: Database = None,
    as_json: Json = False,
) -> None:
    """Make a token. It is shown once; only its hash is kept."""
    if expires is not None and not expires > 0:
        raise BadInput(f"--expires {expires:g}: days above 0; leave it out for a token that is good for ever")
    seconds = None if expires is None else expires * 86400
    order = request_of(TokenOrder, role=role, label=label, expires_s=seconds, machine=machine)
    with _tokens(directory, db) as live:
        made = live.make(order)
    say(as_json, made.model_dump(mode="json"), made.token)


@tokens.command("list")
def list_tokens(directory: OfCampaign = Path(), db: Database = None, as_json: Json = False) -> None:
    """Every token's role and state; never the tokens."""
    with _tokens(directory, db) as live:
        views = live.all()
    if as_json:
        print(json.dumps([view.model_dump(mode="json") for view in views]))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("id", "role", "machine", "label", "made", "expires", "state"):
        table.add_column(column)
    for view in views:
        expired = view.expires_at is not None and view.expires_at <= time.time()
        state = "revoked" if view.revoked else "expired" if expired else "live"
        times = [_day(view.created_at), _day(view.expires_at) if view.expires_at else "never"]
        cells = [str(view.id), view.role, view.machine or "-", plain(view.label) or "-", *times, state]
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


def _day(at: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


@tokens.command("revoke")
def revoke_token(
    token: Annotated[int, typer.Argument(help="Its number, as `swarm token list` shows it.")],
    directory: OfCampaign = Path(),
    db: Database = None,
    as_json: Json = False,
) -> None:
    """End a token now."""
    with _tokens(directory, db) as live:
        live.revoke(token)
    say(as_json, {"revoked": token}, f"token {token} is revoked")


@app.command()
def backup(
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    directory: OfCampaign = Path(),
    db: Database = None,
    as_json: Json = False,
) -> None:
    """Save a coordinator's database and hub, as they stand, in one tar file; it may be running."""
    from . import backup as backups
    from . import serving

    backups.backup(serving.settings_of(Campaign.open(directory), db), out)
    say(as_json, {"backup": str(out.absolute()), "bytes": out.stat().st_size}, f"{out}: {out.stat().st_size} bytes")


@app.command()
def restore(
    source: Annotated[Path, typer.Argument(help="A file that `swarm backup` wrote.")],
    directory: OfCampaign = Path(),
    db: Database = None,
    as_json: Json = False,
) -> None:
    """Bring a coordinator back from a backup; machines then send again what came after it."""
    from . import backup as backups
    from . import lock, serving

    settings = serving.settings_of(Campaign.open(directory), db)
    with lock.only_one(settings.state, settings.database):
        backups.restore(settings, source)
    say(as_json, {"restored": str(settings.state)}, f"restored to {settings.state}; next: swarm serve {directory}")


if __name__ == "__main__":
    main()
