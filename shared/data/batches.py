"""Pairs -> passes: the one way from labelled pairs to the rows of a forward pass."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shared.data.pairs import Pair
from shared.models.sequences import Limit, Sequences, by_length, collate


class Batch(NamedTuple):
    """Rows of one forward pass: `chosen` rows first, the rejected ones after them."""

    sequences: Sequences  # (B) rows
    rows: Tensor  # (B,) their numbers among all 2 N
    chosen: int  # how many of them are chosen sides
    p: Tensor  # (chosen,) the labels: P(the chosen one wins)


class PairRows:
    """The 2 N rows of N pairs: row i is pair i's chosen side, row N + i its rejected side.

    A pass holds at most `limit`, padding included; a longer row or pair goes alone. That changes
    memory and speed, never the step.
    """

    def __init__(self, pairs: Sequence[Pair], pad_id: int, limit: Limit):
        self.count, self.pad_id, self.limit = len(pairs), pad_id, limit
        self.prompts = [p.prompt_ids for p in pairs] * 2
        self.completions = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
        self.p = torch.tensor([p.p for p in pairs])

    def of_pairs(self, pairs: Sequence[int]) -> Iterator[Batch]:
        """Both sides of `pairs`, pairs of similar length together."""
        n = self.count
        lengths = [max(len(self.completions[i]), len(self.completions[n + i])) for i in pairs]
        before = [len(self.prompts[i]) for i in pairs]
        for group in by_length(lengths, before, self.limit, rows_each=2):
            chosen = [pairs[i] for i in group]
            yield self.batch([*chosen, *(n + i for i in chosen)], len(chosen))

    def of_rows(self, rows: Sequence[int]) -> Iterator[Batch]:
        """`rows` on their own, those of similar length together."""
        lengths = [len(self.completions[row]) for row in rows]
        before = [len(self.prompts[row]) for row in rows]
        for group in by_length(lengths, before, self.limit):
            ordered = sorted(rows[i] for i in group)
            yield self.batch(ordered, sum(row < self.count for row in ordered))

    def batch(self, rows: Sequence[int], chosen: int) -> Batch:
        """One pass over `rows`, the first `chosen` of which are chosen sides."""
        prompts, completions = [self.prompts[i] for i in rows], [self.completions[i] for i in rows]
        numbers = torch.tensor(rows)
        sequences = collate(prompts, completions, self.pad_id)
        return Batch(sequences, numbers, chosen, self.p[numbers[:chosen]])
