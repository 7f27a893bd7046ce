"""Operations with their gradients written out, for CPUs: there a training step's time goes into
passes over memory, and autograd makes twice as many of them.

Each is equal to the plain form but for rounding. Gradients of gradients are not there. All are
written in C (`kernels.c`, `products.c`), and but for `picked` are there where a C compiler is.
"""
# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd  # pyright: ignore[reportPrivateImportUsage]
from torch.autograd.function import once_differentiable

from shared.cpu.native import call, here, products_by

CHUNK = 2**20  # logits that one pass over them takes at a time: they stay in the processor's cache
LANES = 16  # numbers of a vector in C
FEWEST, MOST = 5, 4 * LANES  # rows of a product that is written in C
ROWS = MOST + 1  # at least, of another product that is
RUNS = 16  # of rows, whose gradients of a norm's weights are summed apart
whole = custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # in float32, whatever surrounds
whole_back = custom_bwd(device_type="cpu")


def run(operation: type[torch.autograd.Function], *inputs: Any) -> Any:
    """`operation` of `inputs`, where no gradient is asked for without autograd's preparations: on
    the few tokens of a sampling step they take longer than the operation.
    """
    if torch.is_grad_enabled():
        return operation.apply(*inputs)
    return operation.forward(_Forgetful(), *inputs)


class _Forgetful:
    """A context that keeps nothing for a gradient."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, (..., H), (H,) -> (..., H).

    Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4.
    """
    return run(_RMSNorm, x, weight, epsilon)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x, (N, heads, size), turned by each token's angles, (N, 1, size).

    Su et al. 2021 (arXiv:2104.09864), eq. 34, with Llama's pairs: entry i and i + size / 2, which
    have one angle.
    """
    return run(_Rotate, x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up, of equal shapes.

    Shazeer 2020 (arXiv:2002.05202), eq. 6, without its matrix products.
    """
    return run(_SwiGLU, gate, up)


