"""With every pair and its exact Bradley-Terry probability, each direct loss ends at its optimum.

The loss functions under test are the ones that train (`dpo.losses`, `rlhf.losses`); the truth is a
closed form (`benchmarks.evaluation.optimum`, itself checked against maximisation) or a float64
minimiser.
"""

import math
from collections.abc import Callable

import pytest
import torch
from checks import close, minimiser
from torch import Tensor

from benchmarks.evaluation.optimum import bradley_terry, ipo_logps, kl, optimal_logps
from dpo.losses import LogRatios, cdpo_loss, dpo_loss, ipo_loss
from rlhf.losses import bradley_terry_loss
from shared.data.listing import list_completions
from shared.tasks.exact import EOS, Exact, ExactConfig

TASK = Exact(ExactConfig(words=3, prompts=4, cap=3))


def world() -> tuple[Tensor, Tensor]:
    """(ref_logps, rewards) of all completions of all prompts; the reference is the task's chain."""
    prompts = TASK.prompts("test", 4, 0)
    listed = [TASK.chain_probabilities(prompt) for prompt in prompts]
    ref = torch.tensor([[math.log(p) for p in one.values()] for one in listed])
    texts = [[" ".join(w for w in words if w != EOS) for words in one] for one in listed]
    rewards = [TASK.gold([p] * len(t), t).tolist() for p, t in zip(prompts, texts, strict=True)]
    return ref.double().log_softmax(1), torch.tensor(rewards, dtype=torch.float64)


REF, REWARDS = world()
PREFERENCE = bradley_terry(REWARDS)
WEIGHT = REF.exp().unsqueeze(2) * REF.exp().unsqueeze(1) * PREFERENCE  # of (chosen, rejected)


def tabular(loss: Callable[..., Tensor], **setting: float) -> Tensor:
    """Log-probabilities of the tabular softmax policy after a direct loss over all pairs."""
    tokens = torch.ones_like(REF)

    def value(table: Tensor) -> Tensor:
        ratio = table.log_softmax(1) - REF
        pairs = LogRatios(ratio.unsqueeze(2), ratio.unsqueeze(1), tokens, tokens)
        return (WEIGHT * loss(pairs, **setting)).sum()

    return minimiser(value, *REF.shape).log_softmax(1)


def test_the_world_is_a_distribution_with_room_to_gain():
    listing = list_completions(4, 0, 3)  # three words and an end
    assert REF.shape == (4, len(listing.completions)) == (4, 40)
    close(REF.exp().sum(1), torch.ones(4), 1e-12)
    assert kl(optimal_logps(REF, REWARDS, 0.2), REF).min() > 0.5


@pytest.mark.parametrize("beta", [0.2, 0.5, 1.0])
def test_dpo_ends_at_the_rlhf_optimum(beta: float):
    """KL(pi || pi*) <= 1e-6 nats: DPO's loss has the optimum of E[r] - beta KL."""
    found = tabular(dpo_loss, beta=beta)
    assert kl(found, optimal_logps(REF, REWARDS, beta)).max() <= 1e-6


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_ipo_ends_at_its_closed_form(tau: float):
    found = tabular(ipo_loss, tau=tau)
    assert kl(found, ipo_logps(REF, PREFERENCE, tau)).max() <= 1e-6


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_cdpo_ends_where_smoothed_labels_lead(noise: float):
    """The least cross-entropy to (1 - e) P + e (1 - P), by a minimiser of its own definition."""
    smoothed = (1 - noise) * PREFERENCE + noise * PREFERENCE.transpose(1, 2)
    both = REF.exp().unsqueeze(2) * REF.exp().unsqueeze(1)

    def cross_entropy(score: Tensor) -> Tensor:
        p = (score.unsqueeze(2) - score.unsqueeze(1)).sigmoid()
        return -(both * smoothed * p.log()).sum()

    beta = 0.5
    truth = (REF + minimiser(cross_entropy, *REF.shape) / beta).log_softmax(1)
    found = tabular(cdpo_loss, beta=beta, label_smoothing=noise)
    assert kl(found, truth).max() <= 1e-5
    assert kl(found, REF).mean() < kl(optimal_logps(REF, REWARDS, beta), REF).mean()


def test_the_reward_model_recovers_the_reward_up_to_a_constant_a_prompt():
    def loss(scores: Tensor) -> Tensor:
        return (WEIGHT * bradley_terry_loss(scores.unsqueeze(2), scores.unsqueeze(1))).sum()

    scores = minimiser(loss, *REF.shape)
    error = (scores - REWARDS) - (scores - REWARDS).mean(1, keepdim=True)
    assert error.abs().max() <= 1e-2
