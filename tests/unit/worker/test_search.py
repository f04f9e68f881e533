"""The search proposer: where it looks, what it proposes, and that it gets somewhere without an LLM."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import constants
from shared.task import TaskSpec, parse_task
from shared.wire import Status
from tests.fast_task import CONFIG, TRAIN
from worker.journal import Experiment, Run
from worker.proposers import Proposal
from worker.proposers.search import Domain, Search
from worker.workspace import code_state

FAST = parse_task(CONFIG, "fast")
SAMPLERS = ["tpe", "cmaes"]
Objective = Callable[[Mapping[str, Any]], float | None]


def task(space: Mapping[str, Any] | None = None, sampler: str = "tpe", **changes: Any) -> TaskSpec:
    """The fast task with another search space."""
    raw = FAST.model_dump() | {"search_space": dict(space or {}), "sampler": sampler} | changes
    return TaskSpec.model_validate(raw)


def fast(sampler: str = "tpe") -> TaskSpec:
    return FAST.model_copy(update={"sampler": sampler})


def domains(text: str, space: Mapping[str, Any] | None = None, file: str = "train.py") -> dict[str, Domain]:
    return {d.name: d for d in Search(task(space), 1).space({file: text})}


def values(files: Mapping[str, str]) -> dict[str, Any]:
    """What a run would read."""
    return {name: c.value for file, text in files.items() for name, c in constants.find(file, text).items()}


def quadratic(at: Mapping[str, Any]) -> float:
    """The fast task's score without its noise: 1.0 at LR 0.2, WIDTH 128, DECAY 0.05."""
    lr, width, decay = float(at["LR"]), float(at["WIDTH"]), float(at["DECAY"])
    return 1 + math.log(lr / 0.2) ** 2 / 10 + math.log(width / 128) ** 2 / 10 + (decay - 0.05) ** 2 * 10


@dataclass
class Campaign:
    """The loop without git and processes: propose, score, keep what is better."""

    search: Search
    files: dict[str, str]
    objective: Objective
    sign: int = 1
    best: float = 0.0
    history: list[Experiment] = field(default_factory=list)
    proposals: list[Proposal] = field(default_factory=list)

    def __post_init__(self) -> None:
        params = self.search.params(self.files)
        self.record(Proposal("baseline", {}, "baseline", {}, params), self.files, self.objective(values(self.files)))
        self.best = self.history[0].score or 0.0

    def step(self) -> Proposal | None:
        proposal = self.search.propose(self.files, self.history)
        if proposal is not None:
            files = {**self.files, **proposal.files}
            score = self.objective(values(files))
            self.proposals.append(proposal)
            if self.record(proposal, files, score) and score is not None:
                self.files, self.best = files, score
        return proposal

    def run(self, experiments: int) -> list[Proposal]:
        return [proposal for _ in range(experiments) if (proposal := self.step()) is not None]

    def record(self, proposal: Proposal, files: Mapping[str, str], score: float | None) -> bool:
        kept = score is not None and (not self.history or self.sign * score < self.sign * self.best)
        status = Status.KEEP if kept else Status.CRASH if score is None else Status.DISCARD
        run = Run(1, score, 1.0, 1.0, None if score is not None else "crash", "", None)
        number = len(self.history)
        self.history.append(
            Experiment(
                id=f"id-{number}",
                number=number,
                tested="0" * 40,
                description=proposal.description,
                proposer=proposal.proposer,
                edits=dict(proposal.edits),
                params=dict(proposal.params),
                nodes_added=0,
                code_state=code_state(dict(files)),
                runs=[run],
                status=status,
                kept="0" * 40 if kept else None,
            )
        )
        return kept


def never_better(at: Mapping[str, Any]) -> float:
    """Every idea is discarded: the baseline, at LR 0.5, is best."""
    return 1.0 if at["LR"] == 0.5 and at["WIDTH"] == 64 and at["DECAY"] == 0.1 else 2.0 + quadratic(at)


def campaign(sampler: str, objective: Objective = quadratic, seed: int = 1) -> Campaign:
    return Campaign(Search(fast(sampler), seed), {"train.py": TRAIN}, objective)


# -- where it looks


