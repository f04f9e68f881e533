"""The ratchet's decisions: the reference's tables, both policies, and what must hold for every score."""

import math
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.wire import Status
from worker.ratchet import Best, Policy, Trial, decide, pooled_sigma, prior_sigma, required_gain, rerun_due

SIGMA = 0.002  #: CUDA's prior
LINE = 8  #: ast nodes of a line of code
SUBSYSTEM = 600  #: ast nodes of one
HEAD = Best((0.997,), 44.0)
POLICIES = [
    Policy(),
    Policy("strict"),
    Policy(sign=-1),
    Policy(sigma_per_gb=2.0),
    Policy(sigma_per_node=0.0, equal_within=0.0),
    Policy(equal_within=2.0),
]


def verdict(
    score: float,
    nodes: int = 0,
    memory: float = 44.0,
    best: Best = HEAD,
    policy: Policy | None = None,
    trained: float | None = None,
) -> Status:
    return decide(best, Trial(score, memory, nodes, trained), SIGMA, policy or Policy()).status


# -- the reference, "Decision Framework"


@pytest.mark.parametrize(
    ("score", "nodes", "memory", "expected"),
    [
        # "Concrete Decision Examples", baseline 0.997
        pytest.param(0.993, 5 * LINE, 44.0, Status.KEEP, id="0.993 with 5 clean lines more"),
        pytest.param(0.996, 20 * LINE, 44.0, Status.DISCARD, id="0.996 with 20 hacky lines more"),
        pytest.param(0.997, -15 * LINE, 44.0, Status.KEEP, id="0.997 with 15 lines deleted"),
        pytest.param(0.992, 10 * LINE, 44.0, Status.KEEP, id="0.992 with 10 clean lines more"),
        pytest.param(0.000, 0, 44.0, Status.CRASH, id="0.000 with no change"),
        pytest.param(0.000, -SUBSYSTEM, 44.0, Status.CRASH, id="0.000 with less code"),
        pytest.param(0.000, SUBSYSTEM, 44.0, Status.CRASH, id="0.000 with more code"),
        pytest.param(1.005, 0, 44.0, Status.DISCARD, id="1.005 with no change"),
        pytest.param(1.005, -SUBSYSTEM, 44.0, Status.DISCARD, id="1.005 with less code"),
        pytest.param(1.005, SUBSYSTEM, 44.0, Status.DISCARD, id="1.005 with more code"),
        pytest.param(0.996, -SUBSYSTEM, 44.0, Status.KEEP, id="0.996 with a subsystem removed"),
        # "VRAM / Memory Management", baseline 44 GiB
        pytest.param(0.997 - 0.050, 0, 46.0, Status.KEEP, id="+2 GB for -0.050"),
        pytest.param(0.997 - 0.002, 0, 54.0, Status.DISCARD, id="+10 GB for -0.002"),
        pytest.param(0.997, 0, 39.0, Status.KEEP, id="-5 GB for +0.000"),
        pytest.param(0.997 - 0.010, 0, 45.0, Status.KEEP, id="+1 GB for -0.010"),
    ],
)
@pytest.mark.parametrize("name", ["rerun-best", "strict"])
def test_every_row_of_the_references_decision_tables_holds(
    score: float, nodes: int, memory: float, expected: Status, name: str
) -> None:
    policy = Policy("strict" if name == "strict" else "rerun-best")
    assert verdict(score, nodes, memory, policy=policy) is expected


def test_if_a_lower_score_at_no_added_cost_is_kept_however_small_the_gain() -> None:
    assert verdict(0.997 - 1e-6) is Status.KEEP


@pytest.mark.parametrize(
    ("nodes", "memory", "expected"),
    [
        pytest.param(-1, 44.0, Status.KEEP, id="simpler"),
        pytest.param(0, 43.0, Status.KEEP, id="leaner"),
        pytest.param(0, 44.0, Status.DISCARD, id="the same"),
        pytest.param(1, 43.0, Status.DISCARD, id="leaner but more code"),
        pytest.param(-1, 45.0, Status.DISCARD, id="simpler but more memory"),
        pytest.param(0, 43.9, Status.DISCARD, id="leaner by less than reruns differ"),
    ],
)
def test_elif_an_equal_score_is_kept_only_for_less_code_or_memory(nodes: int, memory: float, expected: Status) -> None:
    assert verdict(0.997, nodes, memory) is expected


