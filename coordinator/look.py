"""Looking at a swarm from anywhere: status, machines, leaderboard, log, show, diff, export.

Reads through the HTTP interface only, so that it works from every computer that reaches the coordinator. What agents
wrote is printed without anything that a terminal would act on.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from shared.client import Away, CoordinatorClient, Rejected, client_from
from shared.errors import AlreadyThere, BadInput
from shared.wire import Event, ExperimentRow, ExperimentView, Leaderboard, LineageStep, MachineView, Standing, Status
from worker.results import plain
from worker.terminal import Json, app, console, say

PAGE = 1000  #: rows asked for at a time; the coordinator gives no more
EVENTS = 10  #: that `status` shows
STEPS = 10  #: of its lineage that `show` shows
HOUR_S = 3600
RETRY_S = (0.5, 10.0)  #: first and longest wait for a coordinator that went away while we follow

Coordinator = Annotated[
    str | None, typer.Option("--coordinator", help="The coordinator's address.", envvar="SWARM_COORDINATOR")
]
Token = Annotated[str | None, typer.Option("--token", help="A viewer's token.", envvar="SWARM_TOKEN")]
Id = Annotated[str, typer.Argument(help="The experiment's id, or how it or its commit begins.")]

_STYLES = {"keep": "green", "crash": "red", "timeout": "red", "online": "green", "offline": "red"}
_RIGHT = {"#", "rank", "best", "gain", "sigmas", "kept", "runs", "waiting", "score", "seconds"}
_RIGHT |= {"GiB", "seed"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@contextmanager
def asking(url: str | None, token: str | None) -> Iterator[CoordinatorClient]:
    """A client for questions; what is not there, or not understood, is the person's to mend."""
    client = client_from(url, token)
    try:
        yield client
    except Rejected as error:
        if error.status in (404, 409, 422):
            raise BadInput(str(error)) from None
        raise
    finally:
        client.close()


def as_json_text(value: BaseModel | dict[str, Any] | list[Any]) -> str:
    """JSON as the coordinator writes it, but for characters that a terminal might act on: those are escaped."""
    text = value.model_dump_json() if isinstance(value, BaseModel) else json.dumps(value)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def cell(value: object, style: str = "") -> Text:
    """Text of a table, whoever wrote it."""
    return Text("-" if value is None else plain(str(value)), style=style or _STYLES.get(str(value), ""))


