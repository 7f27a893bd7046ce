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
    Trained,
    make_data,
    train_direct,
    train_ppo,
    train_reward,
    trl_setting,
)
from shared.data.pairs import read_pairs
from shared.stages import read_json

PHASES = {"reward": "reward models", "direct": "direct methods, references too", "ppo": "PPO"}


class Training(NamedTuple):
    """One policy to train."""

    arm: str
    setting: dict[str, float]
    seed: int

    def __str__(self) -> str:
        return f"{self.arm} {setting_text(self.setting)}, seed {self.seed}"


@dataclass
class Tally:
    """What one side has trained, and spent on it."""

    seconds: float = 0.0  # wall
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    steps: int = 0
    trainings: int = 0
    policies: list[tuple[Training, Path]] = field(default_factory=list)

    def add(self, phase: str, trained: Trained) -> None:
        self.phases[phase] += trained.seconds
        self.steps += trained.steps
        self.trainings += 1

    def shares(self) -> dict[str, float]:
        return {name: spent / sum(self.phases.values()) for name, spent in self.phases.items()}


@dataclass
class Ours:
    """Stages, as many at a time as there are workers."""

    pipeline: Pipeline
    common: CommonStages
    tally: Tally = field(default_factory=Tally)
    seeds: dict[int, SeedStages] = field(default_factory=dict)

    def prepare(self) -> list[Trained]:
        """Reward models and reference log-probabilities of all seeds."""
        pipeline, common = self.pipeline, self.common
        seeds, each = pipeline.experiment.seeds, pipeline.stages.each

        def reward(seed: int) -> tuple[Path, ...]:
            preferences = pipeline.prepare_preferences(common.sft, seed)
            return (pipeline.prepare_reward(common, preferences, seed),)

        def reference(seed: int) -> tuple[Path, ...]:
            data = common.sft, pipeline.prepare_preferences(common.sft, seed), seed
            found = pipeline.prepare_reference(*data), pipeline.prepare_mismatched(*data)
            return tuple(folder for folder in found if folder)

        parts = [partial(work, seed) for work in (reward, reference) for seed in seeds]
        start = perf_counter()
        folders = each(lambda part: part(), parts)
        self.tally.seconds += perf_counter() - start
        rewards = [of_stage(folder) for (folder,) in folders[: len(seeds)]]
        for trained in rewards:
            self.tally.add("reward", trained)
        for folder in chain(*folders[len(seeds) :]):
            self.tally.phases["direct"] += read_json(folder / "cost.json")["wall_s"]
        # What is left of a seed's stages evaluates, and is not timed
        rest = each(partial(pipeline.prepare_seed, common), seeds)
        self.seeds = dict(zip(seeds, rest, strict=True))
        return rewards

    def train(self, trainings: Sequence[Training]) -> list[Trained]:
        def one(at: Training) -> Path:
            trial = Trial(at.arm, at.setting, self.seeds[at.seed])
            return self.pipeline.train(self.common, trial)

        start = perf_counter()
        folders = self.pipeline.stages.each(one, trainings)
        self.tally.seconds += perf_counter() - start
        found = [of_stage(folder) for folder in folders]
        for at, trained in zip(trainings, found, strict=True):
            self.tally.add(self.pipeline.experiment.arms[at.arm].kind, trained)
            self.tally.policies.append((at, trained.folder))
        return found


def of_stage(folder: Path) -> Trained:
    """A training's steps, of PPO those on its minibatches, and its seconds in its own process."""
    steps = sum(row.get("ppo/minibatches", 1) for row in read_json(folder / "log.json"))
    return Trained(folder, int(steps), read_json(folder / "cost.json")["wall_s"])


@dataclass
class Theirs:
    """TRL's trainers, one after another."""

    experiment: Experiment
    common: CommonStages
    preferences: dict[int, Path]
    folder: Path
    trl: Executor
    ppo: Executor
    tally: Tally = field(default_factory=Tally)
    rewards: dict[int, Path] = field(default_factory=dict)

    def prepare(self) -> list[Trained]:
        """Reward models of all seeds; making token ids is not timed."""
        sft, references = self.common.sft, self.common.scale_samples
        found = []
        for seed, preferences in self.preferences.items():
            self.trl.submit(make_data, self.data(seed), preferences, seed).result()
            folder = self.folder / f"reward-{seed}"
            given = folder, sft, self.data(seed), references, self.experiment.reward, seed
            trained = self.trl.submit(train_reward, *given).result()
            say(f"trl: reward model, seed {seed}")
            self.rewards[seed] = folder
            self.tally.seconds += trained.seconds
            self.tally.add("reward", trained)
            found.append(trained)
        return found

    def train(self, trainings: Sequence[Training]) -> list[Trained]:
        found = []
        for at in trainings:
            trained = self.one(at)
            say(f"trl: {at}")
            self.tally.seconds += trained.seconds
            self.tally.add(self.experiment.arms[at.arm].kind, trained)
            self.tally.policies.append((at, trained.folder))
            found.append(trained)
        return found

    def one(self, at: Training) -> Trained:
        e, arm, sft = self.experiment, self.experiment.arms[at.arm], self.common.sft
        folder = self.folder / f"trl-{at}"  # which its evaluation is known by
        if arm.kind == "ppo":
            given = folder, sft, self.rewards[at.seed], e.task, e.ppo, at.setting["kl_coef"]
            return self.ppo.submit(train_ppo, *given, e.sampling, at.seed).result()
        pairs = read_pairs(self.preferences[at.seed] / "train.jsonl")
        setting = trl_setting(arm.loss, at.setting, pairs)
        given = folder, sft, self.data(at.seed), arm.loss, setting, e.direct, at.seed
        return self.trl.submit(train_direct, *given).result()

    def data(self, seed: int) -> Path:
        return self.folder / f"data-{seed}"


Sides = dict[str, Ours | Theirs]


def say(name: str, state: str = "done", _: float = 0.0) -> None:
    """One line a stage or training."""
    if state == "done":
        print(f"{name}: done", flush=True)
