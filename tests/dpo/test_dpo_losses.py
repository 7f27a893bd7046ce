"""The direct losses against closed forms and numeric optima of small bandits."""

import math
from collections.abc import Callable

import pytest
import torch
from checks import close, minimiser
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from torch import Tensor

from dpo.losses import (
    LOSSES,
    UNPAIRED,
    LogRatios,
    cdpo_loss,
    dpo_loss,
    expected_loss,
    ipo_loss,
    ipo_token_loss,
    kto_loss,
    rdpo_loss,
)

SETTINGS = {
    "dpo": {"beta": 0.3},
    "cdpo": {"beta": 0.3, "label_smoothing": 0.2},
    "rdpo": {"beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"tau": 0.4},
    "ipo-token": {"tau": 0.4},
    "kto": {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5},
}
PAIRED = [name for name in SETTINGS if name not in UNPAIRED]
finite = st.floats(-30, 30)


def ratios(chosen: Tensor, rejected: Tensor | None = None, tokens: int = 1, **more) -> LogRatios:
    """Log-ratios of completions that are all `tokens` long; rejected ones are 0 if not given."""
    rejected = torch.zeros_like(chosen) if rejected is None else rejected
    lengths = torch.full_like(chosen, tokens), torch.full_like(rejected, tokens)
    return LogRatios(chosen, rejected, *lengths, **more)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def slope(loss: Callable[[Tensor], Tensor], *at: float) -> Tensor:
    """d loss / d h at each point."""
    h = double(*at)
    return torch.autograd.grad(loss(h).sum(), h)[0]


# Closed forms


def test_the_losses_that_settings_are_for_are_there():
    assert SETTINGS.keys() <= LOSSES.keys()


@pytest.mark.parametrize("name", ["dpo", "cdpo", "rdpo"])
def test_logistic_losses_are_log_2_where_policy_is_reference(name: str):
    close(LOSSES[name](ratios(double(0, 0)), **SETTINGS[name]), [math.log(2)] * 2)


@pytest.mark.parametrize("beta", [0.05, 0.5, 2.0])
def test_dpo_slope_is_minus_half_beta_where_policy_is_reference(beta: float):
    close(slope(lambda h: dpo_loss(ratios(h), beta=beta), 0.0), [-beta / 2])


@given(h=finite)
def test_dpo_cdpo_and_rdpo_values_and_slopes(h: float):
    beta, e = 0.3, 0.2
    plus, minus = special.log_expit(beta * h), special.log_expit(-beta * h)
    s = special.expit(beta * h)
    at = ratios(double(h))
    close(dpo_loss(at, beta=beta), [-plus])
    close(cdpo_loss(at, beta=beta, label_smoothing=e), [-0.8 * plus - 0.2 * minus])
    close(rdpo_loss(at, beta=beta, label_smoothing=e), [(-0.8 * plus + 0.2 * minus) / 0.6])
    slopes = {
        "dpo": -beta * special.expit(-beta * h),
        "cdpo": beta * (s - (1 - e)),
        "rdpo": -beta * ((1 - e) - (1 - 2 * e) * s) / (1 - 2 * e),
    }
    for name, expected in slopes.items():
        loss = LOSSES[name]
        close(slope(lambda x, f=loss, n=name: f(ratios(x), **SETTINGS[n]), h), [expected])


@pytest.mark.parametrize("name", PAIRED)
def test_only_the_difference_of_the_log_ratios_matters(name: str):
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64)
    moved = LOSSES[name](ratios(chosen + 3, rejected + 3, tokens=4), **SETTINGS[name])
    close(moved, LOSSES[name](ratios(chosen, rejected, tokens=4), **SETTINGS[name]))


@given(chosen=finite, rejected=finite)
def test_swapping_chosen_and_rejected_flips_h(chosen: float, rejected: float):
    c, r = double(chosen), double(rejected)
    there, back, h = ratios(c, r), ratios(r, c), chosen - rejected
    close(dpo_loss(there, beta=0.3) - dpo_loss(back, beta=0.3), [-0.3 * h])
    smoothed = [cdpo_loss(x, beta=0.3, label_smoothing=0.5) for x in (there, back)]
    close(smoothed[0], smoothed[1])  # a coin as label prefers neither side
    close(ipo_loss(there, tau=0.4) - ipo_loss(back, tau=0.4), [-2 * h / 0.4])
    token = ipo_token_loss(there, tau=0.4) - ipo_token_loss(back, tau=0.4)
    close(token, [-2 * h / 0.4])


def test_no_smoothing_is_dpo():
    h = ratios(torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64))
    plain = dpo_loss(h, beta=0.7)
    close(cdpo_loss(h, beta=0.7, label_smoothing=0.0), plain)
    close(rdpo_loss(h, beta=0.7, label_smoothing=0.0), plain)


