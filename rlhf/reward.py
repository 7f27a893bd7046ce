"""The reward model: trained on labels, normalised on SFT samples, examined on held-out pairs."""

import shutil
from itertools import islice
from pathlib import Path

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.losses import bradley_terry_loss
from shared.config import Config, InputError
from shared.data.batches import Batch, PairRows
from shared.data.pairs import read_pairs
from shared.data.samples import read_samples
from shared.models import ranks
from shared.models.cost import Meter
from shared.models.folders import CHATS, NORMALISATION, require_folder
from shared.models.load import load_tokenizer, new_scalar_model, save, sequence_scores, special_ids
from shared.models.lora import LoRAConfig, with_lora
from shared.models.names import is_model_file, local_path
from shared.models.reward_files import require_scale, save_normalisation
from shared.models.scorer import scorer_of
from shared.models.sequences import Limit
from shared.seeds import seed_of
from shared.stages import write_json
from shared.training.finished import TrainingLog
from shared.training.fit import Diverged, Loss, OptimizerConfig, batches, prepare, step, steps_of
from shared.training.saves import Saves


class RewardConfig(Config):
    """Bradley-Terry training from the SFT policy's trunk."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4)
    """The optimiser of the reward model."""
    epochs: int = Field(default=3, gt=0)
    """Passes over the pairs."""
    batch_size: int = Field(default=32, gt=0)
    """Pairs in an optimiser step."""
    micro_batch_size: int = Field(default=32, gt=0)
    """Most pairs in one forward pass: changes memory and speed, never the step."""
    micro_batch_tokens: int = Field(default=2**14, gt=0)
    """Most tokens in one forward pass, padding included; a longer pair goes alone."""
    center: float = Field(default=0.0, ge=0)
    """Weight of (score of chosen + score of rejected)^2 in the loss, which keeps scores near 0."""
    pretrained: str | None = None
    """A reward model of one's own, a folder or hub name, in place of one that is trained here."""
    revision: str | None = None
    """Branch, tag or commit of `pretrained` on the hub; by default its main branch."""
    lora: LoRAConfig | None = None
    """Low-rank adapters of the reward model, merged when it is saved; its head trains whole."""
    normalise: bool = True
    """Divide scores by their standard deviation within a prompt on SFT samples; else they stay
    log-odds, as they were learnt."""

    @property
    def limit(self) -> Limit:
        """What one pass holds: `micro_batch_size` pairs."""
        return Limit(2 * self.micro_batch_size, self.micro_batch_tokens)


def train_reward(
    folder: Path, policy: Path, preferences: Path, references: Path, reward: RewardConfig, seed: int
) -> None:
    """Stage: a reward model (plain one-label sequence classifier) with its normalisation and log.

    `references` holds `samples.jsonl`: SFT samples, several a prompt, on which scores are centred
    and scaled.
    """
    tokenizer, meter = load_tokenizer(policy), Meter()
    pairs = read_pairs(preferences / "train.jsonl")
    rows = PairRows(pairs, special_ids(tokenizer).pad, reward.limit)
    steps = steps_of(len(pairs), reward.batch_size, reward.epochs)
    model = new_scalar_model(policy, seed_of(seed, "reward head"))
    model = with_lora(model, reward.lora, seed_of(seed, "reward adapter"))
    trainee, saves = prepare(model, reward.optimizer, steps), Saves(folder, meter)
    saves.follow(reward=trainee)
    log = TrainingLog(folder, steps, kept=saves.steps)
    loss, order = reward_loss(reward.center), seed_of(seed, "reward batches")
    with meter.phase("train"):
        drawn = batches(len(pairs), reward.batch_size, reward.epochs, order)
        for numbers in islice(drawn, saves.steps, None):
            own, counts = ranks.part(numbers)
            micro_batches = [(batch, counts * batch.chosen) for batch in rows.of_pairs(own)]
            try:
                log.add(step(trainee, micro_batches, loss))
            except Diverged as error:  # nothing that scores can go on without it
                fix = "lower `reward.optimizer.learning_rate`"
                raise Diverged(f"reward model, step {len(log) + 1}: {error}; {fix}") from error
            saves.step_done(len(log))
    save(trainee.model, tokenizer, folder)
    with meter.phase("normalise"), ranks.alone():
        if ranks.is_first():  # who has saved it
            ends = special_ids(tokenizer, policy).ends
            normalise(folder, references, scaled=reward.normalise, ends=ends)
    write_json(folder / "cost.json", {**meter.summary(), "labels_used": len(pairs)})


