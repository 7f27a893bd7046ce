"""Numbers computed from evaluation rows. Pure functions.

Arrays are (seeds, prompts, samples) unless a docstring says otherwise. NaN is an error, never a
missing value: a failed run is left out by the caller.
"""

from collections.abc import Sequence
from math import log

import numpy as np
from numpy.typing import ArrayLike, NDArray


def win_rate(gold: ArrayLike, sft_gold: ArrayLike) -> NDArray[np.float64]:
    """P(gold > SFT's gold) + P(equal) / 2, per seed and prompt: (seeds, prompts).

    `gold` (seeds, prompts, n) against `sft_gold` (seeds or 1, prompts, m): all n * m pairs of the
    same seed and prompt. SFT against its own samples gives exactly 1/2.
    """
    ours, theirs = _samples(gold), _samples(sft_gold)
    _check_same_prompts(ours, theirs)
    sign = np.sign(ours[:, :, :, None] - theirs[:, :, None, :])
    return (1 + sign.mean(axis=(2, 3))) / 2


def hacking_gap(
    score: ArrayLike, sft_score: ArrayLike, gold: ArrayLike, sft_gold: ArrayLike
) -> NDArray[np.float64]:
    """Proxy gain minus gold gain, each in within-prompt standard deviations: (seeds, prompts).

        gain(x) = (mean x - mean sft_x) / sd(sft_x)
        gap = gain(score) - gain(gold)

    Means over the samples of one seed and prompt; `score`, `gold` (seeds, prompts, n), the SFT
    arrays (seeds or 1, prompts, m) with m >= 2. sd is `within_prompt_sd`: of the score per seed,
    since each seed has its own reward model and scale; of gold over all seeds, since gold has one
    scale. A score shifted per prompt or rescaled per seed leaves the gap unchanged.
    """
    score, sft_score, gold, sft_gold = map(_samples, (score, sft_score, gold, sft_gold))
    for ours, theirs in ((score, sft_score), (gold, sft_gold), (score, gold)):
        _check_same_prompts(ours, theirs)
    score_sd = np.array([within_prompt_sd(one_seed) for one_seed in sft_score])
    gold_sd = within_prompt_sd(sft_gold.reshape(-1, sft_gold.shape[-1]))
    proxy_gain = (score.mean(axis=2) - sft_score.mean(axis=2)) / score_sd[:, None]
    gold_gain = (gold.mean(axis=2) - sft_gold.mean(axis=2)) / gold_sd
    return proxy_gain - gold_gain


def within_prompt_sd(values: ArrayLike) -> float:
    """Pooled standard deviation of `values` (prompts, samples) around each prompt's mean.

    sqrt(sum of squared deviations / (prompts * (samples - 1))). ValueError for one sample per
    prompt or no variation: there is no unit to measure in.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.shape[1] < 2:
        raise ValueError("a within-prompt standard deviation needs two samples per prompt or more")
    if np.all(table == table[:, :1]):
        raise ValueError("the SFT samples of every prompt all have the same value")
    return float(np.sqrt(table.var(axis=1, ddof=1).mean()))


def matched_kl(kl: Sequence[float], gold: Sequence[float], level: float) -> float | None:
    """Gold of one seed's curve at `level` nats; None if the curve ends below it.

    `kl` (nats) and `gold` list the points of one method and seed, first (0, SFT's gold), then its
    evaluated checkpoints and settings in any order. Linear interpolation in sqrt(KL), where gold
    is close to straight for small KL. Points of equal KL count once, with their mean gold: the
    best of them would reward a method for having been tried more often. A KL a rounding error
    below zero counts as zero.
    """
    x, y = np.asarray(kl, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or x.size == 0 or x[0] != 0:
        raise ValueError("a curve is equally many KLs and golds, the first point at KL 0")
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or x.min() < -1e-3:
        raise ValueError(f"not a curve: KL {x.tolist()}, gold {y.tolist()}")
    if level < 0 or level > x.max():
        return None
    distinct, group = np.unique(np.maximum(x, 0), return_inverse=True)
    mean_gold = np.bincount(group, weights=y) / np.bincount(group)
    return float(np.interp(np.sqrt(level), np.sqrt(distinct), mean_gold))


def accuracy_from_gold(score_a: ArrayLike, score_b: ArrayLike, p_a_wins: ArrayLike) -> float:
    """Mean probability that the side with the higher score wins; equal scores count 1/2.

    All (pairs,). `p_a_wins` is the task's P(a beats b), so the labels' noise is integrated, not
    drawn; the most any scorer can reach is `bayes_accuracy(p_a_wins)`.
    """
    a, b, p = (np.asarray(v, dtype=np.float64) for v in (score_a, score_b, p_a_wins))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("found NaN or infinity among the scores")
    return float(np.mean(0.5 + np.sign(a - b) * (p - 0.5)))


def bayes_accuracy(p: ArrayLike) -> float:
    """Accuracy of the scorer that knows P(a beats b) = `p` (pairs,): mean of max(p, 1 - p)."""
    p = np.asarray(p, dtype=np.float64)
    return float(np.maximum(p, 1 - p).mean())


def calibration(
    prob_pred: ArrayLike, p_true: ArrayLike, bins: int = 10
) -> tuple[float, list[tuple[float, float, int]]]:
    """Expected calibration error and its bins: (mean predicted, mean true, pairs in the bin).

    `prob_pred`, `p_true` (pairs,): the reward model's and the task's P(a beats b). Bins of equal
    width on [0, 1], empty ones left out. The error is the pair-weighted mean of
    |mean predicted - mean true| (Guo et al. 2017, eq. 3, arXiv:1706.04599).
    """
    pred, true = np.asarray(prob_pred, dtype=np.float64), np.asarray(p_true, dtype=np.float64)
    if pred.shape != true.shape or not (np.all(pred >= 0) and np.all(pred <= 1)):
        raise ValueError("expected as many predictions, each in [0, 1], as true probabilities")
    which = np.minimum((pred * bins).astype(int), bins - 1)
    table = [
        (float(pred[which == i].mean()), float(true[which == i].mean()), int((which == i).sum()))
        for i in np.unique(which)
    ]
    error = sum(n * abs(predicted - actual) for predicted, actual, n in table) / pred.size
    return float(error), table


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Linear correlation of `x` and `y`, both (n,); 0 where either does not vary."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def best_of_n_kl(n: int) -> float:
    """Upper bound on KL(best of n || reference) in nats: log n - (n - 1) / n.

    Beirami et al. 2024 (arXiv:2401.01879); the exact KL where the score has a density, so no ties.
    """
    if n < 1:
        raise ValueError(f"best of {n} is not defined")
    return log(n) - (n - 1) / n


def _samples(values: ArrayLike) -> NDArray[np.float64]:
    """`values` as a (seeds, prompts, samples) array of finite numbers, or ValueError."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 3 or array.size == 0:
        raise ValueError(f"expected (seeds, prompts, samples), found shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("found NaN or infinity among the values")
    return array


def _check_same_prompts(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> None:
    """Same prompts, and the same seeds unless `theirs` has one that serves all."""
    if ours.shape[1] != theirs.shape[1] or theirs.shape[0] not in (1, ours.shape[0]):
        raise ValueError(f"seeds or prompts do not match: {ours.shape} and {theirs.shape}")
