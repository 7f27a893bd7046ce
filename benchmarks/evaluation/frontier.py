"""The most gold a policy can have at a given mean KL to the reference.

The policy with the most gold at mean KL <= k is the reference tilted by exp(gold / b), with one
temperature b for all prompts. Its gold and KL are estimated from reference samples: the better
the policy, the fewer samples look like it, and past their reach only an upper bound is left.
Gold in the task's units, KL in nats per sequence.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from benchmarks.evaluation.statistics import Estimate, finite_table, t_estimate
from shared.config import Config

Array = NDArray[np.float64]
EFFICIENCY_MIN_KL = 0.1  # nats; below it the frontier's own gain is too small to divide by


class FrontierPoint(Config):
    """The most gold at mean KL <= kl. `is_bound`: past the samples' reach, an upper bound."""

    kl: float
    gold: float
    effective_sample_size: float
    is_bound: bool


class TiltTable(NamedTuple):
    """The tilted reference per temperature (rows, hottest first) and prompt (columns)."""

    b: Array  # (B,) temperatures, falling
    kl: Array  # (B, P) KL(tilted || reference)
    gold: Array  # (B, P) mean outcome under the tilted reference
    log_z: Array  # (B, P) log mean exp(objective / b)
    ess: Array  # (B, P) effective number of samples
    ref_gold: Array  # (P,) mean outcome under the reference
    ref_ess: Array  # (P,) effective number of samples at KL 0: their number
    bounded: bool  # outcome is the objective, so that log_z bounds it past the samples' reach


def default_temperatures(count: int = 80) -> Array:
    """(count,) from 20 to 0.02; 80 are 9 % apart, dense enough to interpolate between."""
    return np.geomspace(20.0, 0.02, count)


def tilt_table(
    objective: ArrayLike,
    temperatures: ArrayLike,
    outcome: ArrayLike | None = None,
    *,
    log_ref: ArrayLike | None = None,
) -> TiltTable:
    """Tilt each prompt's reference samples by exp(objective / b), for each of `temperatures` (B,).

    `objective` (P, N) decides the tilt, `outcome` (P, N) is what is measured under it. For the
    frontier both are gold; for `rm_limit` the objective is the reward model's score, the outcome
    gold. With w ~ ref * exp(objective / b), normalised per prompt:

        kl = sum w log(w / ref), gold = sum w * outcome, ess = 1 / sum w^2

    ref is 1 / N for samples. For enumerated completions pass `log_ref` (P, N), the
    log-probabilities of all of them (-inf pads), and `min_ess=0` later on: then all is exact.
    """
    target = finite_table(objective)
    measured = target if outcome is None else finite_table(outcome)
    ref = np.full(target.shape, -np.log(target.shape[1]))
    if log_ref is not None:
        ref = np.asarray(log_ref, dtype=np.float64)
        total = logsumexp(ref, axis=1, keepdims=True)
        if not np.all(np.abs(total) < 1e-3):
            raise ValueError("the probabilities exp(log_ref) of a prompt do not sum to 1")
        ref = ref - total
    b = np.sort(np.asarray(temperatures, dtype=np.float64))[::-1]
    if b.size == 0 or b[-1] <= 0 or measured.shape != target.shape or ref.shape != target.shape:
        raise ValueError("expected positive temperatures, and arrays of one shape (prompts, N)")
    kl, gold, log_z, ess = (np.empty((b.size, target.shape[0])) for _ in range(4))
    for i, temperature in enumerate(b):
        log_ratio = target / temperature
        log_z[i] = logsumexp(log_ratio + ref, axis=1)
        log_ratio -= log_z[i][:, None]  # log(w / ref)
        w = np.exp(log_ratio + ref)
        kl[i] = np.maximum((w * log_ratio).sum(axis=1), 0)
        gold[i] = (w * measured).sum(axis=1)
        ess[i] = 1 / (w**2).sum(axis=1)
    w = np.exp(ref)
    ref_gold, ref_ess = (w * measured).sum(axis=1), 1 / (w**2).sum(axis=1)
    return TiltTable(b, kl, gold, log_z, ess, ref_gold, ref_ess, bounded=outcome is None)


