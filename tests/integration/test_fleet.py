"""Workers on a real Ray of several logical nodes, each with its own host name: placed, killed, adopted, drained.

One Ray for the whole file (about 1 GB). Its tests stand on one swarm that lives on between them, so that what one of
them breaks is seen to be whole again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from coordinator import fleet
from coordinator.local_ray import running_head
from coordinator.supervisor import State, Supervisor, stop_here
from shared.errors import BadInput, Refused
from worker.slot import hold, holder, lock_path

ROOT = Path(__file__).parents[2]
WORKER = """
import contextlib, os, signal, subprocess, sys, time
from pathlib import Path
from worker.slot import hold
home, name = Path(os.environ["SWARM_HOME"]), sys.argv[1]
assert os.environ.get("SWARM_TOKEN") == "secret" and "secret" not in " ".join(sys.argv)
assert not [key for key in os.environ if key.startswith("RAY_")] and os.environ.get("OMP_NUM_THREADS") != "1"
said, last = home / f"{name}.exit", home / f"{name}.run"
if said.exists():
    sys.exit(int(said.read_text()))
def end_left():
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(last.read_text()), signal.SIGKILL)
    return 1
def stop(*_):
    end_left()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
with hold(home, name, end_left) as held:
    run = subprocess.Popen(["sleep", "600"], pass_fds=[held.fd], start_new_session=True)
    last.write_text(str(run.pid))
    (home / f"{name}.devices").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    run.wait()
"""


T = TypeVar("T")


def eventually(what: Callable[[], T], seconds: float = 20.0) -> T:
    """The first truthy answer."""
    until = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < until, f"not within {seconds:.0f} s"
        time.sleep(0.1)
    return answer


def living(home: Path, *, script: str) -> list[psutil.Process]:
    """Every process that was started for a slot of this home."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            marked = process.environ().get("SWARM_SLOT", "").startswith(str(home))
            if marked and process.status() != psutil.STATUS_ZOMBIE and script in " ".join(process.cmdline()):
                found.append(process)
    return found


def workers_of(home: Path, name: str) -> list[int]:
    """Without what a worker has forked and not yet executed: for a moment it looks like a second worker."""
    found = []
    for process in living(home, script="worker.py"):
        with contextlib.suppress(psutil.Error):
            found.append((process.pid, process.ppid(), process.cmdline()[-1]))
    workers = {pid for pid, _, _ in found}
    return [pid for pid, parent, last in found if last == name and parent not in workers]


def write_worker(home: Path) -> Path:
    script = home / "worker.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{WORKER}")
    return script


# Without Ray: one supervisor, real processes.


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[..., Supervisor]]:
    script, made = write_worker(tmp_path), []

    def one(*names: str, foreign: Callable[[psutil.Process], str | None] = lambda _: None) -> Supervisor:
        slots = {name: (str(number),) for number, name in enumerate(names)}
        base = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "OMP_"))}
        command = [sys.executable, str(script)]
        environment = {**base, "SWARM_TOKEN": "secret", "SWARM_NODE": "f00"}
        made.append(Supervisor(tmp_path, slots, lambda n: [*command, n], environment, foreign, 5.0, slow_s=1000.0))
        return made[-1]

    yield one
    for supervisor in made:
        supervisor.stop()
    assert not living(tmp_path, script="")


def states(supervisor: Supervisor) -> list[State]:
    supervisor.look()
    return [worker.state for worker in supervisor.status()[0]]


def test_a_worker_that_ends_is_started_again_later_each_time(
    tmp_path: Path, supervised: Callable[..., Supervisor]
) -> None:
    (tmp_path / "mini.exit").write_text("1")
    supervisor, waits = supervised("mini"), []
    for wait in ("1 s", "2 s"):
        eventually(lambda: states(supervisor) == [State.STARTING], 5)
        eventually(lambda: states(supervisor) == [State.WAITING], 5)
        (worker,) = supervisor.status()[0]
        assert f"ended with 1, started again after {wait}" in worker.note
        waits.append(worker.note)
    (tmp_path / "mini.exit").unlink()
    eventually(lambda: states(supervisor) == [State.RUNNING])


