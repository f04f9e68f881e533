"""The vocabulary: every type that crosses HTTP, every status, each explained where it is declared.

Unknown fields are ignored, so that an older worker and a newer coordinator understand each other; numbers are finite.
`PROTOCOL` changes only when they no longer do, and registration says then which side to upgrade.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

PROTOCOL = 1  #: of worker and coordinator; they must be equal
API = "/api/v1"
INCARNATION = "Swarm-Incarnation"  #: request header: which start of the machine is speaking
BASE_RUNG = "base"  #: the campaign's own size, no promotion

MAX_DIFF_BYTES = 512 * 1024  #: of one experiment's diff
MAX_LOG_BYTES = 64 * 1024  #: of one experiment's log tail
SELF = "self"  #: in place of its name, in a machine's own calls

COMMIT = r"^[0-9a-f]{7,40}$"  #: whole from a machine; a log from elsewhere has only its first 7 digits
Commit = Annotated[str, Field(pattern=COMMIT)]
IMPORTED = "refs/heads/imported/"  #: branches that an administrator brought, each named as its machine
NO_COMMIT = "0" * 40  #: git's own word for none: a log from elsewhere does not name it
Short = Annotated[str, Field(max_length=200)]
Words = Annotated[str, Field(max_length=2000)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=63)]


class Status(StrEnum):
    """What became of an experiment."""

    KEEP = "keep"  #: better here: the branch advanced to it
    DISCARD = "discard"  #: ran, not better enough: the branch was reset
    CRASH = "crash"  #: ended without a valid score
    TIMEOUT = "timeout"  #: killed at a deadline
    CONFLICT = "conflict"  #: a replayed diff that does not fit this machine's code
    VOID = "void"  #: a run that does not count (interrupted, the machine slept): repeated, no verdict


class Role(StrEnum):
    """What the bearer of a token may do."""

    JOIN = "join"  #: register machines, nothing else
    WORKER = "worker"  #: one machine: its reports, its branch and attic; and look
    VIEWER = "viewer"  #: look: API, event stream, clone
    ADMIN = "admin"  #: everything but speak for a machine


class Kind(StrEnum):
    """What a machine is asked to do next."""

    EXPLORE = "explore"  #: the next idea of its own proposer; needs no lease
    CONFIRM = "confirm"  #: run the code of one of its own experiments again, fresh seed
    REPLAY = "replay"  #: try another machine's idea
    PROMOTE = "promote"  #: test an idea one rung up


class MachineState(StrEnum):
    """Whether a machine is at work."""

    ONLINE = "online"  #: heard of within the last three heartbeats
    OFFLINE = "offline"  #: not heard of; its leases have returned
    RETIRED = "retired"  #: taken out by a person; its results stay
    IMPORTED = "imported"  #: a log from elsewhere; never at work here


class LeaseState(StrEnum):
    """Where a leased assignment is."""

    QUEUED = "queued"  #: waits for a machine, also after a lease ran out
    GRANTED = "granted"  #: a machine has it, renewed by its heartbeats
    DONE = "done"  #: its current attempt has reported
    CANCELLED = "cancelled"  #: taken back; a late report is stored and closes nothing


class Wire(BaseModel):
    """Base of all that crosses HTTP."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


# -- machines


class Hardware(Wire):
    """What a machine runs on."""

    host: Annotated[str, Field(max_length=255)] = ""
    os: Short = ""
    chip: Short = ""
    cores: int = 0
    memory_gb: float = 0.0  #: the host's, GiB
    accelerator: Short | None = None
    accelerator_memory_gb: float | None = None


class Registration(Wire):
    """A worker introduces itself. The same `uid` is the same machine, whatever its name."""

    protocol: int = PROTOCOL
    version: Short  #: of ratchet-swarm
    uid: UUID  #: made by the worker once, kept on its disk
    name: Name  #: the name it would like
    machine_class: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=63)]
    backend: Literal["torch", "mlx"] = "torch"
    hardware: Hardware = Hardware()
    #: The kinds of assignment that this version runs.
    can: Annotated[tuple[Name, ...], Field(max_length=16)] = (Kind.EXPLORE,)


class DataInfo(Wire):
    """Where a machine gets the campaign's data."""

    name: str
    served: tuple[str, ...] = ()  #: shards that the coordinator serves under /api/v1/data/shards/
    tokenizer: bool = False  #: whether it serves the tokenizer


class CampaignInfo(Wire):
    """The study that a coordinator hosts."""

    name: str
    tag: str
    branch_prefix: str
    metric: str
    direction: Literal["minimize", "maximize"]
    profile: str
    base: Commit
    folder: str = ""  #: the task's directory in the repository, '' at its top
    repository: str  #: path of the hub below the coordinator's address
    digest: str | None = None  #: what results must be measured with; None without a profile
    data: DataInfo | None = None


