"""The pipeline on one screen.

    config -> prompts and preferences -> SFT -> { reward model -> PPO | direct methods |
    reward model -> filtered DPO } -> evaluate -> results

What each step runs is in `benchmarks.pipeline.arms`; here is in which order, and what is chosen.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from benchmarks.pipeline.arms import (
    Common,
    Run,
    Seed,
    Trained,
    evaluate_arm,
    evaluate_model,
    evaluate_n,
    prepare_common,
    prepare_data,
    prepare_seed,
    prepare_start,
    setting_text,
    train,
)
from benchmarks.pipeline.experiment import Arm, Experiment
from shared.stages import Stages, read_jsonl


@dataclass(frozen=True)
class Compared:
    """All folders of a finished head-to-head."""

    common: Common
    seeds: dict[int, Seed]
    tuned: dict[str, dict[str, float]]
    validation: dict[str, list[float | None]]  # mean validation gold of each setting
    runs: dict[str, list[Trained]]


class ArmDone(NamedTuple):
    """One arm's part of `Compared`."""

    tuned: dict[str, float]
    validation: list[float | None]
    runs: list[Trained]


@dataclass(frozen=True)
class Places:
    """Where stages run: those of a seed whose seconds are told have the machine to themselves."""

    stages: Stages
    alone: Stages
    timed: tuple[int, ...]

    def of(self, seed: int) -> Run:
        """Where models of `seed` are made."""
        return (self.alone if seed in self.timed else self.stages).run


def compare(
    experiment: Experiment, places: Places, only: tuple[int, ...] | None = None
) -> Compared:
    """Run whatever is not there yet, of all seeds or of `only` some.

    Settings are chosen on validation prompts of the first seeds, never on test prompts.
    """
    stages, wanted = places.stages, experiment.seeds if only is None else only
    needed = [s for s in experiment.seeds if s in {*wanted, *first_seeds(experiment)}]
    start = prepare_start(experiment, stages.run)
    parts = [partial(prepare_data, experiment, places.of(s), *start, s) for s in needed]
    stages.each(lambda part: part(), [partial(prepare_common, experiment, stages.run), *parts])
    common = prepare_common(experiment, stages.run)
    prepared = stages.each(lambda s: prepare_seed(experiment, places.of(s), common, s), needed)
    seeds = dict(zip(needed, prepared, strict=True))

    finish = partial(finish_arm, experiment, places, common, seeds, wanted)
    done = dict(zip(experiment.arms, stages.each(finish, experiment.arms), strict=True))
    return Compared(
        common,
        seeds,
        {name: arm.tuned for name, arm in done.items()},
        {name: arm.validation for name, arm in done.items()},
        {name: arm.runs for name, arm in done.items()},
    )


def finish_arm(
    experiment: Experiment,
    places: Places,
    common: Common,
    seeds: dict[int, Seed],
    wanted: tuple[int, ...],
    name: str,
) -> ArmDone:
    """Choose one arm's setting, and train and evaluate it on the `wanted` seeds."""
    arm = experiment.arms[name]
    best, scores = tune(experiment, places, common, seeds, name, arm)
    runs = [
        (setting, seed)
        for setting in arm.settings
        for seed in wanted
        if setting == best or seed in tuning_seeds(experiment, arm)
    ]

    def evaluated(at: tuple[dict[str, float], int]) -> Trained:
        setting, seed = at
        run, timed = places.stages.run, places.of(seed)
        return evaluate_arm(experiment, run, timed, common, seeds[seed], name, arm, setting)

    return ArmDone(best, scores, places.stages.each(evaluated, runs))


def tune(
    experiment: Experiment,
    places: Places,
    common: Common,
    seeds: dict[int, Seed],
    name: str,
    arm: Arm,
) -> tuple[dict[str, float], list[float | None]]:
    """(the best setting, mean gold of each on validation prompts): None if there is no choice."""

    def gold(at: tuple[dict[str, float], int]) -> float:
        setting, seed = at
        if arm.kind == "best-of-n":
            run = places.stages.run
            rows = evaluate_n(experiment, run, common, seeds[seed], setting, "validation")
        else:
            model = train(experiment, places.of(seed), common, seeds[seed], name, arm, setting)[0]
            rows = evaluate_model(
                experiment, places.stages.run, common, None, None, seed, model, "final",
                f"{name} {setting_text(setting)}, seed {seed}", "validation",
            )  # fmt: skip
        return float(np.mean([row["gold"] for row in read_jsonl(rows / "rows.jsonl")]))

    trials = [(setting, seed) for setting in arm.settings for seed in tuning_seeds(experiment, arm)]
    if not trials:
        return arm.settings[0], [None] * len(arm.settings)
    golds = places.stages.each(gold, trials)
    scores = np.array(golds).reshape(len(arm.settings), -1).mean(1)
    return arm.settings[int(scores.argmax())], scores.tolist()


def train_alone(experiment: Experiment, places: Places, seed: int) -> None:
    """What the report gives seconds of: each arm at its setting, of one seed, one after another."""
    common = prepare_common(experiment, places.stages.run)
    needed = [s for s in experiment.seeds if s in {*first_seeds(experiment), seed}]
    seeds = {s: prepare_seed(experiment, places.of(s), common, s) for s in needed}
    for name, arm in experiment.arms.items():
        best, _ = tune(experiment, places, common, seeds, name, arm)
        if arm.kind == "best-of-n":
            evaluate_n(experiment, places.of(seed), common, seeds[seed], best, "test")
        else:
            train(experiment, places.of(seed), common, seeds[seed], name, arm, best)


def first_seeds(experiment: Experiment) -> tuple[int, ...]:
    """Those that settings are chosen on."""
    return experiment.seeds[: experiment.tuning_seeds]


def tuning_seeds(experiment: Experiment, arm: Arm) -> tuple[int, ...]:
    """Seeds on which every setting runs; none if there is nothing to choose."""
    return first_seeds(experiment) if len(arm.settings) > 1 else ()


def timed_seeds(experiment: Experiment) -> tuple[int, ...]:
    """Seeds whose training is timed, with nothing beside it: the last, or all if all are alike."""
    alike = experiment.workers == 1 and experiment.timed_threads in (None, experiment.threads)
    return experiment.seeds if alike else experiment.seeds[-1:]
