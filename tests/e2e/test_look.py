"""Looking at a swarm and bringing logs into it: the commands, against a real coordinator."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid5

import httpx
import pyarrow.parquet as pq
import pytest

from shared.client import CoordinatorClient
from shared.wire import ExperimentReport, Registration, RunReport, Status
from tests import fast_task
from tests.conftest import ROOT
from tests.served import command, environment, served, stop, swarm

H100 = ROOT / "tests" / "data" / "results_h100_mar8.tsv"
OURS = UUID("5b0e2f64-3f4b-4a0e-9d55-2f1f5d6a7c88")
EVIL = "set \x1b[31mLR\x1b[0m to 0.4\x07\nand \u202eon\x9b2J"  #: what an agent may write
PATCH = "--- a/train.py\n+++ b/train.py\n@@ -1 +1 @@\n-LR = 0.5\n+LR = 0.4\n"


def commit_of(uid: UUID, number: int) -> str:
    return uuid5(uid, f"commit {number}").hex + "0" * 8


class Machine:
    """A worker that only reports."""

    def __init__(self, url: str, name: str, machine_class: str = "cuda-h100") -> None:
        self.client, self.uid = CoordinatorClient(url), uuid5(OURS, name)
        self.client.register(Registration(version="0.1.0", uid=self.uid, name=name, machine_class=machine_class))

    def report(self, number: int, status: Status, score: float | None, description: str = "an idea") -> UUID:
        identity = uuid5(self.uid, str(number))
        keep = status is Status.KEEP
        report = ExperimentReport(
            version=1,
            number=number,
            idea=identity,
            tested=commit_of(self.uid, number),
            parent=commit_of(self.uid, max(number - 1, 0)),
            kept=commit_of(self.uid, number) if keep else None,
            description=description,
            proposer="search",
            edits={"LR": 0.4},
            status=status,
            reason="0.012000 better (+6.0 sigma)" if keep else "worse",
            decided_at=int(time.time()),
            runs=(RunReport(id=identity, seed=number, score=score, metrics={"num_steps": 12.0}),),
            diff=PATCH if number else None,
            log_tail="one line\nanother \x1b[2J\n",
        )
        assert self.client.report(identity, report).stored
        return identity


@dataclass(frozen=True)
class Swarm:
    url: str
    folder: Path

    def look(self, *arguments: str | Path, **more: str) -> str:
        done = swarm(*arguments, cwd=self.folder, SWARM_COORDINATOR=self.url, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, *arguments: str | Path, **more: str) -> tuple[int, str]:
        done = swarm(*arguments, cwd=self.folder, SWARM_COORDINATOR=self.url, **more)
        assert done.stdout == ""
        [line] = done.stderr.splitlines()
        return done.returncode, line


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Two machines of one class and one of another; a keep with a hostile description; nothing here changes it."""
    folder = tmp_path_factory.mktemp("look")
    with served(fast_task.make(folder / "task")) as (url, _):
        for name, machine_class, best in (("m1", "cuda-h100", 0.99), ("m2", "cuda-h100", 0.98), ("m3", "cpu", 1.1)):
            machine = Machine(url, name, machine_class)
            machine.report(0, Status.KEEP, 1.2, "baseline")
            machine.report(1, Status.KEEP, best, EVIL)
            machine.report(2, Status.DISCARD, 1.3)
            machine.report(3, Status.CRASH, None, "too wide")
        yield Swarm(url, folder)


