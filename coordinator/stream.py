"""The event stream: committed events, each once and in order, to any number of listeners.

The latest events are kept in one ring that all listeners share; a listener is a position in it. One that falls out of
the ring, or whose connection takes nothing for STALL_S, is dropped: it comes back with Last-Event-ID and reads what it
missed from the database. No listener holds a session, a thread or a queue. Listeners are woken in turns, TURN at a
time, so that a request which comes meanwhile waits for a turn and not for a thousand of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from shared.wire import Event

RING = 4096  #: events kept in memory
CHUNK = 200  #: events read, and sent, at a time; what waits in memory for a slow connection is one of these
STALL_S = 10.0  #: a connection that takes nothing for so long is dropped
KEEPALIVE_S = 15.0  #: a comment line, so that proxies and clients see that the line is alive
LISTENERS = 5000  #: at once
TURN = 25  #: listeners woken in one go; one costs some 60 us
GATHER_S = 0.1  #: between two rounds of waking; what comes meanwhile goes out together
ABORT = "swarm.abort"  #: in a request's scope: ends its connection without waiting for the peer, or None

Item = tuple[int, str, bytes]  #: position, kind, as sent


class Dropped(Exception):
    """This listener was too slow."""


class Stream:
    """Fan-out of committed events. `publish` comes from the writer's thread; all else runs on the event loop."""

    def __init__(
        self,
        read: Callable[[int, int], list[Event]],
        ring: int = RING,
        stall_s: float = STALL_S,
        keepalive_s: float = KEEPALIVE_S,
    ) -> None:
        """`read(after, limit)`: events from the database."""
        self._read, self.stall_s, self.keepalive_s = read, stall_s, keepalive_s
        self._ring: deque[Item] = deque(maxlen=ring)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event | None = None
        self._waiters: set[asyncio.Future[None]] = set()
        self._rounds: asyncio.Task[None] | None = None
        self.listeners = 0
        self.dropped = 0

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Where listeners live from now on."""
        self._loop, self._news = loop, asyncio.Event()
        self._rounds = loop.create_task(self._wake_in_turns(self._news))

    def end(self) -> None:
        """Every listener's response ends, and no other begins. Call it on the loop."""
        self._loop = self._news = None
        if self._rounds is not None:
            self._rounds.cancel()
            self._rounds = None
        _wake(self._waiters)

    def publish(self, events: list[Event]) -> None:
        items = encoded(events)
        if (loop := self._loop) is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._append, items)

    def _append(self, items: list[Item]) -> None:
        self._ring.extend(items)
        if self._news is not None:
            self._news.set()

    async def _wake_in_turns(self, news: asyncio.Event) -> None:
        while True:
            await news.wait()
            news.clear()
            waiters = list(self._waiters)  # who begins to wait from here on has seen what is new
            for start in range(0, len(waiters), TURN):
                _wake(waiters[start : start + TURN])
                await asyncio.sleep(0)
            await asyncio.sleep(GATHER_S)

    async def _wait(self, seconds: float) -> None:
        """Until there may be something new, so long at most."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await waiter
        finally:
            self._waiters.discard(waiter)

    def _fresh(self, after: int) -> list[Item] | None:
        """What the ring has next after a position; None where it begins later."""
        if not self._ring or after + 1 < self._ring[0][0]:
            return None
        # Positions are contiguous, so where a listener stands in the ring is a subtraction.
        start = after + 1 - self._ring[0][0]
        return [self._ring[i] for i in range(start, min(start + CHUNK, len(self._ring)))]

    async def listen(self, after: int, kinds: frozenset[str] = frozenset()) -> AsyncIterator[bytes]:
        """Chunks as they are sent, from the first event after `after`; raises Dropped for one that fell behind."""
        clock = asyncio.get_running_loop().time
        behind = True  # not yet through with the database
        quiet_since = clock()
        while self._loop is not None:
            items, chunk = self._fresh(after), b""
            if items is None and behind:
                start = self._ring[0][0] if self._ring else after + 1
                items = await run_in_threadpool(lambda position: encoded(self._read(position, CHUNK)), after)
                if not items:  # what lies between here and there is no longer stored
                    behind, after = False, start - 1
                    continue
            elif items is None and self._ring:
                raise Dropped
            else:
                behind = False
            if items:
                after = items[-1][0]
                chunk = b"".join(data for _, kind, data in items if not kinds or kind in kinds)
            else:
                await self._wait(quiet_since + self.keepalive_s - clock())
            if chunk or clock() - quiet_since >= self.keepalive_s:  # also where only unwanted kinds come
                quiet_since = clock()
                yield chunk or b": alive\n\n"

    async def serve(self, scope: Scope, receive: Receive, send: Send, after: int, kinds: frozenset[str]) -> None:
        """One listener's response, as ASGI."""
        self.listeners += 1
        gone = asyncio.create_task(_disconnected(receive))
        feed = asyncio.create_task(self._feed(send, after, kinds))
        try:
            await asyncio.wait({gone, feed}, return_when=asyncio.FIRST_COMPLETED)
            if feed.done():
                feed.result()
        except Dropped:
            self.dropped += 1
            if (abort := scope.get(ABORT)) is not None:
                abort()
                await asyncio.wait({gone}, timeout=self.stall_s)  # the server hears of it a moment later
        finally:
            self.listeners -= 1
            gone.cancel()
            feed.cancel()

    async def _feed(self, send: Send, after: int, kinds: frozenset[str]) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._put(send, b"retry: 2000\n\n")
        async for chunk in self.listen(after, kinds):
            await self._put(send, chunk)
        await self._put(send, b"", more=False)

    async def _put(self, send: Send, body: bytes, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self.stall_s):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            raise Dropped from None


def _wake(waiters: Iterable[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def encoded(events: list[Event]) -> list[Item]:
    """As server-sent events have them."""
    return [(event.position, event.kind, _encode(event)) for event in events]


def _encode(event: Event) -> bytes:
    data = json.dumps(event.model_dump(), separators=(",", ":"))
    return f"id: {event.position}\nevent: {event.kind}\ndata: {data}\n\n".encode()
