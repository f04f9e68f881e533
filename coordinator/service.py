"""Service: one coordinator's parts, put together; what routes, hub and reaper share."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from shared import wire
from shared.task import TaskSpec
from shared.wire import CampaignInfo, DataInfo, Kind, MachineState, Registration, Role
from worker.campaign import Campaign
from worker.workspace import RESULTS

from .auth import Caller, Forbidden, Tokens
from .database import Conflict, Sanity, Study
from .hub import Access, Hub
from .members import Member
from .presence import Presence
from .settings import Settings
from .store import Store
from .stream import Stream

VERSION = version("ratchet-swarm")
PAUSE_S = 30.0  #: a paused machine asks again after so long


@dataclass(frozen=True)
class Files:
    """What is served of the campaign's data: a name in the URL, a file on disk."""

    info: DataInfo | None
    paths: Mapping[str, Path]
    digest: str | None  #: what results of the campaign's profile must be measured with


NO_FILES = Files(None, {}, None)


class Service:
    """Everything behind the routes."""

    def __init__(self, campaign: Campaign, tag: str, base: str, settings: Settings, files: Files = NO_FILES) -> None:
        """Opens database and hub. Raises BadInput when the database is another campaign's."""
        self.settings, self.files, self.task = settings, files, campaign.task
        self.unreadable: str | None = None  #: why the database could not be read the last time that the reaper tried
        self.hub_noted = False  #: whether the database says of each branch what the hub holds
        self.epoch = secrets.token_hex(8)  #: of this start
        settings.state.mkdir(parents=True, exist_ok=True)
        self.stream = Stream(self._read_events)
        self.store = Store(settings.database, self.stream.publish)
        task = campaign.task
        profile = task.profile or "default"
        self.store.begin(
            Study(task.name, tag, task.metric, task.metric_direction, profile, base, files.digest, sanity_of(task))
        )
        self.campaign = campaign
        self.tokens = Tokens(self.store, settings.state)
        self.presence = Presence(settings.heartbeat_s, settings.lease_ttl_s)
        self.presence.restarted(m.id for m in self.store.members.all() if m.state is MachineState.ONLINE)
        for lease in self.store.leases.granted():
            self.presence.granted(lease.id, lease.attempt, lease.holder_id, Kind(lease.kind))
        prefix = f"{campaign.prefix}/" if campaign.prefix else ""
        paths = tuple(prefix + name for name in (*task.mutable_files, RESULTS))
        Hub.create(settings.state / "hub.git", campaign.root, self.store.study.base)
        self.hub = Hub(settings.state / "hub.git", self.repository, paths, self._hub_access, self._pushed)

    @property
    def repository(self) -> str:
        """The campaign's name in the hub's URL."""
        return self.settings.repository

    def close(self) -> None:
        self.store.close()

    # -- who may what

    def speaker(self, caller: Caller, name: str) -> Member:
        """The machine that a call is made for; it must be the caller's own. Raises Forbidden or NotFound."""
        if caller.role is not Role.WORKER or caller.machine_id is None:
            raise Forbidden("only a machine's own token speaks for it")
        member = self.store.members.by_id(caller.machine_id)
        if name not in (wire.SELF, member.name):
            raise Forbidden(f"this token is {member.name}'s, not {name}'s")
        return member

    @staticmethod
    def current(member: Member, incarnation: int | None) -> None:
        """Raises Conflict for a call of an older start of the machine."""
        if member.state is MachineState.RETIRED:
            raise Conflict(f"{member.name} was retired", wire.RETIRED)
        if incarnation is None or incarnation > member.incarnation:
            raise Conflict(f"incarnation {incarnation} of {member.name} is not known here; register", wire.REGISTER)
        if incarnation < member.incarnation:
            raise Conflict(
                f"another worker has registered as {member.name} since (incarnation {member.incarnation}, this call "
                f"names {incarnation})",
                wire.SUPERSEDED,
            )

    def _hub_access(self, token: str | None) -> Access | None:
        caller = self.tokens.caller(token)
        if caller is None:
            return None
        if caller.role is Role.WORKER and caller.machine_id is not None:
            member = self.store.members.by_id(caller.machine_id)
            pushes: tuple[str, ...] = (member.branch, member.attic)
            if self.presence.holds(member.id, Kind.PROMOTE):
                pushes += (self.promoted,)
            return Access(True, () if member.state is MachineState.RETIRED else pushes, None, member.name)
        if caller.role is Role.ADMIN:
            return Access(True, (), wire.IMPORTED, None)
        return Access(caller.role is Role.VIEWER)

    @property
    def promoted(self) -> str:
        return f"refs/heads/{self.task.branch_prefix}/{self.store.study.tag}-promoted"

    async def _pushed(self, access: Access) -> None:
        if access.machine is not None:
            await asyncio.to_thread(self.note_push, self.store.members.named(access.machine))
        else:  # an administrator's, of imported branches
            self.hub_noted = False
            await asyncio.to_thread(self.note_pushes)

    def note_push(self, member: Member) -> None:
        """Raises StorageUnavailable; `note_pushes` makes up for it."""
        self.hub_noted = False
        refs = self.hub.refs(member.branch, member.attic)
        self.store.pushed(member, refs.get(member.branch), refs.get(member.attic))
        self.hub_noted = True

    def note_pushes(self) -> None:
        """All that the hub holds and the database does not say: of a push that a crash or a full disk cut short."""
        refs = self.hub.refs()
        stored = {branch.machine: (branch.commit, branch.attic) for branch in self.store.branches()}
        for member in self.store.members.all():
            commit, attic = refs.get(member.branch), refs.get(member.attic)
            if (commit or attic) and stored.get(member.name) != (commit or self.store.study.base, attic):
                self.store.pushed(member, commit, attic)
        self.hub_noted = True

    # -- machines

    def register(self, registration: Registration, caller: Caller) -> wire.Registered:
        """Raises Conflict for another protocol or a retired machine, Forbidden for another machine's token."""
        if registration.protocol != wire.PROTOCOL:
            older = "worker" if registration.protocol < wire.PROTOCOL else "coordinator"
            raise Conflict(
                f"the worker ({registration.version}) speaks protocol {registration.protocol}, the coordinator "
                f"({VERSION}) {wire.PROTOCOL}: upgrade the {older}"
            )
        known = self.store.members.by_uid(registration.uid)
        if caller.role is Role.WORKER and (known is None or known.id != caller.machine_id):
            raise Forbidden("this token is bound to another machine; register with a join token")
        if known is not None and known.state is MachineState.IMPORTED:
            raise Conflict(f"{known.name} is a log from elsewhere; remove this machine's state folder to join anew")
        if known is not None and known.state is MachineState.RETIRED:
            raise Conflict(f"{known.name} was retired; remove its state folder to join as a new machine", wire.RETIRED)
        member = self.store.register(registration, self.task.branch_prefix)
        token = None if caller.role is Role.WORKER else self.tokens.for_machine(member.id)
        self.presence.left(member.id)
        self.presence.arrived(member.id)
        return wire.Registered(
            machine=member.name,
            branch=member.branch,
            attic=member.attic,
            token=token,
            incarnation=member.incarnation,
            version=VERSION,
            heartbeat_s=self.presence.interval_s,
            epoch=self.epoch,
            campaign=self.info(),
        )

    def retire(self, member: Member) -> None:
        self.store.set_state(member, MachineState.RETIRED)
        self.presence.left(member.id)
        self.tokens.revoke_machine(member.id)

    def info(self) -> CampaignInfo:
        study = self.store.study
        return CampaignInfo(
            name=study.name,
            tag=study.tag,
            branch_prefix=self.task.branch_prefix,
            metric=study.metric,
            direction=study.direction,
            profile=study.profile,
            base=study.base,
            folder=self.campaign.prefix,
            repository=f"/git/{self.repository}.git",
            digest=study.digest,
            data=self.files.info,
        )

    def views(self) -> list[wire.MachineView]:
        return [
            wire.MachineView(
                name=row.name,
                state=row.state,
                machine_class=row.machine_class,
                backend=row.backend,
                branch=row.branch.removeprefix("refs/heads/"),
                hardware=row.hardware,
                version=row.version,
                incarnation=row.incarnation,
                registered_at=row.registered_at,
                seen_s=self.presence.seen_s(row.id),
                paused=row.paused,
                activity=self.presence.activity(row.id),
            )
            for row in self.store.machine_rows()
        ]

    # -- health

    def _read_events(self, after: int, limit: int) -> list[wire.Event]:
        return self.store.look.events(after, limit)

    def disk_fault(self) -> str | None:
        """Why nothing more should be written; None when there is room."""
        free = shutil.disk_usage(self.settings.state).free
        if free < self.settings.limits.free_bytes:
            return f"the coordinator's disk is full: {free // 2**20} MiB left"
        return None

    def fault(self) -> str | None:
        """What is wrong with storage now, in words."""
        return self.disk_fault() or self.store.writer.fault or self.unreadable

    def assignment(self, member: Member) -> wire.Explore | wire.Confirm | wire.Replay | wire.Promote:
        """What a machine should do next: a lease that waits for it, else explore."""
        if member.paused:
            return wire.Explore(wait_s=PAUSE_S)
        if not self.store.leases.has_work_for(member) or (granted := self.store.leases.grant(member)) is None:
            return wire.Explore()
        lease, about = granted
        self.presence.granted(lease.id, lease.attempt, member.id, Kind(lease.kind))
        reference = wire.LeaseRef(id=lease.id, attempt=lease.attempt)
        asked = {"lease": reference, "ttl_s": self.presence.ttl_s, "experiment": about.id}
        code = {name: getattr(about, name) for name in ("idea", "tested", "parent", "description")}
        match Kind(lease.kind):
            case Kind.CONFIRM:
                return wire.Confirm(**asked)
            case Kind.REPLAY:
                return wire.Replay(**asked, **code)
            case _:
                return wire.Promote(**asked, **code, rung=lease.rung)


def sanity_of(task: TaskSpec) -> Sanity:
    """The task's own bounds, else its profile's."""
    if task.sanity is not None:
        return Sanity(task.sanity.best_possible, task.sanity.largest_step)
    if task.profile in ("h100", "apple"):
        return Sanity(best_possible=0.5, largest_step=0.1)
    return Sanity()
