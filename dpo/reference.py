"""Reference log-probabilities: scored once per dataset and reference for all direct methods."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.config import InputError
from shared.cost import Meter
from shared.logprobs import score_logps
from shared.models import load_policy, load_tokenizer, special_ids
from shared.preferences import Pair, read_pairs
from shared.stages import write_json


class Reference(NamedTuple):
    """log ref(y|x) of the N training pairs, and of 2 N mismatched rows (chosen first)."""

    chosen: Tensor  # (N,)
    rejected: Tensor  # (N,)
    mismatched: Tensor  # (2 N,) prompt of row j with the completion of row partner[j]
    partner: Tensor  # (2 N,)


def score_reference(folder: Path, policy: Path, preferences: Path, seed: int) -> None:
    """Stage: `reference.safetensors`. Depends on weights, tokens and code; on no beta or rate."""
    meter = Meter()
    pairs = read_pairs(preferences / "train.jsonl")
    model, pad_id = load_policy(policy).eval(), special_ids(load_tokenizer(policy)).pad
    prompts, completions = unpaired_rows(pairs)
    partner = mismatch([tuple(p) for p in prompts], seed)
    logps = score_logps(model, prompts, completions, pad_id)
    mismatched = score_logps(model, prompts, [completions[j] for j in partner], pad_id)
    chosen, rejected = logps.chunk(2)
    reference = Reference(
        chosen.contiguous(), rejected.contiguous(), mismatched, torch.tensor(partner)
    )
    save_file(reference._asdict(), folder / "reference.safetensors")
    write_json(folder / "cost.json", meter.summary())


def read_reference(folder: Path) -> Reference:
    return Reference(**load_file(folder / "reference.safetensors"))


def unpaired_rows(pairs: list[Pair]) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, completions) of the 2 N completions on their own: all chosen, then all rejected."""
    prompts = [p.prompt_ids for p in pairs] * 2
    return prompts, [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]


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
