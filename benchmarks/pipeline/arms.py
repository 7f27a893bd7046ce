"""What a head-to-head is made of: every `self.run(` here is a stage, skipped where it is there."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evaluation.evaluate import (
    HeldOut,
    Prompts,
    evaluate,
    evaluate_best_of_n,
    score_samples,
)
from benchmarks.pipeline.experiment import Arm, Experiment
from benchmarks.pipeline.given import given_model, take_given_reward
from benchmarks.pipeline.start import StartStages, judged_task, prepare_start
from dpo.filtered import Filter, train_filtered
from dpo.losses import UNPAIRED
from dpo.reference import score_mismatched, score_reference
from dpo.train import DirectData, train_direct
from rlhf.ppo import train_ppo
from rlhf.reward import examine_reward, train_reward
from shared.data.batches import HELD_OUT
from shared.data.own import examine_judge_on_labels, take_preferences, take_reward_test
from shared.data.preferences import make_preferences, make_reward_test
from shared.data.samples import list_reference, sample_reference
from shared.data.splits import Split
from shared.generation.start import Drawing
from shared.models.load import Start, WeightDtype
from shared.seeds import seed_of
from shared.stages import Runner, Work, read_json, read_jsonl
from shared.tasks.judge import examine_judge
from shared.tasks.own import OwnData
from shared.tasks.registry import TaskInput


@dataclass(frozen=True)
class SftStages(StartStages):
    """And its samples that set the scale of scores."""

    scale_samples: Path


@dataclass(frozen=True)
class CommonStages(SftStages):
    """What all seeds share."""

    frontier_samples: Path | None  # of a finite task: all completions
    reward_test: Path | None  # pairs; none of answers with a label
    judge_scores: Path | None  # of the judge of one's own task, on labels held out


@dataclass(frozen=True)
class TrainingData:
    """What one arm trains on: None is what it does not need."""

    seed: int
    preferences: Path
    reward: Path | None
    reference: Path | None
    mismatched: Path | None


@dataclass(frozen=True)
class SeedData(TrainingData):
    """What all arms of one seed train on."""

    reference: Path
    mismatched: Path | None  # where some arm is unpaired


@dataclass(frozen=True)
class SeedStages(SeedData):
    """What all arms of one seed share."""

    reward_scores: Path | None  # of the reward model on held-out pairs
    limit_scores: Path | None  # of the reward model on the frontier's samples
    held_out: HeldOut
    sft_rows: Path


@dataclass(frozen=True)
class Trial:
    """One arm at one setting on one seed's data."""

    arm: str
    setting: dict[str, float]
    data: TrainingData

    def text(self, point: str = "") -> str:
        """`dpo beta=0.2, seed 1`; `point` is where on the way, such as ` at 50%`."""
        return f"{self.arm} {setting_text(self.setting)}{point}, seed {self.data.seed}"


@dataclass(frozen=True)
class Policy:
    """A policy to evaluate: on screen it is called `label`, `seed` is that of its completions."""

    label: str
    folder: Path
    seed: int
    checkpoint: str = "final"


