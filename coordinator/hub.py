"""The hub: one bare repository that holds every machine's branch and attic, served by git's own smart HTTP.

Invariants: a caller sees and changes what its Access says, nothing else; no ref is deleted or rewound; objects are
never pruned (an attempt stays fetchable by its hash); a push that coordinator/prereceive.py does not let pass changes
nothing. A request's git runs in a process group of its own and is gone when the request is over. Its rules come by
environment, together with who asks; none stands in the repository's configuration.
NOT covered: who holds which token (`access` knows), what is announced to whom (`pushed`), TLS, rates.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.git import Repo

from .auth import token_of

LIMIT_BYTES = 64 << 20  #: the largest push; a keep with 16 attempts is some 10 KB
FRAMING_BYTES = 1 << 20  #: beside the pack; git refuses a pack over the limit in words, HTTP only what goes beyond this
CHUNK_BYTES = 1 << 16
AT_ONCE = 8  #: gits; the others wait
NICE = 10  #: how far behind everything else a git stands
DEADLINE_S = 600.0  #: a git that takes longer hangs
GRACE_S = 2.0  #: between asking a git to stop, when it removes what it began, and killing it
STALE_S = 6 * 3600.0  #: what a killed git left half-written is removed after this
MEMORY_KB = 4 << 20  #: for each git process: a few KB can unfold to a tree of gigabytes
FLUSH_BYTES = 4  #: git probes with an empty push before a large one

READ, PUSH = "git-upload-pack", "git-receive-pack"

#: For every git here.
SETTINGS = {
    "core.fsmonitor": "false",
    "core.filesRefLockTimeout": "5000",  # ms; repack holds a ref for an instant while it packs it
    "gc.auto": "0",
    "http.receivepack": "true",
    "receive.autogc": "false",
    "receive.denyDeletes": "true",
    "receive.denyNonFastForwards": "true",
    "receive.fsckObjects": "true",
    "receive.maxInputSize": str(LIMIT_BYTES),
    "receive.unpackLimit": "1",  # a pack a push: as fast as loose objects after 250 pushes, and git syncs packs to disk
    "uploadpack.allowAnySHA1InWant": "true",
    "uploadpack.hideRefs": "refs/attic",
}
#: What git hears of the request's headers. Not its length: waiting for so much, http-backend spins once its input ends.
PASSED = {
    "CONTENT_TYPE": "content-type",
    "HTTP_CONTENT_ENCODING": "content-encoding",
    "GIT_PROTOCOL": "git-protocol",
}

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """What one caller may do."""

    reads: bool
    pushes: tuple[str, ...] = ()  #: full refs it may create and advance
    unchecked: str | None = None  #: below this prefix it may push anything that moves forward (an admin's imports)
    machine: str | None = None


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


class Refusal(Exception):
    """An answer that is not git's."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class Hub:
    """An ASGI application over one bare repository; mount it at /git."""

    def __init__(
        self,
        path: Path,
        campaign: str,
        paths: tuple[str, ...],
        access: Callable[[str | None], Access | None],
        pushed: Callable[[Access], Awaitable[None]],
    ) -> None:
        """`paths`: what commits may change. `access` is called in a thread; None from it means: ask for a token.

        `pushed` is awaited after each push that git brought to an end, the refused ones included: compare `refs`.
        """
        self.path = path.absolute()
        self._route = re.compile(rf"/{re.escape(campaign)}\.git/(info/refs|{READ}|{PUSH})")
        self._paths = json.dumps(paths)
        self._access = access
        self._pushed = pushed
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._repo = Repo(self.path)
        hook = self.path / "hooks" / "pre-receive"
        hook.parent.mkdir(exist_ok=True)
        partial = hook.with_suffix(".partial")
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("prereceive.py").absolute())]
        partial.write_text(f"#!/bin/sh\nexec {shlex.join(command)}\n")
        partial.chmod(0o755)
        partial.replace(hook)

    @staticmethod
    def create(path: Path, source: Path, base: str) -> None:
        """Makes the bare repository with `base`, fetched from the campaign's, as main; does nothing where it is."""
        if path.exists():
            return
        partial = path.with_name(f"{path.name}.partial")  # one coordinator at a time: this is a killed one's
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        repo = Repo(partial)
        repo.run("init", "--quiet", "--bare", "--template=", "--initial-branch=main", "--object-format=sha1")
        repo.run("config", "gc.auto", "0")
        # Version 2 gives any commit by its hash; a campaign that was cloned with --depth stays that shallow.
        take = ["-c", "protocol.version=2", "fetch", "--quiet", "--no-tags", "--update-shallow"]
        repo.run(*take, str(source.absolute()), f"{base}:refs/heads/main")
        partial.rename(path)

    @staticmethod
    def restore(path: Path, bundle: Path) -> None:
        """Makes the bare repository from a backup's bundle, refs and all. Raises GitError for a damaged one."""
        path.mkdir(parents=True)
        repo = Repo(path)
        repo.run("init", "--quiet", "--bare", "--template=", "--initial-branch=main", "--object-format=sha1")
        repo.run("config", "gc.auto", "0")
        repo.run("fetch", "--quiet", "--no-tags", str(bundle.absolute()), "+refs/*:refs/*")

    def drop(self, refs: Iterable[str]) -> None:
        """Deletes refs and what only they held; what was pushed within a day stays."""
        for ref in refs:
            self._repo.run("update-ref", "-d", ref)
        self._repo.run("repack", "--quiet", "-A", "-d", "-l", "--unpack-unreachable=1.day.ago")
        self._repo.run("prune", "--expire=1.day.ago")  # what an earlier call unpacked

    def refs(self, *names: str) -> dict[str, str]:
        """The refs of these names that exist, or all, and their commits."""
        lines = self._repo.run("for-each-ref", "--format=%(objectname) %(refname)", *names).splitlines()
        pairs = (line.split(" ", 1) for line in lines)
        return {ref: commit for commit, ref in pairs if not names or ref in names}

    def repack(self) -> None:
        """Folds small packs and loose objects into larger ones; every object stays, reachable or not.

        Safe while others push: a pack that arrives meanwhile is not in the list of those that are folded and removed.
        """
        self._repo.run("repack", "--quiet", "-d", "-l", "--geometric=2")
        self._repo.run("pack-refs", "--all")
        objects = self.path / "objects"
        for left in (*objects.glob("*incoming-*"), *objects.glob("pack/tmp_*"), *objects.glob("pack/.tmp-*")):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > STALE_S:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()

    # -- HTTP

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            call = self._call(scope)
            access = await self._allowed(call)
            async with self._turn:
                await self._serve(call, access, receive, send)
        except Refusal as refusal:
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-cache")]
            if refusal.status == 401:
                headers.append((b"www-authenticate", b'Basic realm="swarm"'))
            await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await send({"type": "http.response.body", "body": f"swarm hub: {refusal}\n".encode()})

    def _call(self, scope: Scope) -> Call:
        """What is asked for. Raises Refusal for everything but the smart protocol's three requests."""
        path, root = str(scope["path"]), str(scope.get("root_path", ""))
        if root and path.startswith(f"{root}/"):  # a Mount leaves the whole path; older ones, and none, the rest
            path = path[len(root) :]
        found = self._route.fullmatch(path)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        query = scope.get("query_string", b"").decode("latin-1")
        if found and found[1] == "info/refs":
            service = query.removeprefix("service=")
            if scope["method"] == "GET" and service in (READ, PUSH):
                return Call(service, True, headers)
        elif found and scope["method"] == "POST":
            return Call(found[1], False, headers)
        raise Refusal(404, "no such repository here, or not git's smart protocol")

    async def _allowed(self, call: Call) -> Access:
        access = await asyncio.to_thread(self._access, token_of(call.headers.get("authorization", "")))
        if access is None:
            raise Refusal(401, "a token of this swarm is needed (as the password; any user name)")
        if not access.reads:
            raise Refusal(403, "this token may not read the campaign's code")
        if call.service == PUSH and not (access.pushes or access.unchecked):
            raise Refusal(403, "this token may read, not push")
        if call.service == PUSH and call.headers.get("content-encoding"):
            raise Refusal(415, "a push may not be compressed as a whole; its pack is")  # git's client never does that
        if call.length > LIMIT_BYTES + FRAMING_BYTES:
            raise Refusal(413, f"a request may hold {LIMIT_BYTES >> 20} MiB")
        return access

    async def _serve(self, call: Call, access: Access, receive: Receive, send: Send) -> None:
        git = await asyncio.create_subprocess_exec(
            # macOS has no such limit. A push takes some ten processes: heartbeats go before them.
            *("sh", "-c", f"ulimit -d {MEMORY_KB} 2>/dev/null; exec nice -n {NICE} git http-backend"),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env=self._environment(call, access),
            start_new_session=True,
        )
        work = Work(call, git)
        feeding, listening = asyncio.create_task(work.feed(receive)), asyncio.create_task(work.listen())
        try:
            async with asyncio.timeout(DEADLINE_S):
                await work.relay(send)
                await listening
                code = await git.wait()
        except TimeoutError:
            code, work.cut = -1, Refusal(504, f"git took longer than {DEADLINE_S:.0f} s")
        finally:
            feeding.cancel()
            listening.cancel()
            await asyncio.shield(work.end())
        if code or work.cut:
            log.warning("%s of %s: %s", call.service, access.machine, work.cut or work.said.decode(errors="replace"))
        elif call.service == PUSH and not call.advertise and work.taken > FLUSH_BYTES:
            await self._pushed(access)
        if not work.answered:
            raise work.cut or Refusal(500, "git failed; the coordinator's log says why")
        if not work.cut:  # else the answer stays open-ended, and the server breaks the connection
            await send({"type": "http.response.body", "body": b""})

    def _environment(self, call: Call, access: Access) -> dict[str, str]:
        """Everything that this git knows: nothing of ours beside PATH, no one's configuration, never the token."""
        hooks = str(self.path / "hooks")
        settings = [*SETTINGS.items(), ("safe.directory", str(self.path)), ("core.hooksPath", hooks)]
        if call.advertise:
            # Enough to find what both sides have; the last rule that matches counts, and a rule ends at a slash. Only
            # here: with hidden refs the push itself would drop these alone, before the hook, and let the rest pass.
            known = ("refs/heads/main", *access.pushes, *([access.unchecked.rstrip("/")] if access.unchecked else []))
            settings += [("receive.hideRefs", "refs"), *(("receive.hideRefs", f"!{ref}") for ref in known)]
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.path),
            "LC_ALL": "C",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_NO_REPLACE_OBJECTS": "1",
            "GIT_PROJECT_ROOT": str(self.path),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": "GET" if call.advertise else "POST",
            "PATH_INFO": "/info/refs" if call.advertise else f"/{call.service}",
            "QUERY_STRING": f"service={call.service}" if call.advertise else "",
            "REMOTE_ADDR": access.machine or "swarm",
            "SWARM_HUB_PATHS": self._paths,
            "SWARM_HUB_PUSHES": json.dumps(access.pushes),
            "GIT_CONFIG_COUNT": str(len(settings)),
        }
        for number, (key, value) in enumerate(settings):
            environment |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
        if access.unchecked:
            environment["SWARM_HUB_UNCHECKED"] = access.unchecked
        environment |= {name: call.headers[header] for name, header in PASSED.items() if header in call.headers}
        return environment


