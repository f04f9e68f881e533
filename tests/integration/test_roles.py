"""Who may do what: every role at every route and every ref, cell by cell; and where a token is never found."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.app import create_app
from coordinator.auth import hashed
from coordinator.service import Service
from coordinator.serving import Address
from coordinator.stream import LISTENERS
from shared import wire
from shared.client import Away, CoordinatorClient
from shared.git import Repo, http_environment
from shared.task import load_task
from shared.wire import API, INCARNATION, Kind, Role, TokenOrder
from tests import fast_task
from tests.fast_task import git
from tests.hosting import hosted, http, listening, registration, report, until
from tests.served import served, swarm
from worker.workspace import Workspace

#: Who calls. `own` is the worker of m1, which the routes below are about, `other` that of m2; `open` comes without a
#: token to a coordinator on loopback for which no person has made one.
KNOWN = ("join", "viewer", "own", "other", "admin")
UNKNOWN = ("none", "expired", "revoked")
CALLERS = (*UNKNOWN, *KNOWN)
ALL = frozenset((*CALLERS, "open"))
LOOK = frozenset(("viewer", "own", "other", "admin", "open"))
ADMIN = frozenset(("admin", "open"))
JOIN = frozenset(("join", "own", "other", "admin", "open"))
OWN = frozenset(("own",))

ABSENT = uuid.uuid4()
RUN = report().model_dump(mode="json")
OLD = registration().model_dump(mode="json")

#: method, path: who may, what the answer is then, and a body. Calls are such that they leave things as they are.
ROUTES: dict[tuple[str, str], tuple[frozenset[str], int, Any]] = {
    ("GET", "/healthz"): (ALL, 200, None),
    ("GET", f"{API}/openapi.json"): (ALL, 200, None),
    ("GET", "/metrics"): (LOOK, 200, None),
    ("GET", f"{API}/campaign"): (LOOK, 200, None),
    ("GET", f"{API}/machines"): (LOOK, 200, None),
    ("GET", f"{API}/leaderboard"): (LOOK, 200, None),
    ("GET", f"{API}/experiments"): (LOOK, 200, None),
    ("GET", f"{API}/experiments/{{experiment}}"): (LOOK, 404, None),
    ("GET", f"{API}/experiments/{{experiment}}/diff"): (LOOK, 404, None),
    ("GET", f"{API}/branches"): (LOOK, 200, None),
    ("GET", f"{API}/lineage/{{commit}}"): (LOOK, 404, None),
    ("GET", f"{API}/ideas"): (LOOK, 200, None),
    ("GET", f"{API}/export"): (LOOK, 200, None),
    ("GET", f"{API}/leases"): (LOOK, 200, None),
    ("GET", f"{API}/events"): (LOOK, 503, None),  # as many listen as may
    ("GET", f"{API}/data/{{name:path}}"): (LOOK, 404, None),
    ("POST", f"{API}/machines"): (JOIN, 409, {**OLD, "protocol": 99}),
    ("POST", f"{API}/machines/{{name}}/heartbeat"): (OWN, 200, {}),
    ("POST", f"{API}/machines/{{name}}/assignment"): (OWN, 200, None),
    ("DELETE", f"{API}/machines/{{name}}/leases/{{lease}}/{{attempt}}"): (OWN, 204, None),
    ("GET", f"{API}/machines/{{name}}/known"): (OWN, 200, None),
    ("PUT", f"{API}/machines/{{name}}/experiments/{{experiment}}"): (OWN, 422, {**RUN, "status": "void"}),
    ("PATCH", f"{API}/machines/{{name}}"): (ADMIN, 200, {}),
    ("DELETE", f"{API}/machines/{{name}}"): (ADMIN, 404, None),
    ("POST", f"{API}/experiments/{{experiment}}/clear"): (ADMIN, 404, None),
    ("POST", f"{API}/leases"): (ADMIN, 404, {"kind": "replay", "experiment": str(ABSENT)}),
    ("DELETE", f"{API}/leases/{{lease}}"): (ADMIN, 404, None),
    ("GET", f"{API}/tokens"): (ADMIN, 200, None),
    ("POST", f"{API}/tokens"): (ADMIN, 404, {"role": "worker", "machine": "nobody"}),
    ("DELETE", f"{API}/tokens/{{token}}"): (ADMIN, 404, None),
    ("POST", f"{API}/import/machines"): (ADMIN, 422, {**OLD, "hardware": {"cores": 2**64}}),
    ("PUT", f"{API}/import/machines/{{name}}/experiments/{{experiment}}"): (ADMIN, 422, RUN),
}
PARAMETERS = {"name": "m1", "experiment": ABSENT, "lease": ABSENT, "attempt": 1, "commit": "abcdef", "token": 999}


@dataclass
class Site:
    """A coordinator with two machines, m1 and m2, and a token of each kind; or, open, without a person's token."""

    service: Service
    tokens: dict[str, str | None]
    incarnation: int = 1


