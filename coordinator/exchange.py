"""One request of git's smart protocol: the client at one end, a git at the other, and what each may take of the other.

Invariants: the loop never stops for a git's start; a client that stands still is let go; no process is left when the
request is over. NOT covered: who may ask what (hub.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from subprocess import Popen
from typing import Any

LIMIT_BYTES = 64 << 20  #: the largest push; a keep with 16 attempts is some 10 KB
FRAMING_BYTES = 1 << 20  #: beside the pack; git refuses a pack over the limit in words, HTTP only what goes beyond this
ASKED_BYTES = 8 << 20  #: the largest fetch request, unfolded: 160,000 wants and haves
CHUNK_BYTES = 1 << 16
NICE = 10  #: how far behind everything else a git stands
IDLE_S = 30.0  #: a client that neither sends nor takes anything for so long, while it is its turn to, is let go
GRACE_S = 2.0  #: between asking a git to stop, when it removes what it began, and killing it
MEMORY_KB = 4 << 20  #: for each git process: a few KB can unfold to a tree of gigabytes

READ, PUSH = "git-upload-pack", "git-receive-pack"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Call:
    """One of the three requests that git's smart protocol is made of."""

    service: str  #: READ or PUSH
    advertise: bool  #: GET info/refs; else the POST that does it
    headers: Mapping[str, str]  #: names in lower case

    @property
    def length(self) -> int:
        """The body's length where it is declared, else 0."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isdecimal() else 0

    @property
    def limit(self) -> int:
        """What its body may hold, unfolded."""
        return ASKED_BYTES if self.service == READ else LIMIT_BYTES + FRAMING_BYTES

    @property
    def folded(self) -> bool:
        return self.headers.get("content-encoding", "") in ("gzip", "x-gzip")

    def too_large(self) -> Refusal:
        return Refusal(413, f"a request may hold {self.limit >> 20} MiB")


class Refusal(Exception):
    """An answer that is not git's."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class Client:
    """The other end of a request. A little of the body is read before a turn is asked for: most bodies are little."""

    def __init__(self, receive: Receive, send: Send, idle_s: float, abort: Callable[[], None] | None) -> None:
        self._receive, self._send = receive, send
        self._idle_s, self._abort = idle_s, abort
        self._ahead: bytes | None = None
        self._whole = False  # the body has arrived
        self._next: asyncio.Future[Message] | None = None
        self.answered = False  #: the answer has begun

    async def arrive(self) -> None:
        """Returns when as much of the body is here as is read ahead. Raises Refusal."""
        ahead = bytearray()
        while not self._whole and len(ahead) < CHUNK_BYTES:
            message = await self.receive()
            if message["type"] != "http.request":
                raise Refusal(499, "the client has left")
            ahead += message.get("body", b"")
        self._ahead = bytes(ahead)
        self._next = asyncio.ensure_future(self._receive())  # tells, meanwhile, when it leaves

    @property
    def left(self) -> bool:
        """Whether it is known to have left; with more of its body on the way than is read ahead, it is not."""
        return self._next is not None and self._next.done() and self._next.result()["type"] != "http.request"

    async def receive(self) -> Message:
        """ASGI's next message. Raises Refusal when the rest of the body does not come."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            return {"type": "http.request", "body": ahead, "more_body": not self._whole}
        coming, self._next = self._next or asyncio.ensure_future(self._receive()), None
        try:
            async with asyncio.timeout(None if self._whole else self._idle_s):
                message = await coming
        except TimeoutError:
            raise Refusal(408, f"nothing of the request came for {self._idle_s:.0f} s") from None
        self._whole = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Raises Refusal when the client does not take what was sent before."""
        self.answered = True
        try:
            async with asyncio.timeout(self._idle_s):
                await self._send(message)
        except TimeoutError:
            if self._abort is not None:  # closing would wait for it to take the rest
                self._abort()
            raise Refusal(408, f"nothing of the answer was taken for {self._idle_s:.0f} s") from None

    def forget(self) -> None:
        if self._next is not None:
            self._next.cancel()


async def start(environment: Mapping[str, str]) -> tuple[Popen[bytes], list[socket.socket]]:
    """A git, and our ends of its stdin, stdout and stderr.

    In a thread: uvloop forks this whole process on its own, which at 300 MB stops every heartbeat for 10 ms. With
    sockets: uvloop closes a pipe that it is given twice, and by then the number may be another thread's file.
    """

    def begin() -> tuple[Popen[bytes], list[socket.socket]]:
        ours, theirs = zip(*(socket.socketpair() for _ in range(3)), strict=True)
        # macOS has no such limit. A push takes some ten processes: heartbeats go before them.
        command = ["sh", "-c", f"ulimit -d {MEMORY_KB} 2>/dev/null; exec nice -n {NICE} git http-backend"]
        stdin, stdout, stderr = theirs
        try:
            git = Popen(
                command,
                env=environment,
                stdin=stdin.fileno(),
                stdout=stdout.fileno(),
                stderr=stderr.fileno(),
                start_new_session=True,
            )
            return git, list(ours)
        finally:
            for end in theirs:
                end.close()

    starting = asyncio.ensure_future(asyncio.to_thread(begin))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        git, ends = await starting
        os.killpg(git.pid, signal.SIGKILL)
        git.wait()
        for end in ends:
            end.close()
        raise


