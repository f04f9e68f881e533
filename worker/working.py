"""`swarm worker URL`: one machine of a swarm, from registration to the last push."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from shared import wire
from shared.client import Away, CoordinatorClient, Rejected
from shared.errors import BadInput, Refused, SwarmError
from shared.git import GitError, Repo, http_environment
from shared.prepare.constants import PROFILES
from shared.prepare.data import EMBEDDED
from shared.prepare.download import CLIMBMIX, Source, fetch
from shared.prepare.errors import DataError
from shared.prepare.packing import tokenizer_folder
from shared.prepare.run_environment import cache_root
from shared.prepare.tokenizer import Tokenizer
from shared.wire import Activity, Kind, Registered, Registration

from . import reporting
from .campaign import Campaign
from .home import Identity, Membership
from .journal import Experiment
from .loop import BaselineFailed, Screen
from .machine import MachineProfile, slug
from .member import Member, Outbox, Remote, superseded
from .proposers.search import Search
from .results import Standing
from .runner import Progress, end_strays
from .setup import Bar, Setup, locked
from .slot import hold

RETRY_S = (1.0, 15.0)  #: first and longest wait for a coordinator that was never met
LOCK_POLL_S = 0.2
#: In git's words, an answer that stays: a 401 (git may not ask for a name), any other but "later", no repository.
NO_FROM_HUB = re.compile(r"could not read Username|returned error: (?!429|5)|repository '.*' not found|Remote branch")
#: And a coordinator that is not there, or no longer: no connection, "later", or a line that breaks in the middle.
LINE_BROKE = re.compile(r"unable to access|RPC failed|hung up|early EOF|unexpected disconnect")
CAN = (Kind.EXPLORE, Kind.CONFIRM)  #: the kinds of assignment that this version runs

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A coordinator, and this machine's place with it."""

    client: CoordinatorClient
    identity: Identity
    machine: MachineProfile
    join_token: str | None  #: given by a person, for the first registration or where ours is no longer known


class _Stopped(Exception):
    """A person ended the worker while it was still being set up."""


class _Told:
    """A screen that also tells the coordinator what it sees."""

    def __init__(self, screen: Screen, tell: Callable[[Activity], None]) -> None:
        self._screen, self._tell = screen, tell
        self._now = Activity(state="running")

    def started(self, experiment: Experiment) -> None:
        self._now = Activity(
            state="running",
            experiment=UUID(experiment.id),
            number=experiment.number,
            description=experiment.description[:2000],
        )
        self._tell(self._now)
        self._screen.started(experiment)

    def progress(self, progress: Progress) -> None:
        share = None if progress.share is None else min(progress.share, 1.0)
        seen = {"seconds": progress.seconds, "step": progress.step, "share": share, "loss": _finite(progress.loss)}
        self._tell(self._now.model_copy(update=seen))
        self._screen.progress(progress)

    def decided(self, experiment: Experiment, standing: Standing | None) -> None:
        self._now = Activity(state="waiting")
        self._tell(self._now)
        self._screen.decided(experiment, standing)

    def note(self, text: str) -> None:
        self._screen.note(text)


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None


def work(
    url: str, token: str | None, home: Path, machine: MachineProfile, screen: Screen, stop: threading.Event, bar: Bar
) -> None:
    """Until `stop`. Raises Refused when another worker has the slot or this machine was taken over, BadInput when the
    campaign cannot run here."""

    def end_left() -> int:
        return sum(end_strays(None, folder / "work") for folder in _states(home, machine.name))

    def watched(stage: str, done: int, of: int) -> None:
        if stop.is_set():
            raise _Stopped
        bar(stage, done, of)

    with hold(home, machine.name, end_left) as held, contextlib.suppress(_Stopped):
        place = Place(CoordinatorClient(url), Identity.open(home, machine.name), machine, token)
        registered = _introduce(place, screen, stop)
        membership = _membership(place, registered)
        campaign = _patiently(lambda: _clone(place, membership, registered), screen, stop)
        named = replace(machine, name=membership.machine)
        _bring_data(place, campaign, watched)
        setup = Setup(campaign, named, membership.tag, inherit=(held.fd,))
        with locked(setup.state):
            _research(place, membership, registered, setup, screen, stop, watched)


def _states(home: Path, name: str) -> list[Path]:
    return [path for path in (home / slug(name)).glob("*/.swarm/*") if path.is_dir()]


