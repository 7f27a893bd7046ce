"""Ours beside a peer's: the same work, in turn, in one run; ratios, since seconds do not travel.

    klash speed generation

Each side runs once unmeasured and then in rounds, A B A B, so that a machine that slows down slows
both. The interval of the ratio is Student's t over the rounds' log ratios.
"""

import math
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from time import perf_counter

import torch
from pydantic import Field
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.results import Estimate
from benchmarks.smollm2 import convert
from benchmarks.statistics import seed_interval
from shared.config import Config, InputError
from shared.generation.engine import Sampling
from shared.generation.vllm import VLLMEngine
from shared.models import SpecialIds, load_policy, load_tokenizer, special_ids
from shared.stages import output_folder, write_json

Side = Callable[[], float]  # does the work once, returns units a second


class Speed(Config):
    """One comparison. `ratio`: ours / peer. Null: not measured, or of no meaning for this work."""

    work: str
    model: str
    dtype: str
    shape: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    ratio: Estimate
    loss_difference: float | None = None
    memory_ratio: float | None = None
    mfu: float | None = None
    setting: dict[str, float] = Field(default_factory=dict)


def side_by_side(ours: Side, peer: Side, rounds: int) -> tuple[float, float, Estimate]:
    """(ours, peer, ours / peer): mean rates, and the ratio's geometric mean over the rounds."""
    ours()
    peer()
    pairs = [(ours(), peer()) for _ in range(rounds)]
    logs = seed_interval([math.log(a / b) for a, b in pairs])
    low, middle, high = (
        None if x is None else math.exp(x) for x in (logs.low, logs.mean, logs.high)
    )
    ratio = Estimate(mean=middle, low=low, high=high, per_seed=[a / b for a, b in pairs])
    return mean(a for a, _ in pairs), mean(b for _, b in pairs), ratio


def speed_generation(runs: Path, rounds: int) -> list[Speed]:
    """vLLM, as we call it, beside transformers' `generate`, bfloat16, SmolLM2-135M.

    `64 x 64`: 64 prompts, all completions 64 tokens long. `mixed`: 64 prompts, completions end by
    themselves, 96 tokens at most. transformers runs at the best of three batch sizes, vLLM on all.
    """
    folder = runs / "speed" / "smollm2-135m"
    convert(folder)
    tokenizer, prompts = load_tokenizer(folder), chat_prompts(folder, 64)
    pad, eos = special_ids(tokenizer)
    engine = VLLMEngine(
        load_policy(folder), SpecialIds(pad, eos), folder, dtype="bfloat16", tolerance=0.5
    )
    engine.sync()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    found = []
    for shape, tokens, end in (("64 x 64", 64, pad), ("mixed", 96, eos)):
        sampling = Sampling(max_new_tokens=tokens)
        engine.ids = SpecialIds(pad, end)

        def ours(sampling: Sampling = sampling) -> float:
            start = perf_counter()
            drawn = engine.generate(prompts, sampling)
            return sum(map(len, drawn.ids)) / (perf_counter() - start)

        sides = {
            size: generate_with(plain, prompts, tokens, pad, end, size) for size in (16, 32, 64)
        }
        best = max(sides, key=lambda size: sides[size]())
        mine, theirs, ratio = side_by_side(ours, sides[best], rounds)
        found.append(
            Speed(
                work="generation",
                model="smollm2-135m",
                dtype="bfloat16",
                shape=shape,
                unit="tokens/s",
                ours=mine,
                peer=theirs,
                peer_name=f"transformers {version('transformers')} generate",
                ratio=ratio,
                setting={"prompts": len(prompts), "max_new_tokens": tokens, "peer_batch": best},
            )
        )
    return found


def generate_with(
    model: PreTrainedModel, prompts: list[list[int]], tokens: int, pad: int, end: int, batch: int
) -> Side:
    """transformers' `generate` on batches of prompts padded on the left; counts real tokens."""

    def side() -> float:
        start, count = perf_counter(), 0
        for first in range(0, len(prompts), batch):
            rows = prompts[first : first + batch]
            width = max(map(len, rows))
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            output = model.generate(  # pyright: ignore[reportCallIssue]
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=end,
                pad_token_id=pad,
            )
            for row in output[:, width:].tolist():
                count += row.index(end) + 1 if end in row else len(row)
        return count / (perf_counter() - start)

    return side


def chat_prompts(folder: Path, count: int) -> list[list[int]]:
    """Questions of several lengths in the model's chat format, some with short answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = (
        "In one word: what is the capital of country number {n} in the alphabet?",
        "Tell me a story about {n} foxes and a hen.",
        "What is {n} plus {n}?",
        "Write a poem about the number {n}. It should have a beginning, a middle and an end, and "
        "each of its lines should be about something that one can see from a window.",
    )
    chats = [
        [{"role": "user", "content": asked[n % len(asked)].format(n=n + 2)}] for n in range(count)
    ]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in chats
    ]


WORKS: dict[str, Callable[[Path, int], list[Speed]]] = {"generation": speed_generation}


def measure(works: Sequence[str], runs: Path, rounds: int) -> list[Speed]:
    """Run the comparisons named, or all; writes `runs/speed/speed.json` and `speed.md`."""
    for work in works:
        if work not in WORKS:
            raise InputError(f"`klash speed` knows {sorted(WORKS)}, not {work!r}")
    out = output_folder(runs / "speed")
    found = [row for work in works or WORKS for row in WORKS[work](runs, rounds)]
    write_json(out / "speed.json", [row.model_dump(mode="json") for row in found])
    (out / "speed.md").write_text(table(found), encoding="utf-8")
    return found


def table(rows: Sequence[Speed]) -> str:
    """Markdown: ratios with their 95 % intervals over rounds."""
    machine = f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    lines = [
        f"Ours / peer, each in turn in one run; 95 % over rounds ({machine}).",
        "",
        "| work | model | dtype | shape | peer | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row.ratio
        limits = f" [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio.low and ratio.high else ""
        what = f"| {row.work} | {row.model} | {row.dtype} | {row.shape} | {row.peer_name} "
        lines.append(f"{what}| {ratio.mean:.2f}{limits} |")
    return "\n".join(lines) + "\n"
