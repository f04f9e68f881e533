"""The whole swarm as its users run it: real coordinator, real workers, real git, on a task that takes milliseconds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from shared import wire
from shared.client import CoordinatorClient, Rejected
from shared.wire import Kind, LeaseOrder, LeaseState, MachineState
from tests import fast_task
from tests.conftest import ROOT
from tests.served import command, environment, served, stop, swarm
from worker.journal import Journal

QUICK = {"SWARM_HEARTBEAT_S": "0.3", "SWARM_LEASE_S": "3"}


def until(condition: Callable[[], object], what: str, patience_s: float = 60.0) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, f"waited {patience_s:.0f} s for {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def worker(url: str, name: str, home: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    home.mkdir(exist_ok=True)
    with (home / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command("worker", url, "--name", name, "--home", home),
            env=environment(more),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    return fast_task.make(tmp_path / "task")


def tried(client: CoordinatorClient, machine: str) -> int:
    return sum(s.experiments for s in client.leaderboard(machine=machine).standings)


def journal_of(home: Path, name: str) -> Journal:
    (state,) = (home / name).glob("*/.swarm/*")
    return Journal(state / "journal.jsonl")


def test_two_machines_are_on_one_leaderboard_and_one_hub(campaign: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with served(campaign, env=QUICK) as (url, _):
        client = CoordinatorClient(url)
        with worker(url, "anna", home), worker(url, "ben", home):
            until(lambda: min(tried(client, "anna"), tried(client, "ben")) >= 8, "8 experiments on each")
            until(lambda: any(m.activity and m.activity.experiment for m in client.machines()), "an activity")
        board = client.leaderboard()
        assert [s.machine for s in board.standings] == [
            s.machine for s in sorted(board.standings, key=lambda s: s.best or 9)
        ]
        clone = tmp_path / "clone"
        fast_task.git(tmp_path, "clone", "--quiet", f"{url}/git/fast.git", str(clone))
        branches = fast_task.git(clone, "branch", "--remotes", "--format=%(refname:short)").split()
        for name in ("anna", "ben"):
            journal = journal_of(home, name)
            decided = {e.id: e for e in journal.experiments if e.status is not None}
            stored = {str(e.id): e for e in client.experiments(machine=name, limit=1000).experiments}
            assert stored.keys() == decided.keys()
            for identity, experiment in decided.items():
                assert (stored[identity].score, stored[identity].status) == (experiment.score, experiment.status)
            branch = journal.setup["branch"]
            assert f"origin/{branch}" in branches
            assert fast_task.git(clone, "rev-parse", f"origin/{branch}") == journal.commit
            standing = next(s for s in board.standings if s.machine == name)
            assert standing.commit == journal.commit
            assert standing.best == pytest.approx(journal.best().level(_policy()))
        attempt = next(e for e in client.experiments(status="discard").experiments)
        fast_task.git(clone, "fetch", "--quiet", "origin", attempt.tested)
        assert str(attempt.id) in fast_task.git(clone, "log", "-1", "--format=%B", attempt.tested)
        patch = client.diff(str(attempt.id))
        fast_task.git(clone, "checkout", "--quiet", attempt.parent)
        subprocess.run(["git", "apply", "--check"], cwd=clone, input=patch, text=True, check=True)


def _policy() -> object:
    from worker.ratchet import Policy

    return Policy()


def test_equal_names_on_two_computers_are_told_apart(campaign: Path, tmp_path: Path) -> None:
    with served(campaign, env=QUICK) as (url, _):
        client = CoordinatorClient(url)
        with worker(url, "mac", tmp_path / "one"), worker(url, "mac", tmp_path / "two"):
            until(lambda: {m.name for m in client.machines()} == {"mac", "mac-2"}, "both machines")
            until(lambda: len(client.branches()) == 2, "both branches")
        assert len({branch.ref for branch in client.branches()}) == 2


def test_a_second_worker_on_a_slot_is_refused(campaign: Path, tmp_path: Path) -> None:
    with served(campaign, env=QUICK) as (url, _):
        client = CoordinatorClient(url)
        with worker(url, "mac", tmp_path / "home"):
            until(lambda: tried(client, "mac") > 0, "an experiment")
            second = swarm("worker", url, "--name", "mac", "--home", tmp_path / "home", cwd=tmp_path)
    assert second.returncode == 3
    assert second.stderr.startswith("swarm: slot mac: worker ")


def test_a_retired_machine_stops(campaign: Path, tmp_path: Path) -> None:
    with served(campaign, env=QUICK) as (url, _):
        client = CoordinatorClient(url)
        with worker(url, "mac", tmp_path / "home") as process:
            until(lambda: tried(client, "mac") > 0, "an experiment")
            client.retire("mac")
            assert process.wait(60) == 3
        assert client.machines()[0].state is MachineState.RETIRED
        again = swarm("worker", url, "--name", "mac", "--home", tmp_path / "home", cwd=tmp_path)
    assert again.returncode == 3
    assert "retired" in again.stderr


def test_a_worker_starts_alone_and_delivers_when_the_coordinator_is_back(campaign: Path, tmp_path: Path) -> None:
    home, port = tmp_path / "home", str(free_port())
    with served(campaign, "--port", port, env=QUICK) as (url, _):
        client = CoordinatorClient(url)
        with worker(url, "mac", home):
            until(lambda: tried(client, "mac") > 1, "experiments")
    before = len(journal_of(home, "mac").experiments)
    with worker(url, "mac", home) as process:
        until(lambda: len(journal_of(home, "mac").experiments) > before + 3, "research without a coordinator")
        with served(campaign, "--port", port, env=QUICK):
            until(lambda: tried(client, "mac") > before + 3, "what was found alone")
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            decided = {e.id for e in journal_of(home, "mac").experiments if e.status is not None}
            assert {str(e.id) for e in client.experiments(limit=1000).experiments} == decided


def test_a_lease_of_a_killed_worker_returns_and_is_done_by_its_next_start(campaign: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with served(campaign, env=QUICK) as (url, _):
        client = CoordinatorClient(url)
        with worker(url, "mac", home):
            until(lambda: tried(client, "mac") > 1, "experiments")
        about = client.experiments(status="discard").experiments[0]
        lease = client.queue(LeaseOrder(kind=Kind.CONFIRM, experiment=about.id))
        with worker(url, "mac", home, NAP="600") as process:  # a run that does not end
            until(lambda: _lease(client, lease).state is LeaseState.GRANTED, "the grant")
            until(lambda: _runs(home), "its run")
            process.kill()
            process.wait()
        until(lambda: _lease(client, lease).state is LeaseState.QUEUED, "the term to run out")
        assert _lease(client, lease).attempt == 1
        with worker(url, "mac", home):
            until(lambda: _lease(client, lease).state is LeaseState.DONE, "the second attempt")
        assert _lease(client, lease).attempt == 2
        assert not _runs(home), "the killed worker's run was ended"
        again = client.experiment(str(about.id))
        assert again.runs == 2
        assert again.run_reports[0].seed != again.run_reports[1].seed
        assert journal_of(home, "mac").head is not None


def _lease(client: CoordinatorClient, lease: object) -> wire.LeaseView:
    return next(view for view in client.leases() if view.id == lease)


def _runs(home: Path) -> list[int]:
    """Processes of runs below this home."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SWARM_WORKTREE", "").startswith(str(home)):
                found.append(process.pid)
    return found


