"""The journal: what survives a kill, and what it says about where the loop stands."""

from pathlib import Path

import pytest

from shared.errors import SwarmError
from shared.wire import Status
from worker.journal import Journal


def opened(path: Path, machine_class: str = "cuda-h100") -> Journal:
    """A new journal with its setup."""
    journal = Journal(path)
    journal.append("setup", tag="mar5", base="0" * 40, machine_class=machine_class)
    return journal


def start(journal: Journal, description: str = "an idea") -> str:
    """A started experiment; returns its id."""
    number = len(journal.experiments)
    journal.append(
        "experiment",
        id=f"id-{number}",
        number=number,
        tested=f"{number:07x}" + "a" * 33,
        description=description,
        proposer="search",
        edits={"LR": 0.1 * number},
        params={"LR": 0.1 * number, "WIDTH": 64},
        nodes_added=0,
        code_state=f"state-{number}",
    )
    return f"id-{number}"


def execute(journal: Journal, identity: str, score: float | None, memory: float = 44.0, reason: str = "") -> None:
    """A run of it."""
    journal.append(
        "run",
        experiment=identity,
        run="run-id",
        seed=7,
        score=score,
        memory_gb=memory if score is not None else 0.0,
        seconds=300.0,
        status=None if score is not None else "crash",
        reason=reason,
        trained_share=None,
        tail="Traceback" if score is None else "",
    )


def decide(journal: Journal, identity: str, status: Status, reason: str = "it was so") -> None:
    journal.append("decision", experiment=identity, status=status, reason=reason)


def attempt(
    journal: Journal, score: float | None, status: Status, description: str = "an idea", memory: float = 44.0
) -> str:
    """One experiment from start to end; returns its id."""
    identity = start(journal, description)
    if status is not Status.CONFLICT:
        execute(journal, identity, score, memory)
    decide(journal, identity, status)
    if status is Status.KEEP:
        journal.append("kept", experiment=identity, commit="k" + identity.rjust(39, "0"))
    return identity


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


# -- what survives


def test_a_new_journal_is_empty(path: Path) -> None:
    journal = Journal(path)
    assert (journal.experiments, journal.head, journal.pending, journal.approved) == ([], None, None, False)


def test_events_survive_a_reopen(path: Path) -> None:
    before = opened(path)
    attempt(before, 0.997, Status.KEEP, "baseline")
    attempt(before, None, Status.CRASH, "double the width, ☃ and all")
    attempt(before, 0.990, Status.KEEP)
    attempt(before, 0.995, Status.DISCARD)
    execute(before, "id-2", 0.991)
    before.append("void", experiment=None, status="void", reason="stopped by hand")
    before.append("approved")
    start(before)
    before.close()
    after = Journal(path)
    assert after.setup == before.setup
    assert after.experiments == before.experiments
    assert after.head == before.head and after.head is not None and after.head.id == "id-2"
    assert after.pending == before.pending and after.pending is not None and after.pending.id == "id-4"
    assert (after.since_keep, after.since_rerun) == (before.since_keep, before.since_rerun) == (1, 0)
    assert after.approved is before.approved is True


def test_an_event_is_on_disk_when_append_returns(path: Path) -> None:
    journal = opened(path)
    attempt(journal, 0.997, Status.KEEP)
    assert Journal(path).experiments == journal.experiments  # the first is still open


def test_an_event_of_a_later_version_is_passed_over(path: Path) -> None:
    journal = opened(path)
    journal.append("replayed", experiment="who knows")
    attempt(journal, 0.997, Status.KEEP)
    journal.close()
    assert [e.score for e in Journal(path).experiments] == [0.997]


def test_a_description_with_line_ends_stays_one_event(path: Path) -> None:
    journal = opened(path)
    start(journal, "two\nlines\r and \u2028 a third")
    journal.close()
    assert Journal(path).experiments[0].description == "two\nlines\r and \u2028 a third"


def test_a_last_line_cut_off_anywhere_is_dropped_and_the_next_event_stands(path: Path) -> None:
    journal = opened(path)
    attempt(journal, 0.997, Status.KEEP)
    identity = start(journal)
    whole = path.read_bytes()
    decide(journal, identity, Status.DISCARD, "worse, ☃")
    journal.close()
    data = path.read_bytes()
    for end in range(len(whole), len(data)):
        path.write_bytes(data[:end])
        cut = Journal(path)
        assert cut.pending is not None and cut.pending.id == identity, f"cut at byte {end}"
        decide(cut, identity, Status.CRASH)
        cut.close()
        reopened = Journal(path)
        assert reopened.pending is None and reopened.experiments[-1].status is Status.CRASH, f"cut at byte {end}"
        reopened.close()


def test_a_journal_cut_off_in_its_first_line_is_empty(path: Path) -> None:
    path.write_bytes(b'{"event": "set')
    assert Journal(path).setup == {}


