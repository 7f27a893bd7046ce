"""Prompts and completions as one batch of token ids.

Rows are laid out [left-padded prompt | right-padded completion], the layout generation ends in, so
that sampling, PPO, the direct methods and evaluation read the same positions.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """B prompts with their completions; P and T are the longest prompt and completion."""

    ids: Tensor  # (B, P + T)
    attention: Tensor  # (B, P + T), 1 = a real token
    mask: Tensor  # (B, T), True = completion token, EOS included

    @property
    def prompt_width(self) -> int:
        """P"""
        return self.ids.shape[1] - self.mask.shape[1]

    @property
    def completion_ids(self) -> Tensor:
        """(B, T)"""
        return self.ids[:, -self.mask.shape[1] :]

    @property
    def lengths(self) -> Tensor:
        """Completion tokens of each row, (B,)."""
        return self.mask.sum(1)

    @property
    def prompt_lengths(self) -> Tensor:
        """Prompt tokens of each row, (B,)."""
        return self.attention[:, : self.prompt_width].sum(1)

    @property
    def predicting(self) -> Tensor:
        """Where the next token is a completion's, (B, P + T): as many places as `mask` has."""
        at = torch.zeros_like(self.attention, dtype=torch.bool)
        at[:, self.prompt_width - 1 : -1] = self.mask
        return at

    @property
    def last(self) -> Tensor:
        """Where each row's last token is, (B, P + T)."""
        at = torch.zeros_like(self.attention, dtype=torch.bool)
        at[torch.arange(len(at)), self.prompt_width + self.lengths - 1] = True
        return at

    @property
    def positions(self) -> Tensor:
        """Position of each token in its own row, (B, P + T), whatever the padding before it."""
        return (self.attention.cumsum(1) - 1).clamp(min=0)

    def to(self, device: torch.device) -> "Sequences":
        return Sequences(*(t.to(device) for t in self))

    def spread(self, values: Tensor) -> Tensor:
        """Numbers of the M completion tokens, (M,) in the order of `mask`: (B, T), 0 elsewhere."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


def collate(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int
) -> Sequences:
    """Token ids of prompts and completions as one batch; a ValueError where either is empty."""
    if any(len(c) == 0 for c in completions):
        raise ValueError("a completion has no tokens: a completion holds at least its EOS")
    if any(len(p) == 0 for p in prompts):
        raise ValueError("a prompt has no tokens: nothing would predict its completion's first one")
    before, after = [*map(len, prompts)], [*map(len, completions)]
    left, right = max(before), max(after)
    rows = [
        [pad_id] * (left - len(p)) + [*p, *c] + [pad_id] * (right - len(c))
        for p, c in zip(prompts, completions, strict=True)
    ]
    mask = torch.arange(right) < torch.tensor(after).unsqueeze(1)
    real = torch.arange(left, 0, -1) <= torch.tensor(before).unsqueeze(1)
    return Sequences(torch.tensor(rows), torch.cat([real, mask], dim=1).long(), mask)


class Limit(NamedTuple):
    """What one pass holds at most: rows, and tokens with their padding. A longer row goes alone."""

    rows: int
    tokens: int


SCORING = Limit(256, 2**15)  # of a pass without gradients


def by_length(
    completions: Sequence[int], prompts: Sequence[int], limit: Limit, *, rows_each: int = 1
) -> Iterator[list[int]]:
    """Numbers of items in batches of similar length: little padding where order does not matter.

    `completions` and `prompts` are the tokens of each item's longest completion and prompt; an item
    has `rows_each` rows: a pair has two.
    """
    most = max(1, limit.rows // rows_each)
    batch: list[int] = []
    wide = 0, 0
    for item in sorted(range(len(completions)), key=completions.__getitem__):
        wider = max(wide[0], completions[item]), max(wide[1], prompts[item])
        tokens = (len(batch) + 1) * rows_each * sum(wider)
        if batch and (len(batch) == most or tokens > limit.tokens):
            yield batch
            batch, wider = [], (completions[item], prompts[item])
        batch.append(item)
        wide = wider
    if batch:
        yield batch
