"""Workers on every accelerator of a Ray cluster: placed, kept and stopped. The only file that imports ray.

    Reconciler  one detached actor on the head: every 10 s an Agent for each new node, none for dead ones
      Agent     one detached actor per node: reserves its accelerators, and keeps a worker on each (supervisor.py)

Invariants: at most one worker per slot, whoever dies in between: workers outlive a killed agent, and its successor
adopts them. Every call to an actor has a timeout. Nothing here carries experiments: health and results go over HTTP.
NOT covered: accelerators other than CUDA devices and `mlx`; workers on a computer whose node died while it lives on
(they research on; a node that joins again adopts them, supervisor.stop_here() ends them); `ray://` addresses; a driver
that loses the head in the middle of a call (Ray ends it after 60 s).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from shared.errors import BadInput, Refused, SwarmError
from worker.home import default_home
from worker.machine import short_slug

from .local_ray import FOLDER, is_ray_here, running_head, start_head, stop_head, use_token
from .supervisor import State, Supervisor, Worker, node_of

NAMESPACE = "swarm"
RECONCILER = "reconciler"
HOST_LABEL = "swarm-host"  #: a node's host name, where its computer's does not do (several nodes on one computer)
RECONCILE_S = 10.0
ANSWER_S = 10.0  #: for an actor to answer; a node that was killed is known as dead only after 12.5 s (measured)
# ray.kill() and an exiting actor would SIGKILL all children otherwise (measured), and with them undrained workers.
OUTLIVE = {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "0"}}

Progress = Callable[[str], None]


class NoCluster(BadInput):
    """No Ray runs on this computer, and none was named; for `swarm down` that is as good as done."""


@dataclass(frozen=True)
class Plan:
    """What `swarm up` was asked for. Kept by the reconciler."""

    coordinator: str
    token: str | None = field(default=None, repr=False)  #: reaches workers by environment only
    home: Path | None = None  #: on every node; None: each node's own default
    slots: int | None = None  #: on nodes without accelerator; None: these get no worker
    cpus: float = 0.0  #: reserved in Ray for each such slot
    accelerators: int | None = None  #: asked of the autoscaler
    drain_s: float = 30.0  #: from SIGTERM to SIGKILL
    command: tuple[str, ...] = ("{python}", "-m", "coordinator.cli", "worker", "{url}", "--name", "{name}")


@dataclass(frozen=True)
class Place:
    """Where an agent goes, and what it reserves there."""

    node: str
    host: str
    address: str
    names: tuple[str, ...]  #: of its machines, one per slot
    reserve: Mapping[str, Any]  #: Ray's actor options


@dataclass(frozen=True)
class Node:
    id: str
    host: str
    address: str
    alive: bool
    agent: int | None  #: the agent's process id
    workers: tuple[Worker, ...]
    note: str = ""

    @property
    def settled(self) -> bool:
        """Nothing here is about to start."""
        busy = (State.STARTING, State.WAITING)
        return self.agent is not None and not any(worker.state in busy for worker in self.workers)


def place(node: Mapping[str, Any], plan: Plan) -> Place | None:
    """The agent for one of ray.nodes(); None where it has no slot."""
    resources, labels = node["Resources"], node.get("Labels") or {}
    host = short_slug(labels.get(HOST_LABEL) or node["NodeManagerHostname"].partition(".")[0])
    gpus, mlx = int(resources.get("GPU", 0)), int(resources.get("mlx", 0))
    count = plan.slots or 0
    reserve: dict[str, Any] = {"num_cpus": plan.cpus * count}
    if gpus:
        count, reserve = gpus, {"num_cpus": 0, "num_gpus": gpus}
    elif mlx:
        count, reserve = mlx, {"num_cpus": 0, "resources": {"mlx": mlx}}
    if not count:
        return None
    names = (host,) if count == 1 else tuple(short_slug(host, f"-{number}") for number in range(count))
    return Place(node["NodeID"], host, node["NodeManagerAddress"], names, reserve)


class Agent:
    """One node's workers. Its methods answer at once, but hold() and stop(), which drain."""

    def __init__(self, plan: Plan, here: Place) -> None:
        gpus = _ray().get_runtime_context().get_accelerator_ids().get("GPU", [])
        devices = {name: (gpus[number],) if gpus else () for number, name in enumerate(here.names)}
        values = {"python": sys.executable, "url": plan.coordinator}
        home = (plan.home or default_home()).expanduser()
        environment = {**_environment_of_node(), "SWARM_NODE": here.node}
        if plan.token is not None:
            environment["SWARM_TOKEN"] = plan.token
        self._here = here
        self._supervisor = Supervisor(
            home,
            devices,
            lambda name: [_filled(word, {**values, "name": name}) for word in plan.command],
            environment,
            self._foreign,
            plan.drain_s,
        )
        threading.Thread(target=self._supervisor.look_for_ever, daemon=True).start()

    def status(self) -> Node:
        here = self._here
        workers, note = self._supervisor.status()
        return Node(here.node, here.host, here.address, True, os.getpid(), workers, note)

    def hold(self, count: int) -> list[str]:
        return self._supervisor.hold(count)

    def release(self) -> None:
        self._supervisor.release()

    def stop(self) -> None:
        self._supervisor.stop()

    def _foreign(self, worker: psutil.Process) -> str | None:
        """None for a worker of this node's agent, or of a node that is gone: this computer's before it joined again."""
        node = node_of(worker)
        if node is None:
            return "it was not started by `swarm up`"
        if node != self._here.node and any(other["NodeID"] == node and other["Alive"] for other in _ray().nodes()):
            return f"another node here has the same host name; start each with --labels {HOST_LABEL}=NAME"
        return None


