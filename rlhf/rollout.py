"""One batch of PPO's experience: the four models, and what they say of fresh samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.losses import explained_variance
from shared.config import InputError
from shared.generation.engine import Engine
from shared.generation.start import Drawing, make_engine
from shared.kl import k1, k3, masked_mean, masked_sum
from shared.models import ranks
from shared.models.cost import Meter
from shared.models.load import (
    Start,
    frozen,
    load_scalar_model,
    load_tokenizer,
    scalar_head,
    special_ids,
    state_values,
)
from shared.models.logprobs import logprobs_and_values, policy_values, token_logprobs
from shared.models.lora import LoRAConfig, add_value_head, with_lora
from shared.models.packing import packs
from shared.models.scorer import Scorer
from shared.models.sequences import SCORING, Sequences, by_length, collate
from shared.seeds import seed_of
from shared.tasks.task import Task
from shared.training.fit import OptimizerConfig, Trainee, arithmetic, prepare


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
    """The models of PPO: two that train, the reference, and what scores.

    Without a value model the policy has a value head on its own trunk; without a copy as reference
    it is the policy with its adapter off.
    """

    policy: Trainee
    value: Trainee | None
    ref: PreTrainedModel | None
    scorer: Scorer | GoldScorer
    engine: Engine
    pad_id: int
    temperature: float
    meter: Meter

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """The model that the policy was at the start."""
        if self.ref is not None:
            yield self.ref
        else:
            with self.policy.model.disable_adapter():  # pyright: ignore[reportCallIssue]
                yield self.policy.model

    def reference_pass(self, batch: Sequences) -> Tensor:
        """The reference's log-probabilities, (B, T)."""
        with self.reference() as ref:
            return ranks.run(token_logprobs, ref, batch, self.temperature)

    def value_pass(self, batch: Sequences) -> Tensor:
        """V before each completion token, (B, T)."""
        if self.value is None:
            return ranks.run(policy_values, self.policy.model, batch)
        return ranks.run(state_values, self.value.model, batch)

    def policy_and_value_pass(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        """(log-probabilities of the policy, V), (B, T) each: one pass where they share a trunk."""
        if self.value is None:
            return ranks.run(logprobs_and_values, self.policy.model, batch, self.temperature)
        logprobs = ranks.run(token_logprobs, self.policy.model, batch, self.temperature)
        return logprobs, self.value_pass(batch)


@dataclass(frozen=True)
class Optimizers:
    """How policy and value model are stepped; with a `shared_trunk` one step trains both."""

    policy: OptimizerConfig
    value: OptimizerConfig
    steps: int
    shared_trunk: bool = False
    value_lora: LoRAConfig | None = None


def make_actors(
    start: Start, judge: Path | GoldScorer, optimizers: Optimizers, drawing: Drawing, meter: Meter
) -> Actors:
    """Policy and reference from the SFT model, value model and scorer from the reward model.

    `judge`: a reward model's folder, or what takes its place; then the value model starts from the
    SFT model too, as it does where the reward model reads other tokens. With a shared trunk there
    is none, with LoRA no copy as reference.
    """
    tokenizer, model = load_tokenizer(start.policy), start.load()
    ids, shared_trunk = special_ids(tokenizer, start.policy), optimizers.shared_trunk
    ref = None if start.lora else frozen(model).to(getattr(torch, start.dtype))
    if shared_trunk:
        if not packs(model):
            raise InputError(
                f"{start.policy}: a model of type {model.config.model_type} cannot share its trunk "
                "with PPO's value function; set `ppo.shared_trunk` to false"
            )
        add_value_head(model)
    trainee = prepare(model, optimizers.policy, optimizers.steps)
    if isinstance(judge, GoldScorer):
        scorer, value = judge, None if shared_trunk else with_zero_head(start.policy)
    else:
        scorer = Scorer(judge, reader=tokenizer, ends=ids.ends, dtype=start.dtype)
        value = None if shared_trunk else first_values(start.policy, judge, scorer)
    if value is not None:
        value = with_lora(value, optimizers.value_lora, seed_of(start.seed, "value adapter"))
    models = trainee.model, value, ref, scorer.model
    meter.models_held = sum(model is not None for model in models)
    temperature = drawing.sampling.temperature
    return Actors(
        policy=trainee,
        value=None if value is None else prepare(value, optimizers.value, optimizers.steps),
        ref=ref,
        scorer=scorer,
        engine=make_engine(drawing.generation, trainee.model, ids, start.policy, temperature),
        pad_id=ids.pad,
        temperature=temperature,
        meter=meter,
    )


def first_values(policy: Path, reward_model: Path, scorer: Scorer) -> PreTrainedModel:
    """The value model: from the reward model if it reads the policy's tokens, else the policy."""
    return with_zero_head(policy) if scorer.by_text else value_model(reward_model, scorer)


def value_model(reward_model: Path, scorer: Scorer) -> PreTrainedModel:
    """The reward model with a head in normalised units: V = (raw - offset) / scale at the start."""
    value = load_scalar_model(reward_model)
    raw, head = scalar_head(value), new_head_of(value)
    with torch.no_grad():
        head.weight.copy_(raw.weight / scorer.scale)
        offset = scorer.offset if raw.bias is None else scorer.offset - raw.bias
        head.bias.fill_(-offset / scorer.scale)
    value.score = head
    return value


def with_zero_head(policy: Path) -> PreTrainedModel:
    """A value model that starts at V = 0."""
    value = load_scalar_model(policy, new_head=True)
    head = new_head_of(value)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    value.score = head
    return value


def new_head_of(value: PreTrainedModel) -> torch.nn.Linear:
    """A head with a bias in the place of the scalar head, its weights to be set."""
    old = scalar_head(value)
    return torch.nn.Linear(old.in_features, 1, device=old.weight.device)


@torch.no_grad()
def score_rollout(
    actors: Actors,
    prompts: list[list[int]],
    completions: list[list[int]],
    sampled: list[list[float]] | None = None,
) -> tuple[Rollout, Tensor]:
    """(rollout without advantages, scores (B,)) of fresh samples.

    `sampled`: their log-probabilities, if the engine's are the policy's own; else the policy goes
    over its samples once more.
    """
    device = actors.policy.model.device
    episodes = collate(prompts, completions, actors.pad_id).to(device)
    blank = torch.zeros(episodes.mask.shape, device=device)
    rollout = Rollout(episodes, *(blank.clone() for _ in range(5)), weights=torch.ones_like(blank))
    if sampled is not None:
        rollout = rollout._replace(logprobs=as_rows(sampled, episodes))
    scores = actors.scorer.score_all(prompts, completions).to(device)
    own, weight = ranks.part(range(len(prompts)))
    lengths = [len(completions[i]) for i in own], [len(prompts[i]) for i in own]
    for group, counts in ranks.evenly(list(by_length(*lengths, SCORING))):
        index = torch.tensor([own[i] for i in group])
        batch = rollout.rows(index).sequences
        columns = batch.mask.shape[1]
        with arithmetic(actors.policy.precision):  # as in the update
            if sampled is None:
                logprobs, values = actors.policy_and_value_pass(batch)
            else:
                logprobs, values = None, actors.value_pass(batch)
            ref_logprobs = actors.reference_pass(batch)
        if counts and weight:
            rollout.ref_logprobs[index, :columns] = ref_logprobs
            rollout.values[index, :columns] = values
            if logprobs is not None:
                rollout.logprobs[index, :columns] = logprobs
    return together(rollout, sampled is None), scores


def together(rollout: Rollout, logprobs: bool) -> Rollout:
    """What each rank found of its own rows, put together: the `logprobs` too if they are found."""
    return rollout._replace(
        ref_logprobs=ranks.total(rollout.ref_logprobs),
        values=ranks.total(rollout.values),
        logprobs=ranks.total(rollout.logprobs) if logprobs else rollout.logprobs,
    )


def as_rows(numbers: list[list[float]], batch: Sequences) -> Tensor:
    """One number a completion token of `batch`, as (B, T): 0 after each row's last."""
    return batch.spread(torch.tensor([*chain(*numbers)], device=batch.ids.device))


def compare_engine(
    rollout: Rollout, sampled: list[list[float]], cap: float | None
) -> tuple[Rollout, dict[str, float]]:
    """(rollout with importance weights, how far policy and engine are apart), token by token.

    `sampled`: the engine's log-probabilities. A weight is min(cap, p_policy / p_engine), Yao et al.
    2025, "Your efficient RL framework secretly brings you off-policy RL training"; without `cap`
    it is 1.
    """
    mask = rollout.sequences.mask
    log_ratio = (rollout.logprobs - as_rows(sampled, rollout.sequences)).masked_fill(~mask, 0.0)
    numbers = {
        "generation/logprob_difference": masked_mean(log_ratio.abs(), mask).item(),
        "generation/logprob_difference_max": log_ratio.abs().max().item(),
    }
    if cap is None:
        return rollout, numbers
    weights = log_ratio.exp().clamp(max=cap)
    return rollout._replace(weights=weights), numbers


def rollout_numbers(rollout: Rollout, scores: Tensor, truncated: Tensor) -> dict[str, float]:
    """What an episode looked like before the update, under the field's names."""
    mask = rollout.sequences.mask
    pair = rollout.logprobs, rollout.ref_logprobs
    return {
        "objective/kl": masked_sum(k1(*pair), mask).mean().item(),
        "objective/k3": masked_sum(k3(*pair), mask).mean().item(),
        "objective/entropy": -masked_mean(rollout.logprobs, mask).item(),  # nats a token
        "objective/scores": scores.mean().item(),
        "ppo/val/explained_variance": explained_variance(rollout.values, rollout.returns, mask),
        "ppo/completion_length": mask.sum(1).float().mean().item(),
        "ppo/missing_eos": truncated.float().mean().item(),
    }