@pytest.mark.parametrize(
    ("sigmas_worse", "expected"), [(0.0, Status.KEEP), (0.24, Status.KEEP), (0.26, Status.DISCARD)]
)
def test_equal_means_within_a_quarter_of_a_sigma(sigmas_worse: float, expected: Status) -> None:
    assert verdict(0.997 + sigmas_worse * SIGMA, nodes=-LINE) is expected


def test_else_a_worse_score_is_discarded_whatever_it_saves() -> None:
    assert verdict(0.999, nodes=-SUBSYSTEM, memory=10.0) is Status.DISCARD


# -- policies and directions


def test_rerun_best_holds_a_score_against_the_mean_of_heads_runs() -> None:
    unlucky_again = Best((0.990, 0.998, 0.997), 44.0)  # mean 0.995
    assert verdict(0.994, best=unlucky_again) is Status.KEEP
    assert verdict(0.996, best=unlucky_again) is Status.DISCARD


def test_strict_holds_a_score_against_the_one_that_head_was_kept_with() -> None:
    unlucky_again = Best((0.990, 0.998, 0.997), 44.0)
    assert verdict(0.994, best=unlucky_again, policy=Policy("strict")) is Status.DISCARD
    assert verdict(0.989, best=unlucky_again, policy=Policy("strict")) is Status.KEEP


@pytest.mark.parametrize(
    ("score", "nodes", "expected"),
    [
        (101.0, 0, Status.KEEP),
        (99.0, 0, Status.DISCARD),
        (99.0, -SUBSYSTEM, Status.DISCARD),
        (100.0, -LINE, Status.KEEP),
        (100.0, 0, Status.DISCARD),
        (100.5, 100, Status.DISCARD),
        (102.0, 100, Status.KEEP),
    ],
)
def test_maximise_mirrors_minimise(score: float, nodes: int, expected: Status) -> None:
    trial = Trial(score, 1.0, nodes)
    assert decide(Best((100.0,), 1.0), trial, 1.0, Policy(sign=-1)).status is expected
    mirrored = replace(trial, score=200.0 - score)
    assert decide(Best((100.0,), 1.0), mirrored, 1.0, Policy(sign=1)).status is expected


def test_required_gain_is_nothing_when_neither_code_nor_memory_grew() -> None:
    assert required_gain(Trial(1.0, 40.0, -50), HEAD, Policy()) == 0.0
    assert required_gain(Trial(1.0, 44.0, 0), HEAD, Policy()) == 0.0


def test_required_gain_adds_what_code_and_memory_ask_for() -> None:
    assert required_gain(Trial(1.0, 49.0, 30), HEAD, Policy()) == pytest.approx(0.01 * 30 + 0.2 * 5)


def test_less_code_does_not_pay_for_more_memory() -> None:
    assert required_gain(Trial(1.0, 49.0, -SUBSYSTEM), HEAD, Policy()) == required_gain(
        Trial(1.0, 49.0, 0), HEAD, Policy()
    )


def test_memory_that_reruns_differ_by_asks_for_no_gain() -> None:
    assert verdict(0.997 - 0.05 * SIGMA, memory=44.4) is Status.KEEP


# -- impossible and overlong runs