class Registered(Wire):
    """The coordinator's answer to a registration."""

    machine: Name
    branch: str  #: the ref that is its own, whatever it is called later
    attic: str
    token: str | None  #: bound to this machine; None: keep the one you have
    incarnation: int  #: calls that name an older one get 409
    version: str  #: the coordinator's
    heartbeat_s: float
    epoch: str  #: of the coordinator's start; see HeartbeatReply
    campaign: CampaignInfo


class LeaseRef(Wire):
    """One grant of a lease."""

    id: UUID
    attempt: int


class Activity(Wire):
    """What a machine is doing now."""

    state: Literal["starting", "running", "waiting", "paused", "stopping", "failed"] = "starting"
    experiment: UUID | None = None
    description: Words = ""
    number: int | None = None
    seconds: float | None = None  #: since the run began
    step: int | None = None
    share: float | None = None  #: of the budget, 0 to 1
    loss: float | None = None
    outbox: int = 0  #: reports that wait on its disk
    note: Words = ""


class Heartbeat(Wire):
    activity: Activity = Activity()
    leases: tuple[LeaseRef, ...] = ()


class HeartbeatReply(Wire):
    next_s: float  #: seconds to the next heartbeat; more under load
    epoch: str  #: another one than before: the coordinator was started anew, ask what it knows
    lost: tuple[UUID, ...] = ()  #: leases that this machine holds no longer
    pause: bool = False


class MachineView(Wire):
    """A machine, as people see it."""

    name: str
    state: MachineState
    machine_class: str
    backend: str
    branch: str
    hardware: Hardware
    version: str
    incarnation: int
    registered_at: int  #: unix seconds
    seen_s: float | None = None  #: seconds since it was heard of
    paused: bool = False
    activity: Activity | None = None


class MachineChange(Wire):
    """What an administrator changes of a machine."""

    name: Name | None = None
    paused: bool | None = None


# -- experiments


class RunReport(Wire):
    """One execution."""

    id: UUID
    seed: int
    score: float | None
    status: Status | None = None  #: crash or timeout; None where there is a score
    reason: Words = ""
    memory_gb: float = 0.0
    seconds: float = 0.0
    trained_share: float | None = None
    epochs: float | None = None
    digest: Annotated[str, Field(max_length=64)] | None = None
    phases: dict[str, float] = {}  #: seconds: start, compile, train, evaluate
    metrics: dict[str, float] = {}  #: the summary that the run printed


class ExperimentReport(Wire):
    """All that a machine knows of one decided experiment; sent again, with a higher version, when more is known."""

    version: Annotated[int, Field(ge=1)]
    number: Annotated[int, Field(ge=0)]  #: on its machine; 0 is the baseline
    kind: Kind = Kind.EXPLORE
    idea: UUID
    fingerprint: Annotated[str, Field(max_length=80)] = ""
    profile: Annotated[str, Field(max_length=63)] = "default"
    rung: Annotated[str, Field(max_length=63)] = BASE_RUNG
    tested: Commit  #: T, the commit that ran
    parent: Commit  #: where the branch stood when it was tried
    kept: Commit | None = None  #: K, the commit on the branch
    description: Words
    proposer: Annotated[str, Field(max_length=63)] = ""
    edits: dict[str, Any] = {}  #: constants set, by name
    params: dict[str, Any] = {}
    nodes_added: int = 0
    code_state: Annotated[str, Field(max_length=64)] = ""
    status: Status
    reason: Words = ""
    pruned: bool = False
    decided_at: int  #: unix seconds, the machine's clock
    runs: Annotated[tuple[RunReport, ...], Field(max_length=1000)] = ()
    diff: str | None = None  #: of the mutable files, parent to tested; None where nothing changed
    log_tail: str = ""
    lease: LeaseRef | None = None

    @property
    def score(self) -> float | None:
        """The score that it was decided on."""
        return self.runs[0].score if self.runs else None


class Accepted(Wire):
    """What became of a report."""

    stored: bool  #: False: this version, or a later one, was there already
    suspect: bool = False
    closed: bool = False  #: the lease that it was for is done


class ExperimentRow(Wire):
    """An experiment in a list."""

    id: UUID
    machine: str
    machine_class: str
    number: int
    kind: Kind
    idea: UUID
    profile: str
    rung: str
    status: Status
    score: float | None  #: that it was decided on
    mean: float | None  #: of all its runs
    runs: int
    memory_gb: float
    seconds: float
    tested: str
    parent: str
    kept: str | None
    description: str
    proposer: str
    reason: str
    confirmed: bool
    suspect: bool
    decided_at: int
    position: int  #: in the order of arrival; pages go by it


