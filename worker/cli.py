"""`swarm`: the command line. Thin: checks what was typed, calls, prints. Exit codes: shared/errors.py."""

from __future__ import annotations

import datetime
import json
import sys
import threading
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from shared import git
from shared.errors import AlreadyThere, BadInput

from . import campaign as campaigns
from . import preparing, results
from .campaign import Campaign
from .journal import Journal
from .loop import BaselineFailed
from .machine import MachineProfile, detect
from .plot import plot as draw
from .proposers.search import Search
from .screen import TerminalScreen
from .setup import Setup, latest_state, locked, propose_tag
from .terminal import DataBar, Json, app, console, say, stopping

Here = Annotated[Path, typer.Option("--dir", "-C", help="The campaign's task directory.", show_default="here")]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="The new campaign directory.")],
    source: Annotated[Path | None, typer.Option("--from", help="An existing repository to adopt as it is.")] = None,
    profile: Annotated[str | None, typer.Option(help="Constants for the hardware: h100, apple or tiny.")] = None,
    backend: Annotated[str | None, typer.Option(help="Which train template: torch.")] = None,
    data: Annotated[
        str | None, typer.Option(help="A folder of parquet shards with a `text` column, or climbmix.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a campaign: from the template, or from an existing repository (which is copied, never written to)."""
    git.check_version()
    if source is not None:
        if profile or backend or data:
            raise BadInput("--profile, --backend and --data belong to the template; with --from the repository decides")
        made = campaigns.adopt(directory, source)
    else:
        profile, backend = profile or "tiny", backend or "torch"
        campaigns.check(directory, profile, backend)
        made = campaigns.create(directory, profile, backend, preparing.data_name(data))
    say(
        as_json,
        {"directory": str(made.folder), "task": made.task.name},
        f"campaign {made.task.name!r} in {made.folder}\nnext: cd {made.folder} && swarm run",
    )


@app.command()
def prepare(
    profile: Annotated[str | None, typer.Option(help="Another profile than the task's.")] = None,
    data: Annotated[Path | None, typer.Option(help="A folder of parquet shards; its name must be the task's.")] = None,
    here: Here = Path(),
    as_json: Json = False,
) -> None:
    """Make tokenizer and packed rows for this campaign. Resumable; quick when they are there."""
    campaign = Campaign.open(here)
    task = campaign.task
    name = profile or task.profile
    if name is None:
        raise BadInput(f"{here}: this task has no `profile`, so it brings its own data; nothing to prepare")
    if data is not None and (given := preparing.register_data(data)) != task.data:
        raise BadInput(
            f"--data {data}: is {given!r}, the task's data is {task.data!r}; set `data: {given}` in the task"
        )
    made = _prepare(campaign, name)
    say(
        as_json,
        asdict(made),
        f"{made.train_rows} training rows ({made.lost_train:.1%} of the tokens lost in packing), "
        f"{made.validation_rows} validation rows ({made.lost_validation:.1%} lost)\n"
        f"rows   {made.rows}\ndigest {made.digest}",
    )


def _prepare(campaign: Campaign, profile: str) -> preparing.Prepared:
    with DataBar() as bar:
        return preparing.prepare(campaign.folder, campaign.task, profile, bar.update)


@app.command()
def run(
    experiments: Annotated[
        int | None, typer.Option(min=0, help="Stop after so many experiments; for ever if left out.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="The run's tag; by default the latest, or a new one by date.")] = None,
    name: Annotated[str | None, typer.Option(help="This machine's name; by default the host's.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before going on by itself.")] = False,
    here: Here = Path(),
) -> None:
    """Research: set up where needed, run the baseline, then try ideas until Ctrl-C. A second call resumes."""
    git.check_version()
    campaign = Campaign.open(here)
    machine = detect(name)
    if not yes and not sys.stdin.isatty():
        raise BadInput("standard input is no terminal, so nobody can be asked; say --yes to go on without asking")
    if tag is None:
        latest = latest_state(campaign, machine.name)
        tag = latest.name.removesuffix(f"-{machine.name}") if latest else None
    tag = tag or propose_tag(campaign, machine.name, datetime.date.today())
    _research(campaign, machine, tag, experiments, yes)


def _research(campaign: Campaign, machine: MachineProfile, tag: str, experiments: int | None, yes: bool) -> Setup:
    setup = Setup(campaign, machine, tag)
    stop = threading.Event()
    console.print(f"{setup.branch} on {machine.accelerator or machine.chip} ({machine.machine_class})")
    screen = TerminalScreen(console, campaign.task.sign)
    with locked(setup.state):
        with DataBar() as bar:
            proposer = Search(campaign.task, seed=zlib.crc32(setup.branch.encode()))
            loop = setup.loop(proposer, screen, stop, bar.update)
        journal = setup.journal
        screen.resume(results.levels(journal))
        if setup.prepared:
            console.print(
                f"data {campaign.task.data}: {setup.prepared.train_rows} rows, {setup.prepared.lost_train:.1%} lost"
            )
        try:
            with screen, stopping(stop):
                loop.establish()
        except BaselineFailed:
            print(journal.experiments[0].tail, file=sys.stderr)
            setup.undo_without_baseline()
            raise
        if not stop.is_set() and (yes or _approved(journal)):
            with screen, stopping(stop):
                loop.go(experiments)
        journal.close()
    if standing := results.standing(journal, campaign.task):
        console.print(_summary(standing, campaign))
    return setup


def _approved(journal: Journal) -> bool:
    """Asks once in a campaign's life (reference, set-up step 7)."""
    if journal.approved:
        return True
    if typer.confirm("The baseline is in. Go on by itself from here?", default=True):
        journal.append("approved")
        return True
    return False


def _summary(standing: results.Standing, campaign: Campaign) -> str:
    return (
        f"{campaign.task.metric} {standing.best:.6f} (mean of {standing.best_runs}), baseline {standing.baseline:.6f}, "
        f"{standing.gain_sigmas:+.1f} sigma of {standing.sigma:.4f}; "
        f"{standing.keeps} of {standing.experiments} experiments kept"
    )


def _journal(here: Path) -> tuple[Campaign, Journal, Path]:
    campaign = Campaign.open(here)
    state = latest_state(campaign, None)
    journal = Journal(state / "journal.jsonl") if state else None
    if state is None or journal is None or journal.head is None:
        raise BadInput(f"{here}: nothing has been run here yet; start with `swarm run`")
    journal.close()
    return campaign, journal, state


@app.command(name="results")
def show_results(here: Here = Path(), as_json: Json = False) -> None:
    """Every experiment so far, and where that leaves us."""
    campaign, journal, _ = _journal(here)
    standing = results.standing(journal, campaign.task)
    assert standing is not None
    if as_json:
        print(json.dumps({"standing": asdict(standing), "experiments": results.to_dicts(journal.experiments)}))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("#", "commit", campaign.task.metric, "runs", "GiB", "status", "description", "why"):
        table.add_column(column, justify="right" if column in ("#", campaign.task.metric, "runs", "GiB") else "left")
    for e in journal.experiments:
        if e.status is None:
            continue
        cells = [
            str(e.number),
            e.tested[:7],
            "-" if e.score is None else f"{e.score:.6f}",
            str(len(e.runs)),
            f"{e.runs[0].memory_gb:.1f}",
            str(e.status),
            results.one_line(e.description),
            results.plain(e.reason),
        ]
        table.add_row(*(Text(cell) for cell in cells), style="green" if e.status == "keep" else "")
    console.print(table)
    console.print(_summary(standing, campaign))


@app.command()
def plot(
    out: Annotated[Path, typer.Option(help="Where to; .png, .svg or .pdf.")] = Path("progress.png"),
    here: Here = Path(),
    as_json: Json = False,
) -> None:
    """Draw the progress picture: all experiments, keeps labelled, the running best as a staircase."""
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise BadInput(f"--out {out}: end it in .png, .svg or .pdf")
    if not out.absolute().parent.is_dir():
        raise BadInput(f"--out {out}: {out.absolute().parent} is no directory")
    campaign, journal, state = _journal(here)
    draw(journal.experiments, campaign.task, f"{campaign.task.name}, {state.name}", out)
    say(as_json, {"plot": str(out.resolve())}, f"plot {out.resolve()}")


@app.command()
def best(
    out: Annotated[Path, typer.Option(help="File to write (one mutable file), or directory (several).")],
    here: Here = Path(),
    as_json: Json = False,
) -> None:
    """Write out the best code so far."""
    campaign, journal, _ = _journal(here)
    assert journal.head is not None and journal.head.kept is not None
    repo, prefix = git.Repo(campaign.root), f"{campaign.prefix}/" if campaign.prefix else ""
    names = campaign.task.mutable_files
    one_file = len(names) == 1 and not out.is_dir()
    targets = {name: out if one_file else out / name for name in names}
    for target in targets.values():
        if target.exists():
            raise AlreadyThere(f"{target}: exists; name another file")
    for name, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(repo.show(journal.head.kept, prefix + name).encode())
    standing = results.standing(journal, campaign.task)
    assert standing is not None
    say(
        as_json,
        {"files": [str(target) for target in targets.values()], "score": standing.best, "commit": journal.head.kept},
        f"{', '.join(map(str, targets.values()))}: {campaign.task.metric} {standing.best:.6f}, {journal.head.kept[:7]}",
    )
