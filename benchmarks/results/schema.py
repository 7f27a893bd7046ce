"""`results.json` as typed models; its JSON schema is generated from them.

Every metric carries its per-seed values; what is undefined is null. Units: gold in
[-1, 1] on `reviews`, KL in nats per sequence, seconds, tokens, bytes.
"""

from typing import Any, Literal

from pydantic import Field

from benchmarks.evaluation.frontier import FrontierPoint
from benchmarks.evaluation.statistics import Estimate
from shared.config import Config

UNDEFINED = Estimate(mean=None)


class Cost(Config):
    """What one training run of the method took, averaged over seeds; shared stages (SFT) left out.

    `wall_s` includes what the method needs and others do not (PPO: its reward model). Seconds,
    memory and `mfu` are of `timed_seeds`, which ran alone.
    """

    wall_s: float
    train_tokens: float
    generated_tokens: float
    flops: float
    peak_memory_bytes: float
    models_held: int
    labels_used: int
    mfu: float | None = None
    phases: dict[str, float] = Field(default_factory=dict)
    timed_seeds: list[int] = Field(default_factory=list)


class Stability(Config):
    """Across seeds and settings. `kl_overshoot`: highest evaluated KL over the final one."""

    runs: int
    failed: int
    stopped_early: int
    gold_iqr: float | None
    final_over_best: float | None
    kl_overshoot: float | None
    gradient_spikes: int


class CurvePoint(Config):
    """One evaluated checkpoint: `fraction` of training done, on test prompts."""

    fraction: float
    gold: Estimate
    kl: Estimate


class Setting(Config):
    """One setting of the sweep, with its checkpoints; `validation_gold` chose the tuned one."""

    setting: dict[str, float]
    tuned: bool
    validation_gold: float | None
    gold: Estimate
    kl: Estimate
    checkpoints: list[CurvePoint] = Field(default_factory=list)


class FilterEpoch(Config):
    """fDPO's log, averaged over seeds: kept share of the pairs before each epoch, and of those that
    were spoiled on purpose, if any.
    """

    epoch: int
    kept_share: float
    kept_share_per_seed: list[float]
    spoiled_kept_per_seed: list[float] | None = None
    floor_bound: int


class Method(Config):
    """One arm at its tuned setting, on test prompts."""

    kind: str
    setting: dict[str, float]
    gold: Estimate = UNDEFINED  # it and what follows from it need a judge
    greedy_gold: Estimate = UNDEFINED
    gain: Estimate = UNDEFINED
    proxy: Estimate = UNDEFINED  # it needs a reward model
    hacking_gap: Estimate = UNDEFINED
    kl: Estimate
    kl_is_bound: bool = False
    k1: Estimate
    k3: Estimate
    win_rate: Estimate = UNDEFINED
    frontier_efficiency: Estimate = UNDEFINED
    efficiency_is_lower_bound: bool = False
    frontier_margin: Estimate = UNDEFINED
    # J(pi*) - J(pi) with J = gold - beta KL, in gold's units; null where that is not defined
    regret: Estimate = UNDEFINED
    rm_limit: Estimate = UNDEFINED
    length: Estimate
    truncated: Estimate
    well_formed: Estimate
    win_rate_length_controlled: Estimate = UNDEFINED
    win_rate_against_chosen: Estimate = UNDEFINED  # of the file's own chosen answers
    repetition: Estimate = UNDEFINED  # share of 4-grams that stood before in the same answer
    distinct_2: Estimate = UNDEFINED
    perplexity: Estimate = UNDEFINED  # a token, under the starting model
    second_opinion: Estimate = UNDEFINED  # VADER's score, where gold is learnt from ratings
    alarms: list[str] = Field(default_factory=list)  # measures of text that left their bounds
    displacement: Estimate
    # share of held-out pairs whose chosen answer the policy's implicit reward prefers
    pair_accuracy: Estimate = UNDEFINED
    gold_at_matched_kl: dict[str, Estimate | None]
    cost: Cost
    stability: Stability
    sweep: list[Setting] = Field(default_factory=list)
    filtering: list[FilterEpoch] | None = None


class RewardModel(Config):
    """On held-out pairs, label noise integrated: mean P(the reward model's favourite wins)."""

    accuracy: Estimate
    bayes_accuracy: float | None  # null where labels are all that is known
    share_of_attainable: Estimate
    calibration_error: Estimate
    length_correlation: Estimate
    gold_correlation: Estimate
    score_sd: Estimate
    pairs: int
    reliability: list[tuple[float, float, int]]


class JudgeQuality(Config):
    """A judge on labelled pairs that nothing trained on; the interval is over pairs (Wilson).

    Of answers with a label a pair is a desirable and an undesirable one, of any prompts.
    """

    kind: Literal["model", "function", "share"]
    name: str
    accuracy: Estimate
    calibration_error: float | None
    pairs: int
    roles: list[str] = Field(default_factory=list)  # what else the same model does in this run

    @property
    def knows(self) -> bool:
        """Whether it is better than a coin on these pairs: else it can name no winner."""
        return self.accuracy.low is not None and self.accuracy.low > 0.5


class GoldQuality(Config):
    """How well gold that was learnt from people's ratings follows others: Pearson's correlations
    with the mean rating of sentences that nothing was fitted on, beside that of a second opinion.
    """

    sentences: int
    correlation: float
    second_opinion: float


class Labels(Config):
    """Of answers with a label: how many of each kind the first seed trains on, and the weights that
    balance them, which KTO has unless its setting names others.
    """

    desirable: int
    undesirable: int
    desirable_weight: float
    undesirable_weight: float


class OwnRows(Config):
    """What became of the rows of one's own files; `sides`: pairs that train, validate, test."""

    files: list[str]
    format: str
    rows: int
    kept: int
    dropped: dict[str, int]
    sides: dict[str, int]


class Comparison(Config):
    """a - b, paired by seed and prompt. A winner needs three seeds and an interval without 0."""

    a: str
    b: str
    metric: Literal["gold", "gold_at_matched_kl"]
    kl: float | None = None
    difference: Estimate
    verdict: str


class Results(Config):
    """One head-to-head."""

    schema_version: int = Field(default=1, alias="schema")
    experiment: str
    task: str
    seeds: list[int]
    environment: dict[str, Any]
    sizes: dict[str, int]
    own_rows: OwnRows | None = None  # of the task `own`
    enumerated: bool = False  # gold, KL and what follows are expectations over all completions
    methods: dict[str, Method]
    reward_model: RewardModel | None  # null where there is none, or no pairs to examine it on
    labels: Labels | None = None  # where methods train on single answers with a label, not on pairs
    judge: JudgeQuality | None = None
    gold_quality: GoldQuality | None = None
    frontier: list[FrontierPoint]  # empty where it is not estimated
    rm_frontier: list[FrontierPoint]
    comparisons: list[Comparison]

    @property
    def scored(self) -> bool:
        """Whether there is a reward model's score."""
        return any(method.proxy.mean is not None for method in self.methods.values())

    @property
    def judged(self) -> bool:
        """Whether there is gold: else nothing says which method is better."""
        return any(method.gold.mean is not None for method in self.methods.values())

    @property
    def tuned(self) -> bool:
        """Whether some method's setting was chosen among several."""
        settings = (setting for method in self.methods.values() for setting in method.sweep)
        return any(setting.validation_gold is not None for setting in settings)