@pytest.mark.parametrize("name", PAIRED)
def test_far_log_ratios_stay_finite(name: str):
    for h in (-1e4, 1e4):
        x = torch.tensor([h], requires_grad=True)
        loss = LOSSES[name](ratios(x), **SETTINGS[name])
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(x.grad).all()
    close(dpo_loss(ratios(double(-1e4)), beta=0.3), [3000.0])


@pytest.mark.parametrize("name", PAIRED)
def test_a_pair_loss_is_one_per_pair_whatever_the_batch(name: str):
    chosen, rejected = torch.randn(2, 4, dtype=torch.float64)
    together = LOSSES[name](ratios(chosen, rejected), **SETTINGS[name])
    for i in range(4):
        alone = LOSSES[name](ratios(chosen[i : i + 1], rejected[i : i + 1]), **SETTINGS[name])
        close(alone, together[i : i + 1])


# Where the losses are least


def test_dpo_has_the_same_optimum_as_kl_regularised_rlhf():
    """Rafailov et al. 2023, eq. 4: both are optimal at ref(y) * exp(reward(y) / beta) / Z."""
    beta, reward = 0.5, torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=torch.float64)
    ref = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    y_w, y_l = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T  # every ordered pair
    preference = torch.sigmoid(reward[y_w] - reward[y_l])  # Bradley-Terry P(y_w beats y_l)

    def loss(logits: Tensor) -> Tensor:
        r = torch.log_softmax(logits, -1) - ref
        return (preference * dpo_loss(ratios(r[y_w], r[y_l]), beta=beta)).mean()

    found = torch.log_softmax(minimiser(loss, 4), -1)
    close(found, torch.log_softmax(ref + reward / beta, -1), 1e-5)

    def rlhf(logits: Tensor) -> Tensor:
        policy = torch.log_softmax(logits, -1)
        return -(policy.exp() * (reward - beta * (policy - ref))).sum()

    close(found, torch.log_softmax(minimiser(rlhf, 4), -1), 1e-5)


@pytest.mark.parametrize(("beta", "p"), [(0.1, 0.7), (0.5, 0.6), (2.0, 0.9)])
def test_dpo_is_least_at_the_log_odds_over_beta(beta: float, p: float):
    def loss(h: Tensor) -> Tensor:
        wins, losses = dpo_loss(ratios(h), beta=beta), dpo_loss(ratios(-h), beta=beta)
        return (p * wins + (1 - p) * losses).sum()

    close(minimiser(loss, 1), [special.logit(p) / beta], 1e-4)


@pytest.mark.parametrize(("beta", "e"), [(0.1, 0.1), (0.5, 0.3), (2.0, 0.01)])
def test_cdpo_is_least_at_the_log_odds_of_its_smoothing(beta: float, e: float):
    found = minimiser(lambda h: cdpo_loss(ratios(h), beta=beta, label_smoothing=e).sum(), 1)
    close(found, [special.logit(1 - e) / beta], 1e-4)


@given(h=finite, e=st.floats(0, 0.4))
def test_rdpo_on_flipped_labels_is_dpo_on_clean_ones_in_the_mean(h: float, e: float):
    right, wrong = (rdpo_loss(ratios(double(x)), beta=0.3, label_smoothing=e) for x in (h, -h))
    close((1 - e) * right + e * wrong, dpo_loss(ratios(double(h)), beta=0.3))


def test_rdpo_recovers_the_clean_preference_and_dpo_the_flipped_one():
    beta, e, p = 0.5, 0.2, 0.7
    flipped = p * (1 - e) + (1 - p) * e

    def of(loss: Callable[[Tensor], Tensor]) -> Tensor:
        return minimiser(lambda h: (flipped * loss(h) + (1 - flipped) * loss(-h)).sum(), 1)

    robust = of(lambda h: rdpo_loss(ratios(h), beta=beta, label_smoothing=e))
    close(robust, [special.logit(p) / beta], 1e-4)
    close(of(lambda h: dpo_loss(ratios(h), beta=beta)), [special.logit(flipped) / beta], 1e-4)


def test_ipo_value_and_slope():
    close(ipo_loss(ratios(double(0.0)), tau=0.4), [1 / (4 * 0.4**2)])
    close(slope(lambda h: ipo_loss(ratios(h), tau=0.4), -1.0, 2.0), [2 * (-1 - 1.25), 2 * 0.75])


def test_ipo_does_not_divide_by_the_length():
    h = double(1.5)
    close(ipo_loss(ratios(h, tokens=1), tau=0.4), ipo_loss(ratios(h, tokens=9), tau=0.4))


