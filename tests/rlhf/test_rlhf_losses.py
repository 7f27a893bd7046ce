"""Classic RLHF's losses against hand-worked numbers, slow float64 definitions and properties."""

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from checks import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlhf.losses import (
    bradley_terry_loss,
    explained_variance,
    gae,
    policy_loss,
    shaped_rewards,
    value_loss,
    whiten,
)
from shared.training.fit import Diverged, OptimizerConfig, Trainee, prepare, step

LENGTHS = torch.tensor([5, 1, 3, 2])
MASK = torch.arange(5) < LENGTHS[:, None]
GARBAGE = [math.nan, math.inf, -math.inf, 1e30]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spoil(values: Tensor, garbage: float, columns: int = 2) -> Tensor:
    """`values` with `columns` more columns, and `garbage` wherever the mask is False."""
    wide = torch.cat([values.detach(), torch.zeros(len(values), columns, dtype=values.dtype)], 1)
    return wide.masked_fill(~widened(columns), garbage)


def widened(columns: int = 2) -> Tensor:
    return torch.cat([MASK, torch.zeros(len(MASK), columns, dtype=torch.bool)], 1)


# Bradley-Terry


def test_bradley_terry_is_log_2_with_slope_a_half_where_scores_are_equal():
    chosen, rejected = normal(3).requires_grad_(), normal(3).requires_grad_()
    loss = bradley_terry_loss(chosen, rejected)
    close(loss, [math.log(2)] * 3)
    by_chosen, by_rejected = torch.autograd.grad(loss.sum(), (chosen, rejected))
    close(by_chosen, [-0.5] * 3)
    close(by_rejected, [0.5] * 3)


def test_bradley_terry_is_the_cross_entropy_of_who_wins():
    chosen, rejected = normal(6), normal(6, seed=1)
    wins = chosen.exp() / (chosen.exp() + rejected.exp())
    close(bradley_terry_loss(chosen, rejected), -wins.log())


def test_bradley_terry_cannot_know_an_offset_unless_scores_are_centred():
    chosen, rejected = normal(6), normal(6, seed=1)
    close(bradley_terry_loss(chosen + 7, rejected + 7), bradley_terry_loss(chosen, rejected), 1e-12)
    centred = bradley_terry_loss(chosen + 7, rejected + 7, center=0.01)
    close(centred - bradley_terry_loss(chosen, rejected), 0.01 * (chosen + rejected + 14) ** 2)


def test_a_margin_is_what_the_winner_has_to_be_ahead():
    chosen, rejected, margin = normal(6), normal(6, seed=1), normal(6, seed=2).abs()
    behind = bradley_terry_loss(chosen - margin, rejected)
    close(bradley_terry_loss(chosen, rejected, margin=margin), behind)


# Rewards


def test_rewards_sum_to_the_score_less_the_kl_penalty():
    scores, kl = normal(4), normal(4, 5, seed=1)
    rewards = shaped_rewards(scores, kl, MASK, kl_coef=0.3)
    for row, length in enumerate(LENGTHS):
        close(rewards[row].sum(), scores[row] - 0.3 * kl[row, :length].sum())
        close(rewards[row, length:], torch.zeros(5 - length))


def test_the_score_falls_on_the_last_token_of_each_row():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rewards = shaped_rewards(scores, torch.zeros(4, 5), MASK, kl_coef=0.3)
    expected = torch.tensor(
        [[0.0, 0, 0, 0, 1], [2.0, 0, 0, 0, 0], [0.0, 0, 3, 0, 0], [0.0, 4, 0, 0, 0]]
    )
    close(rewards, expected)


