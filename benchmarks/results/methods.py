"""The numbers of one method, from the evaluation rows of its runs."""

from dataclasses import dataclass

import numpy as np

from benchmarks.evaluation.exact import World
from benchmarks.evaluation.metrics import hacking_gap, win_rate
from benchmarks.evaluation.statistics import (
    Estimate,
    crossed_interval,
    paired_difference,
    seed_interval,
)
from benchmarks.pipeline.compare import ArmRun, HeadToHead, timed_seeds
from benchmarks.pipeline.experiment import Experiment
from benchmarks.results.costs import cost_of, filtering_of, stability_of
from benchmarks.results.folders import Array, EvaluationRows
from benchmarks.results.limits import Limits
from benchmarks.results.matched import kl_bound, kl_curve, matched_gold
from benchmarks.results.schema import CurvePoint, Method, Setting
from shared.stages import read_json

UNDEFINED = Estimate(mean=None)


@dataclass(frozen=True)
class MethodRuns:
    """One method: all its runs, those at its tuned setting, and the test rows of these."""

    name: str
    kind: str
    setting: dict[str, float]
    runs: list[ArmRun]  # empty for SFT
    tuned: list[ArmRun]
    rows: EvaluationRows
    gold: Array  # (seeds, prompts)
    kl: Array  # likewise
    kl_is_bound: bool


def sft_runs(compared: HeadToHead) -> MethodRuns:
    """SFT as a method that has no runs of its own."""
    rows = EvaluationRows([seed.sft_rows for seed in compared.seeds.values()])
    return MethodRuns(
        name="sft",
        kind="sft",
        setting={},
        runs=[],
        tuned=[],
        rows=rows,
        gold=rows.mean("gold"),
        kl=rows.mean("kl"),
        kl_is_bound=False,
    )


def runs_of(experiment: Experiment, compared: HeadToHead, name: str) -> MethodRuns:
    """What was run for the arm called `name`."""
    setting = compared.tuned[name]
    tuned = [run for run in compared.runs[name] if run.setting == setting]
    rows = EvaluationRows([run.rows[1.0] for run in tuned])
    gold, has_kl = rows.mean("gold"), "kl" in rows
    return MethodRuns(
        name=name,
        kind=experiment.arms[name].kind,
        setting=setting,
        runs=compared.runs[name],
        tuned=tuned,
        rows=rows,
        gold=gold,
        kl=rows.mean("kl") if has_kl else np.full_like(gold, kl_bound(setting)),
        kl_is_bound=not has_kl,
    )


def matched_golds(
    experiment: Experiment, compared: HeadToHead, method: MethodRuns, sft: MethodRuns
) -> dict[float, Array | None]:
    """Gold (seeds, prompts) at each preset KL; None if a seed stays below it. Empty for SFT."""
    if not method.runs:
        return {}
    curves = [
        kl_curve([run for run in method.runs if run.seed == seed], sft_gold)
        for seed, sft_gold in zip(compared.seeds, sft.gold, strict=True)
    ]
    return {level: matched_gold(curves, level) for level in experiment.evaluation.kl_levels}


