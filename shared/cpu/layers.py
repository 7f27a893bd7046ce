"""Attention in C: over packed tokens with its gradient, and of a step of sampling."""
# pyright: reportIncompatibleMethodOverride=false

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.cpu.native import call

LANES = 16  # numbers of a vector in C


def attend(query: Tensor, key: Tensor, value: Tensor, packed: Any, scaling: float) -> Tensor:
    """softmax(scaling q k^T) v over what a token's row holds up to it, float32.

    (N, heads, size), (N, kv, size) twice -> (N, heads, size); `heads` a multiple of `kv`. `packed`
    has `rows`, `starts` and `lengths`, see `shared.models.attention.Pass`.
    """
    q, k, v = query.contiguous(), key.contiguous(), value.contiguous()
    if torch.is_grad_enabled():
        return _Attend.apply(q, k, v, packed, scaling)  # pyright: ignore[reportReturnType]
    return _attended(q, k, v, packed, scaling)[0]


def attend_step(
    query: Tensor, keys: Tensor, values: Tensor, first: Tensor, seen: int, scaling: float
) -> Tensor:
    """A new token a row attends to its row's columns from `first` (B,) up to `seen`.

    (B, heads, size), (B, kv, columns, size) twice -> (B, heads, size). `size` and `columns` are
    multiples of LANES.
    """
    query, output = query.contiguous(), torch.empty_like(query)
    rows, heads, size = query.shape
    shape = rows, keys.shape[1], heads // keys.shape[1], size, keys.shape[2]
    call("attend_step", *shape, seen, scaling, first.data_ptr(), query, keys, values, output)
    return output


class Rows(ctypes.Structure):
    """What `kernels.c` calls so."""

    NUMBERS = ("tokens", "rows", "width", "kv", "group", "size")
    TENSORS = ("token", "starts", "lengths")
    _fields_ = (
        *((name, ctypes.c_int64) for name in NUMBERS),
        *((name, ctypes.c_void_p) for name in TENSORS),
        ("scaling", ctypes.c_float),
    )


def _rows(query: Tensor, key: Tensor, packed: Any, scaling: float) -> Any:
    numbers = len(query), *packed.rows.shape, key.shape[1], query.shape[1] // key.shape[1]
    tensors = packed.rows, packed.starts, packed.lengths
    assert all(t.is_contiguous() and t.dtype == torch.int64 for t in tensors)
    pointers = (t.data_ptr() for t in tensors)
    return ctypes.byref(Rows(*numbers, query.shape[2], *pointers, scaling))


def _attended(
    q: Tensor, k: Tensor, v: Tensor, packed: Any, scaling: float
) -> tuple[Tensor, Tensor]:
    """The output, and of each softmax its largest logit and 1 / its sum."""
    output, softmax = torch.empty_like(q), q.new_empty(*q.shape[:2], 2)
    call("attend", _rows(q, k, packed, scaling), q, k, v, output, softmax)
    return output, softmax


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: Any, scaling: float) -> Tensor:
        output, softmax = _attended(q, k, v, packed, scaling)
        ctx.save_for_backward(q, k, v, softmax)
        ctx.packed, ctx.scaling = packed, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, softmax = ctx.saved_tensors
        of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        parts = q.new_empty(*ctx.packed.rows.shape, 2, *k.shape[1:])
        tensors = q, k, v, softmax, gradient.contiguous(), of_q, of_k, of_v, parts
        call("attend_backward", _rows(q, k, ctx.packed, ctx.scaling), *tensors)
        return of_q, of_k, of_v, None, None
