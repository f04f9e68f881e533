from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.importing.branch import Branch, Commit, score_in, steps_of
from coordinator.importing.command import Labels, registration_of, report_of
from coordinator.importing.log import of_log, parse_log
from coordinator.importing.session import Attempt
from shared.errors import BadInput
from shared.wire import NO_COMMIT, Status
from tests import fast_task
from tests.conftest import ROOT

H100 = ROOT / "tests" / "data" / "results_h100_mar8.tsv"
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


def silent(stage: str, done: int, of: int) -> None:
    pass


def test_the_public_log_is_read_as_it_is() -> None:
    session = of_log(H100, "val_bpb")
    attempts = session.attempts
    statuses = [attempt.status for attempt in attempts]
    assert (len(attempts), statuses.count(Status.KEEP), statuses.count(Status.CRASH)) == (126, 23, 1)
    assert (attempts[0].tested, attempts[0].kept) == (NO_COMMIT, None)  # the log names no commit for its baseline
    assert [a.score for a in attempts if a.status is Status.CRASH] == [None]
    head = NO_COMMIT
    for attempt in attempts:
        assert attempt.parent == head
        head = attempt.tested if attempt.status is Status.KEEP else head
    assert head == "438a26e"
    assert min(a.score for a in attempts if a.kept and a.score) == 0.969686