def _filled(word: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(f"{{{name}}}", value)
    return word


def _environment_of_node() -> dict[str, str]:
    """What the node was started with: the raylet's environment, not an actor's, where Ray sets OMP_NUM_THREADS=1.

    Without Ray's own variables: agents' code has no business with the cluster's token.
    """
    try:
        environment = psutil.Process(os.getppid()).environ()
    except psutil.Error:
        environment = dict(os.environ)
    return {name: value for name, value in environment.items() if not name.startswith("RAY_")}


class Reconciler:
    """Keeps an agent on every node with slots."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        threading.Thread(target=self._reconcile_for_ever, daemon=True).start()

    def plan(self) -> Plan:
        return self._plan

    def _reconcile_for_ever(self) -> None:
        while True:
            try:
                _reconcile(_ray(), self._plan)
            except Exception as problem:  # the head may be busy; the next round does it
                print(f"{type(problem).__name__}: {problem}", flush=True)
            time.sleep(RECONCILE_S)


def _reconcile(ray: Any, plan: Plan) -> None:
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    agents = _agents(ray)
    for node, agent in agents.items():
        if node not in alive:  # it would wait for its node for ever
            print(f"agent of node {node[:8]} removed: the node is dead", flush=True)
            ray.kill(agent, no_restart=True)
    for node in alive.keys() - agents.keys():
        if here := place(alive[node], plan):
            print(f"agent for {here.host}, node {node[:8]}: {len(here.names)} slots", flush=True)
            _detached(ray, Agent, f"agent-{node}", label_selector={"ray.io/node-id": node}, **here.reserve).remote(
                plan, here
            )


def _detached(ray: Any, actor: type, name: str, **options: Any) -> Any:
    return ray.remote(actor).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=8,  # so that status() answers while stop() drains
        runtime_env=OUTLIVE,
        **options,
    )


def _agents(ray: Any) -> dict[str, Any]:
    """Node id -> its agent, whether it answers or not."""
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    found = ((name.removeprefix("agent-"), _actor(ray, name)) for name in names if name.startswith("agent-"))
    return {node: actor for node, actor in found if actor is not None}


def _actor(ray: Any, name: str) -> Any:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _answers(ray: Any, calls: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """What came back in time; calls to dead, pending or hanging actors are left out."""
    done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout) if calls else ([], [])
    answers = {}
    for node, call in calls.items():
        if call in done:
            with contextlib.suppress(ray.exceptions.RayError):
                answers[node] = ray.get(call, timeout=1)
    return answers


def _plan(ray: Any, reconciler: Any, timeout: float) -> Plan | None:
    """The running swarm's plan. Asks again while the reconciler restarts."""
    until = time.monotonic() + timeout
    while (left := until - time.monotonic()) > 0:
        if plan := _answers(ray, {"": reconciler.plan.remote()}, left).get(""):
            return plan  # type: ignore[no-any-return]
        time.sleep(0.2)
    return None


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise BadInput("ray is not installed: pip install 'ratchet-swarm[ray]'") from None
    return ray


def connect(address: str | None, *, home: Path, start_local: bool = False) -> None:
    """Joins the cluster at `address`, of RAY_ADDRESS, that swarm started under `home`, or found on this computer.

    With `start_local` and none of them: starts a Ray on this computer alone, which lives until down(). The token of a
    cluster that is not ours is Ray's business (RAY_AUTH_TOKEN_PATH, RAY_AUTH_TOKEN or ~/.ray/auth_token).
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise BadInput(f"{address}: run this on a node of the cluster, or give its GCS address HOST:6379")
    if not address and (head := running_head(home)):
        address = head.address
        use_token(home)
    if not address:
        # Looked up before Ray is: it would try a dead cluster's address for minutes, and reads its token only once.
        if is_ray_here():
            address = "auto"
        elif start_local:
            use_token(home)
            address = start_head(home)
        else:
            raise NoCluster(
                "no Ray cluster on this computer; give --address HOST:6379, or run on a node of the cluster"
            )
    elif address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, ValueError) as problem:
            raise BadInput(f"no Ray cluster at {address}: {problem}") from None
    _init(address)


def _init(address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = _ray()
    ray._private.worker._worker_logs_enabled = False  # else a dead raylet's last 20 lines go to stdout (measured)
    try:
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as problem:
        raise BadInput(f"Ray at {address}: {str(problem).strip().splitlines()[0]}") from None


def up(plan: Plan, progress: Progress, wait_s: float = 120.0) -> list[Node]:
    """Starts the reconciler and waits until the present nodes have settled, `wait_s` at most. Again: no harm.

    Raises Refused while the swarm runs with another plan.
    """
    ray = _ray()
    reserve = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
    reconciler = _detached(ray, Reconciler, RECONCILER, **reserve).remote(plan)
    known = _plan(ray, reconciler, 60)
    if known is None:
        raise SwarmError("the reconciler does not start; see `ray list actors` on the head node")
    if differ := [f.name for f in dataclasses.fields(Plan) if getattr(known, f.name) != getattr(plan, f.name)]:
        raise Refused(f"the swarm runs for {known.coordinator} with another {', '.join(differ)}; `swarm down` first")
    if plan.accelerators is not None:
        _request(plan.accelerators)
    until, told = time.monotonic() + wait_s, dict[str, str]()
    while True:
        nodes = status()
        for node in nodes:
            for name, line in {node.host: node.note, **{w.name: f"{w.state} {w.note}" for w in node.workers}}.items():
                if line and told.get(name) != line:
                    told[name] = line
                    progress(f"{name}: {line.strip()}")
        if all(node.settled for node in nodes) or time.monotonic() > until:
            return nodes
        time.sleep(0.5)


def status() -> list[Node]:
    """Every node that has slots or an agent, by host; empty when the swarm is down."""
    ray = _ray()
    reconciler = _actor(ray, RECONCILER)
    plan = _plan(ray, reconciler, ANSWER_S) if reconciler else None
    agents = _agents(ray)
    answers = _answers(ray, {node: agent.status.remote() for node, agent in agents.items()}, ANSWER_S)
    nodes: list[Node] = []
    for node in ray.nodes():
        id, alive = node["NodeID"], node["Alive"]
        if id in answers:
            nodes.append(answers[id])
        elif id in agents or (alive and plan and place(node, plan)):
            starting = "its agent is starting, or waits for accelerators that others use"
            waits = starting if id in agents else "no agent yet"
            here = place(node, plan) if plan and alive else None
            host = here.host if here else short_slug(node["NodeManagerHostname"].partition(".")[0])
            nodes.append(Node(id, host, node["NodeManagerAddress"], alive, None, (), waits if alive else "dead"))
    return sorted(nodes, key=lambda node: (node.host, node.id))


def down(progress: Progress, home: Path | None = None) -> None:
    """Drains and removes all agents, then stops the Ray that swarm started under `home`, if any. Again: no harm.

    All nodes at once, in three rounds at most; a node without an answer is given up after 30 s and named.
    """
    ray = _ray()
    drain_s = Plan("").drain_s
    if reconciler := _actor(ray, RECONCILER):  # first, or it makes agents anew
        if plan := _plan(ray, reconciler, ANSWER_S):
            drain_s = plan.drain_s
            if plan.accelerators is not None:
                _request(0)
        ray.kill(reconciler, no_restart=True)
    for last in (False, False, True):
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        agents = _agents(ray)
        asked = {node: agent.status.remote() for node, agent in agents.items() if node in alive}
        hosts = {node: answer.host for node, answer in _answers(ray, asked, ANSWER_S).items()}
        stopped = _answers(ray, {node: agents[node].stop.remote() for node in hosts}, drain_s + 20)
        for node in agents:
            if node in stopped or node not in alive or last:
                ray.kill(agents[node], no_restart=True)
                why = "stopped" if node in stopped else "does not answer; its workers may run on"
                progress(f"{hosts.get(node, f'node {node[:8]}')}: {why}")
        until = time.monotonic() + 3  # a kill takes effect a little later
        while time.monotonic() < until and (_agents(ray) or _actor(ray, RECONCILER)):
            time.sleep(0.1)
        if not _agents(ray):
            break
    if home and running_head(home):
        ray.shutdown()
        stop_head(home)


def _request(accelerators: int) -> None:
    """Asks the cluster's autoscaler for so many accelerators at least; 0 takes the wish back."""
    _ray()
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{"GPU": 1}] * accelerators)


@contextmanager
def local(hosts: Iterable[str], **resources: float) -> Iterator[Any]:
    """A Ray of this process with one logical node per host name, all on this computer; all gone afterwards.

    Yields Ray's Cluster: `add_node(labels={HOST_LABEL: name}, **resources)` lets one more host join. Once per process:
    Ray reads its token only once.
    """
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder:
        os.environ.update(RAY_TMPDIR=folder, RAY_USAGE_STATS_ENABLED="0")
        use_token(Path(folder))
        ray = _ray()
        from ray.cluster_utils import Cluster

        cluster: Any = Cluster(shutdown_at_exit=True)
        try:
            for number, host in enumerate(hosts):
                only_head = {} if number else {"include_dashboard": False}
                cluster.add_node(labels={HOST_LABEL: host}, **only_head, **resources)
            _init(cluster.address)
            try:
                yield cluster
            finally:
                down(lambda _: None)
        finally:
            ray.shutdown()
            cluster.shutdown()
            for name in ("RAY_TMPDIR", "RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
                os.environ.pop(name, None)
                os.environ.update({name: before[name]} if name in before else {})
