"""PPO's arithmetic against the papers' equations, token by token in Python's float64.

On ragged batches with garbage outside the mask: nothing here knows of tensors, masks or padding.
"""

import math
import random
from typing import NamedTuple

import pytest
import torch
from checks import close
from torch import Tensor

from rlhf.losses import (
    explained_variance,
    gae,
    policy_loss,
    shaped_rewards,
    value_loss,
    whiten,
)
from rlhf.ppo import KLController
from shared.kl import k1, k3

Rows = list[list[float]]  # one number for each token of each row, rows of their own lengths


class Batch(NamedTuple):
    """What a rollout and a forward pass after some updates would hold."""

    scores: list[float]
    old: Rows  # log-probabilities of the policy that sampled
    ref: Rows
    new: Rows
    old_values: Rows
    new_values: Rows
    gamma: float
    lam: float
    clip: float
    kl_coef: float


def random_batch(seed: int) -> Batch:
    """1 to 6 rows of 1 to 9 tokens; ratios within and beyond the clip, advantages of both signs."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 9) for _ in range(rng.randint(1, 6))] if seed else [1]

    def rows(centre: float, spread: float, around: Rows | None = None) -> Rows:
        around = around or [[centre] * n for n in lengths]
        return [[rng.gauss(x, spread) for x in row] for row in around]

    old, old_values = rows(-3, 1), rows(0.3, 1)
    return Batch(
        scores=[rng.gauss(0, 2) for _ in lengths],
        old=old,
        ref=rows(0, 0.5, old),
        new=rows(0, 0.3, old),
        old_values=old_values,
        new_values=rows(0, 0.4, old_values),
        gamma=rng.choice([1.0, 0.97]),
        lam=rng.choice([0.0, 0.5, 0.95, 1.0]),
        clip=rng.choice([0.1, 0.2, 0.3]),
        kl_coef=rng.choice([0.0, 0.05, 0.5]),
    )


@pytest.fixture(params=range(40))
def batch(request: pytest.FixtureRequest) -> Batch:
    return random_batch(request.param)


def padded(rows: Rows, garbage: float) -> Tensor:
    width = max(map(len, rows)) + 1
    full = [row + [garbage] * (width - len(row)) for row in rows]
    return torch.tensor(full, dtype=torch.float64)


def mask_of(rows: Rows) -> Tensor:
    return ~padded(rows, math.nan).isnan()


def flat(rows: Rows) -> list[float]:
    return [x for row in rows for x in row]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def inside(found: Tensor, rows: Rows) -> None:
    """`found` is `rows` on the mask and 0 elsewhere."""
    close(found, padded(rows, 0.0))


# The equations


def rewards_of(b: Batch) -> Rows:
    """Ziegler et al. 2019, eq. 2: -beta log(pi/ref) at each token, the score at the last one."""
    return [
        [
            -b.kl_coef * (old[t] - ref[t]) + (score if t == len(old) - 1 else 0.0)
            for t in range(len(old))
        ]
        for score, old, ref in zip(b.scores, b.old, b.ref, strict=True)
    ]


def advantages_of(b: Batch) -> Rows:
    """Schulman et al. 2016, eq. 16: the sum over k of (gamma lam)^k delta_{t+k}."""
    found = []
    for rewards, values in zip(rewards_of(b), b.old_values, strict=True):
        n = len(rewards)
        delta = []
        for t in range(n):
            following = values[t + 1] if t + 1 < n else 0.0
            delta.append(rewards[t] + b.gamma * following - values[t])
        found.append(
            [sum((b.gamma * b.lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
        )
    return found


def returns_of(b: Batch) -> Rows:
    return [
        [a + v for a, v in zip(*rows, strict=True)]
        for rows in zip(advantages_of(b), b.old_values, strict=True)
    ]


def whitened(rows: Rows, shift_mean: bool) -> Rows:
    """Less the mean, over the root of the mean squared deviation."""
    centre = mean(flat(rows))
    scale = math.sqrt(mean([(x - centre) ** 2 for x in flat(rows)]) + 1e-8)
    return [[(x - centre) / scale + (0 if shift_mean else centre) for x in row] for row in rows]


def clipped_objective(b: Batch, advantages: Rows) -> tuple[float, Rows, float]:
    """(minus Schulman et al. 2017, eq. 7; its slope by each log-probability; share held back)."""
    losses, slopes, held = [], [], []
    count = len(flat(b.new))
    for new, old, row in zip(b.new, b.old, advantages, strict=True):
        slopes.append([])
        for lp, lp_old, a in zip(new, old, row, strict=True):
            ratio = math.exp(lp - lp_old)
            near = min(max(ratio, 1 - b.clip), 1 + b.clip)
            losses.append(-min(ratio * a, near * a))
            stuck = (a > 0 and ratio > 1 + b.clip) or (a < 0 and ratio < 1 - b.clip)
            held.append(float(stuck))
            slopes[-1].append(0.0 if stuck else -a * ratio / count)
    return mean(losses), slopes, mean(held)


def clipped_value_error(b: Batch, targets: Rows) -> tuple[float, Rows, float]:
    """(half the larger of two squares, its slope by each value, share held back)."""
    losses, slopes, held = [], [], []
    count = len(flat(b.new_values))
    for new, old, row in zip(b.new_values, b.old_values, targets, strict=True):
        slopes.append([])
        for v, v_old, target in zip(new, old, row, strict=True):
            near = min(max(v, v_old - b.clip), v_old + b.clip)
            losses.append(max((v - target) ** 2, (near - target) ** 2) / 2)
            stuck = (near - target) ** 2 > (v - target) ** 2
            held.append(float(stuck))
            slopes[-1].append(0.0 if stuck else (v - target) / count)
    return mean(losses), slopes, mean(held)


# Ours


def test_rewards_are_the_penalty_at_each_token_and_the_score_at_the_last(batch: Batch):
    kl_terms = k1(padded(batch.old, 7.0), padded(batch.ref, math.inf))
    scores = torch.tensor(batch.scores, dtype=torch.float64)
    found = shaped_rewards(scores, kl_terms, mask_of(batch.old), kl_coef=batch.kl_coef)
    inside(found, rewards_of(batch))


def test_advantages_are_the_discounted_sums_of_the_deltas(batch: Batch):
    rewards, values = padded(rewards_of(batch), math.nan), padded(batch.old_values, 1e30)
    decay = {"gamma": batch.gamma, "lam": batch.lam}
    advantages, returns = gae(rewards, values, mask_of(batch.old), **decay)
    inside(advantages, advantages_of(batch))
    inside(returns, returns_of(batch))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_divides_by_the_root_of_the_mean_squared_deviation(
    batch: Batch, shift_mean: bool
):
    rows = advantages_of(batch)
    found = whiten(padded(rows, math.inf), mask_of(rows), shift_mean=shift_mean)
    inside(found, whitened(rows, shift_mean))


def test_the_policy_loss_and_its_gradient_are_those_of_the_clipped_objective(batch: Batch):
    advantages, mask = advantages_of(batch), mask_of(batch.old)
    new = padded(batch.new, 1e30).requires_grad_()
    found, numbers = policy_loss(
        new, padded(batch.old, 0.0), padded(advantages, math.nan), mask, clip=batch.clip
    )
    found.backward()
    loss, slopes, held = clipped_objective(batch, advantages)
    close(found, loss)
    inside(new.grad, slopes)
    ratios = [math.exp(x - y) for x, y in zip(flat(batch.new), flat(batch.old), strict=True)]
    assert numbers == pytest.approx(
        {
            "ppo/policy/clipfrac": held,
            "ppo/policy/approxkl": mean([r - 1 - math.log(r) for r in ratios]),
            "ppo/policy/ratio": mean(ratios),
        },
        abs=1e-7,
    )


def test_the_value_loss_and_its_gradient_are_those_of_the_clipped_square(batch: Batch):
    targets, mask = returns_of(batch), mask_of(batch.old)
    new = padded(batch.new_values, -math.inf).requires_grad_()
    others = padded(batch.old_values, math.nan), padded(targets, 1e30)
    found, numbers = value_loss(new, *others, mask, clip=batch.clip)
    found.backward()
    loss, slopes, held = clipped_value_error(batch, targets)
    close(found, loss)
    inside(new.grad, slopes)
    assert numbers["ppo/val/clipfrac"] == pytest.approx(held, abs=1e-7)


def test_explained_variance_is_one_less_the_share_of_variance_that_is_left(batch: Batch):
    targets = returns_of(batch)
    errors = [r - v for r, v in zip(flat(targets), flat(batch.old_values), strict=True)]

    def variance(values: list[float]) -> float:
        return mean([(x - mean(values)) ** 2 for x in values])

    spread = variance(flat(targets))
    expected = 1 - variance(errors) / spread if spread else 0.0
    found = explained_variance(
        padded(batch.old_values, math.nan), padded(targets, 9.0), mask_of(batch.old)
    )
    assert found == pytest.approx(expected)


def test_the_estimators_are_schulmans(batch: Batch):
    p, q = padded(batch.old, 0.0), padded(batch.ref, 0.0)
    pairs = [list(zip(*rows, strict=True)) for rows in zip(batch.old, batch.ref, strict=True)]
    inside(k1(p, q), [[x - y for x, y in row] for row in pairs])
    inside(k3(p, q), [[math.exp(y - x) - 1 - (y - x) for x, y in row] for row in pairs])


def test_the_batches_reach_every_region_of_both_clips():
    """Without this the tests above could agree on the plain objectives alone."""
    regions, held = set(), []
    for seed in range(40):
        b = random_batch(seed)
        for new, old, row in zip(b.new, b.old, advantages_of(b), strict=True):
            for x, y, a in zip(new, old, row, strict=True):
                side = (math.exp(x - y) > 1 + b.clip) - (math.exp(x - y) < 1 - b.clip)
                regions.add((side, a > 0))
        held.append(clipped_value_error(b, returns_of(b))[2])
    assert len(regions) == 6
    assert 0 < mean(held) < 0.5


@pytest.mark.parametrize("seed", range(20))
def test_the_controller_holds_the_kl_of_a_policy_that_answers_it(seed: int):
    """A policy whose KL is c / coefficient ends at its target, from either side."""
    rng = random.Random(seed)
    target, strength = rng.uniform(1, 10), rng.uniform(0.1, 2)
    controller = KLController(rng.choice([0.01, 3.0]), target, horizon=1000)
    for _ in range(800):
        controller.update(strength / controller.coef, 100)
    assert strength / controller.coef == pytest.approx(target, rel=1e-3)
