"""Leases and tokens, for administrators; data and events for members."""

from __future__ import annotations

import re
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Query
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from shared import wire
from shared.wire import LeaseState

from ..database import NotFound
from ..service import Service
from ..stream import LISTENERS, Stream
from ..writer import StorageUnavailable
from .access import Gate
from .bodies import LARGEST, check


class _Feed(Response):
    """A response that is the event stream."""

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, after: int, kinds: frozenset[str], status_code: int = 200) -> None:
        super().__init__(status_code=status_code)  # FastAPI's description of the API looks for the argument
        self._stream, self._after, self._kinds = stream, after, kinds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._stream.serve(scope, receive, send, self._after, self._kinds)


class _File(FileResponse):
    """A file, or the ranges of it that are asked for; a range that it has not is a problem like any other."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal: Message | None = None

        async def unless_refused(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refusal = message
            if refusal is None:
                await send(message)

        await super().__call__(scope, receive, unless_refused)
        if refusal is not None:
            kept = {k.decode(): v.decode() for k, v in refusal["headers"] if k == b"content-range"}
            raise HTTPException(refusal["status"], f"no such range: {Headers(scope=scope)['range'][:100]}", kept)


def router(service: Service, gate: Gate) -> APIRouter:
    routes = APIRouter()
    store = service.store

    @routes.get("/events", tags=["looking"], dependencies=[gate.look], response_class=_Feed)
    async def events(
        last_event_id: Annotated[str | None, Header()] = None,
        after: Annotated[int | None, Query(ge=0, le=LARGEST)] = None,
        kind: Annotated[list[str], Query()] = [],  # noqa: B006  # FastAPI copies it
    ) -> Response:
        """Server-sent events from now on; with Last-Event-ID (or `after`), from the first one missed."""
        if service.stream.listeners >= LISTENERS:
            raise StorageUnavailable(f"{LISTENERS} listeners are the most; try again later")
        start = store.writer.last_event if after is None else after
        if last_event_id is not None and re.fullmatch(r"[0-9]{1,19}", last_event_id):
            start = int(last_event_id)
        return _Feed(service.stream, min(start, store.writer.last_event), frozenset(kind))

    @routes.get("/leases", tags=["leases"], dependencies=[gate.look])
    def leases(state: LeaseState | None = None) -> list[wire.LeaseView]:
        return store.leases.all(state)

    @routes.post("/leases", tags=["leases"], status_code=201, dependencies=[gate.admin])
    def queue(order: wire.LeaseOrder) -> dict[str, UUID]:
        """Queues a confirmation, replay or promotion."""
        check(order)
        return {"id": store.leases.queue(order)}

    @routes.delete("/leases/{lease}", tags=["leases"], status_code=204, dependencies=[gate.admin])
    def cancel(lease: UUID) -> None:
        """Takes it back; a report that still comes is stored and closes nothing."""
        store.leases.cancel(lease)
        service.presence.closed(lease)

    @routes.get("/tokens", tags=["tokens"], dependencies=[gate.admin])
    def tokens() -> list[wire.TokenView]:
        return service.tokens.all()

    @routes.post("/tokens", tags=["tokens"], status_code=201, dependencies=[gate.admin])
    def make_token(order: wire.TokenOrder) -> wire.TokenMade:
        """The token is shown in this answer, and never again."""
        return service.tokens.make(order)

    @routes.delete("/tokens/{token}", tags=["tokens"], status_code=204, dependencies=[gate.admin])
    def revoke(token: Annotated[int, PathParameter(le=LARGEST)]) -> None:
        service.tokens.revoke(token)

    @routes.get("/data/{name:path}", tags=["data"], dependencies=[gate.look], response_class=FileResponse)
    def data(name: str) -> FileResponse:
        """The campaign's tokenizer, validation rows and shards; ranges are answered, so a download can go on."""
        path = service.files.paths.get(name)
        if path is None or not path.is_file():
            raise NotFound(f"no data {name!r} is served; there are: {', '.join(service.files.paths) or 'none'}")
        return _File(path, media_type="application/octet-stream")

    return routes
