"""Samples of a policy with their gold scores: labels, scales and the frontier come from them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shared.config import InputError
from shared.data.listing import Listing, list_completions, listed_logps
from shared.data.splits import Split
from shared.generation.engine import Sampling
from shared.generation.start import Drawing, make_engine
from shared.models.load import load_policy, load_tokenizer, special_ids
from shared.seeds import seed_of
from shared.stages import read_json, read_jsonl, write_json, write_jsonl
from shared.tasks.registry import TaskConfig, TaskInput, make_task
from shared.tasks.task import Task


class PromptSamples(NamedTuple):
    """One prompt and n completions of it."""

    prompt: str
    prompt_ids: list[int]
    completions: list[list[int]]  # token ids
    gold: list[float | None]  # None without one


def draw_samples(
    task: TaskInput,
    policy: Path,
    split: Split,
    prompts: int,
    per_prompt: int,
    drawing: Drawing,
    seed: int,
) -> list[PromptSamples]:
    """`per_prompt` samples of each of `prompts` prompts; `seed` is the run's."""
    source = make_task(task)
    sampling = drawing.at(seed=seed_of(seed, f"{split} samples"))
    return answer(source, policy, source.prompts(split, prompts, seed), per_prompt, sampling)


def answer(
    source: Task, policy: Path, texts: list[str], per_prompt: int, drawing: Drawing
) -> list[PromptSamples]:
    """`per_prompt` samples of each prompt, with the seed of `drawing`."""
    tokenizer = load_tokenizer(policy)
    ids = source.encode(tokenizer, texts)
    model, special = load_policy(policy).eval(), special_ids(tokenizer, policy)
    engine = make_engine(drawing.generation, model, special, policy, drawing.sampling.temperature)
    many = [i for i in range(len(texts)) for _ in range(per_prompt)]
    drawn = engine.generate([ids[i] for i in many], drawing.sampling).ids
    decoded = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    gold = null_for_nan(source.gold([texts[i] for i in many], decoded))
    blocks = [slice(i * per_prompt, (i + 1) * per_prompt) for i in range(len(texts))]
    return [
        PromptSamples(text, prompt_ids, drawn[block], gold[block])
        for text, prompt_ids, block in zip(texts, ids, blocks, strict=True)
    ]


def sample_reference(
    folder: Path,
    task: TaskInput,
    policy: Path,
    split: Split,
    prompts: int,
    per_prompt: int,
    drawing: Drawing,
    seed: int,
) -> None:
    """Stage: `samples.jsonl`, one `PromptSamples` a line."""
    rows = draw_samples(task, policy, split, prompts, per_prompt, drawing, seed)
    write_jsonl(folder / "samples.jsonl", [row._asdict() for row in rows])


def list_samples(
    task: TaskConfig, policy: Path, split: Split, sampling: Sampling, seed: int
) -> list[PromptSamples]:
    """Every prompt of a finite task with all of its completions, in the order of `listing_of`."""
    if not task.finite:
        raise InputError(f"task `{task.name}`: its completions cannot be listed")
    source, tokenizer = make_task(task), load_tokenizer(policy)
    texts = source.prompts(split, task.exact.prompts, seed)
    completions = listing_of(policy, sampling).completions
    decoded = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return [
        PromptSamples(
            prompt=text,
            prompt_ids=prompt_ids,
            completions=completions,
            gold=source.gold([text] * len(decoded), decoded).tolist(),
        )
        for text, prompt_ids in zip(texts, source.encode(tokenizer, texts), strict=True)
    ]


def listing_of(policy: Path, sampling: Sampling) -> Listing:
    """All completions that sampling from `policy` can end in."""
    tokenizer = load_tokenizer(policy)
    return list_completions(len(tokenizer), special_ids(tokenizer).eos, sampling.max_new_tokens)


def list_reference(
    folder: Path, task: TaskConfig, policy: Path, sampling: Sampling, seed: int
) -> None:
    """Stage: all completions as `samples.jsonl`, and `log_ref.json`, their log ref, (P, N)."""
    rows = list_samples(task, policy, "test", sampling, seed)
    model, pad_id = load_policy(policy).eval(), special_ids(load_tokenizer(policy)).pad
    with torch.no_grad():
        prompts = [row.prompt_ids for row in rows]
        log_ref = listed_logps(model, prompts, listing_of(policy, sampling), pad_id)
    write_jsonl(folder / "samples.jsonl", [row._asdict() for row in rows])
    write_json(folder / "log_ref.json", log_ref.tolist())


def read_log_ref(folder: Path) -> list[list[float]]:
    """What `list_reference` wrote, (P, N)."""
    return read_json(folder / "log_ref.json")


def null_for_nan(values: NDArray[np.float64]) -> list[float | None]:
    """As JSON has it."""
    return [None if np.isnan(value) else value for value in values.tolist()]


def read_samples(folder: Path) -> list[PromptSamples]:
    return [PromptSamples(**row) for row in read_jsonl(folder / "samples.jsonl")]
