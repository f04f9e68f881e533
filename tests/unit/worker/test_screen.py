"""What a person sees: the staircase, plain lines where there is no terminal, and nothing that a description can do."""

import io
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from shared.task import parse_task
from shared.wire import Status
from tests.fast_task import CONFIG
from worker.results import Standing
from worker.runner import Progress
from worker.screen import WIDTH, TerminalScreen, staircase

from .test_results import experiment

TASK = parse_task(CONFIG, "fast")
BLOCKS = "▁▂▃▄▅▆▇█"
STANDING = Standing(1.0, 0.99, 1, 0.002, 5.0, 1, 1, "c0ffee", "an idea")


def heights(stairs: str) -> list[int]:
    return [BLOCKS.index(block) for block in stairs]


# -- staircase


def test_a_falling_best_falls_from_the_highest_block_to_the_lowest() -> None:
    assert staircase([1.0, 0.9, 0.8, 0.3], 1) == "█▇▆▁"


def test_a_rising_best_rises() -> None:
    assert staircase([1.0, 2.0, 8.0], -1) == "▁▂█"


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=200), st.sampled_from([1, -1]))
@settings(deadline=None)
def test_a_monotone_best_gives_monotone_blocks_in_limited_width(levels: list[float], sign: int) -> None:
    stairs = heights(staircase(sorted(levels, reverse=sign > 0), sign))
    assert stairs == sorted(stairs, reverse=sign > 0)
    assert len(stairs) == min(len(levels), WIDTH)


@pytest.mark.parametrize("count", [WIDTH - 1, WIDTH, WIDTH + 1, 2 * WIDTH, 1000])
def test_a_long_staircase_keeps_its_first_and_last_level(count: int) -> None:
    stairs = staircase([float(count - i) for i in range(count)], 1)
    assert len(stairs) <= WIDTH
    assert (stairs[0], stairs[-1]) == ("█", "▁")


def test_the_last_step_is_seen_in_a_long_staircase() -> None:
    assert staircase([5.0] * 999 + [1.0], 1) == "█" * (WIDTH - 1) + "▁"


@pytest.mark.parametrize(("sign", "block"), [(1, "█"), (-1, "▁")])
def test_a_constant_best_is_a_row_of_its_starting_block(sign: int, block: str) -> None:
    assert staircase([0.5] * 5, sign) == block * 5


# -- without a terminal


def plain() -> tuple[TerminalScreen, io.StringIO]:
    out = io.StringIO()
    return TerminalScreen(Console(file=out, width=60, force_terminal=False), TASK.sign), out


def test_a_verdict_is_one_line_with_number_score_status_description_and_reason() -> None:
    screen, out = plain()
    with screen:
        screen.decided(experiment(0.9932, Status.KEEP, "LR 0.5 -> 0.04", 12), STANDING)
    assert out.getvalue().split() == [*["12", "0.993200", "keep", "LR", "0.5", "->", "0.04", "(it", "was", "so)"]]
    assert out.getvalue().count("\n") == 1


@pytest.mark.parametrize("status", [Status.CRASH, Status.TIMEOUT, Status.CONFLICT])
def test_a_verdict_without_a_score_says_so(status: Status) -> None:
    screen, out = plain()
    screen.decided(experiment(None, status, number=3), None)
    assert out.getvalue().split()[:3] == ["3", "-", status.value]


def test_every_verdict_and_note_is_a_line_and_progress_is_none() -> None:
    screen, out = plain()
    with screen:
        for number in range(3):
            screen.started(experiment(number=number))
            screen.progress(Progress(1.0, 10, 0.5, 2.3))
            screen.decided(experiment(number=number, description="long " * 40), STANDING)
        screen.note("running HEAD again")
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert [line.split()[0] for line in lines[:3]] == ["0", "1", "2"]
    assert lines[3].strip() == "running HEAD again"


@pytest.mark.parametrize(
    "text", ["[red]x", "[/red]", "[bold]x[/bold]", "[link=https://x]y[/link]", "a\\[b", "[@click=f]"]
)
def test_markup_in_a_description_comes_out_as_it_is(text: str) -> None:
    screen, out = plain()
    screen.decided(experiment(description=text), STANDING)
    screen.note(f"running again: {text}")
    verdict, note = out.getvalue().splitlines()
    assert text in verdict
    assert note.endswith(f"running again: {text}")


def test_an_emoji_code_in_a_note_stays_a_code() -> None:
    screen, out = plain()
    screen.note("restored model:fire:py")
    assert "model:fire:py" in out.getvalue()


HOSTILE = ["\x1b[31mred", "\x1b]0;title\x07", "\x1b[2J\x1b[H", "\x9b31m", "one\ntwo", "back\rto the start", "\x08\x08"]


@pytest.mark.parametrize("text", HOSTILE)
def test_escapes_and_line_ends_in_a_description_come_out_inert(text: str) -> None:
    screen, out = plain()
    screen.decided(experiment(description=text), STANDING)
    assert out.getvalue().removesuffix("\n").isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_escapes_and_line_ends_in_a_reason_come_out_inert(text: str) -> None:
    """A crash's reason ends with the last line of the log, which the agent's code printed."""
    screen, out = plain()
    screen.decided(replace(experiment(None, Status.CRASH), reason=f"exit 1: {text}"), None)
    assert out.getvalue().removesuffix("\n").isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_escapes_and_line_ends_in_a_note_come_out_inert(text: str) -> None:
    """Notes quote descriptions and names of files."""
    screen, out = plain()
    screen.note(f"running again: {text}")
    assert out.getvalue().removesuffix("\n").isprintable()


# -- on a terminal


def test_on_a_terminal_the_run_in_progress_and_the_staircase_are_shown() -> None:
    out = io.StringIO()
    with TerminalScreen(Console(file=out, width=100, force_terminal=True), TASK.sign) as screen:
        screen.decided(experiment(1.0, number=0), replace(STANDING, best=1.0))
        screen.decided(experiment(0.99, number=1), STANDING)
        screen.started(experiment(number=2, description="[red]LR\x1b[2J 0.5 -> 0.1"))
        screen.progress(Progress(12.0, 345, 0.25, 2.5))
    shown = out.getvalue()
    assert "#2 [red]LR [2J 0.5 -> 0.1  12 s  step 345  25 %  loss 2.5000" in shown
    assert "1.0000 █▁ 0.9900" in shown
    assert "\x1b[2J" not in shown
