"""What `klash doctor` examines: models and tokenised pairs, of an experiment or of one's own."""

import json
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from pydantic import Field
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.pipeline.arms import Pipeline
from benchmarks.pipeline.experiment import Experiment, experiment_file, load_experiment
from benchmarks.pipeline.places import quiet_libraries, set_up_process, stage_context
from benchmarks.pipeline.plan import plan_of, progress
from shared.config import Config, InputError, load
from shared.data.pairs import Pair, read_pairs
from shared.generation.engine import Sampling
from shared.stages import Runner, Stages

Messages = list[dict[str, str]]


class DoctorConfig(Config):
    """Models and data to examine; paths are relative to the file that names them.

    `data` holds one JSON object a line: `prompt`, `chosen`, `rejected`, all texts or all lists of
    chat messages. `reference` is the frozen model of DPO and PPO where it is not `model` itself;
    `adapter` a LoRA that was trained on `model`. Without `max_length` (prompt and completion
    together) the model's own limit counts; without `max_new_tokens` a completion may be that long.
    """

    model: Path
    data: Path
    reward_model: Path | None = None
    reference: Path | None = None
    adapter: Path | None = None
    temperature: float = Field(default=1.0, gt=0)
    max_length: int | None = Field(default=None, gt=1)
    max_new_tokens: int | None = Field(default=None, gt=0)


class Row(NamedTuple):
    """One line of a data file: `messages` of the prompt and of both completions, if it is a chat.

    Texts are as the model reads them: of a chat, what the template makes of it.
    """

    prompt: str
    chosen: str
    rejected: str
    messages: tuple[Messages, Messages, Messages] | None = None


class Patient(NamedTuple):
    """Everything that is examined. `rows` line up with `pairs`; sampled pairs have none."""

    policy: Path
    tokenizer: PreTrainedTokenizerBase
    pairs: list[Pair]
    rows: list[Row]
    sampling: Sampling
    cap: int | None = None  # tokens at which the completions in `pairs` were cut, if sampled
    max_length: int | None = None
    max_new_tokens: int | None = None
    reward_model: Path | None = None
    reference: Path | None = None
    adapter: Path | None = None


def admit(file: str, runs: Path, overrides: Sequence[str], quick: bool) -> Patient:
    """Read `file`, an experiment or a `DoctorConfig`; an experiment's first stages are run."""
    path = experiment_file(file)
    raw: dict[str, Any] = {}
    with suppress(OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):  # `load` tells of these
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    if "arms" in raw:
        return of_experiment(load_experiment(file, overrides, quick), runs)
    quiet_libraries()
    return of_files(load(DoctorConfig, path, overrides), path.parent)


def of_experiment(experiment: Experiment, runs: Path) -> Patient:
    """SFT model, pairs and reward model of an experiment's first seed; made if not there yet."""

    def prepare(runner: Runner) -> tuple[Path, Path, Path]:
        pipeline, seed = Pipeline(experiment, runner), experiment.seeds[0]
        start = pipeline.prepare_sft()
        preferences = pipeline.prepare_preferences(start.sft, seed)
        return start.sft, preferences, pipeline.prepare_reward(start, preferences, seed)

    set_up_process(experiment.threads)
    plan = plan_of(runs / ".stages", stage_context(), prepare)
    with progress(plan) as say:
        sft, preferences, reward = prepare(Stages(plan.root, say, plan.context))
    return Patient(
        policy=sft,
        tokenizer=AutoTokenizer.from_pretrained(sft),
        pairs=read_pairs(preferences / "train.jsonl"),
        rows=[],
        sampling=experiment.sampling,
        cap=experiment.sampling.max_new_tokens,
        reward_model=reward,
    )


def of_files(config: DoctorConfig, beside: Path) -> Patient:
    """One's own models and data."""
    folder = beside / config.model
    tokenizer = any_tokenizer(folder)
    rows = read_rows(beside / config.data, tokenizer)
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
        pairs=[encode(tokenizer, row, number) for number, row in enumerate(rows, 1)],
        rows=rows,
        sampling=sampling,
        max_length=config.max_length,
        max_new_tokens=config.max_new_tokens,
        **others,
    )


