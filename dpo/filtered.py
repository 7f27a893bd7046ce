"""Filtered DPO: a pair stays while its chosen answer beats the policy's own sample.

Morimura et al. 2024 (arXiv:2404.13846), Algorithm 1. Before each epoch the policy answers every
remaining prompt once; a pair is kept iff reward(chosen) > reward(sample). Dropped pairs never
return. A floor keeps the set from emptying: below it the pairs that come closest are kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from dpo.train import DirectConfig, DirectData, Objective, check_setting, split_setting
from shared.config import Config, InputError
from shared.data.pairs import Pair, read_pairs
from shared.generation.engine import Engine, Sampling
from shared.generation.start import Drawing, make_engine
from shared.models.cost import Meter
from shared.models.load import Start, load_tokenizer, special_ids
from shared.models.scorer import Scorer
from shared.seeds import seed_of
from shared.stages import write_json, write_jsonl
from shared.training.finished import Training, TrainingLog
from shared.training.fit import Diverged, prepare, steps_of
from shared.training.saves import Saves


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


@dataclass(frozen=True)
class Filter:
    """What decides which pairs stay: a reward model, on samples drawn in this way."""

    reward_model: Path
    config: FilterConfig
    drawing: Drawing


def train_filtered(
    folder: Path,
    start: Start,
    data: DirectData,
    filtering: Filter,
    setting: dict[str, float],
    direct: DirectConfig,
    checkpoints: Sequence[float],
) -> None:
    """Stage: a policy trained by DPO on what the reward model keeps; `audit.jsonl` tells why.

    The schedule counts on what the first filtering leaves: where a later one drops more, training
    ends before it does. With `random` the same number of pairs goes each epoch, drawn blindly: what
    filtering gains beyond training on fewer pairs is the difference between the two.
    """
    check_setting("dpo", setting)
    hyperparameters, direct = split_setting(setting, direct)
    meter, tokenizer, epochs = Meter(), load_tokenizer(start.policy), filtering.config.epochs
    special = special_ids(tokenizer, start.policy)
    pairs = read_pairs(data.preferences / "train.jsonl")
    objective = Objective(data, special.pad, "dpo", hyperparameters, direct.limit)
    model = start.load()
    scorer = Scorer(filtering.reward_model, reader=tokenizer, ends=special.ends, dtype=start.dtype)
    drawing, temperature = filtering.drawing, filtering.drawing.sampling.temperature
    engine = make_engine(drawing.generation, model, special, start.policy, temperature)
    meter.models_held = 2
    saves = Saves(folder, meter)
    at = Progress(**saves.place.get("progress", {"kept": [*range(len(pairs))]}))
    training, failure = None, ""
    for epoch in range(max(0, len(at.ends) - 1), epochs):
        if epoch == len(at.ends):  # else it was filtered before training stopped
            draw = drawing.at(seed=seed_of(start.seed, "filter", epoch)).sampling
            with meter.phase("filter"):
                engine.sync()
                found = judge(objective, engine, scorer, at.kept, filtering.config, draw)
            at.filtered(*found, pairs, direct.batch_size)
        if training is None:  # the schedule counts on what the first filtering leaves
            steps = at.ends[0] * epochs
            trainee = prepare(model, direct.optimizer, steps)
            saves.follow(policy=trainee)
            log = TrainingLog(folder, steps, kept=saves.steps)
            training = Training(folder, trainee, tokenizer, log, {})
        if checkpoints:
            ends = enumerate(at.ends[: epochs - 1], 1)
            training.save_after = {end: number / epochs for number, end in ends}
        with meter.phase("train"):
            order = seed_of(start.seed, "batches", epoch)
            drawn = objective.batches(at.kept, direct.batch_size, 1, order)
            for batch in islice(drawn, len(training.log) - at.begun, None):
                try:
                    training.step_done(objective.step(training.trainee, batch))
                except Diverged as error:  # a result: the last good weights are evaluated
                    failure = str(error)
                    break
                saves.step_done(len(training.log), progress=vars(at))
        if failure:
            break
    write_jsonl(folder / "audit.jsonl", at.audit)
    write_json(folder / "filtering.json", at.shares)
    assert training is not None
    training.finish(meter, labels_used=len(pairs), failure=failure)


@dataclass
class Progress:
    """Which pairs are left, and how it came to that: in plain values, to go on from."""

    kept: list[int]
    ends: list[int] = field(default_factory=list)  # the last step of each epoch that was filtered
    shares: list[dict[str, Any]] = field(default_factory=list)  # filtering.json
    audit: list[dict[str, Any]] = field(default_factory=list)

    @property
    def begun(self) -> int:
        """Steps before this epoch's first."""
        return self.ends[-2] if len(self.ends) > 1 else 0

    def filtered(
        self,
        rows: list[dict[str, Any]],
        floor_bound: bool,
        pairs: Sequence[Pair],
        batch_size: int,
    ) -> None:
        """Take what `judge` found at the beginning of an epoch."""
        epoch = len(self.ends)
        self.kept = [row["pair"] for row in rows if row["kept"]]
        self.audit += [{"epoch": epoch, "id": pairs[row.pop("pair")].id, **row} for row in rows]
        broken = sum(None in (row["chosen"], row["sample"]) for row in rows)
        share = len(self.kept) / len(pairs)
        counted = {"kept_share": share, "floor_bound": floor_bound, "not_finite": broken}
        self.shares.append({"epoch": epoch, **counted})
        last = self.ends[-1] if self.ends else 0
        self.ends.append(last + steps_of(len(self.kept), batch_size, 1))


