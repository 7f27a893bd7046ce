"""Checks of a reward model: where its score is read, what it depends on, how it is scaled."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.stats import binom
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.doctor.finding import Finding, make_finding
from benchmarks.doctor.models import both_sides
from shared.data.pairs import Pair
from shared.models.load import sequence_scores
from shared.models.reward_files import Chats
from shared.models.scorer import Scorer

SCORE_TOLERANCE = 1e-3  # of the scores' own deviation, at least 1
SWAPPED_CHANCE = 1e-4  # chance of an accuracy this low, were the scores a coin


class Scores(NamedTuple):
    """Raw scores of completions with their EOS: chosen first, then rejected."""

    ours: Tensor  # (2 B,) read at each row's last token, by length
    without_eos: Tensor | None  # (2 B,) at the token before; None of one that reads texts


def tokens_read(
    policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase, decoder: bool
) -> Finding:
    """What the reward model is given: sampled tokens as they are, or their text."""
    known, theirs = policy.get_vocab(), reward.get_vocab()
    differ = sum(theirs.get(token) != number for token, number in known.items())
    observed = f"{differ} of the policy's {len(known)} tokens have another id"
    if not decoder:
        observed = "an encoder: it is given texts, as pairs of prompt and completion"
    elif differ:
        observed += ": it is given texts, in its own tokenizer and template"
    return Finding("reward model's tokens", observed)


@torch.no_grad()
def score_texts(
    folder: Path,
    reader: PreTrainedTokenizerBase,
    ends: frozenset[int],
    pairs: list[Pair],
    chats: Chats,
    plain: PreTrainedModel,
) -> tuple[Scores, Finding]:
    """Raw scores of a reward model that reads texts; the same of each row on its own."""
    scorer = Scorer(folder, reader=reader, ends=ends, chats=chats)
    prompts = [p.prompt_ids for p in pairs] * 2
    sides = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    ours = scorer.score_all(prompts, sides, finite=False) * scorer.scale + scorer.offset
    rows = [scorer.encode(p, s) for p, s in zip(prompts, sides, strict=True)]
    inputs = [{name: torch.tensor([ids]) for name, ids in row.items()} for row in rows]
    alone = torch.cat([plain.eval()(**row).logits.flatten().float() for row in inputs])
    difference = (ours - alone).nan_to_num(math.inf).abs().max().item()
    finding = make_finding(
        "score at eos",
        difference <= SCORE_TOLERANCE * max(1.0, ours.std().item()),
        f"{len(rows)} scores in a batch and of each text alone differ by at most {difference:.1e}",
        "its score depends on padding: set pad_token_id of config.json to its tokenizer's pad",
    )
    return Scores(ours, None), finding


@torch.no_grad()
def score(model: PreTrainedModel, pairs: list[Pair], pad: int) -> Scores:
    """`pairs` hold completions of two tokens or more."""
    shorter = [
        p._replace(chosen_ids=p.chosen_ids[:-1], rejected_ids=p.rejected_ids[:-1]) for p in pairs
    ]
    return Scores(
        ours=sequence_scores(model, both_sides(pairs, pad)).cpu(),
        without_eos=sequence_scores(model, both_sides(shorter, pad)).cpu(),
    )


@torch.no_grad()
def score_at_eos(
    plain: PreTrainedModel, scores: Scores, pairs: list[Pair], pad: int, eos: int | None
) -> Finding:
    """transformers' own classifier, on a right-padded batch, reads the score at EOS as Klash does.

    It reads at the last token that is not `config.pad_token_id`.
    """
    check, configured_pad = "score at eos", plain.config.pad_token_id
    fix = (
        f"its config.json has pad_token_id {configured_pad} (eos is {eos}): set it to {pad}, the "
        "pad that its tokenizer fills batches with, and save"
    )
    if pad == eos:
        fix = "give tokenizer and config.json a pad token that is not EOS, then train it again"
    if configured_pad is None:
        return Finding(check, "no pad_token_id in its config.json: it scores no batch", fix)
    rows = [
        torch.tensor([*p.prompt_ids, *side])
        for sides in ([(p, p.chosen_ids) for p in pairs], [(p, p.rejected_ids) for p in pairs])
        for p, side in sides
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    attention = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    found = plain(input_ids=ids, attention_mask=attention).logits.squeeze(-1).float()
    difference = (found - scores.ours).nan_to_num(math.inf).abs().max().item()
    return make_finding(
        check,
        difference <= SCORE_TOLERANCE * max(1.0, scores.ours.std().item()),
        f"{len(rows)} scores of plain transformers and of Klash differ by at most {difference:.1e}",
        fix,
    )


def score_moves(scores: Scores) -> Finding:
    """Scores differ between completions, and the EOS is among what they read."""
    deviation = scores.ours.std().item()
    if scores.without_eos is None:
        return make_finding(
            "score moves",
            deviation > 0,
            f"deviation {deviation:.2g} over {len(scores.ours)} completions",
            "its head gives every completion one score: train it, or look for a head of zeros",
        )
    moved = int((scores.ours != scores.without_eos).sum())
    fix = "its head gives every completion one score: train it, or look for a head of zeros"
    if deviation > 0:
        fix = "it does not read the EOS: train it on completions that end with EOS"
    return make_finding(
        "score moves",
        deviation > 0 and moved == len(scores.ours),
        f"deviation {deviation:.2g} over {len(scores.ours)} completions; without EOS {moved} of "
        "them score otherwise",
        fix,
    )


def preference_accuracy(scores: Scores) -> Finding:
    """The reward model does not prefer the rejected completions."""
    chosen, rejected = scores.ours.chunk(2)
    right, count = int((chosen > rejected).sum()), len(chosen)
    return make_finding(
        "reward accuracy",
        bool(binom.cdf(right, count, 0.5) > SWAPPED_CHANCE),
        f"prefers the chosen completion in {right} of {count} pairs",
        "far below half: chosen and rejected are swapped, in this data or in its training data",
    )


def normalisation(folder: Path, scores: Scores) -> Finding:
    """`normalisation.json`, if there is one, holds numbers that scores can be divided by.

    Without one, as reward models ship, it is measured where a run takes the model.
    """
    check, path = "normalisation", folder / "normalisation.json"
    fix = (
        'write normalisation.json beside it, {"offset": mean raw score of SFT samples, '
        '"scale": their deviation within prompts}: shared.models.reward_files.save_normalisation'
    )
    if not path.is_file():
        mean, deviation = scores.ours.mean().item(), scores.ours.std().item()
        return Finding(
            check,
            f"none yet: a run measures it on its own samples; raw scores here are {mean:.2f} with "
            f"deviation {deviation:.2g}",
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        offset, scale = float(values["offset"]), float(values["scale"])
    except (ValueError, TypeError, KeyError) as error:
        return Finding(check, f"normalisation.json is not {{offset, scale}}: {error!r}", fix)
    scaled = (scores.ours - offset) / scale if scale else torch.tensor([math.inf])
    return make_finding(
        check,
        math.isfinite(offset) and math.isfinite(scale) and scale > 0,
        f"offset {offset:.3g}, scale {scale:.3g}; mean score here {scaled.mean().item():.2f}",
        fix,
    )