def site_of(service: Service) -> Site:
    def made(role: Role, **more: float) -> wire.TokenMade:
        return service.tokens.make(TokenOrder.model_validate({"role": role, **more}))

    members = [
        service.store.register(registration(name, can=("explore", "promote")), "autoresearch") for name in ("m1", "m2")
    ]
    tokens: dict[str, str | None] = {"none": None}
    tokens |= {name: service.tokens.for_machine(m.id) for name, m in zip(("own", "other"), members, strict=True)}
    tokens |= {str(role): made(role).token for role in (Role.JOIN, Role.VIEWER, Role.ADMIN)}
    expiring, revoked = made(Role.ADMIN, expires_s=0.001), made(Role.ADMIN)
    service.tokens.revoke(revoked.id)
    tokens |= {"expired": expiring.token, "revoked": revoked.token}
    until(lambda: expiring.expires_at is not None and time.time() > expiring.expires_at)
    return Site(service, tokens)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with hosted(tmp_path_factory.mktemp("roles")) as service:
        yield site_of(service)


@pytest.fixture(scope="module")
def open_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with hosted(tmp_path_factory.mktemp("open")) as service:
        service.store.register(registration("m1"), "autoresearch")
        yield Site(service, {"open": None})


def routes_of(service: Service) -> set[tuple[str, str]]:
    """Every route that the application has; newer FastAPI keeps those of a router below one entry."""

    def walk(routes: Any, prefix: str) -> Iterator[tuple[str, str]]:
        for route in routes:
            if hasattr(route, "original_router"):
                yield from walk(route.original_router.routes, prefix + route.include_context.prefix)
            elif hasattr(route, "methods"):
                yield from ((method, prefix + route.path) for method in route.methods - {"HEAD"})
            else:
                yield ("?", f"{prefix}{route.path}")  # mounted: not ours to look into

    return set(walk(create_app(service).api.routes, ""))


def test_the_table_has_every_route(site: Site) -> None:
    assert routes_of(site.service) == set(ROUTES)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_each_role_at_each_route(site: Site, open_site: Site, method: str, path: str) -> None:
    allowed, status, body = ROUTES[method, path]
    nobody = {"name": "nobody"} if (method, path) == ("DELETE", f"{API}/machines/{{name}}") else {}
    target = path.replace(":path", "").format(**PARAMETERS | nobody)
    for place in (site, open_site):
        place.service.stream.listeners = LISTENERS
        with http(place.service) as client:
            for caller in CALLERS if place is site else ("open",):
                token = place.tokens[caller]
                headers = {INCARNATION: "1"} | ({"Authorization": f"Bearer {token}"} if token else {})
                answer = client.request(method, target, headers=headers, json=body)
                expected = status if caller in allowed else 401 if caller in UNKNOWN else 403
                assert answer.status_code == expected, (caller, method, target, answer.text)
                if expected in (401, 403):
                    problem = wire.Problem.model_validate(answer.json())
                    assert problem.detail
                    assert ("WWW-Authenticate" in answer.headers) == (expected == 401)
                    assert str(token) not in answer.text


def test_open_or_not_a_wrong_token_is_none(open_site: Site) -> None:
    with http(open_site.service) as client:
        answer = client.get(f"{API}/machines", headers={"Authorization": "Bearer swarm_admin_made_up"})
        assert answer.status_code == 401