class Work:
    """One git at work on one request; ends with it."""

    def __init__(self, call: Call, git: Process) -> None:
        self._call = call
        self._git = git
        self._whole = False  # the request's body has arrived
        self._asked = False  # to stop
        self.taken = 0  #: bytes of it
        self.said = b""  #: git's last words, for our log
        self.answered = False  #: the answer has begun
        self.cut: Refusal | None = None  #: why git was stopped

    async def feed(self, receive: Receive) -> None:
        """The request's body into git, until the client leaves; then git stops, unless a push needs nothing more."""
        stdin = self._git.stdin
        assert stdin is not None
        while (message := await receive())["type"] == "http.request":
            self.taken += len(message.get("body", b""))
            if self.taken > LIMIT_BYTES + FRAMING_BYTES:
                self._stop(Refusal(413, f"a request may hold {LIMIT_BYTES >> 20} MiB"))
                return
            with contextlib.suppress(ConnectionError):  # git has heard enough; its answer says why
                stdin.write(message.get("body", b""))
                await stdin.drain()
            if not message.get("more_body", False):
                self._whole = True
                stdin.close()
        if self._call.service == READ:
            self._stop(Refusal(499, "the client has left"))
        elif not self._whole:  # half a push ends by itself, its pack's checksum missing, and leaves nothing behind
            self.cut = Refusal(499, "the client has left")
            stdin.close()

    async def listen(self) -> None:
        assert self._git.stderr is not None
        while chunk := await self._git.stderr.read(CHUNK_BYTES):
            self.said = (self.said + chunk)[-500:]

    async def relay(self, send: Send) -> None:
        """git's answer to the client, but for its end; CGI's `Status:` becomes HTTP's."""
        stdout = self._git.stdout
        assert stdout is not None
        try:
            head = await stdout.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return
        pairs = [line.partition(b":") for line in head.split(b"\r\n") if line]
        headers = [(name.strip().lower(), value.strip()) for name, _, value in pairs]
        status = next((int(value.split()[0]) for name, value in headers if name == b"status"), 200)
        self.answered = True
        headers = [pair for pair in headers if pair[0] != b"status"]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        while chunk := await stdout.read(CHUNK_BYTES):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

    def _stop(self, why: Refusal) -> None:
        """Asks the first process only, once; git passes it on. A second SIGTERM would end it amid its clean-up."""
        self.cut = self.cut or why
        if not self._asked and self._git.returncode is None:
            self._asked = True
            self._git.terminate()

    async def end(self) -> None:
        """Returns when no process of the group is left. What it had half-written may be: `repack` removes that."""
        if self._git.returncode == 0:
            return
        self._stop(Refusal(499, "the server is going down"))
        until = time.monotonic() + GRACE_S
        while self._alive(0) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self._alive(signal.SIGKILL)
        await self._git.wait()

    def _alive(self, number: int) -> bool:
        """Sends the group a signal; whether there was someone to hear it."""
        try:
            os.killpg(self._git.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
            return False
        return True