@dataclass(frozen=True)
class Frontier:
    """Gold against mean KL over the prompts: a curve where samples reach, a bound beyond.

    `slope` is the bound's gold per nat past the curve's end, infinite if only `max_gold` is known.
    """

    kl: Array  # (K,) rising from 0
    gold: Array  # (K,) from the reference's mean gold
    ess: Array  # (K,) median over prompts
    slope: float
    max_gold: float

    def at(self, kl: float) -> tuple[float, bool]:
        """(gold, is_bound) at mean KL `kl`; is_bound: an upper bound, past the samples' reach."""
        return float(self.gold_at(np.array([kl]))[0]), bool(kl > self.kl[-1])

    def gold_at(self, kl: Array) -> Array:
        """Frontier gold at each `kl` (n,). Linear in sqrt(KL) between the curve's points: gold
        leaves the reference as ref + sd * sqrt(2 KL), a straight line there, a cliff in KL."""
        inside = np.interp(np.sqrt(np.maximum(kl, 0)), np.sqrt(self.kl), self.gold)
        beyond = kl > self.kl[-1]
        if beyond.any():
            bound = self.gold[-1] + self.slope * (kl[beyond] - self.kl[-1])
            inside[beyond] = np.maximum(np.minimum(bound, self.max_gold), self.gold[-1])
        return inside

    def points(self, kl_max: float, n: int) -> list[FrontierPoint]:
        """n points evenly spaced in sqrt(KL) from 0 to `kl_max`, for the report.

        The effective sample size is 0 where the point is a bound. Where only `max_gold` is known
        past the samples' reach, the points end there: that line would say nothing.
        """
        kls = np.linspace(0, np.sqrt(kl_max), n) ** 2
        if np.isinf(self.slope):
            kls = kls[kls <= self.kl[-1]]
        is_bound = kls > self.kl[-1]
        ess = np.where(is_bound, 0, np.interp(np.sqrt(kls), np.sqrt(self.kl), self.ess))
        rows = zip(kls.tolist(), self.gold_at(kls).tolist(), ess.tolist(), is_bound, strict=True)
        return [
            FrontierPoint(kl=k, gold=g, effective_sample_size=e, is_bound=bool(bound))
            for k, g, e, bound in rows
        ]


def frontier(
    table: TiltTable,
    prompt_index: NDArray[np.intp] | None = None,
    min_ess: float = 100.0,
    max_gold: float = 1.0,
) -> Frontier:
    """Average `table` over the prompts (or a resample of them) into the curve of gold against KL.

    The curve starts at (0, reference gold) and keeps the temperatures whose median effective sample
    size per prompt is at least `min_ess`. Beyond it, every policy obeys, for any b,

        mean gold <= b * mean log Z_b + b * mean KL    (Donsker and Varadhan's inequality)

    but with few effective samples log Z_b comes out too low, by about 1 / (2 ess) nats, and so does
    the bound. So only the curve's own b count. They give the tangents of a concave curve; past its
    end the lowest is the last one, which meets it there: gold + b * (KL - end). A table tilted by
    another objective than gold (`rm_limit`) has no such bound, only `max_gold`.
    """
    if prompt_index is not None:
        table = _take_prompts(table, prompt_index)
    ess: Array = np.median(table.ess, axis=1).astype(np.float64)
    keep = int(np.logical_and.accumulate(ess >= min_ess).sum())  # the rows before the first failure
    kl = np.append(0.0, table.kl[:keep].mean(axis=1))
    return Frontier(
        kl=np.maximum.accumulate(kl),
        gold=np.append(table.ref_gold.mean(), table.gold[:keep].mean(axis=1)),
        ess=np.append(np.median(table.ref_ess), ess[:keep]),
        slope=float(table.b[keep - 1]) if keep and table.bounded else float("inf"),
        max_gold=max_gold,
    )


