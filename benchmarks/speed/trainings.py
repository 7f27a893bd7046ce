"""The two sides of `klash speed experiment`: trainings as stages, and by TRL's trainers.

Each side keeps a tally; its clock runs while it trains, and stands still in between.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from benchmarks.pipeline.arms import CommonStages, Pipeline, SeedStages, Trial, setting_text
from benchmarks.pipeline.experiment import Experiment
from benchmarks.speed.trl.trainings import (
    FinishedTraining,
    make_data,
    trl_setting,
    trl_train_direct,
    trl_train_ppo,
    trl_train_reward,
)
from shared.data.pairs import read_pairs
from shared.stages import read_json
from shared.training.finished import read_log

PHASES = {"reward": "reward models", "direct": "direct methods, references too", "ppo": "PPO"}


class PolicyTraining(NamedTuple):
    """One policy to train."""

    arm: str
    setting: dict[str, float]
    seed: int

    def __str__(self) -> str:
        return f"{self.arm} {setting_text(self.setting)}, seed {self.seed}"


@dataclass
class Tally:
    """What one side has trained, and the time it took."""

    seconds: float = 0.0  # wall
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    steps: int = 0
    trainings: int = 0
    policies: list[tuple[PolicyTraining, Path]] = field(default_factory=list)

    def add(self, phase: str, trained: FinishedTraining) -> None:
        self.phases[phase] += trained.seconds
        self.steps += trained.steps
        self.trainings += 1

    def shares(self) -> dict[str, float]:
        return {name: spent / sum(self.phases.values()) for name, spent in self.phases.items()}


@dataclass
class KlashSide:
    """Stages, as many at a time as there are workers."""

    pipeline: Pipeline
    common: CommonStages
    tally: Tally = field(default_factory=Tally)
    seeds: dict[int, SeedStages] = field(default_factory=dict)

    def prepare(self) -> list[FinishedTraining]:
        """Reward models and reference log-probabilities of all seeds."""
        pipeline, common = self.pipeline, self.common
        seeds, each = pipeline.experiment.seeds, pipeline.stages.each

        def reward(seed: int) -> tuple[Path, ...]:
            preferences = pipeline.prepare_preferences(common, seed)
            return (pipeline.prepare_reward(common, preferences, seed),)

        def reference(seed: int) -> tuple[Path, ...]:
            data = common.sft, pipeline.prepare_preferences(common, seed), seed
            found = pipeline.prepare_reference(*data), pipeline.prepare_mismatched(*data)
            return tuple(folder for folder in found if folder)

        parts = [partial(work, seed) for work in (reward, reference) for seed in seeds]
        start = perf_counter()
        folders = each(lambda part: part(), parts)
        self.tally.seconds += perf_counter() - start
        rewards = [finished_training(folder) for (folder,) in folders[: len(seeds)]]
        for trained in rewards:
            self.tally.add("reward", trained)
        for folder in chain(*folders[len(seeds) :]):
            self.tally.phases["direct"] += read_json(folder / "cost.json")["wall_s"]
        # What is left of a seed's stages evaluates, and is not timed
        rest = each(partial(pipeline.prepare_seed, common), seeds)
        self.seeds = dict(zip(seeds, rest, strict=True))
        return rewards

    def train(self, trainings: Sequence[PolicyTraining]) -> list[FinishedTraining]:
        def train_one(training: PolicyTraining) -> Path:
            trial = Trial(training.arm, training.setting, self.seeds[training.seed])
            return self.pipeline.train(self.common, trial)

        start = perf_counter()
        folders = self.pipeline.stages.each(train_one, trainings)
        self.tally.seconds += perf_counter() - start
        found = [finished_training(folder) for folder in folders]
        for training, trained in zip(trainings, found, strict=True):
            self.tally.add(self.pipeline.experiment.arms[training.arm].kind, trained)
            self.tally.policies.append((training, trained.folder))
        return found


def finished_training(folder: Path) -> FinishedTraining:
    """A training's steps, of PPO those on its minibatches, and its seconds in its own process."""
    steps = sum(row.get("ppo/minibatches", 1) for row in read_log(folder))
    return FinishedTraining(folder, int(steps), read_json(folder / "cost.json")["wall_s"])


@dataclass
class TrlSide:
    """TRL's trainers, one after another."""

    experiment: Experiment
    common: CommonStages
    preferences: dict[int, Path]
    folder: Path
    trl: Executor
    ppo: Executor
    tally: Tally = field(default_factory=Tally)
    rewards: dict[int, Path] = field(default_factory=dict)

    def prepare(self) -> list[FinishedTraining]:
        """Reward models of all seeds; making token ids is not timed."""
        sft, references = self.common.sft, self.common.scale_samples
        found = []
        for seed, preferences in self.preferences.items():
            self.trl.submit(make_data, self.data(seed), preferences, seed).result()
            folder = self.folder / f"reward-{seed}"
            trained = self.trl.submit(
                trl_train_reward,
                folder,
                policy=sft,
                data=self.data(seed),
                references=references,
                reward=self.experiment.reward,
                seed=seed,
            ).result()
            print_progress(f"trl: reward model, seed {seed}")
            self.rewards[seed] = folder
            self.tally.seconds += trained.seconds
            self.tally.add("reward", trained)
            found.append(trained)
        return found

    def train(self, trainings: Sequence[PolicyTraining]) -> list[FinishedTraining]:
        found = []
        for training in trainings:
            trained = self.train_one(training)
            print_progress(f"trl: {training}")
            self.tally.seconds += trained.seconds
            self.tally.add(self.experiment.arms[training.arm].kind, trained)
            self.tally.policies.append((training, trained.folder))
            found.append(trained)
        return found

    def train_one(self, training: PolicyTraining) -> FinishedTraining:
        experiment, arm = self.experiment, self.experiment.arms[training.arm]
        folder = self.folder / f"trl-{training}"  # its name enters the evaluation's address
        if arm.kind == "ppo":
            return self.ppo.submit(
                trl_train_ppo,
                folder,
                policy=self.common.sft,
                reward_model=self.rewards[training.seed],
                task=experiment.task,
                ppo=experiment.ppo,
                kl_coef=training.setting["kl_coef"],
                sampling=experiment.sampling,
                seed=training.seed,
            ).result()
        pairs = read_pairs(self.preferences[training.seed] / "train.jsonl")
        return self.trl.submit(
            trl_train_direct,
            folder,
            policy=self.common.sft,
            data=self.data(training.seed),
            loss=arm.loss,
            setting=trl_setting(arm.loss, training.setting, pairs),
            direct=experiment.direct,
            seed=training.seed,
        ).result()

    def data(self, seed: int) -> Path:
        return self.folder / f"data-{seed}"


Sides = dict[str, KlashSide | TrlSide]


def print_progress(name: str, state: str = "done", _: float = 0.0) -> None:
    """One line a stage or training."""
    if state == "done":
        print(f"{name}: done", flush=True)
