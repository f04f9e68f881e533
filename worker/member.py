"""A machine's side of the swarm: it registers, beats, reports and pushes, beside the loop and never in its way.

The journal is the outbox. At every registration, and whenever the coordinator was started anew, the machine asks which
versions of its experiments are stored and sends what is newer; so nothing is lost by a kill, an outage of hours or a
coordinator restored from an old backup, and a report that arrives twice changes nothing. A report that is refused for
good is put aside in `refused.jsonl` and blocks none behind it. NOT covered: the loop's own truth, which is the journal.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

from shared import wire
from shared.client import Away, CoordinatorClient, Rejected
from shared.errors import Refused, SwarmError
from shared.git import GitError, Repo, http_environment
from shared.wire import Activity, Heartbeat, LeaseRef

from .journal import Experiment

PUSH_EVERY = 16  #: attempts that wait for a push, where no keep brings one
BACKOFF_S = (1.0, 30.0)  #: first and longest wait after a failure
FLUSH_S = 20.0  #: for the last reports and push when the worker stops


@dataclass(frozen=True)
class Remote:
    """Where this machine's branch and attic go."""

    repo: Repo
    url: str
    branch: str
    attic: str
    kept: Callable[[], str | None]  #: the last keep; the local branch itself is at the commit under test


class Outbox:
    """Reports to send, the latest version of each experiment, in the order of their first arrival. Thread-safe."""

    def __init__(self, refused: Path) -> None:
        """`refused`: where reports go that the coordinator will never take; they are not sent again."""
        self._path = refused
        self._waiting: OrderedDict[str, Experiment] = OrderedDict()
        self._refused: dict[str, int] = {}
        if refused.exists():
            for line in refused.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut short
                    entry = json.loads(line)
                    self._refused[entry["experiment"]] = int(entry["version"])
        self._lock = threading.Lock()

    def put(self, experiment: Experiment) -> None:
        """Takes a copy: the loop goes on changing its own."""
        if experiment.status is None or self._refused.get(experiment.id, 0) >= experiment.version:
            return
        with self._lock:
            self._waiting[experiment.id] = replace(experiment, runs=list(experiment.runs))

    def first(self) -> Experiment | None:
        with self._lock:
            return next(iter(self._waiting.values()), None)

    def done(self, experiment: Experiment) -> None:
        """It was taken; a version that came meanwhile stays."""
        with self._lock:
            if (waiting := self._waiting.get(experiment.id)) and waiting.version <= experiment.version:
                del self._waiting[experiment.id]

    def refuse(self, experiment: Experiment, why: str) -> None:
        """Moves it aside for good."""
        entry = {"experiment": experiment.id, "version": experiment.version, "at": int(time.time()), "why": why}
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self._refused[experiment.id] = experiment.version
        self.done(experiment)

    def __len__(self) -> int:
        return len(self._waiting)


