"""CoordinatorClient: the only HTTP caller. The command line and the worker speak through it.

Every failure is one of two: Away (no answer, or one that says "later": try again) and Rejected (the answer is no).
NOT covered: retries; who calls knows how long it can wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from uuid import UUID

import httpx
from pydantic import BaseModel, ValidationError

from . import wire
from .errors import BadInput, Refused, SwarmError
from .wire import API, INCARNATION

DEFAULT_URL = "http://127.0.0.1:8420"
TIMEOUT_S = 10.0
ASK_S = 2.0  #: for an assignment: no answer by then means, explore


_Request = TypeVar("_Request", bound=BaseModel)


def request_of(kind: type[_Request], **values: Any) -> _Request:
    """A request of what a person typed. Raises BadInput, which names the option."""
    try:
        return kind(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        option = {"machine_class": "class", "expires_s": "expires"}.get(name, name)
        raise BadInput(f"--{option}: {problem['msg']}, found {problem['input']!r}") from None


class Away(SwarmError):
    """The coordinator cannot be reached, or cannot take it now."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Rejected(Refused):
    """The coordinator's answer is no."""

    def __init__(self, problem: wire.Problem) -> None:
        super().__init__(problem.detail or problem.title)
        self.status, self.kind = problem.status, problem.type


class CoordinatorClient:
    """Calls to one coordinator. Safe to use from several threads."""

    def __init__(self, url: str, token: str | None = None, http: httpx.Client | None = None) -> None:
        """`http`: another transport, for tests (starlette's TestClient). Certificates: SSL_CERT_FILE adds one.

        Raises BadInput for an address that is none.
        """
        self.url, self.token = url.rstrip("/"), token
        _check_address(url)
        self._http = http or httpx.Client(base_url=self.url, timeout=TIMEOUT_S, follow_redirects=False)
        self.incarnation = 0

    def close(self) -> None:
        self._http.close()

    # -- a machine

    def register(self, registration: wire.Registration) -> wire.Registered:
        answer = wire.Registered.model_validate(self._json("POST", "/machines", registration))
        self.incarnation = answer.incarnation
        self.token = answer.token or self.token
        return answer

    def heartbeat(self, heartbeat: wire.Heartbeat) -> wire.HeartbeatReply:
        return wire.HeartbeatReply.model_validate(self._json("POST", self._mine("heartbeat"), heartbeat))

    def assignment(self) -> wire.Explore | wire.Confirm | wire.Replay | wire.Promote:
        return wire.assignment(self._json("POST", self._mine("assignment"), timeout=ASK_S))

    def give_back(self, lease: wire.LeaseRef) -> None:
        self._json("DELETE", self._mine(f"leases/{lease.id}/{lease.attempt}"), timeout=ASK_S)

    def report(self, experiment: UUID, report: wire.ExperimentReport) -> wire.Accepted:
        return wire.Accepted.model_validate(self._json("PUT", self._mine(f"experiments/{experiment}"), report))

    def known(self) -> dict[UUID, int]:
        return {UUID(key): version for key, version in self._json("GET", self._mine("known")).items()}

    def _mine(self, path: str) -> str:
        return f"/machines/{wire.SELF}/{path}"

    # -- looking

    def campaign(self) -> wire.CampaignInfo:
        return wire.CampaignInfo.model_validate(self._json("GET", "/campaign"))

    def leaderboard(self, **filters: Any) -> wire.Leaderboard:
        return wire.Leaderboard.model_validate(self._json("GET", "/leaderboard", query=filters))

    def machines(self) -> list[wire.MachineView]:
        return [wire.MachineView.model_validate(one) for one in self._json("GET", "/machines")]

    def experiments(self, **filters: Any) -> wire.ExperimentPage:
        return wire.ExperimentPage.model_validate(self._json("GET", "/experiments", query=filters))

    def experiment(self, identity: str) -> wire.ExperimentView:
        return wire.ExperimentView.model_validate(self._json("GET", f"/experiments/{identity}"))

    def diff(self, identity: str) -> str:
        return self._call("GET", f"/experiments/{identity}/diff").text

    def branches(self) -> list[wire.Branch]:
        return [wire.Branch.model_validate(one) for one in self._json("GET", "/branches")]

    def lineage(self, commit: str) -> list[wire.LineageStep]:
        return [wire.LineageStep.model_validate(one) for one in self._json("GET", f"/lineage/{commit}")]

    def leases(self) -> list[wire.LeaseView]:
        return [wire.LeaseView.model_validate(one) for one in self._json("GET", "/leases")]

    def health(self) -> dict[str, Any]:
        """Also where it is not well; raises Away only where there is no answer."""
        try:
            return dict(self._http.get("/healthz").json())
        except (httpx.HTTPError, ValueError) as error:
            raise self._away(error) from None

    def last_event(self) -> int:
        """Position of the latest event, 0 before the first."""
        try:
            answer = self._http.get("/metrics", headers=self._headers())
        except (httpx.HTTPError, OSError) as error:
            raise self._away(error) from None
        if answer.status_code != 200:
            self._raise(answer)
        counted = [line.split()[1] for line in answer.text.splitlines() if line.startswith("swarm_events_total ")]
        return int(float(counted[0])) if counted else 0

    def events(self, after: int | None = None, opened: Callable[[], None] = lambda: None) -> Iterator[wire.Event]:
        """Events as they come, from now on or from after a position; raises Away when the line breaks.

        `opened` is called once the line stands: nothing that happens from then on is missed.
        """
        headers = self._headers() | ({"Last-Event-ID": str(after)} if after is not None else {})
        timeout = httpx.Timeout(TIMEOUT_S, read=60.0)
        try:
            with self._http.stream("GET", f"{API}/events", headers=headers, timeout=timeout) as answer:
                if answer.status_code != 200:
                    answer.read()
                    self._raise(answer)
                opened()
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        yield wire.Event.model_validate_json(line[6:])
        except httpx.HTTPError as error:
            raise self._away(error) from None

    def export(self, form: str) -> Iterator[bytes]:
        timeout = httpx.Timeout(TIMEOUT_S, read=600.0)
        try:
            with self._http.stream(
                "GET", f"{API}/export", params={"format": form}, headers=self._headers(), timeout=timeout
            ) as answer:
                if answer.status_code != 200:
                    answer.read()
                    self._raise(answer)
                yield from answer.iter_bytes()
        except httpx.HTTPError as error:
            raise self._away(error) from None

    # -- administration

    def queue(self, order: wire.LeaseOrder) -> UUID:
        return UUID(self._json("POST", "/leases", order)["id"])

    def cancel(self, lease: UUID) -> None:
        self._json("DELETE", f"/leases/{lease}")

    def clear(self, identity: str) -> None:
        self._json("POST", f"/experiments/{identity}/clear")

    def change(self, machine: str, change: wire.MachineChange) -> wire.MachineView:
        return wire.MachineView.model_validate(self._json("PATCH", f"/machines/{machine}", change))

    def retire(self, machine: str) -> None:
        self._json("DELETE", f"/machines/{machine}")

    def make_token(self, order: wire.TokenOrder) -> wire.TokenMade:
        return wire.TokenMade.model_validate(self._json("POST", "/tokens", order))

    def import_machine(self, registration: wire.Registration) -> str:
        return str(self._json("POST", "/import/machines", registration)["machine"])

    def import_experiment(self, machine: str, experiment: UUID, report: wire.ExperimentReport) -> wire.Accepted:
        path = f"/import/machines/{machine}/experiments/{experiment}"
        return wire.Accepted.model_validate(self._json("PUT", path, report))

    # -- data

    def data_url(self) -> str:
        return f"{self.url}{API}/data"

    def data(self, name: str) -> bytes:
        return self._call("GET", f"/data/{name}").content

    # -- how

    def _json(
        self,
        method: str,
        path: str,
        body: BaseModel | None = None,
        query: dict[str, Any] | None = None,
        timeout: float = TIMEOUT_S,
    ) -> Any:
        answer = self._call(method, path, body, query, timeout)
        if answer.status_code == 204:
            return None
        try:
            return answer.json()
        except ValueError:
            raise Away(f"{self.url}: answers, but not as a coordinator does; check the address") from None

    def _call(
        self,
        method: str,
        path: str,
        body: BaseModel | None = None,
        query: dict[str, Any] | None = None,
        timeout: float = TIMEOUT_S,
    ) -> httpx.Response:
        headers = self._headers()
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = body.model_dump_json()
        chosen = {key: value for key, value in (query or {}).items() if value is not None}
        try:
            answer = self._http.request(
                method, f"{API}{path}", content=content, params=chosen, headers=headers, timeout=timeout
            )
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise self._away(error) from None
        if answer.status_code >= 300:
            self._raise(answer)
        return answer

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        if self.incarnation:
            headers[INCARNATION] = str(self.incarnation)
        return headers

    def _away(self, error: Exception) -> Away:
        words = " ".join(str(error).split()) or type(error).__name__
        return Away(f"{self.url}: no coordinator answers ({words}); is it running, and is the address right?")

    def _raise(self, answer: httpx.Response) -> None:
        try:
            problem = wire.Problem.model_validate_json(answer.content)
        except (ValidationError, ValueError):
            problem = wire.Problem(
                title=answer.reason_phrase,
                status=answer.status_code,
                detail=f"{self.url} says {answer.status_code} {answer.reason_phrase}; check the address",
                retry=answer.status_code >= 500,
            )
        if problem.retry or answer.status_code in (429, 502, 503, 504):
            after = answer.headers.get("Retry-After", "")
            raise Away(problem.detail, float(after) if after.isdigit() else None)
        raise Rejected(problem)


def _check_address(url: str) -> None:
    """httpx takes `localhost:8420` for an address too, of scheme `localhost`; every call would look like an outage."""
    try:
        parts = httpx.URL(url)
        why = "" if parts.scheme in ("http", "https") and parts.host else "it must begin with http:// or https://"
    except httpx.InvalidURL as error:
        why = str(error)
    if why:
        raise BadInput(f"{url}: no address of a coordinator: {why}; one looks like http://localhost:8420")


def client_from(url: str | None, token: str | None) -> CoordinatorClient:
    """From the command line's options, else SWARM_COORDINATOR and SWARM_TOKEN, else this computer."""
    chosen = url or os.environ.get("SWARM_COORDINATOR") or DEFAULT_URL
    return CoordinatorClient(chosen, token or os.environ.get("SWARM_TOKEN") or None)
