"""What time brings about: silent machines go offline, leases run out, the hub is repacked, old logs go."""

from __future__ import annotations

import asyncio
import logging
import time

from shared.wire import MachineState

from .service import Service

TICK_S = 1.0
REPACK_S = 3600.0
TIDY_S = 3600.0

log = logging.getLogger(__name__)


async def reap(service: Service) -> None:
    """Until cancelled. A pass that fails is logged, and the next one tries again."""
    repacked = tidied = time.monotonic()
    while True:
        await asyncio.sleep(TICK_S)
        try:
            await asyncio.to_thread(transitions, service)
            now = time.monotonic()
            if now - repacked > REPACK_S:
                repacked = now
                await asyncio.to_thread(service.hub.repack)
            if now - tidied > TIDY_S:
                tidied = now
                await asyncio.to_thread(tidy, service)
        except Exception:
            log.exception("a pass of the reaper failed")


def transitions(service: Service) -> None:
    """Stores what presence says is due; what the database did not take is due again at the next pass."""
    store, presence = service.store, service.presence
    due = presence.due()
    for lease in due.expired:
        store.leases.give_back(lease.id, lease.attempt, "its term ran out")
        presence.forget_lease(lease)
    for machine in due.silent:
        member = store.members.by_id(machine)
        if member.state is MachineState.ONLINE:
            store.set_state(member, MachineState.OFFLINE)
        presence.forget_machine(machine)


def tidy(service: Service) -> None:
    """Applies the retention settings."""
    limits = service.settings.limits
    if limits.keep_logs_days is not None:
        service.store.drop_logs(int(time.time() - limits.keep_logs_days * 86400))
    if limits.keep_attic_days is not None:
        old = time.time() - limits.keep_attic_days * 86400
        here = {member.name for member in service.store.members.all() if member.state is MachineState.ONLINE}
        gone = [branch.machine for branch in service.store.branches() if branch.attic and branch.pushed_at < old]
        attics = [service.store.members.named(name).attic for name in gone if name not in here]
        if refs := service.hub.refs(*attics) if attics else {}:
            service.hub.drop(refs)
            for name in gone:
                service.note_push(service.store.members.named(name))
