"""A decoder's operations in plain PyTorch: specification, fallback, GPU path and test oracle.

On CPUs `shared.cpu` takes over where it is there, with equal results but for rounding: delete its
folder, and everything runs, slower. No other module knows of it. What makes passes cheaper without
changing a result can be switched off here, for the study that measures just that (`using`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from shared.cpu import kernels, layers, native
except ModuleNotFoundError as error:  # the folder is not there
    if error.name is None or not error.name.startswith("shared.cpu"):
        raise
    kernels = layers = native = None


@dataclass(frozen=True)
class Shortcuts:
    """What a pass does not do, or does faster, without changing its result."""

    c: bool = True  # operations in C, on a CPU
    c_products: bool = True  # among them matrix products of many rows
    packed: bool = True  # no padding; else transformers' own pass over padded rows
    packed_sampling: bool = True  # likewise where completions are sampled
    beginnings_once: bool = True  # what rows begin with in common is computed once
    read_only: bool = True  # tokens that nothing reads are not computed
    block: int = 2**26  # logits that are held at once: 256 MiB in float32


ALL = Shortcuts()
_active = ALL


def active() -> Shortcuts:
    """Those in force in this process."""
    return _active


@contextmanager
def using(shortcuts: Shortcuts) -> Iterator[None]:
    """`shortcuts` and no others, in this process, until the end of the block."""
    global _active
    before, _active = _active, shortcuts
    try:
        yield
    finally:
        _active = before


def computed_by() -> str:
    """What runs these operations here: results differ in their last digits with it."""
    if native is None or native.library() is None:
        return "PyTorch"
    return "C, products" if native.products_are_faster() else "C"


def _in_c(*tensors: Tensor) -> bool:
    """Whether C can compute with `tensors` here."""
    if native is None or not _active.c:
        return False
    return all(t.device.type == "cpu" for t in tensors) and native.library() is not None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, (..., H), (H,) -> (..., H), in float32 inside.

    Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4.
    """
    if kernels is not None and _in_c(x) and x.dtype == torch.float32:
        return kernels.rms_norm(x, weight, epsilon)
    single = x.float()
    normed = single * torch.rsqrt(single.square().mean(-1, keepdim=True) + epsilon)
    return weight * normed.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x, (N, heads, size), turned by each token's angles, (N, 1, size).

    Su et al. 2021 (arXiv:2104.09864), eq. 34, with Llama's pairs: entry i and i + size / 2, which
    have one angle.
    """
    if kernels is not None and _in_c(x):
        return kernels.rotate(x.float(), cos.float(), sin.float())
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up, of equal shapes.

    Shazeer 2020 (arXiv:2002.05202), eq. 6, without its matrix products.
    """
    if kernels is not None and _in_c(gate) and gate.dtype == up.dtype == torch.float32:
        return kernels.swiglu(gate, up)
    return F.silu(gate) * up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, (..., K), (N, K), (N,) -> (..., N)."""
    if kernels is None or not _in_c(x):
        return F.linear(x, weight, bias)
    if kernels.takes_few_rows(x, weight):
        y = kernels.few_rows_product(x, weight)
    elif _active.c_products and kernels.takes_many_rows(x, weight):
        (y,) = kernels.products(x, [weight])
    else:
        return F.linear(x, weight, bias)
    return y if bias is None else y + bias


def linears(x: Tensor, modules: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Outputs of up to three layers that see the same `x`."""
    weights = [module.weight for module in modules if _is_plain(module)]
    at_once = len(weights) == len(modules) and _active.c_products
    if kernels is None or not at_once or not _in_c(x) or not kernels.takes_many_rows(x, *weights):
        return [module(x) for module in modules]
    outputs = zip(kernels.products(x, weights), modules, strict=True)
    return [y if module.bias is None else y + module.bias for y, module in outputs]  # pyright: ignore


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a linear layer is its matrix alone: no adapter's, and no hook waits for its call."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
    return type(module) is nn.Linear and not any(hooks)


def adapted(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x (W + scale B A)^T + bias: (..., K), (N, K), (N,), (R, K), (N, R) -> (..., N).

    `weight` and `bias` are frozen. Hu et al. 2021 (arXiv:2106.09685), eq. 3.
    """
    if kernels is not None and _in_c(x) and kernels.in_float32(x, weight):
        return kernels.adapted(x, weight, bias, a, b, scale)
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * scale


def attend(query: Tensor, key: Tensor, value: Tensor, packed: Any, scaling: float) -> Tensor:
    """Causal attention of packed tokens: softmax(scaling q k^T) v over a token's row up to it.

    (N, heads, size), (N, kv, size) twice -> (N, heads, size); `heads` a multiple of `kv`. `packed`:
    a `shared.models.attention.Pass`, which knows the rows. Here rows are gathered, aligned to the
    left, where padding comes last and is never looked at.
    """
    if layers is not None and _in_c(query):
        output = layers.attend(query.float(), key.float(), value.float(), packed, scaling)
        return output.to(value.dtype)
    groups = query.shape[1] // key.shape[1]

    def rows(tokens: Tensor, repeats: int) -> Tensor:
        found = tokens.repeat_interleave(repeats, 1).index_select(0, packed.rows.flatten())
        return found.view(*packed.rows.shape, *found.shape[1:]).transpose(1, 2)

    output = F.scaled_dot_product_attention(
        rows(query, 1), rows(key, groups), rows(value, groups), is_causal=True, scale=scaling
    )
    return output.transpose(1, 2).flatten(0, 1).index_select(0, packed.back)


def attend_step(
    query: Tensor, keys: Tensor, values: Tensor, first: Tensor, seen: int, scaling: float
) -> Tensor:
    """Attention of one new token a row, to its row's columns from `first` (B,) up to `seen`.

    (B, heads, size), (B, kv, columns, size) twice -> (B, heads, size), in float32. Columns after
    `seen` may hold anything finite.
    """
    vectors = query.shape[-1] % VECTOR == 0 and keys.shape[2] % VECTOR == 0
    if layers is not None and vectors and _in_c(query):
        return layers.attend_step(query.float(), keys, values, first, seen, scaling)
    columns = torch.arange(max(VECTOR, seen), device=query.device)
    outside = (columns < first.unsqueeze(1)) | (columns >= seen)
    hidden = torch.zeros(outside.shape, device=query.device).masked_fill(outside, -torch.inf)
    q = query.float().unflatten(1, (keys.shape[1], -1))
    logits = q @ keys[:, :, : len(columns)].mT * scaling + hidden[:, None, None]
    return (logits.softmax(-1) @ values[:, :, : len(columns)]).view(query.shape)


VECTOR = 16  # numbers; PyTorch's softmax over fewer is ten times slower each