def test_what_came_after_a_backup_is_sent_again_after_restoring_it(campaign: Path, tmp_path: Path) -> None:
    home, port, saved = tmp_path / "home", str(free_port()), tmp_path / "saved.tar"
    state = campaign / ".swarm" / "coordinator"
    with served(campaign, "--port", port, env=QUICK) as (url, process):
        client = CoordinatorClient(url)
        with worker(url, "mac", home) as at_work:
            until(lambda: tried(client, "mac") > 2, "experiments")
            done = swarm("backup", saved, "--dir", campaign, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            then = tried(client, "mac")
            until(lambda: tried(client, "mac") > then + 3, "more of them")
            stop(process)
            state.rename(tmp_path / "lost")
            refused = swarm("restore", tmp_path / "nothing.tar", "--dir", campaign, cwd=tmp_path)
            assert refused.returncode == 2
            done = swarm("restore", saved, "--dir", campaign, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            with served(campaign, "--port", port, env=QUICK):
                until(lambda: tried(client, "mac") > then + 4, "what the backup did not have")
                at_work.send_signal(signal.SIGINT)
                assert at_work.wait(60) == 0
                journal = journal_of(home, "mac")
                decided = {e.id for e in journal.experiments if e.status is not None}
                assert {str(e.id) for e in client.experiments(limit=1000).experiments} == decided
                assert client.branches()[0].commit == journal.commit
    assert swarm("restore", saved, "--dir", campaign, cwd=tmp_path).returncode == 4


def test_tokens_are_needed_once_one_is_made(campaign: Path, tmp_path: Path) -> None:
    with served(campaign, env=QUICK) as (url, _):
        open_client = CoordinatorClient(url)
        open_client.leaderboard()
        made = {}
        for role in ("join", "admin"):
            done = swarm("token", "create", "--role", role, "--dir", campaign, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            made[role] = done.stdout.strip()
        with pytest.raises(Rejected, match="token"):
            open_client.leaderboard()
        without = swarm("worker", url, "--name", "mac", "--home", tmp_path / "home", cwd=tmp_path)
        assert without.returncode == 3, without.stderr
        admin = CoordinatorClient(url, made["admin"])
        with worker(url, "mac", tmp_path / "home", SWARM_TOKEN=made["join"]):
            until(lambda: tried(admin, "mac") > 1 and admin.branches(), "experiments and a push")
        listed = json.loads(swarm("token", "list", "--json", "--dir", campaign, cwd=tmp_path).stdout)
        assert [(t["role"], t["machine"]) for t in listed] == [("join", None), ("admin", None), ("worker", "mac")]
    secret = json.loads((tmp_path / "home" / "mac" / "machine.json").read_text())["memberships"][url]["token"]
    for folder in (tmp_path / "home", campaign / ".swarm"):
        for path in folder.rglob("*"):
            if path.is_file() and path.name != "machine.json":
                data = path.read_bytes()
                assert not any(token.encode() in data for token in (*made.values(), secret)), path


@pytest.mark.system
def test_nothing_is_lost_when_the_coordinator_dies() -> None:
    script = [sys.executable, "benchmarks/coordinator_outage.py", "--kills", "20", "--away", "20", "--json"]
    done = subprocess.run(
        script, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