def test_the_space_is_the_tasks_in_the_tasks_order() -> None:
    space = Search(FAST, 1).space({"train.py": TRAIN})
    assert [d.name for d in space] == ["LR", "WIDTH", "DECAY"]
    lr, width, decay = space
    assert (lr.low, lr.high, lr.log, lr.present, lr.text) == (0.01, 1.0, True, 0.5, "0.5")
    assert (width.choices, width.present) == ((32, 64, 128, 256), 64)
    assert (decay.low, decay.high, decay.log) == (0.0, 0.2, False)


def test_the_order_is_the_space_s_not_the_file_s() -> None:
    assert list(domains(TRAIN, {"DECAY": {"low": 0, "high": 1}, "LR": {"low": 0.1, "high": 1}})) == ["DECAY", "LR"]


def test_a_name_that_the_code_does_not_have_is_passed_over() -> None:
    assert list(domains(TRAIN, {"DEPTH": {"low": 1, "high": 4}, "LR": {"low": 0.1, "high": 1}})) == ["LR"]


@pytest.mark.parametrize(
    ("text", "given", "low", "high"),
    [
        ("X = 0.5\n", {"low": 0.01, "high": 0.1}, 0.01, 0.5),
        ("X = 0.001\n", {"low": 0.01, "high": 0.1}, 0.001, 0.1),
        ("X = 12\n", {"low": 2, "high": 8}, 2, 12),
        ("X = -1.0\n", {"low": 0.0, "high": 1.0}, -1.0, 1.0),
    ],
)
def test_a_range_that_does_not_hold_the_present_value_is_extended_to_it(
    text: str, given: dict[str, float], low: float, high: float
) -> None:
    domain = domains(text, {"X": given})["X"]
    assert (domain.low, domain.high) == (low, high)


def test_choices_that_do_not_hold_the_present_value_get_it() -> None:
    assert set(domains("X = 5\n", {"X": {"choices": [1, 2]}})["X"].choices) == {1, 2, 5}


def test_choices_in_yamls_scientific_notation_are_numbers() -> None:
    """YAML 1.1 reads `1e-3` as a word; written into the code as one, it would crash every run."""
    config = CONFIG.replace("{low: 0.01, high: 1.0, log: true}", "{choices: [1e-3, 1e-2, 5e-1]}")
    lr = Search(parse_task(config, "fast"), 1).space({"train.py": TRAIN})[0]
    assert lr.choices == (0.001, 0.01, 0.5)


def test_a_constant_with_one_choice_its_present_value_is_not_searched() -> None:
    assert domains("X = 5\nY = 1.0\n", {"X": {"choices": [5]}, "Y": {"low": 0, "high": 2}}).keys() == {"Y"}


def test_a_logarithmic_range_is_even_where_the_present_value_has_no_logarithm() -> None:
    assert not domains("X = 0.0\n", {"X": {"low": 0.01, "high": 1.0, "log": True}})["X"].log


def test_words_and_truths_are_searched_where_choices_are_given() -> None:
    found = domains('W = "SL"\nT = True\n', {"W": {"choices": ["L", "SL", "SSL"]}, "T": {"choices": [True, False]}})
    assert found["W"].choices == ("L", "SL", "SSL") and found["T"].choices == (True, False)


def test_without_a_search_space_the_numeric_constants_are_found() -> None:
    text = (
        "import math\nLR = 0.04\nBATCH = 2**14\nDEPTH = 6\nDECAY = 0.0\nONE = 1\n"
        'WORD = "SL"\nTRUTH = True\nNEGATIVE = -1.0\nlower = 3\nTWICE = 1\nTWICE = 2\nCOMPUTED = math.pi\n'
        "SEED = 42\nVOCAB_SIZE = 8192\nTIME_BUDGET = 300\nMAX_SEQ_LEN = 2048\nEVAL_TOKENS = 20971520\n"
    )
    found = domains(text)
    assert list(found) == ["LR", "BATCH", "DEPTH", "DECAY", "ONE"]
    assert (found["LR"].low, found["LR"].high, found["LR"].log) == (0.01, 0.16, True)
    assert found["BATCH"].choices == (2**12, 2**13, 2**14, 2**15, 2**16)
    assert (found["DEPTH"].low, found["DEPTH"].high, found["DEPTH"].whole) == (3, 12, True)
    assert (found["DECAY"].low, found["DECAY"].high) == (0.0, 0.1)
    assert (found["ONE"].low, found["ONE"].high) == (1, 2)


