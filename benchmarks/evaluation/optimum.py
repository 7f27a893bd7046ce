"""The KL-regularised optimum where every completion is listed: closed forms, no sampling.

P prompts with N completions each; `ref_logps` (P, N) are log ref(y|x), each row a distribution, and
`rewards` (P, N) their rewards. All in float64. Rafailov et al. 2023 (arXiv:2305.18290), eqs. 3-5.
"""

import math

import torch
from scipy.optimize import root_scalar
from torch import Tensor


def log_partition(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log Z(x) = log sum_y ref(y|x) exp(r(x, y) / beta), (P,)."""
    return (ref_logps + rewards / beta).logsumexp(1)


def optimal_logps(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log pi*(y|x) = log ref + r / beta - log Z(x), (P, N): what maximises `objective`."""
    return (ref_logps + rewards / beta).log_softmax(1)


def expected(logps: Tensor, values: Tensor) -> Tensor:
    """E over y ~ `logps` of `values`, (P,). A completion of probability 0 counts nothing."""
    return (logps.exp() * values).sum(1)


def kl(logps: Tensor, other: Tensor) -> Tensor:
    """KL(`logps` || `other`) of each prompt, in nats, (P,)."""
    return torch.where(logps > -math.inf, logps.exp() * (logps - other), 0.0).sum(1)


def objective(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """J = E[r] - beta KL(pi || ref), (P,).

    At pi* it is beta log Z; any other policy misses that by beta KL(pi || pi*).
    """
    return expected(logps, rewards) - beta * kl(logps, ref_logps)


def frontier_reward(ref_logps: Tensor, rewards: Tensor, level: float) -> float:
    """The most mean reward of any policy whose mean KL over prompts is at most `level` nats.

    One beta for all prompts, found by bracketing; at the highest KL that tilting reaches, and
    beyond it, the mean of each prompt's best reward.
    """
    if level <= 0:
        return float(expected(ref_logps, rewards).mean())

    def excess(log_beta: float) -> float:
        tilted = optimal_logps(ref_logps, rewards, math.exp(log_beta))
        return float(kl(tilted, ref_logps).mean()) - level

    spread = float(rewards.max() - rewards.min())
    low, high = (math.log(spread) + way for way in (-12, 12)) if spread else (0.0, 0.0)
    if not spread or excess(low) <= 0:
        return float(rewards.max(1).values.mean())
    if excess(high) >= 0:  # a level so small that no beta in reach goes below it
        return float(expected(ref_logps, rewards).mean())
    beta = math.exp(root_scalar(excess, bracket=(low, high), xtol=1e-13).root)
    return float(expected(optimal_logps(ref_logps, rewards, beta), rewards).mean())


def best_of_n_logps(ref_logps: Tensor, scores: Tensor, n: int) -> Tensor:
    """log of what the favourite of `n` reference samples is distributed as, (P, N).

    With F the reference's mass at or below a score and f its mass at that score, the favourite has
    it with probability F^n - (F - f)^n; among equal scores the reference decides.
    """
    order = scores.sort(1).indices
    sorted_scores, mass = scores.gather(1, order), ref_logps.exp().gather(1, order)
    total = mass.cumsum(1)
    rising = sorted_scores.contiguous()
    last = torch.searchsorted(rising, rising, right=True) - 1
    before = torch.searchsorted(rising, rising, right=False) - 1
    up_to = total.gather(1, last)
    below = torch.where(before >= 0, total.gather(1, before.clamp(min=0)), 0.0)
    share = (up_to**n - below**n) / (up_to - below)  # of the group, over its reference mass
    found = torch.empty_like(mass).scatter(1, order, mass * share)
    return (found / found.sum(1, keepdim=True)).log()


def ipo_logps(ref_logps: Tensor, preference: Tensor, tau: float) -> Tensor:
    """Where IPO with infinitely many pairs of reference samples ends, (P, N).

    Azar et al. 2023 (arXiv:2310.12036), eqs. 9 and 17: log pi/ref = E over y' ~ ref of
    (2 P(y beats y') - 1) / (2 tau), up to a constant a prompt. `preference` (P, N, N) is
    P(row beats column). (Their 1/(2 tau) is the target for a certain win.)
    """
    margin = ((2 * preference - 1) * ref_logps.exp().unsqueeze(1)).sum(2) / (2 * tau)
    return (ref_logps + margin).log_softmax(1)


def bradley_terry(rewards: Tensor) -> Tensor:
    """P(y beats y') = sigmoid(r(y) - r(y')), (P, N, N)."""
    return (rewards.unsqueeze(2) - rewards.unsqueeze(1)).sigmoid()
