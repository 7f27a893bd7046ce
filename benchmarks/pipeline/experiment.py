"""One TOML file = one experiment: everything a head-to-head depends on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, StringConstraints, model_validator

from dpo.filtered import FilterConfig
from dpo.train import DirectConfig, check_setting
from rlhf.ppo import PPOConfig
from rlhf.reward import RewardConfig
from shared.config import Config, InputError, load
from shared.data.preferences import PreferenceConfig
from shared.generation.engine import Sampling
from shared.generation.start import GenerationConfig
from shared.models.load import ModelConfig
from shared.models.lora import LoRAConfig
from shared.tasks.registry import TaskConfig
from shared.training.sft import SftConfig

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
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
    gold: bool = False  # of a `ppo` arm: the task's true score is the reward

    @model_validator(mode="after")
    def settings_fit(self) -> "Arm":
        if any(self.settings.count(setting) > 1 for setting in self.settings):
            raise ValueError("a setting stands twice")
        if self.gold and self.kind != "ppo":
            raise ValueError("`gold` is for arms of kind `ppo`")
        wanted = {"best-of-n": {"n"}, "ppo": {"kl_coef"}}.get(self.kind)
        for setting in self.settings:
            if wanted is not None and set(setting) != wanted:
                raise ValueError(f"a `{self.kind}` arm's settings hold just {sorted(wanted)}")
            if self.kind == "best-of-n" and (setting["n"] < 1 or setting["n"] % 1):
                raise ValueError(f"`n` must be a whole number from 1 on, found {setting['n']}")
            if self.kind == "ppo" and setting["kl_coef"] < 0:
                raise ValueError(f"`kl_coef` must be 0 or more, found {setting['kl_coef']}")
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
    checkpoints: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.25, 0.5)
    kl_levels: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 1.0, 2.0, 5.0)
    reward_pairs: int = Field(default=5000, gt=1)
    scale_prompts: int = Field(default=256, gt=1)
    scale_samples: int = Field(default=8, gt=1)
    frontier_prompts: int = Field(default=64, gt=1)
    frontier_samples: int = Field(default=1000, gt=1)
    reward_limit_samples: int = Field(default=250, gt=1)

    @property
    def near_prompts(self) -> int:
        """Test prompts that the frontier is estimated on: the first ones."""
        return min(self.frontier_prompts, self.prompts)

    @property
    def limit_samples(self) -> int:
        """The frontier's samples a prompt that each reward model scores."""
        return min(self.reward_limit_samples, self.frontier_samples)


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
    task_seed: int = Field(default=0, ge=0)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1)
    tuning_seeds: int = Field(default=1, gt=0)
    threads: int = Field(default=2, gt=0)  # of each process
    timed_threads: int | None = Field(default=None, gt=0)  # of the last seed's training, alone
    workers: int = Field(default=1, gt=0)  # stages at a time, each in a process
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    lora: LoRAConfig | None = None  # of all policies; else they train whole
    sampling: Sampling = Sampling()
    generation: GenerationConfig = GenerationConfig()
    sft: SftConfig = SftConfig()
    preferences: PreferenceConfig = PreferenceConfig()
    reward: RewardConfig = RewardConfig()
    ppo: PPOConfig = PPOConfig()
    direct: DirectConfig = DirectConfig()
    filtering: FilterConfig = FilterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    quick: QuickConfig = QuickConfig()
    arms: dict[str, Arm] = Field(min_length=1)

    @model_validator(mode="after")
    def names_and_seeds_fit(self) -> "Experiment":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` holds a seed twice: {list(self.seeds)}")
        if self.sampling.temperature == 0:
            raise ValueError("`sampling.temperature` must be above 0: pairs and rollouts are drawn")
        if self.task.finite:
            self.listing_fits()
        elif self.preferences.listed:
            raise ValueError(
                f"`preferences.listed`: the completions of {self.task.name} are endless"
            )
        if taken := {"sft", "reward"} & set(self.arms):
            raise ValueError(f"`arms`: the name {sorted(taken)[0]!r} is taken, choose another")
        return self

    def listing_fits(self) -> None:
        """A finite task is evaluated whole: all prompts, to the cap that was listed."""
        prompts, cap = self.task.exact.prompts, self.task.exact.cap
        if self.evaluation.prompts != prompts:
            raise ValueError(f"`evaluation.prompts` must be {prompts}: all of task.exact.prompts")
        if self.sampling.max_new_tokens != cap:
            raise ValueError(f"`sampling.max_new_tokens` must be {cap}: task.exact.cap")


def load_experiment(file: str, overrides: Sequence[str], quick: bool) -> Experiment:
    """Read a TOML file, or an experiment that comes with Klash by its name, with `overrides`."""
    path = experiment_file(file)
    experiment = load(Experiment, path, overrides)
    return smaller(experiment) if quick else experiment


def experiment_file(file: str) -> Path:
    """The path of a TOML file, or of an experiment that comes with Klash by its name."""
    path = Path(file)
    if not path.exists() and (EXPERIMENTS / f"{file}.toml").exists():
        path = EXPERIMENTS / f"{file}.toml"
    return path


def smaller(experiment: Experiment) -> Experiment:
    """The `--quick` form: one seed, one setting an arm, the sizes of `[quick]`."""
    quick, whole = experiment.quick, experiment.evaluation
    arms = {n: _changed(arm, settings=arm.settings[:1]) for n, arm in experiment.arms.items()}
    return _changed(
        experiment,
        name=f"{experiment.name}-quick",
        seeds=experiment.seeds[:1],
        arms=arms,
        sft=_changed(experiment.sft, examples=min(quick.sft_examples, experiment.sft.examples)),
        preferences=_changed(
            experiment.preferences, pairs=min(quick.pairs, experiment.preferences.pairs)
        ),
        ppo=_changed(experiment.ppo, episodes=min(quick.episodes, experiment.ppo.episodes)),
        evaluation=_changed(
            whole,
            prompts=min(quick.prompts, whole.prompts),
            reward_pairs=min(quick.reward_pairs, whole.reward_pairs),
            frontier_samples=min(quick.frontier_samples, whole.frontier_samples),
            checkpoints=(),
        ),
    )


def _changed(config: C, **changes: Any) -> C:
    return config.model_copy(update=changes)
