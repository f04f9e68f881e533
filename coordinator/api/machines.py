"""Machines: registration, heartbeats, assignments, reports; and what administrators change."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Body, Depends

from shared import wire
from shared.wire import MAX_DIFF_BYTES, MAX_LOG_BYTES, ExperimentReport, Heartbeat, MachineState, Registration, Role

from ..auth import Caller
from ..database import Conflict, Impossible
from ..members import Member
from ..service import Service
from ..writer import StorageUnavailable
from .access import Gate
from .bodies import TooLarge, check
from .examples import HEARTBEAT, REGISTRATION, REPORT


def router(service: Service, gate: Gate) -> APIRouter:
    routes = APIRouter(tags=["machines"])
    store, presence = service.store, service.presence
    may_join = Depends(gate.role(Role.JOIN, Role.WORKER, Role.ADMIN))
    speaker = gate.speaker()

    @routes.post("/machines", status_code=201)
    def register(
        registration: Annotated[Registration, Body(examples=[REGISTRATION])], caller: Caller = may_join
    ) -> Any:
        """Joins the swarm, or comes back. The same uid is the same machine; a taken name gets a number."""
        check(registration)
        return service.register(registration, caller).model_dump(mode="json")

    @routes.get("/machines", dependencies=[gate.look])
    def machines() -> list[wire.MachineView]:
        return service.views()

    @routes.post("/machines/{name}/heartbeat", response_model=wire.HeartbeatReply)
    async def beat(heartbeat: Annotated[Heartbeat, Body(examples=[HEARTBEAT])], machine: Member = speaker) -> Any:
        """In memory only, unless the machine was offline. The reply says when to call again."""
        check(heartbeat)
        lost = presence.beat(machine.id, heartbeat)
        if machine.state is MachineState.OFFLINE:
            await asyncio.to_thread(store.set_state, machine, MachineState.ONLINE)
        return wire.HeartbeatReply(next_s=presence.interval_s, epoch=service.epoch, lost=lost, pause=machine.paused)

    @routes.post("/machines/{name}/assignment")
    def assignment(machine: Member = speaker) -> wire.Assignment:
        """What to do next. No answer in 2 s means: explore."""
        return service.assignment(machine)

    @routes.delete("/machines/{name}/leases/{lease}/{attempt}", status_code=204)
    def give_back(lease: UUID, attempt: int, machine: Member = speaker) -> None:
        """The machine cannot do it: back into the queue."""
        if presence.holds_lease(lease, attempt, machine.id):
            store.leases.give_back(lease, attempt, f"{machine.name} gave it back")
            presence.forget_lease(wire.LeaseRef(id=lease, attempt=attempt))  # once it is stored, else it runs out

    @routes.get("/machines/{name}/known")
    def known(machine: Member = speaker) -> dict[UUID, int]:
        """The version of every experiment of this machine that is stored; anything newer is to be sent (again)."""
        return store.reports.known(machine)

    @routes.put("/machines/{name}/experiments/{experiment}", response_model=wire.Accepted)
    async def report(
        experiment: UUID, report: Annotated[ExperimentReport, Body(examples=[REPORT])], machine: Member = speaker
    ) -> Any:
        """Stores a report. Idempotent: the same version twice changes nothing."""
        return await accept(service, machine, experiment, report)

    @routes.patch("/machines/{name}", dependencies=[gate.admin])
    def change(name: str, change: wire.MachineChange) -> wire.MachineView:
        """Renames it, or pauses and resumes it. Its branch keeps its name."""
        member = store.change(store.members.named(name), change)
        return next(view for view in service.views() if view.name == member.name)

    @routes.delete("/machines/{name}", status_code=204, dependencies=[gate.admin])
    def retire(name: str) -> None:
        """Takes a machine out for good: its token ends, its results stay."""
        service.retire(store.members.named(name))

    @routes.post("/import/machines", status_code=201, dependencies=[gate.admin])
    def import_machine(registration: Registration) -> dict[str, str]:
        """A machine for results from elsewhere; it is never at work here."""
        check(registration)
        known = store.members.by_uid(registration.uid)
        if known is not None and known.state is not MachineState.IMPORTED:
            raise Conflict(f"{registration.uid} is a machine of this swarm; import under a uid of its own")
        return {"machine": store.register(registration, service.task.branch_prefix, MachineState.IMPORTED).name}

    @routes.put("/import/machines/{name}/experiments/{experiment}", dependencies=[gate.admin])
    async def import_experiment(name: str, experiment: UUID, report: ExperimentReport) -> wire.Accepted:
        """A result from elsewhere, for an imported machine."""
        machine = store.members.named(name)
        if machine.state is not MachineState.IMPORTED:
            raise Impossible(f"{name} is a machine of this swarm; only imported ones take results from elsewhere")
        return await accept(service, machine, experiment, report)

    return routes


async def accept(service: Service, machine: Member, experiment: UUID, report: ExperimentReport) -> wire.Accepted:
    """Raises TooLarge, Impossible or StorageUnavailable."""
    check(report)
    for what, text, most in (("diff", report.diff, MAX_DIFF_BYTES), ("log tail", report.log_tail, MAX_LOG_BYTES)):
        if text and len(text.encode()) > most:
            raise TooLarge(f"the {what} has {len(text.encode())} bytes, {most} is the most")
    if fault := service.disk_fault():
        raise StorageUnavailable(fault)
    job = service.store.reports.job(machine, experiment, report)
    accepted = await asyncio.wrap_future(service.store.writer.submit(job))
    if accepted.closed and report.lease is not None:
        service.presence.closed(report.lease.id)
    return accepted
