"""Folders of a finished head-to-head -> `Results`: reads rows and calls the pure statistics."""

import itertools
from pathlib import Path
from typing import Any

from benchmarks.evaluation.statistics import Estimate, describe_difference, paired_difference
from benchmarks.pipeline.compare import HeadToHead
from benchmarks.pipeline.experiment import Experiment
from benchmarks.results.folders import Array, answers_by_method, training_curves
from benchmarks.results.limits import read_limits
from benchmarks.results.matched import has_gold
from benchmarks.results.methods import (
    labels_by_kind,
    labels_of,
    matched_golds,
    method_results,
    runs_of,
    sft_runs,
)
from benchmarks.results.ratings import gold_quality
from benchmarks.results.reward_model import judge_quality, reward_model_quality
from benchmarks.results.schema import Comparison, JudgeQuality, OwnRows, Results
from shared.generation.start import engine_version
from shared.models.cost import environment, matmul_rate
from shared.stages import read_json, write_json
from shared.tasks.own import OwnData
from shared.tasks.registry import TaskInput

FRONTIER_POINTS = 60
UNMEASURED = "undecided: no labels are held out to measure the judge on"
COIN = "undecided: on held-out pairs the judge may be no better than a coin"
SHOWN_PROMPTS = 12  # whose answers the report shows


def summarise(folder: Path, experiment: Experiment, compared: HeadToHead) -> None:
    """Stage: `results.json` with its schema, and the other files that the report reads."""
    rate = matmul_rate()
    machine = {**environment(rate), **engine_version(experiment.generation)}
    results = results_of(experiment, compared, rate, machine)
    samples = answers_by_method(compared, experiment.seeds[0], SHOWN_PROMPTS)
    write_json(folder / "results.json", results.model_dump(mode="json", by_alias=True))
    write_json(folder / "results.schema.json", Results.model_json_schema())
    write_json(folder / "experiment.json", experiment.model_dump(mode="json"))
    write_json(folder / "samples.json", samples)
    write_json(folder / "curves.json", training_curves(compared))


def results_of(
    experiment: Experiment, compared: HeadToHead, matmul_rate: float, machine: dict[str, Any]
) -> Results:
    """All numbers of one head-to-head; `matmul_rate` in FLOP/s, `machine` describes it."""
    limits, sft = read_limits(compared, experiment.task.finite), sft_runs(compared)
    arms = [runs_of(experiment, compared, name) for name in compared.runs]
    matched = {m.name: matched_golds(experiment, compared, m, sft) for m in (sft, *arms)}
    methods = {
        m.name: method_results(
            experiment, compared, limits, m, sft, matched[m.name], matmul_rate=matmul_rate
        )
        for m in (sft, *arms)
    }
    judge = judge_quality(experiment, compared)
    golds = {m.name: {None: m.gold, **matched[m.name]} for m in arms}
    shown_kl = max(1.0, 1.1 * max(m.kl.mean or 0.0 for m in methods.values()))
    return Results(
        schema=1,
        experiment=experiment.name,
        task=experiment.task.name,
        seeds=list(experiment.seeds),
        environment=machine,
        enumerated=experiment.task.finite,
        sizes={
            "pairs" if experiment.has_pairs else "answers with a label": labels_of(compared),
            "ppo_episodes": experiment.ppo.episodes,
            "test_prompts": len(sft.rows.raw[0]),
            "samples_per_prompt": experiment.evaluation.samples,
            "frontier_prompts": experiment.evaluation.near_prompts if limits else 0,
            "frontier_samples": limits.samples_per_prompt if limits else 0,
        },
        own_rows=own_rows(experiment.task.pairs, compared.common.task),
        methods=methods,
        reward_model=reward_model_quality(compared),
        labels=None if experiment.has_pairs else labels_by_kind(compared),
        judge=judge,
        gold_quality=gold_quality(experiment),
        frontier=limits.frontier.points(shown_kl, FRONTIER_POINTS) if limits else [],
        rm_frontier=[
            point
            for first in (limits.reward_frontiers[:1] if limits else [])
            for point in first.points(shown_kl, FRONTIER_POINTS)
        ],
        comparisons=comparisons_of(golds, judge) if has_gold(sft.rows) else [],
    )


def own_rows(pairs: str | tuple[str, ...], task: TaskInput) -> OwnRows | None:
    """What the stage `data` read of the files `pairs`; None of a task that comes with Klash."""
    if not isinstance(task, OwnData):
        return None
    found = read_json(task.data / "data.json")
    return OwnRows(
        files=[Path(name).name for name in ([pairs] if isinstance(pairs, str) else pairs)],
        **{key: found[key] for key in ("format", "rows", "kept", "dropped", "sides")},
    )


def comparisons_of(
    golds: dict[str, dict[float | None, Array | None]], judge: JudgeQuality | None = None
) -> list[Comparison]:
    """Every two methods, in gold at the tuned settings and at each level of KL.

    `golds`, by method and level (None: the tuned setting), are (seeds, prompts), or None where the
    method does not reach the level.
    """
    found = []
    for a, b in itertools.combinations(golds, 2):
        for level, gold_a in golds[a].items():
            gold_b = golds[b][level]
            difference = Estimate(mean=None)
            if gold_a is not None and gold_b is not None:
                difference = paired_difference(gold_a, gold_b)
            what = "gold" if level is None else f"gold at {level:g} nats"
            comparison = Comparison(
                a=a,
                b=b,
                metric="gold" if level is None else "gold_at_matched_kl",
                kl=level,
                difference=difference,
                verdict=describe_difference(a, b, difference, what)
                if judge is None or judge.knows
                else (COIN if judge.pairs else UNMEASURED),
            )
            found.append(comparison)
    return found