@given(st.integers(-1000, 10**6) | st.floats(-1e3, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-30))
@settings(deadline=None)
def test_a_discovered_range_holds_the_present_value_and_more(value: float) -> None:
    for domain in domains(f"X = {value!r}\n").values():
        assert domain.contains(value)
        assert len(domain.choices) > 1 or domain.low < domain.high


@given(st.integers(-50, 50) | st.floats(-50, 50), st.floats(-40, 0), st.floats(0.01, 40))
@settings(deadline=None)
def test_a_given_range_holds_the_present_value(value: float, low: float, high: float) -> None:
    assert domains(f"X = {value!r}\n", {"X": {"low": low, "high": high}})["X"].contains(value)


def test_params_are_the_searched_constants_as_they_stand() -> None:
    assert Search(FAST, 1).params({"train.py": TRAIN}) == {"LR": 0.5, "WIDTH": 64, "DECAY": 0.1}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_where_nothing_can_be_searched_nothing_is_proposed(sampler: str) -> None:
    assert Search(task(sampler=sampler), 1).propose({"train.py": "print('hello')\n"}, []) is None


# -- what it proposes


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sixty_proposals_change_constants_alone_and_repeat_nothing(sampler: str) -> None:
    tried = campaign(sampler, never_better)
    proposals = tried.run(60)
    assert len(proposals) == 60
    for proposal in proposals:
        after = proposal.files["train.py"]
        assert proposal.files.keys() == {"train.py"} and after != TRAIN
        assert constants.set_values("train.py", after, {"LR": 0.5, "WIDTH": 64, "DECAY": 0.1}) == TRAIN
        assert {name: values(proposal.files)[name] for name in proposal.edits} == proposal.edits
        assert values(proposal.files) == {**values({"train.py": TRAIN}), **proposal.params}
        assert all(value != values({"train.py": TRAIN})[name] for name, value in proposal.edits.items())
    assert len({json.dumps(dict(p.edits), sort_keys=True) for p in proposals}) == 60
    assert len({e.code_state for e in tried.history}) == 61


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_code_that_someone_else_tried_is_not_proposed(sampler: str) -> None:
    search = Search(task({"WIDTH": {"choices": [32, 64]}}, sampler), 1)
    other = Campaign(search, {"train.py": TRAIN}, quadratic)
    there = {"train.py": constants.set_values("train.py", TRAIN, {"WIDTH": 32})}
    other.record(Proposal("by hand", there, "command"), there, 1.1)
    assert search.propose({"train.py": TRAIN}, other.history) is None


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_edits_are_not_repeated_after_a_keep_either(sampler: str) -> None:
    space = {name: {"choices": [1, 2, 3, 4, 5, 6, 7, 8]} for name in "AB"}
    text = "A = 1\nB = 1\n"
    ran = Campaign(Search(task(space, sampler), 1), {"train.py": text}, lambda at: 20.0 - at["A"] - at["B"])
    edits = [json.dumps(dict(p.edits), sort_keys=True) for p in ran.run(20)]
    assert sum(e.status is Status.KEEP for e in ran.history) > 2
    assert len(edits) == len(set(edits)) > 4


@pytest.mark.parametrize("seed", range(8))
def test_the_first_pass_changes_one_constant_at_a_time_in_the_order_of_the_space(seed: int) -> None:
    first = campaign("tpe", never_better, seed).run(3)
    assert [list(p.edits) for p in first] == [["LR"], ["WIDTH"], ["DECAY"]]


@pytest.mark.parametrize("seed", range(4))
def test_a_whole_number_becomes_a_fraction_where_the_range_asks_for_fractions(seed: int) -> None:
    """`WARMUP = 0`, to be searched from 0.0 to 0.2; were it stuck, the first pass would be stuck with it."""
    space = {"WARMUP": {"low": 0.0, "high": 0.2}, **FAST.model_dump()["search_space"]}
    ran = Campaign(Search(task(space), seed), {"train.py": "WARMUP = 0\n" + TRAIN}, never_better)
    first = ran.run(4)
    assert [list(p.edits) for p in first] == [["WARMUP"], ["LR"], ["WIDTH"], ["DECAY"]]
    assert 0.0 < first[0].edits["WARMUP"] <= 0.2


