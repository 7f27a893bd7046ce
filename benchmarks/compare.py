"""The pipeline on one screen.

    config -> prompts and preferences -> SFT -> { reward model -> PPO | direct methods |
    reward model -> filtered DPO } -> evaluate -> results

Every line of it that starts with `run(` is a stage: skipped when its folder is there already.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.evaluate import evaluate, evaluate_best_of_n, score_samples
from benchmarks.experiment import Arm, Experiment
from dpo.filtered import train_filtered
from dpo.losses import UNPAIRED
from dpo.reference import score_mismatched, score_reference
from dpo.train import train_direct
from rlhf.ppo import train_ppo
from rlhf.reward import examine_reward, train_reward
from shared.preferences import make_preferences, make_reward_test
from shared.samples import list_reference, sample_reference
from shared.sft import train_sft
from shared.stages import Stages, read_json, read_jsonl

Run = Callable[..., Path]


@dataclass(frozen=True)
class Common:
    """What all seeds share: the SFT model, which is also the reference, and samples of it."""

    sft: Path
    scale_samples: Path  # on which reward models are centred and scaled
    frontier_samples: Path  # of a finite task: all completions
    reward_test: Path


@dataclass(frozen=True)
class Seed:
    """What all arms of one seed share."""

    seed: int
    preferences: Path
    reward: Path
    reward_scores: Path  # of the reward model on held-out pairs
    limit_scores: Path  # of the reward model on the frontier's samples
    reference: Path
    mismatched: Path | None  # where some arm is unpaired
    sft_rows: Path


@dataclass(frozen=True)
class Trained:
    """One arm at one setting and seed: `model` is None for best-of-n. Rows by share of training."""

    setting: dict[str, float]
    seed: int
    model: Path | None
    rows: dict[float, Path]  # share of training -> evaluation folder; 1.0 is the end
    stages: tuple[Path, ...]  # whose cost is this arm's own


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


def compare(
    experiment: Experiment, stages: Stages, only: tuple[int, ...] | None = None
) -> Compared:
    """Run whatever is not there yet, of all seeds or of `only` some.

    Settings are chosen on validation prompts of the first seeds, never on test prompts.
    """
    run, wanted = stages.run, experiment.seeds if only is None else only
    needed = [s for s in experiment.seeds if s in {*wanted, *first_seeds(experiment)}]
    start = prepare_start(experiment, run)
    parts = [partial(prepare_common, experiment, run)]
    parts += [partial(prepare_reward, experiment, run, *start, seed) for seed in needed]
    stages.each(lambda part: part(), parts)
    common = prepare_common(experiment, run)
    prepared = stages.each(partial(prepare_seed, experiment, run, common), needed)
    seeds = dict(zip(needed, prepared, strict=True))

    finish = partial(finish_arm, experiment, stages, common, seeds, wanted)
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
    stages: Stages,
    common: Common,
    seeds: dict[int, Seed],
    wanted: tuple[int, ...],
    name: str,
) -> ArmDone:
    """Choose one arm's setting, and train and evaluate it on the `wanted` seeds."""
    arm = experiment.arms[name]
    best, scores = tune(experiment, stages, common, seeds, name, arm)
    runs = [
        (setting, seed)
        for setting in arm.settings
        for seed in wanted
        if setting == best or seed in tuning_seeds(experiment, arm)
    ]

    def evaluated(at: tuple[dict[str, float], int]) -> Trained:
        setting, seed = at
        return evaluate_arm(experiment, stages.run, common, seeds[seed], name, arm, setting)

    return ArmDone(best, scores, stages.each(evaluated, runs))


def train_alone(experiment: Experiment, stages: Stages, seed: int) -> None:
    """What the report gives seconds of: each arm at its setting, of one seed, one after another."""
    run = stages.run
    common = prepare_common(experiment, run)
    needed = {*first_seeds(experiment), seed}
    seeds = {s: prepare_seed(experiment, run, common, s) for s in experiment.seeds if s in needed}
    for name, arm in experiment.arms.items():
        best, _ = tune(experiment, stages, common, seeds, name, arm)
        if arm.kind == "best-of-n":
            evaluate_n(experiment, run, common, seeds[seed], best, "test")
        else:
            train(experiment, run, common, seeds[seed], name, arm, best)


def first_seeds(experiment: Experiment) -> tuple[int, ...]:
    """Those that settings are chosen on."""
    return experiment.seeds[: experiment.tuning_seeds]


def tuning_seeds(experiment: Experiment, arm: Arm) -> tuple[int, ...]:
    """Seeds on which every setting runs; none if there is nothing to choose."""
    return first_seeds(experiment) if len(arm.settings) > 1 else ()


def timed_seeds(experiment: Experiment) -> list[int]:
    """Seeds that train with nothing beside them: all, or where stages run side by side the last."""
    return list(experiment.seeds if experiment.workers == 1 else experiment.seeds[-1:])