@pytest.mark.parametrize("score", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_impossible_score_of_a_positive_metric_is_a_crash(score: float, sign: int) -> None:
    assert verdict(score, nodes=-SUBSYSTEM, policy=Policy(sign=sign)) is Status.CRASH


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_a_crash_for_any_metric(score: float) -> None:
    assert verdict(score, policy=Policy(positive=False)) is Status.CRASH


@pytest.mark.parametrize("score", [0.0, -3.0])
def test_zero_and_below_are_scores_where_the_metric_may_be(score: float) -> None:
    assert verdict(score, policy=Policy(positive=False)) is Status.KEEP
    assert verdict(score, policy=Policy(positive=False, sign=-1)) is Status.DISCARD


@pytest.mark.parametrize("score", [1e-6, 0.5, 0.997, 1.2, math.nan])
@pytest.mark.parametrize("trained", [1.0501, 1.2, 40.0])
def test_a_run_that_trained_over_its_budget_is_never_a_keep(score: float, trained: float) -> None:
    assert verdict(score, nodes=-SUBSYSTEM, memory=1.0, trained=trained) is not Status.KEEP


@pytest.mark.parametrize("trained", [None, 0.0, 0.98, 1.0, 1.05])
def test_a_run_within_its_budget_is_judged_by_its_score(trained: float | None) -> None:
    assert verdict(0.990, trained=trained) is Status.KEEP


@pytest.mark.parametrize("sigma", [0.0, -0.001, math.nan])
def test_a_sigma_that_is_not_positive_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma"):
        decide(HEAD, Trial(0.990, 44.0, 0), sigma, Policy())


# -- monotone

trials = st.builds(
    Trial,
    score=st.floats(-3.0, 3.0).map(lambda sigmas: 0.997 + sigmas * SIGMA),
    memory_gb=st.floats(0.9, 1.1).map(lambda share: 140.0 * share) | st.floats(0.0, 300.0),
    nodes_added=st.integers(-40, 40) | st.integers(-1000, 1000),
)
bests = st.builds(
    Best, st.lists(st.floats(0.996, 0.998), min_size=1, max_size=4).map(tuple), st.sampled_from([0.0, 44.0, 140.0])
)


def keeps(best: Best, trial: Trial, policy: Policy) -> bool:
    return decide(best, trial, SIGMA, policy).status is Status.KEEP


@given(bests, trials, st.floats(0.0, 6.0), st.sampled_from(POLICIES))
@example(Best((0.997,), 140.0), Trial(0.997 - 0.2 * SIGMA, 141.35, -LINE), 0.06, Policy())
@settings(deadline=None, max_examples=400)
def test_a_better_score_never_turns_a_keep_into_a_discard(
    best: Best, trial: Trial, sigmas: float, policy: Policy
) -> None:
    better = replace(trial, score=trial.score - policy.sign * sigmas * SIGMA)
    assert keeps(best, better, policy) >= keeps(best, trial, policy)


@given(bests, trials, st.integers(0, 500), st.sampled_from(POLICIES))
@settings(deadline=None, max_examples=400)
def test_less_code_never_turns_a_keep_into_a_discard(best: Best, trial: Trial, nodes: int, policy: Policy) -> None:
    simpler = replace(trial, nodes_added=trial.nodes_added - nodes)
    assert keeps(best, simpler, policy) >= keeps(best, trial, policy)


@given(bests, trials, st.floats(0.0, 1.0), st.sampled_from(POLICIES))
@settings(deadline=None, max_examples=400)
def test_less_memory_never_turns_a_keep_into_a_discard(best: Best, trial: Trial, share: float, policy: Policy) -> None:
    leaner = replace(trial, memory_gb=trial.memory_gb * share)
    assert keeps(best, leaner, policy) >= keeps(best, trial, policy)


@given(bests, trials, st.integers(0, 500), st.floats(0.0, 50.0), st.sampled_from(POLICIES))
@settings(deadline=None, max_examples=400)
def test_more_code_or_memory_never_turns_a_discard_into_a_keep(
    best: Best, trial: Trial, nodes: int, gigabytes: float, policy: Policy
) -> None:
    heavier = replace(trial, nodes_added=trial.nodes_added + nodes, memory_gb=trial.memory_gb + gigabytes)
    assert keeps(best, heavier, policy) <= keeps(best, trial, policy)


@given(bests, trials, st.sampled_from(POLICIES), st.none() | st.floats(0.5, 2.0))
@settings(deadline=None)
def test_every_decision_has_a_reason_in_words(best: Best, trial: Trial, policy: Policy, trained: float | None) -> None:
    reason = decide(best, replace(trial, trained_share=trained), SIGMA, policy).reason
    assert len(reason.split()) >= 3
    assert any(word.isalpha() for word in reason.split())


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        (Trial(0.996, 44.0, 160), "160 nodes more code"),
        (Trial(0.995, 54.0, 0), "10.0 GiB more memory"),
        (Trial(0.997, 44.0, -120), "120 nodes less code"),
        (Trial(0.997, 39.0, 0), "5.0 GiB less memory"),
        (Trial(1.005, 44.0, 0), "worse"),
        (Trial(0.990, 44.0, 0), "better"),
        (Trial(0.997, 44.0, 0), "no change"),
        (Trial(0.000, 44.0, 0), "impossible"),
        (Trial(0.990, 44.0, 0, 1.3), "budget"),
    ],
)
def test_the_reason_says_what_decided_it(trial: Trial, words: str) -> None:
    assert words in decide(HEAD, trial, SIGMA, Policy()).reason


