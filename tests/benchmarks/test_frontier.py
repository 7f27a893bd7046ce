"""The frontier against toys whose optimum an independent solver finds, or a formula gives."""

import time

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize

from benchmarks.evaluation.frontier import (
    TiltTable,
    default_temperatures,
    efficiency,
    frontier,
    margin_interval,
    tilt_table,
)
from benchmarks.evaluation.statistics import Estimate

REF = np.array(
    [[0.4, 0.3, 0.15, 0.1, 0.05], [0.05, 0.2, 0.5, 0.2, 0.05], [0.7, 0.1, 0.1, 0.05, 0.05]]
)
GOLD = np.array(
    [[-0.5, 0.0, 0.2, 0.6, 0.9], [-1.0, -0.4, 0.0, 0.3, 0.8], [0.1, -0.2, 0.4, 0.5, 1.0]]
)
ENUMERATED = tilt_table(GOLD, default_temperatures(), log_ref=np.log(REF))


def mean_kl(policy: np.ndarray) -> float:
    return float((policy * np.log(policy / REF)).sum(axis=1).mean())


def best_gold(kl: float) -> float:
    """Most mean gold of any policy over 3 prompts x 5 completions with mean KL <= kl (SLSQP)."""
    found = minimize(
        lambda q: -(q.reshape(3, 5) * GOLD).sum(axis=1).mean(),
        REF.ravel(),
        jac=lambda _: -GOLD.ravel() / 3,
        bounds=[(1e-9, 1)] * 15,
        constraints=[
            {"type": "eq", "fun": lambda q: q.reshape(3, 5).sum(axis=1) - 1},
            {"type": "ineq", "fun": lambda q: kl - mean_kl(q.reshape(3, 5))},
        ],
        options={"maxiter": 500, "ftol": 1e-10},
    )
    assert found.success
    return -float(found.fun)


