"""One TOML file = one experiment: everything a head-to-head depends on."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, StringConstraints, model_validator

from dpo.filtered import FilterConfig
from dpo.train import DirectConfig, check_setting
from rlhf.ppo import PPOConfig
from rlhf.reward import RewardConfig
from shared.config import Config, InputError, load
from shared.generation.engine import Sampling
from shared.models import ModelConfig
from shared.preferences import PreferenceConfig
from shared.sft import SftConfig
from shared.tasks.registry import TaskConfig

EXPERIMENTS = Path(__file__).parent / "experiments"
C = TypeVar("C", bound=Config)
RunName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Arm(Config):
    """A method with the settings to try; the best on validation prompts is the one reported.

    `kind` says how it is made; for `direct` and `filtered` arms `loss` says from which loss.
    """

    kind: Literal["best-of-n", "ppo", "direct", "filtered"]
    loss: str = "dpo"
    settings: tuple[dict[str, float], ...] = Field(min_length=1)
    random: bool = False  # of a `filtered` arm: drop as many pairs, blindly

    @model_validator(mode="after")
    def settings_fit(self) -> "Arm":
        wanted = {"best-of-n": {"n"}, "ppo": {"kl_coef"}}.get(self.kind)
        for setting in self.settings:
            if wanted is not None and set(setting) != wanted:
                raise ValueError(f"a `{self.kind}` arm's settings hold just {sorted(wanted)}")
            if wanted is None:
                try:
                    check_setting(self.loss, setting)
                except InputError as error:
                    raise ValueError(str(error)) from error
        return self


class EvaluationConfig(Config):
    """`samples` a prompt at the end of training, `checkpoint_samples` on the way."""

    prompts: int = Field(default=256, gt=1)
    samples: int = Field(default=4, gt=0)
    checkpoint_samples: int = Field(default=2, gt=0)
    validation_prompts: int = Field(default=128, gt=1)
    checkpoints: tuple[float, ...] = (0.5,)
    kl_levels: tuple[float, ...] = (0.5, 1.0, 2.0, 5.0)
    reward_pairs: int = Field(default=5000, gt=1)
    scale_prompts: int = Field(default=256, gt=1)
    scale_samples: int = Field(default=8, gt=1)
    frontier_prompts: int = Field(default=64, gt=1)
    frontier_samples: int = Field(default=1000, gt=1)
    reward_limit_samples: int = Field(default=250, gt=1)


class QuickConfig(Config):
    """What `--quick` makes smaller; it also keeps one seed and each arm's first setting."""

    pairs: int = Field(default=1500, gt=0)
    episodes: int = Field(default=2560, gt=0)
    sft_examples: int = Field(default=6000, gt=0)
    prompts: int = Field(default=128, gt=1)
    reward_pairs: int = Field(default=1000, gt=1)
    frontier_samples: int = Field(default=250, gt=1)


class Experiment(Config):
    """A head-to-head. `task_seed` fixes SFT, the reference and test prompts, a seed the rest."""

    name: RunName
    task_seed: int = 0
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    tuning_seeds: int = Field(default=1, gt=0)
    threads: int = Field(default=2, gt=0)
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    sampling: Sampling = Sampling()
    sft: SftConfig = SftConfig()
    preferences: PreferenceConfig = PreferenceConfig()
    reward: RewardConfig = RewardConfig()
    ppo: PPOConfig = PPOConfig()
    direct: DirectConfig = DirectConfig()
    filtering: FilterConfig = FilterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    quick: QuickConfig = QuickConfig()
    arms: dict[str, Arm] = Field(min_length=1)


def load_experiment(file: str, overrides: list[str], quick: bool) -> Experiment:
    """Read a TOML file, or an experiment that comes with Klash by its name, with `overrides`."""
    path = Path(file)
    if not path.exists() and (EXPERIMENTS / f"{file}.toml").exists():
        path = EXPERIMENTS / f"{file}.toml"
    experiment = load(Experiment, path, overrides)
    return smaller(experiment) if quick else experiment


def smaller(experiment: Experiment) -> Experiment:
    """The `--quick` form: one seed, one setting an arm, the sizes of `[quick]`."""
    quick = experiment.quick
    arms = {n: _changed(arm, settings=arm.settings[:1]) for n, arm in experiment.arms.items()}
    return _changed(
        experiment,
        name=f"{experiment.name}-quick",
        seeds=experiment.seeds[:1],
        arms=arms,
        sft=_changed(experiment.sft, examples=quick.sft_examples),
        preferences=_changed(experiment.preferences, pairs=quick.pairs),
        ppo=_changed(experiment.ppo, episodes=quick.episodes),
        evaluation=_changed(
            experiment.evaluation,
            prompts=quick.prompts,
            reward_pairs=quick.reward_pairs,
            frontier_samples=quick.frontier_samples,
            reward_limit_samples=min(
                quick.frontier_samples, experiment.evaluation.reward_limit_samples
            ),
            checkpoints=(),
        ),
    )


def _changed(config: C, **changes: Any) -> C:
    return config.model_copy(update=changes)
