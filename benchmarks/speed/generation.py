"""Sampling: vLLM, as we call it, against transformers' `generate`."""

from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.speed.sides import Choice, Side, Speed, compare_rates
from benchmarks.speed.smollm2 import convert
from shared.generation.engine import Sampling
from shared.generation.vllm import VLLMEngine
from shared.models.load import SpecialIds, load_policy, load_tokenizer, special_ids


def speed_generation(choice: Choice) -> list[Speed]:
    """vLLM, as we call it, against transformers' `generate`, bfloat16, SmolLM2-135M.

    `64 x 64`: 64 prompts, all completions 64 tokens long. `mixed`: 64 prompts, completions end by
    themselves, 96 tokens at most. transformers runs at the best of three batch sizes, vLLM on all.
    """
    shapes = [s for s in ("64 x 64", "mixed") if choice.takes("smollm2-135m", "bfloat16", s)]
    if not shapes:
        return []
    folder = choice.runs / "speed" / "smollm2-135m"
    convert(folder)
    tokenizer, prompts = load_tokenizer(folder), chat_prompts(folder, 64)
    ids = special_ids(tokenizer)
    pad, eos = ids.pad, ids.eos
    engine = VLLMEngine(
        load_policy(folder), SpecialIds(pad, eos), folder, dtype="bfloat16", tolerance=0.5
    )
    engine.sync()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    found = []
    for shape in shapes:
        tokens, end = (64, pad) if shape == "64 x 64" else (96, eos)
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
        rates = compare_rates(ours, sides[best], choice.rounds)
        found.append(
            Speed(
                work="generation",
                model="smollm2-135m",
                dtype="bfloat16",
                shape=shape,
                unit="tokens/s",
                ours=rates.ours,
                peer=rates.peer,
                peer_name=f"transformers {version('transformers')} generate",
                ratio=rates.ratio,
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
    questions = (
        "In one word: what is the capital of country number {n} in the alphabet?",
        "Tell me a story about {n} foxes and a hen.",
        "What is {n} plus {n}?",
        "Write a poem about the number {n}. It should have a beginning, a middle and an end, and "
        "each of its lines should be about something that one can see from a window.",
    )
    chats = [
        [{"role": "user", "content": questions[n % len(questions)].format(n=n + 2)}]
        for n in range(count)
    ]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in chats
    ]
