"""The numbers of one method, from the evaluation rows of its runs."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.evaluation.exact import World
from benchmarks.evaluation.metrics import hacking_gap, win_rate
from benchmarks.evaluation.statistics import (
    Estimate,
    crossed_interval,
    paired_difference,
    seed_interval,
)
from benchmarks.evaluation.text import (
    TextMeasures,
    alarms,
    length_controlled_win_rate,
)
from benchmarks.pipeline.compare import ArmRun, HeadToHead, timed_seeds
from benchmarks.pipeline.experiment import Experiment
from benchmarks.results.costs import cost_of, filtering_of, stability_of
from benchmarks.results.folders import Array, EvaluationRows
from benchmarks.results.limits import Limits
from benchmarks.results.matched import has_gold, kl_bound, kl_curve, matched_gold
from benchmarks.results.ratings import second_opinion
from benchmarks.results.schema import UNDEFINED, CurvePoint, Labels, Method, Setting
from dpo.losses import WEIGHTS, balancing_weights
from shared.data.pairs import Labelled, Pair, read_training
from shared.stages import read_json


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
    if not method.runs or not has_gold(sft.rows):
        return {}
    curves = [
        kl_curve([run for run in method.runs if run.seed == seed], sft_gold)
        for seed, sft_gold in zip(compared.seeds, sft.gold, strict=True)
    ]
    return {level: matched_gold(curves, level) for level in experiment.evaluation.kl_levels}


def method_results(
    experiment: Experiment,
    compared: HeadToHead,
    limits: Limits | None,
    method: MethodRuns,
    sft: MethodRuns,
    matched: dict[float, Array | None],
    matmul_rate: float,
) -> Method:
    """`method` on test prompts; `matched` is its gold at the preset levels of KL."""
    rows, gold, kl = method.rows, method.gold, method.kl
    chosen_among_samples = method.kind == "best-of-n"  # neither greedy decoding nor KL estimates
    against = against_limits(experiment, limits, gold, kl) if limits else {}
    by_gold = against_gold(rows, sft.rows, chosen_among_samples) if has_gold(rows) else {}
    return Method(
        kind=method.kind,
        setting=method.setting,
        proxy=score_gained(rows, sft.rows),
        kl=crossed_interval(kl),
        kl_is_bound=method.kl_is_bound,
        k1=UNDEFINED if chosen_among_samples else crossed_interval(rows.mean("k1")),
        k3=UNDEFINED if chosen_among_samples else crossed_interval(rows.mean("k3")),
        regret=_regret(experiment, compared, method),
        length=crossed_interval(rows.mean("length")),
        truncated=crossed_interval(rows.mean("truncated")),
        well_formed=crossed_interval(rows.mean("well_formed")),
        repetition=crossed_interval(rows.mean("repetition")),
        distinct_2=crossed_interval(rows.column("distinct_2")),
        perplexity=perplexity(rows),
        second_opinion=second_opinion(experiment, rows),
        alarms=alarms(text_measures(rows), text_measures(sft.rows)),
        displacement=_held_out(method.tuned, "chosen"),
        pair_accuracy=_held_out(method.tuned, "accuracy"),
        gold_at_matched_kl={
            f"{level:g}": None if values is None else crossed_interval(values)
            for level, values in matched.items()
        },
        cost=cost_of(method.tuned, labels_of(compared), matmul_rate, timed_seeds(experiment)),
        stability=stability_of(method.runs, method.tuned),
        sweep=_sweep(experiment, compared, method),
        filtering=filtering_of(method.tuned, compared.seeds) if method.kind == "filtered" else None,
        **by_gold,
        **against,
    )


def score_gained(rows: EvaluationRows, sft: EvaluationRows) -> Estimate:
    """By how much the reward model scores a method above SFT, where there is one."""
    if "score" not in rows:
        return UNDEFINED
    return paired_difference(rows.mean("score"), sft.mean("score"))


def against_gold(
    rows: EvaluationRows, sft: EvaluationRows, chosen_among_samples: bool
) -> dict[str, Estimate]:
    """What gold says of a method, where there is a judge."""
    gold = rows.mean("gold")
    wins = rows.mean("win_rate") if rows.exact else win_rate(rows["gold"], sft["gold"])
    gap = UNDEFINED
    if "score" in sft and varies(sft["score"]) and varies(sft["gold"]):
        each = hacking_gap(rows["score"], sft["score"], rows["gold"], sft["gold"])
        gap = crossed_interval(each)
    greedy = UNDEFINED if chosen_among_samples else crossed_interval(rows["greedy_gold"])
    return {
        "gold": crossed_interval(gold),
        "greedy_gold": greedy,
        "gain": paired_difference(gold, sft.mean("gold")),
        "hacking_gap": gap,
        "win_rate": crossed_interval(wins),
        "win_rate_length_controlled": length_controlled(rows, sft),
        "win_rate_against_chosen": against_chosen(rows),
    }


def varies(values: Array) -> bool:
    """Whether some prompt of each seed has answers that differ; (seeds, prompts, samples).

    A judge that says the same of all of SFT's answers gives no unit to measure in.
    """
    return bool((values != values[:, :, :1]).any(axis=(1, 2)).all())


def length_controlled(rows: EvaluationRows, sft: EvaluationRows) -> Estimate:
    """The win rate against SFT at equal lengths, a number a seed."""
    columns = (rows["gold"], rows["length"], sft["gold"], sft["length"])
    return seed_interval([length_controlled_win_rate(*one) for one in zip(*columns, strict=True)])


def against_chosen(rows: EvaluationRows) -> Estimate:
    """How often an answer's gold beats that of the file's chosen answers to its prompt; over the
    prompts that have some.
    """
    if "chosen_gold" not in rows:
        return UNDEFINED
    chosen = rows.column("chosen_gold")
    known = ~np.isnan(chosen[0])  # the same prompts of each seed
    if not known.any():
        return UNDEFINED
    return crossed_interval(win_rate(rows["gold"][:, known], chosen[:, known, None]))


def perplexity(rows: EvaluationRows) -> Estimate:
    """Of sampled text under the starting model, a token; a number a seed."""
    if "ref_logp" not in rows:
        return UNDEFINED
    sums = zip(rows["ref_logp"], rows["length"], strict=True)
    return seed_interval([float(np.exp(-logps.sum() / lengths.sum())) for logps, lengths in sums])


def text_measures(rows: EvaluationRows) -> TextMeasures:
    """What alarms are raised by."""
    return TextMeasures(
        length=float(rows["length"].mean()),
        repetition=float(rows["repetition"].mean()),
        distinct_2=float(rows.column("distinct_2").mean()),
        perplexity=perplexity(rows).mean,
        truncated=float(rows["truncated"].mean()),
        empty=float(rows["empty"].mean()),
    )


def against_limits(
    experiment: Experiment, limits: Limits, gold: Array, kl: Array
) -> dict[str, Any]:
    """How near a method comes to the most that can be reached; `gold` and `kl` (seeds, prompts)."""
    near = slice(0, experiment.evaluation.near_prompts)  # the frontier's prompts
    efficiencies = [
        limits.efficiency(float(g.mean()), float(k.mean()))
        for g, k in zip(gold[:, near], kl[:, near], strict=True)
    ]
    return {
        "frontier_efficiency": seed_interval([value for value, _ in efficiencies]),
        "efficiency_is_lower_bound": any(is_bound for _, is_bound in efficiencies),
        "frontier_margin": limits.margin(gold[:, near], kl[:, near]),
        "rm_limit": seed_interval(limits.with_reward_models([float(k.mean()) for k in kl])),
    }


def labels_of(compared: HeadToHead) -> int:
    """How many labelled pairs, or answers with a label, a seed trains on."""
    return len(_trained_on(compared))


def labels_by_kind(compared: HeadToHead) -> Labels:
    """Of the answers with a label that the first seed trains on."""
    answers = [row for row in _trained_on(compared) if isinstance(row, Labelled)]
    desirable = sum(answer.desirable for answer in answers)
    undesirable = len(answers) - desirable
    weights = dict.fromkeys(WEIGHTS, 1.0) | balancing_weights(desirable, undesirable)
    return Labels(desirable=desirable, undesirable=undesirable, **weights)


def _trained_on(compared: HeadToHead) -> list[Pair] | list[Labelled]:
    first = next(iter(compared.seeds.values()))
    return read_training(first.preferences / "train.jsonl")


def _regret(experiment: Experiment, compared: HeadToHead, method: MethodRuns) -> Estimate:
    """Of a finite task's policy to the optimum of gold - beta KL, beta the setting's own."""
    beta = method.setting.get("beta", method.setting.get("kl_coef"))
    if not experiment.task.finite or beta is None:
        return UNDEFINED
    listing = compared.common.frontier_samples
    assert listing is not None
    world = World(listing)
    by_seed = zip(method.gold[:, 0].tolist(), method.kl[:, 0].tolist(), strict=True)
    return seed_interval([world.regret(beta, gold, kl) for gold, kl in by_seed])


def _held_out(tuned: list[ArmRun], key: str) -> Estimate:
    """A number of the policies on held-out pairs."""
    files = [run.rows[1.0] / "displacement.json" for run in tuned if run.model]
    return seed_interval([read_json(file)[key] for file in files]) if files else UNDEFINED


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
    gold = crossed_interval(rows.mean("gold")) if has_gold(rows) else UNDEFINED
    return CurvePoint(fraction=share, gold=gold, kl=kl)