def adapted(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x (W + scale B A)^T + bias: (..., K), (N, K), (N,), (R, K), (N, R) -> (..., N).

    `weight` and `bias` are frozen. Hu et al. 2021 (arXiv:2106.09685), eq. 3.
    """
    return run(_Adapted, x, weight, bias, a, b, scale)


def in_float32(x: Tensor, weight: Tensor) -> bool:
    """Whether their product is computed in float32."""
    whole = x.dtype == weight.dtype == torch.float32
    return whole and not torch.is_autocast_enabled(x.device.type)


def few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether a product without a gradient has so few rows that C is faster than PyTorch."""
    (n, k), rows = weight.shape, x.numel() // x.shape[-1]
    fits = FEWEST <= rows <= MOST and n >= LANES and k % LANES == 0
    return fits and not torch.is_grad_enabled() and in_float32(x, weight) and here(x)


def many_rows(x: Tensor, *weights: Tensor) -> bool:
    """Whether products of `x` with matrices have so many that C is faster here than PyTorch. In
    bfloat16 any are: PyTorch rounds sums, and what a token gets must not depend on others.
    """
    wide = min(x.shape[-1], *map(len, weights)) >= LANES
    if not wide or not here(x) or any(t.dtype != torch.float32 for t in (x, *weights)):
        return False
    if torch.is_autocast_enabled("cpu"):
        return products_by() == "vectors" and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.numel() >= ROWS * x.shape[-1] and products_by() is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, (..., K), (N, K), (N,) -> (..., N).

    A product of `few_rows` takes as long as reading the weights: a step of sampling consists of
    them.
    """
    if few_rows(x, weight):
        n, k = weight.shape
        y = x.new_empty(*x.shape[:-1], n)
        call("linear", x.numel() // k, n, k, x.contiguous(), weight.contiguous(), y)
    elif many_rows(x, weight):
        (y,) = run(_Products, x, weight)
    else:
        return nn.functional.linear(x, weight, bias)
    return y if bias is None else y + bias


def linears(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Outputs of up to three layers that see the same `x`."""
    weights = [layer.weight for layer in layers if _plain(layer)]
    if len(weights) < len(layers) or not many_rows(x, *weights):
        return [layer(x) for layer in layers]
    outputs = run(_Products, x, *weights)
    told = zip(outputs, layers, strict=True)
    return [y if layer.bias is None else y + layer.bias for y, layer in told]


def _plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a linear layer is its matrix alone: no adapter's, and no hook waits for its call."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks
    return type(layer) is nn.Linear and not any(hooks)


def picked(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p(token) of each row, (M, V), (M,) -> (M,).

    Not by `cross_entropy`: it is as fast and on large vocabularies less exact, by some 1e-5 nats.
    """
    return _Picked.apply(logits, tokens)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    @whole
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x, size = x.contiguous(), x.shape[-1]
        y, scale = torch.empty_like(x), x.new_empty(x.numel() // size)
        call("rms_norm", len(scale), size, epsilon, x, weight, y, scale)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    @whole_back
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        rows, size = len(scale), len(weight)
        of_x, of_weight = torch.empty_like(x), x.new_empty(RUNS, size)
        told = x, weight, scale, gradient.contiguous(), of_x, of_weight
        call("rms_norm_backward", RUNS, rows, size, *told)
        return of_x, of_weight.sum(0), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    @whole
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    @whole_back
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    x, y = x.contiguous(), torch.empty(x.shape)
    call("rotate", *x.shape, sign, x, cos, sin, y)
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    @whole
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up, y = gate.contiguous(), up.contiguous(), torch.empty(gate.shape)
        call("swiglu", y.numel(), gate, up, y)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    @whole_back
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        call("swiglu_backward", gate.numel(), gate, up, gradient.contiguous(), of_gate, of_up)
        return of_gate, of_up


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        x, weights = x.contiguous(), tuple(w.contiguous() for w in weights)
        outputs = tuple(x.new_empty(*x.shape[:-1], len(w)) for w in weights)
        ctx.rough = torch.is_autocast_enabled("cpu")
        call("products", ctx.rough, *_shape(x, weights), x, [*weights], [*outputs])
        ctx.save_for_backward(x, *weights)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        of_x, *of_weights = (
            torch.empty_like(t) if asked else None
            for t, asked in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        )
        told = x, weights, [g.contiguous() for g in gradients], of_x, of_weights
        call("products_backward", ctx.rough, *_shape(x, weights), *told)
        return of_x, *of_weights


def _of_input(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a product's other side, (M, N), (N, K) -> (M, K)."""
    if not many_rows(gradient, weight):
        return gradient @ weight
    of_x, weight = gradient.new_empty(len(gradient), weight.shape[1]), weight.contiguous()
    told = None, [weight], [gradient.contiguous()], of_x, [None]
    call("products_backward", False, *_shape(of_x, [weight]), *told)
    return of_x


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
        inside, y = flat @ a.T, linear(flat, weight, bias)
        ctx.save_for_backward(flat, weight, a, b, inside)
        ctx.scale = scale
        return y.addmm_(inside, b.T, alpha=scale).view(*x.shape[:-1], -1)

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


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        logits = logits.contiguous()
        if _in_c(logits):
            total = logits.new_empty(len(logits))
            call("log_sum_exp", *logits.shape, logits, total)
        else:
            total = torch.cat([part.logsumexp(-1) for part in logits.split(_rows(logits))])
        ctx.save_for_backward(logits, total, tokens)
        return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, total, tokens = ctx.saved_tensors
        of_logits, g = torch.empty_like(logits), gradient.unsqueeze(-1)
        if _in_c(logits):
            told = logits, total, gradient.contiguous(), of_logits
            call("log_sum_exp_backward", *logits.shape, *told)
        else:
            parts = (t.split(_rows(logits)) for t in (of_logits, logits, total.unsqueeze(-1), g))
            for out, part, sums, scale in zip(*parts, strict=True):
                torch.sub(part, sums, out=out).exp_().mul_(-scale)
        return of_logits.scatter_add_(-1, tokens.unsqueeze(-1), g), None


def _in_c(logits: Tensor) -> bool:
    return here(logits) and logits.dtype == torch.float32


def _rows(logits: Tensor) -> int:
    return max(1, CHUNK // logits.shape[-1])
