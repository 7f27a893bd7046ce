"""Gold at equal KL: each seed's curve of gold against KL, read at fixed levels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.evaluation.metrics import best_of_n_kl, matched_kl
from benchmarks.pipeline.compare import ArmRun
from benchmarks.results.folders import Array, EvaluationRows


@dataclass(frozen=True)
class KLCurve:
    """One seed's points: SFT at KL 0, then every evaluated checkpoint and setting."""

    kl: list[float]
    gold: list[Array]  # of each point, (prompts,)

    def gold_at(self, level: float) -> Array | None:
        """(prompts,): the interpolation is linear in gold, so it goes prompt by prompt."""
        by_prompt = np.array(self.gold).T
        values = [matched_kl(self.kl, gold.tolist(), level) for gold in by_prompt]
        return None if values[0] is None else np.array(values, dtype=np.float64)


def kl_curve(runs: Sequence[ArmRun], sft_gold: Array) -> KLCurve:
    """The curve of one seed's `runs`; `sft_gold` (prompts,) is that seed's."""
    kl, gold = [0.0], [sft_gold]
    for run in runs:
        for folder in run.rows.values():
            rows = EvaluationRows([folder])
            mean_kl = rows.mean("kl").mean() if "kl" in rows else kl_bound(run.setting)
            kl.append(max(float(mean_kl), 0.0))
            gold.append(rows.mean("gold")[0])
    return KLCurve(kl, gold)


def matched_gold(curves: Sequence[KLCurve], level: float) -> Array | None:
    """(seeds, prompts) at `level` nats; None if a seed's curve ends below it."""
    values = [curve.gold_at(level) for curve in curves]
    reached = [value for value in values if value is not None]
    return np.array(reached) if len(reached) == len(values) else None


def has_gold(rows: EvaluationRows) -> bool:
    """Whether every answer has gold: without a judge none has."""
    return not np.isnan(rows["gold"]).any()


def kl_bound(setting: dict[str, float]) -> float:
    """Best-of-n's KL where its rows have none: an upper bound, in nats."""
    return best_of_n_kl(int(setting["n"]))
