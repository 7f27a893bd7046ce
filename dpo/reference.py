"""Reference log-probabilities: scored once per dataset and reference for all direct methods."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.config import InputError
from shared.data.batches import TRAINED_ON, Rows, read_rows
from shared.models.cost import Meter
from shared.models.load import WeightDtype, load_policy, load_tokenizer, special_ids
from shared.models.logprobs import score_logps
from shared.models.sequences import SCORING
from shared.seeds import seed_of
from shared.stages import write_json
from shared.training.fit import Precision, arithmetic


class Mismatched(NamedTuple):
    """Each row (chosen first) with a completion of another prompt: KTO's baseline. R = 2 N of N
    pairs, or as many as there are answers with a label.
    """

    partner: Tensor  # (R,) whose completion row j is read with
    logps: Tensor  # (R,) log ref of it


def score_reference(
    folder: Path,
    policy: Path,
    preferences: Path,
    precision: Precision = "float32",
    dtype: WeightDtype = "float32",
    file: str = TRAINED_ON,
) -> None:
    """Stage: log ref(y|x) of all completions in `reference.safetensors`, chosen ones first.

    Depends on weights, tokens, code and `precision`, which must be the training's: then policy and
    reference round alike. Not on any beta, rate or seed of a training. `dtype`: of its weights.
    `file`: of `preferences`, which of its pairs.
    """
    meter = Meter()
    rows = rows_of(policy, preferences, file)
    logps = score(policy, rows, rows.completions, precision, dtype)
    save_file({"logps": logps}, folder / "reference.safetensors")
    write_json(folder / "cost.json", meter.summary())


def score_mismatched(
    folder: Path,
    policy: Path,
    preferences: Path,
    seed: int,
    precision: Precision = "float32",
    dtype: WeightDtype = "float32",
) -> None:
    """Stage: one derangement across prompts and its log ref, in `mismatched.safetensors`."""
    meter = Meter()
    rows = rows_of(policy, preferences)
    partner = mismatch([tuple(p) for p in rows.prompts], seed_of(seed, "mismatched"))
    logps = score(policy, rows, [rows.completions[j] for j in partner], precision, dtype)
    mismatched = Mismatched(torch.tensor(partner), logps)
    save_file(mismatched._asdict(), folder / "mismatched.safetensors")
    write_json(folder / "cost.json", meter.summary())


def rows_of(policy: Path, preferences: Path, file: str = TRAINED_ON) -> Rows:
    """What is trained on, or what another `file` holds, as rows, with the policy's pad token."""
    pad_id = special_ids(load_tokenizer(policy)).pad
    return read_rows(preferences, pad_id, SCORING, file)


def score(
    policy: Path,
    rows: Rows,
    completions: list[list[int]],
    precision: Precision,
    dtype: WeightDtype = "float32",
) -> Tensor:
    """log ref of a completion for each row's prompt, (R,)."""
    model = load_policy(policy, dtype).eval()
    with arithmetic(precision):
        return score_logps(model, rows.prompts, completions, rows.pad_id)


def read_reference(folder: Path) -> Tensor:
    """(R,)"""
    return load_file(folder / "reference.safetensors")["logps"]


def read_mismatched(folder: Path) -> Mismatched:
    return Mismatched(**load_file(folder / "mismatched.safetensors"))


def mismatch(prompts: list[tuple[int, ...]], seed: int) -> list[int]:
    """For each row another row of a *different* prompt, each used once: KTO's baseline.

    Rows are put in groups of one prompt, groups in random order, and everyone takes the row that
    lies one largest group further on. Raises InputError if one prompt holds more than half.
    """
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        groups[prompt].append(row)
    shift = max(map(len, groups.values()))
    if 2 * shift > len(prompts):
        raise InputError(
            f"kto: one prompt holds {shift} of {len(prompts)} rows; its baseline needs completions "
            "of other prompts, so no prompt may hold more than half"
        )
    generator = torch.Generator().manual_seed(seed)
    members = list(groups.values())
    order = [row for g in torch.randperm(len(members), generator=generator) for row in members[g]]
    partner = [0] * len(prompts)
    for place, row in enumerate(order):
        partner[row] = order[(place + shift) % len(order)]
    return partner