class ExperimentView(ExperimentRow):
    """An experiment with all that is known of it."""

    fingerprint: str
    code_state: str
    nodes_added: int
    digest: str | None
    edits: dict[str, Any]
    params: dict[str, Any]
    log_tail: str
    has_diff: bool
    run_reports: tuple[RunReport, ...]


class Page(Wire):
    """Part of a list; `next` is the `after` of the following page, None at the end."""

    next: int | None = None


class ExperimentPage(Page):
    experiments: tuple[ExperimentRow, ...]


class Standing(Wire):
    """A line of the leaderboard: where one machine stands in one profile and rung."""

    rank: int  #: within its group, or across classes
    machine: str
    machine_class: str
    profile: str
    rung: str
    best: float | None  #: mean of the runs of HEAD's code
    baseline: float | None  #: mean of the runs of the unmodified code
    gain: float | None  #: positive where better
    sigma: float
    gain_sigmas: float | None
    runs: int  #: of HEAD's code
    confirmed: bool
    suspects: int  #: results set aside until someone has looked
    experiments: int  #: decided, the baseline not counted
    keeps: int
    lineage: int  #: keeps between base and HEAD
    commit: str | None
    experiment: UUID | None
    description: str


class Leaderboard(Page):
    campaign: str
    metric: str
    direction: Literal["minimize", "maximize"]
    order: Literal["group", "sigmas"]
    standings: tuple[Standing, ...]


class Branch(Wire):
    machine: str
    ref: str
    commit: str
    attic: str | None
    pushed_at: int


class LineageStep(Wire):
    """A kept commit, newest first."""

    commit: str
    parent: str
    machine: str
    experiment: UUID
    description: str
    score: float | None


class IdeaView(Wire):
    id: UUID
    fingerprint: str
    description: str
    machine: str  #: where it was had first
    tried: int
    kept: int


class Event(Wire):
    """Something that happened; positions grow in commit order."""

    position: int
    kind: str
    at: int  #: unix seconds, the coordinator's clock
    machine: str | None = None
    data: dict[str, Any] = {}


# -- assignments


class _Leased(Wire):
    lease: LeaseRef
    ttl_s: float


class Explore(Wire):
    kind: Literal["explore"] = "explore"
    wait_s: float = 0.0  #: paused: ask again after so long instead of exploring


class Confirm(_Leased):
    kind: Literal["confirm"] = "confirm"
    experiment: UUID  #: of this machine


class Replay(_Leased):
    kind: Literal["replay"] = "replay"
    experiment: UUID
    idea: UUID
    tested: Commit
    parent: Commit
    description: Words = ""


class Promote(_Leased):
    kind: Literal["promote"] = "promote"
    experiment: UUID
    idea: UUID
    tested: Commit
    parent: Commit
    rung: str
    description: Words = ""


Assignment = Annotated[Explore | Confirm | Replay | Promote, Field(discriminator="kind")]
_ASSIGNMENT: TypeAdapter[Explore | Confirm | Replay | Promote] = TypeAdapter(Assignment)


def assignment(value: object) -> Explore | Confirm | Replay | Promote:
    """What the coordinator asks for; a kind that this version does not know means Explore."""
    try:
        return _ASSIGNMENT.validate_python(value)
    except ValidationError:
        return Explore()


class LeaseOrder(Wire):
    """Queue an assignment: for one machine, or for any that can."""

    kind: Literal[Kind.CONFIRM, Kind.REPLAY, Kind.PROMOTE]
    experiment: UUID
    machine: Name | None = None
    rung: Annotated[str, Field(max_length=63)] = BASE_RUNG


class LeaseView(Wire):
    id: UUID
    kind: Kind
    state: LeaseState
    attempt: int
    experiment: UUID
    rung: str
    machine: str | None  #: that it is for, or that has it
    closed_by: UUID | None = None


# -- tokens and problems


class TokenOrder(Wire):
    role: Literal[Role.JOIN, Role.VIEWER, Role.ADMIN, Role.WORKER]
    label: Annotated[str, Field(max_length=100)] = ""
    expires_s: Annotated[float, Field(gt=0)] | None = None
    machine: Name | None = None  #: for role worker: the machine it is bound to


class TokenView(Wire):
    id: int
    role: Role
    label: str
    machine: str | None
    created_at: int
    expires_at: int | None
    revoked: bool


class TokenMade(TokenView):
    token: str  #: shown once, never stored


#: Problem types that a worker acts on.
REGISTER = "urn:swarm:register"  #: this coordinator knows less than the worker (a restored backup): register anew
SUPERSEDED = "urn:swarm:superseded"  #: another worker speaks for this machine now: stop
RETIRED = "urn:swarm:retired"  #: a person has taken this machine out: stop


class Problem(Wire):
    """RFC 9457 problem details."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    retry: bool = False  #: whether the same request may succeed later