def table_of(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Where the terminal is narrow, the last column gives way first: it is the one with words."""
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in _RIGHT else "left", no_wrap=heading != headings[-1])
    for row in rows:
        table.add_row(*(value if isinstance(value, Text) else cell(value) for value in row))
    return table


def number(value: float | None, form: str = ".6f") -> str:
    return "-" if value is None else format(value, form)


def clock(at: int) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(at))


# -- status, machines, leaderboard


@app.command()
def status(coordinator: Coordinator = None, token: Token = None, as_json: Json = False) -> None:
    """The whole swarm at a glance: machines and what each does, the best of each class, what happened last."""
    with asking(coordinator, token) as client:
        campaign, health, machines = client.campaign(), client.health(), client.machines()
        best = [line for line in all_standings(client).standings if line.rank == 1 and line.best is not None]
        hourly = _last_hour(client, {machine.name for machine in machines if machine.state == "imported"})
        events = _last_events(client)
        url = client.url
    if as_json:
        parts: dict[str, Sequence[BaseModel]] = {"machines": machines, "best": best, "events": events}
        lists = {key: [one.model_dump(mode="json") for one in many] for key, many in parts.items()}
        facts = {"campaign": campaign.model_dump(mode="json"), "health": health, "experiments_last_hour": hourly}
        print(as_json_text(facts | lists))
        return
    better = "lower" if campaign.direction == "minimize" else "higher"
    console.print(
        cell(
            f"{campaign.name}: {campaign.metric}, {better} is better; tag {campaign.tag}, profile {campaign.profile}, "
            f"base {campaign.base[:7]}"
        )
    )
    words = f"{url}, version {health.get('version')}: {health.get('status')}"
    console.print(cell(f"{words} {health.get('storage', '')}", "green" if health.get("status") == "ok" else "red"))
    states = Counter(machine.state for machine in machines)
    counted = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none yet"
    console.print(f"\nmachines: {counted}; {hourly} experiments in the last hour")
    present = [machine for machine in machines if machine.state in ("online", "offline")]
    console.print(table_of(_MACHINE, (_machine(machine) for machine in present)))
    console.print("\nbest of each class:")
    headings = ("class", "profile", "rung", "best", "gain", "sigmas", "machine", "description")
    console.print(table_of(headings, map(_best, best)))
    console.print("\nlast events:")
    console.print(table_of(("at", "event", "machine", ""), (_event(event) for event in events)))


def _best(line: Standing) -> tuple[object, ...]:
    levels = (number(line.best), number(line.gain), number(line.gain_sigmas, "+.1f"))
    return line.machine_class, line.profile, line.rung, *levels, line.machine, line.description


def all_standings(client: CoordinatorClient, limit: int | None = None, **filters: str | None) -> Leaderboard:
    """The leaderboard, all pages of it, or the first `limit` lines."""
    board = client.leaderboard(limit=min(limit or PAGE, PAGE), **filters)
    while board.next is not None and (limit is None or len(board.standings) < limit):
        more = PAGE if limit is None else min(limit - len(board.standings), PAGE)
        page = client.leaderboard(limit=more, after=board.next, **filters)
        board = page.model_copy(update={"standings": board.standings + page.standings})
    return board


def _last_hour(client: CoordinatorClient, imported: set[str]) -> int:
    """Experiments decided in the last hour, by their machines' clocks; not counted: baselines, logs from elsewhere."""
    since, found, after = time.time() - HOUR_S, 0, None
    while True:
        page = client.experiments(limit=PAGE, after=after)
        recent = [row for row in page.experiments if row.decided_at >= since]
        found += sum(row.number > 0 and row.machine not in imported for row in recent)
        if not recent or page.next is None:
            return found
        after = page.next


def _last_events(client: CoordinatorClient) -> list[Event]:
    last = client.last_event()
    count = min(last, EVENTS)
    return list(itertools.islice(client.events(after=last - count), count)) if count else []


def _event(event: Event) -> tuple[object, ...]:
    data = dict(event.data)
    if event.kind in ("experiment", "revised"):
        words = f"#{data.get('number')} {data.get('status')} {number(data.get('score'))} {data.get('description')}"
    else:
        pairs = ((key, number(v) if isinstance(v, float) else v) for key, v in data.items() if v is not None)
        words = " ".join(f"{key} {value}" for key, value in pairs)
    return clock(event.at), event.kind, event.machine, words


_MACHINE = ("machine", "class", "state", "seen", "waiting", "now")


def _machine(machine: MachineView) -> tuple[object, ...]:
    seen = "-" if machine.seen_s is None else f"{machine.seen_s:.0f} s ago"
    waiting = "-" if machine.activity is None else machine.activity.outbox
    state = cell("paused", "yellow") if machine.paused else cell(machine.state)
    return machine.name, machine.machine_class, state, seen, waiting, _doing(machine)


def _doing(machine: MachineView) -> str:
    if (now := machine.activity) is None:
        return "-"
    words = [str(now.state)]
    if now.number is not None:
        words.append(f"#{now.number} {now.description}")
    if now.seconds is not None:
        words.append(f"{now.seconds:.0f} s")
    if now.share is not None:
        words.append(f"{100 * now.share:.0f} %")
    if now.loss is not None:
        words.append(f"loss {now.loss:.4f}")
    return "  ".join([*words, *([now.note] if now.note else [])])


@app.command()
def machines(coordinator: Coordinator = None, token: Token = None, as_json: Json = False) -> None:
    """Every machine: what it is, whether it is there, what it does now."""
    with asking(coordinator, token) as client:
        found = client.machines()
    if as_json:
        print(as_json_text([machine.model_dump(mode="json") for machine in found]))
        return
    rows = (
        (*_machine(machine), machine.hardware.accelerator or machine.hardware.chip, machine.branch, machine.version)
        for machine in found
    )
    console.print(table_of((*_MACHINE, "hardware", "branch", "version"), rows))


@app.command("leaderboard")
def show_leaderboard(
    machine_class: Annotated[str | None, typer.Option("--class", help="Only this machine class.")] = None,
    profile: Annotated[str | None, typer.Option(help="Only this profile.")] = None,
    rung: Annotated[str | None, typer.Option(help="Only this rung.")] = None,
    machine: Annotated[str | None, typer.Option(help="Only this machine.")] = None,
    order: Annotated[
        Literal["group", "sigmas"],
        typer.Option(help="Best first within class, profile and rung; or by gain in the machine's own sigmas."),
    ] = "group",
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="So many lines; all if left out.")] = None,
    coordinator: Coordinator = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Where every machine stands."""
    filters = {"machine_class": machine_class, "profile": profile, "rung": rung, "machine": machine, "order": order}
    with asking(coordinator, token) as client:
        board = all_standings(client, limit, **filters)
    if as_json:
        print(as_json_text(board))
        return
    places = {(line.profile, line.rung) for line in board.standings}
    several = len(places) > 1
    headings = (*_STANDING[:3], *(("profile", "rung") if several else ()), *_STANDING[3:])
    console.print(table_of(headings, (_standing(line, several) for line in board.standings)))
    better = "lower" if board.direction == "minimize" else "higher"
    how = "best first within class, profile and rung" if order == "group" else "by gain in own sigmas"
    where = "" if several else "".join(f"; profile {profile}, rung {rung}" for profile, rung in places)
    console.print(cell(f"{board.campaign}: {board.metric}, {better} is better; {how}{where}", "dim"))


_STANDING = ("rank", "machine", "class", "best", "gain", "sigmas", "confirmed", "kept", "commit", "description")


def _standing(line: Standing, several: bool) -> tuple[object, ...]:
    """`several`: profiles and rungs, so each line names its own."""
    place = (line.rank, line.machine, line.machine_class, *((line.profile, line.rung) if several else ()))
    levels = (number(line.best), number(line.gain), number(line.gain_sigmas, "+.1f"))
    suspects = f", {line.suspects} suspect" if line.suspects else ""
    confirmed, commit = "yes" if line.confirmed else "no", line.commit[:7] if line.commit else None
    return *place, *levels, confirmed + suspects, f"{line.keeps}/{line.experiments}", commit, line.description


# -- log


@app.command()
def log(
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="The latest so many.")] = 20,
    machine: Annotated[str | None, typer.Option(help="Only this machine's.")] = None,
    status: Annotated[list[Status] | None, typer.Option(help="Only of this status; may be said again.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with each that comes, until Ctrl-C.")] = False,
    coordinator: Coordinator = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """The latest experiments, newest first; with --follow in the order they come. With --json, one object a line."""
    filters: dict[str, Any] = {"machine": machine, "status": [str(one) for one in status or []] or None}
    with asking(coordinator, token) as client:
        rows = _latest(client, limit, filters)
        for row in reversed(rows[:limit]) if follow else rows[:limit]:
            _show_row(row, as_json)
        if follow:
            with suppress(KeyboardInterrupt):  # that is how following ends
                follow_from(client, rows[0].position if rows else None, filters, lambda row: _show_row(row, as_json))


def _latest(client: CoordinatorClient, limit: int, filters: dict[str, Any]) -> list[ExperimentRow]:
    """Newest first; one row at least, where there is one: it says where following begins."""
    wanted, rows, after = max(limit, 1), list[ExperimentRow](), None
    while len(rows) < wanted:
        page = client.experiments(**filters, limit=min(wanted - len(rows), PAGE), after=after)
        rows += page.experiments
        if (after := page.next) is None:
            break
    return rows


def follow_from(
    client: CoordinatorClient, after: int | None, filters: dict[str, Any], show: Callable[[ExperimentRow], None]
) -> None:
    """Shows each experiment after a position once, in order, for ever; waits while the coordinator is away.

    The stream only says when to look; what is shown comes from the list, from the last position on, and the list is
    looked at again whenever the line stands anew. So nothing is missed or doubled, however often it breaks.
    NOT covered: a coordinator that comes back from a backup gives positions anew.
    """
    last, wait, said = after, RETRY_S[0], False
    early: set[str] = set()  # shown before their event came

    def catch_up() -> None:
        nonlocal last
        following = last
        while True:
            page = client.experiments(**filters, order="oldest", after=following, limit=PAGE)
            for row in page.experiments:
                show(row)
                last = row.position
                early.add(str(row.id))
            if (following := page.next) is None:
                return

    def opened() -> None:
        nonlocal wait, said
        wait, said = RETRY_S[0], False
        early.clear()
        catch_up()

    while True:
        try:
            for event in client.events(opened=opened):
                identity = str(event.data.get("id"))
                if event.kind == "experiment" and identity not in early:
                    catch_up()
                early.discard(identity)
        except Away as error:
            if not said:
                print(f"swarm: {error}; waiting for it", file=sys.stderr, flush=True)
            said = True
        time.sleep(wait)
        wait = min(2 * wait, RETRY_S[1])


def _show_row(row: ExperimentRow, as_json: bool) -> None:
    if as_json:
        print(as_json_text(row), flush=True)
        return
    place = f"{clock(row.decided_at)}  {row.id.hex[:8]}  {row.machine:<16} {row.number:>5}"
    flags = "".join(f" [{word}]" for word, is_set in (("confirmed", row.confirmed), ("suspect", row.suspect)) if is_set)
    text = f"{place}  {number(row.score):>10}  {row.status:<8} {plain(row.description)}{flags}"
    console.print(Text(text, style=_STYLES.get(row.status, "")), Text(f"({plain(row.reason)})", style="dim"))


# -- one experiment


@app.command()
def show(identity: Id, coordinator: Coordinator = None, token: Token = None, as_json: Json = False) -> None:
    """All that is known of one experiment: the decision and why, its runs, where it comes from."""
    with asking(coordinator, token) as client:
        view = client.experiment(experiment_id(identity))
        lineage = _lineage(client, view.kept or view.parent)
        metric = client.campaign().metric
    if as_json:
        steps = [step.model_dump(mode="json") for step in lineage]
        print(as_json_text(view.model_dump(mode="json") | {"lineage": steps}))
        return
    _show_page(view, lineage, metric)


def experiment_id(identity: str) -> str:
    if not re.fullmatch(r"[0-9A-Fa-f-]{4,40}", identity):
        raise BadInput(f"{plain(identity)!r}: give an experiment's id, or 4 characters or more of it or of its commit")
    return identity


def _lineage(client: CoordinatorClient, commit: str) -> list[LineageStep]:
    """Newest first; empty where no machine kept this commit (a base)."""
    try:
        return client.lineage(commit)
    except Rejected as error:
        if error.status == 404:
            return []
        raise


def _show_page(view: ExperimentView, lineage: list[LineageStep], metric: str) -> None:
    console.print(cell(f"#{view.number} on {view.machine} ({view.machine_class}): {view.description}", "bold"))
    flags = [word for word, is_set in (("confirmed", view.confirmed), ("suspect", view.suspect)) if is_set]
    decision = f"{', '.join([view.status, *flags])}: {view.reason or 'no reason given'}"
    console.print(cell(decision, _STYLES.get(view.status, "")))
    facts: dict[str, object] = {
        metric: number(view.score) + (f", mean of {view.runs} runs {number(view.mean)}" if view.runs > 1 else ""),
        "memory": f"{view.memory_gb:.1f} GiB",
        "seconds": f"{view.seconds:.1f}",
        "kind": f"{view.kind}, profile {view.profile}, rung {view.rung}",
        "edits": ", ".join(f"{name} = {value}" for name, value in view.edits.items()) or "-",
        "proposer": view.proposer or "-",
        "decided": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(view.decided_at)),
        "id": view.id,
        "idea": view.idea,
        "tested": view.tested,
        "kept": view.kept,
        "parent": view.parent,
        "code": view.code_state[:16] or "-",
        "digest": (view.digest or "-")[:16],
        "diff": f"swarm diff {view.id.hex[:8]}" if view.has_diff else "none",
    }
    facts_table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in facts.items():
        facts_table.add_row(cell(name, "dim"), cell(value))
    console.print(facts_table)
    if view.run_reports:
        console.print("\nruns:")
        console.print(table_of(("seed", "score", "GiB", "seconds", "ended", "metrics"), map(_run, view.run_reports)))
    if lineage:
        console.print("\nlineage, newest first:")
        console.print(table_of(("commit", "machine", "score", "description"), map(_step, lineage[:STEPS])))
        if len(lineage) > STEPS:
            console.print(f"and {len(lineage) - STEPS} more")
    if view.log_tail:
        console.print("\nend of its log:")
        for line in view.log_tail.splitlines()[-50:]:
            console.print(cell(line, "dim"))


def _run(run: Any) -> tuple[object, ...]:
    metrics = " ".join(f"{name} {value:g}" for name, value in run.metrics.items())
    ended = f"{run.status}: {run.reason}" if run.status else "-"
    return run.seed, number(run.score), f"{run.memory_gb:.1f}", f"{run.seconds:.1f}", ended, metrics or "-"


def _step(step: LineageStep) -> tuple[object, ...]:
    return step.commit[:7], step.machine, number(step.score), step.description


@app.command()
def diff(identity: Id, coordinator: Coordinator = None, token: Token = None, as_json: Json = False) -> None:
    """An experiment's patch, as `git apply` takes it."""
    with asking(coordinator, token) as client:
        patch = client.diff(experiment_id(identity))
        view = client.experiment(identity) if as_json else None
    if view is not None:
        print(as_json_text({"id": str(view.id), "diff": patch}))
    elif not patch:
        print("swarm: it has no diff: a baseline, a log from elsewhere, or one too large to send", file=sys.stderr)
    elif sys.stdout.isatty():
        console.print(Syntax(_CONTROL.sub("�", patch), "diff", theme="ansi_dark", background_color="default"))
    else:
        sys.stdout.write(patch)


# -- export


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="File to write: .parquet, or .tsv (without diffs).")],
    coordinator: Coordinator = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Every experiment of every machine in one file."""
    form = out.suffix.removeprefix(".")
    if form not in ("parquet", "tsv"):
        raise BadInput(f"--out {out}: end it in .parquet or .tsv")
    if not out.absolute().parent.is_dir():
        raise BadInput(f"--out {out}: {out.absolute().parent} is no directory")
    if out.exists():
        raise AlreadyThere(f"{out}: exists; name another file")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with asking(coordinator, token) as client, partial.open("xb") as file:
            for chunk in client.export(form):
                file.write(chunk)
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    size = out.stat().st_size
    say(as_json, {"export": str(out.absolute()), "bytes": size}, f"{out}: {size} bytes")
