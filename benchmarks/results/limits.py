"""What can be reached at a KL: by any policy, and by one that trusts a seed's reward model."""

from dataclasses import dataclass

import numpy as np

from benchmarks.evaluation.frontier import (
    Frontier,
    TiltTable,
    averaged,
    default_temperatures,
    efficiency,
    frontier,
    margin_interval,
    tilt_table,
)
from benchmarks.evaluation.statistics import Estimate
from benchmarks.pipeline.compare import HeadToHead
from benchmarks.results.folders import Array
from shared.data.samples import read_log_ref, read_samples
from shared.stages import read_json
from shared.tasks.registry import make_task


@dataclass(frozen=True)
class Limits:
    """The frontier of gold, and each seed's frontier under its reward model's score."""

    table: TiltTable  # the reference tilted by gold
    frontier: Frontier
    reward_frontiers: list[Frontier]  # gold of the reference tilted by the score, by seed
    samples_per_prompt: int
    min_ess: float  # with fewer effective samples the frontier is a bound
    max_gold: float

    def efficiency(self, gold: float, kl: float) -> tuple[float | None, bool]:
        """(the share of the gain that any policy could have at `kl`, is_lower_bound)."""
        return efficiency(gold, kl, float(self.table.ref_gold.mean()), self.frontier)

    def with_reward_models(self, kls: list[float]) -> list[float | None]:
        """Each seed's limit at its own KL; None past the samples' reach."""
        found: list[float | None] = []
        if not self.reward_frontiers:
            return [None] * len(kls)
        for curve, kl in zip(self.reward_frontiers, kls, strict=True):
            gold, is_bound = curve.at(kl)
            found.append(None if is_bound else gold)
        return found

    def margin(self, gold: Array, kl: Array) -> Estimate:
        """gold - frontier gold at the same KL; both (seeds, prompts of the frontier)."""
        return margin_interval(gold, kl, self.table, min_ess=self.min_ess, max_gold=self.max_gold)


def read_limits(compared: HeadToHead, finite: bool) -> Limits | None:
    """From samples of the reference; for a `finite` task, from the listing of all completions.

    None where there are no such samples: without gold, or where too few could be had.
    """
    samples = compared.common.frontier_samples
    if samples is None:
        return None
    gold = np.array([s.gold for s in read_samples(samples)])
    log_ref = np.array(read_log_ref(samples)) if finite else None
    min_ess, max_gold = 0.0 if finite else 100.0, make_task(compared.common.task).most_gold

    def tilted(objective: Array, outcome: Array | None = None) -> TiltTable:
        if log_ref is None:
            return tilt_table(objective, default_temperatures(), outcome)
        return averaged(tilt_table(objective, default_temperatures(800), outcome, log_ref=log_ref))

    def reward_frontier(scores: Array) -> Frontier:
        table = tilted(scores, gold[:, : scores.shape[1]])
        return frontier(table, min_ess=min_ess, max_gold=max_gold)

    table = tilted(gold)
    folders = [seed.limit_scores for seed in compared.seeds.values() if seed.limit_scores]
    scores = [read_json(folder / "scores.json") for folder in folders]
    return Limits(
        table=table,
        frontier=frontier(table, min_ess=min_ess, max_gold=max_gold),
        reward_frontiers=[reward_frontier(np.array(values)) for values in scores],
        samples_per_prompt=gold.shape[1],
        min_ess=min_ess,
        max_gold=max_gold,
    )
