"""Norms, rotary positions, SwiGLU and matrix products in C, each with its gradient.

`shared.models.ops` says what each one is; these are equal to it but for rounding. All take float32
on a CPU and give float32, whatever surrounds them. Gradients of gradients are not there.
"""
# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.cpu.native import call, products_are_faster

LANES = 16  # numbers of a vector in C
FEWEST, MOST = 5, 4 * LANES  # rows of a product for a step of sampling
ROWS = MOST + 1  # at least, of a product with a gradient
RUNS = 16  # of rows, whose gradients of a norm's weights are summed on their own


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """(..., H), (H,) -> (..., H)."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, epsilon)  # pyright: ignore[reportReturnType]
    return _normed(x.contiguous(), weight, epsilon)[0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(N, heads, size), (N, 1, size) twice -> (N, heads, size)."""
    cos, sin = cos.contiguous(), sin.contiguous()
    if torch.is_grad_enabled():
        return _Rotate.apply(x, cos, sin)  # pyright: ignore[reportReturnType]
    return _turned(x, cos, sin, 1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Of equal shapes."""
    gate, up = gate.contiguous(), up.contiguous()
    if torch.is_grad_enabled():
        return _SwiGLU.apply(gate, up)  # pyright: ignore[reportReturnType]
    return _gated(gate, up)


def products(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """x (..., K) times each of up to three weights (N, K), transposed."""
    if torch.is_grad_enabled():
        return _Products.apply(x, *weights)  # pyright: ignore[reportReturnType]
    return _multiplied(x.contiguous(), [w.contiguous() for w in weights], _rounded())


def few_rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) times weight (N, K) transposed, in the time it takes to read the weight once."""
    n, k = weight.shape
    y = x.new_empty(*x.shape[:-1], n)
    call("linear", x.numel() // k, n, k, x.contiguous(), weight.contiguous(), y)
    return y


def takes_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether a product without a gradient has so few rows that C is faster than PyTorch."""
    (n, k), rows = weight.shape, x.numel() // x.shape[-1]
    fits = FEWEST <= rows <= MOST and n >= LANES and k % LANES == 0
    return fits and not torch.is_grad_enabled() and in_float32(x, weight)


def takes_many_rows(x: Tensor, *weights: Tensor) -> bool:
    """Whether products of `x` with matrices have so many that C is faster here than PyTorch. In
    bfloat16 any are: PyTorch rounds sums, and what a token gets must not depend on others.
    """
    wide = min(x.shape[-1], *map(len, weights)) >= LANES
    if not wide or any(t.dtype != torch.float32 for t in (x, *weights)):
        return False
    if torch.is_autocast_enabled("cpu"):
        return products_are_faster() and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.numel() >= ROWS * x.shape[-1] and products_are_faster()


def in_float32(x: Tensor, weight: Tensor) -> bool:
    """Whether their product is computed in float32."""
    single = x.dtype == weight.dtype == torch.float32
    return single and not torch.is_autocast_enabled(x.device.type)


def adapted(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x (W + scale B A)^T + bias: (..., K), (N, K), (N,), (R, K), (N, R) -> (..., N)."""
    if torch.is_grad_enabled():
        return _Adapted.apply(x, weight, bias, a, b, scale)  # pyright: ignore[reportReturnType]
    flat = x.reshape(-1, x.shape[-1])
    return _with_lora(flat, weight, bias, flat @ a.T, b, scale).view(*x.shape[:-1], -1)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        y, scale = _normed(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        rows, size = len(scale), len(weight)
        of_x, of_weight = torch.empty_like(x), x.new_empty(RUNS, size)
        tensors = x, weight, scale, gradient.contiguous(), of_x, of_weight
        call("rms_norm_backward", RUNS, rows, size, *tensors)
        return of_x, of_weight.sum(0), None


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    y, scale = torch.empty_like(x), x.new_empty(x.numel() // size)
    call("rms_norm", len(scale), size, epsilon, x, weight, y, scale)
    return y, scale


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    x, y = x.contiguous(), torch.empty(x.shape)
    call("rotate", *x.shape, sign, x, cos, sin, y)
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        call("swiglu_backward", gate.numel(), gate, up, gradient.contiguous(), of_gate, of_up)
        return of_gate, of_up


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape)
    call("swiglu", y.numel(), gate, up, y)
    return y


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        x, weights = x.contiguous(), tuple(w.contiguous() for w in weights)
        ctx.rounded = _rounded()
        ctx.save_for_backward(x, *weights)
        return tuple(_multiplied(x, weights, ctx.rounded))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        of_x, *of_weights = (
            torch.empty_like(t) if needed else None
            for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        )
        tensors = x, weights, [g.contiguous() for g in gradients], of_x, of_weights
        call("products_backward", ctx.rounded, *_shape(x, weights), *tensors)
        return of_x, *of_weights


def _multiplied(x: Tensor, weights: Sequence[Tensor], rounded: bool) -> list[Tensor]:
    outputs = [x.new_empty(*x.shape[:-1], len(w)) for w in weights]
    call("products", rounded, *_shape(x, weights), x, [*weights], outputs)
    return outputs


def _rounded() -> bool:
    """Whether products are of numbers as bfloat16."""
    return torch.is_autocast_enabled("cpu")


def _shape(x: Tensor, weights: Sequence[Tensor]) -> tuple[int, int, int, list[int]]:
    size = x.shape[-1]
    return len(weights), x.numel() // size, size, [*map(len, weights)]


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inside = flat @ a.T
        ctx.save_for_backward(flat, weight, a, b, inside)
        ctx.scale = scale
        return _with_lora(flat, weight, bias, inside, b, scale).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, inside = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        of_inside = (g @ b).mul_(ctx.scale)
        of_b, of_a, of_x = (g.T @ inside).mul_(ctx.scale), of_inside.T @ flat, None
        if ctx.needs_input_grad[0]:
            of_x = _of_input(g, weight).addmm_(of_inside, a).view(*gradient.shape[:-1], -1)
        return of_x, None, None, of_a, of_b, None


def _with_lora(
    flat: Tensor, weight: Tensor, bias: Tensor | None, inside: Tensor, b: Tensor, scale: float
) -> Tensor:
    if takes_few_rows(flat, weight):
        y = few_rows_product(flat, weight)
    elif takes_many_rows(flat, weight):
        (y,) = _multiplied(flat.contiguous(), [weight.contiguous()], rounded=False)
    else:
        return torch.nn.functional.linear(flat, weight, bias).addmm_(inside, b.T, alpha=scale)
    return (y if bias is None else y.add_(bias)).addmm_(inside, b.T, alpha=scale)


def _of_input(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a product's other side, (M, N), (N, K) -> (M, K)."""
    if not takes_many_rows(gradient, weight):
        return gradient @ weight
    of_x, weight = gradient.new_empty(len(gradient), weight.shape[1]), weight.contiguous()
    tensors = None, [weight], [gradient.contiguous()], of_x, [None]
    call("products_backward", False, *_shape(of_x, [weight]), *tensors)
    return of_x
