"""The hub: one bare repository that holds every machine's branch and attic, served by git's own smart HTTP.

Invariants: a caller sees and changes what its Access says, nothing else; no request deletes or rewinds a ref, and what
was pushed stays, fetchable by its hash, until `drop` takes its ref (an attic that `serve --keep-attic` lets go); a push
that coordinator/prereceive.py does not let pass changes nothing. A request's git runs in a process group of its own and
is gone when the request is over. Its rules come by environment, together with who asks; none stands in the repository's
configuration. A caller, and one that stands still, leaves most turns to the others.
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
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from shared.errors import SwarmError
from shared.git import GitError, Repo

from .auth import token_of
from .exchange import (
    IDLE_S,
    LIMIT_BYTES,
    PUSH,
    READ,
    Call,
    Client,
    Receive,
    Refusal,
    Scope,
    Send,
    Work,
    start,
)
from .stream import ABORT

AT_ONCE = 8  #: gits; the others wait
EACH = 3  #: of them one caller's; all viewers are one, all administrators another
DEADLINE_S = 600.0  #: a git that takes longer hangs
RETRY_S = 5  #: after what will pass
STALE_S = 6 * 3600.0  #: what a killed git left half-written is removed after this
FLUSH_BYTES = 4  #: git probes with an empty push before a large one

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
#: Nor that it was compressed: we unfold it, to see how much it is.
PASSED = {
    "CONTENT_TYPE": "content-type",
    "GIT_PROTOCOL": "git-protocol",
}

#: What a refusal's status goes with. Who stands still is not waited for: the rest of its request would be read.
REFUSED_WITH = {
    401: (b"www-authenticate", b'Basic realm="swarm"'),
    408: (b"connection", b"close"),
    503: (b"retry-after", str(RETRY_S).encode()),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """What one caller may do."""

    reads: bool
    pushes: tuple[str, ...] = ()  #: full refs it may create and advance
    unchecked: str | None = None  #: below this prefix it may push anything that moves forward (an admin's imports)
    machine: str | None = None


class Hub:
    """An ASGI application over one bare repository; mount it at /git."""

    def __init__(
        self,
        path: Path,
        campaign: str,
        paths: tuple[str, ...],
        access: Callable[[str | None], Access | None],
        pushed: Callable[[Access], Awaitable[None]],
        idle_s: float = IDLE_S,
    ) -> None:
        """`paths`: what commits may change. `access` is called in a thread; None from it means: ask for a token.

        `pushed` is awaited after each push that git brought to an end, the refused ones included: compare `refs`. What
        it raises goes to our log only: the push has happened, and its client would find nothing to push again.
        """
        self.path = path.absolute()
        self._route = re.compile(rf"/{re.escape(campaign)}\.git/(info/refs|{READ}|{PUSH})")
        self._paths = json.dumps(paths)
        self._access = access
        self._pushed = pushed
        self._idle_s = idle_s
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._own: WeakValueDictionary[str | Access, asyncio.Semaphore] = WeakValueDictionary()  # while one is at it
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
    def restore(path: Path, bundle: Path, shallow: str = "") -> None:
        """Makes the bare repository from a backup's bundle, refs and all; `shallow` is git's file of that name, which
        no bundle carries. Raises GitError for a damaged one."""
        path.mkdir(parents=True)
        repo = Repo(path)
        repo.run("init", "--quiet", "--bare", "--template=", "--initial-branch=main", "--object-format=sha1")
        repo.run("config", "gc.auto", "0")
        if shallow:
            (path / "shallow").write_text(shallow)
        repo.run("fetch", "--quiet", "--no-tags", str(bundle.absolute()), "+refs/*:refs/*")

    def drop(self, refs: Mapping[str, str]) -> None:
        """Deletes refs that are still at these commits, and what only they held; what was pushed within a day stays."""
        for ref, commit in refs.items():
            with contextlib.suppress(GitError):  # it has moved: its machine is back
                self._repo.run("update-ref", "-d", ref, commit)
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
        client = Client(receive, send, self._idle_s, scope.get(ABORT))
        try:
            call = self._call(scope)
            access = await self._allowed(call)
            await client.arrive()
            own = self._own.setdefault(access.machine or access, asyncio.Semaphore(EACH))
            async with own, self._turn:
                if client.left:
                    raise Refusal(499, "the client has left")
                await self._serve(call, access, client)
        except Refusal as refusal:
            if client.answered:
                return
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-cache")]
            if refusal.status in REFUSED_WITH:
                headers.append(REFUSED_WITH[refusal.status])
            await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await send({"type": "http.response.body", "body": f"swarm hub: {refusal}\n".encode()})
        finally:
            client.forget()

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
        try:
            access = await asyncio.to_thread(self._access, token_of(call.headers.get("authorization", "")))
        except SwarmError as error:  # the database is away
            raise Refusal(503, " ".join(str(error).split())) from None
        if access is None:
            raise Refusal(401, "a token of this swarm is needed (as the password; any user name)")
        if not access.reads:
            raise Refusal(403, "this token may not read the campaign's code")
        if call.service == PUSH and not (access.pushes or access.unchecked):
            raise Refusal(403, "this token may read, not push")
        if call.service == PUSH and call.headers.get("content-encoding"):
            raise Refusal(415, "a push may not be compressed as a whole; its pack is")  # git's client never does that
        if call.length > call.limit:
            raise call.too_large()
        return access

    async def _serve(self, call: Call, access: Access, client: Client) -> None:
        git, ends = await start(self._environment(call, access))
        work = Work(call, git)
        beside: list[asyncio.Task[None]] = []
        try:
            async with asyncio.timeout(DEADLINE_S):
                await work.connect(ends)
                beside = [asyncio.create_task(work.feed(client)), asyncio.create_task(work.listen())]
                await work.relay(client)
                await beside[1]
                code = await asyncio.to_thread(git.wait)  # at once: nobody writes any more
        except TimeoutError:
            code, work.cut = -1, Refusal(504, f"git took longer than {DEADLINE_S:.0f} s")
        except Refusal as refusal:
            code, work.cut = -1, refusal
        finally:
            for task in beside:
                task.cancel()
            await asyncio.shield(work.end())
        if code or work.cut:
            log.warning("%s of %s: %s", call.service, access.machine, work.cut or work.said.decode(errors="replace"))
        elif call.service == PUSH and not call.advertise and work.taken > FLUSH_BYTES:
            await self._announce(access)
        if not client.answered:
            raise work.cut or Refusal(500, "git failed; the coordinator's log says why")
        if not work.cut:  # else the answer stays open-ended, and the server breaks the connection
            await client.send({"type": "http.response.body", "body": b""})

    async def _announce(self, access: Access) -> None:
        try:
            await self._pushed(access)
        except Exception:
            log.exception("a push of %s is not noted", access.machine)

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
