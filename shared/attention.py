"""Causal attention where a batch's tokens are packed (`shared.packing`).

Rows are gathered from the flat tokens (a shared beginning's keys and values into each row that
holds it), attend causally, aligned to the left, where padding comes last and is never looked at,
and the outputs are put back. Short rows on a CPU do it in one operation with its gradient written
out: each head's rows are gathered as matrix products want them, in bands of similar length, and no
tensor is copied in between. Longer rows, and GPUs, go through transformers' SDPA.
"""
# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from shared.kernels import rotate, whole, whole_back

SHORT = 2**22  # attention weights of a layer, up to which they are computed all at once
BAND = 2**12  # one more band costs as much as so many weights
VECTOR = 16  # numbers; softmax over fewer is ten times slower each


@dataclass(frozen=True)
class Band:
    """Rows that attend in one batch of matrix products, and their part of all that do."""

    count: int  # of rows, times key heads
    query: slice
    key: slice
    hidden: Tensor  # (count or 1, queries, keys) -inf where a place must not look

    def queries(self, tensor: Tensor) -> Tensor:
        """Their part of what is laid out like the queries, (count, queries of a row, size)."""
        return tensor[self.query].view(self.count, -1, tensor.shape[-1])

    def keys(self, tensor: Tensor) -> Tensor:
        """Their part of what is laid out like the keys, (count, keys of a row, size)."""
        return tensor[self.key].view(self.count, -1, tensor.shape[-1])


@dataclass(frozen=True)
class HeadRows:
    """Which of the tokens' (N heads) rows of `size` numbers attention computes with, in bands."""

    bands: list[Band]
    queries: Tensor  # (Q,) the row of the tokens that is the query there
    keys: Tensor  # (K,) likewise the key and the value
    outputs: Tensor  # (N heads,) where among the queries the output of each is computed
    first: Tensor  # (N key heads,) one place of each among the keys
    again: Tensor  # (A,) the other places: shared beginnings, where they are only read
    again_of: Tensor  # (A,) and whose they are


@dataclass
class Pass:
    """One packed pass: what attention and the last layer's MLP are told."""

    rows: Tensor  # (B, L) number of the token in each place; 0 where there is padding
    back: Tensor  # (N,) where in the flattened `rows` each token's attention is read
    starts: Tensor  # (B,) tokens of a row that another one computes: a shared beginning's
    lengths: Tensor  # (B,) tokens of a row
    read: Tensor  # (R,) numbers of the tokens whose last states are read
    _heads: dict[tuple[int, int], HeadRows] = field(default_factory=dict)

    def short(self, heads: int) -> bool:
        """Whether all attention weights of a layer may be there at once."""
        return self.rows.is_cpu and heads * self.rows.numel() * self.rows.shape[1] <= SHORT

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        """Causal, (N, heads, size), (N, kv, size) twice -> (N, heads, size)."""
        if self.short(query.shape[1]):
            scaling = options.get("scaling") or query.shape[-1] ** -0.5
            return attend(query, key, value, self, scaling)

        def gathered(tokens: Tensor) -> Tensor:
            rows = tokens.index_select(0, self.rows.flatten())
            return rows.view(*self.rows.shape, *tokens.shape[1:]).transpose(1, 2)

        rows = gathered(query), gathered(key), gathered(value)
        output, _ = sdpa_attention_forward(layer, *rows, attention_mask=None, **options)
        return output.flatten(0, 1).index_select(0, self.back)

    def heads(self, kv: int, group: int) -> HeadRows:
        """For `kv` key heads that `group` query heads share each; the same in all layers."""
        if (kv, group) not in self._heads:
            self._heads[kv, group] = self._find_heads(kv, group)
        return self._heads[kv, group]

    def _find_heads(self, kv: int, group: int) -> HeadRows:
        bands, queries, asked_here, keys, held_here, held_again = [], [], [], [], [], []
        head = torch.arange(kv * group).view(kv, group, 1)
        padded = nn.functional.pad(self.rows, (0, VECTOR))
        query = key = 0
        for rows, skip in self._bands(kv * group):
            start, length = self.starts[rows, None], self.lengths[rows, None]
            column = torch.arange(max(VECTOR, int(length.max())))
            asked = torch.arange(int((length - skip * start).max())) + skip * start
            tokens = padded[rows, : len(column)]
            asking = tokens.gather(1, asked.clamp(max=len(column) - 1))
            hidden = (column > asked[: None if skip else 1, :, None]).repeat(1, group, 1)
            hidden = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            hidden = hidden.repeat_interleave(kv if skip else 1, dim=0)
            # One index a head; who computes what is the same for all of them
            queries.append((asking[:, None, None] * head.numel() + head).flatten())
            new = (asked >= start) & (asked < length)
            asked_here.append(new[:, None].expand(-1, head.numel(), -1).flatten())
            keys.append((tokens[:, None] * kv + torch.arange(kv)[:, None]).flatten())
            old, real = column < start, column < length
            held_again.append(old[:, None].expand(-1, kv, -1).flatten())
            held_here.append((real & ~old)[:, None].expand(-1, kv, -1).flatten())
            ends = query + len(queries[-1]), key + len(keys[-1])
            places = slice(query, ends[0]), slice(key, ends[1])
            bands.append(Band(len(rows) * kv, *places, hidden))
            query, key = ends
        of_query, of_key, again = map(torch.cat, (queries, keys, held_again))
        outputs = _inverse(of_query, torch.cat(asked_here), len(self.back) * kv * group)
        first = _inverse(of_key, torch.cat(held_here), len(self.back) * kv)
        again = again.nonzero().squeeze(1)
        return HeadRows(bands, of_query, of_key, outputs, first, again, of_key[again])

    def _bands(self, heads: int) -> Iterator[tuple[list[int], bool]]:
        """(rows, whether they leave a shared beginning's queries out) of each band.

        They do where it is the larger part of a row: that takes a mask of the row's own.
        """
        starts, lengths = self.starts.tolist(), self.lengths.tolist()
        shared = [2 * start > length for start, length in zip(starts, lengths, strict=True)]
        for skipped in (False, True):
            rows = [row for row, most in enumerate(shared) if most == skipped]
            keys = [max(VECTOR, lengths[row]) for row in rows]
            queries = [lengths[row] - skipped * starts[row] for row in rows]
            for band in cut_in_bands(queries, keys, heads):
                yield [rows[i] for i in band], skipped


