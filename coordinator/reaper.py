"""What time brings about: silent machines go offline, leases run out, the hub is repacked, old logs go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from shared.wire import Kind, MachineState

from .service import Service
from .writer import StorageUnavailable

TICK_S = 1.0
UPKEEP_S = 3600.0

log = logging.getLogger(__name__)


async def reap(service: Service) -> None:
    """Until cancelled. Upkeep has a task of its own: leases run out also while a large hub is repacked."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_every(TICK_S, transitions, service))
        tasks.create_task(_every(UPKEEP_S, upkeep, service))


async def _every(seconds: float, work: Callable[[Service], None], service: Service) -> None:
    """A pass that fails is logged, and the next one tries again."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await asyncio.to_thread(work, service)
        except StorageUnavailable as error:
            log.warning("%s: %s", work.__name__, error)
        except Exception:
            log.exception("%s failed", work.__name__)


def transitions(service: Service) -> None:
    """Stores what presence says is due; what the database did not take is due again at the next pass."""
    store, presence = service.store, service.presence
    _look_at_storage(service)
    due = presence.due()
    for lease in due.expired:
        store.leases.give_back(lease.id, lease.attempt, "its term ran out")
        presence.forget_lease(lease)
    for machine in due.silent:
        member = store.members.by_id(machine)
        if member.state is MachineState.ONLINE:
            store.set_state(member, MachineState.OFFLINE)
        presence.forget_machine(machine)
    if not service.hub_noted:
        service.note_pushes()


def _look_at_storage(service: Service) -> None:
    """Whether it can be read, and, where the last write failed, written: nobody else may be doing either.

    A grant whose commit seemed to fail is stored all the same, perhaps: it gets its term here.
    """
    store, presence = service.store, service.presence
    try:
        for lease in store.leases.granted():
            if not presence.has_term(lease.id):
                presence.granted(lease.id, lease.attempt, lease.holder_id, Kind(lease.kind))
        service.unreadable = None
    except StorageUnavailable as error:
        service.unreadable = str(error)
        raise
    if store.writer.fault:
        store.touch()


def upkeep(service: Service) -> None:
    service.hub.repack()
    tidy(service)


def tidy(service: Service) -> None:
    """Applies the retention settings."""
    limits, members = service.settings.limits, service.store.members
    if limits.keep_logs_days is not None:
        service.store.drop_logs(int(time.time() - limits.keep_logs_days * 86400))
    if limits.keep_attic_days is not None:
        old = time.time() - limits.keep_attic_days * 86400
        aged = [members.named(b.machine) for b in service.store.branches() if b.attic and b.pushed_at < old]
        gone = [member for member in aged if member.state is not MachineState.ONLINE]
        if refs := service.hub.refs(*(member.attic for member in gone)) if gone else {}:
            service.hub.drop(refs)
            for member in gone:
                service.note_push(member)
