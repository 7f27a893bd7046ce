"""Causal attention where a batch's tokens are packed (`shared.models.packing`).

Rows of tokens attend causally, a shared beginning's tokens once, in the row that computes them. On
a CPU a function in C (`kernels.c`) reads each row's vectors where they lie among all tokens;
elsewhere rows are gathered, aligned to the left, where padding comes last and is never looked at,
and go through transformers' SDPA.
"""
# pyright: reportIncompatibleMethodOverride=false

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from shared.cpu.kernels import linears, rotate, run, whole, whole_back
from shared.cpu.native import call, here


@dataclass
class Pass:
    """One packed pass: what attention and the last layer's MLP are told."""

    rows: Tensor  # (B, L) number of the token in each place; 0 where there is padding
    back: Tensor  # (N,) where in the flattened `rows` each token's attention is read
    starts: Tensor  # (B,) tokens of a row that another one computes: a shared beginning's
    lengths: Tensor  # (B,) tokens of a row
    read: Tensor  # (R,) numbers of the tokens whose last states are read

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        """Causal, (N, heads, size), (N, kv, size) twice -> (N, heads, size)."""
        if here(query):
            scaling = options.get("scaling") or query.shape[-1] ** -0.5
            return attend(query, key, value, self, scaling)

        def gathered(tokens: Tensor) -> Tensor:
            rows = tokens.index_select(0, self.rows.flatten())
            return rows.view(*self.rows.shape, *tokens.shape[1:]).transpose(1, 2)

        rows = gathered(query), gathered(key), gathered(value)
        output, _ = sdpa_attention_forward(layer, *rows, attention_mask=None, **options)
        return output.flatten(0, 1).index_select(0, self.back)


def attend(query: Tensor, key: Tensor, value: Tensor, over: Pass, scaling: float) -> Tensor:
    """softmax(scaling q k^T) v over what a token's row holds up to it, in float32.

    (N, heads, size), (N, kv, size) twice -> (N, heads, size); `heads` a multiple of `kv`.
    """
    output = run(_Attend, query.float(), key.float(), value.float(), over, scaling)
    return output.to(value.dtype)


class Rows(ctypes.Structure):
    """What `kernels.c` calls so."""

    NUMBERS = ("tokens", "rows", "width", "kv", "group", "size")
    TENSORS = ("token", "starts", "lengths")
    _fields_ = (
        *((name, ctypes.c_int64) for name in NUMBERS),
        *((name, ctypes.c_void_p) for name in TENSORS),
        ("scaling", ctypes.c_float),
    )


def _rows(query: Tensor, key: Tensor, over: Pass, scaling: float) -> Any:
    numbers = len(query), *over.rows.shape, key.shape[1], query.shape[1] // key.shape[1]
    tensors = over.rows, over.starts, over.lengths
    assert all(t.is_contiguous() and t.dtype == torch.int64 for t in tensors)
    at = (t.data_ptr() for t in tensors)
    return ctypes.byref(Rows(*numbers, query.shape[2], *at, scaling))


class _Attend(torch.autograd.Function):
    @staticmethod
    @whole
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, over: Pass, scaling: float
    ) -> Tensor:
        q, k, v = query.contiguous(), key.contiguous(), value.contiguous()
        output, about = torch.empty_like(q), q.new_empty(*q.shape[:2], 2)
        call("attend", _rows(q, k, over, scaling), q, k, v, output, about)
        ctx.save_for_backward(q, k, v, about)
        ctx.over, ctx.scaling = over, scaling
        return output

    @staticmethod
    @once_differentiable
    @whole_back
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, about = ctx.saved_tensors
        of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        parts = q.new_empty(*ctx.over.rows.shape, 2, *k.shape[1:])
        told = q, k, v, about, gradient.contiguous(), of_q, of_k, of_v, parts
        call("attend_backward", _rows(q, k, ctx.over, ctx.scaling), *told)
        return of_q, of_k, of_v, None, None


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
    """`forward` of an attention layer of Llama's kind, as its class has it, but that packed tokens
    on a CPU take no detour over (1, heads, N, size) and are turned by `rotate`."""
    packed = options.get("packed")
    if packed is None or not here(hidden_states) or hidden_states.dtype != torch.float32:
        about = position_embeddings, attention_mask, past_key_values
        return type(self).forward(self, hidden_states, *about, **options)
    cos, sin = (t[0].unsqueeze(1) for t in position_embeddings)  # pyright: ignore
    query, key, value = (
        states[0].unflatten(-1, (-1, self.head_dim))
        for states in linears(hidden_states, (self.q_proj, self.k_proj, self.v_proj))
    )
    if hasattr(self, "q_norm"):
        query, key = self.q_norm(query), self.k_norm(key)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    output = packed.attend(self, query, key, value, scaling=self.scaling)
    return self.o_proj(output.flatten(1).unsqueeze(0)), None
