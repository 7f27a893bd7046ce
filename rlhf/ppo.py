"""PPO with a KL penalty to the reference: rollout and update in numbered steps.

Schulman et al. 2017 (arXiv:1707.06347), as Ziegler et al. 2019 (arXiv:1909.08593) put it to
language models and Huang et al. 2024 (arXiv:2403.17031) wrote it down. Not here: value and policy
in one trunk, sampling that overlaps with training, and truncated sampling (top-p), which would
make the sampled distribution differ from the one that is scored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.losses import explained_variance, gae, policy_loss, shaped_rewards, value_loss, whiten
from shared.config import Config
from shared.cost import Meter
from shared.fit import (
    Diverged,
    OptimizerConfig,
    Trainee,
    batches,
    checkpoint_steps,
    prepare,
    step,
)
from shared.generation.engine import Sampling
from shared.generation.hf import HFEngine
from shared.kl import k1, k3, masked_sum
from shared.logprobs import (
    Sequences,
    by_length,
    collate,
    completion_logits,
    gather_logprobs,
    token_logprobs,
)
from shared.models import (
    Scorer,
    frozen,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    save,
    special_ids,
    state_values,
)
from shared.stages import write_json
from shared.tasks.registry import TaskConfig, make_task


class PPOConfig(Config):
    """`kl_coef` is in score units (SFT within-prompt deviations) per nat.

    With `kl_target` (nats a sequence) the coefficient adapts, else it stays. `max_approx_kl` ends
    one update's epochs early; `max_kl` ends the run.
    """

    episodes: int = Field(default=10240, gt=0)
    rollout_size: int = Field(default=512, gt=0)
    epochs: int = Field(default=2, gt=0)
    minibatch_size: int = Field(default=128, gt=0)
    micro_batch_size: int = Field(default=64, gt=0)
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
    whiten_rewards: bool = False
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    max_approx_kl: float = Field(default=0.1, gt=0)
    max_kl: float = Field(default=60.0, gt=0)


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


class Rollout(NamedTuple):
    """One batch of episodes; (B, T) over completion tokens, 0 outside the mask."""

    sequences: Sequences
    logprobs: Tensor  # (B, T) of the policy that sampled
    ref_logprobs: Tensor  # (B, T)
    values: Tensor  # (B, T)
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T)

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


@dataclass
class Actors:
    """The four models of PPO: two that train, two that do not."""

    policy: Trainee
    value: Trainee
    ref: PreTrainedModel
    scorer: Scorer
    engine: HFEngine
    pad_id: int
    temperature: float
    meter: Meter


def train_ppo(
    folder: Path,
    policy: Path,
    reward_model: Path,
    task: TaskConfig,
    ppo: PPOConfig,
    kl_coef: float,
    sampling: Sampling,
    checkpoints: Sequence[float],
    seed: int,
) -> None:
    """Stage: the policy after PPO in `final`, on the way in `checkpoint-<update>`, and its log."""
    tokenizer, meter = load_tokenizer(policy), Meter()
    updates = max(1, ppo.episodes // ppo.rollout_size)
    actors = make_actors(policy, reward_model, ppo, sampling, updates, meter)
    controller = KLController(kl_coef, ppo.kl_target, ppo.kl_horizon)
    prompts = prompt_stream(tokenizer, task, ppo, seed)
    save_after = checkpoint_steps(updates, checkpoints)
    log, stopped, failure = [], False, ""
    for update in range(1, updates + 1):
        # 1. sample a completion for each prompt of the batch
        with meter.phase("generate"):
            draw = sampling.model_copy(update={"seed": seed * 100_000 + update})
            batch = next(prompts)
            completions = actors.engine.generate(batch, draw)
            lengths = [*map(len, batch)], [*map(len, completions.ids)]
            meter.generation(actors.policy.model, *lengths)
        # 2. score it: reward model, reference, value model, and the policy that sampled
        with meter.phase("score"):
            rollout, scores, entropy = score_rollout(actors, batch, completions.ids)
        # 3. a completion without EOS pays for it
        truncated = torch.tensor(completions.truncated)
        penalised = scores - ppo.missing_eos_penalty * truncated
        # 4. reward = score at the last token - kl_coef * KL at each token
        mask = rollout.sequences.mask
        kl = k1(rollout.logprobs, rollout.ref_logprobs)
        rewards = shaped_rewards(penalised, kl, mask, kl_coef=controller.coef)
        if ppo.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        # 5. advantages and returns; returns before the advantages are whitened
        advantages, returns = gae(rewards, rollout.values, mask, gamma=ppo.gamma, lam=ppo.lam)
        rollout = rollout._replace(advantages=whiten(advantages, mask), returns=returns)
        # 6. several epochs of clipped updates
        with meter.phase("update"):
            try:
                numbers = update_models(actors, rollout, ppo, seed * 100_000 + update)
            except Diverged as error:  # a result, not a crash: the last good weights are evaluated
                failure = str(error)
                break
        # 7. log under the field's names; adapt the penalty; stop a runaway
        numbers |= rollout_numbers(rollout, scores, truncated)
        sequence_kl = numbers["objective/kl"]
        numbers["objective/rlhf_reward"] = (penalised - controller.coef * kl.sum(1)).mean().item()
        numbers["objective/entropy"] = entropy
        numbers["ppo/kl_coef"] = controller.coef
        log.append({"episodes": update * ppo.rollout_size, **numbers})
        controller.update(sequence_kl, ppo.rollout_size)
        if update in save_after:
            save(actors.policy.model, tokenizer, folder / f"checkpoint-{update}")
        if sequence_kl > ppo.max_kl:
            stopped = True
            break
    save(actors.policy.accelerator.unwrap_model(actors.policy.model), tokenizer, folder / "final")
    points = {f"checkpoint-{u}": share for u, share in save_after.items() if u <= len(log)}
    write_json(folder / "checkpoints.json", {**points, "final": 1.0})
    write_json(folder / "log.json", log)
    write_json(folder / "stopped.json", {"failed": failure, "stopped_early": stopped})
    write_json(folder / "cost.json", {**meter.summary(), "labels_used": 0})


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


def make_actors(
    policy: Path, reward_model: Path, ppo: PPOConfig, sampling: Sampling, updates: int, meter: Meter
) -> Actors:
    """Policy and reference from the SFT model, value model and scorer from the reward model."""
    ids = special_ids(load_tokenizer(policy))
    steps = updates * ppo.epochs * -(-ppo.rollout_size // ppo.minibatch_size)
    start = load_policy(policy)
    value_optimizer = ppo.optimizer.model_copy(update={"learning_rate": ppo.value_learning_rate})
    scorer = Scorer(reward_model)
    value = load_scalar_model(reward_model)
    with torch.no_grad():  # the value model starts as the reward model in its normalised units
        value.score.weight /= scorer.scale  # pyright: ignore
    meter.models_held = 4
    trainee = prepare(start, ppo.optimizer, steps)
    engine = HFEngine(trainee.model, ids)
    return Actors(
        policy=trainee,
        value=prepare(value, value_optimizer, steps),
        ref=frozen(start),
        scorer=scorer,
        engine=engine,
        pad_id=ids.pad,
        temperature=sampling.temperature,
        meter=meter,
    )


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


@torch.no_grad()
def score_rollout(
    actors: Actors, prompts: list[list[int]], completions: list[list[int]]
) -> tuple[Rollout, Tensor, float]:
    """(rollout without advantages, scores (B,), entropy in nats a token), of fresh samples."""
    whole = collate(prompts, completions, actors.pad_id)
    blank = torch.zeros(whole.mask.shape)
    rollout = Rollout(whole, *(blank.clone() for _ in range(5)))
    scores, entropy = torch.zeros(len(prompts)), 0.0
    for group in by_length([len(c) for c in completions], 256):
        index = torch.tensor(group)
        batch = rollout.rows(index).sequences
        columns = batch.mask.shape[1]
        logits = completion_logits(actors.policy.model, batch, actors.temperature)
        rollout.logprobs[index, :columns] = gather_logprobs(logits, batch)
        entropy += masked_sum(token_entropy(logits), batch.mask).sum().item()
        ref_logprobs = token_logprobs(actors.ref, batch, actors.temperature)
        rollout.ref_logprobs[index, :columns] = ref_logprobs
        values = state_values(actors.value.model, batch)
        rollout.values[index, :columns] = values.masked_fill(~batch.mask, 0.0)
        scores[index] = actors.scorer.score(batch)
        for model in (actors.policy.model, actors.ref, actors.value.model, actors.scorer.model):
            actors.meter.forward(model, batch)
    return rollout, scores, entropy / int(whole.mask.sum())


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of each next-token distribution, in nats: (..., V) -> (...)."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def update_models(actors: Actors, rollout: Rollout, ppo: PPOConfig, seed: int) -> dict[str, float]:
    """Epochs of minibatches over one rollout; returns the numbers averaged over minibatches."""

    def policy(model: PreTrainedModel, part: Rollout) -> tuple[Tensor, dict[str, float]]:
        actors.meter.forward(model, part.sequences, backward=True)
        mask = part.sequences.mask
        logprobs = token_logprobs(model, part.sequences, actors.temperature)
        return policy_loss(logprobs, part.logprobs, part.advantages, mask, clip=ppo.clip)

    def value(model: PreTrainedModel, part: Rollout) -> tuple[Tensor, dict[str, float]]:
        actors.meter.forward(model, part.sequences, backward=True)
        values, mask = state_values(model, part.sequences), part.sequences.mask
        return value_loss(values, part.values, part.returns, mask, clip=ppo.value_clip)

    sums: dict[str, list[float]] = {}
    for rows in batches(len(rollout.values), ppo.minibatch_size, ppo.epochs, seed):
        lengths = rollout.sequences.lengths[torch.tensor(rows)].tolist()
        parts = []
        for group in by_length(lengths, ppo.micro_batch_size):
            part = rollout.rows(torch.tensor([rows[i] for i in group]))
            parts.append((part, float(part.sequences.mask.sum())))
        numbers = step(actors.policy, parts, policy)
        value_numbers = step(actors.value, parts, value)
        numbers["loss/value_avg"] = value_numbers.pop("loss")
        numbers["ppo/val/grad_norm"] = value_numbers.pop("grad_norm")
        numbers["ppo/val/clipfrac"] = value_numbers["ppo/val/clipfrac"]
        for name, number in numbers.items():
            sums.setdefault(name, []).append(number)
        if numbers["ppo/policy/approxkl"] > ppo.max_approx_kl:
            break
    averages = {name: sum(numbers) / len(numbers) for name, numbers in sums.items()}
    averages["loss/policy_avg"] = averages.pop("loss")
    averages["ppo/first_ratio"] = sums["ppo/policy/ratio"][0]
    averages["ppo/minibatches"] = float(len(sums["loss"]))
    return averages