def _introduce(place: Place, screen: Screen, stop: threading.Event) -> Registered | None:
    """Registers. None where the coordinator is away and this machine has the campaign already: it starts alone.

    Raises _Stopped.
    """
    known = place.identity.memberships.get(place.client.url)
    can_start_alone = known is not None and (place.identity.clone_folder(known) / ".git").is_dir()

    def meet() -> Registered | None:
        try:
            return register(place)
        except Away as error:
            if not can_start_alone:
                raise
            screen.note(f"{error}; starting alone")
            return None

    return _patiently(meet, screen, stop)


def _patiently(attempt: Callable[[], T], screen: Screen, stop: threading.Event) -> T:
    """What it returns once the coordinator is there. Raises _Stopped."""
    wait = RETRY_S[0]
    while not stop.is_set():
        try:
            return attempt()
        except Away as error:
            screen.note(f"{error}; trying again in {wait:.0f} s")
            stop.wait(wait * random.uniform(0.8, 1.2))
            wait = min(wait * 2, RETRY_S[1])
    raise _Stopped


def register(place: Place) -> Registered:
    """With this machine's own token, else with the one that a person gave. Raises Away or Rejected."""
    known = place.identity.memberships.get(place.client.url)
    registration = Registration(
        version=version("ratchet-swarm"),
        uid=place.identity.uid,
        name=place.machine.name,
        machine_class=place.machine.machine_class,
        backend="mlx" if place.machine.backend == "mlx" else "torch",
        hardware=wire.Hardware(
            host=place.machine.name,
            os=place.machine.os,
            chip=place.machine.chip,
            cores=place.machine.cores,
            memory_gb=place.machine.memory_gb,
            accelerator=place.machine.accelerator,
            accelerator_memory_gb=place.machine.accelerator_memory_gb,
        ),
        can=CAN,
    )
    place.client.incarnation = 0
    own = known.token if known else None
    place.client.token = own or place.join_token
    try:
        return place.client.register(registration)
    except Rejected as error:
        if error.status not in (401, 403) or own is None:
            raise
        place.client.token = place.join_token
        return place.client.register(registration)


def _membership(place: Place, registered: Registered | None) -> Membership:
    url = place.client.url
    if registered is None:
        membership = place.identity.memberships[url]
        place.client.token = membership.token
        return membership
    membership = Membership(
        place.client.token,
        registered.attic.rpartition("/")[2],
        registered.campaign.name,
        registered.campaign.tag,
        registered.campaign.repository,
        registered.campaign.folder,
    )
    place.identity.joined(url, membership)
    return membership