def test_a_log_is_the_same_session_wherever_it_lies_and_however_long_it_grew(tmp_path: Path) -> None:
    lines = H100.read_text().splitlines(keepends=True)
    copy = tmp_path / "results.tsv"
    copy.write_text("".join(lines[:20]))
    short, whole = of_log(copy, "val_bpb"), of_log(H100, "val_bpb")
    assert short.origin == whole.origin
    assert [a.key for a in short.attempts] == [a.key for a in whole.attempts[:19]]
    assert (short.name, whole.name) == (tmp_path.name, "results_h100_mar8")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "line 1, column 1: ''; expected 'commit'"),
        (HEADER.replace("val_bpb", "val_loss"), "line 1, column 2: 'val_loss'; the campaign's metric is 'val_bpb'"),
        (HEADER.replace("\tdescription", ""), "line 1, column 4: 'status'; 5 columns"),
        (HEADER, "no experiment in it"),
        (f"{HEADER}baseline\t0.9\t1\tkeep\n", "line 2, column 4: 'keep'; 5 columns"),
        (f"{HEADER}baseline\t0.9\t1\tkeep\ta\tb\n", "line 2, column 6: 'b'; 5 columns"),
        (f"{HEADER}baseline\t0,9\t1\tkeep\ta\n", "line 2, column 2: '0,9'; a number"),
        (f"{HEADER}baseline\tnan\t1\tkeep\ta\n", "line 2, column 2: 'nan'; a number"),
        (f"{HEADER}baseline\t0.9\tinf\tkeep\ta\n", "line 2, column 3: 'inf'; a number"),
        (f"{HEADER}baseline\t0.9\t1\tkept\ta\n", "line 2, column 4: 'kept'; a status"),
        (f"{HEADER}baseline\t0.9\t1\tkeep\ta\n\nd4e5f6g\t1\t1\tkeep\tb\n", "line 4, column 1: 'd4e5f6g'; a commit"),
    ],
)
def test_a_malformed_log_is_one_line_with_line_and_column(text: str, complaint: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_log(text, "results.tsv", "val_bpb")
    assert str(caught.value).startswith("results.tsv: " + complaint)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named_too(tmp_path: Path) -> None:
    log = tmp_path / "r.tsv"
    log.write_bytes(HEADER.encode() + b"baseline\t0.9\t1\tkeep\tbase\xff\n")
    with pytest.raises(BadInput, match="line 2, column 5: not UTF-8"):
        of_log(log, "val_bpb")


def test_a_log_from_windows_with_a_mark_and_blank_lines_is_read(tmp_path: Path) -> None:
    log = tmp_path / "r.tsv"
    log.write_bytes(b"\xef\xbb\xbf" + HEADER.replace("\n", "\r\n").encode() + b"ABCDEF0\t0.9\t1\tkeep\tb\r\n\r\n")
    [only] = of_log(log, "val_bpb").attempts
    assert (only.tested, only.parent, only.kept, only.description) == ("abcdef0", "abcdef0", "abcdef0", "b")


@pytest.mark.parametrize(
    ("message", "score"),
    [
        ("lr 0.04: val_bpb 0.9834", 0.9834),
        ("val_bpb: 0.9834 (was 0.99)", 0.9834),
        ("val_bpb=9.8e-1", 0.98),
        ("val_bpb 0.9911 -> 0.9834", 0.9834),
        ("val_bpb 0.9911 → 0.9834", 0.9834),
        ("old_val_bpb 0.9", None),
        ("lower val_bpb by 0.1", None),
        ("nothing", None),
    ],
)
def test_scores_are_found_in_messages(message: str, score: float | None) -> None:
    assert score_in(message, "val_bpb") == score


def commit(name: str, before: str, after: str, message: str = "", path: str = "train.py") -> Commit:
    return Commit(name * 40, 0, message, {path: (before, after)})


@pytest.mark.parametrize(
    ("commits", "expected"),
    [
        ([commit("a", "0", "1"), commit("b", "1", "2")], {"a": None, "b": None}),
        ([commit("a", "0", "1"), commit("b", "1", "0")], {"a": "b"}),
        ([commit("a", "0", "1"), commit("b", "1", "0"), commit("c", "0", "1")], {"a": "b", "c": None}),
        ([commit("a", "0", "1"), commit("b", "1", "2"), commit("c", "2", "0")], {"a": "c", "b": "c"}),
        ([commit("a", "0", "1"), commit("b", "1", "2"), commit("c", "2", "1")], {"a": None, "b": "c"}),
        ([commit("a", "0", "1"), commit("b", "1", "2", f"This reverts commit {'a' * 40}.")], {"a": "b"}),
        ([commit("a", "0", "1"), commit("b", "1", "2", f"This reverts commit {'f' * 40}.")], {"a": None, "b": None}),
        ([commit("a", "0", "1"), commit("b", "", "9", path="results.tsv")], {"a": None}),
        ([], {}),
    ],
)
def test_what_a_branch_took_back(commits: list[Commit], expected: dict[str, str | None]) -> None:
    steps = steps_of(commits, "base", ["train.py"])
    assert {s.commit.hash[0]: s.reverted_by and s.reverted_by[0] for s in steps} == expected


def test_a_parent_is_where_the_branch_stood() -> None:
    commits = [commit("a", "0", "1"), commit("b", "1", "2"), commit("c", "2", "1"), commit("d", "1", "3")]
    assert [s.parent[0] for s in steps_of(commits, "x" * 40, ["train.py"])] == ["x", "a", "a"]


class Elsewhere:
    """An autoresearch session by hand: a repository, its commits, its results.tsv."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder = folder
        self.task = fast_task.make(folder, prefix=prefix)
        self.git("checkout", "--quiet", "-b", "autoresearch/mar8-mini")
        self.base = self.git("rev-parse", "HEAD")

    def git(self, *arguments: str) -> str:
        return fast_task.git(self.folder, *arguments)

    def change(self, before: str, after: str, message: str) -> str:
        file = self.task / "train.py"
        text = file.read_text()
        assert before in text
        file.write_text(text.replace(before, after))
        self.git("commit", "--quiet", "--all", "-m", message)
        return self.git("rev-parse", "HEAD")

    def revert(self) -> str:
        self.git("revert", "--no-edit", "HEAD")
        return self.git("rev-parse", "HEAD")

    def log(self, *rows: str) -> None:
        (self.task / "results.tsv").write_text(HEADER + "".join(row + "\n" for row in rows))

    def attempts(self) -> list[Attempt]:
        return list(Branch(self.task, None, "val_bpb").session(silent).attempts)


@pytest.mark.parametrize("prefix", ["", "deep/ünder"])
def test_a_branch_with_reverts_and_an_untracked_log(tmp_path: Path, prefix: str) -> None:
    there = Elsewhere(tmp_path / "there", prefix)
    a = there.change("LR = 0.5", "LR = 0.4", "experiment: lr 0.4")
    b = there.change("WIDTH = 64", "WIDTH = 32", "experiment: width 32")
    back = there.revert()
    c = there.change("DECAY = 0.1", "DECAY = 0.05", "experiment: decay 0.05")
    rows = ("baseline\t1.2\t0.1\tkeep\tbaseline", f"{a[:7]}\t1.1\t0.1\tkeep\tlr down")
    rows += (
        f"{b[:7]}\t1.3\t0.1\tdiscard\twidth",
        "1234567\t0\t0\tcrash\treset away",
        f"{c[:7]}\t1.0\t0.2\tkeep\tdecay",
    )
    there.log(*rows)
    session = Branch(there.task, None, "val_bpb").session(silent)
    base, first, second, lost, third = session.attempts
    assert (session.name, session.first) == ("mar8-mini", 0)
    assert (base.tested, base.parent, base.kept, base.score) == (there.base, there.base, there.base, 1.2)
    assert (first.status, first.parent, first.kept, first.score) == (Status.KEEP, there.base, a, 1.1)
    assert (second.status, second.parent, second.kept, second.score) == (Status.DISCARD, a, None, 1.3)
    assert second.reason == f"taken back by {back[:7]}"
    assert (lost.status, lost.parent, lost.score, lost.diff) == (Status.CRASH, a, None, "")
    assert (third.status, third.parent, third.description, third.memory_gb) == (Status.KEEP, a, "decay", 0.2)
    assert "-LR = 0.5\n+LR = 0.4\n" in first.diff
    assert len({a.code_state for a in (first, second, third)}) == 3
    assert second.nodes_added == 0
    assert all(attempt.at for attempt in session.attempts)


def test_a_branch_without_experiments_says_so(tmp_path: Path) -> None:
    there = Elsewhere(tmp_path / "there")
    there.change("LR = 0.5", "LR = 0.4", "on the other branch")
    with pytest.raises(BadInput, match=r"no commit of branch 'main' changes train\.py"):
        Branch(there.task, "main", "val_bpb").session(silent)


def test_without_a_log_messages_tell_the_scores(tmp_path: Path) -> None:
    there = Elsewhere(tmp_path / "there")
    there.change("LR = 0.5", "LR = 0.4", "lr 0.4, val_bpb 1.15")
    there.change("LR = 0.4", "LR = 0.5", "back, it was luck")
    there.change("WIDTH = 64", "WIDTH = 32", "narrow")
    session = Branch(there.task, None, "val_bpb").session(silent)
    assert session.first == 1  # nobody says what the baseline scored
    assert [(a.status, a.score) for a in session.attempts] == [(Status.DISCARD, 1.15), (Status.KEEP, None)]
    assert session.attempts[0].version == 3  # a score and a revert: more is known than of a bare keep
    assert session.attempts[1].version == 1


def test_a_log_that_is_amended_into_each_keep_is_matched(tmp_path: Path) -> None:
    """The reference's protocol: the log names the tested commit, the branch holds it amended with the log."""
    there = Elsewhere(tmp_path / "there")
    rows = [f"{there.base[:7]}\t1.2\t0.1\tkeep\tbaseline"]
    for value in ("0.4", "0.3"):
        before = (there.task / "train.py").read_text().partition("\n")[2].partition("\n")[0]
        tested = there.change(before, f"LR = {value}", f"experiment: lr {value}")
        rows.append(f"{tested[:7]}\t1.{value[2:]}\t0.1\tkeep\tlr is {value}")
        there.log(*rows)
        there.git("add", "results.tsv")
        there.git("commit", "--quiet", "--amend", "--no-edit")
    there.change("WIDTH = 64", "WIDTH = 32", "experiment: not logged yet")
    base, first, second, third = there.attempts()
    assert base.score == 1.2
    assert [(a.score, a.description) for a in (first, second)] == [(1.4, "lr is 0.4"), (1.3, "lr is 0.3")]
    assert second.parent == first.kept == there.git("rev-parse", "HEAD~2")
    assert third.score is None


@pytest.mark.parametrize(
    ("branch", "complaint"),
    [("nothing", "no such branch"), ("main", "no commit that"), ("--all", "no such branch")],
)
def test_a_branch_that_cannot_be_imported(tmp_path: Path, branch: str, complaint: str) -> None:
    there = Elsewhere(tmp_path / "there")
    there.git("branch", "master")
    with pytest.raises(BadInput, match=complaint):
        Branch(there.task, branch, "val_bpb").session(silent)


def test_what_is_no_repository_or_another_task_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no results\.tsv, and no git repository"):
        Branch(tmp_path, None, "val_bpb")
    there = Elsewhere(tmp_path / "there")
    there.change("LR = 0.5", "LR = 0.4", "lr")
    with pytest.raises(BadInput, match="its metric is 'val_bpb', the campaign's is 'accuracy'"):
        Branch(there.task, None, "accuracy")


def test_nothing_is_written_to_the_source(tmp_path: Path) -> None:
    there = Elsewhere(tmp_path / "there")
    there.change("LR = 0.5", "LR = 0.4", "lr 0.4, val_bpb 1.15")
    before = {p: p.read_bytes() for p in sorted(there.folder.rglob("*")) if p.is_file()}
    there.attempts()
    assert {p: p.read_bytes() for p in sorted(there.folder.rglob("*")) if p.is_file()} == before


def test_without_a_class_it_is_in_one_of_its_own() -> None:
    session = of_log(H100, "val_bpb")
    assert registration_of(session, Labels(None, None, None)).machine_class == "results-h100-mar8"
    named = registration_of(session, Labels("Big Rack", "mlx-m4max", None))
    assert (named.name, named.machine_class, named.backend) == ("big-rack", "mlx-m4max", "mlx")
    assert named.uid == registration_of(session, Labels(None, None, None)).uid
    with pytest.raises(BadInput, match="--class"):
        registration_of(session, Labels(None, "H100!", None))


def test_a_report_says_what_is_known_and_has_the_same_ids_each_time() -> None:
    session = of_log(H100, "val_bpb")
    uid = registration_of(session, Labels(None, None, None)).uid
    once, again = (report_of(session.attempts[1], uid, 1, "h100") for _ in range(2))
    assert once == again
    _, report = once
    assert (report.score, report.kept, report.profile, report.diff) == (0.986041, "bea057b", "h100", None)
    crash = next(a for a in session.attempts if a.status is Status.CRASH)
    _, report = report_of(crash, uid, 15, "h100")
    assert (report.score, report.runs[0].status) == (None, Status.CRASH)
