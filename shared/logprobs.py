"""Log-probabilities of completions: the one place where any method gets them.

Rows are laid out [left-padded prompt | right-padded completion], the layout generation ends in, so
that sampling, PPO, the direct methods and evaluation read the same positions.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Sequences(NamedTuple):
    """B prompts with their completions; P and T are the longest prompt and completion."""

    ids: Tensor  # (B, P + T)
    attention: Tensor  # (B, P + T), 1 = a real token
    mask: Tensor  # (B, T), True = completion token, EOS included

    @property
    def completion_ids(self) -> Tensor:
        """(B, T)"""
        return self.ids[:, -self.mask.shape[1] :]

    @property
    def lengths(self) -> Tensor:
        """Completion tokens of each row, (B,)."""
        return self.mask.sum(1)

    @property
    def positions(self) -> Tensor:
        """Position of each token in its own row, (B, P + T), whatever the padding before it."""
        return (self.attention.cumsum(1) - 1).clamp(min=0)

    def to(self, device: torch.device) -> "Sequences":
        return Sequences(*(t.to(device) for t in self))


def collate(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int
) -> Sequences:
    """Token ids of prompts and completions as one batch. An empty completion is a ValueError."""
    if any(len(c) == 0 for c in completions):
        raise ValueError("a completion has no tokens: a completion holds at least its EOS")
    left, right = max(map(len, prompts)), max(map(len, completions))
    ids = torch.full((len(prompts), left + right), pad_id)
    attention = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, end = left - len(prompt), left + len(completion)
        ids[row, start:end] = torch.tensor([*prompt, *completion])
        attention[row, start:end] = 1
    return Sequences(ids, attention, attention[:, left:].bool())


def completion_logits(model: PreTrainedModel, batch: Sequences, temperature: float = 1.0) -> Tensor:
    """Logits that predict each completion token, divided by the sampling temperature, (B, T, V)."""
    length = batch.mask.shape[1]
    logits = model(
        input_ids=batch.ids,
        attention_mask=batch.attention,
        position_ids=batch.positions,
        use_cache=False,
        logits_to_keep=length + 1,
    ).logits[:, -length - 1 : -1]
    return logits.float() / temperature


def token_logprobs(model: PreTrainedModel, batch: Sequences, temperature: float = 1.0) -> Tensor:
    """log p(token | before) of the completion, in nats, (B, T); 0 where `mask` is False."""
    return gather_logprobs(completion_logits(model, batch, temperature), batch)


def gather_logprobs(logits: Tensor, batch: Sequences) -> Tensor:
    """Pick the completion's tokens out of `logits` (B, T, V): (B, T), 0 where `mask` is False."""
    chosen = logits.gather(-1, batch.completion_ids.unsqueeze(-1)).squeeze(-1)
    return (chosen - logits.logsumexp(-1)).masked_fill(~batch.mask, 0.0)


def sequence_logps(model: PreTrainedModel, batch: Sequences) -> Tensor:
    """log p(completion | prompt), summed over its tokens, in nats, (B,)."""
    return token_logprobs(model, batch).sum(1)


@torch.no_grad()
def score_logps(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    batch_size: int = 256,
) -> Tensor:
    """`sequence_logps` of any number of rows in their order, no gradients, on the CPU, (N,)."""
    logps = torch.zeros(len(prompts))
    for rows in by_length([len(c) for c in completions], batch_size):
        batch = collate([prompts[i] for i in rows], [completions[i] for i in rows], pad_id)
        logps[torch.tensor(rows)] = sequence_logps(model, batch.to(model.device)).float().cpu()
    return logps


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length: little padding where order does not matter."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