@pytest.mark.parametrize("code", [0, 2, 3])
def test_a_worker_that_is_refused_is_not_started_over_and_over(
    tmp_path: Path, supervised: Callable[..., Supervisor], code: int
) -> None:
    (tmp_path / "mini.exit").write_text(str(code))
    supervisor = supervised("mini")
    eventually(lambda: states(supervisor) == [State.REFUSED], 5)
    assert f"ended with {code}, started again after 1000 s" in supervisor.status()[0][0].note


def test_a_worker_of_somebody_else_is_left_alone_and_named(
    tmp_path: Path, supervised: Callable[..., Supervisor]
) -> None:
    with hold(tmp_path, "mini"):
        supervisor = supervised("mini", foreign=lambda _: "it was not started by `swarm up`")
        assert states(supervisor) == [State.REFUSED]
        assert f"worker {os.getpid()} holds the slot: it was not" in supervisor.status()[0][0].note
        supervisor.stop()


def test_a_lent_slot_stays_lent_for_the_next_supervisor(tmp_path: Path, supervised: Callable[..., Supervisor]) -> None:
    first = supervised("mini-0", "mini-1")
    eventually(lambda: states(first) == [State.RUNNING] * 2)
    assert first.hold(1) == ["1"]
    assert states(first) == [State.RUNNING, State.HELD]
    with pytest.raises(Refused, match="1 slots are free here, 2"):
        first.hold(2)
    second = supervised("mini-0", "mini-1")
    assert states(second) == [State.STARTING, State.HELD] or states(second) == [State.RUNNING, State.HELD]
    assert len(workers_of(tmp_path, "mini-0")) == 1
    second.release()
    eventually(lambda: states(second) == [State.RUNNING] * 2)


def test_workers_whose_agent_is_gone_are_stopped_where_they_are(
    tmp_path: Path, supervised: Callable[..., Supervisor]
) -> None:
    supervisor = supervised("mini-0", "mini-1")
    eventually(lambda: states(supervisor) == [State.RUNNING] * 2)
    with hold(tmp_path, "by-hand"):
        assert stop_here(tmp_path, 5.0) == ["mini-0", "mini-1"]
    assert not living(tmp_path, script="")
    assert stop_here(tmp_path, 5.0) == []


def test_a_big_log_is_set_aside(tmp_path: Path, supervised: Callable[..., Supervisor]) -> None:
    log = tmp_path / "logs" / "mini.log"
    log.parent.mkdir()
    log.write_bytes(b"x" * 10_000_001)
    states(supervised("mini"))
    assert log.stat().st_size < 1000 and log.with_suffix(".log.1").stat().st_size == 10_000_001


def node(host: str = "vm.example.org", labels: dict[str, str] | None = None, **resources: float) -> dict[str, Any]:
    return {
        "NodeID": "f00",
        "NodeManagerHostname": host,
        "NodeManagerAddress": "10.0.0.1",
        "Resources": {"CPU": 4.0, **resources},
        "Labels": labels or {},
    }


def test_machines_are_named_by_host_and_slot() -> None:
    plan = fleet.Plan("http://hub")
    assert fleet.place(node(), plan) is None
    rack = fleet.place(node(GPU=2.0), plan)
    assert rack is not None and rack.names == ("vm-0", "vm-1") and rack.reserve == {"num_cpus": 0, "num_gpus": 2}
    mac = fleet.place(node(labels={"swarm-host": "My Mac"}, mlx=1.0), plan)
    assert mac is not None and mac.names == ("my-mac",) and mac.reserve["resources"] == {"mlx": 1}
    plain = fleet.place(node(), dataclasses.replace(plan, slots=2, cpus=0.5))
    assert plain is not None and plain.names == ("vm-0", "vm-1") and plain.reserve == {"num_cpus": 1.0}


def test_a_token_is_in_no_repr() -> None:
    assert "secret" not in repr(fleet.Plan("http://hub", token="secret"))