def harmless(text: str) -> bool:
    return not any((ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or c in "\u202e\u200f" for c in text)


@pytest.mark.parametrize(
    "arguments", [("status",), ("machines",), ("leaderboard",), ("log",), ("show", "m1"), ("export", "--out", "e.tsv")]
)
@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_that_agents_wrote_reaches_the_terminal(
    filled: Swarm, tmp_path: Path, arguments: tuple[str, ...], as_json: bool
) -> None:
    known = [uuid5(uuid5(OURS, "m1"), "1").hex if part == "m1" else part for part in arguments]
    output = Swarm(filled.url, tmp_path).look(*known, *(["--json"] if as_json else []))
    assert output
    assert harmless(output)
    if as_json:
        assert all(json.loads(line) for line in output.splitlines())


def test_status_shows_machines_best_and_events(filled: Swarm) -> None:
    shown = json.loads(filled.look("status", "--json"))
    assert shown["campaign"]["metric"] == "val_bpb"
    assert shown["health"]["status"] == "ok"
    assert [machine["name"] for machine in shown["machines"]] == ["m1", "m2", "m3"]
    assert {line["machine_class"]: line["machine"] for line in shown["best"]} == {"cuda-h100": "m2", "cpu": "m3"}
    assert shown["experiments_last_hour"] == 9
    positions = [event["position"] for event in shown["events"]]
    assert positions == list(range(positions[0], positions[0] + 10))
    text = filled.look("status")
    assert "3 online; 9 experiments in the last hour" in text
    assert "too wide" in text


def test_the_leaderboard_as_json_is_the_endpoint_s_answer(filled: Swarm) -> None:
    plain = httpx.get(f"{filled.url}/api/v1/leaderboard").text.replace("\x9b", "\\u009b").replace("\u202e", "\\u202e")
    assert filled.look("leaderboard", "--json") == plain + "\n"
    for options, query in (
        (("--order", "sigmas"), {"order": "sigmas"}),
        (("--class", "cpu"), {"machine_class": "cpu"}),
        (("--profile", "default", "--rung", "base"), {"profile": "default", "rung": "base"}),
        (("--machine", "m2"), {"machine": "m2"}),
        ((), {}),
        (("--limit", "2"), {"limit": "2"}),
    ):
        answer = httpx.get(f"{filled.url}/api/v1/leaderboard", params=query).text
        assert json.loads(filled.look("leaderboard", "--json", *options)) == json.loads(answer), options
    lines = filled.look("leaderboard").splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["1", "m3"], ["1", "m2"], ["2", "m1"]]
    assert "lower is better" in lines[-1]


def test_machines_say_what_they_are(filled: Swarm) -> None:
    assert [one["machine_class"] for one in json.loads(filled.look("machines", "--json"))] == [
        "cuda-h100",
        "cuda-h100",
        "cpu",
    ]
    assert filled.look("machines").count("online") == 3


def test_the_log_is_newest_first_and_filtered(filled: Swarm) -> None:
    rows = [json.loads(line) for line in filled.look("log", "--json").splitlines()]
    assert len(rows) == 12
    assert [row["position"] for row in rows] == sorted((row["position"] for row in rows), reverse=True)
    few = [json.loads(line) for line in filled.look("log", "--json", "-n", "2", "--machine", "m1").splitlines()]
    assert [(row["machine"], row["number"]) for row in few] == [("m1", 3), ("m1", 2)]
    some = filled.look("log", "--json", "--status", "crash", "--status", "discard").splitlines()
    assert {json.loads(row)["status"] for row in some} == {"crash", "discard"}
    assert len(some) == 6
    assert filled.look("log", "-n", "0") == ""
    assert len(filled.look("log", "-n", "5").splitlines()) == 5


def test_an_experiment_s_page_and_its_patch(filled: Swarm, tmp_path: Path) -> None:
    identity = str(uuid5(uuid5(OURS, "m2"), "1"))
    page = filled.look("show", identity[:10])
    for words in ("#1 on m2", "0.012000 better", "0.980000", "LR = 0.4", "num_steps 12", "baseline", "another"):
        assert words in page
    shown = json.loads(filled.look("show", identity, "--json"))
    assert shown["id"] == identity
    assert [step["description"] for step in shown["lineage"]] == [EVIL, "baseline"]
    assert filled.look("diff", identity) == PATCH
    assert json.loads(filled.look("diff", identity[:10], "--json")) == {"id": identity, "diff": PATCH}
    task = fast_task.make(tmp_path / "task")
    (task / "train.py").write_text("LR = 0.5\n")
    (tmp_path / "p").write_text(filled.look("diff", identity))
    fast_task.git(task, "apply", str(tmp_path / "p"))
    assert (task / "train.py").read_text() == "LR = 0.4\n"
    by_commit = json.loads(filled.look("show", commit_of(uuid5(OURS, "m2"), 2)[:12], "--json"))
    assert (by_commit["machine"], by_commit["number"]) == ("m2", 2)


