"""The KL meter of evaluation against enumeration, on the task whose completions can be listed."""

import math
from typing import NamedTuple

import pytest
import torch
from checks import close
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.evaluation.evaluate import measure_kl
from benchmarks.evaluation.optimum import kl
from shared.data.listing import Listing, list_completions, listed_logps
from shared.generation.engine import Sampling
from shared.generation.hf import HFEngine
from shared.models.load import ModelConfig, new_policy, special_ids
from shared.models.packing import let_pack
from shared.models.sequences import Limit
from shared.tasks.exact import Exact, ExactConfig

TASK = Exact(ExactConfig())
TOKENIZER = TASK.tokenizer()
IDS = special_ids(TOKENIZER)
PAD, EOS = IDS.pad, IDS.eos
CAP = TASK.config.cap
PROMPTS = [TOKENIZER(text).input_ids for text in TASK.prompts("test", 8, 0)]
SAMPLES = 100_000


class World(NamedTuple):
    """Two policies, all completions, and what the meter reads off each of them."""

    policy: PreTrainedModel
    ref: PreTrainedModel
    listing: Listing
    logps: Tensor  # (prompts, completions) of the policy, float64
    truth: Tensor  # (prompts,) enumerated KL(policy || ref)


def random_policy(seed: int, scale: float) -> PreTrainedModel:
    """Weights so large that the next token depends on all the tokens before it."""
    model = new_policy(ModelConfig(hidden_size=32, layers=2, intermediate_size=64), TOKENIZER, seed)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 2:
                weights *= scale
    return let_pack(model.eval())


@pytest.fixture(scope="module", params=[(0, 6.0), (1, 10.0)], ids=["near", "far"])
def world(request: pytest.FixtureRequest) -> World:
    seed, scale = request.param
    policy, ref = random_policy(seed, scale), random_policy(seed + 10, scale)
    listing = list_completions(len(TOKENIZER), EOS, CAP)
    with torch.no_grad():
        logps, ref_logps = (listed_logps(m, PROMPTS, listing, PAD) for m in (policy, ref))
    truth = kl(logps, ref_logps)
    assert 0.3 < truth.mean() < 3
    return World(policy, ref, listing, logps, truth)


def metered(world: World, prompts: list[list[int]], completions: list[list[int]]):
    found = measure_kl(world.policy, world.ref, prompts, completions, PAD)
    found.pop("ref_logp")  # no estimate of KL
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def test_weighted_by_probability_the_meter_reads_the_enumerated_kl(world: World):
    """Each of the three: over all completions even the sampled estimators are exact."""
    completions = world.listing.completions
    rows = [prompt for prompt in PROMPTS for _ in completions]
    found = metered(world, rows, completions * len(PROMPTS))
    for values in found.values():
        expected = (world.logps.exp() * values.view(len(PROMPTS), -1)).sum(1)
        close(expected, world.truth, 1e-6)


def test_samples_read_the_enumerated_kl_within_three_standard_errors(world: World):
    """100,000 of the engine that evaluation samples with; the exact KL varies least."""
    rows = [PROMPTS[i % len(PROMPTS)] for i in range(SAMPLES)]
    engine = HFEngine(world.policy, special_ids(TOKENIZER), Limit(5000, 10**6))
    drawn = engine.generate(rows, Sampling(max_new_tokens=CAP, seed=0))
    assert 0.05 < sum(drawn.truncated) / SAMPLES < 0.95
    errors = {}
    for name, values in metered(world, rows, drawn.ids).items():
        by_prompt = values.view(-1, len(PROMPTS))
        errors[name] = math.sqrt(by_prompt.var(0).mean() / SAMPLES)
        assert abs(values.mean() - world.truth.mean()) < 3 * errors[name]
    assert errors["kl"] < min(errors["k1"], errors["k3"])
    assert errors["k1"] < 0.02 * world.truth.mean()  # so that a bias of 6 % would show
