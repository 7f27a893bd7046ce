"""One command for a machine with a GPU: does vLLM agree, stay in step and sleep, and how fast?

    python -m benchmarks.speed.gpu_check --out gpu_check.json

Under ten minutes, models from scratch or from a package: parity with the trainer in both
precisions, sync after training steps, what sleeping gives back, sampling and one PPO update with
either engine. Exit code 1 if a check fails; the JSON holds every number.
"""

import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import tyro
from transformers import PreTrainedModel

from benchmarks.entry import ExitCodes
from benchmarks.pipeline.places import quiet_libraries
from benchmarks.speed.generation import chat_prompts
from benchmarks.speed.smollm2 import convert
from rlhf.ppo import PPOConfig, train_ppo
from shared.config import InputError
from shared.generation.engine import Engine, Sampling
from shared.generation.hf import HFEngine
from shared.generation.start import Drawing, GenerationConfig, make_engine
from shared.generation.sync import largest_difference, probe
from shared.generation.vllm import VLLMEngine
from shared.models.device import on_gpu
from shared.models.load import (
    Start,
    load_policy,
    load_tokenizer,
    new_scalar_model,
    save,
    special_ids,
)
from shared.models.logprobs import token_logprobs
from shared.models.sequences import collate
from shared.stages import output_folder, read_json, write_json
from shared.tasks.registry import TaskConfig
from shared.training.fit import OptimizerConfig

PARITY_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}


def check_gpu(out: Path = Path("gpu_check.json")) -> bool:
    """Run all checks on the GPU; True if they hold.

    Args:
        out: the JSON file with every number.
    """
    if not on_gpu():
        raise InputError("no CUDA device here; this check is for a machine with a GPU")
    output_folder(out.parent)
    quiet_libraries()
    folder = Path(tempfile.mkdtemp(prefix="klash-gpu-")) / "smollm2-135m"
    convert(folder)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "vllm": vllm_version()}
    for dtype in PARITY_TOLERANCE:
        found[dtype] = check_engine(folder, dtype)
        print(dtype, found[dtype], flush=True)
    found["ppo"] = {engine: time_ppo(folder, engine) for engine in ("transformers", "vllm")}
    found["holds"] = all(found[dtype]["holds"] for dtype in PARITY_TOLERANCE)
    write_json(out, found)
    print(f"{'all checks hold' if found['holds'] else 'a check failed'}: {out}")
    return found["holds"]


def check_engine(folder: Path, dtype: str) -> dict[str, Any]:
    """Parity before and after training steps, a stale engine noticed, sleep, and the rates."""
    model = load_policy(folder).to("cuda").eval()  # pyright: ignore[reportArgumentType]
    ids, prompts = special_ids(load_tokenizer(folder)), chat_prompts(folder, 256)
    generation = GenerationConfig(engine="vllm", dtype=dtype)  # pyright: ignore[reportArgumentType]
    start = perf_counter()
    engine = make_engine(generation, model, ids, folder)
    assert isinstance(engine, VLLMEngine)
    few = Sampling(max_new_tokens=32)
    numbers: dict[str, Any] = {"start_s": perf_counter() - start}
    numbers["parity"] = largest_difference(engine, prompts[:32], few, ids.pad)
    train_steps(model, prompts[:8])
    numbers["stale"] = probe(engine, ids, 1.0)
    start = perf_counter()
    numbers["synced"] = engine.sync()
    numbers["sync_s"] = perf_counter() - start
    numbers["parity_after"] = largest_difference(engine, prompts[:32], few, ids.pad)
    asleep = torch.cuda.mem_get_info()[0]
    engine.llm.wake_up()
    numbers["sleep_frees_bytes"] = asleep - torch.cuda.mem_get_info()[0]
    engine.llm.sleep(level=1)
    numbers["after_sleep"] = largest_difference(engine, prompts[:32], few, ids.pad)
    sampling = Sampling(max_new_tokens=128)
    numbers["vllm_tokens_per_s"] = rate(engine, prompts, sampling)
    numbers["transformers_tokens_per_s"] = rate(HFEngine(model, ids), prompts, sampling)
    largest = max(numbers[key] for key in ("parity", "synced", "parity_after", "after_sleep"))
    tolerance = PARITY_TOLERANCE[dtype]
    notices_stale = dtype != "float32" or numbers["stale"] > tolerance  # bfloat16 is too coarse
    frees_memory = numbers["sleep_frees_bytes"] > 0
    numbers["holds"] = largest <= tolerance and notices_stale and frees_memory
    return numbers


def train_steps(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    """Twenty steps that move every weight."""
    batch = collate(prompts, [p[::-1] for p in prompts], 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(20):
        (-token_logprobs(model, batch).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def rate(engine: Engine, prompts: list[list[int]], sampling: Sampling) -> float:
    """Sampled tokens a second, the second time."""
    engine.generate(prompts, sampling)
    start = perf_counter()
    drawn = engine.generate(prompts, sampling)
    return sum(map(len, drawn.ids)) / (perf_counter() - start)


def time_ppo(folder: Path, engine: str) -> dict[str, float]:
    """Seconds of each phase of four PPO updates of 64 episodes."""
    work = Path(tempfile.mkdtemp(prefix="klash-gpu-ppo-"))
    save(new_scalar_model(folder, seed=0), load_tokenizer(folder), work / "reward")
    rates = OptimizerConfig(learning_rate=1e-6, schedule="constant")
    ppo = PPOConfig(episodes=256, rollout_size=64, optimizer=rates, value_learning_rate=1e-6)
    generation = GenerationConfig(engine=engine)  # pyright: ignore[reportArgumentType]
    sampling = Sampling(max_new_tokens=64)
    train_ppo(
        work / "ppo",
        start=Start(folder),
        reward_model=work / "reward",
        task=TaskConfig(),
        ppo=ppo,
        kl_coef=0.05,
        drawing=Drawing(sampling, generation),
        checkpoints=(),
    )
    return read_json(work / "ppo" / "cost.json")["phases"]


def vllm_version() -> str | None:
    try:
        return version("vllm")
    except PackageNotFoundError:
        return None


def main() -> None:
    """Exit codes as `klash`'s."""
    with ExitCodes("gpu_check"):
        sys.exit(0 if tyro.cli(check_gpu, prog="python -m benchmarks.speed.gpu_check") else 1)


if __name__ == "__main__":
    main()
