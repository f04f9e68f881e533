"""What an administrator does to a swarm from anywhere: pause, resume, rename or retire a machine, clear a result."""

from __future__ import annotations

from typing import Annotated

import typer

from shared.errors import BadInput
from shared.wire import MachineChange
from worker.machine import short_slug
from worker.results import plain
from worker.terminal import Json, app

from .look import Coordinator, Id, as_json_text, asking, experiment_id

machine = typer.Typer(help="One machine of a swarm; for administrators.", no_args_is_help=True)
app.add_typer(machine, name="machine")

Name = Annotated[str, typer.Argument(help="The machine, as `swarm machines` shows it.")]
Token = Annotated[str | None, typer.Option("--token", help="An administrator's token.", envvar="SWARM_TOKEN")]


@machine.command()
def pause(name: Name, coordinator: Coordinator = None, token: Token = None, as_json: Json = False) -> None:
    """Have it wait after its present experiment, until it is resumed."""
    _change(name, MachineChange(paused=True), f"{name} is paused", coordinator, token, as_json)


@machine.command()
def resume(name: Name, coordinator: Coordinator = None, token: Token = None, as_json: Json = False) -> None:
    """Have it go on."""
    _change(name, MachineChange(paused=False), f"{name} goes on", coordinator, token, as_json)


@machine.command()
def rename(
    name: Name,
    new: Annotated[str, typer.Argument(help="Its new name.")],
    coordinator: Coordinator = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show it under another name from now on; its branch keeps the old one."""
    _change(name, MachineChange(name=_name(new)), f"{name} is {new} from now on", coordinator, token, as_json)


@machine.command()
def retire(name: Name, coordinator: Coordinator = None, token: Token = None, as_json: Json = False) -> None:
    """Take it out for good: its worker stops, its token ends, its results stay."""
    with asking(coordinator, token) as client:
        client.retire(_name(name))
    print(as_json_text({"retired": name}) if as_json else f"{name} is retired")


@app.command()
def clear(identity: Id, coordinator: Coordinator = None, token: Token = None, as_json: Json = False) -> None:
    """Believe a suspect result, once you have looked at it; it counts from now on."""
    with asking(coordinator, token) as client:
        client.clear(experiment_id(identity))
    print(as_json_text({"cleared": identity}) if as_json else f"{identity} is cleared")


def _change(
    name: str, change: MachineChange, said: str, coordinator: str | None, token: str | None, as_json: bool
) -> None:
    with asking(coordinator, token) as client:
        view = client.change(_name(name), change)
    print(as_json_text(view) if as_json else said)


def _name(text: str) -> str:
    """It becomes part of an address, so nothing but a name may."""
    if short_slug(text) != text:
        raise BadInput(f"{plain(text)!r}: no machine's name; those are small letters, digits and dashes, 63 at most")
    return text
