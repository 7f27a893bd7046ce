"""The pipeline on one screen.

    config -> prompts and preferences -> SFT -> { reward model -> PPO | direct methods |
    reward model -> filtered DPO } -> evaluate -> results

What each step runs is in `benchmarks.pipeline.arms`; here is in which order, and what is chosen.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.pipeline.arms import (
    CommonStages,
    Pipeline,
    Policy,
    SeedStages,
    Trial,
    paid_stages,
)
from benchmarks.pipeline.experiment import Arm, Experiment


@dataclass(frozen=True)
class Pipelines:
    """One experiment's stages. Those of a timed seed, whose seconds the report gives, run alone."""

    shared: Pipeline
    timed: Pipeline
    timed_seeds: tuple[int, ...]

    @property
    def experiment(self) -> Experiment:
        return self.shared.experiment

    def of(self, seed: int) -> Pipeline:
        """Where models of `seed` are made."""
        return self.timed if seed in self.timed_seeds else self.shared


@dataclass(frozen=True)
class Prepared:
    """What arms train on and are evaluated with."""

    common: CommonStages
    seeds: dict[int, SeedStages]


@dataclass(frozen=True)
class ArmRun:
    """One arm at one setting and seed: `model` is None for best-of-n. Rows by share of training."""

    setting: dict[str, float]
    seed: int
    model: Path | None
    rows: dict[float, Path]  # share of training -> evaluation folder; 1.0 is the end
    stages: tuple[Path, ...]  # whose cost is this arm's own


@dataclass(frozen=True)
class FinishedArm:
    """The chosen setting, the mean validation gold of each setting, and what ran."""

    tuned: dict[str, float]
    validation: list[float | None]
    runs: list[ArmRun]


@dataclass(frozen=True)
class HeadToHead:
    """All folders of a finished head-to-head; what belongs to one arm is by its name."""

    common: CommonStages
    seeds: dict[int, SeedStages]
    tuned: dict[str, dict[str, float]]
    validation: dict[str, list[float | None]]
    runs: dict[str, list[ArmRun]]


def compare(pipelines: Pipelines, only: tuple[int, ...] | None = None) -> HeadToHead:
    """Run whatever is not there yet, of all seeds or of `only` some.

    Settings are chosen on validation prompts of the first seeds, never on test prompts.
    """
    experiment = pipelines.experiment
    wanted = experiment.seeds if only is None else only
    prepared = prepare(pipelines, wanted)
    finish = partial(finish_arm, pipelines, prepared, wanted)
    done = pipelines.shared.stages.each(finish, experiment.arms)
    arms = dict(zip(experiment.arms, done, strict=True))
    return HeadToHead(
        common=prepared.common,
        seeds=prepared.seeds,
        tuned={name: arm.tuned for name, arm in arms.items()},
        validation={name: arm.validation for name, arm in arms.items()},
        runs={name: arm.runs for name, arm in arms.items()},
    )


def prepare(pipelines: Pipelines, wanted: tuple[int, ...]) -> Prepared:
    """SFT, then each seed's data, for the `wanted` seeds and those that settings are chosen on."""
    shared, experiment = pipelines.shared, pipelines.experiment
    needed = [s for s in experiment.seeds if s in {*wanted, *first_seeds(experiment)}]
    sft = shared.prepare_sft()
    data = [partial(pipelines.of(seed).prepare_data, sft, seed) for seed in needed]
    shared.stages.each(lambda part: part(), [shared.prepare_common, *data])
    common = shared.prepare_common()
    seeds = shared.stages.each(lambda s: pipelines.of(s).prepare_seed(common, s), needed)
    return Prepared(common, dict(zip(needed, seeds, strict=True)))