def sampled_gold(samples: int, seed: int) -> np.ndarray:
    """(3, samples) gold of completions drawn from the reference."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(g, samples, p=r) for g, r in zip(GOLD, REF, strict=True)])


@pytest.mark.parametrize("kl", [0.05, 0.3, 0.8, 1.2])
def test_frontier_is_the_most_gold_any_policy_can_have(kl):
    exact = best_gold(kl)
    gold, is_bound = frontier(ENUMERATED, min_ess=0).at(kl)
    assert (gold, is_bound) == (pytest.approx(exact, abs=1e-3), False)
    sampled = tilt_table(sampled_gold(20_000, 0), default_temperatures())
    gold, is_bound = frontier(sampled).at(kl)
    assert (gold, is_bound) == (pytest.approx(exact, abs=0.02), False)


def test_frontier_of_normal_gold_is_the_square_root_of_twice_the_kl():
    """Tilting N(0, 1) by exp(x / b) gives N(1 / b, 1): gold 1 / b at KL 1 / (2 b^2)."""
    gold = np.random.default_rng(1).normal(size=(64, 2000))
    curve = frontier(tilt_table(gold, default_temperatures()), max_gold=9)
    for kl in (0.02, 0.1, 0.5, 1.0, 1.5):
        assert curve.at(kl) == (pytest.approx(np.sqrt(2 * kl), abs=0.02), False)


def test_between_temperatures_the_frontier_of_normal_gold_is_exact():
    x = np.linspace(-9, 9, 2001)[None]
    log_normal = -(x**2) / 2 - np.log(np.exp(-(x**2) / 2).sum())
    curve = frontier(tilt_table(x, [1.0, 0.5], log_ref=log_normal), min_ess=0)
    for kl in (0.01, 0.125, 0.4, 1.0, 1.9):
        assert curve.at(kl) == (pytest.approx(np.sqrt(2 * kl), abs=1e-6), False)


def test_a_list_that_misses_completions_is_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        tilt_table(GOLD[:, :4], [1.0], log_ref=np.log(REF[:, :4]))


def cut(hottest: int) -> TiltTable:
    """The exact table with only its `hottest` temperatures: its curve ends early."""
    return tilt_table(GOLD, default_temperatures()[:hottest], log_ref=np.log(REF))


@pytest.mark.parametrize("hottest", [25, 35, 45])
def test_the_bound_past_the_curves_end_bounds_every_policy(hottest):
    curve = frontier(cut(hottest), min_ess=0)
    past = [k for k in (0.1, 0.3, 0.6, 0.9, 1.2, 1.5) if k > curve.kl[-1]]
    assert past
    for kl in past:
        gold, is_bound = curve.at(kl)
        assert is_bound and best_gold(kl) - 1e-6 <= gold <= 1.0


def test_only_temperatures_with_enough_effective_samples_count():
    table = tilt_table(sampled_gold(300, 0), default_temperatures())
    reliable = np.median(table.ess, axis=1) >= 100
    assert 0 < reliable.sum() < 80
    curve = frontier(table, min_ess=100, max_gold=9.0)
    assert curve.kl[-1] == pytest.approx(table.kl[reliable].mean(axis=1).max())
    b, log_z = table.b[reliable], table.log_z[reliable].mean(axis=1)
    for past in (0.001, 0.5, 3.0):  # the lowest dual line of the reliable temperatures
        kl = float(curve.kl[-1]) + past
        assert curve.at(kl) == (pytest.approx(np.min(b * log_z + b * kl)), True)


def test_the_bound_starts_where_the_curve_ends_and_stops_at_the_maximal_gold():
    curve = frontier(cut(45), min_ess=0, max_gold=0.8)
    end, gold = float(curve.kl[-1]), float(curve.gold[-1])
    assert curve.at(end) == (pytest.approx(gold), False)
    assert curve.at(end + 1e-9) == (pytest.approx(gold), True)
    assert curve.at(50.0) == (0.8, True)
    assert frontier(cut(45), min_ess=0, max_gold=-1.0).at(50.0)[0] == pytest.approx(gold)


def test_frontier_starts_at_the_reference_and_never_falls():
    curve = frontier(ENUMERATED, min_ess=0)
    assert curve.at(0.0) == (pytest.approx((REF * GOLD).sum(axis=1).mean()), False)
    golds = [p.gold for p in curve.points(8.0, 200)]
    assert np.all(np.diff(golds) >= -1e-9)


def test_too_few_samples_leave_only_the_maximal_gold():
    curve = frontier(tilt_table(sampled_gold(50, 0), [1.0, 0.1]), min_ess=100)
    assert curve.at(0.0)[1] is False
    assert curve.at(0.01) == (1.0, True)


def test_tilting_obeys_the_identity_of_the_optimum():
    """At the optimum, gold - b KL = b log Z (Rafailov et al. 2023, eq. 4), for every prompt."""
    table = tilt_table(sampled_gold(500, 2), [5.0, 0.3, 0.05])
    b = table.b[:, None]
    np.testing.assert_allclose(table.gold - b * table.kl, b * table.log_z, atol=1e-9)


def test_tilting_is_stable_for_large_scores_and_keeps_all_samples_when_hot():
    objective = np.array([[5000.0, 5001.0, 4000.0, 5001.0]])
    cold, hot = tilt_table(objective, [1e-3]), tilt_table(objective, [1e9])
    assert cold.kl.item() == pytest.approx(np.log(2))  # two of four are best
    assert cold.gold.item() == pytest.approx(5001) and cold.ess.item() == pytest.approx(2)
    assert hot.kl.item() == pytest.approx(0, abs=1e-9) and hot.ess.item() == pytest.approx(4)


def test_temperatures_may_come_in_any_order():
    shuffled = np.random.default_rng(0).permutation(default_temperatures())
    again = tilt_table(GOLD, shuffled, log_ref=np.log(REF))
    np.testing.assert_array_equal(again.gold, ENUMERATED.gold)


def test_single_precision_log_probabilities_lose_nothing_more():
    """As a model gives them: what they say is taken to 15 digits, not to 7."""
    single = np.log(REF).astype(np.float32)
    exact = np.exp(single.astype(np.float64))
    exact /= exact.sum(axis=1, keepdims=True)
    table = tilt_table(GOLD, [1.0], log_ref=single)
    np.testing.assert_allclose(table.ref_gold, (exact * GOLD).sum(axis=1), rtol=1e-13)
    np.testing.assert_allclose(table.ref_ess, 1 / (exact**2).sum(axis=1), rtol=1e-13)


def test_padded_completions_of_probability_zero_change_nothing():
    padded = tilt_table(
        np.pad(GOLD, ((0, 0), (0, 2)), constant_values=9.0),
        default_temperatures(),
        log_ref=np.pad(np.log(REF), ((0, 0), (0, 2)), constant_values=-np.inf),
    )
    for mine, plain in zip(padded, ENUMERATED, strict=True):
        np.testing.assert_allclose(mine, plain, atol=1e-12)


@pytest.mark.parametrize("temperatures", [[], [0.0], [-1.0]])
def test_temperatures_must_be_positive(temperatures):
    with pytest.raises(ValueError):
        tilt_table(GOLD, temperatures)


@pytest.mark.parametrize("bad", [[0.1, 0.2], [[]], [[0.1, float("nan")]], [[0.1, float("inf")]]])
def test_gold_that_is_no_table_of_numbers_is_refused(bad):
    with pytest.raises(ValueError, match=r"2-D array of finite numbers|NaN or infinity"):
        tilt_table(bad, [1.0])


def test_another_objective_never_beats_the_frontier():
    """`rm_limit`: tilting by a wrong score gives less gold at the same KL, by the score right."""
    score = GOLD + np.random.default_rng(3).normal(0, 0.5, GOLD.shape)
    best = frontier(ENUMERATED, min_ess=0)
    wrong = tilt_table(score, default_temperatures(), outcome=GOLD, log_ref=np.log(REF))
    right = tilt_table(2 * GOLD, default_temperatures(), outcome=GOLD, log_ref=np.log(REF))
    for kl in (0.1, 0.5, 1.0):
        assert frontier(wrong, min_ess=0).at(kl)[0] < best.at(kl)[0] - 0.01
        assert frontier(right, min_ess=0).at(kl)[0] == pytest.approx(best.at(kl)[0], abs=1e-3)


def test_a_score_bounds_no_gold_past_the_samples_reach():
    """log Z of the score says nothing about gold: only the maximal gold is left, and no points."""
    curve = frontier(tilt_table(GOLD, [1.0, 0.5], outcome=-GOLD, log_ref=np.log(REF)), min_ess=0)
    assert curve.at(5.0) == (1.0, True)
    assert max(p.kl for p in curve.points(5.0, 50)) <= curve.kl[-1]


def test_points_of_a_curve_without_a_bound_go_on_to_its_end():
    tilted = tilt_table(GOLD, [1.0, 0.5, 0.25], outcome=-GOLD, log_ref=np.log(REF))
    curve = frontier(tilted, min_ess=0)
    points = curve.points(2 * float(curve.kl[-1]), 400)
    assert 0.98 * curve.kl[-1] < points[-1].kl <= curve.kl[-1]
    assert not any(p.is_bound for p in points)


def test_points_say_how_many_samples_stand_behind_them():
    curve = frontier(tilt_table(sampled_gold(4000, 0), default_temperatures()), min_ess=1000)
    points = curve.points(4.0, 30)
    assert len(points) == 30 and points[0].kl == 0 and points[-1].kl == pytest.approx(4.0)
    assert points[0].effective_sample_size == pytest.approx(4000)
    assert all(p.effective_sample_size == 0 for p in points if p.is_bound)
    assert all(p.effective_sample_size >= 1000 for p in points if not p.is_bound)
    assert points[-1].is_bound and not points[0].is_bound


def test_no_point_up_to_the_curves_end_is_a_bound_and_every_one_past_it_is():
    curve = frontier(tilt_table(sampled_gold(4000, 0), default_temperatures()), min_ess=1000)
    end = float(curve.kl[-1])
    inside = curve.points(0.99 * end, 9)
    assert inside[-1].kl > curve.kl[-2]  # between the last two temperatures
    assert [p.is_bound for p in inside] == [False] * 9
    assert [p.is_bound for p in curve.points(1.01 * end, 9)] == [False] * 8 + [True]


def test_efficiency_is_one_on_the_frontier_half_midway_and_null_close_to_the_reference():
    curve = frontier(cut(50), min_ess=0)
    start = float(curve.gold[0])
    best = curve.at(0.2)[0]
    assert efficiency(best, 0.2, start, curve) == (pytest.approx(1), False)
    assert efficiency((best + start) / 2, 0.2, start, curve) == (pytest.approx(0.5), False)
    assert efficiency(best, 0.099, start, curve) == (None, False)
    assert efficiency(best, 0.2, 2.0, curve) == (None, False)
    value, is_lower_bound = efficiency(0.5, 3.0, start, curve)
    assert is_lower_bound and value is not None
    assert value <= (0.5 - start) / (best_gold(1.5) - start)


def ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None and estimate.high is not None
    return estimate.low, estimate.high


def method_on(reference_gold: np.ndarray, b: float, rng: np.random.Generator, samples: int):
    """(gold, kl), each (P,): samples of the best policy at b, drawn from N(mean, 0.3^2) prompts."""
    offset = reference_gold.mean(axis=1)
    drawn = rng.normal(offset[:, None] + 0.09 / b, 0.3, (offset.size, samples)).mean(axis=1)
    return drawn, np.full(offset.size, 0.09 / (2 * b**2))


def normal_prompts(rng: np.random.Generator, prompts: int, samples: int) -> np.ndarray:
    return rng.normal(rng.normal(0, 0.5, (prompts, 1)), 0.3, (prompts, samples))


def test_margin_is_zero_for_the_optimum_and_negative_for_worse_policies():
    rng = np.random.default_rng(4)
    reference = normal_prompts(rng, 64, 2000)
    table = tilt_table(reference, default_temperatures())
    runs = [method_on(reference, 0.3, rng, 16) for _ in range(3)]
    gold, kl = (np.stack(x) for x in zip(*runs, strict=True))
    low, high = ends(margin_interval(gold, kl, table, 300, max_gold=9))
    assert -0.1 < low < 0 < high < 0.1
    worse = ends(margin_interval(gold - 0.1, kl, table, 300, max_gold=9))
    assert worse == pytest.approx((low - 0.1, high - 0.1)) and worse[1] < 0
    wasteful = margin_interval(gold, 2 * kl, table, 300, max_gold=9)
    assert ends(wasteful)[1] < 0


def test_easy_prompts_cancel_between_method_and_frontier():
    """A method that is the tilted reference has margin 0 on every resample of the prompts."""
    rng = np.random.default_rng(5)
    table = tilt_table(normal_prompts(rng, 32, 1000), np.geomspace(5, 0.2, 20))
    gold, kl = np.repeat(table.gold[-1:], 3, axis=0), np.repeat(table.kl[-1:], 3, axis=0)
    margin = margin_interval(gold, kl, table, draws=200, max_gold=9)
    assert np.ptp(gold) > 0.5  # prompts differ a lot
    assert (margin.low, margin.high) == pytest.approx((0, 0), abs=1e-9)


def test_a_margin_comes_with_every_seeds_margin_and_without_limits_for_one_seed():
    curve = frontier(ENUMERATED, min_ess=0)
    gold, kl = np.array([[0.5, 0.4, 0.6], [0.2, 0.3, 0.1]]), np.array([[0.9] * 3, [0.4] * 3])
    expected = [0.5 - curve.at(0.9)[0], 0.2 - curve.at(0.4)[0]]
    both = margin_interval(gold, kl, ENUMERATED, draws=50, min_ess=0)
    assert both.per_seed == pytest.approx(expected) and both.mean == pytest.approx(
        np.mean(expected)
    )
    one = margin_interval(gold[:1], kl[:1], ENUMERATED, draws=50, min_ess=0)
    assert one.mean == pytest.approx(expected[0]) and one.low is None and one.high is None
    with pytest.raises(ValueError, match="prompts"):
        margin_interval(gold[:, :2], kl[:, :2], ENUMERATED)


def test_past_the_reach_of_the_samples_a_gold_without_maximum_has_no_margin():
    few = tilt_table(GOLD[:, :3], default_temperatures())
    gold, kl = np.full((2, 3), 0.5), np.full((2, 3), 3.0)
    found = margin_interval(gold, kl, few, draws=20, max_gold=np.inf)
    assert found.mean is None and found.low is None


def test_t_limits_hold_the_true_margin_with_three_seeds():
    """Three seeds that differ: the margin's t limits keep their 95 %."""
    rng, held = np.random.default_rng(6), 0
    for _ in range(150):
        reference = normal_prompts(rng, 24, 200)
        level = reference.mean(axis=1) + 0.3 * np.sqrt(2 * 0.3)
        gold = level - 0.1 + rng.normal(0, 0.1, (3, 1)) + rng.normal(0, 0.1, (3, 24))
        table = tilt_table(reference, np.geomspace(4, 0.2, 12))
        margin = margin_interval(gold, np.full((3, 24), 0.3), table, 60, min_ess=20, max_gold=9)
        low, high = ends(margin)
        held += low <= -0.1 <= high
    assert held / 150 >= 0.92


