"""Causal attention where a batch's tokens are packed (`shared.packing`).

Rows are gathered from the flat tokens (a shared prompt's keys and values into each row that holds
it), attend causally, aligned to the left, where padding comes last and is never looked at, and the
outputs are put back. Short rows on a CPU do it in one operation with its gradient written out: each
head's rows are gathered as matrix products want them, and no tensor is copied in between. Longer
rows, and GPUs, go through transformers' SDPA.
"""
# pyright: reportIncompatibleMethodOverride=false

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from shared.kernels import rotate, whole, whole_back

SHORT = 2**22  # attention weights of a layer, up to which they are computed all at once


@dataclass(frozen=True)
class HeadRows:
    """Where each head's rows lie, with `kv` key heads that `group` query heads share.

    Tokens hold N x heads rows, a layer's B rows of L places B x heads x L of them.
    """

    queries: Tensor  # (B kv group L,) which of the tokens' rows is the query there
    keys: Tensor  # (B kv L,) likewise the key and the value
    outputs: Tensor  # (N kv group,) in which place each token's output is computed
    first: Tensor  # (N kv,) a place of each token's key
    again: Tensor  # (A kv,) the other places: a shared prompt in rows after its first
    again_of: Tensor  # (A kv,) and whose keys those are
    future: Tensor  # (group L, L) -inf where a place must not look


@dataclass
class Pass:
    """One packed pass: what attention and the last layer's MLP are told."""

    rows: Tensor  # (B, L) number of the token in each place; 0 where there is padding
    back: Tensor  # (N,) where in the flattened `rows` each token's attention is read
    again: Tensor  # (A,) where a token stands once more
    read: Tensor  # (R,) numbers of the tokens whose last states are read
    _heads: dict[tuple[int, int], HeadRows] = field(default_factory=dict)

    def short(self, heads: int) -> bool:
        """Whether all attention weights of a layer may be there at once."""
        return self.rows.is_cpu and heads * self.rows.numel() * self.rows.shape[1] <= SHORT

    def heads(self, kv: int, group: int) -> HeadRows:
        """The same for all layers, so found once."""
        if (kv, group) not in self._heads:
            self._heads[kv, group] = self._find_heads(kv, group)
        return self._heads[kv, group]

    def _find_heads(self, kv: int, group: int) -> HeadRows:
        rows, length = self.rows, self.rows.shape[1]
        head = torch.arange(kv * group)
        key_head = torch.arange(kv).unsqueeze(1)
        future = torch.full((length, length), -torch.inf).triu(1)

        def places(flat: Tensor, heads: Tensor) -> Tensor:
            """Of places in `rows`, in each of the heads, (n, heads)."""
            row, column = flat // length, flat % length
            return (
                (row.unsqueeze(1) * len(heads) + heads) * length + column.unsqueeze(1)
            ).flatten()

        return HeadRows(
            queries=(rows.unsqueeze(1) * len(head) + head.unsqueeze(1)).flatten(),
            keys=(rows.unsqueeze(1) * kv + key_head).flatten(),
            outputs=places(self.back, head),
            first=places(self.back, key_head.squeeze(1)),
            again=places(self.again, key_head.squeeze(1)),
            again_of=(rows.flatten()[self.again].unsqueeze(1) * kv + key_head.squeeze(1)).flatten(),
            future=future.repeat(group, 1),
        )


def attend(query: Tensor, key: Tensor, value: Tensor, over: Pass, scaling: float) -> Tensor:
    """Causal attention of packed tokens, (N, heads, size), (N, kv, size) twice -> (N, heads, size).

    All weights at once, in float32, whatever surrounds; `heads` a multiple of `kv`.
    """
    kv = key.shape[1]
    heads = over.heads(kv, query.shape[1] // kv)
    tokens = query.float(), key.float(), value.float()
    output: Any = _Attend.apply(*tokens, heads, len(over.rows) * kv, scaling)
    return output.to(value.dtype)


class _Attend(torch.autograd.Function):
    """softmax(scaling q k^T + future) v, for all rows and key heads in one batch of products."""

    @staticmethod
    @whole
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: HeadRows,
        count: int,
        scaling: float,
    ) -> Tensor:
        def gathered(tensor: Tensor, rows: Tensor) -> Tensor:
            flat = tensor.reshape(-1, tensor.shape[-1])
            return flat.index_select(0, rows).view(count, -1, tensor.shape[-1])

        q = gathered(query, heads.queries)  # (B kv, group L, size)
        k, v = gathered(key, heads.keys), gathered(value, heads.keys)  # (B kv, L, size)
        future = heads.future.expand(count, -1, -1)
        weights = torch.baddbmm(future, q, k.transpose(1, 2), alpha=scaling).softmax(-1)
        output = torch.bmm(weights, v)
        ctx.save_for_backward(q, k, v, weights)
        ctx.heads, ctx.scaling = heads, scaling
        return output.view(-1, v.shape[-1]).index_select(0, heads.outputs).view(query.shape)

    @staticmethod
    @once_differentiable
    @whole_back
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, weights), heads = ctx.saved_tensors, ctx.heads
        size = v.shape[-1]
        g = q.new_zeros(q.numel() // size, size)
        g = g.index_copy_(0, heads.outputs, gradient.reshape(-1, size)).view(q.shape)
        of_v = torch.bmm(weights.transpose(1, 2), g)
        of_weights = torch.bmm(g, v.transpose(1, 2))
        of_logits = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_q = torch.baddbmm(q, of_logits, k, beta=0, alpha=ctx.scaling)
        of_k = torch.baddbmm(k, of_logits.transpose(1, 2), q, beta=0, alpha=ctx.scaling)

        def summed(rows: Tensor) -> Tensor:
            rows = rows.view(-1, size)
            found = rows.index_select(0, heads.first)
            if len(heads.again):
                found.index_add_(0, heads.again_of, rows.index_select(0, heads.again))
            return found.view(-1, heads.first.numel() // tokens, size)

        tokens = len(gradient)
        of_q = of_q.view(-1, size).index_select(0, heads.outputs).view(gradient.shape)
        return of_q, summed(of_k), summed(of_v), None, None, None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: Pass | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """For transformers: (1, heads, N, size) of packed tokens -> (1, N, heads, size); else SDPA."""
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (N, heads, size)
    if packed.short(query.shape[1]):
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        return attend(q, k, v, packed, scaling).unsqueeze(0), None

    def gathered(tokens: Tensor) -> Tensor:
        rows = tokens.index_select(0, packed.rows.flatten())
        return rows.view(*packed.rows.shape, *tokens.shape[1:]).transpose(1, 2)

    rows = gathered(q), gathered(k), gathered(v)
    output, _ = sdpa_attention_forward(module, *rows, attention_mask=None, **options)
    return output.flatten(0, 1).index_select(0, packed.back).unsqueeze(0), None


def rotary_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`forward` of an attention layer of Llama's kind, as its class has it, but that short packed
    tokens take no detour over (1, heads, N, size) and are turned by `rotate`."""
    packed = options.get("packed")
    if packed is None or not packed.short(self.config.num_attention_heads):
        about = position_embeddings, attention_mask, past_key_values
        return type(self).forward(self, hidden_states, *about, **options)
    cos, sin = (t[0].unsqueeze(1) for t in position_embeddings)  # pyright: ignore
    query, key, value = (
        projection(hidden_states)[0].unflatten(-1, (-1, self.head_dim))
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    if hasattr(self, "q_norm"):
        query, key = self.q_norm(query), self.k_norm(key)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    output = attend(query, key, value, packed, self.scaling)
    return self.o_proj(output.flatten(1).unsqueeze(0)), None
