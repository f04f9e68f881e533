"""The command: a session's experiments and its branch, sent to a coordinator."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated
from uuid import NAMESPACE_URL, UUID, uuid5

import typer
from pydantic import ValidationError

from shared import wire
from shared.client import CoordinatorClient, Rejected, client_from, request_of
from shared.errors import BadInput, Refused
from shared.git import GitError, Repo, http_environment
from shared.wire import CampaignInfo, ExperimentReport, Hardware, Registration, RunReport, Status
from worker.machine import short_slug
from worker.reporting import fingerprint
from worker.results import plain
from worker.terminal import DataBar, Json, app, say

from ..look import Coordinator, Token
from .branch import Branch
from .log import of_log
from .session import Attempt, Session

ORIGIN = uuid5(NAMESPACE_URL, "urn:swarm:import")


@dataclass(frozen=True)
class Labels:
    """What a person says of a session."""

    name: str | None
    machine_class: str | None
    profile: str | None


@dataclass(frozen=True)
class Imported:
    """What became of a session."""

    machine: str
    best: float | None  #: as the leaderboard has it
    keeps: int  #: the baseline counted
    tried: int  #: as the leaderboard counts: without the baseline
    improvements: int  #: keeps as the leaderboard counts them: without the baseline
    new: int  #: that were not there before
    refused: tuple[str, ...]


def registration_of(session: Session, labels: Labels) -> Registration:
    """Without a class it gets one of its own: nothing says that its scores compare with others'."""
    name = short_slug(labels.name or session.name)
    machine_class = labels.machine_class or name
    return request_of(
        Registration,
        version=version("ratchet-swarm"),
        uid=uuid5(ORIGIN, session.origin),
        name=name,
        machine_class=machine_class,
        backend="mlx" if machine_class.startswith("mlx") else "torch",
        hardware=Hardware(),
        can=(),
    )


def report_of(attempt: Attempt, uid: UUID, number: int, profile: str) -> tuple[UUID, ExperimentReport]:
    """Its id and report. Raises ValidationError for what no report can say."""
    identity = uuid5(uid, attempt.key)
    ran = attempt.score is not None or attempt.status is Status.CRASH
    run = RunReport(
        id=uuid5(identity, "run"),
        seed=0,
        score=attempt.score,
        status=Status.CRASH if attempt.status is Status.CRASH else None,
        memory_gb=attempt.memory_gb,
    )
    return identity, ExperimentReport(
        version=attempt.version,
        number=number,
        idea=uuid5(identity, "idea"),
        fingerprint=fingerprint({}, attempt.diff) if attempt.diff else "",
        profile=profile,
        tested=attempt.tested,
        parent=attempt.parent,
        kept=attempt.kept,
        description=attempt.description,
        proposer="import",
        nodes_added=attempt.nodes_added,
        code_state=attempt.code_state,
        status=attempt.status,
        reason=attempt.reason,
        decided_at=attempt.at,
        runs=(run,) if ran else (),
        diff=attempt.diff or None,
    )


def send(
    client: CoordinatorClient,
    campaign: CampaignInfo,
    session: Session,
    labels: Labels,
    progress: Callable[[str, int, int], None],
) -> Imported:
    """Raises Rejected where this caller may not import at all; a refusal of one experiment is part of the answer."""
    registration = registration_of(session, labels)
    profile = labels.profile or campaign.profile
    machine = client.import_machine(registration)
    refused: list[str] = []
    if session.branch is not None:
        repo, tip = session.branch
        refused += _push(repo, f"{tip}:{wire.IMPORTED}{machine}", client, campaign)
    new = 0
    for index, attempt in enumerate(session.attempts):
        number = session.first + index
        try:
            identity, report = report_of(attempt, registration.uid, number, profile)
            new += client.import_experiment(machine, identity, report).stored
        except (Rejected, ValidationError) as error:
            if isinstance(error, Rejected) and error.status in (401, 403):
                raise
            words = str(error) if isinstance(error, Rejected) else error.errors()[0]["msg"]
            refused.append(f"#{number} {attempt.tested[:7]} {plain(attempt.description)[:60]}: {words}")
        progress("import", index + 1, len(session.attempts))
    board = client.leaderboard(machine=machine, profile=profile).standings
    first = client.experiments(machine=machine, profile=profile, order="oldest", limit=1).experiments
    baseline = sum(row.number == 0 and row.status is Status.KEEP for row in first)
    tried, kept = (board[0].experiments, board[0].keeps) if board else (0, 0)
    return Imported(machine, board[0].best if board else None, kept + baseline, tried, kept, new, tuple(refused))


def _push(repo: Repo, what: str, client: CoordinatorClient, campaign: CampaignInfo) -> list[str]:
    """Its commits to the hub; why not, where it refused."""
    how = ("push", "--quiet", "--no-follow-tags", "--no-signed", "--recurse-submodules=no")
    try:
        environment = http_environment(client.url, client.token)
        repo.run(*how, client.url + campaign.repository, what, environment=environment)
    except GitError as error:
        return [f"the branch: {plain(str(error))}"]
    return []


@app.command("import")
def import_session(
    path: Annotated[Path, typer.Argument(help="A results.tsv, or a git repository with an autoresearch branch.")],
    name: Annotated[str | None, typer.Option(help="The machine's name; by default the file's or the branch's.")] = None,
    machine_class: Annotated[
        str | None, typer.Option("--class", help="What it ran on, e.g. cuda-h100; a class of its own if left out.")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="The profile it ran with; the campaign's if left out.")] = None,
    branch: Annotated[str | None, typer.Option(help="Which branch; by default the one checked out.")] = None,
    coordinator: Coordinator = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Bring in a session that was run elsewhere, as a machine of its own. Doing it again adds only what is new."""
    if not path.exists():
        raise BadInput(f"{path}: no such file or directory")
    if branch is not None and path.is_file():
        raise BadInput(f"--branch {branch}: {path} is a file, it has no branches")
    client = client_from(coordinator, token)
    try:
        with DataBar() as bar:
            campaign = client.campaign()
            if path.is_file():
                session = of_log(path, campaign.metric)
            else:
                session = Branch(path, branch, campaign.metric).session(bar.update)
            done = send(client, campaign, session, Labels(name, machine_class, profile), bar.update)
    finally:
        client.close()
    facts = asdict(done) | {"experiments": len(session.attempts)}
    baseline = done.keeps - done.improvements
    counted = "the baseline among them; " if baseline else "no baseline; "
    best = "no best" if done.best is None else f"best {done.best:.6f}"
    say(
        as_json,
        facts,
        f"{len(session.attempts)} experiments, {done.keeps} keeps, {best} as machine {done.machine}\n"
        f"({counted}the leaderboard counts {done.improvements} keeps of {done.tried} tried; {done.new} were new here)",
    )
    for words in done.refused:
        print(f"refused: {words}", file=sys.stderr)
    if done.refused:
        raise Refused(f"{len(done.refused)} of {path} refused; the rest is in")
