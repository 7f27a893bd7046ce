"""Log-probabilities of completions: the one place where any method gets them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from shared.models import ops, ranks
from shared.models.cost import At, Work, count_pass
from shared.models.load import last_states
from shared.models.lora import value_head
from shared.models.packing import packs
from shared.models.sequences import SCORING, Limit, Sequences, by_length, collate

CHUNK = 2**20  # logits that one pass over them takes at a time: they stay in a CPU's cache


def completion_logits(model: PreTrainedModel, batch: Sequences, temperature: float = 1.0) -> Tensor:
    """Logits that predict the M completion tokens, over the sampling temperature, (M, V).

    In the order of `batch.mask`; `batch.spread` puts what is computed from them into (B, T).
    """
    batch = batch.to(model.device)
    if packs(model):
        return _logits(output_head(model), predicting_states(model, batch), temperature)
    length, real = batch.mask.shape[1], int(batch.attention.sum())
    logits = model(
        input_ids=batch.ids,
        attention_mask=batch.attention,
        position_ids=batch.positions,
        use_cache=False,
        logits_to_keep=length + 1,
    ).logits[:, -length - 1 : -1][batch.mask]
    computed = At(real, real, len(logits))
    count_pass(model, Work(batch.attention.sum(1).tolist(), computed, real), logits)
    return logits.float() if temperature == 1 else logits.float() / temperature


def predicting_states(model: PreTrainedModel, batch: Sequences, *, logits: bool = True) -> Tensor:
    """Of a model that packs: the last hidden states that predict the M completion tokens, (M, H).

    The output head sees these only, and no prompt; without `logits` not even these.
    """
    return last_states(model, batch, batch.predicting, logits=int(batch.mask.sum()) * logits)


def output_head(model: PreTrainedModel) -> nn.Module:
    """What makes logits of hidden states; the families that pack do nothing else to them."""
    return model.get_output_embeddings()  # pyright: ignore[reportReturnType]


def of_tokens(
    model: PreTrainedModel,
    batch: Sequences,
    measure: Callable[[Tensor, Tensor], Tensor],
    temperature: float = 1.0,
) -> Tensor:
    """`measure(logits (m, V), tokens (m,)) -> (m, ...)` of all M completion tokens, (M, ...).

    At most `Shortcuts.block` logits exist at once: where there are more, each block is computed
    again for its gradient.
    """
    batch = batch.to(model.device)
    tokens = batch.completion_ids[batch.mask]
    if not packs(model):
        return measure(completion_logits(model, batch, temperature), tokens)
    return _in_blocks(model, predicting_states(model, batch), tokens, measure, temperature)


def _in_blocks(
    model: PreTrainedModel,
    states: Tensor,
    tokens: Tensor,
    measure: Callable[[Tensor, Tensor], Tensor],
    temperature: float,
) -> Tensor:
    head = output_head(model)
    rows = max(1, ops.active().block // model.get_input_embeddings().weight.shape[0])  # pyright: ignore

    def block(states: Tensor, tokens: Tensor) -> Tensor:
        return measure(_logits(head, states, temperature), tokens)

    if len(tokens) <= rows:
        return block(states, tokens)
    parts = zip(states.split(rows), tokens.split(rows), strict=True)
    again = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(block, *part, **again) for part in parts])  # pyright: ignore


def _logits(head: nn.Module, states: Tensor, temperature: float) -> Tensor:
    logits = head(states).float()
    return logits if temperature == 1 else logits / temperature


def token_logprobs(model: PreTrainedModel, batch: Sequences, temperature: float = 1.0) -> Tensor:
    """log p(token | before) of the completion, in nats, (B, T); 0 where `mask` is False."""
    return batch.to(model.device).spread(of_tokens(model, batch, picked, temperature))


def logprobs_and_values(
    policy: PreTrainedModel, batch: Sequences, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(`token_logprobs`, `policy_values`) of one pass, (B, T) each."""
    batch = batch.to(policy.device)
    states, tokens = predicting_states(policy, batch), batch.completion_ids[batch.mask]
    logprobs = _in_blocks(policy, states, tokens, picked, temperature)
    return batch.spread(logprobs), batch.spread(_values(policy, states))


def policy_values(policy: PreTrainedModel, batch: Sequences) -> Tensor:
    """V(prompt, tokens before t) for each completion token t, (B, T), 0 where `mask` is False.

    Of a policy that packs and has a value head; it reads the states that predict token t.
    """
    batch = batch.to(policy.device)
    return batch.spread(_values(policy, predicting_states(policy, batch, logits=False)))


def _values(policy: PreTrainedModel, states: Tensor) -> Tensor:
    return value_head(policy)(states).squeeze(-1).float()


def picked(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p(token) of each row, (M, V), (M,) -> (M,); its gradient is written out.

    Not by `cross_entropy`: it is as fast and on large vocabularies less exact, by some 1e-5 nats.
    """
    return _Picked.apply(logits, tokens)  # pyright: ignore[reportReturnType]


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        total = torch.cat([part.logsumexp(-1) for part in logits.split(_chunk(logits))])
        ctx.save_for_backward(logits, total, tokens)
        return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, total, tokens = ctx.saved_tensors
        of_logits, g = torch.empty_like(logits), gradient.unsqueeze(-1)
        parts = (t.split(_chunk(logits)) for t in (of_logits, logits, total.unsqueeze(-1), g))
        for out, part, sums, scale in zip(*parts, strict=True):
            torch.sub(part, sums, out=out).exp_().mul_(-scale)
        return of_logits.scatter_add_(-1, tokens.unsqueeze(-1), g), None


def _chunk(logits: Tensor) -> int:
    """Rows of `logits` in one chunk."""
    return max(1, CHUNK // logits.shape[-1])


def gather_logprobs(logits: Tensor, batch: Sequences) -> Tensor:
    """Pick the completion's tokens out of `logits` (M, V): (B, T), 0 where `mask` is False."""
    batch = batch.to(logits.device)
    return batch.spread(picked(logits, batch.completion_ids[batch.mask]))


def sequence_logps(model: PreTrainedModel, batch: Sequences) -> Tensor:
    """log p(completion | prompt), summed over its tokens, in nats, (B,)."""
    return token_logprobs(model, batch).sum(1)


@torch.no_grad()
def score_logps(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    limit: Limit = SCORING,
) -> Tensor:
    """`sequence_logps` of any number of rows in their order, no gradients, on the CPU, (N,)."""
    logps, own = torch.zeros(len(prompts)), ranks.mine(range(len(prompts)))
    lengths = [len(completions[i]) for i in own], [len(prompts[i]) for i in own]
    for group in by_length(*lengths, limit):
        rows = [own[i] for i in group]
        batch = collate([prompts[i] for i in rows], [completions[i] for i in rows], pad_id)
        logps[torch.tensor(rows)] = sequence_logps(model, batch).cpu()
    return ranks.total(logps)
