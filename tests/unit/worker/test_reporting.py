"""What is told of an experiment: diffs that apply, limits kept, the same fingerprint wherever an idea was had."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from shared import wire
from shared.errors import SwarmError
from shared.git import Repo
from shared.task import load_task
from shared.wire import ExperimentReport, LeaseRef, Status
from tests import fast_task
from worker import reporting
from worker.journal import Experiment, Journal, Run
from worker.workspace import Workspace


class Bench:
    """A campaign with one worktree, where code is tried and reported."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.root = folder / "campaign"
        self.task = load_task(fast_task.make(self.root, prefix=prefix))
        self.prefix = prefix
        self.repo = Repo(self.root)
        self.base = self.repo.head()
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.workspace = Workspace(folder / "work", self.task, prefix, "mac")
        self.workspace.open(self.root, "autoresearch/t-mac", self.base)

    def tried(self, text: str, **other: object) -> Experiment:
        """An experiment with this train.py; the branch stays at the base."""
        self.workspace.reset(self.base, "")
        identity = str(uuid4())
        files = {} if text == fast_task.TRAIN else {"train.py": text}
        made = self.workspace.commit(files, "an idea", identity, self.base)
        run = Run(7, 1.25, 0.1, 2.0, None, "", None, run=str(uuid4()))
        experiment = Experiment(
            identity,
            1,
            made.commit,
            "an idea",
            "search",
            {},
            {"LR": 0.5},
            made.nodes_added,
            made.code_state,
            idea=identity,
            parent=self.base,
            version=3,
            runs=[run],
            status=Status.DISCARD,
            reason="worse",
            decided_at=1_790_000_000,
        )
        return replace(experiment, **other)

    def report(self, experiment: Experiment) -> ExperimentReport:
        return reporting.report(experiment, self.task, self.prefix, self.repo, self.logs)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


CHANGED = fast_task.TRAIN.replace("LR = 0.5", "LR = 0.25")


@pytest.mark.parametrize("prefix", ["", "studies/one"])
@pytest.mark.parametrize(
    "text",
    [
        CHANGED,
        fast_task.TRAIN.rstrip("\n"),
        fast_task.TRAIN.replace("\n", "\r\n"),
        fast_task.TRAIN + "WORD = 'größer \N{SNOWMAN}'\n",
        fast_task.TRAIN + "TEXT = '''\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n\x0c'''\n",
        "",
    ],
)
def test_the_diff_makes_the_tested_code_of_its_parents(tmp_path: Path, prefix: str, text: str) -> None:
    bench = Bench(tmp_path, prefix)
    experiment = bench.tried(text)
    report = ExperimentReport.model_validate_json(bench.report(experiment).model_dump_json())
    assert report.diff is not None
    clone = tmp_path / "elsewhere"
    fast_task.git(tmp_path, "clone", "--quiet", str(bench.root), str(clone))
    fast_task.git(clone, "checkout", "--quiet", experiment.parent)
    subprocess.run(["git", "apply"], cwd=clone, input=report.diff.encode(), check=True)
    assert (clone / prefix / "train.py").read_bytes() == text.encode()


def test_a_report_says_what_the_journal_knows(bench: Bench) -> None:
    lease = LeaseRef(id=uuid4(), attempt=2)
    experiment = bench.tried(CHANGED, edits={"LR": 0.25}, lease=lease.model_dump(mode="json"))
    report = bench.report(experiment)
    assert (report.version, report.number, report.idea) == (3, 1, UUID(experiment.idea))
    assert (report.tested, report.parent, report.kept) == (experiment.tested, bench.base, None)
    assert (report.status, report.reason, report.decided_at) == (Status.DISCARD, "worse", 1_790_000_000)
    assert (report.edits, report.params, report.lease) == ({"LR": 0.25}, {"LR": 0.5}, lease)
    (run,) = report.runs
    assert (str(run.id), run.seed, run.score, run.status) == (experiment.runs[0].run, 7, 1.25, None)


def test_a_baseline_has_no_diff(bench: Bench) -> None:
    assert bench.report(bench.tried(fast_task.TRAIN)).diff is None