def drawing(experiment: Experiment) -> dict[str, Any]:
    """What every stage that samples is told: at what temperature and length, with which engine."""
    return {"sampling": experiment.sampling, "generation": experiment.generation}


def prepare_start(experiment: Experiment, run: Run) -> tuple[Path, Path]:
    """(the SFT model, samples of it on which reward models are centred and scaled)."""
    e, seed = experiment.evaluation, experiment.task_seed
    sft = run(
        "sft", train_sft,
        task=experiment.task, model=experiment.model, sft=experiment.sft, seed=seed,
    )  # fmt: skip
    return sft, run(
        "reference-samples", sample_reference, label="samples for score scale",
        task=experiment.task, policy=sft, seed=seed, **drawing(experiment),
        split="validation", prompts=e.scale_prompts, per_prompt=e.scale_samples,
    )  # fmt: skip


def prepare_common(experiment: Experiment, run: Run) -> Common:
    """SFT, and the samples that scales, frontier and reward-model tests are read from."""
    e = experiment.evaluation
    sft, scale_samples = prepare_start(experiment, run)
    of_sft = {"task": experiment.task, "policy": sft, "seed": experiment.task_seed}
    drawn = {**of_sft, **drawing(experiment)}
    return Common(
        sft=sft,
        scale_samples=scale_samples,
        frontier_samples=run(
            "listing", list_reference, label="all completions", **of_sft,
            sampling=experiment.sampling,
        ) if experiment.task.finite else run(
            "reference-samples", sample_reference, label="samples for frontier", **drawn,
            split="test", prompts=e.near_prompts, per_prompt=e.frontier_samples,
        ),
        reward_test=run("reward-test", make_reward_test, **drawn, pairs=e.reward_pairs),
    )  # fmt: skip


def prepare_reward(
    experiment: Experiment, run: Run, sft: Path, scale_samples: Path, seed: int
) -> tuple[Path, Path]:
    """(preferences, reward model) of one seed."""
    preferences = run(
        "preferences", make_preferences, label=f"preferences, seed {seed}",
        task=experiment.task, policy=sft, data=experiment.preferences, seed=seed,
        **drawing(experiment),
    )  # fmt: skip
    return preferences, run(
        "reward", train_reward, label=f"reward model, seed {seed}",
        policy=sft, preferences=preferences, references=scale_samples,
        reward=experiment.reward, seed=seed,
    )  # fmt: skip


def prepare_seed(experiment: Experiment, run: Run, common: Common, seed: int) -> Seed:
    """Preferences, reward model and reference log-probabilities of one seed."""
    sft, task = common.sft, experiment.task
    precision = experiment.direct.optimizer.precision
    preferences, reward = prepare_reward(experiment, run, sft, common.scale_samples, seed)
    return Seed(
        seed=seed,
        preferences=preferences,
        reward=reward,
        reward_scores=run(
            "reward-scores", examine_reward, label=f"reward model examined, seed {seed}",
            reward_model=reward, pairs=common.reward_test, task=task,
        ),
        limit_scores=run(
            "limit-scores", score_samples, label=f"reward model's limit, seed {seed}",
            reward_model=reward, samples=common.frontier_samples,
            per_prompt=None if task.finite else experiment.evaluation.limit_samples,
        ),
        reference=run(
            "reference", score_reference, label=f"reference log-probabilities, seed {seed}",
            policy=sft, preferences=preferences, precision=precision,
        ),
        mismatched=run(
            "mismatched", score_mismatched, label=f"mismatched completions, seed {seed}",
            policy=sft, preferences=preferences, seed=seed, precision=precision,
        ) if unpaired(experiment) else None,
        sft_rows=evaluate_model(
            experiment, run, common, reward, preferences, seed, sft, ".", f"sft, seed {seed}"
        ),
    )  # fmt: skip


def unpaired(experiment: Experiment) -> bool:
    """Whether some arm's loss reads completions on their own."""
    return any(arm.kind == "direct" and arm.loss in UNPAIRED for arm in experiment.arms.values())


def tune(
    experiment: Experiment,
    stages: Stages,
    common: Common,
    seeds: dict[int, Seed],
    name: str,
    arm: Arm,
) -> tuple[dict[str, float], list[float | None]]:
    """(the best setting, mean gold of each on validation prompts): None if there is no choice."""
    run = stages.run

    def gold(at: tuple[dict[str, float], int]) -> float:
        setting, seed = at
        if arm.kind == "best-of-n":
            rows = evaluate_n(experiment, run, common, seeds[seed], setting, "validation")
        else:
            model = train(experiment, run, common, seeds[seed], name, arm, setting)[0]
            rows = evaluate_model(
                experiment, run, common, None, None, seed, model, "final",
                f"{name} {_text(setting)}, seed {seed}", "validation",
            )  # fmt: skip
        return float(np.mean([row["gold"] for row in read_jsonl(rows / "rows.jsonl")]))

    trials = [(setting, seed) for setting in arm.settings for seed in tuning_seeds(experiment, arm)]
    if not trials:
        return arm.settings[0], [None] * len(arm.settings)
    golds = stages.each(gold, trials)
    scores = np.array(golds).reshape(len(arm.settings), -1).mean(1)
    return arm.settings[int(scores.argmax())], scores.tolist()