def test_the_advantage_at_the_last_token_is_score_less_value():
    """Not what it would be with the score one position later: 1.605 in place of 1.7."""
    scores, values = torch.tensor([2.0, 2.0]), torch.tensor([[0.1, 0.2, 0.3], [0.3, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = shaped_rewards(scores, torch.zeros(2, 3), mask, kl_coef=0.1)
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    close(advantages[0, 2], 1.7, 1e-6)
    close(advantages[1, 0], 1.7, 1e-6)


# Generalised advantages


def slow_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> list[list[float]]:
    """The definition, row by row, as double sums over the row's own tokens."""
    rows = []
    for r, v, n in zip(rewards.tolist(), values.tolist(), LENGTHS.tolist(), strict=True):
        after = [*v[1:n], 0.0]
        delta = [r[t] + gamma * after[t] - v[t] for t in range(n)]
        rows.append(
            [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
        )
    return rows


@pytest.mark.parametrize(("gamma", "lam"), [(1, 1), (1, 0.95), (0.9, 0.8), (0.9, 0), (1, 0)])
def test_gae_equals_the_double_sum(gamma: float, lam: float):
    rewards, values = normal(4, 5), normal(4, 5, seed=1)
    advantages, returns = gae(rewards, values, MASK, gamma=gamma, lam=lam)
    for row, expected in enumerate(slow_gae(rewards, values, gamma, lam)):
        n = len(expected)
        close(advantages[row, :n], expected)
        close(returns[row, :n], torch.tensor(expected).double() + values[row, :n], 1e-6)
        close(torch.cat([advantages[row, n:], returns[row, n:]]), torch.zeros(2 * (5 - n)))


def test_gae_without_discount_is_the_reward_to_go_less_the_value():
    rewards, values = normal(4, 5), normal(4, 5, seed=1)
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    for row, n in enumerate(LENGTHS.tolist()):
        to_go = [rewards[row, t:n].sum() for t in range(n)]
        close(returns[row, :n], torch.stack(to_go))
        close(advantages[row, :n], torch.stack(to_go) - values[row, :n])


def test_a_perfect_value_model_leaves_no_advantage():
    rewards = normal(4, 5)
    _, returns = gae(rewards, torch.zeros(4, 5, dtype=torch.float64), MASK, gamma=0.9, lam=1.0)
    advantages, _ = gae(rewards, returns, MASK, gamma=0.9, lam=0.7)
    close(advantages, torch.zeros(4, 5))


# Whitening


def test_whitened_values_have_mean_0_and_variance_1_over_the_mask():
    whitened = whiten(5 + 3 * normal(4, 5), MASK)
    inside = whitened[MASK].numpy()
    np.testing.assert_allclose([inside.mean(), inside.var()], [0, 1], atol=1e-6)
    close(whitened[~MASK], torch.zeros(int((~MASK).sum())))


def test_whitening_without_a_shift_keeps_the_mean():
    values = 5 + 3 * normal(4, 5)
    inside = whiten(values, MASK, shift_mean=False)[MASK].numpy()
    np.testing.assert_allclose(
        [inside.mean(), inside.var()], [values[MASK].mean().item(), 1], atol=1e-6
    )


def test_whitening_keeps_the_order():
    values = normal(4, 5)
    assert torch.equal(values[MASK].argsort(), whiten(values, MASK)[MASK].argsort())


def test_equal_values_whiten_to_zero_not_to_nan():
    close(whiten(torch.full((4, 5), 3.0), MASK), torch.zeros(4, 5))


# What lies outside the mask


def plain(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """What a log holds."""
    return {name: number.item() for name, number in numbers.items()}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_changes_no_reward_advantage_or_return(garbage: float):
    scores, kl, values = normal(4), normal(4, 5, seed=1), normal(4, 5, seed=2)
    rewards = shaped_rewards(scores, kl, MASK, kl_coef=0.3)
    advantages, returns = gae(rewards, values, MASK, gamma=0.9, lam=0.8)
    wide = shaped_rewards(scores, spoil(kl, garbage), widened(), kl_coef=0.3)
    close(wide, spoil(rewards, 0.0))
    found = gae(spoil(rewards, garbage), spoil(values, garbage), widened(), gamma=0.9, lam=0.8)
    close(found[0], spoil(advantages, 0.0))
    close(found[1], spoil(returns, 0.0))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_padding_changes_no_whitened_value(garbage: float, shift_mean: bool):
    values = normal(4, 5)
    expected = whiten(values, MASK, shift_mean=shift_mean)
    close(whiten(spoil(values, garbage), widened(), shift_mean=shift_mean), spoil(expected, 0.0))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_changes_no_policy_loss_gradient_or_number(garbage: float):
    old, new, advantages = normal(4, 5), normal(4, 5, seed=1), normal(4, 5, seed=2)
    new = (old + 0.3 * new).requires_grad_()
    loss, numbers = policy_loss(new, old, advantages, MASK, clip=0.2)
    loss.backward()
    wide = spoil(new, garbage).requires_grad_()
    spoilt = spoil(old, garbage), spoil(advantages, garbage)
    wide_loss, wide_numbers = policy_loss(wide, *spoilt, widened(), clip=0.2)
    wide_loss.backward()
    close(wide_loss, loss)
    close(wide.grad, spoil(new.grad, 0.0))
    assert plain(wide_numbers) == pytest.approx(plain(numbers))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_changes_no_value_loss_or_number(garbage: float):
    old, new, returns = normal(4, 5), normal(4, 5, seed=1), normal(4, 5, seed=2)
    loss, numbers = value_loss(new, old, returns, MASK, clip=0.2)
    spoilt = [spoil(t, garbage) for t in (new, old, returns)]
    wide_loss, wide_numbers = value_loss(*spoilt, widened(), clip=0.2)
    close(wide_loss, loss)
    assert plain(wide_numbers) == pytest.approx(plain(numbers))
    close(
        explained_variance(spoilt[1], spoilt[2], widened()), explained_variance(old, returns, MASK)
    )


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_changes_no_gradient_of_the_value_loss(garbage: float):
    old, new, returns = normal(4, 5), normal(4, 5, seed=1).requires_grad_(), normal(4, 5, seed=2)
    value_loss(new, old, returns, MASK, clip=0.2)[0].backward()
    wide = spoil(new, garbage).requires_grad_()
    spoilt = spoil(old, garbage), spoil(returns, garbage)
    value_loss(wide, *spoilt, widened(), clip=0.2)[0].backward()
    close(wide.grad, spoil(new.grad, 0.0))


# Clipped losses


def one_token(ratio: float, advantage: float) -> tuple[float, float]:
    """(loss, d loss / d logprob) of one token at this ratio, clip 0.2."""
    logprob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    loss, _ = policy_loss(logprob, zero, torch.full_like(zero, advantage), mask, clip=0.2)
    loss.backward()
    return loss.item(), logprob.grad.item()


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_at_ratio_1_the_policy_loss_is_minus_a_and_its_gradient_the_policy_gradient(
    advantage: float,
):
    assert one_token(1.0, advantage) == pytest.approx((-advantage, -advantage))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside: -A rho, and its own derivative by log rho
        (0.9, -2.0, 1.8, 1.8),
        (1.5, 2.0, -2.4, 0.0),  # better already and far enough: no push
        (0.5, -2.0, 1.6, 0.0),  # avoided already and far enough: no push
        (0.5, 2.0, -1.0, -1.0),  # gone the wrong way: always pulled back
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_policy_loss_by_hand_in_every_region(
    ratio: float, advantage: float, loss: float, slope: float
):
    assert one_token(ratio, advantage) == pytest.approx((loss, slope))


@given(ratio=st.floats(0.05, 5), advantage=st.floats(-3, 3))
def test_the_clipped_loss_never_promises_more_than_the_plain_one(ratio: float, advantage: float):
    loss, _ = one_token(ratio, advantage)
    assert loss >= -advantage * ratio - 1e-12


def test_the_policy_losss_numbers_by_hand():
    ratios = torch.tensor([[1.5, 0.5, 1.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    advantages = torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    loss, numbers = policy_loss(ratios.log(), torch.zeros_like(ratios), advantages, mask, clip=0.2)
    k3 = [r - 1 - math.log(r) for r in (1.5, 0.5, 1.0)]
    assert loss.item() == pytest.approx(-(1.2 + 0.5 + 1.0) / 3)
    assert plain(numbers) == pytest.approx(
        {
            "ppo/policy/clipfrac": 1 / 3,  # only the first is held back
            "ppo/policy/approxkl": sum(k3) / 3,
            "ppo/policy/ratio": 1.0,
        }
    )


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope", "share"),
    [
        (1.0, 0.9, 3.0, 2.0, -2.0, 0),  # near the old value: half the square
        (2.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0, 1),  # moved to the target too fast: held back
        (0.0, 1.0, 3.0, 4.5, -3.0, 0),  # moved away: pulled back
        (2.0, 1.0, -1.0, 4.5, 3.0, 0),
    ],
)
def test_value_loss_by_hand(
    value: float, old: float, target: float, loss: float, slope: float, share: float
):
    v = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    others = (torch.full((1, 1), x, dtype=torch.float64) for x in (old, target))
    found, numbers = value_loss(v, *others, torch.ones(1, 1, dtype=torch.bool), clip=0.2)
    found.backward()
    assert (found.item(), v.grad.item()) == pytest.approx((loss, slope))
    assert plain(numbers) == {"ppo/val/clipfrac": share}


def test_value_loss_is_a_token_mean():
    new, old, returns = (normal(4, 5, seed=s) for s in range(3))
    wide_clip = value_loss(new, old, returns, MASK, clip=1e9)[0]
    expected = 0.5 * np.mean(((new - returns)[MASK] ** 2).numpy())
    close(wide_clip, expected)


def test_explained_variance_is_1_for_the_truth_0_for_a_constant_and_negative_for_worse():
    returns = normal(4, 5)
    assert explained_variance(returns, returns, MASK) == pytest.approx(1)
    assert explained_variance(returns + 3, returns, MASK) == pytest.approx(1)  # R^2 about the mean
    assert explained_variance(torch.full((4, 5), 2.0), returns, MASK) == pytest.approx(0, abs=1e-6)
    assert explained_variance(-returns, returns, MASK) == pytest.approx(-3)
    assert explained_variance(returns / 2, returns, MASK) == pytest.approx(0.75)
    assert explained_variance(returns, torch.ones(4, 5), MASK) == 0


# The optimiser step


class Table(nn.Module):
    """One number for every token of a batch: the smallest 'model' with a gradient."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.weight = nn.Parameter(0.1 * normal(rows, columns).float())


def trainee(model: nn.Module, max_grad_norm: float = 1e9) -> Trainee:
    """Plain gradient descent of rate 1: a step changes the weights by minus the gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return Trainee(model, optimizer, scheduler, max_grad_norm)


def ppo_step(cuts: list[list[int]]) -> tuple[Tensor, dict[str, float]]:
    """(gradient, log) of one step on rows of lengths 1, 3, 5, 2 with these micro-batches."""
    lengths = torch.tensor([1, 3, 5, 2])
    mask, advantages = torch.arange(5) < lengths[:, None], normal(4, 5, seed=3).float()
    model = Table(4, 5)
    old = model.weight.detach() + 0.3 * normal(4, 5, seed=4).float()
    before = model.weight.detach().clone()

    def loss(model: Table, rows: list[int]) -> tuple[Tensor, dict[str, float]]:
        longest = int(lengths[rows].max())
        parts = (t[rows, :longest] for t in (model.weight, old, advantages, mask))
        return policy_loss(*parts, clip=0.2)

    micro_batches = [(rows, float(lengths[rows].sum())) for rows in cuts]
    log = step(trainee(model), micro_batches, loss)
    return before - model.weight.detach(), log


@settings(deadline=None, max_examples=50)
@given(order=st.permutations(range(4)), cut=st.sets(st.integers(1, 3)))
def test_cutting_a_batch_into_micro_batches_changes_neither_gradient_nor_log(order, cut):
    edges = [0, *sorted(cut), 4]
    cuts = [order[a:b] for a, b in itertools.pairwise(edges)]
    whole_gradient, whole_log = ppo_step([[0, 1, 2, 3]])
    gradient, log = ppo_step(cuts)
    assert whole_gradient.norm() > 0.1
    torch.testing.assert_close(gradient, whole_gradient, atol=1e-6, rtol=0)
    assert log == pytest.approx(whole_log, abs=1e-6)


def test_every_token_weighs_the_same_whatever_its_row():
    """Lengths 1 and 3, advantages +1 and -1: (-1 + 3) / 4, where a mean of row means would be 0."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    advantages = torch.tensor([[1.0, 0, 0], [-1.0, -1, -1]])

    def loss(model: Table, rows: list[int]) -> tuple[Tensor, dict[str, float]]:
        logprobs = model.weight[rows]
        return policy_loss(logprobs, logprobs.detach(), advantages[rows], mask[rows], clip=0.2)

    for cuts in ([[0, 1]], [[0], [1]]):
        model = Table(2, 3)
        before = model.weight.detach().clone()
        micro_batches = [(rows, float(mask[rows].sum())) for rows in cuts]
        log = step(trainee(model), micro_batches, loss)
        assert log["loss"] == pytest.approx(0.5)
        close(before - model.weight, [[-0.25, 0, 0], [0.25, 0.25, 0.25]], 1e-6)


def test_the_gradient_is_clipped_as_a_whole_and_logged_as_it_was():
    model = Table(1, 2)
    before = model.weight.detach().clone()
    log = step(
        trainee(model, max_grad_norm=1.0),
        [(None, 1.0), (None, 3.0)],
        lambda m, _: ((m.weight * torch.tensor([3.0, 4.0])).sum(), {}),
    )
    assert log["grad_norm"] == pytest.approx(5)
    close(before - model.weight, [[0.6, 0.8]], 1e-5)


@pytest.mark.parametrize(
    "broken",
    [
        lambda w: (w * math.nan).sum(),
        lambda w: (w * math.inf).sum(),
        lambda w: (w - w.detach()).abs().sqrt().sum(),  # finite itself, its gradient is not
    ],
)
def test_a_step_that_is_not_finite_raises_before_any_weight_changes(broken):
    model = Table(2, 3)
    trained = prepare(model, OptimizerConfig(learning_rate=0.1, warmup_share=0.0), 10)
    before = model.weight.detach().clone()

    def loss(model: Table, bad: bool) -> tuple[Tensor, dict[str, float]]:
        return (broken(model.weight) if bad else model.weight.sum()), {}

    with pytest.raises(Diverged, match="not finite"):
        step(trained, [(False, 1.0), (True, 1.0)], loss)
    assert torch.equal(model.weight, before)
    step(trained, [(False, 1.0)], loss)  # and nothing of the broken step is left behind
    close(before - model.weight, torch.full((2, 3), 0.1), 1e-6)


def test_importance_weights_turn_another_samplers_tokens_into_the_policys_gradient():
    """Tokens drawn evenly, weighted by p / q: the gradient of E_p[A], summed over all tokens."""
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    logprobs = logits.log_softmax(0)
    (logprobs.exp() * advantages).sum().backward()
    expected, logits.grad = logits.grad.clone(), None
    column = logits.log_softmax(0).unsqueeze(1)  # four rows of one token, each token once
    weights = (column.detach() - math.log(1 / 4)).exp()
    mask = torch.ones(4, 1, dtype=torch.bool)
    rows = column.detach(), advantages.unsqueeze(1), mask
    loss, _ = policy_loss(column, *rows, clip=0.2, weights=weights)
    loss.backward()
    close(-logits.grad, expected)