def test_the_baseline_has_no_patch(filled: Swarm) -> None:
    done = swarm("diff", str(uuid5(uuid5(OURS, "m2"), "0")), "--coordinator", filled.url, cwd=filled.folder)
    assert (done.returncode, done.stdout) == (0, "")
    assert "no diff" in done.stderr


def test_exports_hold_every_experiment_and_overwrite_nothing(filled: Swarm, tmp_path: Path) -> None:
    table, text = tmp_path / "all.parquet", tmp_path / "all.tsv"
    assert json.loads(filled.look("export", "--out", table, "--json"))["bytes"] == table.stat().st_size
    filled.look("export", "--out", text)
    assert pq.read_table(table).num_rows == len(text.read_text().splitlines()) - 1 == 12
    before = text.read_bytes()
    assert filled.refused("export", "--out", text)[0] == 4
    assert text.read_bytes() == before
    assert filled.refused("export", "--out", tmp_path / "all.csv")[0] == 2
    assert filled.refused("export", "--out", tmp_path / "no" / "all.tsv")[0] == 2
    assert swarm("export", "--out", "x.tsv", "--coordinator", "http://127.0.0.1:9", cwd=tmp_path).returncode == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.parquet", "all.tsv"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("show", "abcdabcd"), 2, "no experiment 'abcdabcd'"),
        (("show", "../../x"), 2, "give an experiment's id"),
        (("diff", "zz\x1b[0m"), 2, "give an experiment's id"),
        (("log", "--machine", "nobody"), 2, "no machine 'nobody'"),
        (("machines", "--token", "wrong"), 3, "token"),
        (("status", "--coordinator", "http://127.0.0.1:9"), 1, "no coordinator answers"),
        (("status", "--coordinator", "http://a:b"), 2, "no address of a coordinator"),
    ],
)
def test_what_goes_wrong_is_one_line(filled: Swarm, arguments: tuple[str, ...], code: int, words: str) -> None:
    returned, line = filled.refused(*arguments)
    assert (returned, line.startswith("swarm: "), harmless(line)) == (code, True, True)
    assert words in line


def lines_of(path: Path, count: int, process: subprocess.Popen[bytes]) -> list[dict[str, object]]:
    """Waits until a file has so many lines."""
    until = time.monotonic() + 60
    while (text := path.read_text()).count("\n") < count:
        assert process.poll() is None, text
        assert time.monotonic() < until, text
        time.sleep(0.02)
    return [json.loads(line) for line in text.splitlines()]


def test_following_through_a_restart_misses_and_doubles_nothing(tmp_path: Path) -> None:
    task = fast_task.make(tmp_path / "task")
    out, said = tmp_path / "out", tmp_path / "said"
    with served(task) as (url, coordinator):
        machine = Machine(url, "m1")
        for number in range(3):
            machine.report(number, Status.KEEP, 1.0 - number / 100)
        follow = ("log", "--follow", "--json", "-n", "2", "--coordinator", url)
        with out.open("wb") as output, said.open("wb") as errors:
            process = subprocess.Popen(command(*follow), env=environment(), stdout=output, stderr=errors)
        try:
            lines_of(out, 2, process)
            for number in range(3, 6):
                machine.report(number, Status.DISCARD, 1.2)
            lines_of(out, 5, process)
            stop(coordinator)
            with served(task, "--port", url.rpartition(":")[2]):
                for number in range(6, 30):
                    machine.report(number, Status.DISCARD, 1.2)
                seen = lines_of(out, 28, process)
                machine.report(30, Status.CRASH, None)
                seen = lines_of(out, 29, process)
                process.send_signal(signal.SIGINT)
                assert process.wait(20) == 0
        finally:
            stop(process)
    assert [row["number"] for row in seen] == list(range(1, 31))[: len(seen)]
    assert len(out.read_text().splitlines()) == len(seen)
    [away] = said.read_text().splitlines()
    assert "no coordinator answers" in away