def efficiency(
    gold: float, kl: float, gold_ref: float, frontier: Frontier
) -> tuple[float | None, bool]:
    """((gold - gold_ref) / (frontier gold at the same KL - gold_ref), is_lower_bound).

    None below 0.1 nats, or where the frontier has no gain. Where the frontier is a bound, the true
    size of the efficiency is at least the value's.
    """
    best, is_bound = frontier.at(kl)
    if kl < EFFICIENCY_MIN_KL or best <= gold_ref:
        return None, False
    return (gold - gold_ref) / (best - gold_ref), is_bound


def margin_interval(
    method_gold: ArrayLike,
    method_kl: ArrayLike,
    table: TiltTable,
    draws: int = 1000,
    seed: int = 0,
    min_ess: float = 100.0,
    max_gold: float = 1.0,
) -> Estimate:
    """Mean over seeds of (gold - frontier gold at the seed's own mean KL); at most 0 but for noise.

    `method_gold`, `method_kl` (S, P), the P prompts in `table`'s order. Each resample uses the same
    prompts for method and frontier, so that easy prompts cancel. Where the KL lies past the
    samples' reach the frontier is an upper bound, and the margin a lower one; null where gold has
    no bound either.

    The squared standard error is the variance of the seeds' margins / S plus that over resampled
    prompts; limits from Student's t on S - 1 degrees of freedom. One seed: no limits.
    """
    gold, kl = finite_table(method_gold), finite_table(method_kl)
    seeds, prompts = gold.shape
    if kl.shape != gold.shape or table.kl.shape[1] != prompts:
        raise ValueError(f"prompts do not match: {gold.shape}, {kl.shape}, {table.kl.shape[1]}")

    def margins(prompt_index: NDArray[np.intp]) -> Array:
        curve = frontier(table, prompt_index, min_ess, max_gold)
        mean_kl = kl[:, prompt_index].mean(axis=1)
        return gold[:, prompt_index].mean(axis=1) - curve.gold_at(mean_kl)

    per_seed = margins(np.arange(prompts))
    mean = float(per_seed.mean())
    if not np.isfinite(per_seed).all():  # past the samples' reach, and gold has no maximum
        return Estimate(mean=None)
    if seeds == 1:
        return Estimate(mean=mean, per_seed=per_seed.tolist())
    rng = np.random.default_rng(seed)
    drawn = [margins(rng.integers(prompts, size=prompts)).mean() for _ in range(draws)]
    if not np.isfinite(drawn).all():
        return Estimate(mean=mean, per_seed=per_seed.tolist())
    variance = float(per_seed.var(ddof=1) / seeds + np.var(drawn, ddof=1))
    return t_estimate(mean, variance, per_seed.tolist())


def averaged(table: TiltTable) -> TiltTable:
    """The table of a finite task as one column: its prompts are all there are, none is drawn."""
    return table._replace(
        kl=table.kl.mean(axis=1, keepdims=True),
        gold=table.gold.mean(axis=1, keepdims=True),
        log_z=table.log_z.mean(axis=1, keepdims=True),
        ess=np.median(table.ess, axis=1, keepdims=True),
        ref_gold=table.ref_gold.mean(keepdims=True),
        ref_ess=np.median(table.ref_ess, keepdims=True),
    )


def _take_prompts(table: TiltTable, index: NDArray[np.intp]) -> TiltTable:
    """The table of the prompts in `index`, repeats included."""
    return table._replace(
        kl=table.kl[:, index],
        gold=table.gold[:, index],
        ess=table.ess[:, index],
        ref_gold=table.ref_gold[index],
        ref_ess=table.ref_ess[index],
    )