def test_a_narrow_range_is_searched_inside_as_well() -> None:
    files = {"train.py": "BETA2 = 0.99\n"}
    space = {"BETA2": {"low": 0.99, "high": 0.999}}
    drawn = {p.edits["BETA2"] for seed in range(20) if (p := Search(task(space), seed).propose(files, []))}
    assert len(drawn) > 4
    assert all(0.99 < value <= 0.999 for value in drawn)


def test_after_the_first_pass_one_to_three_constants_change() -> None:
    counts = {len(p.edits) for p in campaign("tpe", never_better).run(40)[3:]}
    assert counts == {1, 2, 3}


def test_cmaes_moves_all_numeric_constants_at_once() -> None:
    counts = [len(p.edits) for p in campaign("cmaes", never_better).run(20)]
    assert max(counts) == 3 and sum(counts) > 40


@pytest.mark.parametrize("seed", range(4))
def test_a_number_moves_by_a_tenth_of_its_range_at_least(seed: int) -> None:
    for proposal in campaign("tpe", never_better, seed).run(20):
        if "DECAY" in proposal.edits:
            assert abs(proposal.edits["DECAY"] - 0.1) >= 0.0199
        if "LR" in proposal.edits:
            assert abs(math.log(proposal.edits["LR"] / 0.5)) >= 0.0999 * math.log(100)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("seed", range(4))
def test_values_stay_in_range_and_keep_their_kind(sampler: str, seed: int) -> None:
    text = "DEPTH = 6\nBATCH = 2**14\nLR = 0.04\nSHIFT = -0.5\nSTEPS = 100\n"
    space = {
        "DEPTH": {"low": 2, "high": 8},
        "BATCH": {"choices": [2**12, 2**13, 2**14, 2**15]},
        "LR": {"low": 0.0123, "high": 0.0987, "log": True},
        "SHIFT": {"low": -1.0, "high": 1.0},
        "STEPS": {"low": 10, "high": 1000, "log": True},
    }
    search = Search(task(space, sampler), seed)
    ran = Campaign(search, {"train.py": text}, lambda at: 1.0 + abs(at["DEPTH"] - 5) + abs(at["LR"] - 0.03))
    for proposal in ran.run(25):
        at = values(proposal.files)
        assert type(at["DEPTH"]) is int and 2 <= at["DEPTH"] <= 8
        assert type(at["STEPS"]) is int and 10 <= at["STEPS"] <= 1000
        assert at["BATCH"] in (2**12, 2**13, 2**14, 2**15)
        assert type(at["LR"]) is float and 0.0123 <= at["LR"] <= 0.0987
        assert type(at["SHIFT"]) is float and -1.0 <= at["SHIFT"] <= 1.0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_powers_of_two_stay_powers_of_two_in_the_text(sampler: str) -> None:
    text = "BATCH = 2**14  # tokens\nLR = 0.1\n"
    ran = Campaign(Search(task(sampler=sampler), 3), {"train.py": text}, lambda at: abs(at["BATCH"] - 2**13) + 1.0)
    changed = [p for p in ran.run(12) if "BATCH" in p.edits]
    assert changed
    for proposal in changed:
        power = int(math.log2(proposal.edits["BATCH"]))
        assert proposal.files["train.py"].startswith(f"BATCH = 2**{power}  # tokens\n")
        assert f"-> 2**{power}" in proposal.description


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_words_keep_their_quotes_and_come_from_the_choices(sampler: str) -> None:
    space = {"W": {"choices": ["L", "SL", "SSL"]}}
    ran = Campaign(Search(task(space, sampler), 1), {"train.py": 'W = "SL"\n'}, lambda at: 2.0 - (at["W"] == "SL"))
    assert {p.files["train.py"] for p in ran.run(5)} == {'W = "L"\n', 'W = "SSL"\n'}