def method_results(
    experiment: Experiment,
    compared: HeadToHead,
    limits: Limits,
    method: MethodRuns,
    sft: MethodRuns,
    matched: dict[float, Array | None],
    matmul_rate: float,
) -> Method:
    """`method` on test prompts; `matched` is its gold at the preset levels of KL."""
    rows, gold, kl = method.rows, method.gold, method.kl
    chosen_among_samples = method.kind == "best-of-n"  # neither greedy decoding nor KL estimates
    near = slice(0, experiment.evaluation.near_prompts)  # the frontier's prompts
    efficiencies = [
        limits.efficiency(float(g.mean()), float(k.mean()))
        for g, k in zip(gold[:, near], kl[:, near], strict=True)
    ]
    return Method(
        kind=method.kind,
        setting=method.setting,
        gold=crossed_interval(gold),
        greedy_gold=UNDEFINED if chosen_among_samples else crossed_interval(rows["greedy_gold"]),
        gain=paired_difference(gold, sft.gold),
        proxy=paired_difference(rows.mean("score"), sft.rows.mean("score")),
        hacking_gap=crossed_interval(
            hacking_gap(rows["score"], sft.rows["score"], rows["gold"], sft.rows["gold"])
        ),
        kl=crossed_interval(kl),
        kl_is_bound=method.kl_is_bound,
        k1=UNDEFINED if chosen_among_samples else crossed_interval(rows.mean("k1")),
        k3=UNDEFINED if chosen_among_samples else crossed_interval(rows.mean("k3")),
        win_rate=crossed_interval(
            rows.mean("win_rate") if rows.exact else win_rate(rows["gold"], sft.rows["gold"])
        ),
        frontier_efficiency=seed_interval([value for value, _ in efficiencies]),
        efficiency_is_lower_bound=any(is_bound for _, is_bound in efficiencies),
        frontier_margin=limits.margin(gold[:, near], kl[:, near]),
        regret=_regret(experiment, compared, method),
        rm_limit=seed_interval(limits.with_reward_models([float(k.mean()) for k in kl])),
        length=crossed_interval(rows.mean("length")),
        truncated=crossed_interval(rows.mean("truncated")),
        well_formed=crossed_interval(rows.mean("well_formed")),
        displacement=_mean_displacement(method.tuned),
        gold_at_matched_kl={
            f"{level:g}": None if values is None else crossed_interval(values)
            for level, values in matched.items()
        },
        cost=cost_of(
            method.tuned, experiment.preferences.pairs, matmul_rate, timed_seeds(experiment)
        ),
        stability=stability_of(method.runs, method.tuned),
        sweep=_sweep(experiment, compared, method),
        filtering=filtering_of(method.tuned) if method.kind == "filtered" else None,
    )


def _regret(experiment: Experiment, compared: HeadToHead, method: MethodRuns) -> Estimate:
    """Of a finite task's policy to the optimum of gold - beta KL, beta the setting's own."""
    beta = method.setting.get("beta", method.setting.get("kl_coef"))
    if not experiment.task.finite or beta is None:
        return UNDEFINED
    world = World(compared.common.frontier_samples)
    by_seed = zip(method.gold[:, 0].tolist(), method.kl[:, 0].tolist(), strict=True)
    return seed_interval([world.regret(beta, gold, kl) for gold, kl in by_seed])


def _mean_displacement(tuned: list[ArmRun]) -> Estimate:
    files = [run.rows[1.0] / "displacement.json" for run in tuned if run.model]
    return seed_interval([read_json(file)["chosen"] for file in files]) if files else UNDEFINED


def _sweep(experiment: Experiment, compared: HeadToHead, method: MethodRuns) -> list[Setting]:
    """Every setting that was run, with the checkpoints that all its runs have."""
    if not method.runs:
        return []
    settings, validation = experiment.arms[method.name].settings, compared.validation[method.name]
    found = []
    for setting, validation_gold in zip(settings, validation, strict=True):
        runs = [run for run in method.runs if run.setting == setting]
        if not runs:
            continue
        shares = sorted(set.intersection(*(set(run.rows) for run in runs)))
        points = [_curve_point(share, runs) for share in shares]
        found.append(
            Setting(
                setting=setting,
                tuned=setting == method.setting,
                validation_gold=validation_gold,
                gold=points[-1].gold,
                kl=points[-1].kl,
                checkpoints=points,
            )
        )
    return found


def _curve_point(share: float, runs: list[ArmRun]) -> CurvePoint:
    rows = EvaluationRows([run.rows[share] for run in runs])
    if "kl" in rows:
        kl = crossed_interval(rows.mean("kl"))
    else:
        kl = seed_interval([kl_bound(run.setting) for run in runs])
    return CurvePoint(fraction=share, gold=crossed_interval(rows.mean("gold")), kl=kl)
