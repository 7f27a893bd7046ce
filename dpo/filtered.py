"""Filtered DPO: a pair stays while its chosen answer beats the policy's own sample.

Morimura et al. 2024 (arXiv:2404.13846), Algorithm 1. Before each epoch the policy answers every
remaining prompt once; a pair is kept iff reward(chosen) > reward(sample). Dropped pairs never
return. A floor keeps the set from emptying: below it the pairs that come closest are kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from dpo.train import Dataset, DirectConfig, finish, with_setting
from shared.config import Config
from shared.generation.engine import Engine, Sampling
from shared.generation.start import TRANSFORMERS, GenerationConfig, make_engine
from shared.models.load import Scorer, load_policy, save, special_ids
from shared.models.lora import LoRAConfig, with_lora
from shared.stages import write_json, write_jsonl
from shared.training.fit import Diverged, prepare, steps_of


class FilterConfig(Config):
    """What filtered DPO adds to DPO."""

    epochs: int = Field(default=2, gt=0)
    """Passes over the pairs; before each one those still there are filtered."""
    margin: float = 0.0
    """By how much the reward model's score of the chosen completion must exceed that of the
    policy's own sample for a pair to stay."""
    floor: float = Field(default=0.25, gt=0, le=1)
    """Least share of the original pairs that stays: those that come closest to the margin."""
    random: bool = False
    """Drop as many pairs without looking at them; an experiment takes this from its arm."""


def train_filtered(
    folder: Path,
    policy: Path,
    preferences: Path,
    reference: Path,
    reward_model: Path,
    setting: dict[str, float],
    direct: DirectConfig,
    filtering: FilterConfig,
    sampling: Sampling,
    checkpoints: Sequence[float],
    seed: int,
    generation: GenerationConfig = TRANSFORMERS,
    lora: LoRAConfig | None = None,
) -> None:
    """Stage: a policy trained by DPO on what the reward model keeps; `audit.jsonl` tells why.

    The schedule counts on what the first filtering leaves: where a later one drops more, training
    ends before it does. With `filtering.random` the same number of pairs goes each epoch, drawn
    blindly: what filtering gains beyond training on fewer pairs is the difference between the two.
    """
    direct = with_setting(direct, setting)
    data = Dataset(policy, preferences, reference, None, "dpo", setting, direct.limit)
    model, scorer = with_lora(load_policy(policy), lora, seed), Scorer(reward_model)
    special = special_ids(data.tokenizer)
    engine = make_engine(generation, model, special, policy, sampling.temperature)
    data.meter.models_held = 2
    trainee = None
    kept = list(range(len(data.pairs)))
    log, audit, epochs, saved, failure = [], [], [], {}, ""
    for epoch in range(filtering.epochs):
        draw = sampling.model_copy(update={"seed": seed * 1000 + epoch})
        with data.meter.phase("filter"):
            engine.sync()
            rows, floor_bound = judge(data, engine, scorer, kept, filtering, draw)
        kept = [row["pair"] for row in rows if row["kept"]]
        audit += [{"epoch": epoch, "id": data.pairs[row.pop("pair")].id, **row} for row in rows]
        share = len(kept) / len(data.pairs)
        epochs.append({"epoch": epoch, "kept_share": share, "floor_bound": floor_bound})
        if trainee is None:  # the schedule counts on what the first filtering leaves
            steps = steps_of(len(kept), direct.batch_size, filtering.epochs)
            trainee = prepare(model, direct.optimizer, steps)
        with data.meter.phase("train"):
            for batch in data.batches(kept, direct.batch_size, 1, draw.seed):
                try:
                    log.append(data.step(trainee, batch))
                except Diverged as error:  # a result: the last good weights are evaluated
                    failure = str(error)
                    break
        if failure:
            break
        if epoch + 1 < filtering.epochs and checkpoints:
            saved[len(log)] = (epoch + 1) / filtering.epochs
            save(model, data.tokenizer, folder / f"checkpoint-{len(log)}")
    write_jsonl(folder / "audit.jsonl", audit)
    write_json(folder / "filtering.json", epochs)
    finish(folder, model, data, log, saved, failure)


def judge(
    data: Dataset,
    engine: Engine,
    scorer: Scorer,
    pairs: list[int],
    filtering: FilterConfig,
    draw: Sampling,
) -> tuple[list[dict[str, Any]], bool]:
    """(one row a pair with both scores and whether it stays, whether the floor decided)."""
    prompts = [data.prompts[i] for i in pairs]
    samples = engine.generate(prompts, draw).ids
    data.meter.generation(engine.model, prompts, samples)
    chosen = scorer.score_all(prompts, [data.completions[i] for i in pairs])
    sampled = scorer.score_all(prompts, samples)
    floor = max(1, round(filtering.floor * len(data.pairs)))
    stays = keep(chosen, sampled, margin=filtering.margin, floor=floor)
    floor_bound = int(stays.sum()) > int((chosen - sampled > filtering.margin).sum())
    if filtering.random:
        stays = random_keep(stays, draw.seed)
    columns = zip(pairs, chosen.tolist(), sampled.tolist(), stays.tolist(), strict=True)
    rows = [{"pair": i, "chosen": c, "sample": s, "kept": stay} for i, c, s, stay in columns]
    return rows, floor_bound


def keep(chosen: Tensor, sampled: Tensor, *, margin: float = 0.0, floor: int = 1) -> Tensor:
    """Which pairs stay, (B,) bool: reward(chosen) > reward(sample) + margin, a tie goes.

    If fewer than `floor` pass, the `floor` pairs with the largest difference stay instead (all of
    them where there are no more).
    """
    advantage = chosen - sampled
    stays = advantage > margin
    if int(stays.sum()) < min(floor, len(stays)):
        stays = torch.zeros_like(stays)
        stays[advantage.topk(min(floor, len(stays))).indices] = True
    return stays


def random_keep(stays: Tensor, seed: int) -> Tensor:
    """As many pairs as `stays` keeps, drawn without looking at them, (B,) bool."""
    order = torch.randperm(len(stays), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros_like(stays)
    drawn[order[: int(stays.sum())]] = True
    return drawn
