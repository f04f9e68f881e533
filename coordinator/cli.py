"""`swarm`: the whole command line; the coordinator's commands beside those of one machine (worker/cli.py)."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from shared.client import client_from
from shared.errors import BadInput
from worker.campaign import Campaign
from worker.cli import Json, _Bar, _stopping, app, console, run_app
from worker.machine import detect
from worker.screen import TerminalScreen

CampaignDir = Annotated[Path, typer.Argument(help="The campaign's directory, made by `swarm init`.")]
Database = Annotated[
    str | None, typer.Option("--db", help="Database URL; SQLite below the campaign if left out.", envvar="SWARM_DB")
]


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

    campaign = Campaign.open(directory)
    settings = serving.settings_of(campaign, db, Limits(keep_logs_days=keep_logs, keep_attic_days=keep_attic))
    with _Bar() as bar:
        serving.serve(
            campaign,
            serving.Address(host, port, tls_cert, tls_key),
            settings,
            bar.update,
            lambda url: print(f"coordinator of {campaign.task.name!r}: {url}", flush=True),
            lambda text: print(f"swarm: {text}", file=sys.stderr),
        )


@app.command()
def worker(
    url: Annotated[str, typer.Argument(help="The coordinator's address.")],
    name: Annotated[str | None, typer.Option(help="This machine's name; by default the host's.")] = None,
    home: Annotated[
        Path | None,
        typer.Option(help="Where this machine keeps its state.", envvar="SWARM_HOME", show_default="data folder"),
    ] = None,
    token: Annotated[str | None, typer.Option(help="A join token, for the first time.", envvar="SWARM_TOKEN")] = None,
) -> None:
    """Be one machine of a swarm, in the foreground, until Ctrl-C. Started again, it goes on where it was."""
    from worker.home import default_home
    from worker.working import work

    os.environ.pop("SWARM_TOKEN", None)  # for us, not for what we start
    stop = threading.Event()
    machine = detect(name)
    console.print(f"{machine.name} on {machine.accelerator or machine.chip} ({machine.machine_class}), for {url}")
    screen = TerminalScreen(console)
    with screen, _stopping(stop), _Bar() as bar:
        work(url.rstrip("/"), token, home or default_home(), machine, screen, stop, bar.update)


__all__ = ["BadInput", "Json", "client_from", "main"]

if __name__ == "__main__":
    main()