# -- bringing logs in


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Swarm]:
    with served(fast_task.make(tmp_path / "task")) as (url, _):
        yield Swarm(url, tmp_path)


def test_the_public_log_becomes_a_machine_of_its_own(empty: Swarm) -> None:
    with closing(CoordinatorClient(empty.url)) as client:
        options = ("--class", "cuda-h100", "--profile", "h100")
        said = empty.look("import", H100, *options)
        assert said.startswith("126 experiments, 23 keeps, best 0.969686 as machine results-h100-mar8\n")
        assert "22 keeps of 125 tried; 126 were new" in said
        again = json.loads(empty.look("import", H100, *options, "--json"))
        assert (again["new"], again["experiments"], again["keeps"]) == (0, 126, 23)
        [standing] = client.leaderboard().standings
        assert (standing.machine, standing.machine_class, standing.profile) == (
            "results-h100-mar8",
            "cuda-h100",
            "h100",
        )
        assert (standing.best, standing.baseline, standing.keeps, standing.experiments) == (0.969686, 0.9979, 22, 125)
        assert standing.commit == "438a26e"
        [machine] = client.machines()
        assert machine.state == "imported"
        assert len(client.lineage("438a26e")) == 22
    assert "warmdown 0.7 to 0.75" in empty.look("show", "438a26e")
    assert json.loads(empty.look("status", "--json"))["experiments_last_hour"] == 0
    assert [json.loads(line)["number"] for line in empty.look("log", "--json", "-n", "3").splitlines()] == [
        125,
        124,
        123,
    ]


def test_a_branch_comes_with_its_code(empty: Swarm, tmp_path: Path) -> None:
    elsewhere = fast_task.make(tmp_path / "elsewhere")
    arguments = ("run", "--yes", "--name", "mini", "--tag", "mar8", "--experiments", "12")
    assert swarm(*arguments, cwd=elsewhere).returncode == 0
    ran = json.loads(swarm("results", "--json", cwd=elsewhere).stdout)
    branch = ("--branch", "autoresearch/mar8-mini")
    done = json.loads(empty.look("import", elsewhere, *branch, "--json"))
    assert done["machine"] == "mar8-mini"
    logged = fast_task.git(elsewhere, "show", "autoresearch/mar8-mini:results.tsv").splitlines()[1:]
    assert (done["experiments"], done["improvements"]) == (len(logged), ran["standing"]["keeps"])
    with closing(CoordinatorClient(empty.url)) as client:
        [standing] = client.leaderboard().standings
        tip = fast_task.git(elsewhere, "rev-parse", "autoresearch/mar8-mini")
        kept = [e for e in ran["experiments"] if e["status"] == "keep"]
        assert (standing.commit, standing.best) == (tip, round(kept[-1]["score"], 6))
        assert client.lineage(tip)[0].description == kept[-1]["description"].replace(",", ";")
        assert len(client.lineage(tip)) == len(kept)
        assert client.diff(tip).strip() == fast_task.git(elsewhere, "diff", f"{tip}^", tip, "--", "train.py")
    copy = tmp_path / "copy"
    fast_task.git(
        tmp_path, "clone", "--quiet", "--branch", "imported/mar8-mini", f"{empty.url}/git/fast.git", str(copy)
    )
    assert fast_task.git(copy, "rev-parse", "HEAD") == tip
    with closing(CoordinatorClient(empty.url)) as client:
        assert [(b.machine, b.ref, b.commit) for b in client.branches()] == [
            ("mar8-mini", "refs/heads/imported/mar8-mini", tip)
        ]
        assert [m.branch for m in client.machines()] == ["imported/mar8-mini"]
    assert fast_task.git(elsewhere, "remote") == ""


