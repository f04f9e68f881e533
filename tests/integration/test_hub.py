"""The hub with git's own client on a real server: who sees what, what a push may bring, and what a kill leaves."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import hashlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from coordinator import hub as hub_module
from coordinator.app import _aborting
from coordinator.auth import token_of
from coordinator.exchange import Receive, Scope, Send, start
from coordinator.hub import Access, Hub
from coordinator.stream import ABORT
from coordinator.writer import StorageUnavailable
from shared.task import load_task
from tests import fast_task
from tests.fast_task import git
from worker.workspace import Workspace

BRANCH = "refs/heads/autoresearch/t-m1"
ATTIC = "refs/attic/m1"


def member(name: str) -> Access:
    return Access(True, (f"refs/heads/autoresearch/t-{name}", f"refs/attic/{name}"), machine=name)


@dataclass
class Site:
    """A campaign, its hub, and the server in a thread of this process."""

    folder: Path
    source: Path
    base: str
    prefix: str
    hub: Hub
    tokens: dict[str, Access]
    pushed: list[Access] = field(default_factory=list)
    url: str = ""
    closed: Exception | None = None  #: what asking about a token raises
    deaf: Exception | None = None  #: what telling of a push raises

    def git(self, *arguments: str) -> str:
        return git(self.hub.path, *arguments)

    def offer(self, name: str) -> Machine:
        self.tokens[f"tok-{name}"] = member(name)
        folder = self.folder / name
        git(self.folder, "clone", "--quiet", str(self.source), str(folder))
        root = folder / ".swarm" / "t" / "work"
        workspace = Workspace(root, load_task(folder / self.prefix), self.prefix, name)
        workspace.open(folder, f"autoresearch/t-{name}", self.base)
        return Machine(self, name, folder, workspace, self.base)


def environment(token: str | None, **more: str) -> dict[str, str]:
    """As a worker calls git: the token by environment, no redirects, no questions."""
    basic = base64.b64encode(f"swarm:{token}".encode()).decode()
    settings = {"http.followRedirects": "false"}
    if token is not None:
        settings["http.extraHeader"] = f"Authorization: Basic {basic}"
    result = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    result |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_COUNT": str(len(settings))}
    for number, (key, value) in enumerate(settings.items()):
        result |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    return result | more


def call(folder: Path, token: str | None, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env=environment(token, **more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@dataclass
class Machine:
    site: Site
    name: str
    folder: Path
    workspace: Workspace
    best: str
    count: int = 0

    def attempt(self, *, keep: bool) -> str:
        """One experiment as the worker makes it. Returns T."""
        self.count += 1
        text = fast_task.TRAIN.replace("LR = 0.5", f"LR = 0.{self.count:04d}")
        name = str(uuid.uuid4())
        done = self.workspace.commit({"train.py": text}, f"try {self.count}", name, self.best)
        if keep:
            message = f"experiment: try\n\nval_bpb: 1.0, better\n\nExperiment-Id: {name}"
            self.best = self.workspace.keep("rows\n" * self.count, message, 1_700_000_000 + self.count)
        else:
            self.workspace.reset(self.best, "rows\n" * self.count)
        return done.commit

    def push(self, *refs: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        refs = refs or ("--atomic", f"refs/heads/autoresearch/t-{self.name}", f"refs/attic/{self.name}")
        return call(self.folder, token or f"tok-{self.name}", "push", self.site.url, *refs)

    # -- plumbing, for commits that a worker would never make

    def tree(self, changes: dict[str, tuple[str, str | None]], of: str | None = None) -> str:
        """The tree of a commit with some paths changed: path -> mode and content (None: deleted)."""
        index = {"GIT_INDEX_FILE": str(self.folder / "odd-index")}

        def plain(*arguments: str, text: str = "") -> str:
            done = subprocess.run(
                ["git", *arguments],
                cwd=self.folder,
                env={**os.environ, **index},
                input=text,
                capture_output=True,
                text=True,
                check=True,
            )
            return done.stdout.strip()

        plain("read-tree", of or self.best)
        for path, (mode, content) in changes.items():
            if content is None:
                plain("update-index", "--force-remove", "--", path)
                continue
            blob = content if mode == "160000" else plain("hash-object", "-w", "--stdin", text=content)
            plain("update-index", "--add", "--replace", "--cacheinfo", f"{mode},{blob},{path}")
        return plain("write-tree")

    def commit(self, tree: str, *parents: str, message: str | None = None) -> str:
        words = message if message is not None else f"odd\n\nExperiment-Id: {uuid.uuid4()}"
        return git(self.folder, "commit-tree", tree, *(p for parent in parents for p in ("-p", parent)), "-m", words)

    def odd(self, path: str, mode: str = "100644", content: str | None = "odd\n") -> str:
        return self.commit(self.tree({path: (mode, content)}), self.best)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with served(tmp_path) as made:
        yield made


class served:
    """Sets up a campaign and its hub and serves it; ends with no thread and no process left."""

    def __init__(self, folder: Path, prefix: str = "", idle_s: float = 30.0) -> None:
        source = folder / "source"
        fast_task.make(source, prefix=prefix)
        base = git(source, "rev-parse", "HEAD")
        Hub.create(folder / "hub.git", source, base)
        front = f"{prefix}/" if prefix else ""
        tokens = {"viewer": Access(True), "blind": Access(False)}
        tokens["admin"] = Access(True, (), "refs/heads/imported/")
        pushed: list[Access] = []

        async def note(access: Access) -> None:
            if self.site.deaf is not None:
                raise self.site.deaf
            pushed.append(access)

        paths = (f"{front}train.py", f"{front}results.tsv")
        hub = Hub(folder / "hub.git", "fast", paths, self._access, note, idle_s)
        self.site = Site(folder, source, base, prefix, hub, tokens, pushed)

    def _access(self, token: str | None) -> Access | None:
        if self.site.closed is not None:
            raise self.site.closed
        return self.site.tokens.get(token or "")

    def __enter__(self) -> Site:
        listening = socket.create_server(("127.0.0.1", 0))
        routes = Starlette(routes=[Mount("/git", app=self.site.hub)])

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await routes({**scope, ABORT: _aborting(send)}, receive, send)

        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, lifespan="off", loop="uvloop")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]})
        self._thread.start()
        self.site.url = f"http://127.0.0.1:{listening.getsockname()[1]}/git/fast.git"
        return self.site

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        assert gits() == []


def gits() -> list[str]:
    """What is at work for the hub in this process's care."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and "http-backend" in " ".join(process.cmdline()):
                found.append(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return found


def until(ready: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "never came about"
        time.sleep(0.01)


# -- making


def test_creating_twice_changes_nothing_and_a_killed_creation_is_begun_anew(tmp_path: Path) -> None:
    fast_task.make(tmp_path / "source")
    base = git(tmp_path / "source", "rev-parse", "HEAD")
    (tmp_path / "hub.git.partial").mkdir()
    (tmp_path / "hub.git.partial" / "HEAD").write_text("half")
    for _ in range(2):
        Hub.create(tmp_path / "hub.git", tmp_path / "source", base)
        git(tmp_path / "source", "commit", "--quiet", "--allow-empty", "-m", "later")
    assert git(tmp_path / "hub.git", "for-each-ref", "--format=%(refname) %(objectname)") == f"refs/heads/main {base}"
    assert git(tmp_path / "hub.git", "symbolic-ref", "HEAD") == "refs/heads/main"
    assert git(tmp_path / "hub.git", "config", "gc.auto") == "0"
    assert [path.name for path in tmp_path.iterdir() if "hub" in path.name] == ["hub.git"]


def test_the_base_need_not_be_a_tip_and_the_campaign_may_be_shallow(tmp_path: Path) -> None:
    fast_task.make(tmp_path / "source")
    git(tmp_path / "source", "commit", "--quiet", "--allow-empty", "-m", "base")
    base = git(tmp_path / "source", "rev-parse", "HEAD")
    git(tmp_path / "source", "commit", "--quiet", "--allow-empty", "-m", "later")
    git(tmp_path, "clone", "--quiet", "--depth=2", f"file://{tmp_path}/source", "shallow")
    Hub.create(tmp_path / "hub.git", tmp_path / "shallow", base)
    assert git(tmp_path / "hub.git", "log", "--format=%s", "main") == "base"


# -- reading


def test_a_clone_shows_branches_and_no_attic_and_an_attempt_comes_by_its_hash(site: Site) -> None:
    machine = site.offer("m1")
    tested = [machine.attempt(keep=number == 1) for number in range(3)]
    assert (done := machine.push()).returncode == 0, done.stderr
    listed = call(site.folder, "viewer", "ls-remote", site.url).stdout
    assert [line.split("\t")[1] for line in listed.splitlines()] == ["HEAD", BRANCH, "refs/heads/main"]
    assert call(site.folder, "viewer", "clone", "--quiet", site.url, "copy").returncode == 0
    copy = site.folder / "copy"
    assert git(copy, "branch", "--all", "--format=%(refname:lstrip=3)").split() == ["HEAD", BRANCH[11:], "main"]
    assert call(copy, "viewer", "cat-file", "-e", tested[0]).returncode
    for version in "0", "2":
        more = ["-c", f"protocol.version={version}"]
        assert call(copy, "viewer", *more, "fetch", "--quiet", site.url, tested[int(version)]).returncode == 0
        assert git(copy, "log", "-1", "--format=%s", tested[int(version)]).startswith("experiment: try")
    assert site.hub.refs("refs/heads/main", "refs/heads/none", "refs/heads") == {"refs/heads/main": site.base}
    assert set(site.hub.refs()) == {"refs/heads/main", BRANCH, ATTIC}


@pytest.mark.parametrize(
    ("token", "arguments", "said"),
    [
        (None, ["ls-remote"], "could not read Username"),
        ("wrong", ["ls-remote"], "could not read Username"),
        ("blind", ["ls-remote"], "may not read the campaign's code"),
        ("viewer", ["push"], "this token may read, not push"),
    ],
)
def test_without_the_right_token_git_says_so(site: Site, token: str | None, arguments: list[str], said: str) -> None:
    machine = site.offer("m1")
    refs = [BRANCH] if arguments == ["push"] else []
    done = call(machine.folder, token, *arguments, site.url, *refs)
    assert done.returncode and said in done.stderr


def test_a_password_in_answer_to_401_is_taken(site: Site) -> None:
    helper = site.folder / "ask.sh"
    helper.write_text("#!/bin/sh\necho viewer\n")
    helper.chmod(0o755)
    assert call(site.folder, None, "ls-remote", site.url, GIT_ASKPASS=str(helper)).returncode == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/info/refs?service=git-upload-pack", 200),
        ("GET", "/info/refs", 404),
        ("GET", "/info/refs?service=git-upload-archive", 404),
        ("GET", "/HEAD", 404),
        ("GET", "/objects/info/packs", 404),
        ("GET", "/config", 404),
        ("GET", "/git-upload-pack", 404),
        ("POST", "/git-upload-archive", 404),
        ("POST", "/%2e%2e/fast.git/git-upload-pack", 404),
        ("GET", "x/info/refs?service=git-upload-pack", 404),
        ("GET", "/info/refs?service=git-receive-pack", 403),
        ("POST", "/git-receive-pack", 403),
    ],
)
def test_only_the_smart_protocol_is_there(site: Site, method: str, path: str, status: int) -> None:
    with httpx.Client(headers={"Authorization": "Bearer viewer"}) as client:
        assert client.request(method, site.url + path).status_code == status
        anonymous = httpx.request(method, site.url + path)
        assert anonymous.status_code == (404 if status == 404 else 401)
        if anonymous.status_code == 401:
            assert anonymous.headers["www-authenticate"] == 'Basic realm="swarm"'


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("", None),
        ("Bearer a:b", "a:b"),
        ("bearer x", "x"),
        ("Basic " + base64.b64encode(b"user:pass:word").decode(), "pass:word"),
        ("Basic " + base64.b64encode(b"user:").decode(), None),
        ("Basic " + base64.b64encode(b"\xff\xfe").decode(), None),
        ("Basic no base64", None),
        ("Digest x", None),
    ],
)
def test_the_token_is_found_or_none(header: str, token: str | None) -> None:
    assert token_of(header) == token