class Work:
    """One git at work on one request; ends with it."""

    def __init__(self, call: Call, git: Popen[bytes]) -> None:
        self._call = call
        self._git = git
        self._unfold = zlib.decompressobj(zlib.MAX_WBITS | 16) if call.folded else None
        self._writers: list[asyncio.StreamWriter] = []
        self._whole = False  # the request's body has arrived
        self._asked = False  # to stop
        self.taken = 0  #: bytes of it, unfolded
        self.said = b""  #: git's last words, for our log
        self.cut: Refusal | None = None  #: why git was stopped

    async def connect(self, ends: list[socket.socket]) -> None:
        """Makes streams of them."""
        readers = []
        for end in ends:
            reader, writer = await asyncio.open_unix_connection(sock=end)
            readers.append(reader)
            self._writers.append(writer)
        self._stdin, (_, self._stdout, self._stderr) = self._writers[0], readers

    async def feed(self, client: Client) -> None:
        """The request's body into git, until the client leaves; then git stops, unless a push needs nothing more."""
        try:
            while (message := await client.receive())["type"] == "http.request":
                plain = self._plain(message.get("body", b""))
                with contextlib.suppress(ConnectionError):  # git has heard enough; its answer says why
                    self._stdin.write(plain)
                    await self._stdin.drain()
                if not message.get("more_body", False):
                    self._whole = True
                    self._stdin.close()
            why = Refusal(499, "the client has left")
        except Refusal as refusal:
            why = refusal
        if self._call.service == READ:
            self._stop(why)
        elif not self._whole:  # half a push ends by itself, its pack's checksum missing, and leaves nothing behind
            self.cut = why
            self._stdin.close()

    def _plain(self, data: bytes) -> bytes:
        """What git gets of it. Raises Refusal for too much in all."""
        if self._unfold is not None:
            try:
                data = self._unfold.decompress(data, self._call.limit - self.taken + 1)
            except zlib.error:
                raise Refusal(400, "the request is not gzip, as it says") from None
        self.taken += len(data)
        if self.taken > self._call.limit:
            raise self._call.too_large()
        return data

    async def listen(self) -> None:
        while chunk := await self._stderr.read(CHUNK_BYTES):
            self.said = (self.said + chunk)[-500:]

    async def relay(self, client: Client) -> None:
        """git's answer to the client, but for its end; CGI's `Status:` becomes HTTP's."""
        try:
            head = await self._stdout.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return
        pairs = [line.partition(b":") for line in head.split(b"\r\n") if line]
        headers = [(name.strip().lower(), value.strip()) for name, _, value in pairs]
        status = next((int(value.split()[0]) for name, value in headers if name == b"status"), 200)
        headers = [pair for pair in headers if pair[0] != b"status"]
        chunk = await self._stdout.read(CHUNK_BYTES)  # git sends the head before it has heard what it is asked
        if self.cut:
            return
        await client.send({"type": "http.response.start", "status": status, "headers": headers})
        while chunk:
            await client.send({"type": "http.response.body", "body": chunk, "more_body": True})
            chunk = await self._stdout.read(CHUNK_BYTES)

    def _stop(self, why: Refusal) -> None:
        """Asks the first process only, once; git passes it on. A second SIGTERM would end it amid its clean-up."""
        self.cut = self.cut or why
        if not self._asked and self._git.poll() is None:
            self._asked = True
            self._git.terminate()

    async def end(self) -> None:
        """Returns when no process of the group is left. What it had half-written may be: `repack` removes that."""
        if self._git.returncode != 0:
            self._stop(Refusal(499, "the server is going down"))
            until = time.monotonic() + GRACE_S
            while self._alive(0) and time.monotonic() < until:
                await asyncio.sleep(0.02)
            self._alive(signal.SIGKILL)
            await asyncio.to_thread(self._git.wait)
        for writer in self._writers:
            writer.close()

    def _alive(self, number: int) -> bool:
        """Sends the group a signal; whether there was someone to hear it."""
        self._git.poll()  # a first process that has ended, and that nobody has asked about, would count
        try:
            os.killpg(self._git.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
            return False
        return True
