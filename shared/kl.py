"""The KL meter: exact per-token KL from full distributions, and the sampled estimators k1, k2, k3.

All in nats, of the process stopped at the length cap: a completion that was cut keeps all its
tokens and gets no EOS. Estimators: J. Schulman, "Approximating KL Divergence" (2020).
"""

import torch
from torch import Tensor


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || ref) over the whole vocabulary at each position: (..., V) -> (...)."""
    policy, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (policy.exp() * (policy - ref)).sum(-1)


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log policy - log ref at tokens sampled from the policy: unbiased, may be negative."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Half the squared log-ratio: biased, small variance, its gradient is that of the KL."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ref/policy - 1 - log(ref/policy) at the policy's samples: unbiased, never negative."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over completion tokens: (B, T) -> (B,). What lies under the mask may be anything."""
    return values.masked_fill(~mask, 0.0).sum(1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over all completion tokens of the batch (token-weighted, never a mean of means)."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum()
