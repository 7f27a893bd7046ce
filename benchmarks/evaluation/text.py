"""Measures of text that need no judge, and alarms where one leaves its bounds. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy.special import expit

NGRAM = 4


def repetition(ids: Sequence[int], n: int = NGRAM) -> float:
    """Share of the text's n-grams that stood in it before; 0 of a text with none.

    seq-rep-n of Welleck et al. 2020 (arXiv:1908.04319).
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[Sequence[int]], n: int = 2) -> float:
    """Different n-grams of all `texts` over all that they hold; 1 where there is none.

    distinct-n of Li et al. 2016 (arXiv:1510.03055).
    """
    grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def length_controlled_win_rate(
    gold: NDArray[np.float64],
    length: NDArray[np.float64],
    other_gold: NDArray[np.float64],
    other_length: NDArray[np.float64],
) -> float:
    """What the win rate would be at equal lengths; all (prompts, samples), of the same prompts.

    A logistic regression of winning on tanh of the length difference in its standard deviations,
    read at no difference: the length term of Dubois et al. 2024 (arXiv:2404.04475, eq. 2), with
    their regularisation. Each answer meets each of the other's on its prompt; a tie counts half.
    """
    wins = (1 + np.sign(gold[:, :, None] - other_gold[:, None, :])).ravel() / 2
    gap = (length[:, :, None] - other_length[:, None, :]).ravel()
    x = np.tanh(gap / gap.std()) if gap.std() > 0 else np.zeros_like(gap)

    def loss(weights: NDArray[np.float64]) -> float:
        z = weights[0] + weights[1] * x
        likelihood = wins * np.logaddexp(0, -z) + (1 - wins) * np.logaddexp(0, z)
        return float(likelihood.mean() + 1e-3 * weights @ weights)

    found = optimize.minimize(loss, np.zeros(2), method="BFGS")
    return float(expit(found.x[0]))


@dataclass(frozen=True)
class TextMeasures:
    """Means over all completions of one method."""

    length: float  # tokens
    repetition: float
    distinct_2: float
    perplexity: float | None  # a token, under the starting model; None of best-of-n
    truncated: float
    empty: float


def alarms(found: TextMeasures, start: TextMeasures) -> list[str]:
    """What is wrong with a method's text beside the starting model's, in words."""
    said = []
    if found.empty > max(0.05, 2 * start.empty):
        said.append(f"{found.empty:.0%} of the answers are empty (the start: {start.empty:.0%})")
    if found.repetition > max(0.1, 2 * start.repetition):
        said.append(
            f"it repeats itself: {found.repetition:.0%} of its 4-grams stood before in the same "
            f"answer (the start: {start.repetition:.0%})"
        )
    if found.distinct_2 < 0.5 * start.distinct_2:
        said.append(
            f"it says the same to all: {found.distinct_2:.2f} of its word pairs are different "
            f"(the start: {start.distinct_2:.2f})"
        )
    if not 0.5 <= found.length / max(start.length, 1.0) <= 2.0:
        said.append(
            f"its answers are {found.length / max(start.length, 1.0):.1f} times as long as the "
            "start's"
        )
    if found.truncated > max(0.1, start.truncated + 0.25):
        said.append(
            f"{found.truncated:.0%} of its answers are cut at the length cap "
            f"(the start: {start.truncated:.0%})"
        )
    if found.perplexity is not None and start.perplexity is not None:
        ratio = found.perplexity / start.perplexity
        if ratio > 4:
            said.append(f"to the start its text is {ratio:.1f} times as surprising as its own")
    return said
