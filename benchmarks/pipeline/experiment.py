"""One TOML file = one experiment: everything a head-to-head depends on."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from dpo.filtered import FilterConfig
from dpo.losses import LOSSES
from dpo.train import DirectConfig, check_setting
from rlhf.ppo import PPOConfig
from rlhf.reward import RewardConfig
from shared.config import Config, InputError, Misfit, suggest
from shared.data.preferences import PreferenceConfig
from shared.generation.engine import Sampling
from shared.generation.start import GenerationConfig
from shared.models.load import ModelConfig
from shared.models.lora import LoRAConfig
from shared.tasks.judge import JudgeConfig
from shared.tasks.registry import TaskConfig
from shared.training.sft import SftConfig

RunName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Arm(Config):
    """A method with the settings to try; the best on validation prompts is the one reported."""

    kind: Literal["best-of-n", "ppo", "direct", "filtered"]
    """How it is made: `direct` is a loss on pairs, `filtered` is filtered DPO."""
    loss: str = "dpo"
    """The loss of a `direct` arm, such as dpo, ipo or kto: a name in `dpo/losses.py`."""
    settings: tuple[dict[str, float], ...] = Field(min_length=1)
    """Hyperparameters to try: `n` of best-of-n, `kl_coef` (score units a nat) of PPO, else those of
    the loss, such as `beta` or `tau`, and a `learning_rate` if wanted."""
    random: bool = False
    """Of a `filtered` arm: drop as many pairs without looking at them, as a control."""
    gold: bool = False
    """Of a `ppo` arm: the task's true score is the reward, in the reward model's place."""

    @model_validator(mode="after")
    def settings_fit(self) -> "Arm":
        if self.gold and self.kind != "ppo":
            raise Misfit("only arms of kind `ppo` have it", "gold")
        if self.random and self.kind != "filtered":
            raise Misfit("only arms of kind `filtered` have it", "random")
        if self.kind == "filtered" and self.loss != "dpo":
            raise Misfit(f"a `filtered` arm trains with dpo, not {self.loss}", "loss")
        if self.kind == "direct" and self.loss not in LOSSES:
            raise Misfit(f"unknown loss `{self.loss}`{suggest(self.loss, list(LOSSES))}", "loss")
        for number, setting in enumerate(self.settings):
            if setting in self.settings[:number]:
                raise Misfit(f"stands twice: {setting}", "settings", number)
            try:
                self.check(setting)
            except InputError as error:
                raise Misfit(str(error), "settings", number) from error
        return self

    def check(self, setting: dict[str, float]) -> None:
        """InputError unless this is a setting of the arm's kind and loss."""
        wanted = {"best-of-n": {"n"}, "ppo": {"kl_coef"}}.get(self.kind)
        if wanted is None:
            check_setting(self.loss, setting)
        elif set(setting) != wanted:
            raise InputError(
                f"a `{self.kind}` arm's settings hold just {sorted(wanted)}, found {setting}"
            )
        elif self.kind == "best-of-n" and (setting["n"] < 1 or setting["n"] % 1):
            raise InputError(f"`n` must be a whole number from 1 on, found {setting['n']:g}")
        elif self.kind == "ppo" and setting["kl_coef"] < 0:
            raise InputError(f"`kl_coef` must be 0 or more, found {setting['kl_coef']:g}")


class EvaluationConfig(Config):
    """How much is sampled to measure each method."""

    prompts: int = Field(default=256, gt=1)
    """Test prompts that every method answers."""
    samples: int = Field(default=4, gt=0)
    """Completions of each test prompt at the end of training."""
    checkpoint_samples: int = Field(default=2, gt=0)
    """Completions of each prompt on the way: of checkpoints, and of settings to choose from."""
    validation_prompts: int = Field(default=128, gt=1)
    """Prompts on which each arm's setting is chosen."""
    checkpoints: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.25, 0.5)
    """Shares of the training after which a policy is saved and evaluated, beside its end."""
    kl_levels: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 1.0, 2.0, 5.0)
    """KL to the reference, in nats a sequence, at which methods are compared."""
    reward_pairs: int = Field(default=5000, gt=1)
    """Pairs, of prompts that nothing trains on, that reward models are examined on."""
    scale_prompts: int = Field(default=256, gt=1)
    """Validation prompts whose samples centre and scale a reward model's scores."""
    scale_samples: int = Field(default=8, gt=1)
    """Samples of the SFT model for each of these prompts."""
    frontier_prompts: int = Field(default=64, gt=1)
    """Test prompts, the first ones, that the frontier of gold against KL is estimated on."""
    frontier_samples: int = Field(default=1000, ge=0)
    """Samples of the SFT model for each of the frontier's prompts; 0: there is no frontier."""
    reward_limit_samples: int = Field(default=250, gt=1)
    """How many of these each reward model scores, for the most gold that its scores lead to."""

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
    """At most so many `preferences.pairs`."""
    episodes: int = Field(default=2560, gt=0)
    """At most so many `ppo.episodes`."""
    sft_examples: int = Field(default=6000, gt=0)
    """At most so many `sft.examples`."""
    prompts: int = Field(default=128, gt=1)
    """At most so many `evaluation.prompts`, unless the task is finite."""
    reward_pairs: int = Field(default=1000, gt=1)
    """At most so many `evaluation.reward_pairs`."""
    frontier_samples: int = Field(default=250, ge=0)
    """At most so many `evaluation.frontier_samples`."""


