"""Intervals, and what they let one say, for seeds crossed with prompts.

Every seed answers the same prompts, so a result is a (seeds, prompts) table with a seed effect, a
prompt effect and noise. Pure functions of such tables.
"""

from collections.abc import Sequence
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy import stats

from shared.config import Config

SEEDS_FOR_A_WINNER = 3


class Estimate(Config):
    """A mean over seeds and prompts with 95 % limits (null with one seed), and each seed's mean."""

    mean: float | None
    low: float | None = None
    high: float | None = None
    per_seed: list[float | None] = Field(default_factory=list)

    def text(self, form: str = ".3f") -> str:
        """`mean [low, high]`, each in `form`; what is null is left out, "-" without a mean.

        What rounds to zero has no minus.
        """
        form = f"z{form}" if form.startswith(".") else form
        if self.mean is None:
            return "-"
        if self.low is None or self.high is None:
            return format(self.mean, form)
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


def crossed_interval(values: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean of `values` (seeds, prompts) with limits for new seeds and new prompts.

        standard error^2 = var(seed means) / seeds + var(prompt means) / prompts

    For value = mean + seed effect + prompt effect + noise. Both terms contain the noise, so the sum
    is on average a little too large, never too small. Limits: Student's t with seeds - 1 degrees of
    freedom. One seed: no limits. One prompt: the ordinary t interval over seeds. NaN or infinity:
    ValueError.
    """
    table = finite_table(values)
    seeds, prompts = table.shape
    seed_means = table.mean(axis=1)
    variance = 0.0
    if seeds > 1:
        variance += seed_means.var(ddof=1) / seeds
    if prompts > 1:
        variance += table.mean(axis=0).var(ddof=1) / prompts
    return t_estimate(float(table.mean()), variance, seed_means.tolist(), level)


def seed_interval(values: Sequence[float | None], level: float = 0.95) -> Estimate:
    """Mean and t interval of one number per seed, as for metrics that have no value per prompt.

    A missing seed (None) leaves mean and limits null: a mean over the seeds that got there would
    favour the method that fails most. The seeds' values are kept.
    """
    known = [float(v) for v in values if v is not None]
    if not known or len(known) < len(values):
        return Estimate(mean=None, per_seed=list(values))
    return crossed_interval(np.array(known)[:, None], level)


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Estimate:
    """a - b, both (seeds, prompts), paired by seed and prompt. ValueError if the shapes differ."""
    left, right = finite_table(a), finite_table(b)
    if left.shape != right.shape:
        raise ValueError(f"cannot pair shapes {left.shape} and {right.shape}")
    return crossed_interval(left - right, level)


def describe_difference(a_name: str, b_name: str, difference: Estimate, what: str) -> str:
    """One sentence on `difference` = a - b of `what`, where more is better.

    Names a winner only with three seeds or more and an interval without zero.
    """
    if difference.mean is None:
        return f"not reached: {what} has no value for every seed of both"
    if sum(v is not None for v in difference.per_seed) < SEEDS_FOR_A_WINNER:
        return "undecided: fewer than three seeds"
    if difference.low is not None and difference.low > 0:
        return f"{a_name} is ahead of {b_name} in {what}"
    if difference.high is not None and difference.high < 0:
        return f"{b_name} is ahead of {a_name} in {what}"
    return f"no difference shown in {what}"


def interquartile_range(values: Sequence[float]) -> float | None:
    """Third minus first quartile (numpy's linear quantiles); None with fewer than two values."""
    if len(values) < 2:
        return None
    low, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.75])
    return float(high - low)


def t_estimate(
    mean: float, variance: float, per_seed: Sequence[float], level: float = 0.95
) -> Estimate:
    """mean +- t * sqrt(variance), t with len(per_seed) - 1 degrees of freedom; one seed: no limits.

    `variance` is the squared standard error of `mean`.
    """
    if len(per_seed) < 2:
        return Estimate(mean=mean, per_seed=list(per_seed))
    half = float(stats.t.ppf((1 + level) / 2, len(per_seed) - 1)) * sqrt(variance)
    return Estimate(mean=mean, low=mean - half, high=mean + half, per_seed=list(per_seed))


def finite_table(values: ArrayLike) -> NDArray[np.float64]:
    """`values` as a non-empty 2-D array of finite numbers, or ValueError."""
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(
            f"expected a non-empty 2-D array of finite numbers, found shape {table.shape}"
        )
    if not np.isfinite(table).all():
        raise ValueError("found NaN or infinity among the values")
    return table
