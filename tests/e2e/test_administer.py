"""What an administrator does from the command line, against a real coordinator."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

from shared.client import CoordinatorClient
from shared.wire import Status
from tests import fast_task
from tests.e2e.test_look import Machine, Swarm
from tests.served import served, swarm

SUSPECT = fast_task.CONFIG + "sanity: {best_possible: 0.9}\n"


def test_machines_are_paused_renamed_and_retired_and_a_suspect_is_cleared(tmp_path: Path) -> None:
    with served(fast_task.make(tmp_path / "task", SUSPECT)) as (url, _), closing(CoordinatorClient(url)) as client:
        here, machine = Swarm(url, tmp_path), Machine(url, "m1")
        assert here.look("machine", "pause", "m1") == "m1 is paused\n"
        assert client.machines()[0].paused
        assert json.loads(here.look("machine", "resume", "m1", "--json"))["paused"] is False
        assert not client.machines()[0].paused
        assert here.look("machine", "rename", "m1", "studio") == "m1 is studio from now on\n"
        assert [one.name for one in client.machines()] == ["studio"]

        machine.report(0, Status.KEEP, 1.2, "baseline")
        identity = machine.report(1, Status.KEEP, 0.1, "too good")
        assert client.experiment(str(identity)).suspect
        assert json.loads(here.look("clear", identity.hex[:12], "--json")) == {"cleared": identity.hex[:12]}
        assert not client.experiment(str(identity)).suspect
        assert client.leaderboard().standings[0].best == 0.1

        Machine(url, "m2")
        assert here.refused("machine", "rename", "m2", "studio") == (
            2,
            "swarm: the name 'studio' is taken; choose another",
        )
        code, line = here.refused("machine", "pause", "nobody")
        assert code == 2 and "nobody" in line
        assert here.refused("clear", "abcdabcd")[0] == 2

        assert here.look("machine", "retire", "studio") == "studio is retired\n"
        assert {one.name: one.state for one in client.machines()} == {"m2": "online", "studio": "retired"}


def test_only_administrators_may(tmp_path: Path) -> None:
    task = fast_task.make(tmp_path / "task")
    with served(task) as (url, _):
        machine = Machine(url, "m1")
        viewer, admin = (
            swarm("token", "create", "--role", role, "--dir", task, cwd=tmp_path).stdout.strip()
            for role in ("viewer", "admin")
        )
        here = Swarm(url, tmp_path)
        for arguments in (("machine", "pause", "m1"), ("machine", "retire", "m1"), ("clear", "abcdabcd")):
            assert here.refused(*arguments)[0] == 3
            assert here.refused(*arguments, "--token", viewer)[0] == 3
        assert here.look("machine", "pause", "m1", SWARM_TOKEN=admin) == "m1 is paused\n"
        machine.client.close()