def test_looking_at_a_journal_leaves_a_line_that_is_still_being_written(path: Path) -> None:
    """`swarm results` opens it beside a running worker, whose long lines reach the file in more than one write."""
    journal = opened(path)
    attempt(journal, 0.997, Status.KEEP)
    journal.close()
    written = path.read_bytes() + b'{"event": "run", "tail": "half a li'
    path.write_bytes(written)
    Journal(path).close()
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b'{"event": "decisi', id="cut short"),
        pytest.param(b"\0" * 40, id="zeros"),
        pytest.param(b"\xff\xfe\xfa", id="not text"),
        pytest.param(b"", id="blank"),
        pytest.param(b"17", id="a number"),
        pytest.param(b"{}", id="no event in it"),
        pytest.param(b'{"event": "decision", "experiment": "unheard of"}', id="of an unknown experiment"),
    ],
)
def test_a_damaged_line_in_the_middle_is_named_by_file_and_line(path: Path, damage: bytes) -> None:
    journal = opened(path)
    attempt(journal, 0.997, Status.KEEP)
    journal.close()
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], damage, *lines[2:]]) + b"\n")
    with pytest.raises(SwarmError) as caught:
        Journal(path)
    assert f"{path}:3" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_score_that_is_no_number_never_reaches_the_file(path: Path) -> None:
    journal = opened(path)
    identity = start(journal)
    with pytest.raises(ValueError):
        execute(journal, identity, float("nan"))
    journal.close()
    assert Journal(path).experiments[0].runs == []


# -- where the loop stands


def test_an_undecided_experiment_is_pending(path: Path) -> None:
    journal = opened(path)
    identity = start(journal)
    assert journal.pending is not None and journal.pending.id == identity
    execute(journal, identity, 0.997)
    assert journal.pending is not None


def test_a_keep_is_pending_until_it_is_folded_into_the_branch(path: Path) -> None:
    journal = opened(path)
    identity = start(journal)
    execute(journal, identity, 0.997)
    decide(journal, identity, Status.KEEP)
    assert journal.pending is not None and journal.head is None and journal.since_keep == 0
    journal.append("kept", experiment=identity, commit="c0ffee")
    assert journal.pending is None and journal.head is not None and journal.head.kept == "c0ffee"


@pytest.mark.parametrize("status", [Status.DISCARD, Status.CRASH, Status.TIMEOUT, Status.CONFLICT])
def test_anything_else_is_done_when_it_is_decided(path: Path, status: Status) -> None:
    journal = opened(path)
    attempt(journal, 0.997, Status.KEEP)
    attempt(journal, 1.1 if status is Status.DISCARD else None, status)
    assert journal.pending is None
    assert journal.head is not None and journal.head.id == "id-0"


def test_a_void_run_leaves_its_experiment_pending(path: Path) -> None:
    journal = opened(path)
    identity = start(journal)
    journal.append("void", experiment=identity, status="void", reason="the machine slept")
    assert journal.pending is not None and journal.pending.runs == []
    assert journal.interrupted
    start(journal)
    assert not journal.interrupted


def test_a_decision_is_kept_with_its_reason_and_its_time(path: Path) -> None:
    journal = opened(path)
    decide(journal, start(journal), Status.CRASH, "exit 1: NameError")
    (experiment,) = journal.experiments
    assert (experiment.status, experiment.reason) == (Status.CRASH, "exit 1: NameError")
    assert experiment.decided_at > 1_700_000_000


def test_counts_since_the_last_keep_and_rerun_go_on_and_back_as_they_should(path: Path) -> None:
    journal = opened(path)

    def counts() -> tuple[int, int]:
        other = Journal(path)  # the same after a restart
        assert (other.since_keep, other.since_rerun) == (journal.since_keep, journal.since_rerun)
        other.close()
        return journal.since_keep, journal.since_rerun

    attempt(journal, 0.997, Status.KEEP)
    assert counts() == (0, 0)
    attempt(journal, 1.1, Status.DISCARD)
    attempt(journal, None, Status.CRASH)
    assert counts() == (2, 2)
    execute(journal, "id-0", 0.998)
    assert counts() == (2, 0)
    attempt(journal, 1.1, Status.DISCARD)
    assert counts() == (3, 1)
    start(journal)
    assert counts() == (3, 1)
    execute(journal, "id-4", 1.2)
    assert counts() == (3, 1)
    decide(journal, "id-4", Status.DISCARD)
    assert counts() == (4, 2)
    execute(journal, "id-0", None)  # a rerun that crashed was a rerun
    assert counts() == (4, 0)
    attempt(journal, 0.9, Status.KEEP)
    assert counts() == (0, 0)
    attempt(journal, 1.1, Status.DISCARD)
    assert counts() == (1, 1)


def test_best_holds_all_scores_of_head_and_its_memory(path: Path) -> None:
    journal = opened(path)
    attempt(journal, 0.997, Status.KEEP, memory=44.0)
    attempt(journal, 0.990, Status.KEEP, memory=45.5)
    execute(journal, "id-1", 0.992, memory=46.0)
    execute(journal, "id-1", None)
    execute(journal, "id-1", 0.994)
    assert journal.best().scores == (0.990, 0.992, 0.994)
    assert journal.best().memory_gb == 45.5


def test_an_experiments_score_is_the_one_it_was_decided_on(path: Path) -> None:
    journal = opened(path)
    attempt(journal, 0.997, Status.KEEP)
    execute(journal, "id-0", 0.999)
    assert journal.experiments[0].score == 0.997
    assert journal.experiments[0].scores == (0.997, 0.999)


def test_an_experiment_that_never_ran_has_no_score_and_no_tail(path: Path) -> None:
    journal = opened(path)
    start(journal)
    assert (journal.experiments[0].score, journal.experiments[0].scores, journal.experiments[0].tail) == (None, (), "")


def test_only_code_that_ran_again_counts_for_the_noise_floor(path: Path) -> None:
    journal = opened(path)
    attempt(journal, 0.997, Status.KEEP)
    attempt(journal, 1.1, Status.DISCARD)
    execute(journal, "id-0", 0.999)
    assert journal.reruns() == [(0.997, 0.999)]


def test_approval_is_remembered(path: Path) -> None:
    journal = opened(path)
    assert not journal.approved
    journal.append("approved")
    assert journal.approved and Journal(path).approved
