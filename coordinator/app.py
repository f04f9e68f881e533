"""create_app: the coordinator as an ASGI application. Importing this starts nothing."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from shared.errors import BadInput, Refused, SwarmError
from shared.wire import API, Problem

from .api import admin, experiments, health, machines
from .api.access import Gate
from .api.bodies import TooLarge
from .auth import Forbidden, Unauthorized
from .database import Conflict, NotFound
from .reaper import reap
from .service import VERSION, Service
from .stream import ABORT
from .writer import StorageUnavailable

#: What a failure is to HTTP: status, title, whether the same request may succeed later. The first that fits counts.
_PROBLEMS: tuple[tuple[type[SwarmError], int, str, bool], ...] = (
    (Unauthorized, 401, "Token needed", False),
    (Forbidden, 403, "Not allowed", False),
    (NotFound, 404, "Not found", False),
    (Conflict, 409, "Conflict", False),
    (TooLarge, 413, "Too large", False),
    (StorageUnavailable, 503, "Storage unavailable", True),
    (BadInput, 422, "Not acceptable", False),
    (Refused, 409, "Refused", False),
)
_DESCRIBED = {
    "description": "A problem (RFC 9457), its detail one line for people",
    "content": {"application/problem+json": {"schema": Problem.model_json_schema()}},
}
RETRY_AFTER_S = 5


def create_app(service: Service, *, loopback: bool = True) -> Front:
    """`loopback`: only this computer can connect; then, without tokens, only requests to its own name are answered."""
    api = FastAPI(
        title="Ratchet swarm coordinator",
        version=VERSION,
        description="Every machine's branch, one result database, one leaderboard.",
        lifespan=_lifespan(service),
        openapi_url=f"{API}/openapi.json",
        docs_url=None,  # its page takes scripts from elsewhere
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        responses={"default": _DESCRIBED},
    )
    gate = Gate(service)
    for module in (machines, experiments, admin):
        api.include_router(module.router(service, gate), prefix=API)
    api.include_router(health.router(service, gate))
    _problems(api)
    return Front(service, api, loopback=loopback)


def _lifespan(service: Service) -> Any:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.stream.attach(asyncio.get_running_loop())
        reaper = asyncio.create_task(reap(service))
        try:
            yield
        finally:
            reaper.cancel()
            service.stream.end()

    return lifespan


def _problems(api: FastAPI) -> None:
    """Every error as RFC 9457 problem details."""

    @api.exception_handler(SwarmError)
    async def ours(_: Request, error: SwarmError) -> JSONResponse:
        for kind, status, title, retry in _PROBLEMS:
            if isinstance(error, kind):
                return problem(status, title, str(error), retry, getattr(error, "kind", "about:blank"))
        return problem(500, "Failed", str(error), False)

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return problem(422, "Not acceptable", f"{where}: {first['msg']}", False)

    @api.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        answer = problem(error.status_code, HTTPStatus(error.status_code).phrase, str(error.detail), False)
        answer.headers.update(error.headers or {})  # Allow, Content-Range
        return answer

    @api.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        return problem(500, "Our fault", f"{type(error).__name__}; the coordinator's log says more", False)


def problem(status: int, title: str, detail: str, retry: bool, kind: str = "about:blank") -> JSONResponse:
    headers = {"WWW-Authenticate": 'Basic realm="swarm"'} if status == 401 else {}
    if retry:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    words = " ".join(detail.split())  # one line, whatever a library had to say
    body = Problem(type=kind, title=title, status=status, detail=words, retry=retry).model_dump()
    return JSONResponse(body, status, headers, media_type="application/problem+json")


class Front:
    """What every request meets first: the hub beside the API, a limit on bodies, and whom we listen to at all."""

    def __init__(self, service: Service, api: FastAPI, *, loopback: bool) -> None:
        self._service, self.api, self._loopback = service, api, loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.api(scope, receive, send)
            return
        scope = {**scope, ABORT: _aborting(send)}
        headers = dict(scope["headers"])
        if self._loopback and not self._service.tokens.needed and not _is_ours(headers):
            refusal = problem(403, "Not allowed", "without tokens only localhost and 127.* are answered", False)
            await refusal(scope, receive, send)
        elif _from_elsewhere(scope["method"], headers):
            refusal = problem(403, "Not allowed", "a page of another origin may not change anything here", False)
            await refusal(scope, receive, send)
        elif scope["path"].startswith("/git/"):
            await self._service.hub(
                {**scope, "path": scope["path"].removeprefix("/git"), "root_path": "/git"}, receive, send
            )
        else:
            limit = self._service.settings.limits.report_bytes
            length = headers.get(b"content-length", b"")
            if length and not length.isdigit():
                await problem(400, "Bad request", "Content-Length is no number", False)(scope, receive, send)
            elif length and int(length[:20]) > limit:
                refusal = problem(413, "Too large", f"a request has {limit} bytes at most", False)
                await refusal(scope, receive, send)
            else:
                await self.api(scope, _limited(receive, limit), send)


def _is_ours(headers: dict[bytes, bytes]) -> bool:
    """A page elsewhere may reach us through a browser: its own name can lead to 127.0.0.1, or it just posts here."""
    origin = headers.get(b"origin")
    return _is_local(headers.get(b"host", b"")) and (origin is None or _is_local(origin.partition(b"://")[2]))


def _from_elsewhere(method: str, headers: dict[bytes, bytes]) -> bool:
    """A browser sends a password that it knows with any page's requests; only Basic ones come by themselves."""
    if method in ("GET", "HEAD") or not headers.get(b"authorization", b"").lower().startswith(b"basic"):
        return False
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2].lower() != headers.get(b"host", b"").lower()


def _is_local(host: bytes) -> bool:
    return re.fullmatch(rb"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", host.lower()) is not None


def _aborting(send: Send) -> Callable[[], None] | None:
    """What ends a connection at once, where the server under us is uvicorn; a dropped listener needs it (stream.py).

    ASGI has no word for it: whoever returns early makes the server close, and closing waits until the peer has taken
    what is buffered, which is just what a stalled one does not. With a linger of 0 the kernel forgets it as well.
    """
    transport: Any = getattr(getattr(send, "__self__", None), "transport", None)
    if not hasattr(transport, "abort"):
        return None

    def abort() -> None:
        if (connection := transport.get_extra_info("socket")) is not None:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()

    return abort


def _limited(receive: Receive, limit: int) -> Receive:
    """For bodies that did not say how long they are."""
    seen = 0

    async def inner() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise HTTPException(413, f"a request has {limit} bytes at most")
        return message

    return inner