def judge(
    objective: Objective,
    engine: Engine,
    scorer: Scorer,
    pairs: list[int],
    filtering: FilterConfig,
    draw: Sampling,
) -> tuple[list[dict[str, Any]], bool]:
    """(one row a pair with both scores and whether it stays, whether the floor decided)."""
    prompts = [objective.rows.prompts[i] for i in pairs]
    samples = engine.generate(prompts, draw).ids
    sides = [objective.rows.completions[i] for i in pairs]
    chosen = scorer.score_all(prompts, sides, finite=False)
    sampled = scorer.score_all(prompts, samples, finite=False)
    floor = max(1, round(filtering.floor * objective.rows.count))
    stays = keep(chosen, sampled, margin=filtering.margin, floor=floor)
    if not stays.any():
        raise InputError("filtered DPO: no pair has two scores that are numbers: see its scores")
    passing = keep(chosen, sampled, margin=filtering.margin, floor=0)
    floor_bound = int(stays.sum()) > int(passing.sum())
    if filtering.random:
        stays = random_keep(stays, seed_of(draw.seed, "kept blindly"))
    columns = zip(pairs, numbers(chosen), numbers(sampled), stays.tolist(), strict=True)
    rows = [{"pair": i, "chosen": c, "sample": s, "kept": stay} for i, c, s, stay in columns]
    return rows, floor_bound


def numbers(scores: Tensor) -> list[float | None]:
    """Scores for a file: None for one that is not a number."""
    return [score if math.isfinite(score) else None for score in scores.tolist()]


def keep(chosen: Tensor, sampled: Tensor, *, margin: float = 0.0, floor: int = 1) -> Tensor:
    """Which pairs stay, (B,) bool: reward(chosen) > reward(sample) + margin, a tie goes.

    If fewer than `floor` pass, the `floor` pairs with the largest difference stay instead (all of
    them where there are no more). A pair with a score that is not a finite number never stays.
    """
    sound = chosen.isfinite() & sampled.isfinite()
    advantage = (chosen - sampled).masked_fill(~sound, -math.inf)
    stays = advantage > margin
    least = min(floor, int(sound.sum()))
    if int(stays.sum()) < least:
        stays = torch.zeros_like(stays)
        stays[advantage.topk(least).indices] = True
    return stays


def random_keep(stays: Tensor, seed: int) -> Tensor:
    """As many pairs as `stays` keeps, drawn without looking at them, (B,) bool."""
    order = torch.randperm(len(stays), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros_like(stays)
    drawn[order[: int(stays.sum())]] = True
    return drawn
