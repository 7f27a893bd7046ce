"""Samples of a policy with their gold scores: labels, scales and the frontier come from them."""

from pathlib import Path
from typing import NamedTuple

from shared.generation.engine import Sampling
from shared.generation.hf import HFEngine
from shared.models import load_policy, load_tokenizer, special_ids
from shared.stages import read_jsonl, write_jsonl
from shared.tasks.registry import TaskConfig, make_task
from shared.tasks.task import Split


class PromptSamples(NamedTuple):
    """One prompt and n completions of it."""

    prompt: str
    prompt_ids: list[int]
    completions: list[list[int]]  # token ids
    gold: list[float]


def draw_samples(
    task: TaskConfig,
    policy: Path,
    split: Split,
    prompts: int,
    per_prompt: int,
    sampling: Sampling,
    seed: int,
    prompt_seed: int,
) -> list[PromptSamples]:
    """`per_prompt` samples of each of `prompts` prompts; `prompt_seed` chooses the prompts."""
    source, tokenizer = make_task(task), load_tokenizer(policy)
    texts = source.prompts(split, prompts, prompt_seed)
    ids = [tokenizer(text).input_ids for text in texts]
    engine = HFEngine(load_policy(policy), special_ids(tokenizer))
    many = [i for i in range(prompts) for _ in range(per_prompt)]
    sampling = sampling.model_copy(update={"seed": seed})
    drawn = engine.generate([ids[i] for i in many], sampling).ids
    decoded = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    gold = source.gold([texts[i] for i in many], decoded).tolist()
    blocks = [slice(i * per_prompt, (i + 1) * per_prompt) for i in range(prompts)]
    return [
        PromptSamples(text, prompt_ids, drawn[block], gold[block])
        for text, prompt_ids, block in zip(texts, ids, blocks, strict=True)
    ]


def sample_reference(
    folder: Path,
    task: TaskConfig,
    policy: Path,
    split: Split,
    prompts: int,
    per_prompt: int,
    sampling: Sampling,
    seed: int,
) -> None:
    """Stage: `samples.jsonl`, one `PromptSamples` a line."""
    rows = draw_samples(task, policy, split, prompts, per_prompt, sampling, seed, seed)
    write_jsonl(folder / "samples.jsonl", [row._asdict() for row in rows])


def read_samples(folder: Path) -> list[PromptSamples]:
    return [PromptSamples(**row) for row in read_jsonl(folder / "samples.jsonl")]
