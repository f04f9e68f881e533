"""A machine's side of the swarm: it registers, beats, reports and pushes, beside the loop and never in its way.

The journal is the outbox. At every registration, and whenever the coordinator was started anew, the machine asks which
versions of its experiments are stored and sends what is newer; so nothing is lost by a kill, an outage of hours or a
coordinator restored from an old backup, and a report that arrives twice changes nothing. A report that is refused for
good is put aside in `refused.jsonl` and blocks none behind it. NOT covered: the loop's own truth, which is the journal.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
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
LONGEST_S = 300.0  #: a coordinator that asks for a longer wait is asked again all the same
OFTEN_S = 0.1  #: between heartbeats at least, whatever the coordinator says
FLUSH_S = 20.0  #: for the last reports and push when the worker stops
AT_END_S = 0.2  #: between tries then
FOR_GOOD = (409, 413, 422)  #: what a coordinator says of a report that it will never take


class Seen(StrEnum):
    """What may fail while the rest works; the coordinator is in sight when none does."""

    BEAT = "beat"  #: heartbeats and assignments
    REPORT = "report"  #: also registration
    PUSH = "push"


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
        self._torn = False  # a kill cut the last line short: it is no longer ours to continue
        if refused.exists():
            text = refused.read_text(errors="replace")
            self._torn = not text.endswith("\n") and text != ""
            for line in text.split("\n"):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    self._refused[entry["experiment"]] = int(entry["version"])
        self._lock = threading.Lock()

    def put(self, experiment: Experiment) -> None:
        """Takes it as it is: nobody may change it any more. An older version than the one that waits is dropped."""
        with self._lock:
            waiting = self._waiting.get(experiment.id)
            known = max(waiting.version if waiting else 0, self._refused.get(experiment.id, 0))
            if experiment.version > known:
                self._waiting[experiment.id] = experiment

    def put_all(self, experiments: Iterable[Experiment]) -> None:
        """After a gap: what waited already takes its place among them, by number."""
        for experiment in experiments:
            self.put(experiment)
        with self._lock:
            self._waiting = OrderedDict(sorted(self._waiting.items(), key=lambda item: item[1].number))

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
            file.write(("\n" if self._torn else "") + json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with self._lock:
            self._torn = False
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
        """`registered` is None for a worker that starts while the coordinator is away. `register` raises Away, Rejected
        where asking again may help, or another Refused; `stop` is set when this worker must end."""
        self._client, self._register, self._remote, self._outbox = client, register, remote, outbox
        self._to_report, self._note, self._stop = to_report, note, stop
        self.fault: str | None = None  #: why this worker must end, once it must
        self._is_member = registered is not None
        self._registrations = 0  #: made here; an answer to a call of an earlier one says nothing of the present one
        self._epoch = registered.epoch if registered else ""
        self._next_s = _bounded(registered.heartbeat_s) if registered else BACKOFF_S[0]
        # The latest version of each experiment, copied on the loop's own thread: the journal goes on changing its own,
        # and a copy made in the middle of that could have the new version's number without its run.
        self._history: dict[str, Experiment] = {}
        self._activity = Activity()
        self._lease: LeaseRef | None = None
        self._attempts = self._pushed = 0  #: reported, and of them before the last push; each written by one thread
        self._resync = self._push_due = True
        self._doubted: Experiment | None = None  #: its report got an answer that may not be the coordinator's
        self._said = ""  #: the last refusal that was noted, so that it is noted once
        self._unseen: dict[Seen, float] = {}  #: since when
        self._sight = threading.Lock()
        self._until = float("inf")  #: when the last reports must be gone
        self._work = threading.Event()  #: something to deliver
        self._again = threading.Event()  #: a wait after a failure is over
        self._ending = threading.Event()
        self._beating = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        self._delivering = threading.Thread(target=self._deliver_on, name="delivery", daemon=True)

    def beat(self) -> None:
        """From now on the coordinator sees what this machine does, also while there is nothing to report yet."""
        self._beating.start()

    def start(self, history: Iterable[Experiment]) -> None:
        """`history`: what the journal has of earlier starts. Before the loop is running."""
        self._history = {e.id: _copy(e) for e in history if e.status is not None}
        self._delivering.start()

    def close(self) -> None:
        """Sends what waits, FLUSH_S at most; what does not arrive now is sent at the next start."""
        if self._activity.state != "failed":
            self._activity = Activity(state="stopping")
        self._push_due = True
        self._until = time.monotonic() + FLUSH_S
        self._ending.set()
        self._again.set()
        self._work.set()
        for thread in (self._delivering, self._beating):
            if thread.is_alive():
                thread.join(max(self._until - time.monotonic(), 0.0))

    # -- the loop's side: never fails, never waits long

    def assignment(self) -> wire.Explore | wire.Confirm | wire.Replay | wire.Promote:
        if not self._is_member or self._unseen.keys() & {Seen.BEAT, Seen.REPORT}:
            return wire.Explore()
        try:
            given = self._client.assignment()
        except Away as error:
            self._lost_sight(Seen.BEAT, error)  # until the next heartbeat nobody waits for it again
            return wire.Explore()
        except (SwarmError, ValueError):
            return wire.Explore()
        self._lease = None if isinstance(given, wire.Explore) else given.lease
        return given

    def report(self, experiment: Experiment) -> None:
        self._lease = None if experiment.lease else self._lease
        self._history[experiment.id] = latest = _copy(experiment)
        self._outbox.put(latest)
        self._attempts += 1
        if experiment.kept is not None or self._attempts - self._pushed >= PUSH_EVERY:
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
        while not self._ending.wait(self._next_s if self._is_member else BACKOFF_S[0]):
            if self.fault:
                return
            if self._is_member:
                self._beat()
        if self._is_member and not self.fault and not self._unseen:
            lease, self._lease = self._lease, None
            self._beat()  # that it stops, or why it failed
            if lease:  # the run that it was for has been stopped; nobody needs to wait for its term
                with contextlib.suppress(SwarmError):
                    self._client.give_back(lease)

    def _beat(self) -> None:
        lease, registration = self._lease, self._registrations
        activity = self._activity.model_copy(update={"outbox": len(self._outbox)})
        try:
            reply = self._client.heartbeat(Heartbeat(activity=activity, leases=(lease,) if lease else ()))
        except Away as error:
            self._next_s = _bounded(max(min(self._next_s, 10.0), error.retry_after_s or 0.0))
            self._lost_sight(Seen.BEAT, error)
            return
        except Rejected as error:
            if self._is_member and registration == self._registrations:
                self._rejected(error)
            return
        except Exception as error:  # an answer that is none, an activity that cannot be sent
            self._say(f"heartbeat: {type(error).__name__}: {error}")
            return
        self._in_sight(Seen.BEAT)
        self._next_s = _bounded(reply.next_s)
        if lease and lease == self._lease and lease.id in reply.lost:
            self._lease = None  # the run goes on: what it finds is stored all the same
        if reply.epoch != self._epoch:
            self._epoch = reply.epoch
            self._resync = self._push_due = True
            self._work.set()

    # -- delivery

    def _deliver_on(self) -> None:
        wait = 0.0
        while not self.fault:
            self._again.clear()  # first: what happens from here on cuts the wait short that may follow
            last, hopeless = self._ending.is_set(), bool(self._unseen)
            at_least, what = 0.0, Seen.REPORT
            try:
                self._deliver()
                what = Seen.PUSH
                self._push()
            except Away as error:
                self._lost_sight(what, error)
                at_least = min(error.retry_after_s or 0.0, LONGEST_S)
            except Rejected as error:
                self._rejected(error)
            except Refused as error:
                self._end(str(error))
                return
            except Exception as error:  # a full disk, a damaged file: the loop does not need us, so we try again
                self._say(f"delivery: {type(error).__name__}: {error}")
            else:
                wait, self._said = 0.0, ""
                if last:
                    return
                self._work.wait()
                self._work.clear()
                continue
            if last and (hopeless or time.monotonic() > self._until - FLUSH_S / 2):
                return
            wait = min(max(wait * 2, BACKOFF_S[0]), BACKOFF_S[1])
            if last:
                time.sleep(AT_END_S)
            else:
                self._again.wait(max(wait * random.uniform(0.7, 1.3), at_least))

    def _deliver(self) -> None:
        """All reports that wait. Raises Away or Rejected where the machine itself is concerned, or Refused."""
        if not self._is_member:
            try:
                registered = self._register()
            except Rejected as error:
                self._say(str(error))
                raise
            self._epoch, self._next_s = registered.epoch, _bounded(registered.heartbeat_s)
            self._registrations += 1
            self._is_member = self._resync = self._push_due = True
        if self._resync:
            self._resync = False  # before asking: a coordinator may start anew between its answer and us
            try:
                stored = {str(identity): version for identity, version in self._client.known().items()}
            except BaseException:
                self._resync = True
                raise
            self._in_sight(Seen.REPORT)
            history = list(self._history.values())
            self._outbox.put_all(e for e in history if stored.get(e.id, 0) < e.version)
        while (waiting := self._outbox.first()) is not None and time.monotonic() < self._until:
            self._send(waiting)

    def _send(self, experiment: Experiment) -> None:
        """One report. Where it cannot be made or sent, it is left for the next start and blocks none behind it."""
        try:
            report = self._to_report(experiment)
        except (GitError, ValueError) as error:
            self._note(f"#{experiment.number} cannot be reported now: {error}")
            self._outbox.done(experiment)
            return
        try:
            self._client.report(UUID(experiment.id), report)
        except Rejected as error:
            if error.status in (401, 403) or error.kind != "about:blank":
                raise
            if error.status in FOR_GOOD:
                self._note(f"the coordinator refuses #{experiment.number}: {error}")
                self._outbox.refuse(experiment, str(error))
            elif self._doubted is not experiment:
                # A proxy may say so in the coordinator's place: that answers again before the report is given up.
                self._doubted, self._resync = experiment, True
                raise Away(f"#{experiment.number}: {error}") from None
            else:
                self._note(f"#{experiment.number} is sent again at the next start: {error}")
                self._outbox.done(experiment)
        else:
            self._outbox.done(experiment)
            self._in_sight(Seen.REPORT)

    def _push(self) -> None:
        """Branch and attic together, when it is time. Raises Away when it may work later; a refusal is noted."""
        if not self._push_due:
            return
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
            if not any(sign in str(error) for sign in ("rejected", "declined", "denied", "swarm hub")):
                if "could not read Username" in str(error):  # what git makes of a 401
                    error = GitError(f"{remote.url}: the token is refused")
                self._push_due = True
                raise Away(str(error)) from None
            self._note(f"the hub refuses a push: {error}")
        self._pushed = attempts
        self._in_sight(Seen.PUSH)

    # -- what the coordinator's answers mean

    def _lost_sight(self, what: Seen, error: Away) -> None:
        with self._sight:
            first = not self._unseen
            self._unseen.setdefault(what, time.monotonic())
        if first:
            self._note(f"{error}; going on alone, results wait on this disk")

    def _in_sight(self, what: Seen) -> None:
        with self._sight:
            since = min(self._unseen.values(), default=0.0)
            was_away = self._unseen.pop(what, None) is not None
            back = was_away and not self._unseen
        if back:
            self._note(f"the coordinator is back after {time.monotonic() - since:.0f} s")
        if was_away and what is Seen.BEAT:
            self._again.set()

    def _rejected(self, error: Rejected) -> None:
        """About the machine itself: register anew, or end."""
        if error.kind in (wire.SUPERSEDED, wire.RETIRED):
            self._end(str(error))
            return
        if error.status != 401 and error.kind != wire.REGISTER:
            self._say(str(error))
        self._is_member = False
        self._work.set()

    def _end(self, fault: str) -> None:
        self._is_member = False
        self.fault = fault
        self._stop.set()
        self._again.set()
        self._work.set()

    def _say(self, text: str) -> None:
        """Once, however often it is tried again."""
        if text != self._said:
            self._said = text
            self._note(text)


def _copy(experiment: Experiment) -> Experiment:
    return replace(experiment, runs=list(experiment.runs))


def _bounded(seconds: float) -> float:
    return min(max(seconds, OFTEN_S), LONGEST_S)


def superseded(fault: str) -> Refused:
    """What the worker ends with."""
    return Refused(f"this worker stops: {fault}")
