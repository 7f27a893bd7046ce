"""The direct methods on one screen: pure functions of log-ratios to the reference.

`h` below is chosen - rejected, the difference of the two log-ratios. Every loss is returned per
item, and the caller averages. Keyword-only arguments are the hyperparameters.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LogRatios(NamedTuple):
    """log policy(y|x) - log ref(y|x), summed over completion tokens, in nats.

    Pair losses read `chosen` and `rejected` of the same prompts, (B,) each. KTO reads desirable
    and undesirable completions of any prompts, so that the two may differ in number.
    """

    chosen: Tensor  # (B,)
    rejected: Tensor  # (B,)
    chosen_tokens: Tensor  # (B,) completion lengths, EOS included
    rejected_tokens: Tensor  # (B,)
    mismatched: Tensor | None = None  # (M,) completions of other prompts: KTO's baseline
    chosen_logps: Tensor | None = None  # (B,) log policy(y|x), for losses without a reference
    rejected_logps: Tensor | None = None  # (B,)

    def swapped(self) -> "LogRatios":
        """The same pairs with the other side as the winner."""
        return self._replace(
            chosen=self.rejected,
            rejected=self.chosen,
            chosen_tokens=self.rejected_tokens,
            rejected_tokens=self.chosen_tokens,
            chosen_logps=self.rejected_logps,
            rejected_logps=self.chosen_logps,
        )


def dpo_loss(r: LogRatios, *, beta: float) -> Tensor:
    """Direct Preference Optimization, Rafailov et al. 2023, eq. 7 (arXiv:2305.18290).

        loss = -log sigmoid(beta * h)

    `beta` is the KL coefficient of the RLHF objective that this solves in closed form (eq. 3), in
    reward units per nat. One loss per pair, (B,). At policy == ref it is log 2.
    """
    return -F.logsigmoid(beta * (r.chosen - r.rejected))


def cdpo_loss(r: LogRatios, *, beta: float, label_smoothing: float) -> Tensor:
    """Conservative DPO, Mitchell 2023, "A note on DPO with noisy preferences".

        loss = -(1 - e) log sigmoid(beta * h) - e log sigmoid(-beta * h)

    Cross-entropy to labels that are wrong with probability e = `label_smoothing` in [0, 0.5).
    (B,). Least at h = logit(1 - e) / beta.
    """
    z = beta * (r.chosen - r.rejected)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def rdpo_loss(r: LogRatios, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO, Chowdhury et al. 2024, eq. 12 (arXiv:2403.00409).

        loss = [-(1 - e) log sigmoid(beta * h) + e log sigmoid(-beta * h)] / (1 - 2 e)

    Unbiased for DPO's loss on clean labels when a share e = `label_smoothing` of them is flipped.
    (B,). Not bounded below.
    """
    z = beta * (r.chosen - r.rejected)
    kept = -(1 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)
    return kept / (1 - 2 * label_smoothing)


def ipo_loss(r: LogRatios, *, tau: float) -> Tensor:
    """Identity Preference Optimization, Azar et al. 2023, eq. 17 (arXiv:2310.12036).

        loss = (h - 1 / (2 tau))^2

    Log-ratios are summed over tokens, as in the paper. (B,). `tau` in 1/nats.
    """
    return (r.chosen - r.rejected - 1 / (2 * tau)) ** 2


def ipo_token_loss(r: LogRatios, *, tau: float) -> Tensor:
    """IPO with each side's log-ratio averaged over its tokens, the form TRL trains.

        loss = (chosen / n_chosen - rejected / n_rejected - 1 / (2 tau))^2

    (B,). `tau` is per token: the sum form's tau times the mean length asks for a like margin.
    """
    chosen, rejected = r.chosen / r.chosen_tokens, r.rejected / r.rejected_tokens
    return (chosen - rejected - 1 / (2 * tau)) ** 2


def kto_loss(
    r: LogRatios, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """Kahneman-Tversky Optimization, Ethayarajh et al. 2024, eq. 8 (arXiv:2402.01306).

        desirable    w_d (1 - sigmoid(beta * (log-ratio - z)))
        undesirable  w_u (1 - sigmoid(beta * (z - log-ratio)))
        z = max(0, mean of the mismatched log-ratios), without gradient

    No pairs needed: one loss per completion, desirable ones first, (chosen + rejected,). At
    log-ratio == z it is half the weight. The mean is over the whole optimiser step's `mismatched`.
    """
    if r.mismatched is None:
        raise ValueError("kto needs `mismatched` log-ratios for its baseline")
    z = r.mismatched.detach().mean().clamp(min=0)
    desirable = desirable_weight * torch.sigmoid(beta * (z - r.chosen))
    undesirable = undesirable_weight * torch.sigmoid(beta * (r.rejected - z))
    return torch.cat([desirable, undesirable])


def expected_loss(loss: Callable[..., Tensor], r: LogRatios, p: Tensor, **setting: float) -> Tensor:
    """`loss` averaged over the label: the chosen side wins with probability p, (B,).

        p L(chosen, rejected) + (1 - p) L(rejected, chosen)

    What infinitely many labels of each pair would teach. Losses of pairs give (B,), those of single
    completions (2 B,), chosen ones first.
    """
    as_drawn = loss(r, **setting)
    other = loss(r.swapped(), **setting)
    if len(other) == 2 * len(p):
        p, other = torch.cat([p, p]), other.roll(len(p))
    return p * as_drawn + (1 - p) * other


LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo_loss,
    "cdpo": cdpo_loss,
    "rdpo": rdpo_loss,
    "ipo": ipo_loss,
    "ipo-token": ipo_token_loss,
    "kto": kto_loss,
}
UNPAIRED = {"kto"}  # losses over single completions
WEIGHTS = ("desirable_weight", "undesirable_weight")


def balancing_weights(desirable: int, undesirable: int) -> dict[str, float]:
    """KTO's weight of the rarer kind of answer, where there are more of the other; else none.

    The paper keeps desirable_weight * desirable / (undesirable_weight * undesirable) in [1, 4/3]
    (arXiv:2402.01306). Where weights of 1 do not, the rarer kind gets the weight that
    makes it 1.
    """
    ratio = desirable / undesirable
    if 1 <= ratio <= 4 / 3:
        return {}
    return {"desirable_weight": 1 / ratio} if ratio < 1 else {"undesirable_weight": ratio}
