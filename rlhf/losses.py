"""Classic RLHF as pure functions of tensors: Bradley-Terry, reward shaping, GAE, PPO's losses.

Every (B, T) tensor runs over completion tokens; `mask` True = a completion token, EOS included.
What lies outside the mask never changes a result.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.kl import masked_mean


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, center: float = 0.0
) -> Tensor:
    """Reward-model loss, Ouyang et al. 2022, eq. 1 (arXiv:2203.02155): one per pair, (B,).

        loss = -log sigmoid(chosen - rejected - margin) + center * (chosen + rejected)^2

    `margin` (B,): how much better the winner is, Touvron et al. 2023, eq. 2 (arXiv:2307.09288).
    `center` keeps scores near 0, Eisenstein et al. 2023 (arXiv:2312.09244). Equal scores: log 2.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -F.logsigmoid(difference) + center * (chosen + rejected) ** 2


def shaped_rewards(scores: Tensor, kl_terms: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Per-token reward, (B, T): -kl_coef * kl_terms, and the score at each row's last token.

    Ziegler et al. 2019, eq. 2 (arXiv:1909.08593). `kl_terms` (B, T) are log policy - log ref in
    nats, `scores` (B,). Each row sums to score - kl_coef * sum of its kl_terms.
    """
    rewards = (-kl_coef * kl_terms).masked_fill(~mask, 0.0)
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, Schulman et al. 2016, eq. 16 (arXiv:1506.02438).

        A_t = sum_k (gamma * lam)^k delta_{t+k},  delta_t = r_t + gamma * V_{t+1} - V_t

    V after the last token of a row is 0: EOS ends the episode, and so does the length cap.
    Returns (advantages, returns = advantages + values), each (B, T), 0 outside the mask.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = delta + gamma * lam * following
        advantages[:, t] = following
        next_value = values[:, t]
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale to variance 1 over the mask and, with `shift_mean`, to mean 0; 0 outside the mask."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    scaled = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (scaled if shift_mean else scaled + mean).masked_fill(~mask, 0.0)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped objective, Schulman et al. 2017, eq. 7 (arXiv:1707.06347), token mean.

        loss = mean max(-A rho, -A clip(rho, 1 - clip, 1 + clip)),  rho = exp(logprob - old)

    The gradient is 0 where A > 0 and rho > 1 + clip, or A < 0 and rho < 1 - clip. `weights` (B, T)
    multiply each token's term: importance weights where another distribution sampled.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        numbers = {
            "ppo/policy/clipfrac": masked_mean((clipped > unclipped).float(), mask),
            "ppo/policy/approxkl": masked_mean(torch.expm1(log_ratio) - log_ratio, mask),
            "ppo/policy/ratio": masked_mean(ratio, mask),
        }
    losses = torch.maximum(unclipped, clipped)
    return masked_mean(losses if weights is None else weights * losses, mask), numbers


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped squared error, half of it, token mean (Ziegler et al. 2019; Huang et al. 2024).

    loss = mean 0.5 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)
    """
    values, old_values, returns = (t.masked_fill(~mask, 0.0) for t in (values, old_values, returns))
    kept_near = torch.clamp(values, old_values - clip, old_values + clip)
    unclipped, clipped = (values - returns) ** 2, (kept_near - returns) ** 2
    with torch.no_grad():
        numbers = {"ppo/val/clipfrac": masked_mean((clipped > unclipped).float(), mask)}
    return 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask), numbers


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the mask; 0 if `values` tell nothing."""
    error, returns = (returns - values)[mask], returns[mask]
    variance = returns.var(unbiased=False)
    return 0.0 if variance == 0 else float(1 - error.var(unbiased=False) / variance)