class Member:
    """The Link of a worker to its coordinator (worker/loop.py)."""

    def __init__(
        self,
        client: CoordinatorClient,
        register: Callable[[], wire.Registered],
        registered: wire.Registered | None,
        remote: Remote,
        outbox: Outbox,
        to_report: Callable[[Experiment], wire.ExperimentReport],
        note: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        """`registered` is None for a worker that starts while the coordinator is away. `register` raises Away, or
        Rejected for good; `stop` is set when a person or another worker has taken this machine over."""
        self._client, self._register, self._remote, self._outbox = client, register, remote, outbox
        self._to_report, self._note, self._stop = to_report, note, stop
        self.fault: str | None = None  #: why this worker must end, once it must
        self._is_member = registered is not None
        self._epoch = registered.epoch if registered else ""
        self._next_s = registered.heartbeat_s if registered else BACKOFF_S[0]
        self._history: Sequence[Experiment] = ()
        self._activity = Activity()
        self._lease: LeaseRef | None = None
        self._attempts = 0  #: since the last push
        self._resync = self._push_due = True
        self._away_since: float | None = None
        self._work = threading.Event()  #: something to deliver
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._beat_on, name="heartbeat", daemon=True),
            threading.Thread(target=self._deliver_on, name="delivery", daemon=True),
        ]

    def start(self, history: Sequence[Experiment]) -> None:
        """`history` is the journal's own list: what happened before, and what will."""
        self._history = history
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Sends what waits, FLUSH_S at most; what does not arrive now is sent at the next start."""
        self._activity = Activity(state="stopping")
        self._push_due = True
        self._ending.set()
        self._work.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(FLUSH_S)

    # -- the loop's side: never fails, never waits long

    def assignment(self) -> wire.Explore | wire.Confirm | wire.Replay | wire.Promote:
        if not self._is_member or self._away_since is not None:
            return wire.Explore()
        try:
            given = self._client.assignment()
        except SwarmError:
            return wire.Explore()
        self._lease = None if isinstance(given, wire.Explore) else given.lease
        return given

    def report(self, experiment: Experiment) -> None:
        self._lease = None if experiment.lease else self._lease
        self._outbox.put(experiment)
        self._attempts += 1
        if experiment.kept is not None or self._attempts >= PUSH_EVERY:
            self._push_due = True
        self._work.set()

    def give_back(self, lease: LeaseRef, why: str) -> None:
        self._lease = None
        self._note(why)
        with contextlib.suppress(SwarmError):  # its term runs out by itself
            self._client.give_back(lease)

    def doing(self, activity: Activity) -> None:
        """What the next heartbeat says."""
        self._activity = activity

    # -- heartbeats

    def _beat_on(self) -> None:
        while not self._ending.wait(self._next_s if self._is_member else 1.0):
            if self._is_member:
                self._beat()

    def _beat(self) -> None:
        leases = (self._lease,) if self._lease else ()
        activity = self._activity.model_copy(update={"outbox": len(self._outbox)})
        try:
            reply = self._client.heartbeat(Heartbeat(activity=activity, leases=leases))
        except Away as error:
            self._next_s = min(self._next_s, 10.0)
            self._lost_sight(error)
            return
        except Rejected as error:
            self._rejected(error)
            return
        self._in_sight()
        self._next_s = reply.next_s
        if reply.epoch != self._epoch:
            self._epoch = reply.epoch
            self._resync = self._push_due = True
            self._work.set()

    # -- delivery

    def _deliver_on(self) -> None:
        wait = BACKOFF_S[0]
        until = float("inf")
        while True:
            ending = self._ending.is_set()
            if ending and until == float("inf"):
                until = time.monotonic() + FLUSH_S / 2
            try:
                self._deliver()
                wait = BACKOFF_S[0]
            except Away as error:
                self._lost_sight(error)
                wait = error.retry_after_s or min(wait * 2, BACKOFF_S[1])
            except Rejected as error:
                self._rejected(error)
                wait = min(wait * 2, BACKOFF_S[1])
            else:
                if ending or self.fault:
                    return
                self._work.wait()
                self._work.clear()
                continue
            if self.fault or (ending and time.monotonic() > until):
                return
            self._ending.wait(wait * random.uniform(0.7, 1.3)) if not ending else time.sleep(0.2)

    def _deliver(self) -> None:
        """Everything that waits. Raises Away or Rejected where the machine itself is concerned."""
        if not self._is_member:
            registered = self._register()
            self._epoch, self._next_s = registered.epoch, registered.heartbeat_s
            self._is_member = self._resync = self._push_due = True
        if self._resync:
            stored = self._client.known()
            self._resync = False
            for experiment in list(self._history):
                if stored.get(UUID(experiment.id), 0) < experiment.version:
                    self._outbox.put(experiment)
        while (waiting := self._outbox.first()) is not None:
            experiment = waiting
            try:
                self._client.report(UUID(experiment.id), self._to_report(experiment))
            except Rejected as error:
                if error.status in (401, 403) or error.kind != "about:blank":
                    raise
                self._note(f"the coordinator refuses #{experiment.number}: {error}")
                self._outbox.refuse(experiment, str(error))
            except GitError as error:
                self._note(f"#{experiment.number} cannot be reported: {error}")
                self._outbox.refuse(experiment, str(error))
            else:
                self._outbox.done(experiment)
            self._in_sight()
        if self._push_due:
            self._push()

    def _push(self) -> None:
        """Branch and attic together. Raises Away when it may work later; a refusal is noted."""
        self._push_due, attempts = False, self._attempts
        repo, remote = self._remote.repo, self._remote
        if (kept := remote.kept()) is None:
            return  # a set-up whose baseline fails is undone, its attic with it: nothing of it may be on the hub
        refs = [f"{kept}:{remote.branch}"]
        if attic := repo.resolve(remote.attic):
            refs.append(f"{attic}:{remote.attic}")
        try:
            environment = http_environment(self._client.url, self._client.token)
            repo.run("push", "--quiet", "--atomic", self._remote.url, *refs, environment=environment)
        except GitError as error:
            if any(sign in str(error) for sign in ("rejected", "declined", "denied", "swarm hub")):
                self._note(f"the hub refuses a push: {error}")
                return
            if "could not read Username" in str(error):  # what git makes of a 401
                error = GitError(f"{remote.url}: the token is refused")
            self._push_due = True
            raise Away(str(error)) from None
        self._attempts -= attempts

    # -- what the coordinator's answers mean

    def _lost_sight(self, error: Away) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            self._note(f"{error}; going on alone, results wait on this disk")

    def _in_sight(self) -> None:
        if self._away_since is not None:
            away, self._away_since = time.monotonic() - self._away_since, None
            self._note(f"the coordinator is back after {away:.0f} s")

    def _rejected(self, error: Rejected) -> None:
        """About the machine itself: register anew, or end."""
        self._is_member = False
        if error.kind in (wire.SUPERSEDED, wire.RETIRED):
            self.fault = str(error)
            self._stop.set()
        elif error.status != 401 and error.kind != wire.REGISTER:
            self._note(str(error))
        self._work.set()


def superseded(fault: str) -> Refused:
    """What the worker ends with."""
    return Refused(f"this worker stops: {fault}")