def take_reward(
    folder: Path,
    reward_model: str,
    revision: str | None,
    policy: Path,
    references: Path,
    chats: Path | None = None,
) -> None:
    """Stage: a reward model from elsewhere, as it is, with the normalisation measured here.

    `reward_model` is a folder or hub name, also as TRL's RewardTrainer saved it; `references` holds
    samples of `policy`, several a prompt. `chats` holds `chats.jsonl`, the messages of all prompts
    that it will score, if they are chats: every scorer of the folder finds them in it.
    """
    source = local_path(reward_model, revision)
    require_folder(source, "reward model")
    for file in sorted(source.iterdir()):
        if is_model_file(file) and file.name != NORMALISATION:
            shutil.copy(file, folder / file.name)
    if chats is not None:
        shutil.copy(chats / CHATS, folder / CHATS)
    try:
        normalise(folder, references, policy=policy)
    except InputError as error:  # of the copy, whose folder goes with the stage
        raise InputError(str(error).replace(str(folder), str(source))) from error


def reward_loss(center: float) -> Loss[Batch]:
    """Bradley-Terry on raw scores, for `step`."""

    def loss(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = sequence_scores(model, batch.sequences).chunk(2)
        accuracy = (chosen > rejected).float().mean()
        p = batch.p.to(chosen.device)
        losses = p * bradley_terry_loss(chosen, rejected, center=center)
        if (p < 1).any():  # labels with their probability
            losses = losses + (1 - p) * bradley_terry_loss(rejected, chosen, center=center)
        margin = (chosen - rejected).detach().mean()
        return losses.mean(), {"accuracy": accuracy, "margin": margin}

    return loss


def normalise(
    folder: Path,
    references: Path,
    *,
    scaled: bool = True,
    policy: Path | None = None,
    ends: frozenset[int] | None = None,
) -> None:
    """Measure `offset` (mean raw score) and `scale` (within-prompt deviation) on SFT samples.

    Not `scaled`: the scale is 1. `policy`: whose tokens they are, if not the reward model's own.
    `ends`: of a reward model that was trained here, what ended answers in its training.
    InputError where the scores do not differ.
    """
    samples, scorer = read_samples(references), scorer_of(folder, policy)
    count = len(samples[0].completions)
    prompts = [row.prompt_ids for row in samples for _ in range(count)]
    raw = scorer.score_all(prompts, [c for row in samples for c in row.completions])
    raw = raw.view(len(samples), count)
    deviation = raw.var(1, unbiased=True).mean().sqrt().item()
    require_scale(folder, raw.mean().item(), deviation)
    save_normalisation(folder, raw.mean().item(), deviation if scaled else 1.0, ends)


def examine_reward(
    folder: Path,
    reward_model: Path,
    pairs: Path,
    policy: Path | None = None,
) -> None:
    """Stage: `scores.json`, what the report says of the reward model is computed from.

    Raw (Bradley-Terry) scores of both sides, the true P(a wins) or the label, gold, and lengths.
    `policy`: whose tokens the pairs are, if not the reward model's own.
    """
    rows, scorer = read_pairs(pairs / "pairs.jsonl"), scorer_of(reward_model, policy)
    prompts = [p.prompt_ids for p in rows]
    a = scorer.score_all(prompts, [p.chosen_ids for p in rows]) * scorer.scale + scorer.offset
    b = scorer.score_all(prompts, [p.rejected_ids for p in rows]) * scorer.scale + scorer.offset
    write_json(
        folder / "scores.json",
        {
            "score_a": a.tolist(),
            "score_b": b.tolist(),
            "p_a_wins": [p.p for p in rows],
            "gold_a": [p.chosen_gold for p in rows],
            "gold_b": [p.rejected_gold for p in rows],
            "length_a": [len(p.chosen_ids) for p in rows],
            "length_b": [len(p.rejected_ids) for p in rows],
            "scale": scorer.scale,
        },
    )
