"""One batch of PPO's experience: the four models, and what they say of fresh samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.losses import explained_variance
from shared.cost import Meter
from shared.fit import OptimizerConfig, Trainee, arithmetic, prepare
from shared.generation.engine import Engine
from shared.generation.start import TRANSFORMERS, GenerationConfig, make_engine
from shared.kl import k1, k3, masked_mean, masked_sum
from shared.logprobs import of_tokens, picked, token_logprobs
from shared.models import (
    Scorer,
    frozen,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    scalar_head,
    special_ids,
    state_values,
)
from shared.sequences import Sequences, by_length, collate
from shared.tasks.task import Task


class Rollout(NamedTuple):
    """One batch of episodes; (B, T) over completion tokens, 0 outside the mask."""

    sequences: Sequences
    logprobs: Tensor  # (B, T) of the policy that sampled
    ref_logprobs: Tensor  # (B, T)
    values: Tensor  # (B, T)
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T)
    weights: Tensor  # (B, T) of importance: the policy against the engine that sampled for it

    def rows(self, index: Tensor) -> "Rollout":
        """Some episodes, cut to their longest prompt and completion."""
        sequences = Sequences(*(t[index] for t in self.sequences))
        columns = int(sequences.lengths.max())
        width = self.sequences.mask.shape[1]
        left = int(sequences.attention[:, :-width].argmax(1).min())
        right = sequences.ids.shape[1] - (width - columns)
        trimmed = Sequences(
            sequences.ids[:, left:right],
            sequences.attention[:, left:right],
            sequences.mask[:, :columns],
        )
        return Rollout(trimmed, *(t[index, :columns] for t in self[1:]))


class GoldScorer:
    """The task's true score in the reward model's place: PPO without a reward model's errors."""

    model = None

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase):
        self.task, self.tokenizer = task, tokenizer

    def score_all(self, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
        """Gold of token ids, in the task's units, (N,)."""
        texts = (
            self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            for ids in (prompts, completions)
        )
        return torch.as_tensor(self.task.gold(*texts), dtype=torch.float32)


@dataclass
class Actors:
    """The models of PPO: two that train, the reference, and what scores."""

    policy: Trainee
    value: Trainee
    ref: PreTrainedModel
    scorer: Scorer | GoldScorer
    engine: Engine
    pad_id: int
    temperature: float
    meter: Meter


def make_actors(
    policy: Path,
    reward_model: Path | GoldScorer,
    optimizer: OptimizerConfig,
    value_optimizer: OptimizerConfig,
    steps: int,
    temperature: float,
    meter: Meter,
    generation: GenerationConfig = TRANSFORMERS,
) -> Actors:
    """Policy and reference from the SFT model, value model and scorer from the reward model.

    Where gold takes the reward model's place, the value model starts from the SFT model too.
    """
    ids, start = special_ids(load_tokenizer(policy)), load_policy(policy)
    ref = frozen(start)
    trainee = prepare(start, optimizer, steps)
    device = trainee.model.device
    if isinstance(reward_model, GoldScorer):
        scorer, value = reward_model, with_zero_head(policy)
    else:
        scorer = Scorer(reward_model, device)
        value = value_model(reward_model, scorer)
    meter.models_held = 3 if scorer.model is None else 4
    engine = make_engine(generation, trainee.model, ids, policy, temperature)
    return Actors(
        policy=trainee,
        value=prepare(value, value_optimizer, steps),
        ref=ref.to(device),  # pyright: ignore[reportArgumentType]
        scorer=scorer,
        engine=engine,
        pad_id=ids.pad,
        temperature=temperature,
        meter=meter,
    )


def value_model(reward_model: Path, scorer: Scorer) -> PreTrainedModel:
    """The reward model with a head in normalised units: V = (raw - offset) / scale at the start."""
    value = load_scalar_model(reward_model)
    raw, head = scalar_head(value), torch.nn.Linear(scalar_head(value).in_features, 1)
    with torch.no_grad():
        head.weight.copy_(raw.weight / scorer.scale)
        offset = scorer.offset if raw.bias is None else scorer.offset - raw.bias
        head.bias.fill_(-offset / scorer.scale)
    value.score = head
    return value


def with_zero_head(policy: Path) -> PreTrainedModel:
    """A value model that starts at V = 0."""
    value = load_scalar_model(policy)
    head = torch.nn.Linear(scalar_head(value).in_features, 1)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    value.score = head
    return value


@torch.no_grad()
def score_rollout(
    actors: Actors, prompts: list[list[int]], completions: list[list[int]]
) -> tuple[Rollout, Tensor, float]:
    """(rollout without advantages, scores (B,), entropy in nats a token), of fresh samples."""
    device = actors.policy.model.device
    whole = collate(prompts, completions, actors.pad_id).to(device)
    blank = torch.zeros(whole.mask.shape, device=device)
    rollout = Rollout(whole, *(blank.clone() for _ in range(5)), weights=torch.ones_like(blank))
    scores, entropy = actors.scorer.score_all(prompts, completions).to(device), 0.0
    for group in by_length([len(c) for c in completions], 256):
        index = torch.tensor(group)
        batch = rollout.rows(index).sequences
        columns = batch.mask.shape[1]
        with arithmetic(actors.policy.precision, device):  # as in the update
            both = of_tokens(actors.policy.model, batch, picked_and_entropy, actors.temperature)
            ref_logprobs = token_logprobs(actors.ref, batch, actors.temperature)
            values = state_values(actors.value.model, batch)
        rollout.logprobs[index, :columns] = batch.spread(both[:, 0])
        rollout.ref_logprobs[index, :columns] = ref_logprobs
        entropy += both[:, 1].sum().item()
        rollout.values[index, :columns] = values.masked_fill(~batch.mask, 0.0)
        for model in (actors.policy.model, actors.ref, actors.value.model, actors.scorer.model):
            if model is not None:
                actors.meter.forward(model, batch)
    return rollout, scores, entropy / int(whole.mask.sum())


def compare_engine(
    rollout: Rollout, sampled: list[list[float]], cap: float | None
) -> tuple[Rollout, dict[str, float]]:
    """(rollout with importance weights, how far policy and engine are apart), token by token.

    `sampled`: the engine's log-probabilities. A weight is min(cap, p_policy / p_engine), Yao et al.
    2025, "Your efficient RL framework secretly brings you off-policy RL training"; without `cap`
    it is 1.
    """
    mask, device = rollout.sequences.mask, rollout.logprobs.device
    width = mask.shape[1]
    engine = torch.tensor([row + [0.0] * (width - len(row)) for row in sampled], device=device)
    log_ratio = (rollout.logprobs - engine).masked_fill(~mask, 0.0)
    numbers = {
        "generation/logprob_difference": masked_mean(log_ratio.abs(), mask).item(),
        "generation/logprob_difference_max": log_ratio.abs().max().item(),
    }
    if cap is None:
        return rollout, numbers
    weights = log_ratio.exp().clamp(max=cap)
    return rollout._replace(weights=weights), numbers


def picked_and_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token and entropy of its distribution, (M, V), (M,) -> (M, 2)."""
    return torch.stack([picked(logits, tokens), token_entropy(logits)], 1)


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of each next-token distribution, in nats: (..., V) -> (...)."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def rollout_numbers(rollout: Rollout, scores: Tensor, truncated: Tensor) -> dict[str, float]:
    """What an episode looked like before the update, under the field's names."""
    mask = rollout.sequences.mask
    pair = rollout.logprobs, rollout.ref_logprobs
    return {
        "objective/kl": masked_sum(k1(*pair), mask).mean().item(),
        "objective/k3": masked_sum(k3(*pair), mask).mean().item(),
        "objective/scores": scores.mean().item(),
        "ppo/val/explained_variance": explained_variance(rollout.values, rollout.returns, mask),
        "ppo/completion_length": mask.sum(1).float().mean().item(),
        "ppo/missing_eos": truncated.float().mean().item(),
    }
