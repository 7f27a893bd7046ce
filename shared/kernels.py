"""Three small operations with their gradients written out, for CPUs: there a training step's time
goes into passes over memory, and autograd makes twice as many of them.

Each is equal to the plain form but for rounding. Gradients of gradients are not there.
"""
# pyright: reportIncompatibleMethodOverride=false

from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd  # pyright: ignore[reportPrivateImportUsage]
from torch.autograd.function import once_differentiable

CHUNK = 2**20  # logits that one pass over them takes at a time: they stay in the processor's cache
whole = custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # in float32, whatever surrounds
whole_back = custom_bwd(device_type="cpu")


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, (..., H), (H,) -> (..., H).

    Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4.
    """
    return _RMSNorm.apply(x, weight, epsilon)  # pyright: ignore[reportReturnType]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x, (N, heads, size), turned by each token's angles, (N, 1, size).

    Su et al. 2021 (arXiv:2104.09864), eq. 34, with Llama's pairs: entry i and i + size / 2, which
    have one angle.
    """
    return _Rotate.apply(x, cos, sin)  # pyright: ignore[reportReturnType]


def picked(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p(token) of each row, (M, V), (M,) -> (M,).

    Not by `cross_entropy`: it is as fast and on large vocabularies less exact, by some 1e-5 nats.
    """
    return _Picked.apply(logits, tokens)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    @whole
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    @whole_back
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        rows, g, scale = x.reshape(-1, size), gradient.reshape(-1, size), scale.reshape(-1, 1)
        # A layer norm whose mean is 0, but for the gradient that goes through its mean
        mean = torch.zeros_like(scale)
        about = g, rows, [size], mean, scale, weight, None, [True, True, False]
        of_x, of_weight, _ = torch.ops.aten.native_layer_norm_backward(*about)
        of_x += torch.mv(g, weight).div_(size).unsqueeze_(1).mul_(scale)
        return of_x.view(x.shape), of_weight, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    @whole
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    @whole_back
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    sin, turned = sin[..., :half], x * cos
    turned[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    turned[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return turned


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        total = torch.cat([part.logsumexp(-1) for part in logits.split(_rows(logits))])
        ctx.save_for_backward(logits, total, tokens)
        return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, total, tokens = ctx.saved_tensors
        of_logits, g = torch.empty_like(logits), gradient.unsqueeze(-1)
        parts = (t.split(_rows(logits)) for t in (of_logits, logits, total.unsqueeze(-1), g))
        for out, part, sums, scale in zip(*parts, strict=True):
            torch.sub(part, sums, out=out).exp_().mul_(-scale)
        return of_logits.scatter_add_(-1, tokens.unsqueeze(-1), g), None


def _rows(logits: Tensor) -> int:
    return max(1, CHUNK // logits.shape[-1])
