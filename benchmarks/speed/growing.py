"""What `klash speed growth` measures: one optimiser step, and full trainings by their stages."""

from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import NamedTuple

from benchmarks.pipeline.places import stage_context
from benchmarks.speed.cases import Case, Shape, Workload, make_case
from benchmarks.speed.sides import Round, Work, seconds_since
from dpo.reference import score_reference
from dpo.train import DirectConfig, DirectData, train_direct
from shared.data.preferences import PreferenceConfig, make_preferences
from shared.generation.engine import Sampling
from shared.generation.start import Drawing
from shared.models.cost import peak_memory_bytes
from shared.models.load import ModelConfig, Start, new_policy, save
from shared.stages import Stages, read_json
from shared.tasks.registry import TaskConfig, make_task
from shared.training.sft import SftConfig, train_sft

TASK = TaskConfig()
PROMPT_TOKENS = 12  # of a step's pairs, whatever their completions' length
EPOCHS = 1
LossSetting = tuple[str, dict[str, float]]  # a loss and its setting
ARMS: tuple[LossSetting, ...] = (  # of equal cost: KTO's step has one pass more
    ("dpo", {"beta": 0.1}),
    ("cdpo", {"beta": 0.1, "label_smoothing": 0.1}),
    ("ipo", {"tau": 0.1}),
    ("ipo-token", {"tau": 0.5}),
)
BETA_ARMS: tuple[LossSetting, ...] = tuple(
    ("dpo", {"beta": b}) for b in (0.1, 0.02, 0.05, 0.2, 0.5, 1.0)
)


class GrowthStep(NamedTuple):
    """What one DPO step works on; by default that of the model that `reviews` trains."""

    pairs: int = 64
    completion_tokens: int = 12
    vocabulary: int = 0  # at least the tokenizer's
    model: ModelConfig = ModelConfig()


class GrowthTraining(NamedTuple):
    """What one run trains: each arm on each seed's own pairs and their reference."""

    pairs: int = 256
    arms: tuple[LossSetting, ...] = ARMS[:1]
    seeds: int = 1


def step_case(step: GrowthStep, steps: int, folder: Path) -> tuple[Case, int]:
    """(what `steps` such steps need, laid out in `folder`; the model's parameters)."""
    tokenizer = make_task(TASK).tokenizer()
    model = new_policy(step.model, tokenizer, seed=0)
    # Tokens that no text holds cost as much as others: the head makes logits of all.
    rows = max(step.vocabulary, len(tokenizer))
    model.resize_token_embeddings(rows, mean_resizing=False)
    save(model, tokenizer, folder / "policy")
    length = step.completion_tokens
    workload = Workload(
        learning_rate=5e-4,
        precisions=("float32",),
        completion_tokens=(length, length),
        shapes={"": Shape(step.pairs, PROMPT_TOKENS / length, step.pairs)},
    )
    case = make_case("dpo", "float32", workload, "", steps, folder / "policy", folder)
    return case, model.num_parameters()


def short_sft(runs: Path) -> Path:
    """A policy whose texts are the task's and end by themselves."""
    stages = Stages(runs / ".stages", lambda *_: None, stage_context())
    sft = SftConfig(examples=4000, epochs=1)
    return stages.run("sft", train_sft, task=TASK, model=ModelConfig(), sft=sft, seed=0)


def full_training(policy: Path, scratch: Path, training: GrowthTraining) -> Work:
    """A round is every stage from sampling the pairs on; none is cached."""

    def work() -> Round:
        peaks = PeakMemory()
        with TemporaryDirectory(dir=scratch) as root:
            start = perf_counter()
            train_all(Stages(Path(root), peaks, stage_context()), policy, training)
            return Round(1.0, seconds_since(start), memory=peaks.highest)

    return work


def more_settings(policy: Path, scratch: Path, training: GrowthTraining) -> Work:
    """A round is a run of all arms where the first arm's stages are cached.

    Its units are the seconds of the other arms' own training, from their `cost.json`.
    """

    def work() -> Round:
        peaks = PeakMemory()
        with TemporaryDirectory(dir=scratch) as root:
            first = training._replace(arms=training.arms[:1])
            train_all(Stages(Path(root), peaks, stage_context()), policy, first)
            start = perf_counter()
            folders = train_all(Stages(Path(root), peaks, stage_context()), policy, training)
            seconds = seconds_since(start)
            own = sum(read_json(folder / "cost.json")["wall_s"] for folder in folders[1:])
            return Round(own, seconds, memory=peaks.highest)

    return work


class PeakMemory:
    """Read at every stage's start and end: their Meters reset the process's peak."""

    def __init__(self) -> None:
        self.highest = 0

    def __call__(self, *_: object) -> None:
        self.highest = max(self.highest, peak_memory_bytes())


def train_all(stages: Stages, policy: Path, training: GrowthTraining) -> list[Path]:
    """The stages of `klash compare` that a direct arm trains by; the trained policies' folders."""
    trained = []
    data = PreferenceConfig(pairs=training.pairs, held_out_pairs=1)
    for seed in range(training.seeds):
        preferences = stages.run(
            "preferences",
            make_preferences,
            task=TASK,
            policy=policy,
            data=data,
            drawing=Drawing(Sampling()),
            seed=seed,
        )
        reference = stages.run("reference", score_reference, policy=policy, preferences=preferences)
        for loss, setting in training.arms:
            folder = stages.run(
                "direct",
                train_direct,
                start=Start(policy, seed=seed),
                data=DirectData(preferences, reference),
                loss=loss,
                setting=setting,
                direct=DirectConfig(epochs=EPOCHS),
                checkpoints=(),
            )
            trained.append(folder)
    return trained


def idle() -> Work:
    """A process that has imported what the others import, and does no work."""
    return lambda: Round(1.0, 1.0)
