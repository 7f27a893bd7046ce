"""All completions of a small vocabulary, and a policy's exact log-probability of each.

The process is the one that is sampled: tokens until EOS or until the length cap, where a cut
completion is an outcome of its own and gets no EOS.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.models.logprobs import completion_logits
from shared.models.sequences import collate


class Listing(NamedTuple):
    """N completions of at most `cap` tokens, and where their log-probabilities are read.

    Every completion without its last token begins some *branch*: a row of cap - 1 tokens without
    EOS. One pass over the branches thus holds the next-token distribution of every prefix.
    """

    completions: list[list[int]]
    branches: list[list[int]]
    branch: Tensor  # (N,) a branch that begins with the completion less its last token
    tokens: Tensor  # (N, cap) the completion's tokens, 0 behind its end
    mask: Tensor  # (N, cap)


def list_completions(vocabulary: int, eos_id: int, cap: int) -> Listing:
    """Every completion over `vocabulary` tokens: those that end, then those that are cut."""
    going = [token for token in range(vocabulary) if token != eos_id]
    ended = [[*prefix, eos_id] for n in range(cap) for prefix in itertools.product(going, repeat=n)]
    cut = [list(tokens) for tokens in itertools.product(going, repeat=cap)]
    branches = [list(tokens) for tokens in itertools.product(going, repeat=cap - 1)]
    first: dict[tuple[int, ...], int] = {}
    for number, tokens in enumerate(branches):
        for n in range(cap):
            first.setdefault(tuple(tokens[:n]), number)
    completions = [*ended, *cut]
    return Listing(
        completions=completions,
        branches=branches,
        branch=torch.tensor([first[tuple(c[:-1])] for c in completions]),
        tokens=torch.tensor([c + [0] * (cap - len(c)) for c in completions]),
        mask=torch.tensor([[t < len(c) for t in range(cap)] for c in completions]),
    )


def listed_logps(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    listing: Listing,
    pad_id: int,
    temperature: float = 1.0,
) -> Tensor:
    """log p(y|x) of all listed completions, (P, N), float64, with gradients.

    Each row is a distribution: its probabilities sum to 1.
    """
    cap, branches = listing.tokens.shape[1], listing.branches
    rows = [prompt for prompt in prompts for _ in branches]
    ends = [[*branch, pad_id] for _ in prompts for branch in branches]  # the last one is not read
    logits = completion_logits(model, collate(rows, ends, pad_id), temperature)
    logprobs = logits.double().log_softmax(-1).view(len(prompts), len(branches), cap, -1)
    place = torch.arange(cap, device=logits.device)
    read = logprobs[:, listing.branch[:, None], place, listing.tokens]
    return read.masked_fill(~listing.mask.to(logits.device), 0.0).sum(2)