@pytest.mark.parametrize("p", [0.5, 0.8, 1.0])
def test_ipo_with_two_arms_is_least_at_2p_minus_1_over_2_tau(p: float):
    """Azar et al. 2023, section 5: finite even where the preference is certain."""
    tau, ref = 0.4, torch.tensor([0.3, 0.7], dtype=torch.float64).log()

    def loss(logits: Tensor) -> Tensor:
        r = torch.log_softmax(logits, -1) - ref
        return (
            p * ipo_loss(ratios(r[:1], r[1:]), tau=tau)
            + (1 - p) * ipo_loss(ratios(r[1:], r[:1]), tau=tau)
        ).sum()

    found = torch.log_softmax(minimiser(loss, 2), -1) - ref
    close(found[0] - found[1], (2 * p - 1) / (2 * tau), 1e-5)


A, B, C = range(3)


def bandit(
    loss: Callable[[LogRatios], Tensor], pairs: list[tuple[int, int]], ref: Tensor
) -> Tensor:
    """log policy - log ref at the optimum over (winner, loser) pairs of three arms."""
    y_w, y_l = torch.tensor(pairs).T

    def mean(logits: Tensor) -> Tensor:
        r = torch.log_softmax(logits, -1) - ref
        return loss(ratios(r[y_w], r[y_l])).mean()

    return torch.log_softmax(minimiser(mean, 3), -1) - ref


@pytest.mark.parametrize("ref", [[1 / 3, 1 / 3, 1 / 3], [0.2, 0.5, 0.3]])
def test_ipo_on_the_papers_first_dataset(ref: list[float]):
    """Azar et al. 2023, D1 = {a > b, b > c, a > c}: logits 1/(3 tau), 0, -1/(3 tau) over ref's."""
    tau, log_ref = 0.4, torch.tensor(ref, dtype=torch.float64).log()
    found = bandit(lambda r: ipo_loss(r, tau=tau), [(A, B), (B, C), (A, C)], log_ref)
    expected = torch.log_softmax(log_ref + double(1 / (3 * tau), 0.0, -1 / (3 * tau)), -1)
    close(found + log_ref, expected, 1e-5)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "ipo", "ipo-token"])
def test_a_cycle_of_preferences_leaves_the_reference(name: str):
    """Azar et al. 2023, D2 = {a > b, b > c, c > a}."""
    ref = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    cycle = [(A, B), (B, C), (C, A)]
    close(bandit(lambda r: LOSSES[name](r, **SETTINGS[name]), cycle, ref), [0.0, 0, 0], 1e-5)


def test_a_certain_preference_is_finite_for_ipo_and_drives_dpo_away():
    """{a > b, b > a, a > c}: c always loses."""
    ref = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    data = [(A, B), (B, A), (A, C)]
    ipo = bandit(lambda r: ipo_loss(r, tau=0.4), data, ref)
    close(ipo[A] - ipo[C], 1 / (2 * 0.4), 1e-5)
    dpo = bandit(lambda r: dpo_loss(r, beta=0.4), data, ref)
    assert dpo[A] - dpo[C] > 10
    close(dpo[A] - dpo[B], 0.0, 1e-3)


def test_ipo_token_slopes_are_divided_by_their_own_lengths():
    chosen, rejected = double(2.0), double(-3.0)
    lengths = torch.tensor([4.0]), torch.tensor([6.0])
    loss = ipo_token_loss(LogRatios(chosen, rejected, *lengths), tau=0.4)
    gap = 2 / 4 - -3 / 6 - 1.25
    close(loss, [gap**2])
    by_chosen, by_rejected = torch.autograd.grad(loss, (chosen, rejected))
    close(by_chosen, [2 * gap / 4])
    close(by_rejected, [-2 * gap / 6])


def test_ipo_token_with_equal_lengths_is_least_at_n_over_2_tau():
    found = minimiser(lambda h: ipo_token_loss(ratios(h, tokens=7), tau=0.4).sum(), 1)
    close(found, [7 / (2 * 0.4)], 1e-5)


def test_ipo_token_of_single_tokens_is_ipo():
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64)
    r = ratios(chosen, rejected, tokens=1)
    close(ipo_token_loss(r, tau=0.4), ipo_loss(r, tau=0.4))


# KTO


def kto(chosen: Tensor, rejected: Tensor, z: float, **setting: float) -> Tensor:
    mismatched = torch.full((3,), z, dtype=torch.float64)
    return kto_loss(ratios(chosen, rejected, mismatched=mismatched), **setting)


@pytest.mark.parametrize("z", [0.0, 0.7])
def test_kto_is_half_its_weight_at_the_baseline_with_slope_a_quarter_beta(z: float):
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    chosen, rejected = double(z), double(z)
    loss = kto(chosen, rejected, z, beta=0.3, **weights)
    close(loss, [0.75, 0.25])
    by_chosen, by_rejected = torch.autograd.grad(loss.sum(), (chosen, rejected))
    close(by_chosen, [-1.5 * 0.3 / 4])
    close(by_rejected, [0.5 * 0.3 / 4])


