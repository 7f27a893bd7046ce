"""What a head-to-head is made of: every line here that starts with `run(` is a stage.

A stage is skipped when its folder is there already.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evaluation.evaluate import evaluate, evaluate_best_of_n, score_samples
from benchmarks.pipeline.experiment import Arm, Experiment
from dpo.filtered import train_filtered
from dpo.losses import UNPAIRED
from dpo.reference import score_mismatched, score_reference
from dpo.train import train_direct
from rlhf.ppo import train_ppo
from rlhf.reward import examine_reward, train_reward
from shared.data.preferences import make_preferences, make_reward_test
from shared.data.samples import list_reference, sample_reference
from shared.stages import read_json
from shared.training.sft import train_sft

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


def prepare_preferences(experiment: Experiment, run: Run, sft: Path, seed: int) -> Path:
    """The labelled pairs of one seed."""
    return run(
        "preferences", make_preferences, label=f"preferences, seed {seed}",
        task=experiment.task, policy=sft, data=experiment.preferences, seed=seed,
        **drawing(experiment),
    )  # fmt: skip


def prepare_reward(
    experiment: Experiment, run: Run, sft: Path, scale_samples: Path, seed: int
) -> tuple[Path, Path]:
    """(preferences, reward model) of one seed."""
    preferences = prepare_preferences(experiment, run, sft, seed)
    return preferences, run(
        "reward", train_reward, label=f"reward model, seed {seed}",
        policy=sft, preferences=preferences, references=scale_samples,
        reward=experiment.reward, seed=seed,
    )  # fmt: skip


def prepare_reference(
    experiment: Experiment, run: Run, sft: Path, preferences: Path, seed: int
) -> tuple[Path, Path | None]:
    """(reference log-probabilities, mismatched completions if an arm is unpaired) of one seed."""
    precision = experiment.direct.optimizer.precision
    reference = run(
        "reference", score_reference, label=f"reference log-probabilities, seed {seed}",
        policy=sft, preferences=preferences, precision=precision,
    )  # fmt: skip
    return reference, run(
        "mismatched", score_mismatched, label=f"mismatched completions, seed {seed}",
        policy=sft, preferences=preferences, seed=seed, precision=precision,
    ) if unpaired(experiment) else None  # fmt: skip


def prepare_data(
    experiment: Experiment, run: Run, sft: Path, scale_samples: Path, seed: int
) -> tuple[Path, Path, Path, Path | None]:
    """(preferences, reward model, `prepare_reference`) of one seed: what reads no other samples."""
    preferences, reward = prepare_reward(experiment, run, sft, scale_samples, seed)
    return preferences, reward, *prepare_reference(experiment, run, sft, preferences, seed)


def prepare_seed(experiment: Experiment, run: Run, common: Common, seed: int) -> Seed:
    """Preferences, reward model and reference log-probabilities of one seed."""
    sft, task = common.sft, experiment.task
    data = prepare_data(experiment, run, sft, common.scale_samples, seed)
    preferences, reward, reference, mismatched = data
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
        reference=reference,
        mismatched=mismatched,
        sft_rows=evaluate_model(
            experiment, run, common, reward, preferences, seed, sft, ".", f"sft, seed {seed}"
        ),
    )  # fmt: skip


def unpaired(experiment: Experiment) -> bool:
    """Whether some arm's loss reads completions on their own."""
    return any(arm.kind == "direct" and arm.loss in UNPAIRED for arm in experiment.arms.values())


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
        "lora": experiment.lora,
        "label": f"{name} {setting_text(setting)}, seed {seed.seed}",
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
    timed: Run,
    common: Common,
    seed: Seed,
    name: str,
    arm: Arm,
    setting: dict[str, float],
) -> Trained:
    """Train `arm` if need be, and read its checkpoints and its end on test prompts.

    `timed` runs what counts as the arm's own cost, `run` the rest.
    """
    if arm.kind == "best-of-n":
        rows = evaluate_n(experiment, timed, common, seed, setting, "test")
        return Trained(setting, seed.seed, None, {1.0: rows}, (seed.reward, rows))
    folder, stages = train(experiment, timed, common, seed, name, arm, setting)
    rows = {}
    for checkpoint, share in read_json(folder / "checkpoints.json").items():
        label = f"{name} {setting_text(setting)} at {share:.0%}, seed {seed.seed}"
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


def setting_text(setting: dict[str, float]) -> str:
    """`beta=0.2 learning_rate=0.0003`"""
    return " ".join(f"{name}={value:g}" for name, value in setting.items())