# With Ray.

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[Any]:
    with fleet.local(["alpha", "beta", "gamma"], num_cpus=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def plan(home: Path) -> fleet.Plan:
    command = (sys.executable, str(write_worker(home)), "{name}")
    return fleet.Plan("http://hub:8000", token="secret", home=home, slots=1, drain_s=5.0, command=command)


@pytest.fixture
def swarm(cluster: Any, plan: fleet.Plan) -> Callable[[], dict[str, fleet.Node]]:
    """The swarm, up; called, its nodes by host."""
    fleet.up(plan, print)
    return lambda: {node.host: node for node in fleet.status()}


Swarm = Callable[[], dict[str, fleet.Node]]


def runs(swarm: Swarm, host: str) -> fleet.Node | None:
    found = swarm().get(host)
    return found if found and found.workers and all(w.state is State.RUNNING for w in found.workers) else None


def agent(node: fleet.Node) -> Any:
    import ray

    return ray.get_actor(f"agent-{node.id}", namespace="swarm")


@needs_ray
def test_up_starts_one_worker_in_every_slot(swarm: Swarm, home: Path, plan: fleet.Plan) -> None:
    nodes = swarm()
    assert list(nodes) == ["alpha", "beta", "gamma"]
    for host, node in nodes.items():
        (worker,) = node.workers
        assert worker.state is State.RUNNING and worker.name == host
        held = holder(home, host)
        assert held is not None and held.pid == worker.pid
        assert workers_of(home, host) == [worker.pid]
    assert [node.workers for node in fleet.up(plan, print)] == [node.workers for node in nodes.values()]


@needs_ray
def test_up_for_another_coordinator_is_refused(swarm: Swarm, plan: fleet.Plan) -> None:
    with pytest.raises(Refused, match="runs for http://hub:8000 with another coordinator"):
        fleet.up(dataclasses.replace(plan, coordinator="http://other"), print)


@needs_ray
def test_a_killed_agent_comes_back_and_adopts_its_worker(swarm: Swarm, home: Path) -> None:
    before = swarm()
    gone = before["beta"].agent
    assert gone is not None
    started = time.monotonic()
    os.kill(gone, signal.SIGKILL)

    def back() -> bool:
        assert len(workers_of(home, "beta")) == 1
        node = runs(swarm, "beta")
        return node is not None and node.agent != gone

    eventually(back, 15)
    print(f"agent back after {time.monotonic() - started:.1f} s")
    time.sleep(2)
    assert swarm()["beta"].workers == before["beta"].workers
    assert workers_of(home, "beta") == [before["beta"].workers[0].pid]


@needs_ray
def test_agent_and_worker_killed_leave_one_new_worker_and_no_old_run(swarm: Swarm, home: Path) -> None:
    node = swarm()["beta"]
    eventually(lambda: len(living(home, script="sleep")) == 3, 5)
    run = int((home / "beta.run").read_text())
    worker = node.workers[0].pid
    assert node.agent is not None and worker is not None and psutil.pid_exists(run)
    os.kill(node.agent, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)

    def back() -> bool:
        assert len(workers_of(home, "beta")) <= 1
        found = runs(swarm, "beta")
        return found is not None and found.workers[0].pid != worker

    eventually(back, 20)
    assert not psutil.pid_exists(run) or psutil.Process(run).status() == psutil.STATUS_ZOMBIE
    assert len(workers_of(home, "beta")) == 1
    eventually(lambda: len(living(home, script="sleep")) == 3, 5)  # a worker holds its slot before it starts a run


@needs_ray
def test_an_agent_killed_by_ray_leaves_its_workers(swarm: Swarm, home: Path) -> None:
    """ray.kill() kills an actor's children too, unless told otherwise; the reconciler then makes a new agent."""
    import ray

    node = swarm()["gamma"]
    ray.kill(agent(node), no_restart=True)
    eventually(lambda: (found := runs(swarm, "gamma")) and found.agent != node.agent, 25)
    assert workers_of(home, "gamma") == [node.workers[0].pid]


@needs_ray
def test_a_node_joins_lends_its_accelerators_and_is_killed(swarm: Swarm, cluster: Any, home: Path) -> None:
    import ray

    others = {host: node.workers for host, node in swarm().items()}
    added = cluster.add_node(num_cpus=1, num_gpus=2, labels={"swarm-host": "delta"})
    delta = eventually(lambda: runs(swarm, "delta"), 40)
    assert [worker.name for worker in delta.workers] == ["delta-0", "delta-1"]
    devices = [home / f"delta-{number}.devices" for number in (0, 1)]
    eventually(lambda: [path.read_text() for path in devices if path.exists()] == ["0", "1"], 5)

    assert ray.get(agent(delta).hold.remote(1), timeout=30) == ["1"]
    assert workers_of(home, "delta-1") == [] and len(workers_of(home, "delta-0")) == 1
    assert [worker.state for worker in swarm()["delta"].workers] == [State.RUNNING, State.HELD]
    ray.get(agent(delta).release.remote(), timeout=30)
    delta = eventually(lambda: runs(swarm, "delta"), 20)

    cluster.remove_node(added, allow_graceful=False)
    eventually(lambda: "delta" not in swarm(), 60)
    assert {host: node.workers for host, node in swarm().items()} == others
    # The computer lives on, and so do its workers; the node joins again under another id and has them back.
    cluster.add_node(num_cpus=1, num_gpus=2, labels={"swarm-host": "delta"})
    again = eventually(lambda: runs(swarm, "delta"), 40)
    assert again.id != delta.id and again.workers == delta.workers


@needs_ray
def test_a_killed_reconciler_comes_back(swarm: Swarm, plan: fleet.Plan) -> None:
    import ray

    ray.kill(ray.get_actor("reconciler", namespace="swarm"), no_restart=False)
    before = swarm()
    assert fleet.up(plan, print) == list(before.values())


@needs_ray
def test_down_leaves_no_process(swarm: Swarm, home: Path) -> None:
    said: list[str] = []
    assert living(home, script="sleep")
    agents = [node.agent for node in swarm().values()]
    fleet.down(said.append)
    assert living(home, script="") == []
    assert fleet.status() == []
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in agents if pid), 10)
    assert [line for line in said if not line.endswith(": stopped")] == []
    said.clear()
    started = time.monotonic()
    fleet.down(said.append)
    assert said == [] and time.monotonic() - started < 5
    assert not lock_path(home, "alpha").with_suffix(".held").exists()