@given(r=finite, z=st.floats(0, 5))
def test_kto_values_follow_the_paper(r: float, z: float):
    """Ethayarajh et al. 2024, eq. 8, with lambda - value as the loss."""
    loss = kto(double(r), double(r), z, beta=0.3)
    desirable, undesirable = special.expit(0.3 * (r - z)), special.expit(0.3 * (z - r))
    close(loss, [1 - desirable, 1 - undesirable], 1e-7)


def test_kto_slopes_vanish_far_from_the_baseline():
    for r in (-1000.0, 1000.0):
        x = double(r)
        (by_x,) = torch.autograd.grad(kto(x, x, 0.0, beta=0.3).sum(), x)
        close(by_x, [0.0], 1e-12)


def test_ktos_baseline_is_the_mean_of_the_mismatched_never_below_zero():
    at = {"chosen": double(0.5), "rejected": double(-0.5)}
    below = kto_loss(ratios(**at, mismatched=torch.tensor([-3.0, 1.0])), beta=0.3)
    close(below, kto(**at, z=0.0, beta=0.3))
    above = kto_loss(ratios(**at, mismatched=torch.tensor([-1.0, 3.0])), beta=0.3)
    close(above, kto(**at, z=1.0, beta=0.3))


def test_no_gradient_goes_through_ktos_baseline():
    mismatched = double(1.0, 2.0)
    chosen = double(0.5)
    kto_loss(ratios(chosen, chosen, mismatched=mismatched), beta=0.3).sum().backward()
    assert mismatched.grad is None
    assert chosen.grad is not None


def test_swapping_ktos_labels_turns_the_sign_of_r_minus_z():
    r, z = torch.randn(6, dtype=torch.float64), 0.4
    there = kto(r, 2 * z - r, z, beta=0.3)
    close(there[:6], there[6:])  # an undesirable completion mirrored at z is a desirable one
    back = kto(2 * z - r, r, z, beta=0.3)
    close(there + back, torch.ones(12))


def test_kto_is_one_per_completion_desirable_ones_first_whatever_the_batch():
    chosen, rejected = torch.randn(4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    together = kto(chosen, rejected, 0.2, beta=0.3)
    one_by_one = [kto(c.view(1), rejected[:0], 0.2, beta=0.3) for c in chosen]
    one_by_one += [kto(chosen[:0], r.view(1), 0.2, beta=0.3) for r in rejected]
    close(together, torch.cat(one_by_one))


def test_kto_takes_batches_of_one_label_only():
    some, none = torch.randn(3, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    close(kto(some, none, 0.2, beta=0.3), torch.sigmoid(0.3 * (0.2 - some)))
    close(kto(none, some, 0.2, beta=0.3), torch.sigmoid(0.3 * (some - 0.2)))


def test_kto_without_mismatched_log_ratios_says_so():
    with pytest.raises(ValueError, match="mismatched"):
        kto_loss(ratios(double(0.0)), beta=0.3)


# Labels with their probability


@pytest.mark.parametrize("name", sorted(SETTINGS))
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_the_expected_loss_is_the_mean_over_labels_drawn(name: str, p: float):
    """Both labels of each pair, weighted by hand, item by item."""
    setting = {"tau": 0.3} if "ipo" in name else {"beta": 0.4}
    if name in ("cdpo", "rdpo"):
        setting["label_smoothing"] = 0.1
    loss, (a, b) = LOSSES[name], torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([3.0, 1, 4, 2, 5]), torch.tensor([2.0, 2, 6, 1, 3])
    z = torch.tensor([0.5, -0.1])
    found = expected_loss(loss, LogRatios(a, b, *tokens, z), torch.full((5,), p), **setting)
    for i in range(5):
        one, other = slice(i, i + 1), (tokens[0][i : i + 1], tokens[1][i : i + 1])
        won = loss(LogRatios(a[one], b[one], *other, z), **setting)
        lost = loss(LogRatios(b[one], a[one], *other[::-1], z), **setting)
        close(found[i], p * won[0] + (1 - p) * lost[-1], 1e-6)
        if len(found) == 10:  # single completions: the second of the pair
            close(found[5 + i], p * won[1] + (1 - p) * lost[0], 1e-6)


def test_with_exact_labels_dpo_rests_where_the_log_odds_are_the_labels():
    """So nothing is left to learn from any pair at the optimum: no noise, whatever the batch."""
    beta, p = 0.2, torch.tensor([0.1, 0.5, 0.95], dtype=torch.float64)
    h = (torch.logit(p) / beta).requires_grad_()
    tokens = torch.ones(3)
    r = LogRatios(h, torch.zeros(3, dtype=torch.float64), tokens, tokens)
    expected_loss(dpo_loss, r, p, beta=beta).sum().backward()
    close(h.grad, torch.zeros(3), 1e-12)
