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
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.losses import gae, policy_loss, shaped_rewards, value_loss, whiten
from rlhf.pause import pause, paused, take_up
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
from shared.config import Config
from shared.generation.engine import EngineLost, Sampling
from shared.generation.start import Drawing
from shared.kl import k1
from shared.models.cost import Meter
from shared.models.load import Start, load_tokenizer, state_values
from shared.models.logprobs import logprobs_and_values, token_logprobs
from shared.models.sequences import Limit, by_length
from shared.tasks.registry import TaskConfig, make_task
from shared.training.finished import Training, TrainingLog
from shared.training.fit import Diverged, OptimizerConfig, batches, checkpoint_steps, step


class PPOConfig(Config):
    """`kl_coef` is in score units (SFT within-prompt deviations) per nat.

    With `kl_target` (nats a sequence) the coefficient adapts, else it stays. `importance_cap` turns
    on truncated importance weights, for an engine that samples from slightly other probabilities
    than the policy's. `max_approx_kl` ends one update's epochs early; `max_kl` ends the run.

    `shared_trunk`: the value function is a second head of the policy, from V = 0, and one step
    trains both, on policy loss + `vf_coef` * value loss, at the policy's rate (Ziegler et al.
    2019); else a model of its own, from the reward model. `reuse_logprobs`: an engine whose
    log-probabilities are the policy's own saves a pass over the samples. One pass of an update
    holds at most `micro_batch_size` rows and `micro_batch_tokens` tokens, padding included.
    """

    episodes: int = Field(default=10240, gt=0)
    rollout_size: int = Field(default=512, gt=0)
    epochs: int = Field(default=2, gt=0)
    minibatch_size: int = Field(default=128, gt=0)
    micro_batch_size: int = Field(default=64, gt=0)
    micro_batch_tokens: int = Field(default=2**14, gt=0)
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=5e-4, schedule="constant", adam_epsilon=1e-5
    )
    value_learning_rate: float = Field(default=1e-3, gt=0)
    kl_target: float | None = Field(default=None, gt=0)
    kl_horizon: int = Field(default=10000, gt=0)
    gamma: float = Field(default=1.0, gt=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1)
    clip: float = Field(default=0.2, gt=0)
    value_clip: float = Field(default=0.2, gt=0)
    shared_trunk: bool = False
    vf_coef: float = Field(default=0.1, gt=0)
    reuse_logprobs: bool = True
    whiten_rewards: bool = False
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    importance_cap: float | None = Field(default=None, gt=0)
    max_approx_kl: float = Field(default=0.1, gt=0)
    max_kl: float = Field(default=60.0, gt=0)

    @property
    def limit(self) -> Limit:
        """What one pass of an update holds."""
        return Limit(self.micro_batch_size, self.micro_batch_tokens)

    def optimizers(self, updates: int) -> Optimizers:
        """Of `updates` updates; the value model's is the policy's at another rate."""
        minibatches = -(-self.rollout_size // self.minibatch_size)
        value = self.optimizer.model_copy(update={"learning_rate": self.value_learning_rate})
        steps = updates * self.epochs * minibatches
        return Optimizers(self.optimizer, value, steps, self.shared_trunk)


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
    task: TaskConfig,
    ppo: PPOConfig,
    kl_coef: float,
    drawing: Drawing,
    checkpoints: Sequence[float],
) -> None:
    """Stage: the policy after PPO in `final`, on the way in `checkpoint-<update>`, and its log.

    Without a `reward_model` the reward is the task's gold. If the engine is lost, the next attempt
    goes on from the last update.
    """
    tokenizer, meter, seed = load_tokenizer(start.policy), Meter(), start.seed
    updates = max(1, ppo.episodes // ppo.rollout_size)
    judge = reward_model or GoldScorer(make_task(task), tokenizer)
    actors = make_actors(start, judge, ppo.optimizers(updates), drawing, meter)
    log = TrainingLog(folder, updates, goes_on=paused(folder))
    controller = KLController(take_up(folder, actors, kl_coef), ppo.kl_target, ppo.kl_horizon)
    prompts = islice(prompt_stream(tokenizer, task, ppo, seed), len(log), None)
    save_after = checkpoint_steps(updates, checkpoints)
    training = Training(folder, actors.policy, tokenizer, log, save_after)
    stopped, failure = False, ""
    for update in range(len(log) + 1, updates + 1):
        draw = drawing.sampling.model_copy(update={"seed": seed * 100_000 + update})
        try:
            numbers = ppo_update(actors, next(prompts), ppo, controller.coef, draw)
        except EngineLost as error:
            pause(folder, actors, controller.coef)
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
    training.finish(meter, labels_used=0, failure=failure, stopped_early=stopped)


def ppo_update(
    actors: Actors,
    prompts: list[list[int]],
    ppo: PPOConfig,
    kl_coef: float,
    sampling: Sampling,
) -> dict[str, float]:
    """One update, from a batch of prompts to stepped weights; returns its numbers.

    `sampling.seed` is that of the update: of its samples and of its minibatches.
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
        numbers = update_models(actors, rollout, ppo, sampling.seed)
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
    tokenizer, task: TaskConfig, ppo: PPOConfig, seed: int
) -> Iterator[list[list[int]]]:
    """Batches of prompt ids, reshuffled on every pass over prompts for half of the episodes."""
    count = max(ppo.rollout_size, ppo.episodes // 2)
    ids = [tokenizer(p).input_ids for p in make_task(task).prompts("ppo", count, seed)]
    passes = -(-ppo.episodes // count) + 1
    for rows in batches(len(ids), ppo.rollout_size, passes, seed):
        if len(rows) == ppo.rollout_size:
            yield [ids[i] for i in rows]


@dataclass
class Losses:
    """What a minibatch is stepped on, for the policy, the value model or both in one trunk."""

    actors: Actors
    ppo: PPOConfig
    differences: list[Tensor] = field(default_factory=list)  # policy to rollout, nats a token

    def policy(self, model: PreTrainedModel, part: Rollout) -> tuple[Tensor, dict[str, float]]:
        logprobs = token_logprobs(model, part.sequences, self.actors.temperature)
        return self._policy(logprobs, part)

    def value(self, model: PreTrainedModel, part: Rollout) -> tuple[Tensor, dict[str, float]]:
        return self._value(state_values(model, part.sequences), part)

    def both(self, model: PreTrainedModel, part: Rollout) -> tuple[Tensor, dict[str, float]]:
        logprobs, values = logprobs_and_values(model, part.sequences, self.actors.temperature)
        loss, numbers = self._policy(logprobs, part)
        error, more = self._value(values, part)
        return loss + self.ppo.vf_coef * error, {**numbers, **more}

    def _policy(self, logprobs: Tensor, part: Rollout) -> tuple[Tensor, dict[str, float]]:
        mask = part.sequences.mask
        self.differences.append((logprobs.detach() - part.logprobs)[mask].abs())
        loss, numbers = policy_loss(
            logprobs,
            part.logprobs,
            part.advantages,
            mask,
            clip=self.ppo.clip,
            weights=part.weights,
        )
        return loss, {**numbers, "loss/policy_avg": loss.item()}

    def _value(self, values: Tensor, part: Rollout) -> tuple[Tensor, dict[str, float]]:
        mask = part.sequences.mask
        loss, numbers = value_loss(
            values, part.values, part.returns, mask, clip=self.ppo.value_clip
        )
        return loss, {**numbers, "loss/value_avg": loss.item()}


def update_models(actors: Actors, rollout: Rollout, ppo: PPOConfig, seed: int) -> dict[str, float]:
    """Epochs of minibatches over one rollout; returns the numbers averaged over minibatches."""
    losses, sums, first = Losses(actors, ppo), {}, {}
    for rows in batches(len(rollout.values), ppo.minibatch_size, ppo.epochs, seed):
        lengths = rollout.sequences.lengths[torch.tensor(rows)].tolist()
        before = rollout.sequences.prompt_lengths[torch.tensor(rows)].tolist()
        parts = []
        for group in by_length(lengths, before, ppo.limit):
            part = rollout.rows(torch.tensor([rows[i] for i in group]))
            parts.append((part, float(part.sequences.mask.sum())))
        if actors.value is None:
            numbers = step(actors.policy, parts, losses.both)
        else:
            numbers = step(actors.policy, parts, losses.policy)
            of_value = step(actors.value, parts, losses.value)
            numbers["ppo/val/grad_norm"] = of_value["grad_norm"]
            for name in ("loss/value_avg", "ppo/val/clipfrac"):
                numbers[name] = of_value[name]
        if not first:  # nothing had been stepped: the policy was still the sampler
            differences = torch.cat(losses.differences)
            first["ppo/first_ratio"] = numbers["ppo/policy/ratio"]
            first["ppo/first_policy_loss"] = numbers["loss/policy_avg"]
            first["ppo/first_value_loss"] = numbers["loss/value_avg"]
            first["generation/logprob_difference"] = differences.mean().item()
            first["generation/logprob_difference_max"] = differences.max().item()
        for name, number in numbers.items():
            sums.setdefault(name, []).append(number)
        if numbers["ppo/policy/approxkl"] > ppo.max_approx_kl:
            break
    minibatches = float(len(sums.pop("loss")))
    averages = {name: sum(numbers) / len(numbers) for name, numbers in sums.items()}
    return {**averages, **first, "ppo/minibatches": minibatches}
