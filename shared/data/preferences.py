"""Preference pairs: sampled from a policy, labelled by the task, cleaned with counted reasons.

Pairs carry token ids from the sampler to the losses: nothing is decoded and encoded again.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from shared.config import Config, InputError, Misfit
from shared.data.pairs import Pair, clean, swapped
from shared.data.samples import answer, draw_samples, list_samples
from shared.data.splits import Split
from shared.generation.engine import Sampling
from shared.generation.start import Drawing
from shared.seeds import seed_of
from shared.stages import read_json, write_json, write_jsonl
from shared.tasks.registry import TaskConfig, TaskInput, make_task
from shared.tasks.task import Task

SPOILED = "spoiled.json"
SPOILERS = 8  # samples, of which the worst takes a chosen answer's place


class PreferenceConfig(Config):
    """Pairs of the SFT model's samples, and their labels; of the task `own`, the file's pairs."""

    source: Literal["data", "policy"] = "data"
    """Of the task `own`: the file's pairs, or the SFT model's samples, labelled by the judge."""
    pairs: int = Field(default=6000, gt=0)
    """Labelled pairs to train on, or twice as many single answers with a label; of a file with
    fewer, all that are there."""
    per_prompt: int = Field(default=1, gt=0)
    """Pairs drawn for each prompt, of two samples each."""
    held_out_pairs: int = Field(default=256, gt=0)
    """Further pairs, of other prompts, that displacement is measured on."""
    labels: Literal["bradley-terry", "shuffled", "exact"] = "bradley-terry"
    """Drawn from the gold scores; `shuffled`: tossed by a coin; `exact`: each pair carries its
    probability, as if it had been labelled infinitely often."""
    listed: bool = False
    """Draw pairs evenly from all completions of a finite task, not from the policy's samples."""
    spoiled: float = Field(default=0.0, ge=0, le=1)
    """Share of the training pairs whose chosen completion gives way to the worst, by gold, of eight
    further samples, and stays the chosen one: what a filter is there to find."""

    @model_validator(mode="after")
    def spoiled_pairs_are_drawn_and_labelled(self) -> "PreferenceConfig":
        if self.spoiled and self.labels == "exact":
            raise Misfit("an exact label says what is true, and spoiled pairs do not", "spoiled")
        return self