# -- git

OWN_BRANCH, OWN_ATTIC = "refs/heads/autoresearch/t-m1", "refs/attic/m1"
PROMOTED = "refs/heads/autoresearch/t-promoted"
#: ref: who may push to it; what is pushed to an attic is a link, else a kept experiment
REFS = {
    OWN_BRANCH: {"own"},
    OWN_ATTIC: {"own"},
    "refs/heads/autoresearch/t-m2": {"other"},
    "refs/attic/m2": {"other"},
    PROMOTED: set(),  # but with a lease, see below
    "refs/heads/main": set(),
    "refs/heads/imported/log": {"admin", "open"},
    "refs/heads/elsewhere": set(),
    "refs/tags/v1": set(),
    "refs/attic/m3": set(),
}


@dataclass
class Clone:
    """A machine's clone, with a keep and its attic link ready to push."""

    folder: Path
    workspace: Workspace
    best: str

    @classmethod
    def of(cls, service: Service, folder: Path, name: str = "m1") -> Clone:
        git(folder.parent, "clone", "--quiet", str(service.campaign.root), str(folder))
        workspace = Workspace(folder / ".swarm" / "t" / "work", load_task(folder), "", name)
        base = git(folder, "rev-parse", "HEAD")
        workspace.open(folder, f"autoresearch/t-{name}", base)
        made = cls(folder, workspace, base)
        made.keep("LR = 0.4")
        return made

    def keep(self, line: str) -> str:
        name, text = str(uuid.uuid4()), fast_task.TRAIN.replace("LR = 0.5", line)
        self.workspace.commit({"train.py": text}, "try", name, self.best)
        self.best = self.workspace.keep("rows\n", f"experiment: try\n\nbetter\n\nExperiment-Id: {name}", 1_700_000_000)
        return self.best

    def what_for(self, ref: str) -> str:
        return git(self.folder, "rev-parse", OWN_ATTIC) if ref.startswith("refs/attic") else self.best

    def git(self, url: str, token: str | None, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """As a worker calls it: the token by environment."""
        plain = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
        return subprocess.run(
            ["git", *arguments],
            cwd=self.folder,
            env={**plain, "GIT_CONFIG_GLOBAL": os.devnull, **http_environment(url, token), **more},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


def test_each_role_at_each_ref(site: Site, open_site: Site, tmp_path: Path) -> None:
    for place, callers in ((site, CALLERS), (open_site, ("open",))):
        clone = Clone.of(place.service, tmp_path / callers[0])
        hub = place.service.hub
        with listening(place.service) as url:
            remote = f"{url}/git/fast.git"
            for caller in callers:
                token = place.tokens[caller]
                fetched = clone.git(url, token, "ls-remote", remote)
                assert (fetched.returncode == 0) == (caller in LOOK), (caller, fetched.stderr)
                assert "refs/attic" not in fetched.stdout
                for ref, allowed in REFS.items():
                    before, commit = hub.refs(), clone.what_for(ref)
                    done = clone.git(url, token, "push", remote, f"{commit}:{ref}")
                    where = (caller, ref, done.stderr)
                    if caller in allowed:
                        assert done.returncode == 0, where
                        assert hub.refs() == before | {ref: commit}, where
                        gone = clone.git(url, token, "push", remote, f":{ref}")
                        assert gone.returncode != 0, where
                        back = clone.git(
                            url, token, "push", "--force", remote, f"{place.service.store.study.base}:{ref}"
                        )
                        assert back.returncode != 0, where
                        assert hub.refs() == before | {ref: commit}, where
                    else:
                        assert done.returncode != 0, where
                        assert hub.refs() == before, where
            if place is site:
                link = clone.what_for(OWN_ATTIC)
                for caller in CALLERS:  # hidden, and fetched by whoever knows the name
                    done = clone.git(url, place.tokens[caller], "fetch", "--quiet", remote, link)
                    assert (done.returncode == 0) == (caller in LOOK), (caller, done.stderr)


def test_the_promoted_branch_takes_from_who_holds_a_promotion(tmp_path: Path) -> None:
    with hosted(tmp_path / "promoted") as service:
        place = site_of(service)
        clone = Clone.of(service, tmp_path / "clone")
        with listening(service) as url:
            remote = f"{url}/git/fast.git"
            own, other = CoordinatorClient(url, place.tokens["own"]), CoordinatorClient(url, place.tokens["other"])
            own.incarnation = other.incarnation = 1
            admin = CoordinatorClient(url, place.tokens["admin"])

            def push(caller: str) -> bool:
                before = service.hub.refs()
                done = clone.git(url, place.tokens[caller], "push", remote, f"{clone.best}:{PROMOTED}")
                assert (done.returncode == 0) == (service.hub.refs() == before | {PROMOTED: clone.best})
                return done.returncode == 0

            own.report(about := uuid.uuid4(), report(1))
            assert not push("own")
            for machine in ("m1", "m2"):  # who has a promotion, not who could have one
                admin.queue(wire.LeaseOrder(kind=Kind.PROMOTE, experiment=about, machine=machine, rung="larger"))
            given = own.assignment()
            assert isinstance(given, wire.Promote)
            assert not push("other")
            assert not push("admin")
            assert push("own")
            clone.keep("LR = 0.3")
            assert isinstance(other.assignment(), wire.Promote)
            assert push("other")
            clone.keep("LR = 0.2")
            own.give_back(given.lease)
            assert not push("own")
            assert push("other")


def test_a_retired_machine_reads_and_pushes_nothing_more(tmp_path: Path) -> None:
    with hosted(tmp_path / "retired") as service:
        place = site_of(service)
        clone = Clone.of(service, tmp_path / "clone")
        with listening(service) as url:
            remote = f"{url}/git/fast.git"
            assert clone.git(url, place.tokens["own"], "push", remote, OWN_BRANCH).returncode == 0
            CoordinatorClient(url, place.tokens["admin"]).retire("m1")
            clone.keep("LR = 0.3")
            assert clone.git(url, place.tokens["own"], "push", remote, OWN_BRANCH).returncode != 0
            assert clone.git(url, place.tokens["own"], "ls-remote", remote).returncode != 0


# -- where tokens are, and are not


def test_revocation_takes_effect_at_once_for_calls_and_for_git(tmp_path: Path) -> None:
    with hosted(tmp_path / "revoked") as service:
        place = site_of(service)
        clone = Clone.of(service, tmp_path / "clone")
        with listening(service) as url:
            remote, viewer = f"{url}/git/fast.git", CoordinatorClient(url, place.tokens["viewer"])
            viewer.machines()
            assert clone.git(url, viewer.token, "ls-remote", remote).returncode == 0
            admin = {"Authorization": f"Bearer {place.tokens['admin']}"}
            [number] = [view.id for view in service.tokens.all() if view.role is Role.VIEWER]
            assert httpx.delete(f"{url}{API}/tokens/{number}", headers=admin).status_code == 204
            answer = httpx.get(f"{url}{API}/machines", headers={"Authorization": f"Bearer {viewer.token}"})
            assert answer.status_code == 401
            assert clone.git(url, viewer.token, "ls-remote", remote).returncode != 0


def test_tokens_are_in_no_file_no_log_and_no_process_list(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with hosted(tmp_path / "site") as service:
        place = site_of(service)
        own = str(place.tokens["own"])
        secrets = [own, base64.b64encode(f"swarm:{own}".encode()).decode().rstrip("=")]
        clone = Clone.of(service, tmp_path / "clone")
        clone.keep(f"LR = 0.3\n# {os.urandom(2_000_000).hex()}")  # so that the push takes its time
        seen: set[str] = set()
        ended = threading.Event()

        def watch() -> None:
            while not ended.is_set():
                for process in Path("/proc").glob("[0-9]*/cmdline"):
                    try:
                        seen.add(process.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                    except OSError:
                        continue

        with listening(service) as url:
            remote = f"{url}/git/fast.git"
            watcher = threading.Thread(target=watch)
            watcher.start()
            Repo(tmp_path).run(
                "clone", "--quiet", remote, str(tmp_path / "joined"), environment=http_environment(url, own)
            )
            pushed = clone.git(url, own, "push", remote, OWN_BRANCH, OWN_ATTIC)
            ended.set()
            watcher.join()
            assert pushed.returncode == 0, pushed.stderr
            refused = clone.git(url, own, "push", remote, f"{clone.best}:refs/heads/main")
            assert refused.returncode != 0
            with pytest.raises(Away):
                list(CoordinatorClient(url.replace("http:", "https:"), own).events())
            for headers in ({"Authorization": f"Bearer {own}x"}, {"Authorization": own}):
                httpx.get(f"{url}{API}/machines", headers=headers)
                httpx.post(f"{url}{API}/machines", headers=headers, content=b"{")
        commands = "\n".join(seen)
        assert re.search(r"git.*push", commands)
        assert "remote-http" in commands
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        content = b"".join(path.read_bytes() for path in files)
        said = "".join(capfd.readouterr()) + caplog.text + refused.stderr + pushed.stderr
        assert "main is not yours" in said  # the refusal was heard
        assert hashed(own).encode() in content
        for secret in secrets:
            assert secret not in commands
            assert secret not in said
            assert secret.encode() not in content


def test_a_running_coordinator_knows_what_swarm_token_did(tmp_path: Path) -> None:
    campaign = fast_task.make(tmp_path / "campaign")
    with served(campaign) as (url, _):

        def status(token: str | None) -> int:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            return httpx.get(f"{url}{API}/machines", headers=headers).status_code

        assert status(None) == 200
        made = swarm("token", "create", "--role", "viewer", "--dir", campaign, cwd=tmp_path)
        assert made.returncode == 0, made.stderr
        token = made.stdout.split()[-1]
        assert (status(None), status(token)) == (401, 200)
        assert swarm("token", "revoke", "1", "--dir", campaign, cwd=tmp_path).returncode == 0
        assert (status(None), status(token)) == (401, 401)


# -- listening to others


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_which_addresses_only_this_computer_reaches(host: str, loopback: bool) -> None:
    assert Address(host).loopback is loopback


def test_other_computers_are_not_let_in_without_tokens(tmp_path: Path) -> None:
    campaign = fast_task.make(tmp_path / "campaign")
    refused = swarm("serve", campaign, "--host", "0.0.0.0", "--port", "0", cwd=tmp_path)
    assert refused.returncode == 3
    assert "--host 0.0.0.0" in refused.stderr
    assert "swarm token create" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    made = swarm("token", "create", "--role", "admin", "--dir", campaign, cwd=tmp_path)
    with served(campaign, "--host", "0.0.0.0") as (url, _):
        at = url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{at}{API}/machines").status_code == 401
        headers = {"Authorization": f"Bearer {made.stdout.strip()}", "Host": "swarm.example"}
        assert httpx.get(f"{at}{API}/machines", headers=headers).status_code == 200


def test_tls_with_a_certificate_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", str(key), "-out", str(cert)]
    subprocess.run(["openssl", "req", "-x509", *kind, *names, *files], check=True, capture_output=True)
    campaign = fast_task.make(tmp_path / "campaign")
    with served(campaign, "--tls-cert", str(cert), "--tls-key", str(key)) as (url, _):
        assert url.startswith("https://127.0.0.1:")
        with pytest.raises(Away, match="certificate"):
            CoordinatorClient(url).machines()
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        client = CoordinatorClient(url)
        joined = client.register(registration("m1"))
        assert client.report(uuid.uuid4(), report()).stored
        feed = client.events(0)
        assert next(feed).kind == "registered"
        feed.close()
        remote = url + joined.campaign.repository
        settings = http_environment(url, client.token) | {"PATH": os.environ["PATH"], "GIT_TERMINAL_PROMPT": "0"}
        for trust, code in (({"GIT_SSL_CAINFO": str(cert)}, 0), ({}, 128)):
            command = ["git", "ls-remote", remote]
            done = subprocess.run(command, env=settings | trust, capture_output=True, text=True, check=False)
            assert done.returncode == code, done.stderr
