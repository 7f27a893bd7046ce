"""Pairs -> passes: the one way from labelled pairs, or single answers, to the rows of a pass."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from shared.data.pairs import Labelled, Pair, read_training
from shared.models.sequences import Limit, Sequences, by_length, collate

TRAINED_ON, HELD_OUT = "train.jsonl", "held_out.jsonl"  # the files of preferences
TokenRow = tuple[list[int], list[int]]  # token ids of a prompt and of a completion


class Batch(NamedTuple):
    """Rows of one forward pass: `chosen` rows first, the rejected ones after them.

    Of answers with a label the desirable ones stand where chosen ones do.
    """

    sequences: Sequences  # (B) rows
    rows: Tensor  # (B,) their numbers among all rows
    chosen: int  # how many of them are chosen sides
    p: Tensor  # (chosen,) the labels: P(the chosen one wins)


class Rows:
    """Completions after their prompts: the first `count` rows are chosen, or desirable.

    A pass holds at most `limit`, padding included; a longer row or pair goes alone. That changes
    memory and speed, never the step.
    """

    def __init__(
        self,
        chosen: Sequence[TokenRow],
        rejected: Sequence[TokenRow],
        p: Tensor,
        pad_id: int,
        limit: Limit,
    ):
        """`p`: of each chosen row, its label."""
        self.count, self.p, self.pad_id, self.limit = len(chosen), p, pad_id, limit
        self.prompts = [prompt for prompt, _ in (*chosen, *rejected)]
        self.completions = [completion for _, completion in (*chosen, *rejected)]

    @property
    def undesirable(self) -> int:
        """How many rows come after the first `count`."""
        return len(self.prompts) - self.count

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


class PairRows(Rows):
    """The 2 N rows of N pairs: row i is pair i's chosen side, row N + i its rejected side."""

    def __init__(self, pairs: Sequence[Pair], pad_id: int, limit: Limit):
        chosen = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
        rejected = [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
        super().__init__(chosen, rejected, torch.tensor([p.p for p in pairs]), pad_id, limit)

    def of_pairs(self, pairs: Sequence[int]) -> Iterator[Batch]:
        """Both sides of `pairs`, pairs of similar length together."""
        n = self.count
        lengths = [max(len(self.completions[i]), len(self.completions[n + i])) for i in pairs]
        before = [len(self.prompts[i]) for i in pairs]
        for group in by_length(lengths, before, self.limit, rows_each=2):
            chosen = [pairs[i] for i in group]
            yield self.batch([*chosen, *(n + i for i in chosen)], len(chosen))


class SingleRows(Rows):
    """The rows of single answers with a label: the desirable ones first, each in their order."""

    def __init__(self, answers: Sequence[Labelled], pad_id: int, limit: Limit):
        desirable, undesirable = (
            [(a.prompt_ids, a.completion_ids) for a in answers if a.desirable == label]
            for label in (True, False)
        )
        super().__init__(desirable, undesirable, torch.ones(len(desirable)), pad_id, limit)


def read_rows(
    preferences: Path, pad_id: int, limit: Limit, file: str = TRAINED_ON
) -> PairRows | SingleRows:
    """What a run trains on, or holds out, as rows."""
    found = read_training(preferences / file)
    pairs = [row for row in found if isinstance(row, Pair)]
    answers = [row for row in found if isinstance(row, Labelled)]
    return SingleRows(answers, pad_id, limit) if answers else PairRows(pairs, pad_id, limit)
