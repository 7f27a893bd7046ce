"""PPO with a KL penalty to the reference: rollout and update in numbered steps.

Schulman et al. 2017 (arXiv:1707.06347), as Ziegler et al. 2019 (arXiv:1909.08593) put it to
language models and Huang et al. 2024 (arXiv:2403.17031) wrote it down. Not here: sampling that
overlaps with training, and truncated sampling (top-p), which would make the sampled distribution
differ from the one that is scored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.losses import gae, policy_loss, shaped_rewards, value_loss, whiten
from rlhf.rollout import (
    Actors,
    GoldScorer,
    Optimizers,
    Rollout,
    compare_engine,
    make_actors,
    rollout_numbers,
    score_rollout,
)
from shared.config import Config, Misfit
from shared.generation.engine import EngineLost, Sampling
from shared.generation.start import Drawing
from shared.kl import k1
from shared.models import ranks
from shared.models.cost import Meter
from shared.models.load import Start, load_tokenizer, state_values
from shared.models.logprobs import logprobs_and_values, token_logprobs
from shared.models.lora import LoRAConfig
from shared.models.sequences import Limit, by_length
from shared.seeds import seed_of
from shared.tasks.registry import TaskInput, make_task
from shared.training.finished import Training, TrainingLog
from shared.training.fit import Diverged, OptimizerConfig, batches, checkpoint_steps, step
from shared.training.saves import Saves


class PPOConfig(Config):
    """PPO against a reward model; the KL penalty's coefficient, `kl_coef`, is an arm's setting, in
    score units per nat.
    """

    episodes: int = Field(default=10240, gt=0)
    """Completions that the whole training samples and scores, rounded down to full updates."""
    rollout_size: int = Field(default=512, gt=0)
    """Completions that one update samples, then trains on; at most `episodes`."""
    epochs: int = Field(default=2, gt=0)
    """Passes over the completions of an update."""
    minibatch_size: int = Field(default=128, gt=0)
    """Completions in an optimiser step."""
    micro_batch_size: int = Field(default=64, gt=0)
    """Most completions in one forward pass: changes memory and speed, never the step."""
    micro_batch_tokens: int = Field(default=2**14, gt=0)
    """Most tokens in one forward pass, padding included; a longer row goes alone."""
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=5e-4, schedule="constant", adam_epsilon=1e-5
    )
    """The optimiser of the policy and, at its own learning rate, of the value model."""
    value_learning_rate: float = Field(default=1e-3, gt=0)
    """Highest learning rate of the value model, where it is a model of its own."""
    value_lora: LoRAConfig | None = None
    """Low-rank adapters of the value model, whose head trains whole; else it trains whole."""
    kl_target: float | None = Field(default=None, gt=0)
    """KL to the reference, in nats a sequence, that `kl_coef` adapts towards; without one it
    stays as it is."""
    kl_horizon: int = Field(default=10000, gt=0)
    """Episodes over which `kl_coef` adapts to `kl_target`; more adapt it more slowly."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount factor gamma of rewards, per token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda: 1 takes the rewards that follow as they came (no bias, more variance), 0 trusts
    the value function one token on."""
    clip: float = Field(default=0.2, gt=0)
    """PPO's epsilon: the probability ratio stops mattering beyond 1 - clip and 1 + clip."""
    value_clip: float = Field(default=0.2, gt=0)
    """How far, in score units, a value may leave what it was at sampling before its loss clips."""
    shared_trunk: bool = False
    """Make the value function a second head of the policy, trained in the same step, instead of a
    model of its own that starts as the reward model."""
    vf_coef: float = Field(default=0.1, gt=0)
    """Weight of the value loss beside the policy loss, with `shared_trunk`."""
    reuse_logprobs: bool = True
    """Take the engine's log-probabilities where they are the policy's own: saves a forward pass."""
    whiten_rewards: bool = False
    """Scale the rewards of an update to variance 1, mean kept, before advantages."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Taken off the score of a completion that was cut at the length cap, in score units."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Cap of the importance weights that correct for an engine whose probabilities differ slightly
    from the policy's; without one there are no weights."""
    max_approx_kl: float = Field(default=0.1, gt=0)
    """KL of a minibatch to the policy that sampled, in nats a token, that ends an update early."""
    max_kl: float = Field(default=60.0, gt=0)
    """KL to the reference, in nats a sequence, that ends the training."""

    @model_validator(mode="after")
    def an_update_fits(self) -> "PPOConfig":
        if self.rollout_size > self.episodes:
            raise Misfit(
                f"{self.rollout_size} completions an update, but `episodes` is {self.episodes} in "
                f"all: lower `rollout_size` to {self.episodes} or less, or raise `episodes`",
                "rollout_size",
            )
        return self

    @model_validator(mode="after")
    def an_adapter_of_the_value_model_needs_one(self) -> "PPOConfig":
        if self.shared_trunk and self.value_lora is not None:
            raise Misfit("there is no value model with `shared_trunk`: leave it out", "value_lora")
        return self

    @property
    def limit(self) -> Limit:
        """What one pass of an update holds."""
        return Limit(self.micro_batch_size, self.micro_batch_tokens)

    def optimizers(self, updates: int) -> Optimizers:
        """Of `updates` updates; the value model's is the policy's at another rate."""
        minibatches = -(-self.rollout_size // self.minibatch_size)
        value = self.optimizer.model_copy(update={"learning_rate": self.value_learning_rate})
        steps = updates * self.epochs * minibatches
        return Optimizers(self.optimizer, value, steps, self.shared_trunk, self.value_lora)


@dataclass
class KLController:
    """The penalty's coefficient: fixed, or adapted towards a target KL a sequence.

    Ziegler et al. 2019, section 2.2: coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon.
    """

    coef: float
    target: float | None = None
    horizon: int = 10000

    def update(self, kl: float, episodes: int) -> None:
        """`kl`: nats summed over a sequence (never a token mean), averaged over `episodes`."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon


def train_ppo(
    folder: Path,
    start: Start,
    reward_model: Path | None,
    task: TaskInput,
    ppo: PPOConfig,
    kl_coef: float,
    drawing: Drawing,
    checkpoints: Sequence[float],
) -> None:
    """Stage: the policy after PPO in `final`, on the way in `checkpoint-<update>`, and its log.

    Without a `reward_model` the reward is the task's gold. If it is stopped, the next attempt goes
    on from its last save, and from the last update if the engine was lost.
    """
    tokenizer, meter, seed = load_tokenizer(start.policy), Meter(), start.seed
    updates = max(1, ppo.episodes // ppo.rollout_size)
    judge = reward_model or GoldScorer(make_task(task), tokenizer)
    actors = make_actors(start, judge, ppo.optimizers(updates), drawing, meter)
    saves = Saves(folder, meter)
    saves.follow(policy=actors.policy, value=actors.value)
    log = TrainingLog(folder, updates, kept=saves.steps)
    kl_coef = saves.place.get("kl_coef", kl_coef)
    controller = KLController(kl_coef, ppo.kl_target, ppo.kl_horizon)
    prompts = islice(prompt_stream(tokenizer, task, ppo, seed), len(log), None)
    save_after = checkpoint_steps(updates, checkpoints)
    training = Training(folder, actors.policy, tokenizer, log, save_after)
    stopped, failure = False, ""
    for update in range(len(log) + 1, updates + 1):
        draw = drawing.at(seed=seed_of(seed, "rollout", update)).sampling
        try:
            numbers = ppo_update(actors, next(prompts), ppo, controller.coef, draw)
        except EngineLost as error:
            saves.save(len(log), kl_coef=controller.coef)
            raise EngineLost(f"PPO, update {update} of {updates}: {error}") from error
        except Diverged as error:  # a result, not a crash: the last good weights are evaluated
            failure = str(error)
            break
        training.step_done({"episodes": update * ppo.rollout_size, **numbers})
        sequence_kl = numbers["objective/kl"]
        controller.update(sequence_kl, ppo.rollout_size)
        if sequence_kl > ppo.max_kl:
            stopped = True
            break
        saves.step_done(len(log), kl_coef=controller.coef)
    training.finish(meter, labels_used=0, failure=failure, stopped_early=stopped)


def ppo_update(
    actors: Actors,
    prompts: list[list[int]],
    ppo: PPOConfig,
    kl_coef: float,
    sampling: Sampling,
) -> dict[str, float]:
    """One update, from a batch of prompts to stepped weights; returns its numbers.

    `sampling.seed` is that of the update: its minibatches' comes from it.
    """
    meter = actors.meter
    # 1. sample a completion for each prompt of the batch, from the policy as it is now
    with meter.phase("generate"):
        stale = actors.engine.sync()
        completions = actors.engine.generate(prompts, sampling)
    # 2. score it: reward model, reference, value function, and the policy, if it must
    with meter.phase("score"):
        sampled, mismatch = completions.logprobs, {}
        taken = sampled if engine_is_exact(actors, ppo) else None
        rollout, scores = score_rollout(actors, prompts, completions.ids, taken)
        if taken is None:
            rollout, mismatch = compare_engine(rollout, sampled, ppo.importance_cap)
    # 3. a completion without EOS pays for it
    truncated = torch.tensor(completions.truncated, device=scores.device)
    penalised = scores - ppo.missing_eos_penalty * truncated
    # 4. reward = score at the last token - kl_coef * KL at each token
    mask = rollout.sequences.mask
    kl = k1(rollout.logprobs, rollout.ref_logprobs)
    rewards = shaped_rewards(penalised, kl, mask, kl_coef=kl_coef)
    if ppo.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    # 5. advantages and returns; returns before the advantages are whitened
    advantages, returns = gae(rewards, rollout.values, mask, gamma=ppo.gamma, lam=ppo.lam)
    rollout = rollout._replace(advantages=whiten(advantages, mask), returns=returns)
    # 6. several epochs of clipped updates
    with meter.phase("update"):
        numbers = update_models(actors, rollout, ppo, seed_of(sampling.seed, "minibatches"))
    # 7. what to log, under the field's names
    numbers |= rollout_numbers(rollout, scores, truncated)
    numbers["objective/rlhf_reward"] = (penalised - kl_coef * kl.sum(1)).mean().item()
    numbers["ppo/kl_coef"] = kl_coef
    numbers["generation/sync_difference"] = stale
    return {**numbers, **mismatch}


def engine_is_exact(actors: Actors, ppo: PPOConfig) -> bool:
    """Whether the engine's log-probabilities are taken for the policy's.

    Then the first minibatch, before any step, tells how far apart they are.
    """
    exact = actors.engine.exact and actors.policy.precision == "float32"
    return ppo.reuse_logprobs and exact and ppo.importance_cap is None


def prompt_stream(
    tokenizer, task: TaskInput, ppo: PPOConfig, seed: int
) -> Iterator[list[list[int]]]:
    """Batches of prompt ids, reshuffled on every pass over prompts for half of the episodes."""
    count = max(ppo.rollout_size, ppo.episodes // 2)
    source = make_task(task)
    ids = source.encode(tokenizer, source.prompts("ppo", count, seed))
    passes = -(-ppo.episodes // count) + 1
    for rows in batches(len(ids), ppo.rollout_size, passes, seed_of(seed, "order of prompts")):
        if len(rows) == ppo.rollout_size:
            yield [ids[i] for i in rows]


@dataclass
class Losses:
    """What a minibatch is stepped on, for the policy, the value model or both in one trunk."""

    actors: Actors
    ppo: PPOConfig
    largest: list[Tensor] = field(default_factory=list)  # policy to rollout, nats a token, a pass

    def policy(self, model: PreTrainedModel, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = token_logprobs(model, part.sequences, self.actors.temperature)
        return self._policy(logprobs, part)

    def value(self, model: PreTrainedModel, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        return self._value(state_values(model, part.sequences), part)

    def both(self, model: PreTrainedModel, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, values = logprobs_and_values(model, part.sequences, self.actors.temperature)
        loss, numbers = self._policy(logprobs, part)
        error, more = self._value(values, part)
        return loss + self.ppo.vf_coef * error, {**numbers, **more}

    def _policy(self, logprobs: Tensor, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        mask = part.sequences.mask
        differences = (logprobs.detach() - part.logprobs)[mask].abs()
        self.largest.append(differences.max())
        loss, numbers = policy_loss(
            logprobs,
            part.logprobs,
            part.advantages,
            mask,
            clip=self.ppo.clip,
            weights=part.weights,
        )
        numbers["generation/logprob_difference"] = differences.mean()
        return loss, {**numbers, "loss/policy_avg": loss.detach()}

    def _value(self, values: Tensor, part: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        mask = part.sequences.mask
        loss, numbers = value_loss(
            values, part.values, part.returns, mask, clip=self.ppo.value_clip
        )
        return loss, {**numbers, "loss/value_avg": loss.detach()}


def update_models(actors: Actors, rollout: Rollout, ppo: PPOConfig, seed: int) -> dict[str, float]:
    """Epochs of minibatches over one rollout; returns the numbers averaged over minibatches."""
    losses, sums, first = Losses(actors, ppo), {}, {}
    for rows in batches(len(rollout.values), ppo.minibatch_size, ppo.epochs, seed):
        own, counts = ranks.part(rows)
        lengths = rollout.sequences.lengths[torch.tensor(own)].tolist()
        before = rollout.sequences.prompt_lengths[torch.tensor(own)].tolist()
        parts = []
        for group in by_length(lengths, before, ppo.limit):
            part = rollout.rows(torch.tensor([own[i] for i in group]))
            parts.append((part, counts * sum(lengths[i] for i in group)))
        if actors.value is None:
            numbers = step(actors.policy, parts, losses.both)
        else:
            numbers = step(actors.policy, parts, losses.policy)
            of_value = step(actors.value, parts, losses.value)
            numbers["ppo/val/grad_norm"] = of_value["grad_norm"]
            for name in ("loss/value_avg", "ppo/val/clipfrac"):
                numbers[name] = of_value[name]
        if not first:  # nothing had been stepped: the policy was still the sampler
            furthest = torch.stack(losses.largest).max().item()
            first["ppo/first_ratio"] = numbers["ppo/policy/ratio"]
            first["ppo/first_policy_loss"] = numbers["loss/policy_avg"]
            first["ppo/first_value_loss"] = numbers["loss/value_avg"]
            first["generation/logprob_difference"] = numbers["generation/logprob_difference"]
            first["generation/logprob_difference_max"] = ranks.largest(furthest)
        for name, number in numbers.items():
            sums.setdefault(name, []).append(number)
        if numbers["ppo/policy/approxkl"] > ppo.max_approx_kl:
            break
    minibatches = float(len(sums.pop("loss")))
    averages = {name: sum(numbers) / len(numbers) for name, numbers in sums.items()}
    return {**averages, **first, "ppo/minibatches": minibatches}