def make_preferences(
    folder: Path,
    task: TaskInput,
    policy: Path,
    data: PreferenceConfig,
    drawing: Drawing,
    seed: int,
) -> None:
    """Stage: `train.jsonl` and `held_out.jsonl`, samples of `policy` in labelled pairs.

    No prompt of the held-out pairs is among the training pairs', unless the task is finite: there
    prompts are few, and equal pairs with other labels are what the data says of them.
    """
    count = data.pairs + data.held_out_pairs
    rng = np.random.default_rng(seed_of(seed, "labels"))
    share = 1 if task.finite else 20  # some samples are identical
    prompts = -(-(count + max(64, count // share, 2 * data.per_prompt)) // data.per_prompt)
    if isinstance(task, TaskConfig) and data.listed:
        drawn = list_pairs(task, policy, prompts, drawing.sampling, seed)
    else:
        drawn = sample_pairs(task, policy, "preference", prompts, drawing, seed, data.per_prompt)
    labelled = label(drawn, make_task(task), data.labels, rng)
    pairs, dropped = clean(labelled, repeats=task.finite)
    train = pairs[: data.pairs]
    seen = set() if task.finite else {p.prompt for p in train}
    held_out = [p for p in pairs[data.pairs :] if p.prompt not in seen][: data.held_out_pairs]
    if len(held_out) < data.held_out_pairs:
        raise InputError(
            f"preferences: only {len(train) + len(held_out)} of {count} pairs are usable (dropped: "
            f"{dict(dropped)}); the policy repeats itself: ask for fewer pairs, or sample at a "
            f"higher temperature than {drawing.sampling.temperature:g}"
        )
    if data.spoiled:
        train, spoiled = spoil(train, data.spoiled, make_task(task), policy, drawing, seed)
        write_json(folder / SPOILED, spoiled)
    write_jsonl(folder / "train.jsonl", [p._asdict() for p in train])
    write_jsonl(folder / "held_out.jsonl", [p._asdict() for p in held_out])
    write_json(
        folder / "cleaning.json",
        {"drawn": len(drawn), "dropped": dict(dropped), "usable": len(pairs), "kept": count},
    )


def label(drawn: Sequence[Pair], task: Task, labels: str, rng: np.random.Generator) -> list[Pair]:
    """The pairs with their winners as chosen, or as drawn with the probability that they are."""
    gold = np.array([[p.chosen_gold, p.rejected_gold] for p in drawn]).T
    p_first_wins = task.preference(*gold)
    if labels == "exact":
        return [p._replace(p=share) for p, share in zip(drawn, p_first_wins.tolist(), strict=True)]
    if labels == "shuffled":
        p_first_wins = np.full(len(drawn), 0.5)
    first_wins = rng.random(len(drawn)) < p_first_wins
    return [p if won else swapped(p) for p, won in zip(drawn, first_wins, strict=True)]


def spoil(
    pairs: Sequence[Pair], share: float, task: Task, policy: Path, drawing: Drawing, seed: int
) -> tuple[list[Pair], list[str]]:
    """(the pairs, of which a share has a bad answer as the chosen one; the ids of these).

    The bad answer is the worst by gold of `SPOILERS` samples of the prompt that differ from the
    rejected one; a pair without any stays as it is, as one does whose chosen answer is no better.
    """
    rng = np.random.default_rng(seed_of(seed, "spoiled pairs"))
    picked = rng.permutation(len(pairs))[: round(share * len(pairs))].tolist()
    drawing = drawing.at(seed=seed_of(seed, "samples that spoil"))
    rows = answer(task, policy, [pairs[i].prompt for i in picked], SPOILERS, drawing)
    found, ids = list(pairs), []
    for i, row in zip(picked, rows, strict=True):
        pair = pairs[i]
        bad = [
            (gold, tokens)
            for gold, tokens in zip(row.gold, row.completions, strict=True)
            if gold is not None and tokens and tokens != pair.rejected_ids
        ]
        worst, completion = min(bad, key=lambda one: one[0], default=(math.inf, []))
        if pair.chosen_gold is not None and worst < pair.chosen_gold:
            found[i] = pair._replace(chosen_ids=completion, chosen_gold=worst)
            ids.append(pair.id)
    return found, ids


def read_spoiled(folder: Path) -> list[str]:
    """The ids of the spoiled pairs of a stage's folder."""
    path = folder / SPOILED
    return read_json(path) if path.is_file() else []


def make_reward_test(
    folder: Path,
    task: TaskInput,
    policy: Path,
    pairs: int,
    drawing: Drawing,
    seed: int,
) -> None:
    """Stage: `pairs.jsonl`, of other prompts, to examine reward models on: their labels are P(a
    wins).
    """
    drawn = sample_pairs(task, policy, "reward-test", pairs, drawing, seed)
    gold = np.array([[p.chosen_gold, p.rejected_gold] for p in drawn]).T
    shares = make_task(task).preference(*gold).tolist()
    drawn = [pair._replace(p=share) for pair, share in zip(drawn, shares, strict=True)]
    write_jsonl(folder / "pairs.jsonl", [p._asdict() for p in drawn])


def sample_pairs(
    task: TaskInput,
    policy: Path,
    split: Split,
    prompts: int,
    drawing: Drawing,
    seed: int,
    per_prompt: int = 1,
) -> list[Pair]:
    """`per_prompt` pairs of samples for each prompt with their gold scores, in the order drawn."""
    rows = draw_samples(task, policy, split, prompts, 2 * per_prompt, drawing, seed)
    return [
        Pair(
            id=f"{split}-{seed}-{number * per_prompt + first // 2}",
            prompt=row.prompt,
            prompt_ids=row.prompt_ids,
            chosen_ids=row.completions[first],
            rejected_ids=row.completions[first + 1],
            chosen_gold=row.gold[first],
            rejected_gold=row.gold[first + 1],
        )
        for number, row in enumerate(rows)
        for first in range(0, 2 * per_prompt, 2)
    ]


def list_pairs(
    task: TaskConfig, policy: Path, count: int, sampling: Sampling, seed: int
) -> list[Pair]:
    """`count` pairs of a finite task, each two different ones of all completions, drawn evenly."""
    rows = list_samples(task, policy, "preference", sampling, seed)
    rng = np.random.default_rng(seed_of(seed, "listed pairs"))
    pairs = []
    for number in range(count):
        row = rows[number % len(rows)]
        a, b = rng.choice(len(row.completions), 2, replace=False)
        pairs.append(
            Pair(
                id=f"listed-{seed}-{number}",
                prompt=row.prompt,
                prompt_ids=row.prompt_ids,
                chosen_ids=row.completions[a],
                rejected_ids=row.completions[b],
                chosen_gold=row.gold[a],
                rejected_gold=row.gold[b],
            )
        )
    return pairs
