"""Intervals hold what they promise in simulations whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.evaluation.statistics import (
    Estimate,
    crossed_interval,
    describe_difference,
    interquartile_range,
    paired_difference,
    seed_interval,
)


def simulate(rng, mean, seeds, prompts, seed_sd, prompt_sd, noise_sd):
    """One (seeds, prompts) table of the crossed model whose mean is known."""
    return (
        mean
        + rng.normal(0, seed_sd, (seeds, 1))
        + rng.normal(0, prompt_sd, (1, prompts))
        + rng.normal(0, noise_sd, (seeds, prompts))
    )


def ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None and estimate.high is not None
    return estimate.low, estimate.high


def holds(estimate: Estimate, truth: float) -> bool:
    low, high = ends(estimate)
    return low <= truth <= high


@pytest.mark.parametrize(
    ("seeds", "seed_sd", "prompt_sd"),
    [(3, 0.1, 0.1), (3, 0.02, 0.5), (5, 0.1, 0.5), (10, 0.1, 0.0)],
)
def test_the_95_percent_interval_holds_the_true_mean_95_times_in_100(seeds, seed_sd, prompt_sd):
    rng = np.random.default_rng(seeds)
    runs = [
        crossed_interval(simulate(rng, 0.3, seeds, 40, seed_sd, prompt_sd, 0.3)) for _ in range(600)
    ]
    coverage = np.mean([holds(e, 0.3) for e in runs])
    assert coverage >= 0.93  # 0.95 less two standard errors of 600 runs


def test_an_interval_over_seeds_alone_would_miss_new_prompts():
    """Why both variances are added: under strong prompt effects all seeds err alike."""
    rng = np.random.default_rng(0)
    tables = [simulate(rng, 0.0, 5, 20, 0.01, 1.0, 0.1) for _ in range(300)]
    seeds_only = [seed_interval(t.mean(axis=1).tolist()) for t in tables]
    both = [crossed_interval(t) for t in tables]
    assert np.mean([holds(e, 0) for e in seeds_only]) < 0.5
    assert np.mean([holds(e, 0) for e in both]) >= 0.93


def test_with_one_prompt_it_is_the_ordinary_t_interval_over_seeds():
    values = np.array([0.2, 0.5, 0.9, 0.4])
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    for estimate in (crossed_interval(values[:, None]), seed_interval(values.tolist())):
        assert (estimate.low, estimate.high) == pytest.approx((low, high))
        assert estimate.mean == pytest.approx(0.5)
        assert estimate.per_seed == pytest.approx(values.tolist())


def test_standard_error_worked_by_hand():
    # seed means 1, 3: variance 2, over 2 seeds = 1; prompt means 1, 3: likewise 1; t(1 df) = 12.706
    estimate = crossed_interval([[0.0, 2.0], [2.0, 4.0]])
    assert estimate.mean == 2
    assert estimate.high == pytest.approx(2 + 12.7062 * np.sqrt(2), abs=1e-3)


def test_one_seed_has_a_mean_and_no_limits():
    assert crossed_interval([[1.0, 3.0]]) == Estimate(mean=2.0, per_seed=[2.0])
    assert seed_interval([0.5]) == Estimate(mean=0.5, per_seed=[0.5])


@pytest.mark.parametrize("bad", [[[0.0, float("nan")]], [[float("inf")]], [], [[]], [1.0, 2.0]])
def test_a_table_with_holes_is_refused(bad):
    with pytest.raises(ValueError):
        crossed_interval(bad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_refusal_says_that_a_number_is_missing(bad):
    for refused in ([[0.0, bad]], [[bad, bad], [0.0, 1.0]]):
        with pytest.raises(ValueError, match="found NaN or infinity"):
            crossed_interval(refused)
        with pytest.raises(ValueError, match="found NaN or infinity"):
            paired_difference(np.zeros_like(refused), refused)


def test_a_seed_that_did_not_get_there_leaves_the_mean_null():
    assert seed_interval([0.5, None, 0.7]) == Estimate(mean=None, per_seed=[0.5, None, 0.7])
    assert seed_interval([]) == Estimate(mean=None)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6), st.floats(-50, 50))
def test_limits_move_with_the_values(values, shift):
    here, there = seed_interval(values), seed_interval([v + shift for v in values])
    low, high = ends(here)
    assert ends(there) == pytest.approx((low + shift, high + shift), abs=1e-6)
    assert low - 1e-9 <= sum(values) / len(values) <= high + 1e-9


def test_pairing_removes_what_two_methods_share():
    rng = np.random.default_rng(1)
    prompts, seeds = rng.normal(0, 5, (1, 30)), rng.normal(0, 5, (4, 1))
    a = prompts + seeds + rng.normal(0.5, 0.1, (4, 30))
    b = prompts + seeds + rng.normal(0, 0.1, (4, 30))
    low, high = ends(paired_difference(a, b))
    assert 0.4 < low < high < 0.6
    with pytest.raises(ValueError, match="shapes"):
        paired_difference(a, b[:1])


def test_a_method_against_itself_shows_no_difference():
    rng = np.random.default_rng(2)
    said = []
    for _ in range(600):
        prompts = rng.normal(0, 0.4, (1, 40))
        a, b = (prompts + simulate(rng, 0, 3, 40, 0.05, 0, 0.3) for _ in range(2))
        said.append(describe_difference("a", "b", paired_difference(a, b), "gold"))
    assert np.mean([s == "no difference shown in gold" for s in said]) >= 0.94


def test_a_winner_needs_three_seeds_and_an_interval_without_zero():
    def difference(*seeds):
        return seed_interval(seeds)

    assert (
        describe_difference("ppo", "dpo", difference(0.3, 0.31, 0.32), "gold")
        == "ppo is ahead of dpo in gold"
    )
    assert describe_difference("ppo", "dpo", difference(-0.3, -0.31, -0.32), "gold").startswith(
        "dpo is ahead"
    )
    assert (
        describe_difference("ppo", "dpo", difference(0.3, 0.3), "gold")
        == "undecided: fewer than three seeds"
    )
    assert (
        describe_difference("ppo", "dpo", difference(0.3), "gold")
        == "undecided: fewer than three seeds"
    )
    assert describe_difference("ppo", "dpo", difference(0.3, -0.2, 0.1), "gold").startswith(
        "no difference shown"
    )
    assert describe_difference("ppo", "dpo", difference(0.3, None, 0.3), "gold").startswith(
        "not reached"
    )
    identical = describe_difference("ppo", "ppo", difference(0.0, 0.0, 0.0), "gold")
    assert identical.startswith("no difference shown")


def test_interquartile_range_agrees_with_scipy():
    values = [3.0, 1.0, 7.0, 2.0, 9.0]
    assert interquartile_range(values) == pytest.approx(stats.iqr(values))
    assert interquartile_range([1.0]) is None


def test_two_values_have_an_interquartile_range():
    assert interquartile_range([1.0, 4.0]) == pytest.approx(stats.iqr([1.0, 4.0]))
