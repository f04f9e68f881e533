"""What the retention settings take away, and what they leave: log tails by age, attics of machines long gone."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import update

from coordinator.reaper import tidy
from coordinator.service import Service
from coordinator.settings import Limits
from coordinator.tables import Branch, Experiment
from shared.wire import MachineState
from tests import fast_task
from tests.hosting import hosted, registration, report

DAY_S = 86400.0


def attempt(service: Service, machine: str) -> tuple[str, str]:
    """A branch and an attic as a push leaves them; (the attempt's commit, the attic's tip)."""
    member, hub = service.store.members.named(machine), service.hub.path
    base = service.store.study.base
    tree = fast_task.git(hub, "rev-parse", f"{base}^{{tree}}")
    tested = fast_task.git(hub, "commit-tree", tree, "-p", base, "-m", f"try of {machine}")
    link = fast_task.git(hub, "commit-tree", tree, "-p", base, "-p", tested, "-m", "attic")
    fast_task.git(hub, "update-ref", member.branch, base)
    fast_task.git(hub, "update-ref", member.attic, link)
    service.note_push(member)
    return tested, link


def days_pass(service: Service, days: float) -> None:
    """For everything that is stored now."""
    then = int(time.time() - days * DAY_S)
    service.store.writer.call(lambda t: t.connection.execute(update(Branch).values(pushed_at=then)))
    service.store.writer.call(lambda t: t.connection.execute(update(Experiment).values(received_at=then)))
    for path in (service.hub.path / "objects").rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


def base_of(service: Service) -> str:
    return service.store.study.base


def holds(service: Service, commit: str) -> bool:
    asked = subprocess.run(["git", "cat-file", "-e", commit], cwd=service.hub.path, capture_output=True, check=False)
    return asked.returncode == 0


def test_attics_of_machines_that_left_long_ago_go_and_nothing_else(tmp_path: Path) -> None:
    with hosted(tmp_path, limits=Limits(free_bytes=0, keep_attic_days=30)) as service:
        for name in ("here", "gone", "lately"):
            service.store.register(registration(name), "autoresearch")
        attempts = {name: attempt(service, name)[0] for name in ("here", "gone")}
        days_pass(service, 31)
        attempts["lately"] = attempt(service, "lately")[0]
        for name in ("gone", "lately"):
            service.store.set_state(service.store.members.named(name), MachineState.OFFLINE)
        tidy(service)
        assert {name: holds(service, commit) for name, commit in attempts.items()} == {
            "here": True,
            "gone": False,
            "lately": True,
        }
        branches = {branch.machine: branch for branch in service.store.branches()}
        assert branches["gone"].attic is None
        assert branches["gone"].commit == service.store.study.base
        assert branches["here"].attic and branches["lately"].attic
        assert fast_task.git(service.hub.path, "fsck", "--connectivity-only") == ""
        tidy(service)  # nothing is left to do
        here = service.store.members.named("here").attic
        service.hub.drop({here: base_of(service)})  # it has moved since somebody looked
        assert here in service.hub.refs()
        again, _ = attempt(service, "gone")  # it comes back
        assert holds(service, again)


@pytest.mark.parametrize(("days", "kept"), [(10.0, False), (40.0, True), (None, True)])
def test_log_tails_go_by_age(tmp_path: Path, days: float | None, kept: bool) -> None:
    with hosted(tmp_path, limits=Limits(free_bytes=0, keep_logs_days=days)) as service:
        member = service.store.register(registration("m"), "autoresearch")
        old, new = uuid.uuid4(), uuid.uuid4()
        store = service.store
        store.writer.call(store.reports.job(member, old, report(1, log_tail="step 1")))
        days_pass(service, 30)
        store.writer.call(store.reports.job(member, new, report(2, log_tail="step 2")))
        tidy(service)
        assert store.look.experiment(new).log_tail == "step 2"
        assert store.look.experiment(old).log_tail == ("step 1" if kept else "")
        assert store.look.experiment(old).score == 1.5


def test_nothing_goes_by_default(tmp_path: Path) -> None:
    with hosted(tmp_path) as service:
        service.settings = replace(service.settings, limits=Limits(free_bytes=0))
        member = service.store.register(registration("m"), "autoresearch")
        tested, _ = attempt(service, "m")
        service.store.set_state(member, MachineState.RETIRED)
        days_pass(service, 3650)
        tidy(service)
        assert holds(service, tested)