def test_t_limits_of_a_margin_by_hand():
    """All prompts alike to the frontier: what varies is the method's gold, a plain crossed table.

    Resampled prompts have the variance of a mean of P draws, that of the prompts' means over P.
    """
    rng = np.random.default_rng(8)
    table = tilt_table(
        np.repeat(rng.normal(0, 0.3, (1, 400)), 25, axis=0), np.geomspace(5, 0.2, 20)
    )
    gold = rng.normal(0, 0.1, (3, 1)) + rng.normal(0, 0.4, (1, 25)) + rng.normal(0, 0.1, (3, 25))
    found = margin_interval(gold, np.full((3, 25), 0.3), table, 4000, max_gold=9)
    error = np.sqrt(gold.mean(1).var(ddof=1) / 3 + gold.mean(0).var() / 25)
    low, high = ends(found)
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 2) * error, rel=0.03)
    assert found.mean == pytest.approx(gold.mean() - frontier(table).at(0.3)[0])


def test_a_thousand_resamples_take_less_than_two_seconds():
    rng = np.random.default_rng(7)
    table = tilt_table(normal_prompts(rng, 64, 300), default_temperatures())
    gold, kl = rng.normal(0.2, 0.1, (3, 64)), rng.uniform(0.2, 0.8, (3, 64))
    start = time.process_time()
    margin_interval(gold, kl, table, draws=1000, max_gold=9)
    assert time.process_time() - start < 2
