"""Log-probabilities of completions: the one place where any method gets them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.cost import Meter
from shared.packing import pack, packed_inputs, packs
from shared.sequences import Sequences, by_length, collate


def completion_logits(model: PreTrainedModel, batch: Sequences, temperature: float = 1.0) -> Tensor:
    """Logits that predict the M completion tokens, over the sampling temperature, (M, V).

    In the order of `batch.mask`; `batch.spread` puts what is computed from them into (B, T).
    """
    batch = batch.to(model.device)
    if packs(model):
        packed, width = pack(batch), batch.prompt_width
        predicting = packed.place[:, width - 1 : -1][batch.mask]
        logits = model(**packed_inputs(packed), logits_to_keep=predicting).logits[0]
    else:
        length = batch.mask.shape[1]
        logits = model(
            input_ids=batch.ids,
            attention_mask=batch.attention,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=length + 1,
        ).logits[:, -length - 1 : -1][batch.mask]
    return logits.float() / temperature


def token_logprobs(model: PreTrainedModel, batch: Sequences, temperature: float = 1.0) -> Tensor:
    """log p(token | before) of the completion, in nats, (B, T); 0 where `mask` is False."""
    return gather_logprobs(completion_logits(model, batch, temperature), batch)


def gather_logprobs(logits: Tensor, batch: Sequences) -> Tensor:
    """Pick the completion's tokens out of `logits` (M, V): (B, T), 0 where `mask` is False."""
    batch = batch.to(logits.device)
    chosen = logits.gather(-1, batch.completion_ids[batch.mask].unsqueeze(-1)).squeeze(-1)
    return batch.spread(chosen - logits.logsumexp(-1))


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
    *,
    meter: Meter | None = None,
) -> Tensor:
    """`sequence_logps` of any number of rows in their order, no gradients, on the CPU, (N,)."""
    logps = torch.zeros(len(prompts))
    for rows in by_length([len(c) for c in completions], batch_size):
        batch = collate([prompts[i] for i in rows], [completions[i] for i in rows], pad_id)
        logps[torch.tensor(rows)] = sequence_logps(model, batch).cpu()
        if meter is not None:
            meter.forward(model, batch)
    return logps