@pytest.mark.parametrize(
    "trial",
    [
        pytest.param(Trial(0.997 - 0.6 * SIGMA, 49.0, -SUBSYSTEM), id="more memory, less code"),
        pytest.param(Trial(0.997 - 0.6 * SIGMA, 30.0, 100), id="more code, less memory"),
    ],
)
def test_a_gain_is_not_asked_for_what_was_saved(trial: Trial) -> None:
    decision = decide(HEAD, trial, SIGMA, Policy())
    assert decision.status is Status.DISCARD
    assert "less" not in decision.reason


# -- the noise floor


def test_sigma_without_reruns_is_the_prior() -> None:
    assert pooled_sigma([], 0.03) == pytest.approx(0.03)


def test_single_runs_say_nothing_about_sigma() -> None:
    assert pooled_sigma([(0.9,), (5.0,), ()], 0.03) == pytest.approx(0.03)


def test_many_reruns_outweigh_the_prior() -> None:
    reruns = [(1.0 - 0.01, 1.0 + 0.01)] * 2000  # standard deviation 0.01 * sqrt 2
    assert pooled_sigma(reruns, 0.1) == pytest.approx(0.01 * math.sqrt(2), rel=0.06)


def test_sigma_is_measured_around_each_codes_own_mean() -> None:
    assert pooled_sigma([(1.0, 1.002), (3.0, 3.002)], 0.002) < 0.01


def test_reruns_pull_sigma_from_the_prior_toward_themselves() -> None:
    noisier, calmer = pooled_sigma([(1.0, 1.1)], 0.002), pooled_sigma([(1.0, 1.0)], 0.002)
    assert calmer < 0.002 < noisier < 0.1


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6), max_size=6), max_size=20), st.floats(1e-6, 100.0), st.integers(1, 10_000)
)
@settings(deadline=None)
def test_sigma_is_never_zero(reruns: list[list[float]], prior: float, identical: int) -> None:
    assert pooled_sigma([*reruns, [1.0] * identical], prior) > 0


@pytest.mark.parametrize(
    ("machine_class", "expected"),
    [
        ("cuda-h100", 0.002),
        ("cuda-rtx4090", 0.002),
        ("mps-m4max", 0.03),
        ("mlx-m1", 0.03),
        ("cpu", 0.01),
    ],
)
def test_val_bpbs_prior_is_its_machine_classs(machine_class: str, expected: float) -> None:
    assert prior_sigma("val_bpb", machine_class, 1.8) == expected


@pytest.mark.parametrize("machine_class", ["cuda-h100", "mps-m4max", "cpu"])
@pytest.mark.parametrize(("baseline", "expected"), [(200.0, 2.0), (-50.0, 0.5)])
def test_any_other_metrics_prior_is_one_percent_of_the_baseline(
    machine_class: str, baseline: float, expected: float
) -> None:
    assert prior_sigma("tokens_per_second", machine_class, baseline) == pytest.approx(expected)


def test_a_baseline_of_zero_still_gives_a_prior_above_zero() -> None:
    assert prior_sigma("accuracy", "cpu", 0.0) > 0


@pytest.mark.parametrize(
    ("since", "policy", "due"),
    [
        (0, Policy(), False),
        (7, Policy(), False),
        (8, Policy(), True),
        (9, Policy(), True),
        (3, Policy(rerun_after=3), True),
        (2, Policy(rerun_after=3), False),
        (800, Policy("strict"), False),
    ],
)
def test_head_is_rerun_after_so_many_experiments_without_a_keep(since: int, policy: Policy, due: bool) -> None:
    assert rerun_due(since, policy) is due