def train(
    experiment: Experiment,
    run: Run,
    common: Common,
    seed: Seed,
    name: str,
    arm: Arm,
    setting: dict[str, float],
) -> tuple[Path, tuple[Path, ...]]:
    """(folder of the trained policy, stages whose cost is its own)."""
    inputs = {
        "policy": common.sft,
        "seed": seed.seed,
        "checkpoints": experiment.evaluation.checkpoints,
        "label": f"{name} {_text(setting)}, seed {seed.seed}",
    }
    if arm.kind == "ppo":
        folder = run(
            "ppo", train_ppo, **inputs, reward_model=None if arm.gold else seed.reward,
            task=experiment.task, ppo=experiment.ppo, kl_coef=setting["kl_coef"],
            **drawing(experiment),
        )  # fmt: skip
        return folder, ((folder,) if arm.gold else (seed.reward, folder))
    data = {
        "preferences": seed.preferences,
        "reference": seed.reference,
        "setting": setting,
        "direct": experiment.direct,
    }
    if arm.kind == "filtered":
        filtering = experiment.filtering.model_copy(update={"random": arm.random})
        folder = run(
            "filtered", train_filtered, **inputs, **data, reward_model=seed.reward,
            filtering=filtering, **drawing(experiment),
        )  # fmt: skip
        return folder, (seed.reward, seed.reference, folder)
    mismatched = seed.mismatched if arm.loss in UNPAIRED else None
    folder = run("direct", train_direct, **inputs, **data, mismatched=mismatched, loss=arm.loss)
    return folder, (seed.reference, *([mismatched] if mismatched else []), folder)


def evaluate_arm(
    experiment: Experiment,
    run: Run,
    common: Common,
    seed: Seed,
    name: str,
    arm: Arm,
    setting: dict[str, float],
) -> Trained:
    """Train `arm` if need be, and read its checkpoints and its end on test prompts."""
    if arm.kind == "best-of-n":
        rows = evaluate_n(experiment, run, common, seed, setting, "test")
        return Trained(setting, seed.seed, None, {1.0: rows}, (seed.reward, rows))
    folder, stages = train(experiment, run, common, seed, name, arm, setting)
    rows = {}
    for checkpoint, share in read_json(folder / "checkpoints.json").items():
        label = f"{name} {_text(setting)} at {share:.0%}, seed {seed.seed}"
        pairs = seed.preferences if share == 1.0 else None
        rows[share] = evaluate_model(
            experiment, run, common, seed.reward, pairs, seed.seed, folder, checkpoint, label
        )
    return Trained(setting, seed.seed, folder, rows, stages)


def evaluate_model(
    experiment: Experiment,
    run: Run,
    common: Common,
    reward: Path | None,
    preferences: Path | None,
    seed: int,
    model: Path,
    checkpoint: str,
    label: str,
    split: str = "test",
) -> Path:
    """The folder with `rows.jsonl` of one policy: on test prompts, or on validation prompts."""
    e = experiment.evaluation
    whole = split == "test" and preferences is not None
    return run(
        "evaluation", evaluate, label=f"evaluate {label}",
        policy=model, checkpoint=checkpoint, ref=common.sft, reward_model=reward,
        preferences=preferences, task=experiment.task, split=split,
        prompts=e.prompts if split == "test" else e.validation_prompts,
        samples=e.samples if whole else e.checkpoint_samples,
        **drawing(experiment), prompt_seed=experiment.task_seed, seed=seed,
        listed=_listed(experiment, common, split),
    )  # fmt: skip


def evaluate_n(
    experiment: Experiment,
    run: Run,
    common: Common,
    seed: Seed,
    setting: dict[str, float],
    split: str,
) -> Path:
    """The folder with `rows.jsonl` of best-of-n."""
    e = experiment.evaluation
    return run(
        "best-of-n", evaluate_best_of_n,
        label=f"best of {setting['n']:g} on {split} prompts, seed {seed.seed}",
        ref=common.sft, reward_model=seed.reward, n=int(setting["n"]), task=experiment.task,
        split=split, prompts=e.prompts if split == "test" else e.validation_prompts,
        samples=e.samples if split == "test" else e.checkpoint_samples,
        **drawing(experiment), prompt_seed=experiment.task_seed, seed=seed.seed,
        listed=_listed(experiment, common, split),
    )  # fmt: skip


def _listed(experiment: Experiment, common: Common, split: str) -> Path | None:
    return common.frontier_samples if experiment.task.finite and split == "test" else None


def _text(setting: dict[str, float]) -> str:
    return " ".join(f"{name}={value:g}" for name, value in setting.items())
