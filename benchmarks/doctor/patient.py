"""What `klash doctor` examines: models and tokenised pairs, of an experiment or of one's own."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.pipeline.arms import Pipeline
from benchmarks.pipeline.experiment import Experiment
from benchmarks.pipeline.loading import experiment_file, load_experiment
from benchmarks.pipeline.places import quiet_libraries, set_up_process, stage_context
from benchmarks.pipeline.plan import plan_of
from benchmarks.pipeline.progress import progress
from shared.config import Config, InputError, load, read_toml
from shared.data.cleaning import Report
from shared.data.examples import Example, read_examples
from shared.data.pairs import Labelled, Pair, read_training
from shared.data.rows import DataConfig
from shared.generation.engine import Sampling
from shared.models.folders import listed_ends
from shared.models.opening import open_tokenizer
from shared.stages import Runner, Stages


class DoctorConfig(Config):
    """Models and data to examine; paths are relative to the file that names them."""

    model: Path
    """The policy, a transformers folder."""
    data: str | tuple[str, ...]
    """Preferences: files, folders or datasets of the hub, in any format that `klash data` reads."""
    reading: DataConfig = DataConfig()
    """How these are read."""
    reward_model: Path | None = None
    """The reward model, a transformers folder with one label."""
    reference: Path | None = None
    """The frozen model of DPO and PPO, where it is not `model` itself."""
    adapter: Path | None = None
    """A LoRA adapter that was trained on `model`."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature that the policy samples at."""
    max_length: int | None = Field(default=None, gt=1)
    """Most tokens of prompt and completion together; by default the model's own limit."""
    max_new_tokens: int | None = Field(default=None, gt=0)
    """Most tokens of a completion; by default it may be as long as `max_length` allows."""


class Patient(NamedTuple):
    """Everything that is examined. `examples` line up with `pairs`; sampled pairs have none.

    The pairs of answers with a label, or alone, hold the answer on both sides.
    """

    policy: Path
    tokenizer: PreTrainedTokenizerBase
    pairs: list[Pair]
    examples: list[Example]
    sampling: Sampling
    report: Report | None = None  # what became of the rows of a file
    labels: Sequence[bool] = ()  # of an experiment's answers with a label: which are desirable
    ends: frozenset[int] = frozenset()  # tokens that end an answer, beside EOS
    cap: int | None = None  # tokens at which the completions in `pairs` were cut, if sampled
    max_length: int | None = None
    max_new_tokens: int | None = None
    reward_model: Path | None = None
    reference: Path | None = None
    adapter: Path | None = None

    @property
    def compares(self) -> bool:
        """Whether `pairs` hold two answers each."""
        return not self.labels and (self.report is None or self.report.kind == "pairs")

    @property
    def all_ends(self) -> frozenset[int]:
        """Tokens that end an answer, EOS among them."""
        eos = token_id(self.tokenizer, "eos_token_id")
        return self.ends | (frozenset() if eos is None else {eos})


def admit(file: str, runs: Path, overrides: Sequence[str], quick: bool) -> Patient:
    """Read `file`, an experiment or a `DoctorConfig`; an experiment's first stages are run."""
    path = experiment_file(file)
    raw: dict[str, Any] = {}
    with suppress(InputError):  # `load` tells of it
        raw = read_toml(path)
    if {"arms", "task"} & set(raw):
        return of_experiment(load_experiment(file, overrides, quick), runs)
    quiet_libraries()
    return of_files(load(DoctorConfig, path, overrides), path.parent)


def of_experiment(experiment: Experiment, runs: Path) -> Patient:
    """SFT model, pairs, or answers with a label, and the reward model, if there is one, of an
    experiment's first seed; made if not there yet.
    """

    def prepare(runner: Runner) -> tuple[Path, Path, Path | None]:
        pipeline, seed = Pipeline(experiment, runner), experiment.seeds[0]
        start = pipeline.prepare_sft()
        preferences, reward = pipeline.prepare_preferences(start, seed), None
        if experiment.has_reward_model:
            reward = pipeline.prepare_reward(start, preferences, seed)
        return start.sft, preferences, reward

    set_up_process(experiment.threads, experiment.save_minutes)
    plan = plan_of(runs / ".stages", stage_context(), prepare)
    with progress(plan.root, plan.labels) as say:
        sft, preferences, reward = prepare(Stages(plan.root, say, plan.context))
    found = read_training(preferences / "train.jsonl")
    return Patient(
        policy=sft,
        tokenizer=AutoTokenizer.from_pretrained(sft),
        pairs=[as_pair(row) for row in found],
        examples=[],
        labels=[row.desirable for row in found if isinstance(row, Labelled)],
        sampling=experiment.sampling,
        cap=experiment.sampling.max_new_tokens,
        reward_model=reward,
    )


def of_files(config: DoctorConfig, beside: Path) -> Patient:
    """One's own models and data."""
    folder = beside / config.model
    tokenizer, ends = open_tokenizer(folder), listed_ends(folder)
    sources = [config.data] if isinstance(config.data, str) else config.data
    examples, report = read_examples(sources, beside, config.reading, tokenizer, ends)
    sampling = Sampling(temperature=config.temperature)
    if config.max_new_tokens is not None:
        sampling = sampling.model_copy(update={"max_new_tokens": config.max_new_tokens})
    others = {
        name: beside / path
        for name in ("reward_model", "reference", "adapter")
        if (path := getattr(config, name)) is not None
    }
    return Patient(
        policy=folder,
        tokenizer=tokenizer,
        pairs=[pair_of(example) for example in examples],
        examples=examples,
        sampling=sampling,
        report=report,
        ends=ends,
        cap=config.reading.max_completion_tokens if config.reading.over_long == "cut" else None,
        max_length=config.max_length,
        max_new_tokens=config.max_new_tokens,
        **others,
    )


def token_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """The id of a special token, None where the tokenizer has none."""
    value = getattr(tokenizer, name)
    return value if isinstance(value, int) else None


def as_pair(row: Pair | Labelled) -> Pair:
    """A pair as it is; an answer with a label is both sides of one."""
    if isinstance(row, Pair):
        return row
    return Pair(row.id, row.prompt, row.prompt_ids, row.completion_ids, row.completion_ids)


def pair_of(example: Example) -> Pair:
    """An example as a pair; an answer alone is both of its sides."""
    rejected = example.rejected_ids
    return Pair(
        example.where,
        example.prompt,
        example.prompt_ids,
        example.chosen_ids,
        example.chosen_ids if rejected is None else rejected,
    )