def test_reverts_on_a_branch_are_discards(empty: Swarm, tmp_path: Path) -> None:
    elsewhere = fast_task.make(tmp_path / "elsewhere")
    fast_task.git(elsewhere, "checkout", "--quiet", "-b", "autoresearch/jun1")
    for value, words in (("0.4", "lr 0.4, val_bpb 1.15"), ("0.3", "lr 0.3: val_bpb: 1.2"), ("0.2", "no score")):
        (elsewhere / "train.py").write_text(fast_task.TRAIN.replace("LR = 0.5", f"LR = {value}"))
        fast_task.git(elsewhere, "commit", "--quiet", "--all", "-m", words)
        if value == "0.3":
            fast_task.git(elsewhere, "revert", "--no-edit", "HEAD")
    done = swarm("import", elsewhere, "--coordinator", empty.url, cwd=tmp_path)
    assert done.returncode == 3
    assert done.stdout.startswith("3 experiments, 1 keeps, best 1.150000 as machine jun1\n")
    refused, last = done.stderr.splitlines()
    assert "no score: a keep without a score" in refused
    assert last.startswith("swarm: 1 of ")
    with closing(CoordinatorClient(empty.url)) as client:
        rows = client.experiments(order="oldest").experiments
    assert [(row.number, row.status, row.score) for row in rows] == [(1, "keep", 1.15), (2, "discard", 1.2)]


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("commit\tval_bpb\n", 2, "line 1, column 2"),
        ("commit\tval_bpb\tmemory_gb\tstatus\tdescription\nabc\t0.9\t1\tgood\tx\n", 2, "line 2, column 4: 'good'"),
    ],
)
def test_a_malformed_log_changes_nothing(empty: Swarm, tmp_path: Path, text: str, code: int, words: str) -> None:
    log = tmp_path / "results.tsv"
    log.write_text(text)
    returned, line = empty.refused("import", log)
    assert returned == code
    assert words in line
    assert json.loads(empty.look("machines", "--json")) == []


def test_rows_that_are_refused_are_listed_and_the_rest_is_in(empty: Swarm, tmp_path: Path) -> None:
    log = tmp_path / "results.tsv"
    lines = H100.read_text().splitlines(keepends=True)[:6]
    log.write_text("".join(lines) + "abcdef0\t0.000000\t1.0\tkeep\ttoo good\n")
    done = swarm("import", log, "--name", "Mine", "--coordinator", empty.url, cwd=tmp_path)
    assert done.returncode == 3
    assert "as machine mine" in done.stdout
    refused, last = done.stderr.splitlines()
    assert refused == "refused: #5 abcdef0 too good: score 0.000000: bits per byte are above 0"
    assert last.startswith("swarm: 1 of ")


def test_without_an_administrator_s_token_nothing_comes_in(tmp_path: Path) -> None:
    task = fast_task.make(tmp_path / "task")
    tokens = {}
    for role in ("admin", "viewer"):
        tokens[role] = swarm("token", "create", "--role", role, cwd=task).stdout.strip()
    with served(task) as (url, _):
        here = Swarm(url, tmp_path)
        assert here.refused("import", H100)[0] == 3
        assert here.refused("import", H100, SWARM_TOKEN=tokens["viewer"])[0] == 3
        assert json.loads(here.look("machines", "--json", "--token", tokens["viewer"])) == []
        elsewhere = fast_task.make(tmp_path / "elsewhere")
        fast_task.git(elsewhere, "checkout", "--quiet", "-b", "autoresearch/jun1")
        (elsewhere / "train.py").write_text("LR = 1\n")
        fast_task.git(elsewhere, "commit", "--quiet", "--all", "-m", "val_bpb 1.1")
        assert here.look("import", elsewhere, SWARM_TOKEN=tokens["admin"]).startswith("1 experiments, 1 keeps")
        assert tokens["admin"] not in (elsewhere / ".git" / "config").read_text()
