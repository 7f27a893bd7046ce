"""What vLLM computes on a CPU with our kernels, in float32: products of few rows, and norms.

Products are by the weights themselves. vLLM's own are by packed copies, which take longer at a
decoding step, and which every new set of weights has to be packed into.
"""

from typing import Any

import torch
from torch import Tensor

from shared.cpu.kernels import linear, rms_norm
from shared.cpu.native import library

PROVIDER = "klash"
NORMS = ("rms_norm", "fused_add_rms_norm")


def use_kernels() -> dict[str, Any]:
    """Let engines that start from now on use ours: arguments for them, none without a compiler."""
    if library() is None:
        return {}
    from vllm import ir
    from vllm.model_executor.layers import utils

    if PROVIDER not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_norms)(_rms_norm)
        both = ir.ops.fused_add_rms_norm
        both.register_impl(PROVIDER, supports_args=_norms_sum)(_fused_add_rms_norm)
        packed = utils.dispatch_cpu_unquantized_gemm

        def choose(layer: Any, remove_weight: bool) -> None:
            if layer.weight.dtype == torch.float32 and layer.weight.ndim == 2:
                layer.cpu_linear = _product
            else:
                packed(layer, remove_weight)

        utils.dispatch_cpu_unquantized_gemm = choose
    return {"ir_op_priority": {name: [PROVIDER] for name in NORMS}}


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`detach` leaves a plain tensor: of vLLM's parameters, each question takes microseconds."""
    return linear(x, weight.detach(), bias)


def _rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    assert weight is not None
    return rms_norm(x, weight.detach(), epsilon)


def _fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    total = x + x_residual
    return _rms_norm(total, weight, epsilon), total


def _norms(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return x.dtype == torch.float32 and weight is not None and variance_size is None


def _norms_sum(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return x_residual.dtype == torch.float32 and _norms(x, weight, epsilon, variance_size)
