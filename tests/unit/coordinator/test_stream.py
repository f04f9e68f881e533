"""The stream without HTTP: a list stands for the database, a thread for the writer."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from coordinator.stream import CHUNK, RING, Dropped, Stream
from shared.wire import Event

ALIVE = b": alive\n\n"
LONG_S = 30.0  #: for what must come about


class Source:
    """Commits events and publishes them, from a thread, as the writer does."""

    def __init__(self, ring: int = RING, keepalive_s: float = 60.0) -> None:
        self.stored: list[Event] = []
        self.reads = 0
        self.stream = Stream(self._read, ring=ring, keepalive_s=keepalive_s)

    def _read(self, after: int, limit: int) -> list[Event]:
        self.reads += 1
        return [event for event in self.stored if event.position > after][:limit]

    def commit(self, *kinds: str) -> None:
        start = self.stored[-1].position + 1 if self.stored else 1
        new = [Event(position=start + n, kind=kind, at=1) for n, kind in enumerate(kinds)]
        self.stored += new
        self.stream.publish(new)

    async def committed(self, *kinds: str) -> None:
        await asyncio.to_thread(self.commit, *kinds)


def on_loop(source: Source, story: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        source.stream.attach(asyncio.get_running_loop())
        try:
            async with asyncio.timeout(LONG_S):
                await story()
        finally:
            source.stream.end()

    asyncio.run(whole())


def positions(chunk: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"^id: (\d+)$", chunk, re.MULTILINE)]


async def take(feed: AsyncIterator[bytes], count: int) -> list[int]:
    """The positions of the next events, at least so many."""
    found: list[int] = []
    while len(found) < count:
        found += positions(await anext(feed))
    return found


def test_everything_there_ever_was_and_then_what_comes() -> None:
    source = Source(ring=16)
    source.commit(*["old"] * (2 * CHUNK + 7))

    async def story() -> None:
        feed = source.stream.listen(0)
        assert await take(feed, 2 * CHUNK + 7) == list(range(1, 2 * CHUNK + 8))
        await source.committed("new", "new")
        assert await take(feed, 2) == [2 * CHUNK + 8, 2 * CHUNK + 9]

    on_loop(source, story)


def test_who_is_in_the_ring_costs_no_query() -> None:
    source = Source()

    async def story() -> None:
        await source.committed(*["a"] * 10)
        feed = source.stream.listen(0)
        assert await take(feed, 10) == list(range(1, 11))
        assert await take(source.stream.listen(7), 3) == [8, 9, 10]
        assert source.reads == 0
        await source.committed(*["a"] * (2 * CHUNK))
        assert len(positions(await anext(source.stream.listen(0)))) == CHUNK  # not all at once into memory

    on_loop(source, story)


def test_an_event_is_as_server_sent_events_have_it() -> None:
    source = Source()

    async def story() -> None:
        await source.committed("keep")
        chunk = await anext(source.stream.listen(0))
        assert chunk == b'id: 1\nevent: keep\ndata: {"position":1,"kind":"keep","at":1,"machine":null,"data":{}}\n\n'

    on_loop(source, story)


def test_only_the_kinds_that_are_wanted_from_database_and_ring() -> None:
    source = Source(ring=4)
    source.commit("a", "b", "a", "b")

    async def story() -> None:
        feed = source.stream.listen(0, frozenset({"b"}))
        assert await take(feed, 2) == [2, 4]
        await source.committed("a", "b", "a")
        assert await take(feed, 1) == [6]

    on_loop(source, story)


def test_a_line_is_kept_alive_where_nothing_comes_and_where_only_unwanted_kinds_come() -> None:
    source = Source(keepalive_s=0.2)

    async def story() -> None:
        assert await anext(source.stream.listen(0)) == ALIVE
        ended = asyncio.Event()

        async def busy() -> None:
            while not ended.is_set():
                await source.committed("a")
                await asyncio.sleep(0.02)

        noise = asyncio.create_task(busy())
        assert await anext(source.stream.listen(0, frozenset({"b"}))) == ALIVE
        ended.set()
        await noise

    on_loop(source, story)


def test_one_that_falls_out_of_the_ring_is_dropped_and_comes_back_without_a_gap() -> None:
    source = Source(ring=8)

    async def story() -> None:
        await source.committed("a")
        feed = source.stream.listen(0)
        assert await take(feed, 1) == [1]
        await source.committed(*["a"] * 20)
        with pytest.raises(Dropped):
            await anext(feed)
        assert await take(source.stream.listen(1), 20) == list(range(2, 22))

    on_loop(source, story)


def test_events_that_are_no_longer_stored_hold_nobody_up() -> None:
    source = Source(ring=4)
    source.commit(*["a"] * 30)
    source.stored = []

    async def story() -> None:
        source.stream.publish([Event(position=31, kind="a", at=1)])
        await asyncio.sleep(0)
        assert await take(source.stream.listen(3), 1) == [31]

    on_loop(source, story)


def test_fifty_reconnects_at_random_moments_miss_and_double_nothing() -> None:
    source = Source(ring=64)
    going = threading.Event()
    going.set()

    def write() -> None:
        while going.is_set():
            source.commit(*random.choices("ab", k=random.randint(1, 5)))
            threading.Event().wait(random.uniform(0, 0.004))

    async def story() -> None:
        writer = threading.Thread(target=write)
        writer.start()
        try:
            seen: list[int] = []
            for _ in range(50):
                until = len(seen) + random.randint(1, 60)
                with contextlib.suppress(Dropped):  # a reason to come back as any other
                    async for chunk in source.stream.listen(len(seen)):
                        seen += positions(chunk)
                        if len(seen) >= until:
                            break
                await asyncio.sleep(random.uniform(0, 0.02))
            assert seen == list(range(1, len(seen) + 1))
            assert len(seen) > 200
        finally:
            going.clear()
            await asyncio.to_thread(writer.join)

    on_loop(source, story)


def test_listeners_end_when_the_service_does() -> None:
    source = Source()

    async def story() -> None:
        async def listen() -> int:
            return len([chunk async for chunk in source.stream.listen(0)])

        tasks = [asyncio.create_task(listen()) for _ in range(100)]
        while len(source.stream._waiters) < 100:
            await asyncio.sleep(0.001)
        source.stream.end()
        assert await asyncio.gather(*tasks) == [0] * 100
        assert [chunk async for chunk in source.stream.listen(0)] == []
        source.commit("a")  # nobody is there

    on_loop(source, story)