@needs_ray
def test_an_address_where_nothing_listens_is_bad_input(home: Path) -> None:
    for address in ("127.0.0.1:1", "nonsense", "ray://127.0.0.1:10001"):
        with pytest.raises(BadInput, match=address):
            fleet.connect(address, home=home, start_local=True)


COMMANDS = """
import sys
from pathlib import Path
from coordinator import fleet
home = Path(sys.argv[2])
fleet.connect(None, home=home, start_local=sys.argv[1] == "up")
plan = fleet.Plan("http://hub", "secret", home, slots=2, command=(sys.executable, str(home / "worker.py"), "{name}"))
print([w.state for n in fleet.up(plan, print) for w in n.workers] if sys.argv[1] == "up" else fleet.down(print, home))
"""


@needs_ray
@pytest.mark.system
def test_a_ray_of_this_computer_alone_outlives_up_and_not_down(tmp_path: Path) -> None:
    write_worker(tmp_path)

    def command(name: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", COMMANDS, name, str(tmp_path)]
        base = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return subprocess.run(line, cwd=ROOT, env=base, capture_output=True, text=True, timeout=120, check=False)

    first, second = command("up"), command("up")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    names = sorted(path.stem for path in (tmp_path / "slots").glob("*.lock"))
    assert len(workers_of(tmp_path, names[0]) + workers_of(tmp_path, names[1])) == 2
    head = running_head(tmp_path)
    assert head is not None
    family = [head.process, *head.process.children(recursive=True)]
    assert command("down").returncode == 0
    assert not [process for process in family if process.is_running()]
    assert not living(tmp_path, script="") and not Path(head.folder).exists()
    assert "no Ray cluster on this computer" in command("down").stderr
