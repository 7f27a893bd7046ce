"""Best-of-n: the favourite of n, and nothing else about it."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from benchmarks.evaluation.metrics import best_of_n_kl
from rlhf.best_of_n import best_of_n
from shared.generation.engine import Completions, Sampling
from shared.generation.hf import HFEngine
from shared.models.cost import Meter
from shared.models.load import SpecialIds, load_policy
from shared.models.scorer import Scorer

PROMPTS = [[5, 6], [7, 8, 9], [10]]
SAMPLING = Sampling(max_new_tokens=8, seed=4)


@pytest.fixture
def engine(policy_folder: Path) -> HFEngine:
    return HFEngine(load_policy(policy_folder), SpecialIds(0, 1))


@pytest.fixture
def scorer(reward_folder: Path) -> Scorer:
    return Scorer(reward_folder)


def test_the_highest_scored_of_n_samples_of_each_prompt_stays(engine: HFEngine, scorer: Scorer):
    n = 5
    drawn = engine.generate([p for p in PROMPTS for _ in range(n)], SAMPLING)
    found = best_of_n(engine, scorer, PROMPTS, n, SAMPLING)
    places = []
    for i, prompt in enumerate(PROMPTS):
        candidates = drawn.ids[i * n : (i + 1) * n]
        scores = [scorer.score_all([prompt], [c]).item() for c in candidates]
        place = scores.index(max(scores))
        places.append(place)
        assert found.ids[i] == candidates[place]
        assert found.truncated[i] == drawn.truncated[i * n + place]
    assert len(set(places)) > 1  # or always taking the same one would pass


def test_one_of_one_is_a_sample(engine: HFEngine, scorer: Scorer):
    assert best_of_n(engine, scorer, PROMPTS, 1, SAMPLING) == engine.generate(PROMPTS, SAMPLING)


def test_every_sample_is_paid_for(engine: HFEngine, scorer: Scorer):
    meters = []
    for n in (1, 6):
        meters.append(Meter())
        best_of_n(engine, scorer, PROMPTS, n, SAMPLING)
    assert meters[1].generated_tokens > 3 * meters[0].generated_tokens
    assert meters[1].flops > 3 * meters[0].flops
    repeated, both = [p for p in PROMPTS for _ in range(6)], Meter()
    drawn = engine.generate(repeated, SAMPLING).ids
    alone = both.flops
    scorer.score_all(repeated, drawn)
    assert meters[1].flops == pytest.approx(both.flops)
    assert both.flops > alone > 0


class Dice:
    """Draws one of `weights` at each call, as a completion of one token."""

    def __init__(self, weights: list[float], model: torch.nn.Module):
        self.weights, self.model = torch.tensor(weights), model

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> Completions:
        generator = torch.Generator().manual_seed(sampling.seed)
        drawn = torch.multinomial(self.weights, len(prompts), True, generator=generator)
        logprobs = [[p] for p in self.weights[drawn].log().tolist()]
        return Completions([[int(token)] for token in drawn], [False] * len(prompts), logprobs)


class Taste:
    """Prefers the higher token."""

    pad_id = 0

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def score_all(self, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
        return torch.tensor([float(c[0]) for c in completions])


@pytest.mark.parametrize("n", [2, 4, 16])
def test_its_distribution_is_the_closed_form_and_its_kl_below_the_bound(engine: HFEngine, n: int):
    """P(best = k) = F(k)^n - F(k-1)^n, of which the KL to the sampler is at most the bound."""
    weights = [0.4, 0.3, 0.2, 0.1]
    count = 20_000
    dice, taste = Dice(weights, engine.model), Taste(engine.model)
    found = best_of_n(dice, taste, [[5]] * count, n, SAMPLING)  # pyright: ignore
    shares = torch.bincount(torch.tensor([c[0] for c in found.ids]), minlength=4) / count
    cumulative = [0.0, 0.4, 0.7, 0.9, 1.0]
    truth = [b**n - a**n for a, b in itertools.pairwise(cumulative)]
    for share, p in zip(shares.tolist(), truth, strict=True):
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / count) + 1e-9
    kl = sum(p * math.log(p / w) for p, w in zip(truth, weights, strict=True) if p > 0)
    assert kl < best_of_n_kl(n)