def test_changes_to_files_that_are_not_mutable_are_no_part_of_the_diff(bench: Bench) -> None:
    experiment = bench.tried(CHANGED)
    score = bench.workspace.task_dir / "score.sh"
    score.write_text("exit 0\n")
    fast_task.git(bench.workspace.root, "commit", "--quiet", "--all", "--amend", "-m", "more than it should")
    tested = fast_task.git(bench.workspace.root, "rev-parse", "HEAD")
    assert "score.sh" not in (bench.report(replace(experiment, tested=tested)).diff or "")


def test_an_oversized_diff_stays_here_and_that_is_said(bench: Bench) -> None:
    (bench.logs / "00001-12345678.log").write_text("the log\n")
    line = "X = '" + "x" * 1000 + "'\n"
    experiment = bench.tried(fast_task.TRAIN + line * 600)
    named = replace(experiment.runs[0], run="12345678" + str(uuid4())[8:])
    report = bench.report(replace(experiment, runs=[named]))
    assert report.diff is None
    assert report.log_tail.startswith("the log\n")
    assert f"more than {wire.MAX_DIFF_BYTES}, and was not sent; the commit has it" in report.log_tail
    assert report.fingerprint != bench.report(bench.tried(fast_task.TRAIN)).fingerprint


def test_a_diff_that_is_no_text_stays_here_and_that_is_said(bench: Bench) -> None:
    experiment = bench.tried(CHANGED)
    (bench.workspace.task_dir / "train.py").write_bytes(b"# caf\xe9\n")
    fast_task.git(bench.workspace.root, "commit", "--quiet", "--all", "-m", "latin-1")
    tested = fast_task.git(bench.workspace.root, "rev-parse", "HEAD")
    report = bench.report(replace(experiment, tested=tested))
    assert report.diff is None
    assert "is no UTF-8 text and was not sent" in report.log_tail
    assert json.loads(report.model_dump_json())["fingerprint"].startswith("1:")


@pytest.mark.parametrize(
    ("log", "tail"),
    [
        (b"", ""),
        (b"one line\n", "one line\n"),
        (b"x" * 9000, "x" * 8192),
        (b"caf\xe9 \x00\n", "caf\N{REPLACEMENT CHARACTER} \x00\n"),
        ("ü".encode() * 4097, "ü" * 4096),
        (b"\xff" * 100_000, "\N{REPLACEMENT CHARACTER}" * 8192),
    ],
)
def test_of_a_log_the_end_is_sent(bench: Bench, log: bytes, tail: str) -> None:
    experiment = bench.tried(CHANGED)
    (bench.logs / f"00001-{experiment.runs[0].run[:8]}.log").write_bytes(log)
    report = bench.report(experiment)
    assert report.log_tail == tail
    assert len(report.log_tail.encode()) <= wire.MAX_LOG_BYTES


def test_without_a_log_the_journals_words_are_sent(bench: Bench) -> None:
    experiment = bench.tried(CHANGED)
    failed = replace(experiment.runs[0], score=None, status="crash", tail="Traceback \udcff" + "x" * 9000)
    report = bench.report(replace(experiment, runs=[failed], status=Status.CRASH))
    assert report.log_tail == "x" * 8192
    assert report.runs[0].status is Status.CRASH
    assert bench.report(replace(experiment, runs=[])).log_tail == ""


def test_words_are_cut_to_what_the_wire_takes(bench: Bench) -> None:
    long = "\N{SNOWMAN}" * 3000
    experiment = bench.tried(CHANGED, description=long, reason=long, proposer="p" * 100)
    failed = replace(experiment.runs[0], score=None, status="crash", reason=long)
    report = bench.report(replace(experiment, runs=[failed]))
    assert report.description == report.reason == report.runs[0].reason == long[:2000]
    assert report.proposer == "p" * 63
    half = bench.report(replace(experiment, description="half \ud83d", reason="\udcff"))
    assert ExperimentReport.model_validate_json(half.model_dump_json()).description == "half ?"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_never_reaches_the_wire(bench: Bench, number: float) -> None:
    experiment = bench.tried(CHANGED)
    run = experiment.runs[0]
    for spoiled in (
        replace(experiment, edits={"LR": number}),
        replace(experiment, params={"LR": [number]}),
        replace(experiment, runs=[replace(run, score=number)]),
        replace(experiment, runs=[replace(run, summary={"loss": number})]),
        replace(experiment, runs=[replace(run, phases={"train": number})]),
    ):
        with pytest.raises(ValueError):
            bench.report(spoiled)


