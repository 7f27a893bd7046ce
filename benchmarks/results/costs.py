"""What the runs of one arm cost, how steadily they went, and what filtering kept."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evaluation.statistics import interquartile_range
from benchmarks.pipeline.arms import SeedStages
from benchmarks.pipeline.compare import ArmRun
from benchmarks.results.folders import Array, EvaluationRows
from benchmarks.results.schema import Cost, FilterEpoch, Stability
from shared.data.preferences import read_spoiled
from shared.stages import read_json, read_jsonl
from shared.training.finished import read_log


def cost_of(tuned: list[ArmRun], labels: int, matmul_rate: float, timed: tuple[int, ...]) -> Cost:
    """What one arm's runs at its setting spend, averaged over seeds; nothing for SFT.

    Seconds and memory are those of the seeds in `timed`, which had the machine to themselves.
    """
    if not tuned:
        return Cost(
            wall_s=0,
            train_tokens=0,
            generated_tokens=0,
            flops=0,
            peak_memory_bytes=0,
            models_held=1,
            labels_used=0,
        )
    every = [_spent(run) for run in tuned]
    alone = [_spent(run) for run in tuned if run.seed in timed]
    seconds, flops = _average(alone, "wall_s"), _average(alone, "flops")
    names = alone[0]["phases"]
    return Cost(
        wall_s=seconds,
        train_tokens=_average(every, "train_tokens"),
        generated_tokens=_average(every, "generated_tokens"),
        flops=_average(every, "flops"),
        peak_memory_bytes=_average(alone, "peak_memory_bytes"),
        models_held=max(spent["models_held"] for spent in every),
        labels_used=labels,
        mfu=flops / seconds / matmul_rate,
        phases={n: float(np.mean([s["phases"].get(n, 0.0) for s in alone])) for n in names},
        timed_seeds=list(timed),
    )


def _spent(run: ArmRun) -> dict[str, Any]:
    """Sums over the run's own stages, and the most memory and models that one of them held."""
    costs = {f.name.rsplit("-", 1)[0]: read_json(f / "cost.json") for f in run.stages}
    phases: dict[str, float] = {}
    for stage, cost in costs.items():
        inner = {f"{stage}: {name}": seconds for name, seconds in cost["phases"].items()}
        phases |= inner if stage in ("ppo", "filtered") else {stage: cost["wall_s"]}
    summed = ("wall_s", "train_tokens", "generated_tokens", "flops")
    return {
        **{key: sum(cost[key] for cost in costs.values()) for key in summed},
        "peak_memory_bytes": max(cost["peak_memory_bytes"] for cost in costs.values()),
        "models_held": max(cost["models_held"] for cost in costs.values()),
        "phases": phases,
    }


def _average(runs: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([run[key] for run in runs]))


def stability_of(runs: list[ArmRun], tuned: list[ArmRun]) -> Stability:
    """Failures, spread and spikes of one arm's `runs`; `tuned` are those at its setting."""

    def gold(folder: Path) -> float:
        return float(EvaluationRows([folder]).mean("gold").mean())

    ends = [gold(run.rows[1.0]) for run in tuned]
    best = [max(gold(f) for f in run.rows.values()) for run in tuned]
    judged = not np.isnan(ends).any()
    trained = [run for run in runs if run.model]
    overshoot = []
    for run in trained:
        kls = {share: float(EvaluationRows([f]).mean("kl").mean()) for share, f in run.rows.items()}
        overshoot.append(max(kls.values()) / kls[1.0] if kls[1.0] > 0 else 1.0)
    stops = [read_json(run.model / "stopped.json") for run in trained if run.model]
    norms = [_column(read_log(run.model), "grad_norm") for run in trained if run.model]
    return Stability(
        runs=len(runs),
        failed=sum(bool(stop["failed"]) for stop in stops),
        stopped_early=sum(bool(stop["stopped_early"]) for stop in stops),
        gold_iqr=interquartile_range(ends) if judged else None,
        final_over_best=float(np.mean(np.array(ends) / best)) if ends and min(best) > 0 else None,
        kl_overshoot=max(overshoot) if overshoot else None,
        gradient_spikes=sum(int((n > 5 * np.median(n)).sum()) for n in norms if len(n)),
    )


def filtering_of(tuned: list[ArmRun], seeds: Mapping[int, SeedStages]) -> list[FilterEpoch]:
    """What filtered DPO kept before each epoch, of all pairs and of those that were spoiled."""
    logs = [read_json(run.model / "filtering.json") for run in tuned if run.model]
    spoiled = [
        _spoiled_kept(run.model, read_spoiled(seeds[run.seed].preferences))
        for run in tuned
        if run.model
    ]
    return [
        FilterEpoch(
            epoch=epochs[0]["epoch"],
            kept_share=float(np.mean([e["kept_share"] for e in epochs])),
            kept_share_per_seed=[e["kept_share"] for e in epochs],
            spoiled_kept_per_seed=[
                shares[e["epoch"]] for shares, e in zip(spoiled, epochs, strict=True)
            ]
            if all(spoiled)
            else None,
            floor_bound=sum(e["floor_bound"] for e in epochs),
        )
        for epochs in zip(*logs, strict=True)
    ]


def _spoiled_kept(model: Path, spoiled: list[str]) -> dict[int, float]:
    """By epoch, the share of the spoiled pairs that were still there; nothing where none was."""
    kept, planted = Counter[int](), set(spoiled)
    audit = read_jsonl(model / "audit.jsonl") if spoiled else []
    for row in audit:
        kept[row["epoch"]] += row["kept"] and row["id"] in planted
    return {epoch: count / len(planted) for epoch, count in kept.items()}


def _column(log: list[dict[str, Any]], name: str) -> Array:
    return np.array([row[name] for row in log], dtype=np.float64)