def _clone(place: Place, membership: Membership, registered: Registered | None) -> Campaign:
    """This machine's own clone of the campaign, made at the first start.

    Raises Away, Refused where the hub says no, or BadInput for another base.
    """
    folder = place.identity.clone_folder(membership)
    if not (folder / ".git").is_dir():
        for left in folder.parent.glob(f"{folder.name}.partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        # A name of its own: the git of a killed worker may still be writing to the one before.
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
        try:
            _fetch_clone(place.client, membership.repository, partial)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if registered is not None and Repo(folder).resolve("HEAD") != registered.campaign.base:
        raise BadInput(f"{folder}: is not at the campaign's base {registered.campaign.base[:12]}; move it aside")
    return Campaign.open(folder / membership.folder)


def _fetch_clone(client: CoordinatorClient, repository: str, folder: Path) -> None:
    """Raises Away, Refused, or GitError for what is wrong on this computer."""
    flags = ["--quiet", "--single-branch", "--branch", "main"]
    environment = http_environment(client.url, client.token)
    try:
        Repo(folder.parent).run("clone", *flags, client.url + repository, str(folder), environment=environment)
    except GitError as error:
        words = str(error)
        if NO_FROM_HUB.search(words):
            raise Refused(f"the hub refuses the campaign's code, so this machine cannot start: {words}") from None
        if LINE_BROKE.search(words) and "certificate" not in words:
            raise Away(words) from None
        raise


def _bring_data(place: Place, campaign: Campaign, bar: Bar) -> None:
    """The campaign's data as the coordinator has it: shards of a folder, and the tokenizer. What is here stays.

    Tried at every start and not needed for one: what is still missing is made by prepare, or said by it.
    """
    task = campaign.task
    if task.profile is None:
        return
    cache = cache_root(os.environ)
    try:
        with _prepare_lock(cache, bar):
            info = place.client.campaign().data
            if info is None:
                return
            where = cache / "data" / task.data
            # A link is a person's own folder: `--data` made it here, and nothing is added to that.
            if task.data not in (EMBEDDED, CLIMBMIX) and info.served and not where.is_symlink():
                source = Source(f"{place.client.data_url()}/shards", place.client.token)
                fetch(info.served, where, source, bar)
            if info.tokenizer:
                _bring_tokenizer(place.client, tokenizer_folder(cache, task.data, PROFILES[task.profile].vocab_size))
    except SwarmError:
        return
    except DataError as error:
        raise BadInput(f"data: {error}") from None


@contextlib.contextmanager
def _prepare_lock(cache: Path, bar: Bar) -> Iterator[None]:
    """The one that prepare takes: workers of several slots start together, and share a cache."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "prepare.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                bar("wait", 0, 1)
                time.sleep(LOCK_POLL_S)
        yield


def _bring_tokenizer(client: CoordinatorClient, folder: Path) -> None:
    """The tables only: what else belongs to a tokenizer is made from them, nothing unpickled comes over the wire."""
    if (folder / "ranks.json").exists():
        return
    shards, ranks = client.data("tokenizer/shards.json"), client.data("tokenizer/ranks.json")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (partial / "ranks.json").write_bytes(ranks)
        Tokenizer.load(partial).save(partial)
        (partial / "shards.json").write_text(json.dumps(json.loads(shards)))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{client.data_url()}/tokenizer: no tokenizer ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _research(
    place: Place,
    membership: Membership,
    registered: Registered | None,
    setup: Setup,
    screen: Screen,
    stop: threading.Event,
    bar: Bar,
) -> None:
    member = _member(place, membership, registered, setup, screen, stop)
    proposer = Search(setup.campaign.task, seed=zlib.crc32(setup.branch.encode()))
    member.beat()
    try:
        loop = setup.loop(proposer, _Told(screen, member.doing), stop, bar, member)
        _same_measure(setup, registered)
        member.start(setup.journal.experiments)
        try:
            loop.establish()
            if not stop.is_set():
                loop.go(None)
        finally:
            setup.journal.close()
    except SwarmError as failure:
        member.doing(Activity(state="failed", note=str(failure)[:2000]))
        member.close()
        if isinstance(failure, BaselineFailed):
            setup.undo_without_baseline()  # after its report is made; the next start runs the baseline anew
        raise
    except _Stopped:
        pass
    finally:
        member.close()
    if member.fault:
        raise superseded(member.fault)


def _member(
    place: Place,
    membership: Membership,
    registered: Registered | None,
    setup: Setup,
    screen: Screen,
    stop: threading.Event,
) -> Member:
    campaign = setup.campaign
    repo = Repo(campaign.root, membership.machine)
    logs = setup.state / "logs"
    remote = Remote(
        repo,
        place.client.url + membership.repository,
        f"refs/heads/{setup.branch}",
        setup.workspace.attic,
        lambda: setup.journal.head.kept if setup.journal.head else None,
    )
    return Member(
        place.client,
        lambda: _again(place, campaign, membership),
        registered,
        remote,
        Outbox(setup.state / "refused.jsonl"),
        lambda experiment: reporting.report(experiment, campaign.task, campaign.prefix, repo, logs),
        screen.note,
        stop,
    )


def _same_measure(setup: Setup, registered: Registered | None) -> None:
    """Raises BadInput, the set-up undone, where scores of this machine would not compare with the campaign's."""
    expected = registered.campaign.digest if registered else None
    if setup.prepared and expected and setup.prepared.digest != expected:
        setup.undo_without_baseline()
        raise BadInput(
            f"prepare's digest here is {setup.prepared.digest[:12]}, the campaign's is {expected[:12]}: scores would "
            f"not compare; remove rows and data of {setup.campaign.task.data!r} in {cache_root(os.environ)}, or "
            "upgrade so that both run the same release"
        )


def _again(place: Place, campaign: Campaign, ours: Membership) -> Registered:
    """A later registration, and its token kept. Raises Refused when another campaign has taken the address."""
    place = replace(place, identity=Identity.open(place.identity.path.parent.parent, place.machine.name))
    registered = register(place)
    now = _membership(place, registered)
    if replace(now, token=ours.token) != ours or Repo(campaign.root).resolve("HEAD") != registered.campaign.base:
        raise Refused(f"{place.client.url} has another campaign now, or this machine another place in it; start again")
    return registered