def test_a_compressed_request_is_understood_and_a_compressed_push_is_not(site: Site) -> None:
    def packet(text: str) -> bytes:
        return f"{len(text) + 4:04x}{text}".encode()

    body = packet("command=fetch") + b"0001" + packet(f"want {site.base}\n") + packet("done\n") + b"0000"
    headers = {"Authorization": "Bearer viewer", "Content-Encoding": "gzip", "Git-Protocol": "version=2"}
    headers["Content-Type"] = "application/x-git-upload-pack-request"
    done = httpx.post(f"{site.url}/git-upload-pack", content=gzip.compress(body), headers=headers)
    assert done.status_code == 200 and b"PACK" in done.content
    site.offer("m1")
    headers["Authorization"] = "Bearer tok-m1"
    assert httpx.post(f"{site.url}/git-receive-pack", content=gzip.compress(body), headers=headers).status_code == 415


def test_a_fetch_request_is_limited_unfolded(site: Site) -> None:
    headers = {"Authorization": "Bearer viewer", "Content-Type": "application/x-git-upload-pack-request"}
    headers["Git-Protocol"] = "version=2"
    haves = f"0032have {site.base}\n".encode() * 200_000
    body = b"0011command=fetch0001" + haves + b"0000"
    url, folded = f"{site.url}/git-upload-pack", gzip.compress(body)
    assert len(folded) < 1 << 16
    assert httpx.post(url, content=body, headers=headers).status_code == 413
    headers["Content-Encoding"] = "gzip"
    assert httpx.post(url, content=folded, headers=headers).status_code == 413
    assert httpx.post(url, content=body[:1000], headers=headers).status_code == 400
    until(lambda: not gits())


