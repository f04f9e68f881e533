"""The event stream: committed events, each once and in order, to any number of listeners.

The latest events are kept in one ring that all listeners share; a listener is a position in it. One that falls out of
the ring, or whose connection takes nothing for STALL_S, is dropped: it comes back with Last-Event-ID and reads what it
missed from the database. No listener holds a session, a thread or a queue.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable

from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from shared.wire import Event

RING = 4096  #: events kept in memory
BACKLOG = 500  #: events read from the database at a time
STALL_S = 10.0  #: a connection that takes nothing for so long is dropped
KEEPALIVE_S = 15.0  #: a comment line, so that proxies and clients see that the line is alive
LISTENERS = 5000  #: at once


class Dropped(Exception):
    """This listener was too slow."""


class Stream:
    """Fan-out of committed events. `publish` comes from the writer's thread; all else runs on the event loop."""

    def __init__(self, read: Callable[[int, int], list[Event]]) -> None:
        """`read(after, limit)`: events from the database."""
        self._read = read
        self._ring: deque[tuple[int, str, bytes]] = deque(maxlen=RING)  #: position, kind, as sent
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiters: set[asyncio.Future[None]] = set()
        self.listeners = 0
        self.dropped = 0

    def attach(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Where listeners live; None when the service stops."""
        self._loop = loop

    def publish(self, events: list[Event]) -> None:
        items = [(event.position, event.kind, encode(event)) for event in events]
        if (loop := self._loop) is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._append, items)

    def _append(self, items: list[tuple[int, str, bytes]]) -> None:
        self._ring.extend(items)
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def wake(self) -> None:
        """Lets every listener look again; they end when the loop was detached."""
        self._append([])

    async def _wait(self) -> bool:
        """Until there is something new; False when nothing came for KEEPALIVE_S."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait_for(waiter, KEEPALIVE_S)
        except TimeoutError:
            return False
        finally:
            self._waiters.discard(waiter)
        return True

    async def listen(self, after: int, kinds: frozenset[str] = frozenset()) -> AsyncIterator[bytes]:
        """Chunks as they are sent, from the first event after `after`; raises Dropped for one that fell behind."""
        while self._loop is not None and (not self._ring or after + 1 < self._ring[0][0]):
            backlog = await run_in_threadpool(self._read, after, BACKLOG)
            if not backlog:
                break
            after = backlog[-1].position
            if wanted := [encode(event) for event in backlog if not kinds or event.kind in kinds]:
                yield b"".join(wanted)
        live = False
        while self._loop is not None:
            if self._ring and self._ring[-1][0] > after:
                first = self._ring[0][0]
                if after + 1 < first:
                    if live:
                        raise Dropped
                    backlog = await run_in_threadpool(self._read, after, BACKLOG)
                    after = backlog[-1].position if backlog else first - 1
                    yield b"".join(encode(event) for event in backlog if not kinds or event.kind in kinds)
                    continue
                live = True
                # Positions are contiguous, so where a listener stands in the ring is a subtraction.
                fresh = [self._ring[i] for i in range(after + 1 - first, len(self._ring))]
                after = fresh[-1][0]
                if wanted := [data for _, kind, data in fresh if not kinds or kind in kinds]:
                    yield b"".join(wanted)
            elif not await self._wait():
                yield b": alive\n\n"

    async def serve(self, scope: Scope, receive: Receive, send: Send, after: int, kinds: frozenset[str]) -> None:
        """One listener's response, as ASGI."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        self.listeners += 1
        gone = asyncio.create_task(_disconnected(receive))
        feed = asyncio.create_task(self._feed(send, headers, after, kinds))
        try:
            await asyncio.wait({gone, feed}, return_when=asyncio.FIRST_COMPLETED)
            if feed.done():
                feed.result()
        except (Dropped, TimeoutError):
            self.dropped += 1
        finally:
            self.listeners -= 1
            gone.cancel()
            feed.cancel()

    async def _feed(self, send: Send, headers: list[tuple[bytes, bytes]], after: int, kinds: frozenset[str]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"retry: 2000\n\n", "more_body": True})
        async for chunk in self.listen(after, kinds):
            message = {"type": "http.response.body", "body": chunk, "more_body": True}
            await asyncio.wait_for(send(message), STALL_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def encode(event: Event) -> bytes:
    """As server-sent events have it."""
    data = json.dumps(event.model_dump(), separators=(",", ":"))
    return f"id: {event.position}\nevent: {event.kind}\ndata: {data}\n\n".encode()