def test_an_unknown_commit_is_an_error_of_ours(bench: Bench) -> None:
    with pytest.raises(SwarmError):
        bench.report(bench.tried(CHANGED, tested="0" * 40))


def test_runs_of_a_journal_from_before_they_had_ids_get_the_same_ones_each_time(bench: Bench, tmp_path: Path) -> None:
    experiment = bench.tried(CHANGED)
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("setup", base=bench.base)
    facts = {"description": "old", "proposer": "search", "edits": {}, "params": {}, "nodes_added": 0, "code_state": ""}
    journal.append("experiment", id=experiment.id, number=1, tested=experiment.tested, **facts)
    for seed in (1, 2):
        run = {"score": 1.0, "memory_gb": 0.0, "seconds": 1.0, "status": None, "reason": "", "trained_share": None}
        journal.append("run", experiment=experiment.id, seed=seed, **run)
    journal.append("decision", experiment=experiment.id, status=Status.KEEP, reason="better")
    journal.close()
    old = Journal(tmp_path / "journal.jsonl").experiments[0]
    first, again = bench.report(old), bench.report(old)
    assert [run.id for run in first.runs] == [run.id for run in again.runs]
    assert first.runs[0].id != first.runs[1].id
    assert first.idea == UUID(experiment.id)
    assert (first.parent, first.version) == (bench.base, 4)


def test_the_same_idea_has_one_fingerprint_wherever_it_was_had(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    other = Bench(tmp_path / "two")
    # The other machine has climbed on: its code stands lower down and has another neighbourhood.
    climbed = "# another first line\n\n" + fast_task.TRAIN.replace("WIDTH = 64", "WIDTH = 128")
    other.base = other.tried(climbed).tested
    line = "WARMUP = 0.1\n"
    here, there = bench.tried(fast_task.TRAIN + line), other.tried(climbed + line)
    assert bench.report(here).fingerprint == other.report(there).fingerprint
    edits = {"LR": 0.25, "DECAY": 0.0}
    turned = dict(reversed(edits.items()))
    assert (
        bench.report(replace(here, edits=edits)).fingerprint == other.report(replace(there, edits=turned)).fingerprint
    )


def test_other_ideas_have_other_fingerprints(bench: Bench) -> None:
    texts = [
        CHANGED,
        fast_task.TRAIN.replace("LR = 0.5", "LR = 0.125"),
        fast_task.TRAIN + "-- a\n",
        fast_task.TRAIN + "-- b\n",
        fast_task.TRAIN + "++ a\n",
        fast_task.TRAIN + "++ b\n",
        fast_task.TRAIN + "A\x0cB\n",
        fast_task.TRAIN + "A\x0cC\n",
    ]
    experiments = [bench.tried(text) for text in texts]
    plain = [bench.report(experiment).fingerprint for experiment in experiments]
    edits = ({"LR": 0.25}, {"LR": 0.2}, {"WIDTH": 0.25}, {"LR": 0.25, "WIDTH": 64})
    edited = [bench.report(replace(experiments[0], edits=each)).fingerprint for each in edits]
    assert len({*plain, *edited}) == len(plain) + len(edited)


def test_the_same_change_in_another_file_is_another_idea() -> None:
    diff = "diff --git a/{0} b/{0}\nindex 1..2 100644\n--- a/{0}\n+++ b/{0}\n@@ -1 +1 @@\n-x\n+y\n"
    assert reporting.fingerprint({}, diff.format("one.py")) != reporting.fingerprint({}, diff.format("two.py"))