def test_gits_own_compressed_request_works(site: Site) -> None:
    """git compresses a fetch's request over 1 KiB: one with many wants."""
    machine = site.offer("m1")
    tested = [machine.attempt(keep=False) for _ in range(40)]
    assert machine.push().returncode == 0
    git(site.folder, "init", "--quiet", "empty")
    trace = str(site.folder / "trace")
    done = call(site.folder / "empty", "viewer", "fetch", "--quiet", site.url, *tested, GIT_TRACE_CURL=trace)
    assert done.returncode == 0, done.stderr
    assert "Content-Encoding: gzip" in Path(trace).read_text()


# -- pushing


def test_keeps_and_attempts_land_and_are_announced(site: Site) -> None:
    machine = site.offer("m1")
    for number in range(4):
        machine.attempt(keep=number in (1, 3))
    done = machine.push()
    assert done.returncode == 0, done.stderr
    assert site.hub.refs(BRANCH)[BRANCH] == machine.best
    assert site.hub.refs(ATTIC)[ATTIC] == git(machine.folder, "rev-parse", ATTIC)
    assert site.pushed == [member("m1")]
    site.git("fsck", "--strict", "--no-dangling")


@pytest.mark.parametrize("trouble", [StorageUnavailable("the database is away"), RuntimeError("a bug")])
def test_a_push_that_cannot_be_noted_has_happened_all_the_same(
    site: Site, trouble: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    machine = site.offer("m1")
    machine.attempt(keep=True)
    site.deaf = trouble
    assert (done := machine.push()).returncode == 0, done.stderr
    assert site.hub.refs(BRANCH) == {BRANCH: machine.best}
    assert "a push of m1 is not noted" in caplog.text and str(trouble) in caplog.text
    site.deaf = None
    machine.attempt(keep=True)
    assert machine.push().returncode == 0
    assert site.pushed == [member("m1")]


def test_without_a_database_there_is_an_answer(site: Site) -> None:
    site.closed = StorageUnavailable("the database\nis away")
    answer = httpx.get(f"{site.url}/info/refs?service=git-upload-pack", headers={"Authorization": "Bearer viewer"})
    assert answer.status_code == 503
    assert answer.text == "swarm hub: the database is away\n"
    assert int(answer.headers["retry-after"]) > 0
    assert "503" in call(site.folder, "viewer", "ls-remote", site.url).stderr


def test_in_a_monorepo_only_the_tasks_files_may_change(tmp_path: Path) -> None:
    with served(tmp_path, "research/tiny") as site:
        machine = site.offer("m1")
        machine.attempt(keep=True)
        assert machine.push().returncode == 0
        for path, said in (
            ("train.py", "changes train.py"),
            ("research/train.py", "changes research/train.py"),
            ("research/tiny/score.sh", "changes research/tiny/score.sh"),
            ("research/tiny/train.py/x", "gives mode 40000 to research/tiny/train.py"),
            ("research", "gives mode 100644 to research"),
        ):
            done = machine.push(f"{machine.odd(path)}:{BRANCH}")
            assert done.returncode and f"{said};" in done.stderr, done.stderr


Bad = Callable[[Machine], list[str]]  #: a machine with two keeps pushed, -> what it pushes now


def on_branch(make: Callable[[Machine], str]) -> Bad:
    return lambda machine: [f"{make(machine)}:{BRANCH}"]


def link(machine: Machine, tested: str, *, tree: str | None = None, parents: list[str] | None = None) -> str:
    before = git(machine.folder, "rev-parse", ATTIC)
    return machine.commit(tree or f"{tested}^{{tree}}", *(parents or [before, tested]), message="attic: odd")


def hidden_in_second_parent(machine: Machine) -> list[str]:
    return [f"{link(machine, machine.odd('score.sh'))}:{ATTIC}"]


def hidden_below_a_tested_commit(machine: Machine) -> list[str]:
    below = machine.odd("score.sh")
    return [f"{link(machine, machine.commit(f'{machine.best}^{{tree}}', below))}:{ATTIC}"]


def one_bad_of_two(machine: Machine) -> list[str]:
    machine.attempt(keep=True)
    return [f"{machine.best}:{BRANCH}", f"+{machine.odd('score.sh')}:{ATTIC}"]


def one_foreign_of_two(machine: Machine) -> list[str]:
    machine.attempt(keep=True)
    return [f"{machine.best}:{BRANCH}", f"{machine.best}:refs/heads/autoresearch/t-m2"]


def raw_commit(machine: Machine, message: bytes, extra: bytes = b"") -> str:
    tree = git(machine.folder, "rev-parse", f"{machine.best}^{{tree}}")
    who = b"a <a@b> 1700000000 +0000\n"
    text = f"tree {tree}\nparent {machine.best}\n".encode() + b"author " + who + b"committer " + who + extra
    command = ["git", "hash-object", "-t", "commit", "-w", "--stdin", "--literally"]
    done = subprocess.run(command, cwd=machine.folder, input=text + b"\n" + message, check=True, capture_output=True)
    return done.stdout.decode().strip()


ID = b"Experiment-Id: 01234567-89ab-cdef-0123-456789abcdef\n"
EXPERIMENT = ID.decode()

BAD: dict[str, tuple[Bad, str]] = {
    "main": (lambda m: [f"{m.best}:refs/heads/main"], "refs/heads/main is not yours to push; yours: refs/heads/auto"),
    "another's branch": (lambda m: [f"{m.best}:refs/heads/autoresearch/t-m2"], "t-m2 is not yours"),
    "another's attic": (lambda m: [f"{ATTIC}:refs/attic/m2"], "refs/attic/m2 is not yours"),
    "a longer name": (lambda m: [f"{m.best}:{BRANCH}-y"], "t-m1-y is not yours"),
    "a tag": (lambda m: [f"{m.best}:refs/tags/x"], "refs/tags/x is not yours"),
    "replacements": (lambda m: [f"{m.best}:refs/replace/{m.site.base}"], "refs/replace/.* is not yours"),
    "an imported branch": (lambda m: [f"{m.best}:refs/heads/imported/x"], "imported/x is not yours"),
    "a deletion": (lambda m: [f":{BRANCH}"], "cannot be deleted; no push takes anything away here"),
    "a deleted attic": (lambda m: [f":{ATTIC}"], "cannot be deleted"),
    "a rewind": (lambda m: [f"+{m.best}^:{BRANCH}"], "only moves forward; [0-9a-f]{12} does not build on its tip"),
    "a rewind to main": (lambda m: [f"+{m.site.base}:{BRANCH}"], "only moves forward"),
    "a rewound attic": (lambda m: [f"+{ATTIC}^:{ATTIC}"], "only moves forward"),
    "a fork": (lambda m: [f"+{m.commit(f'{m.best}^{{tree}}', f'{m.best}^')}:{BRANCH}"], "only moves forward"),
    "a new root": (lambda m: [f"+{m.commit(f'{m.best}^{{tree}}')}:{BRANCH}"], "only moves forward"),
    "an immutable file": (
        on_branch(lambda m: m.odd("score.sh")),
        "changes score.sh; a commit may only change the text",
    ),
    "a new file": (on_branch(lambda m: m.odd("sub/x.py")), "changes sub"),
    "another case": (on_branch(lambda m: m.odd("Train.py")), "changes Train.py"),
    "odd names": (on_branch(lambda m: m.odd("x\ny\x1b[31m")), r"changes 'x\\ny\\x1b\[31m'"),
    "a module": (on_branch(lambda m: m.odd("sub", "160000", m.best)), "changes sub"),
    "a module in place": (on_branch(lambda m: m.odd("train.py", "160000", m.best)), "gives mode 160000 to train.py"),
    "a symlink": (on_branch(lambda m: m.odd("train.py", "120000", "/etc/passwd")), "gives mode 120000 to train.py"),
    "a folder in place": (on_branch(lambda m: m.odd("train.py/x")), "gives mode 40000 to train.py"),
    "a deleted file": (on_branch(lambda m: m.odd("train.py", content=None)), "deletes train.py"),
    "deleted and remade": (
        on_branch(lambda m: m.commit(f"{m.best}^{{tree}}", m.odd("train.py", content=None))),
        "deletes train.py",
    ),
    "a merge": (
        on_branch(lambda m: m.commit(f"{m.best}^{{tree}}", m.best, m.site.base)),
        r"[0-9a-f]{12} has 2 parents; an experiment has one",
    ),
    "a merge of a root": (
        on_branch(lambda m: m.commit(f"{m.best}^{{tree}}", m.best, m.commit(f"{m.best}^{{tree}}"))),
        "has [02] parents",
    ),
    "no id": (on_branch(lambda m: raw_commit(m, b"x\n")), "needs `Experiment-Id: <uuid>` in the last paragraph"),
    "an id as the subject": (on_branch(lambda m: raw_commit(m, ID)), "needs `Experiment-Id"),
    "an id in a quote": (on_branch(lambda m: raw_commit(m, b"x\n\n> said:\n" + ID + b"\nend\n")), "needs `Exp"),
    "an id in prose": (on_branch(lambda m: raw_commit(m, b"x\n\nas said in\n" + ID)), "needs `Experiment-Id"),
    "two ids": (on_branch(lambda m: raw_commit(m, b"x\n\n" + ID + ID)), "needs `Experiment-Id"),
    "no uuid": (on_branch(lambda m: raw_commit(m, b"x\n\nExperiment-Id: id-1\n")), "needs `Experiment-Id"),
    "forged headers": (
        on_branch(lambda m: raw_commit(m, b"x\n", b"note a\n \n Experiment-Id: id\n" + b"parent " + b"0" * 40 + b"\n")),
        "needs `Experiment-Id",
    ),
    "a link on the branch": (lambda m: [f"{link(m, m.odd('train.py'))}:{BRANCH}"], "only moves forward|has 2 parents"),
    "a known link on the branch": (lambda m: [f"+{ATTIC}:{BRANCH}"], "only moves forward"),
    "a link over the branch": (
        on_branch(lambda m: link(m, m.odd("train.py"), parents=[m.best, m.odd("train.py")])),
        "has 2 parents",
    ),
    "one link on both": (
        lambda m: [f"{(n := link(m, m.odd('train.py')))}:{ATTIC}", f"{n}:{BRANCH}"],
        "only moves forward|takes experiments only",
    ),
    "an experiment on a link": (
        lambda m: [f"{(n := link(m, m.odd('train.py')))}:{ATTIC}", f"{m.commit(f'{n}^{{tree}}', n)}:{BRANCH}"],
        "only moves forward|stands on an attic link",
    ),
    "an attic's tip is no link": (
        lambda m: [f"{m.commit(f'{ATTIC}^{{tree}}', ATTIC)}:{ATTIC}"],
        "is not an attic link",
    ),
    "a link of links": (
        lambda m: [f"{link(m, '', tree=f'{ATTIC}^{{tree}}', parents=[ATTIC, link(m, m.best)])}:{ATTIC}"],
        "has 2 parents|is not an attic link",
    ),
    "parents the wrong way": (
        lambda m: [f"{link(m, (t := m.odd('train.py')), parents=[t, ATTIC])}:{ATTIC}"],
        "only moves forward",
    ),
    "another tree": (
        lambda m: [f"{link(m, m.odd('train.py'), tree=f'{m.best}^{{tree}}')}:{ATTIC}"],
        "not an attic link",
    ),
    "three parents": (
        lambda m: [f"{link(m, (t := m.odd('train.py')), parents=[ATTIC, t, m.best])}:{ATTIC}"],
        "is not an attic link",
    ),
    "hidden in a second parent": (hidden_in_second_parent, "changes score.sh"),
    "hidden below a tested commit": (hidden_below_a_tested_commit, "changes score.sh"),
    "one bad of two": (one_bad_of_two, "changes score.sh|only moves forward"),
    "one foreign of two": (one_foreign_of_two, "t-m2 is not yours"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_push_may_not_bring(site: Site, name: str) -> None:
    make, said = BAD[name]
    machine = site.offer("m1")
    for number in range(3):
        machine.attempt(keep=number > 0)
    assert machine.push().returncode == 0
    site.offer("m2")
    before = site.hub.refs()
    done = machine.push(*make(machine))
    assert done.returncode
    assert re.search(said, done.stderr), done.stderr
    ours = [line for line in done.stderr.splitlines() if "remote: swarm hub:" in line]
    assert len(ours) == 1, done.stderr
    assert site.hub.refs() == before
    assert not list((site.hub.path / "objects").glob("*incoming*"))
    machine.best = git(machine.folder, "rev-parse", BRANCH)
    machine.attempt(keep=True)
    assert machine.push().returncode == 0  # nothing of it stays in the way


@pytest.mark.parametrize("name", ["attempt", "main", "root", "another's link"])
def test_a_first_attic_is_a_link_on_main(site: Site, name: str) -> None:
    machine, other = site.offer("m1"), site.offer("m2")
    other.attempt(keep=True)
    assert other.push().returncode == 0
    git(machine.folder, "fetch", "--quiet", str(other.folder), "refs/attic/*:refs/attic/*")
    tested = machine.odd("train.py")
    tip = {
        "attempt": lambda: tested,
        "main": lambda: site.base,
        "root": lambda: machine.commit(f"{tested}^{{tree}}", machine.commit(f"{tested}^{{tree}}"), tested),
        "another's link": lambda: git(machine.folder, "rev-parse", "refs/attic/m2"),
    }[name]()
    done = machine.push(f"{tip}:{ATTIC}")
    if name == "another's link":  # nothing wrong is in it; it is m2's chain, whole and checked
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode and ("only moves forward" if name == "root" else "is not an attic link") in done.stderr
    assert "has 2 parents" in machine.push(f"refs/attic/m2:{BRANCH}").stderr  # m2's link is nobody's branch


def test_names_that_gits_client_would_not_send_are_refused(site: Site) -> None:
    machine = site.offer("m1")
    machine.attempt(keep=True)
    assert machine.push().returncode == 0
    headers = {"Authorization": "Bearer tok-m1", "Content-Type": "application/x-git-receive-pack-request"}
    for ref in (
        "HEAD",
        f"{BRANCH}/../t-m2",
        f"refs/heads/x/../../{BRANCH}",
        "refs/heads/\udce9",
        "../../x",
        f"{BRANCH} ",
    ):
        line = f"{'0' * 40} {machine.best} {ref}\0 report-status".encode(errors="surrogateescape")
        pack = b"PACK\0\0\0\2\0\0\0\0"
        body = f"{len(line) + 4:04x}".encode() + line + b"0000" + pack + hashlib.sha1(pack).digest()
        done = httpx.post(f"{site.url}/git-receive-pack", content=body, headers=headers)
        assert done.status_code == 200 and b"ng " in done.content, (ref, done.content)
    assert set(site.hub.refs()) == {"refs/heads/main", BRANCH, ATTIC}


def test_missing_objects_are_refused(site: Site) -> None:
    """A client that leaves a tested commit's blob out of the pack, as no git does by itself."""
    machine = site.offer("m1")
    tested = machine.odd("train.py", content="unique to this commit\n")
    tree = git(machine.folder, "rev-parse", f"{tested}^{{tree}}")
    pack = subprocess.run(
        ["git", "pack-objects", "--stdout", "--quiet"],
        cwd=machine.folder,
        input=f"{tested}\n{tree}\n".encode(),
        capture_output=True,
        check=True,
    ).stdout
    line = f"{'0' * 40} {tested} {BRANCH}\0 report-status\n"
    body = f"{len(line) + 4:04x}{line}0000".encode() + pack
    headers = {"Authorization": "Bearer tok-m1", "Content-Type": "application/x-git-receive-pack-request"}
    done = httpx.post(f"{site.url}/git-receive-pack", content=body, headers=headers)
    assert done.status_code == 200 and f"ng {BRANCH}" in done.text
    assert set(site.hub.refs()) == {"refs/heads/main"}


def test_what_is_odd_and_allowed(site: Site) -> None:
    """Nothing changed, an executable, another encoding, bytes that are no text, trailers beside ours."""
    machine = site.offer("m1")
    message = b"odd \xe9\n\nbody\n\nReviewed-by: x\n" + ID
    machine.best = raw_commit(machine, message, b"encoding latin-1\n")
    machine.best = machine.odd("train.py", "100755", "\0\1\2")
    assert (done := machine.push(f"{machine.best}:{BRANCH}")).returncode == 0, done.stderr


def test_a_branch_may_start_on_main_and_pushing_again_is_nothing(site: Site) -> None:
    machine = site.offer("m1")
    assert machine.push(BRANCH).returncode == 0
    assert machine.push(BRANCH).returncode == 0
    machine.attempt(keep=False)
    assert machine.push().returncode == 0
    machine.attempt(keep=True)
    machine.attempt(keep=True)
    machine.attempt(keep=True)
    assert machine.push(ATTIC).returncode == 0  # it holds the branch's commits as parents of what was tested
    machine.attempt(keep=True)
    assert (done := machine.push()).returncode == 0, done.stderr


def test_an_admin_imports_unchecked_below_the_prefix_only(site: Site) -> None:
    machine = site.offer("m1")
    odd = machine.odd("score.sh")
    for ref, said in (
        ("refs/heads/imported/old", ""),
        ("refs/heads/imported-x", "is not yours"),
        ("refs/heads/main", "is not yours"),
        (BRANCH, "is not yours"),
    ):
        done = machine.push(f"{odd}:{ref}", token="admin")
        assert (done.returncode == 0) is (not said) and said in done.stderr, done.stderr
    later = machine.commit(f"{odd}^{{tree}}", odd)
    assert machine.push(f"{later}:refs/heads/imported/old", token="admin").returncode == 0
    assert "only moves forward" in machine.push(f"+{odd}:refs/heads/imported/old", token="admin").stderr
    assert "cannot be deleted" in machine.push(":refs/heads/imported/old", token="admin").stderr
    # What was imported unchecked is checked when it comes on a machine's ref.
    assert "changes score.sh" in machine.push(f"{later}:{BRANCH}").stderr


def test_the_second_push_brings_only_what_is_new(site: Site) -> None:
    machine = site.offer("m1")
    other = site.offer("m2")
    for one in (other, machine):
        for _ in range(8):
            one.attempt(keep=True)
        assert one.push().returncode == 0
    tested = machine.attempt(keep=True)
    trace = site.folder / "trace"
    refs = ["push", "--progress", site.url, BRANCH, ATTIC]
    done = call(machine.folder, "tok-m1", *refs, GIT_TRACE_PACKET=str(trace))
    assert done.returncode == 0, done.stderr
    # T, K and the link; T's and K's tree; train.py and results.tsv. The link's tree is T's.
    assert "(7/7)" in done.stderr and tested in git(site.hub.path, "rev-list", ATTIC)
    assert "t-m2" not in trace.read_text() and "refs/attic/m2" not in trace.read_text()


def test_eight_machines_push_at_once_while_the_hub_repacks(site: Site) -> None:
    machines = [site.offer(f"m{number}") for number in range(8)]
    tested: list[str] = []
    stop = threading.Event()

    def repack() -> int:
        times = 0
        while not stop.is_set():
            site.hub.repack()
            times += 1
        return times

    with ThreadPoolExecutor(9) as pool:
        repacking = pool.submit(repack)
        try:
            for _ in range(3):
                tested += [machine.attempt(keep=keep) for machine in machines for keep in (False, True)]
                for done in pool.map(lambda machine: machine.push(), machines):
                    assert done.returncode == 0, done.stderr
        finally:
            stop.set()
        assert repacking.result() >= 1
    assert len(site.hub.refs()) == 17
    assert len(site.pushed) == 24
    assert call(site.folder, "viewer", "clone", "--quiet", site.url, "copy").returncode == 0
    assert call(site.folder / "copy", "viewer", "fetch", "--quiet", site.url, *tested).returncode == 0
    site.git("fsck", "--strict", "--no-dangling")


def test_repacking_keeps_what_no_ref_holds(site: Site) -> None:
    blob = git(site.hub.path, "hash-object", "-w", str(site.source / "score.sh"))
    loose = git(site.hub.path, "commit-tree", "main^{tree}", "-m", "held by nothing")
    stale = site.hub.path / "objects" / "incoming-x"
    fresh = site.hub.path / "objects" / "incoming-y"
    for folder in stale, fresh:
        folder.mkdir()
    os.utime(stale, (0, 0))
    for _ in range(3):
        site.hub.repack()
    assert git(site.hub.path, "cat-file", "-t", loose) == "commit"
    assert git(site.hub.path, "cat-file", "-t", blob) == "blob"
    assert fresh.exists() and not stale.exists()


# -- leaving midway


def address(site: Site) -> tuple[str, int]:
    host, port = site.url.split("/")[2].split(":")
    return host, int(port)


def head(length: int, service: str = "receive-pack", token: str = "tok-m1") -> bytes:
    """The start of a push or a fetch, by hand."""
    lines = [f"POST /git/fast.git/git-{service} HTTP/1.1", "Host: x", f"Authorization: Bearer {token}"]
    lines += [f"Content-Type: application/x-git-{service}-request", "Git-Protocol: version=2"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def order(tip: str) -> bytes:
    """What stands before a push's pack."""
    line = f"{'0' * 40} {tip} {BRANCH}\0 report-status\n"
    return f"{len(line) + 4:04x}{line}0000".encode()


def half_push(site: Site) -> socket.socket:
    """A push of m1 that has begun, with more of it than the hub reads before a git starts, and goes no further."""
    blob = b"\xb0\x80\x80\x04" + zlib.compress(os.urandom(1 << 20))  # the first of 256 objects
    client = socket.create_connection(address(site))
    client.sendall(head(2_000_000) + order("1" * 40) + b"PACK\0\0\0\2\0\0\1\0" + blob[:200_000])
    return client


def incoming(site: Site) -> int:
    """How many packs gits are at work on."""
    return len(list((site.hub.path / "objects").glob("*incoming*")))


def rest(client: socket.socket) -> bytes:
    """What comes until the server ends the connection."""
    client.settimeout(20)
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := client.recv(1 << 20):
            found += chunk
    return found


def test_a_client_killed_midway_leaves_no_git_and_no_ref(site: Site) -> None:
    machine = site.offer("m1")
    machine.attempt(keep=True)
    with half_push(site):
        until(lambda: incoming(site) == 1)
        assert gits()
    until(lambda: not gits())
    until(lambda: not incoming(site))
    assert set(site.hub.refs()) == {"refs/heads/main"}
    assert site.pushed == []
    assert machine.push().returncode == 0


def test_requests_without_their_body_take_no_turn(site: Site) -> None:
    machine = site.offer("m1")
    machine.attempt(keep=True)
    with contextlib.ExitStack() as held:
        for token in ("viewer", "tok-m1"):
            for _ in range(hub_module.AT_ONCE):
                client = held.enter_context(socket.create_connection(address(site)))
                client.sendall(head(1000, "upload-pack", token))
        assert call(site.folder, "viewer", "clone", "--quiet", site.url, "copy").returncode == 0
        assert (done := machine.push()).returncode == 0, done.stderr


def test_one_caller_leaves_turns_to_the_others(site: Site) -> None:
    site.offer("m1")
    machine = site.offer("m2")
    machine.attempt(keep=True)
    with contextlib.ExitStack() as held:
        for _ in range(hub_module.AT_ONCE):
            held.enter_context(half_push(site))
        until(lambda: incoming(site) == hub_module.EACH)
        assert (done := machine.push()).returncode == 0, done.stderr
        assert call(site.folder, "viewer", "clone", "--quiet", site.url, "copy").returncode == 0
        assert incoming(site) == hub_module.EACH
    until(lambda: not gits())


def test_who_left_while_it_waited_takes_no_turn(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = site.offer("m1")
    machine.attempt(keep=True)
    log, tool = site.folder / "gits", site.folder / "bin" / "git"
    tool.parent.mkdir()
    real = subprocess.run(["which", "git"], capture_output=True, text=True, check=True).stdout.strip()
    tool.write_text(f'#!/bin/sh\n[ "$1" = http-backend ] && echo >> {log}\nexec {real} "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    with contextlib.ExitStack() as held:
        for _ in range(hub_module.EACH):
            held.enter_context(half_push(site))
        until(lambda: incoming(site) == hub_module.EACH)
        for _ in range(4):
            with socket.create_connection(address(site)) as client:
                client.sendall(head(len(order("1" * 40))) + order("1" * 40))
    assert machine.push().returncode == 0  # comes after them
    assert log.read_text() == "\n" * (hub_module.EACH + 2)


def test_a_client_that_stands_still_is_let_go(tmp_path: Path) -> None:
    with served(tmp_path, idle_s=0.3) as site:
        machine = site.offer("m1")
        machine.attempt(keep=True)
        with socket.create_connection(address(site)) as client:
            client.sendall(head(1000, "upload-pack", "viewer") + b"0011")
            assert b"408" in rest(client).split(b"\r\n")[0]
        with half_push(site) as client:
            assert b"408" in rest(client).split(b"\r\n")[0]
            assert not gits()
        until(lambda: not incoming(site))
        assert machine.push().returncode == 0


def test_a_client_that_does_not_read_is_let_go(tmp_path: Path) -> None:
    with served(tmp_path, idle_s=0.3) as site:
        (site.source / "train.py").write_bytes(os.urandom(16 << 20))
        git(site.source, "commit", "--quiet", "-am", "big")
        git(site.hub.path, "fetch", "--quiet", str(site.source), "HEAD:refs/heads/big")
        want = f"0032want {site.hub.refs()['refs/heads/big']}\n"
        body = f"0011command=fetch0001{want}0009done\n0000".encode()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            client.connect(address(site))
            client.sendall(head(len(body), "upload-pack", "viewer") + body)
            until(gits)
            until(lambda: not gits())
            answer = rest(client)
            assert b" 200 " in answer.split(b"\r\n")[0] and len(answer) < 1 << 20  # what it had; the rest is gone


def test_a_request_cancelled_while_its_git_starts_leaves_none() -> None:
    async def cancelled() -> None:
        starting = asyncio.create_task(start({"PATH": os.environ["PATH"]}))
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    asyncio.run(cancelled())
    assert gits() == []


def test_a_killed_git_client_leaves_no_git_behind(site: Site) -> None:
    machine = site.offer("m1")
    for _ in range(10):
        machine.attempt(keep=True)
    for number in range(8):
        pushing = subprocess.Popen(
            ["git", "push", site.url, BRANCH, ATTIC],
            cwd=machine.folder,
            env=environment("tok-m1"),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            pushing.wait(0.01 * number)
        except subprocess.TimeoutExpired:
            os.killpg(pushing.pid, signal.SIGKILL)
            pushing.wait()
    until(lambda: not gits())
    assert machine.push().returncode == 0
    assert site.hub.refs(BRANCH, ATTIC) == {
        BRANCH: machine.best,
        ATTIC: git(machine.folder, "rev-parse", ATTIC),
    }
    site.git("fsck", "--strict", "--no-dangling")


def test_a_git_that_hangs_is_ended(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "DEADLINE_S", 0.5)
    machine = site.offer("m1")
    machine.attempt(keep=True)
    hook = site.hub.path / "hooks" / "pre-receive"
    was = hook.read_text()
    hook.write_text("#!/bin/sh\ntrap '' TERM\nsleep 1000\n")
    assert machine.push().returncode
    assert gits() == []
    hook.write_text(was)
    monkeypatch.undo()
    assert machine.push().returncode == 0


def test_a_push_over_the_limit_fails_in_words(site: Site) -> None:
    machine = site.offer("m1")
    noise = git(machine.folder, "rev-parse", machine.site.base)
    big = machine.folder / "big"
    big.write_bytes(os.urandom(hub_module.LIMIT_BYTES + (1 << 19)))
    blob = git(machine.folder, "hash-object", "-w", str(big))
    tree = subprocess.run(
        ["git", "mktree"],
        cwd=machine.folder,
        input=f"100644 blob {blob}\ttrain.py\n",
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    done = machine.push(f"{machine.commit(tree, noise)}:{BRANCH}")
    assert done.returncode and "pack exceeds maximum allowed size" in done.stderr
    with socket.create_connection(address(site)) as client:
        client.sendall(head(1 << 40))
        assert b"413" in client.recv(1000).split(b"\r\n")[0]
    chunks = (bytes(1 << 20) for _ in range(70))
    headers = {"Authorization": "Bearer tok-m1", "Content-Type": "application/x-git-receive-pack-request"}
    with contextlib.suppress(httpx.TransportError):  # the server may break off before it is heard
        assert httpx.post(f"{site.url}/git-receive-pack", headers=headers, content=chunks).status_code == 413
    assert set(site.hub.refs()) == {"refs/heads/main"}


def test_a_tree_of_millions_of_paths_costs_nothing(site: Site) -> None:
    machine = site.offer("m1")

    def mktree(kind: str, name: str) -> str:
        mode = "040000" if kind == "tree" else "100644"
        lines = "".join(f"{mode} {kind} {name}\t{number}\n" for number in range(10))
        done = subprocess.run(
            ["git", "mktree"], cwd=machine.folder, input=lines, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    tree = mktree("blob", git(machine.folder, "rev-parse", f"{site.base}:train.py"))
    for _ in range(9):
        tree = mktree("tree", tree)
    begun = time.monotonic()
    done = machine.push(f"{machine.commit(tree, site.base)}:{BRANCH}")
    assert done.returncode and "changes 0; a commit may only change" in done.stderr
    assert time.monotonic() - begun < 5


# -- the token


def test_the_token_stands_in_no_configuration_and_no_command_line(site: Site) -> None:
    machine = site.offer("m1")
    machine.attempt(keep=True)
    hook = site.hub.path / "hooks" / "pre-receive"
    seen, go = site.folder / "seen", site.folder / "go"
    was = hook.read_text().removeprefix("#!/bin/sh\n")
    hook.write_text(f"#!/bin/sh\nenv > {seen}.partial; mv {seen}.partial {seen}\n")
    hook.write_text(hook.read_text() + f"while [ ! -e {go} ]; do sleep 0.05; done\n{was}")
    with ThreadPoolExecutor(1) as pool:
        pushing = pool.submit(machine.push)
        until(seen.exists)
        lines = []
        for process in psutil.Process().children(recursive=True):
            try:
                lines.append(" ".join(process.cmdline()))
            except psutil.NoSuchProcess:
                continue
        go.touch()
        assert pushing.result().returncode == 0
    basic = base64.b64encode(b"swarm:tok-m1").decode()
    everything = "\n".join(lines)
    assert "receive-pack" in everything and "push" in everything
    for text in everything, seen.read_text():
        assert "tok-m1" not in text and basic not in text
    for config in (*machine.folder.rglob("config"), *machine.folder.rglob("config.worktree")):
        assert "tok-m1" not in config.read_text() and basic not in config.read_text()


def test_the_hubs_gits_take_nothing_from_the_coordinators_environment(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = site.offer("m1")
    machine.attempt(keep=True)
    seen = site.folder / "seen"
    (site.hub.path / "hooks" / "pre-receive").write_text(f"#!/bin/sh\nenv > {seen}\n")
    monkeypatch.setenv("SWARM_TOKEN", "secret")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert machine.push().returncode == 0
    assert "secret" not in seen.read_text() and "/nowhere" not in seen.read_text()


def test_an_app_without_a_mount_answers_too(tmp_path: Path) -> None:
    site = served(tmp_path).site

    async def ask(path: str, root: str) -> int:
        transport = httpx.ASGITransport(app=site.hub, root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url="http://hub") as client:
            return (await client.get(path, headers={"Authorization": "Bearer viewer"})).status_code

    service = "info/refs?service=git-upload-pack"
    assert asyncio.run(ask(f"/fast.git/{service}", "")) == 200
    assert asyncio.run(ask(f"/swarm/git/fast.git/{service}", "/swarm/git")) == 200
    assert asyncio.run(ask(f"/slow.git/{service}", "")) == 404