def any_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, whatever its special tokens are: these are examined."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no model here (config.json is missing)")
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
        raise InputError(f"{folder}: no tokenizer here; save it with tokenizer.save_pretrained")
    with readable(folder):
        return AutoTokenizer.from_pretrained(folder)


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """What transformers cannot load is the user's folder, not our fault."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: transformers cannot load it: {error}") from error


def read_rows(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Rows of a JSON lines file; an InputError names the line that is not one."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read it: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(f"{path}: no rows; one JSON object a line is expected")
    rows = [read_row(line, f"{path}, line {number}", tokenizer) for number, line in numbered]
    if len({row.messages is None for row in rows}) > 1:
        raise InputError(f"{path}: some rows are texts and some are chats; make them one of both")
    return rows


def read_row(line: str, where: str, tokenizer: PreTrainedTokenizerBase) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: not an object with `prompt`, `chosen` and `rejected`")
    if missing := sorted({"prompt", "chosen", "rejected"} - row.keys()):
        raise InputError(f"{where}: `{missing[0]}` is missing (found {', '.join(sorted(row))})")
    sides = [row["prompt"], row["chosen"], row["rejected"]]
    if all(isinstance(side, str) for side in sides):
        return Row(*sides)
    if not all(is_chat(side) for side in sides):
        raise InputError(
            f"{where}: `prompt`, `chosen` and `rejected` must be three texts, or three lists of "
            "messages {role, content}"
        )
    if tokenizer.chat_template is None:
        raise InputError(
            f"{where}: chat messages, but the model's tokenizer has no chat template; set "
            "tokenizer.chat_template and save it, or give texts"
        )
    try:
        return read_chat(tokenizer, *sides)
    except TemplateError as error:
        raise InputError(f"{where}: the chat template refuses it: {error}") from error


def is_chat(side: Any) -> bool:
    """Whether `side` is a list of messages with their texts."""
    return (
        isinstance(side, list)
        and bool(side)
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in side
        )
    )


def read_chat(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, chosen: Messages, rejected: Messages
) -> Row:
    """What the chat template makes of the row; completions may repeat the prompt's messages."""
    chosen, rejected = (
        side[len(prompt) :] if side[: len(prompt)] == prompt else side
        for side in (chosen, rejected)
    )
    before = render(tokenizer, prompt, open_answer=True)
    texts = [
        whole.removeprefix(before)
        if (whole := render(tokenizer, prompt + answer)).startswith(before)
        else "".join(message["content"] for message in answer) + str(tokenizer.eos_token or "")
        for answer in (chosen, rejected)
    ]
    return Row(before, *texts, messages=(prompt, chosen, rejected))


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, open_answer: bool = False
) -> str:
    """The text of a chat; `open_answer` ends it where the policy's answer begins."""
    return tokenizer.apply_chat_template(  # pyright: ignore[reportReturnType]
        messages, tokenize=False, add_generation_prompt=open_answer
    )


def encode(tokenizer: PreTrainedTokenizerBase, row: Row, number: int) -> Pair:
    """Token ids of a row. A text gets its EOS here; of a chat, what follows the last EOS goes.

    Prompt and completion are encoded apart, so that the policy goes on from the prompt's tokens.
    """
    chat, eos = row.messages is not None, token_id(tokenizer, "eos_token_id")
    prompt = tokenizer(row.prompt, add_special_tokens=not chat).input_ids
    sides = [
        tokenizer(side, add_special_tokens=False).input_ids for side in (row.chosen, row.rejected)
    ]
    if chat:
        sides = [up_to_last(ids, eos) for ids in sides]
    elif eos is not None:
        sides = [[*ids, eos] if ids else [] for ids in sides]
    return Pair(f"row {number}", row.prompt, prompt, *sides, chosen_gold=0.0, rejected_gold=0.0)


def token_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """The id of a special token, None where the tokenizer has none."""
    value = getattr(tokenizer, name)
    return value if isinstance(value, int) else None


def up_to_last(ids: list[int], eos: int | None) -> list[int]:
    """Templates end a turn with EOS and a line break; the policy stops at EOS."""
    if eos is None or eos not in ids:
        return ids
    return ids[: len(ids) - ids[::-1].index(eos)]
