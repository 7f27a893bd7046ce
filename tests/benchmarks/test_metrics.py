"""Metrics against hand-worked numbers, symmetries and enumeration."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.evaluation.metrics import (
    accuracy_from_gold,
    bayes_accuracy,
    best_of_n_kl,
    calibration,
    hacking_gap,
    matched_kl,
    pearson,
    win_rate,
    within_prompt_sd,
)

RNG = np.random.default_rng(0)


def test_win_rate_by_hand():
    # prompt 0: 1 beats 0 and ties 1; 2 beats both: (1 + 1/2 + 1 + 1) / 4. prompt 1: loses all
    gold, sft = [[[1.0, 2.0], [0.0, 0.0]]], [[[0.0, 1.0], [5.0, 6.0]]]
    np.testing.assert_allclose(win_rate(gold, sft), [[0.875, 0.0]])


def test_two_win_rates_against_each_other_add_to_one():
    a, b = RNG.integers(0, 3, (2, 3, 5, 4)).astype(float)  # few values: many ties
    np.testing.assert_allclose(win_rate(a, b) + win_rate(b, a), 1)


def test_sft_wins_half_against_itself():
    sft = RNG.normal(size=(2, 5, 8))
    np.testing.assert_allclose(win_rate(sft, sft), 0.5)


def test_win_rate_is_mann_whitney_u():
    a, b = RNG.integers(0, 9, (2, 30)).astype(float)
    u = stats.mannwhitneyu(a, b).statistic
    assert win_rate(a[None, None], b[None, None])[0, 0] == pytest.approx(u / 900)


def test_one_sft_seed_serves_all_seeds():
    gold, sft = RNG.normal(size=(3, 4, 5)), RNG.normal(size=(1, 4, 6))
    np.testing.assert_allclose(win_rate(gold, sft), win_rate(gold, np.repeat(sft, 3, axis=0)))


@pytest.mark.parametrize("sft_shape", [(2, 5, 6), (3, 4, 6)])
def test_win_rate_refuses_other_prompts_or_seeds(sft_shape):
    with pytest.raises(ValueError, match="match"):
        win_rate(np.zeros((3, 5, 2)), np.zeros(sft_shape))


def test_within_prompt_sd_ignores_the_prompts_level():
    noise = RNG.normal(0, 0.3, (4000, 5))
    assert within_prompt_sd(noise + RNG.normal(0, 10, (4000, 1))) == pytest.approx(0.3, rel=0.02)


def test_no_hacking_gap_when_the_score_is_gold_in_other_units():
    """Bradley-Terry fixes a score up to scale and an offset per prompt: both must drop out."""
    gold, sft_gold = RNG.normal(1, 1, (3, 6, 4)), RNG.normal(0, 1, (1, 6, 8))
    scale, offset = np.array([2.0, 0.1, 7.0])[:, None, None], RNG.normal(0, 9, (3, 6, 1))
    gap = hacking_gap(gold * scale + offset, sft_gold * scale + offset, gold, sft_gold)
    np.testing.assert_allclose(gap, 0, atol=1e-9)


def test_hacking_gap_is_the_proxy_gain_in_standard_deviations_when_gold_stalls():
    sft = RNG.normal(0, 1, (1, 2, 50_000))
    gold, score = sft, 3 * sft
    gap = hacking_gap(score + 6.0, score, gold, gold)  # 6 is two standard deviations of the score
    np.testing.assert_allclose(gap, 2, rtol=0.02)


@pytest.mark.parametrize("sft", [np.zeros((1, 2, 4)), np.ones((1, 2, 1))])
def test_hacking_gap_has_no_unit_without_variation(sft):
    with pytest.raises(ValueError):
        hacking_gap(np.ones((1, 2, 4)), sft, np.ones((1, 2, 4)), sft)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 9), st.permutations([0.5, 1.0, 4.0, 9.0]))
def test_matched_kl_is_exact_on_a_square_root_curve_in_any_order(level, kls):
    kls = [0.0, *kls]
    golds = [0.1 + 0.25 * np.sqrt(k) for k in kls]
    assert matched_kl(kls, golds, level) == pytest.approx(0.1 + 0.25 * np.sqrt(level))


def test_matched_kl_is_not_reached_beyond_the_largest_kl():
    assert matched_kl([0, 2.0], [0.0, 0.8], 2.0) == pytest.approx(0.8)
    assert matched_kl([0, 2.0], [0.0, 0.8], 2.01) is None
    assert matched_kl([0], [0.3], 0.5) is None


def test_points_of_equal_kl_count_once_with_their_mean():
    for order in itertools.permutations([(1.0, 0.2), (1.0, 0.6), (4.0, 1.0)]):
        kl, gold = zip((0.0, 0.0), *order, strict=True)
        assert matched_kl(kl, gold, 1.0) == pytest.approx(0.4)
        assert matched_kl(kl, gold, 2.25) == pytest.approx(0.7)  # halfway from 1 to 4 in sqrt


@pytest.mark.parametrize(
    ("kl", "gold"),
    [
        ([1.0, 2.0], [0, 1]),
        ([], []),
        ([0, 1.0], [0]),
        ([0, float("nan")], [0, 1]),
        ([0, -1], [0, 1]),
    ],
)
def test_matched_kl_refuses_what_is_not_a_curve_from_sft(kl, gold):
    with pytest.raises(ValueError):
        matched_kl(kl, gold, 1.0)


def test_accuracy_integrates_the_labels_noise():
    """The mean over many drawn labels approaches it."""
    a, b = RNG.integers(0, 4, (2, 200)).astype(float)
    p = RNG.uniform(size=200)
    a_won = RNG.uniform(size=(4000, 200)) < p
    right = np.where(a == b, 0.5, np.where(a > b, a_won, ~a_won))
    assert accuracy_from_gold(a, b, p) == pytest.approx(right.mean(), abs=0.002)


def test_no_scorer_beats_the_one_that_knows_the_probabilities():
    p = RNG.uniform(size=8)
    reached = [accuracy_from_gold(s, np.zeros(8), p) for s in itertools.product([-1, 1], repeat=8)]
    assert max(reached) == pytest.approx(bayes_accuracy(p))
    assert accuracy_from_gold(np.ones(8), np.ones(8), p) == 0.5


def test_accuracy_compares_numbers_and_not_their_bytes():
    """1 is less than 2 where numbers have no sign, too."""
    ones, twos = np.array([1, 2], dtype=np.uint8), np.array([2, 1], dtype=np.uint8)
    assert accuracy_from_gold(ones, twos, [0.1, 0.7]) == pytest.approx((0.9 + 0.7) / 2)


def test_accuracy_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        accuracy_from_gold([float("nan")], [0.0], [0.5])


def test_a_calibrated_model_has_no_calibration_error_and_an_overconfident_one_has():
    p = RNG.uniform(size=5000)
    assert calibration(p, p)[0] == pytest.approx(0, abs=1e-12)
    error, table = calibration(np.where(p > 0.5, 1.0, 0.0), p)
    assert error == pytest.approx(0.25, abs=0.01)
    assert [n for *_, n in table] == [int((p <= 0.5).sum()), int((p > 0.5).sum())]


def test_calibration_by_hand():
    error, table = calibration([0.1, 0.3, 0.8, 1.0], [0.3, 0.3, 0.8, 0.8], bins=2)
    assert table == [(pytest.approx(0.2), pytest.approx(0.3), 2), (pytest.approx(0.9), 0.8, 2)]
    assert error == pytest.approx(0.1)


def test_a_single_precision_prediction_falls_into_the_bin_it_lies_in():
    """The float32 next to 0.7 is below 0.7, though ten times it is 7 to seven digits."""
    assert float(np.float32(0.7)) < 0.7
    _, table = calibration(np.array([0.7, 0.65], dtype=np.float32), [0.5, 0.5])
    assert [n for *_, n in table] == [2]


@pytest.mark.parametrize("pred", [[1.2], [float("nan")], [0.5, 0.5]])
def test_calibration_refuses_what_is_no_probability(pred):
    with pytest.raises(ValueError):
        calibration(pred, [0.5])


def test_correlation_agrees_with_scipy_and_is_zero_for_a_constant():
    x, y = RNG.normal(size=(2, 50))
    assert pearson(x, x + y) == pytest.approx(stats.pearsonr(x, x + y)[0])
    assert pearson(np.full(50, 0.1), y) == pearson(y, np.full(50, 0.1)) == 0.0


@pytest.mark.parametrize("n", [1, 2, 4])
def test_best_of_n_kl_is_the_limit_of_many_equally_likely_completions(n):
    """Enumerated: P(best = i-th of m) = (i^n - (i-1)^n) / m^n."""
    m = 20_000
    i = np.arange(1, m + 1) / m
    best = np.diff(np.concatenate([[0.0], i**n]))
    exact = float((best * np.log(best * m)).sum())
    assert best_of_n_kl(n) == pytest.approx(exact, abs=2e-3)
    assert best_of_n_kl(n) >= exact - 1e-9
    with pytest.raises(ValueError):
        best_of_n_kl(0)


def test_the_best_of_nothing_is_refused_in_words():
    with pytest.raises(ValueError, match="best of 0"):
        best_of_n_kl(0)