@dataclass(frozen=True)
class Pipeline:
    """The stages of one experiment: `stages` says where they are done."""

    experiment: Experiment
    stages: Runner

    def run(self, name: str, work: Work, *, label: str = "", **inputs: Any) -> Path:
        """The folder of one stage."""
        return self.stages.run(name, work, label=label, **inputs)

    @property
    def drawing(self) -> Drawing:
        """How every stage that samples does it."""
        return Drawing(self.experiment.sampling, self.experiment.generation)

    @property
    def frozen_dtype(self) -> WeightDtype:
        """Precision of the reference: under LoRA that of the policy's base, which it starts as."""
        return self.experiment.model.dtype if self.experiment.lora else "float32"

    def prepare_sft(self, judged: bool = True) -> SftStages:
        """The SFT model, the samples that reward models are centred and scaled on, and, if
        `judged`, who gives gold.
        """
        e = self.experiment
        start = prepare_start(e, self.stages)
        numbers = e.evaluation.scale_prompts, e.evaluation.scale_samples
        scale = self._sample(start, "samples for score scale", "validation", *numbers)
        task = judged_task(e, self.stages, start, scale) if judged else start.task
        return SftStages(task, start.sft, scale)

    def prepare_common(self) -> CommonStages:
        """SFT, and the samples that scales, frontier and reward-model tests are read from."""
        e, start = self.experiment, self.prepare_sft()
        task = start.task
        of_sft = {"task": task, "policy": start.sft, "seed": e.task_seed}
        frontier, judge_scores = None, None
        if e.task.finite:
            frontier = self.run(
                "listing",
                list_reference,
                label="all completions",
                **of_sft,
                sampling=e.sampling,
            )
        elif e.has_frontier:
            numbers = e.evaluation.near_prompts, e.evaluation.frontier_samples
            frontier = self._sample(start, "samples for frontier", "test", *numbers)
        test, judge_scores = self.prepare_tests(start)
        return CommonStages(task, start.sft, start.scale_samples, frontier, test, judge_scores)

    def prepare_tests(self, start: SftStages) -> tuple[Path | None, Path | None]:
        """Pairs that reward models are examined on, and what the judge of one's own task makes of
        held-out labels; None where there are none.
        """
        e, task = self.experiment, start.task
        inputs: dict[str, Any] = {"task": task, "pairs": e.evaluation.reward_pairs}
        inputs["seed"] = e.task_seed
        if not isinstance(task, OwnData) or (e.has_pairs and e.task.rows == "labels"):
            sampled = {**inputs, "policy": start.sft, "drawing": self.drawing}
            test = self.run("reward-test", make_reward_test, **sampled)
            if not isinstance(task, OwnData):
                return test, None
        else:
            test = self.run("reward-test", take_reward_test, **inputs) if e.has_pairs else None
        if task.judge is None:
            return test, None
        if e.task.rows == "labels":
            return test, self.run("judge-scores", examine_judge_on_labels, **inputs)
        assert test is not None
        return test, self.run("judge-scores", examine_judge, pairs=test, judge=task.judge)

    def _sample(
        self, start: StartStages, label: str, split: Split, prompts: int, per_prompt: int
    ) -> Path:
        e = self.experiment
        return self.run(
            "reference-samples",
            sample_reference,
            label=label,
            task=start.task,
            policy=start.sft,
            seed=e.task_seed,
            drawing=self.drawing,
            split=split,
            prompts=prompts,
            per_prompt=per_prompt,
        )

    def prepare_preferences(self, start: SftStages, seed: int) -> Path:
        """The labelled pairs of one seed, or its answers with a label."""
        e, task = self.experiment, start.task
        if isinstance(task, OwnData) and e.preferences.source == "data":
            return self.run(
                "preferences",
                take_preferences,
                label=f"preferences, seed {seed}",
                data=task.data,
                pairs=e.preferences.pairs,
                held_out_pairs=e.preferences.held_out_pairs,
                seed=seed,
            )
        return self.run(
            "preferences",
            make_preferences,
            label=f"preferences, seed {seed}",
            task=task,
            policy=start.sft,
            data=e.preferences,
            seed=seed,
            drawing=self.drawing,
        )

    def prepare_reward(self, start: SftStages, preferences: Path, seed: int) -> Path:
        """The reward model of one seed, or one's own."""
        reward = self.experiment.reward
        if reward.pretrained is not None:
            return self.run(
                "reward",
                take_given_reward,
                label="your reward model",
                reward_model=given_model(reward.pretrained, reward.revision),
                policy=start.sft,
                references=start.scale_samples,
                data=start.task.data if isinstance(start.task, OwnData) else None,
            )
        return self.run(
            "reward",
            train_reward,
            label=f"reward model, seed {seed}",
            policy=start.sft,
            preferences=preferences,
            references=start.scale_samples,
            reward=self.experiment.reward,
            seed=seed,
        )

    def prepare_reference(self, sft: Path, preferences: Path, seed: int) -> Path:
        """The reference's log-probabilities of what one seed trains on."""
        return self.run(
            "reference",
            score_reference,
            label=f"reference log-probabilities, seed {seed}",
            policy=sft,
            preferences=preferences,
            precision=self.experiment.direct.optimizer.precision,
            dtype=self.frozen_dtype,
        )

    def prepare_mismatched(self, sft: Path, preferences: Path, seed: int) -> Path | None:
        """One seed's completions after other prompts, where some arm's loss is unpaired."""
        arms = self.experiment.arms.values()
        if not any(arm.kind == "direct" and arm.loss in UNPAIRED for arm in arms):
            return None
        return self.run(
            "mismatched",
            score_mismatched,
            label=f"mismatched completions, seed {seed}",
            policy=sft,
            preferences=preferences,
            seed=seed,
            precision=self.experiment.direct.optimizer.precision,
            dtype=self.frozen_dtype,
        )

    def prepare_data(self, start: SftStages, seed: int) -> SeedData:
        """Preferences, reward model and reference log-probabilities of one seed."""
        preferences = self.prepare_preferences(start, seed)
        reward = None
        if self.experiment.has_reward_model:
            reward = self.prepare_reward(start, preferences, seed)
        reference = self.prepare_reference(start.sft, preferences, seed)
        mismatched = self.prepare_mismatched(start.sft, preferences, seed)
        return SeedData(seed, preferences, reward, reference, mismatched)

    def prepare_seed(self, common: CommonStages, seed: int) -> SeedStages:
        """The data of one seed, and what its reward model and its SFT model are worth."""
        data = self.prepare_data(common, seed)
        sft = Policy(f"sft, seed {seed}", common.sft, seed, checkpoint=".")
        held_out = self.score_held_out(common, data.preferences, seed)
        reward_scores = None
        if data.reward is not None and common.reward_test is not None:
            reward_scores = self.examine_reward(common, data.reward, seed)
        return SeedStages(
            seed=seed,
            preferences=data.preferences,
            reward=data.reward,
            reference=data.reference,
            mismatched=data.mismatched,
            reward_scores=reward_scores,
            limit_scores=self.score_frontier(common, data.reward, seed),
            held_out=held_out,
            sft_rows=self.evaluate(common, sft, data.reward, held_out),
        )

    def score_frontier(self, common: CommonStages, reward: Path | None, seed: int) -> Path | None:
        """A reward model's scores of the frontier's samples."""
        e = self.experiment
        if common.frontier_samples is None or reward is None:
            return None
        return self.run(
            "limit-scores",
            score_samples,
            label=f"reward model's limit, seed {seed}",
            reward_model=reward,
            samples=common.frontier_samples,
            policy=common.sft,
            per_prompt=None if e.task.finite else e.evaluation.limit_samples,
        )

    def examine_reward(self, common: CommonStages, reward: Path, seed: int) -> Path:
        """A reward model's scores of held-out pairs."""
        label = f"reward model examined, seed {seed}"
        inputs = {"reward_model": reward, "pairs": common.reward_test, "policy": common.sft}
        return self.run("reward-scores", examine_reward, label=label, **inputs)

    def prepare_arm(self, start: SftStages, arm: Arm, seed: int) -> TrainingData:
        """What one arm needs of one seed, and nothing else."""
        preferences, filtered = self.prepare_preferences(start, seed), arm.kind == "filtered"
        reward = reference = None
        if filtered or arm.kind == "best-of-n" or (arm.kind == "ppo" and not arm.gold):
            reward = self.prepare_reward(start, preferences, seed)
        if filtered or arm.kind == "direct":
            reference = self.prepare_reference(start.sft, preferences, seed)
        mismatched = self.prepare_mismatched(start.sft, preferences, seed)
        return TrainingData(seed, preferences, reward, reference, mismatched)

    def train(self, common: SftStages, trial: Trial, label: str = "") -> Path:
        """The folder of a trial's policy; best-of-n has none."""
        e, data, arm = self.experiment, trial.data, self.experiment.arms[trial.arm]
        inputs: dict[str, Any] = {
            "label": label or trial.text(),
            "start": Start(common.sft, e.lora, data.seed, e.model.dtype),
            "checkpoints": e.evaluation.checkpoints,
        }
        if arm.kind == "ppo":
            return self.run(
                "ppo",
                train_ppo,
                **inputs,
                reward_model=None if arm.gold else data.reward,
                task=without_judge(common.task),
                ppo=e.ppo,
                kl_coef=trial.setting["kl_coef"],
                drawing=self.drawing,
            )
        inputs |= {"setting": trial.setting, "direct": e.direct}
        assert data.reference is not None
        if arm.kind == "filtered":
            assert data.reward is not None
            rule = e.filtering.model_copy(update={"random": arm.random})
            return self.run(
                "filtered",
                train_filtered,
                **inputs,
                data=DirectData(data.preferences, data.reference),
                filtering=Filter(data.reward, rule, self.drawing),
            )
        mismatched = data.mismatched if arm.loss in UNPAIRED else None
        pairs = DirectData(data.preferences, data.reference, mismatched)
        return self.run("direct", train_direct, **inputs, data=pairs, loss=arm.loss)

    def score_held_out(self, common: CommonStages, preferences: Path, seed: int) -> HeldOut:
        """The reference's log-probabilities of one seed's held-out pairs, read at every end."""
        reference = self.run(
            "held-out",
            score_reference,
            label=f"reference on held-out pairs, seed {seed}",
            policy=common.sft,
            preferences=preferences,
            file=HELD_OUT,
        )
        return HeldOut(preferences, reference)

    def evaluate(
        self,
        common: CommonStages,
        policy: Policy,
        reward: Path | None = None,
        held_out: HeldOut | None = None,
        split: Split = "test",
    ) -> Path:
        """The folder with `rows.jsonl` of one policy: on test prompts, or on validation prompts.

        With `held_out` it is the end of a training, which is read with more samples.
        """
        ends = split == "test" and held_out is not None
        return self.run(
            "evaluation",
            evaluate,
            label=f"evaluate {policy.label}",
            policy=policy.folder,
            checkpoint=policy.checkpoint,
            ref=common.sft,
            reward_model=reward,
            held_out=held_out,
            prompts=self._prompts(common, split, ends),
            drawing=self.drawing.at(seed=seed_of(policy.seed, f"{split} evaluation")),
        )

    def evaluate_best_of_n(self, common: CommonStages, trial: Trial, split: Split) -> Path:
        """The folder with `rows.jsonl` of best-of-n."""
        n, seed = trial.setting["n"], trial.data.seed
        assert trial.data.reward is not None
        return self.run(
            "best-of-n",
            evaluate_best_of_n,
            label=f"best of {n:g} on {split} prompts, seed {seed}",
            ref=common.sft,
            reward_model=trial.data.reward,
            n=int(n),
            prompts=self._prompts(common, split, split == "test"),
            drawing=self.drawing.at(seed=seed_of(seed, f"{split} best-of-n")),
        )

    def _prompts(self, common: CommonStages, split: Split, ends: bool) -> Prompts:
        e, listed = self.experiment, self.experiment.task.finite and split == "test"
        return Prompts(
            task=common.task,
            split=split,
            count=e.evaluation.prompts if split == "test" else e.evaluation.validation_prompts,
            samples=e.evaluation.samples if ends else e.evaluation.checkpoint_samples,
            seed=e.task_seed,
            listing=common.frontier_samples if listed else None,
        )

    def checkpoints(self, trial: Trial, model: Path) -> dict[str, float]:
        """{folder in `model`: share of the training done}; the end is 1."""
        return read_json(model / "checkpoints.json")

    def mean_gold(self, rows: Path) -> float:
        """Of all completions that a policy was evaluated on."""
        return float(np.mean([row["gold"] for row in read_jsonl(rows / "rows.jsonl")]))


def without_judge(task: TaskInput) -> TaskInput:
    """The task as what trains sees it: who judges changes no training."""
    return replace(task, judge=None) if isinstance(task, OwnData) else task


def paid_stages(arm: Arm, data: TrainingData, end: Path) -> tuple[Path, ...]:
    """The stages whose cost is an arm's own; `end` trained it, or answered as best-of-n."""
    if arm.kind == "filtered":
        stages = data.reward, data.reference, end
    elif arm.kind == "direct":
        stages = data.reference, data.mismatched if arm.loss in UNPAIRED else None, end
    else:
        stages = None if arm.gold else data.reward, end
    return tuple(stage for stage in stages if stage is not None)


def setting_text(setting: dict[str, float]) -> str:
    """`beta=0.2 learning_rate=0.0003`"""
    return " ".join(f"{name}={value:g}" for name, value in setting.items())