def test_the_description_says_what_was_what_becomes() -> None:
    proposal = campaign("tpe").step()
    assert proposal is not None
    assert proposal.description == f"LR 0.5 -> {proposal.edits['LR']}"
    assert proposal.proposer == "search"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_toml_file_is_searched_like_any_other(sampler: str) -> None:
    text = '# kernel\n[kernel]\ntile = 16  # must be even\nscale = 0.5\nname = "fast"\n'
    space = {"kernel.tile": {"choices": [8, 16, 32]}, "kernel.scale": {"low": 0.1, "high": 1.0}}
    search = Search(task(space, sampler, mutable_files=["config.toml"]), 1)
    ran = Campaign(search, {"config.toml": text}, lambda at: 3.0 + abs(at["kernel.scale"] - 0.3))
    proposals = ran.run(10)
    assert len(proposals) == 10
    assert {name for p in proposals for name in p.edits} == {"kernel.tile", "kernel.scale"}
    first = proposals[0].files["config.toml"]
    assert constants.set_values("config.toml", first, {"kernel.tile": 16, "kernel.scale": 0.5}) == text


def test_of_two_files_only_the_one_that_changes_is_handed_over() -> None:
    files = {"train.py": "LR = 0.5\n", "other.toml": "decay = 0.1\n"}
    proposal = Search(task({"decay": {"low": 0.0, "high": 1.0}}), 1).propose(files, [])
    assert proposal is not None and proposal.files.keys() == {"other.toml"}


# -- memory


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("length", [0, 2, 7, 25])
def test_a_restart_forgets_nothing(sampler: str, length: int) -> None:
    going = campaign(sampler)
    going.run(length)
    remembered = [
        Experiment(**{**vars(e), "edits": json.loads(json.dumps(e.edits)), "params": json.loads(json.dumps(e.params))})
        for e in going.history
    ]
    after = Search(fast(sampler), 1).propose(going.files, remembered)
    assert after == going.search.propose(going.files, going.history)
    assert after is not None


def test_the_next_proposal_is_not_the_last_one_again_while_that_one_is_undecided() -> None:
    going = campaign("tpe")
    going.run(5)
    last = going.history[-1]
    last.status, last.runs = None, []
    proposal = going.search.propose(going.files, going.history)
    assert proposal is not None and dict(proposal.edits) != last.edits


def test_another_seed_searches_otherwise() -> None:
    one, other = campaign("tpe", never_better, 1).run(5), campaign("tpe", never_better, 2).run(5)
    assert [p.edits for p in one] != [p.edits for p in other]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_crashes_do_not_break_the_search(sampler: str) -> None:
    crashing = campaign(sampler, lambda at: None if at["LR"] != 0.5 else quadratic(at))
    assert len(crashing.run(30)) == 30
    assert any(e.status is Status.CRASH for e in crashing.history)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_crashes_alone_do_not_break_the_search(sampler: str) -> None:
    crashing = campaign(sampler, lambda at: 1.5 if at == values({"train.py": TRAIN}) else None)
    assert len(crashing.run(30)) == 30


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("seed", range(3))
def test_discards_teach_where_to_look(sampler: str, seed: int) -> None:
    going = campaign(sampler, never_better, seed)
    going.run(60)
    scores = [e.score or 0.0 for e in going.history[1:]]
    assert sum(scores[40:]) < sum(scores[:20])


