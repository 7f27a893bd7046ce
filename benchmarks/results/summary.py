"""Folders of a finished head-to-head -> `Results`: reads rows and calls the pure statistics."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evaluation.exact import World
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
from benchmarks.evaluation.metrics import (
    accuracy_from_gold,
    bayes_accuracy,
    best_of_n_kl,
    calibration,
    hacking_gap,
    matched_kl,
    pearson,
    win_rate,
)
from benchmarks.evaluation.statistics import (
    Estimate,
    crossed_interval,
    paired_difference,
    seed_interval,
    verdict,
)
from benchmarks.pipeline.compare import ArmRun, HeadToHead, timed_seeds
from benchmarks.pipeline.experiment import Experiment
from benchmarks.results.costs import cost_of, filtering_of, stability_of
from benchmarks.results.folders import Array, Rows, side_by_side, training_curves
from benchmarks.results.schema import Comparison, CurvePoint, Method, Results, RewardModel, Setting
from shared.data.samples import read_log_ref, read_samples
from shared.generation.start import engine_version
from shared.models.cost import environment, matmul_rate
from shared.stages import read_json, write_json

NOTHING = Estimate(mean=None)


def summarise(folder: Path, experiment: Experiment, compared: HeadToHead) -> None:
    """Stage: `results.json` with its schema, and what the report shows beside it."""
    rate = matmul_rate()
    machine = {**environment(rate), **engine_version(experiment.generation)}
    results = Summary(experiment, compared, rate).results(machine)
    write_json(folder / "results.json", results.model_dump(mode="json", by_alias=True))
    write_json(folder / "results.schema.json", Results.model_json_schema())
    write_json(folder / "experiment.json", experiment.model_dump(mode="json"))
    write_json(folder / "samples.json", side_by_side(compared, experiment.seeds[0], 12))
    write_json(folder / "curves.json", training_curves(compared))


class Summary:
    """What the methods of one experiment are read against, and the numbers of each."""

    def __init__(self, experiment: Experiment, compared: HeadToHead, matmul_rate: float):
        self.experiment, self.compared, self.rate = experiment, compared, matmul_rate
        self.sft = Rows([s.sft_rows for s in compared.seeds.values()])
        samples = compared.common.frontier_samples
        gold = np.array([s.gold for s in read_samples(samples)])
        self.completions, finite = gold.shape[1], experiment.task.finite
        self.log_ref = np.array(read_log_ref(samples)) if finite else None
        # How far the frontier reaches: samples until too few count, a listing to its end.
        self.min_ess, self.max_gold = (0.0, float("inf")) if finite else (100.0, 1.0)
        self.table = self._tilt(gold)
        self.frontier = self._curve(self.table)
        self.limits = [self._limit_table(s.limit_scores, gold) for s in compared.seeds.values()]
        self.curves: dict[str, Array | None] = {}

    def results(self, environment: dict[str, Any]) -> Results:
        methods = {"sft": self._method("sft", "sft", {}, self.sft, [])}
        for name, runs in self.compared.runs.items():
            tuned = self._final(name)
            rows = Rows([run.rows[1.0] for run in tuned])
            kind = self.experiment.arms[name].kind
            methods[name] = self._method(name, kind, self.compared.tuned[name], rows, runs)
        top = max((m.kl.mean or 0.0) for m in methods.values())
        e = self.experiment
        return Results(
            schema=1,
            experiment=e.name,
            task=e.task.name,
            seeds=list(e.seeds),
            environment=environment,
            enumerated=e.task.finite,
            sizes={
                "pairs": e.preferences.pairs,
                "ppo_episodes": e.ppo.episodes,
                "test_prompts": e.evaluation.prompts,
                "samples_per_prompt": e.evaluation.samples,
                "frontier_prompts": e.evaluation.near_prompts,
                "frontier_samples": self.completions,
            },
            methods=methods,
            reward_model=self._reward_model(),
            frontier=self.frontier.points(max(1.1 * top, 1.0), 60),
            rm_frontier=self._curve(self.limits[0]).points(max(1.1 * top, 1.0), 60),
            comparisons=self._comparisons(list(self.compared.runs)),
        )

    def _final(self, name: str) -> list[ArmRun]:
        tuned = self.compared.tuned[name]
        return [run for run in self.compared.runs[name] if run.setting == tuned]

    def _limit_table(self, scores: Path, gold: Array) -> TiltTable:
        tilt = np.array(read_json(scores / "scores.json"))
        return self._tilt(tilt, gold[:, : tilt.shape[1]])

    def _tilt(self, objective: Array, outcome: Array | None = None) -> TiltTable:
        if self.log_ref is None:
            return tilt_table(objective, default_temperatures(), outcome)
        temperatures = default_temperatures(800)
        return averaged(tilt_table(objective, temperatures, outcome, log_ref=self.log_ref))

    def _curve(self, table: TiltTable) -> Frontier:
        return frontier(table, min_ess=self.min_ess, max_gold=self.max_gold)

    def _method(
        self, name: str, kind: str, setting: dict[str, float], rows: Rows, runs: list[ArmRun]
    ) -> Method:
        e, sft, gold = self.experiment, self.sft, rows.mean("gold")
        chosen, bound = kind == "best-of-n", "kl" not in rows
        kl = np.full_like(gold, best_of_n_kl(int(setting["n"]))) if bound else rows.mean("kl")
        near = slice(0, e.evaluation.near_prompts)
        ratios = [self._efficiency(g, k) for g, k in zip(gold[:, near], kl[:, near], strict=True)]
        final = [run for run in runs if run.setting == setting]
        return Method(
            kind=kind,
            setting=setting,
            gold=crossed_interval(gold),
            greedy_gold=NOTHING if chosen else crossed_interval(rows["greedy_gold"]),
            gain=paired_difference(gold, sft.mean("gold")),
            proxy=paired_difference(rows.mean("score"), sft.mean("score")),
            hacking_gap=crossed_interval(
                hacking_gap(rows["score"], sft["score"], rows["gold"], sft["gold"])
            ),
            kl=crossed_interval(kl),
            kl_is_bound=bound,
            k1=NOTHING if chosen else crossed_interval(rows.mean("k1")),
            k3=NOTHING if chosen else crossed_interval(rows.mean("k3")),
            win_rate=crossed_interval(
                rows.mean("win_rate") if rows.exact else win_rate(rows["gold"], sft["gold"])
            ),
            frontier_efficiency=seed_interval([value for value, _ in ratios]),
            efficiency_is_lower_bound=any(is_bound for _, is_bound in ratios),
            frontier_margin=margin_interval(
                gold[:, near], kl[:, near], self.table,
                min_ess=self.min_ess, max_gold=self.max_gold, limits="t",
            ),
            regret=self._regret(setting, gold, kl),
            rm_limit=seed_interval(
                [
                    _unbounded(self._curve(t), float(k.mean()))
                    for t, k in zip(self.limits, kl, strict=True)
                ]
            ),
            length=crossed_interval(rows.mean("length")),
            truncated=crossed_interval(rows.mean("truncated")),
            well_formed=crossed_interval(rows.mean("well_formed")),
            displacement=self._displacement(final),
            gold_at_matched_kl=self._matched(name, runs),
            cost=cost_of(final, e.preferences.pairs, self.rate, timed_seeds(e)),
            stability=stability_of(runs, final),
            sweep=self._sweep(name, runs),
            filtering=filtering_of(final) if kind == "filtered" else None,
        )  # fmt: skip

    def _efficiency(self, gold: Array, kl: Array) -> tuple[float | None, bool]:
        start = float(self.table.ref_gold.mean())
        return efficiency(float(gold.mean()), float(kl.mean()), start, self.frontier)

    def _regret(self, setting: dict[str, float], gold: Array, kl: Array) -> Estimate:
        """Of a finite task's policy to the optimum of gold - beta KL, beta the setting's own."""
        beta = setting.get("beta", setting.get("kl_coef"))
        if self.log_ref is None or beta is None:
            return NOTHING
        world = World(self.compared.common.frontier_samples)
        columns = zip(gold[:, 0].tolist(), kl[:, 0].tolist(), strict=True)
        return seed_interval([world.regret(beta, g, k) for g, k in columns])

    def _displacement(self, final: list[ArmRun]) -> Estimate:
        files = [run.rows[1.0] / "displacement.json" for run in final if run.model]
        return seed_interval([read_json(f)["chosen"] for f in files]) if files else NOTHING

    def _points(self, name: str, runs: list[ArmRun], seed: int) -> tuple[list[float], list[Array]]:
        """One seed's curve: SFT at KL 0, then every evaluated checkpoint and setting."""
        index = list(self.compared.seeds).index(seed)
        kls, golds = [0.0], [self.sft.mean("gold")[index]]
        for run in (run for run in runs if run.seed == seed):
            for folder in run.rows.values():
                rows = Rows([folder])
                known = "kl" in rows
                kl = rows.mean("kl").mean() if known else best_of_n_kl(int(run.setting["n"]))
                kls.append(max(float(kl), 0.0))
                golds.append(rows.mean("gold")[0])
        return kls, golds

    def _matched(self, name: str, runs: list[ArmRun]) -> dict[str, Estimate | None]:
        """Gold at each preset KL, interpolated per seed and prompt; None if a seed stays below."""
        if not runs:
            return {}
        points = [self._points(name, runs, seed) for seed in self.compared.seeds]
        found: dict[str, Estimate | None] = {}
        for level in self.experiment.evaluation.kl_levels:
            values = [self._at_level(kls, golds, level) for kls, golds in points]
            reached = [v for v in values if v is not None]
            self.curves[f"{name}@{level:g}"] = (
                np.array(reached) if len(reached) == len(values) else None
            )
            found[f"{level:g}"] = (
                crossed_interval(np.array(reached)) if len(reached) == len(values) else None
            )
        self.curves[name] = Rows([run.rows[1.0] for run in self._final(name)]).mean("gold")
        return found

    def _at_level(self, kls: list[float], golds: list[Array], level: float) -> Array | None:
        """(prompts,): the interpolation is linear in gold, so it goes prompt by prompt."""
        columns = np.array(golds).T
        values = [matched_kl(kls, column.tolist(), level) for column in columns]
        return None if values[0] is None else np.array(values, dtype=np.float64)

    def _sweep(self, name: str, runs: list[ArmRun]) -> list[Setting]:
        if not runs:
            return []
        tuned, settings = self.compared.tuned[name], self.experiment.arms[name].settings
        found = []
        for setting, validation in zip(settings, self.compared.validation[name], strict=True):
            same = [run for run in runs if run.setting == setting]
            shares = sorted(set.intersection(*(set(run.rows) for run in same))) if same else []
            points = [self._curve_point(share, same) for share in shares]
            if points:
                found.append(
                    Setting(
                        setting=setting,
                        tuned=setting == tuned,
                        validation_gold=validation,
                        gold=points[-1].gold,
                        kl=points[-1].kl,
                        checkpoints=points,
                    )
                )
        return found

    def _curve_point(self, share: float, runs: list[ArmRun]) -> CurvePoint:
        rows = Rows([run.rows[share] for run in runs])
        if "kl" in rows:
            kl = crossed_interval(rows.mean("kl"))
        else:
            kl = seed_interval([best_of_n_kl(int(run.setting["n"])) for run in runs])
        return CurvePoint(fraction=share, gold=crossed_interval(rows.mean("gold")), kl=kl)

    def _reward_model(self) -> RewardModel:
        scores = [read_json(s.reward_scores / "scores.json") for s in self.compared.seeds.values()]
        data = [{k: np.array(v) for k, v in s.items()} for s in scores]
        best = bayes_accuracy(data[0]["p_a_wins"])
        accuracy = [accuracy_from_gold(d["score_a"], d["score_b"], d["p_a_wins"]) for d in data]
        predicted = [1 / (1 + np.exp(d["score_b"] - d["score_a"])) for d in data]
        fits = [calibration(p, d["p_a_wins"]) for p, d in zip(predicted, data, strict=True)]
        return RewardModel(
            accuracy=seed_interval(accuracy),
            bayes_accuracy=best,
            share_of_attainable=seed_interval([(a - 0.5) / (best - 0.5) for a in accuracy]),
            calibration_error=seed_interval([error for error, _ in fits]),
            length_correlation=seed_interval([_correlation(d, "length") for d in data]),
            gold_correlation=seed_interval([_correlation(d, "gold") for d in data]),
            score_sd=seed_interval([float(d["scale"]) for d in data]),
            pairs=len(data[0]["p_a_wins"]),
            reliability=fits[0][1],
        )

    def _comparisons(self, names: list[str]) -> list[Comparison]:
        """Every two methods: gold at the end, and gold at each KL that both reach."""
        found = []
        levels = [None, *self.experiment.evaluation.kl_levels]
        for (a, b), level in itertools.product(itertools.combinations(names, 2), levels):
            x, y = (self.curves[n if level is None else f"{n}@{level:g}"] for n in (a, b))
            what = "gold" if level is None else f"gold at {level:g} nats"
            difference = NOTHING if x is None or y is None else paired_difference(x, y)
            found.append(
                Comparison(
                    a=a,
                    b=b,
                    metric="gold" if level is None else "gold_at_matched_kl",
                    kl=level,
                    difference=difference,
                    verdict=verdict(a, b, difference, what),
                )
            )
        return found


def _unbounded(curve: Frontier, kl: float) -> float | None:
    gold, is_bound = curve.at(kl)
    return None if is_bound else gold


def _correlation(scores: dict[str, Array], column: str) -> float:
    both = np.concatenate([scores["score_a"], scores["score_b"]])
    return pearson(both, np.concatenate([scores[f"{column}_a"], scores[f"{column}_b"]]))