class Experiment(Config):
    """A head-to-head."""

    name: RunName
    """The run's folder among all runs: letters, digits, `.`, `_` and `-`."""
    task_seed: int = Field(default=0, ge=0)
    """Fixes the SFT model, which is the reference, and the test prompts."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1)
    """A run each: pairs, labels, reward model, training and rollouts vary with it."""
    tuning_seeds: int = Field(default=1, gt=0)
    """How many of the seeds, the first ones, try all settings of an arm."""
    threads: int = Field(default=2, gt=0)
    """CPU threads of each process."""
    timed_threads: int | None = Field(default=None, gt=0)
    """CPU threads of the last seed's training, which runs alone and is timed; by default
    `threads`."""
    workers: int = Field(default=1, gt=0)
    """Stages at a time, each in a process of its own; each takes a GPU where there are several."""
    save_minutes: float = Field(default=10.0, ge=0)
    """How often a training saves what it goes on from if it is stopped; 0: after every step."""
    task: TaskConfig = TaskConfig()
    """Where prompts, labels and gold scores come from."""
    judge: JudgeConfig = JudgeConfig()
    """Of the task `own`: who says in the end what is better. Without one gold is null, each arm has
    its first setting, and the report names no winner."""
    model: ModelConfig = ModelConfig()
    """The policy that SFT trains from scratch, a small Llama."""
    lora: LoRAConfig | None = None
    """Low-rank adapters of all policies, whose base stays frozen; else policies train whole."""
    sampling: Sampling = Sampling()
    """How completions are drawn."""
    generation: GenerationConfig = GenerationConfig()
    """Which engine draws them."""
    sft: SftConfig = SftConfig()
    """Supervised fine-tuning, the common start of all methods."""
    preferences: PreferenceConfig = PreferenceConfig()
    """Pairs of completions and their labels."""
    reward: RewardConfig = RewardConfig()
    """The reward model."""
    ppo: PPOConfig = PPOConfig()
    """PPO; its KL coefficient stands in an arm's settings."""
    direct: DirectConfig = DirectConfig()
    """What DPO, IPO, KTO and filtered DPO share."""
    filtering: FilterConfig = FilterConfig()
    """What filtered DPO adds; its passes replace `direct.epochs`."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How much is sampled to measure each method."""
    quick: QuickConfig = QuickConfig()
    """Upper bounds that `--quick` sets."""
    arms: dict[str, Arm] = Field(min_length=1)
    """The methods, each under a name of one's choice."""

    @model_validator(mode="after")
    def names_and_seeds_fit(self) -> "Experiment":
        if len(set(self.seeds)) < len(self.seeds):
            raise Misfit(f"holds a seed twice: {list(self.seeds)}", "seeds")
        if self.sampling.temperature == 0:
            raise Misfit("must be above 0: pairs and rollouts are drawn", "sampling", "temperature")
        if self.task.finite:
            self.listing_fits()
        elif self.preferences.listed:
            raise Misfit(
                f"the completions of {self.task.name} are endless", "preferences", "listed"
            )
        if self.task.name == "own":
            self.own_task_fits()
        elif self.judge.named:
            raise Misfit(f"the task {self.task.name} has its own true score", "judge")
        if taken := {"sft", "reward"} & set(self.arms):
            raise Misfit(f"the name {sorted(taken)[0]!r} is taken, choose another", "arms")
        return self

    def own_task_fits(self) -> None:
        """A user's pairs need a user's model; what takes the true score's place is a judge."""
        if not self.task.pairs:
            raise Misfit("name the file of your pairs, a folder, or a hub name", "task", "pairs")
        if self.model.pretrained is None:
            raise Misfit(
                "the task own needs a model that knows its language: a folder or a hub name",
                "model",
                "pretrained",
            )
        for name, arm in self.arms.items():
            if arm.gold:
                raise Misfit("the task own has no true score to train on", "arms", name, "gold")
        if self.preferences.source == "policy" and not self.judge.named:
            raise Misfit("samples can be labelled only by a judge", "preferences", "source")
        if self.preferences.source == "data" and self.preferences.spoiled:
            raise Misfit("a file's pairs are taken as they are", "preferences", "spoiled")

    @property
    def has_pairs(self) -> bool:
        """Whether methods train on pairs; else on single answers with a label."""
        return self.task.rows != "labels" or self.preferences.source == "policy"

    @property
    def has_reward_model(self) -> bool:
        """Whether one can be trained, or is given."""
        return self.has_pairs or self.reward.pretrained is not None

    @property
    def has_gold(self) -> bool:
        """Whether there is a true score, or someone who stands in for it."""
        return self.task.name != "own" or self.judge.named

    @property
    def has_frontier(self) -> bool:
        """Whether the most that any policy can reach is estimated."""
        return self.has_gold and self.evaluation.frontier_samples > 0

    def listing_fits(self) -> None:
        """A finite task is evaluated whole: all prompts, to the cap that was listed."""
        prompts, cap = self.task.exact.prompts, self.task.exact.cap
        if self.evaluation.prompts != prompts:
            raise Misfit(f"must be {prompts}: all of task.exact.prompts", "evaluation", "prompts")
        if self.sampling.max_new_tokens != cap:
            raise Misfit(f"must be {cap}: task.exact.cap", "sampling", "max_new_tokens")