@pytest.mark.parametrize("seed", range(3))
def test_crashes_count_against_the_values_that_crashed(seed: int) -> None:
    """Below a decay of 0.1 all crashes, nothing else matters; blind to crashes, nine in ten would go there."""
    crashing = campaign("tpe", lambda at: None if at["DECAY"] < 0.1 else 1.0, seed)
    low = [p.edits["DECAY"] < 0.1 for p in crashing.run(60) if "DECAY" in p.edits]
    assert sum(low) < 0.75 * len(low)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "params",
    [
        pytest.param({}, id="of another proposer"),
        pytest.param({"LR": 0.5, "WIDTH": 64, "DECAY": 7.0}, id="out of range"),
        pytest.param({"LR": "fast", "WIDTH": "wide", "DECAY": None}, id="of other kinds"),
        pytest.param({"LR": 0.5, "WIDTH": 64, "DECAY": 0.1, "GONE": 3}, id="of a constant that is gone"),
    ],
)
def test_experiments_that_do_not_fit_todays_space_do_not_break_the_search(sampler: str, params: dict[str, Any]) -> None:
    going = campaign(sampler)
    for number in range(12):
        going.record(Proposal("an idea", {}, "command", {}, params), {"train.py": f"{TRAIN}# {number}\n"}, 1.5)
    assert len(going.run(5)) == 5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_fractions_in_the_history_of_a_whole_number_do_not_break_the_search(sampler: str) -> None:
    text = "DEPTH = 4\nLR = 0.5\n"
    space = {"DEPTH": {"low": 1, "high": 8}, "LR": {"low": 0.1, "high": 1.0}}
    going = Campaign(Search(task(space, sampler), 1), {"train.py": text}, lambda at: 1.0)
    for number in range(12):
        params = {"DEPTH": 2.5, "LR": 0.5}
        going.record(Proposal("an idea", {}, "command", {}, params), {"train.py": f"{text}# {number}\n"}, 1.5)
    assert len(going.run(5)) == 5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_history_longer_than_the_window_still_gives_proposals(sampler: str) -> None:
    going = campaign(sampler)
    going.run(5)
    for number in range(250):
        lr = 0.01 + number / 1000
        params = {"LR": lr, "WIDTH": 64, "DECAY": 0.1}
        score = None if number % 10 == 0 else 1.5 + lr
        going.record(Proposal("an idea", {}, "search", {"LR": lr}, params), {"train.py": f"LR = {lr}\n"}, score)
    assert len(going.run(3)) == 3


# -- that it gets somewhere


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("seed", range(3))
def test_sixty_experiments_end_much_better_than_the_start(sampler: str, seed: int) -> None:
    climbing = campaign(sampler, seed=seed)
    start = climbing.best
    climbing.run(60)
    assert climbing.best - 1.0 < 0.2 * (start - 1.0)
    kept = [e.score or 0.0 for e in climbing.history if e.status is Status.KEEP]
    assert all(later < earlier for earlier, later in pairwise(kept))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("seed", range(2))
def test_a_maximised_metric_goes_up(sampler: str, seed: int) -> None:
    upward = task(FAST.model_dump()["search_space"], sampler, metric_direction="maximize")
    climbing = Campaign(Search(upward, seed), {"train.py": TRAIN}, lambda at: 3.0 - quadratic(at), sign=-1)
    start = climbing.best
    climbing.run(60)
    assert 2.0 - climbing.best < 0.2 * (2.0 - start)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("seed", range(4))
def test_an_exhausted_space_is_exhausted_wholly_and_then_gives_nothing(sampler: str, seed: int) -> None:
    """One constant whose values score far apart: the bad ones are tried as well before the search gives up."""
    search = Search(task({"WIDTH": {"choices": [32, 64, 128, 256, 512, 1024]}}, sampler), seed)
    small = Campaign(search, {"train.py": TRAIN}, lambda at: 1.0 + abs(math.log2(at["WIDTH"] / 64)))
    assert {p.edits["WIDTH"] for p in small.run(5)} == {32, 128, 256, 512, 1024}
    assert small.step() is None


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("seed", range(4))
def test_a_small_space_of_two_constants_is_tried_wholly(sampler: str, seed: int) -> None:
    space = {"WIDTH": {"choices": [32, 64, 128]}, "DEPTH": {"low": 1, "high": 3}}
    small = Campaign(
        Search(task(space, sampler), seed),
        {"train.py": "WIDTH = 64\nDEPTH = 2\n"},
        lambda at: 1.0 + abs(at["WIDTH"] - 64) + abs(at["DEPTH"] - 2),
    )
    assert len(small.run(20)) == 8
    assert small.step() is None


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_continuous_space_never_runs_out(sampler: str) -> None:
    """The best is narrow: the sampler keeps drawing tidy values that have been tried."""
    space = {"LR": {"low": 0.01, "high": 1.0, "log": True}}
    narrow = Campaign(
        Search(task(space, sampler), 1), {"train.py": "LR = 0.5\n"}, lambda at: 1.0 + abs(math.log(at["LR"] / 0.2))
    )
    assert len(narrow.run(120)) == 120