def _inverse(index: Tensor, counts: Tensor, size: int) -> Tensor:
    """Where each of `size` numbers stands in `index`, among the places that count."""
    places = counts.nonzero().squeeze(1)
    return index.new_empty(size).index_copy_(0, index[places], places)


def cut_in_bands(queries: Sequence[int], keys: Sequence[int], heads: int) -> list[list[int]]:
    """Rows with so many queries and keys in the bands that cost least together.

    A band holds rows of neighbouring numbers of keys, and costs heads x its rows x its most queries
    x its most keys, and BAND.
    """
    order = sorted(range(len(keys)), key=keys.__getitem__)
    runs = [list(rows) for _, rows in groupby(order, key=keys.__getitem__)]
    most = [max(queries[row] for row in run) for run in runs]
    best = [(0, 0)]  # of the runs before each: the least cost, and where its last band begins
    for end in range(1, len(runs) + 1):
        options, rows, longest = [], 0, 0
        for begin in reversed(range(end)):
            rows, longest = rows + len(runs[begin]), max(longest, most[begin])
            weights = heads * rows * longest * keys[runs[end - 1][0]]
            options.append((best[begin][0] + weights + BAND, begin))
        best.append(min(options))
    bands, end = [], len(runs)
    while end > 0:
        begin = best[end][1]
        bands.append([*chain(*runs[begin:end])])
        end = begin
    return bands[::-1]


def attend(query: Tensor, key: Tensor, value: Tensor, over: Pass, scaling: float) -> Tensor:
    """Causal attention of packed tokens, (N, heads, size), (N, kv, size) twice -> (N, heads, size).

    All weights at once, in float32, whatever surrounds; `heads` a multiple of `kv`.
    """
    kv = key.shape[1]
    heads = over.heads(kv, query.shape[1] // kv)
    output: Any = _Attend.apply(query.float(), key.float(), value.float(), heads, scaling)
    return output.to(value.dtype)


class _Attend(torch.autograd.Function):
    """softmax(scaling q k^T + hidden) v, a batch of products a band."""

    @staticmethod
    @whole
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, heads: HeadRows, scaling: float
    ) -> Tensor:
        size = value.shape[-1]
        q = query.reshape(-1, size).index_select(0, heads.queries)
        k, v = (t.reshape(-1, size).index_select(0, heads.keys) for t in (key, value))
        output, weights = torch.empty_like(q), []
        for band in heads.bands:
            hidden = band.hidden.expand(band.count, -1, -1)
            logits = torch.baddbmm(hidden, band.queries(q), band.keys(k).mT, alpha=scaling)
            weights.append(logits.softmax(-1))
            torch.bmm(weights[-1], band.keys(v), out=band.queries(output))
        ctx.save_for_backward(q, k, v, *weights)
        ctx.heads, ctx.scaling = heads, scaling
        return output.index_select(0, heads.outputs).view(query.shape)

    @staticmethod
    @once_differentiable
    @whole_back
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, *weights), heads = ctx.saved_tensors, ctx.heads
        rows = gradient.reshape(-1, gradient.shape[-1])
        g = torch.zeros_like(q).index_copy_(0, heads.outputs, rows)
        of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for band, w in zip(heads.bands, weights, strict=True):
            torch.bmm(w.mT, band.queries(g), out=band.keys(of_v))
            of_w = torch.bmm(band.queries(g), band.keys(v).mT)
            of_logits = torch.ops.aten._softmax_backward_data(of_w, w, -1, w.dtype)
            for out, left, right in (
                (band.queries(of_q), of_logits, band.keys(k)),
                (band.keys(of_k), of_logits.mT, band.queries(q)),
            ):
                torch.baddbmm(out, left, right, beta=0, alpha=ctx.scaling, out=out)
        summed = (_summed(of, heads).view(len(gradient), -1, rows.shape[1]) for of in (of_k, of_v))
        of_q = of_q.index_select(0, heads.outputs).view(gradient.shape)
        return of_q, *summed, None, None


def _summed(of_keys: Tensor, heads: HeadRows) -> Tensor:
    """The gradient of each token's key or value, over all the rows that hold it."""
    found = of_keys.index_select(0, heads.first)
    if len(heads.again):
        found.index_add_(0, heads.again_of, of_keys.index_select(0, heads.again))
    return found


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """For transformers: (1, heads, N, size) of packed tokens -> (1, N, heads, size); else SDPA.

    `packed` knows which of the tokens see each other: a Pass, or what sampling keeps.
    """
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    tokens = (t[0].transpose(0, 1) for t in (query, key, value))
    return packed.attend(module, *tokens, **options).unsqueeze(0), None


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
    output = packed.attend(self, query, key, value, scaling=self.scaling)
    return self.o_proj(output.flatten(1).unsqueeze(0)), None