def finish_arm(
    pipelines: Pipelines, prepared: Prepared, wanted: tuple[int, ...], name: str
) -> FinishedArm:
    """Choose one arm's setting, and train and evaluate it on the `wanted` seeds."""
    arm, tuned = pipelines.experiment.arms[name], tune(pipelines, prepared, name)
    trials = [
        Trial(name, setting, prepared.seeds[seed])
        for setting in arm.settings
        for seed in wanted
        if setting == tuned.setting or seed in tuning_seeds(pipelines.experiment, arm)
    ]
    evaluate = partial(evaluate_trial, pipelines, prepared)
    runs = pipelines.shared.stages.each(evaluate, trials)
    return FinishedArm(tuned.setting, tuned.validation, runs)


@dataclass(frozen=True)
class Tuned:
    """The best setting, and the mean validation gold of each: None where there is no choice."""

    setting: dict[str, float]
    validation: list[float | None]


def tune(pipelines: Pipelines, prepared: Prepared, name: str) -> Tuned:
    """Choose one arm's setting."""
    experiment, shared = pipelines.experiment, pipelines.shared
    arm = experiment.arms[name]

    def gold(trial: Trial) -> float:
        if arm.kind == "best-of-n":
            rows = shared.evaluate_best_of_n(prepared.common, trial, "validation")
        else:
            model = pipelines.of(trial.data.seed).train(prepared.common, trial)
            policy = Policy(trial.text(), model, trial.data.seed)
            rows = shared.evaluate(prepared.common, policy, split="validation")
        return shared.mean_gold(rows)

    tuned_on = tuning_seeds(experiment, arm) if experiment.has_gold else ()
    seeds = [prepared.seeds[seed] for seed in tuned_on]
    trials = [Trial(name, setting, seed) for setting in arm.settings for seed in seeds]
    if not trials:
        return Tuned(arm.settings[0], [None] * len(arm.settings))
    golds = shared.stages.each(gold, trials)
    scores = np.array(golds).reshape(len(arm.settings), -1).mean(1)
    return Tuned(arm.settings[int(scores.argmax())], scores.tolist())


def evaluate_trial(pipelines: Pipelines, prepared: Prepared, trial: Trial) -> ArmRun:
    """Train a policy if need be, and read its checkpoints and its end on test prompts."""
    shared, training, data = pipelines.shared, pipelines.of(trial.data.seed), trial.data
    common, held_out = prepared.common, prepared.seeds[data.seed].held_out
    arm = pipelines.experiment.arms[trial.arm]
    if arm.kind == "best-of-n":
        model, end = None, training.evaluate_best_of_n(common, trial, "test")
        rows = {1.0: end}
    else:
        model = end = training.train(common, trial)
        rows = {}
        for checkpoint, share in shared.checkpoints(trial, model).items():
            policy = Policy(trial.text(f" at {share:.0%}"), model, data.seed, checkpoint)
            read = held_out if share == 1.0 else None
            rows[share] = shared.evaluate(common, policy, data.reward, read)
    return ArmRun(trial.setting, data.seed, model, rows, paid_stages(arm, data, end))


def train_alone(pipelines: Pipelines, seed: int) -> None:
    """What the report gives seconds of: each arm at its setting, of one seed, one after another."""
    prepared = prepare(pipelines, (seed,))
    for name, arm in pipelines.experiment.arms.items():
        setting = tune(pipelines, prepared, name).setting
        trial = Trial(name, setting, prepared.seeds[seed])
        if arm.kind == "best-of-n":
            pipelines.of(seed).evaluate_best_of_n(prepared.common, trial, "test")
        else:
            pipelines.of(seed).train(prepared.common, trial)


def first_seeds(experiment: Experiment) -> tuple[int, ...]:
    """Those that settings are chosen on."""
    return experiment.seeds[: experiment.tuning_seeds]


def tuning_seeds(experiment: Experiment, arm: Arm) -> tuple[int, ...]:
    """Seeds on which every setting runs; none if there is nothing to choose."""
    return first_seeds(experiment) if len(arm.settings) > 1 else ()


def timed_seeds(experiment: Experiment) -> tuple[int, ...]:
    """Seeds whose training is timed, with nothing else under way: the last, or all if all are."""
    alike = experiment.workers == 1 and experiment.timed_threads in (None, experiment.threads)
    return experiment.seeds if alike else experiment.seeds[-1:]
