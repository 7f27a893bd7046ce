"""Closed forms of the exact optimum, against direct maximisation, and the listing they stand on."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from checks import close, minimiser
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.evaluation.optimum import (
    best_of_n_logps,
    bradley_terry,
    expected,
    frontier_reward,
    ipo_logps,
    kl,
    log_partition,
    objective,
    optimal_logps,
)
from shared.data.listing import list_completions, listed_logps
from shared.models.logprobs import score_logps

PAD, EOS = 0, 1


def world(seed: int = 0, prompts: int = 3, completions: int = 7) -> tuple[Tensor, Tensor]:
    """(ref_logps, rewards)"""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, prompts, completions, generator=generator, dtype=torch.float64)
    return draw[0].log_softmax(1), draw[1]


def maximised(value: Callable[[Tensor], Tensor], shape: torch.Size) -> Tensor:
    """Log-probabilities of the tabular policy at which `value(logps)` is largest."""
    return minimiser(lambda logits: -value(logits.log_softmax(1)), *shape).log_softmax(1)


@pytest.mark.parametrize("beta", [0.05, 0.2, 1.0])
def test_the_optimum_maximises_reward_less_kl(beta: float):
    ref, rewards = world()
    best = maximised(lambda p: objective(p, ref, rewards, beta).sum(), ref.shape)
    optimum = optimal_logps(ref, rewards, beta)
    top, found = (objective(p, ref, rewards, beta) for p in (optimum, best))
    assert (found <= top + 1e-12).all()
    close(found, top, 1e-6)
    close(optimum.exp(), best.exp(), 1e-3)


@pytest.mark.parametrize("beta", [0.05, 0.2, 1.0])
def test_its_value_is_beta_log_z_and_any_other_policy_misses_it_by_beta_times_its_kl(beta: float):
    ref, rewards = world(1)
    best = optimal_logps(ref, rewards, beta)
    top = objective(best, ref, rewards, beta)
    close(top, beta * log_partition(ref, rewards, beta), 1e-12)
    other, _ = world(2)
    close(top - objective(other, ref, rewards, beta), beta * kl(other, best), 1e-12)


def test_kl_is_0_for_itself_and_counts_what_never_happens_as_nothing():
    ref, _ = world()
    close(kl(ref, ref), torch.zeros(3), 1e-15)
    certain = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    half = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    close(kl(certain, half), [math.log(2)], 1e-15)


@pytest.mark.parametrize("level", [1e-4, 0.1, 0.7])
def test_no_policy_of_that_kl_has_more_reward_than_the_frontier(level: float):
    """Against many random policies, scaled down to the level by mixing with the reference."""
    ref, rewards = world(3)
    top = frontier_reward(ref, rewards, level)
    assert top > frontier_reward(ref, rewards, level / 2)
    reached = []
    for seed in range(300):
        direction, _ = world(100 + seed)
        for strength in torch.logspace(-3, 1, 30).tolist():
            policy = (ref + strength * (0.3 * direction + rewards)).log_softmax(1)
            if kl(policy, ref).mean() <= level:
                reached.append(float(expected(policy, rewards).mean()))
    assert reached and max(reached) <= top + 1e-12
    start = float(expected(ref, rewards).mean())
    assert max(reached) - start > 0.7 * (top - start)  # the bound is near what policies do


def test_the_frontier_ends_at_the_reference_and_at_the_best_completion():
    ref, rewards = world(4)
    close(frontier_reward(ref, rewards, 0.0), expected(ref, rewards).mean(), 1e-12)
    close(frontier_reward(ref, rewards, 1e3), rewards.max(1).values.mean(), 1e-12)
    same = torch.ones_like(rewards)
    close(frontier_reward(ref, same, 0.5), 1.0, 1e-12)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_ipo_ends_where_its_expected_loss_is_least(tau: float):
    """Azar et al., eq. 17, over all pairs with their Bradley-Terry labels."""
    ref, rewards = world(5)
    preference = bradley_terry(rewards)
    weight = ref.exp().unsqueeze(2) * ref.exp().unsqueeze(1) * preference

    def value(logps: Tensor) -> Tensor:
        ratio = logps - ref
        h = ratio.unsqueeze(2) - ratio.unsqueeze(1)
        return -(weight * (h - 1 / (2 * tau)) ** 2).sum()

    close(ipo_logps(ref, preference, tau).exp(), maximised(value, ref.shape).exp(), 1e-6)


def test_bradley_terry_is_the_sigmoid_of_the_difference():
    p = bradley_terry(torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    close(p[0, 1, 0], 1 / (1 + math.exp(-1)))
    close(p + p.transpose(1, 2), torch.ones(1, 2, 2))


# The listing


@pytest.mark.parametrize(("vocabulary", "cap"), [(3, 1), (3, 3), (5, 2), (6, 4)])
def test_every_completion_is_listed_once(vocabulary: int, cap: int):
    listing = list_completions(vocabulary, EOS, cap)
    going = vocabulary - 1
    assert len(listing.completions) == sum(going**n for n in range(cap)) + going**cap
    assert len({tuple(c) for c in listing.completions}) == len(listing.completions)
    for completion in listing.completions:
        assert EOS not in completion[:-1]
        assert completion[-1] == EOS or len(completion) == cap


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=PAD, eos_token_id=EOS,
        bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 2:
                weights *= 10
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_listed_probabilities_sum_to_1(model: LlamaForCausalLM, temperature: float):
    prompts = [[2, 3], [4], [5, 2, 3]]
    listing = list_completions(6, EOS, 4)
    logps = listed_logps(model, prompts, listing, PAD, temperature)
    assert logps.shape == (3, 781)
    close(logps.exp().sum(1), torch.ones(3), 1e-12)
    assert logps.exp().max() > 0.02  # far from uniform


def test_they_are_those_of_scoring_each_completion(model: LlamaForCausalLM):
    prompts = [[2, 3], [4]]
    listing = list_completions(6, EOS, 3)
    rows = [p for p in prompts for _ in listing.completions]
    scored = score_logps(model, rows, listing.completions * 2, PAD).view(2, -1)
    close(listed_logps(model, prompts, listing, PAD), scored, 2e-5)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_favourite_of_n_is_distributed_as_enumeration_says(n: int):
    """All 5^n draws from five completions, two of them with equal scores; ties at random."""
    ref = torch.tensor([0.1, 0.3, 0.15, 0.25, 0.2], dtype=torch.float64)
    scores = torch.tensor([0.5, -1.0, 2.0, 0.5, 0.1], dtype=torch.float64)
    expected = torch.zeros(5, dtype=torch.float64)
    for draw in itertools.product(range(5), repeat=n):
        best = [i for i in draw if scores[i] == scores[list(draw)].max()]
        for i in best:
            expected[i] += ref[list(draw)].prod() / len(best)
    found = best_of_n_logps(ref.log()[None], scores[None], n)
    close(found.exp()[0], expected, 1e-12)


def test_the_kl_of_best_of_n_is_at_most_its_bound():
    """log n - (n - 1) / n, reached where no two scores are equal and no completion is likely."""
    generator = torch.Generator().manual_seed(0)
    ref = torch.full((1, 50_000), 1 / 50_000, dtype=torch.float64).log()
    scores = torch.randn(1, 50_000, generator=generator, dtype=torch.float64)
    for n in (2, 16):
        bound = math.log(n) - (n - 1) / n
        close(kl(best_of_n_logps(ref, scores, n), ref), [bound], 1e-3)
        coarse = best_of_n_logps(ref, scores.round(), n)
        assert kl(coarse, ref).item() < bound - 0.01
