"""Sampling with vLLM in the trainer's process: one engine a process, its weights kept in step.

vLLM's first start takes seconds to a minute, so a process starts one engine for each architecture
and every policy that it samples from moves in. On a GPU the engine holds a share of the memory and
sleeps while nothing is sampled.
"""

import json
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from shared.config import InputError
from shared.generation.engine import (
    Completions,
    Dtype,
    Sampling,
    StaleEngine,
    in_order,
    require_tokens,
)
from shared.generation.sync import require_fresh
from shared.models import ranks
from shared.models.cost import count_samples
from shared.models.device import on_gpu
from shared.models.load import SpecialIds
from shared.models.lora import plain_weights

WORKER = "shared.generation.worker.SyncWorker"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: weights move without a copy
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads are not vLLM's to pin
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
CPU_BLOCK = 32  # tokens, the fewest there: whole blocks that prompts begin with are read once
INCIDENTAL = ("_name_or_path", "dtype", "transformers_version", "use_cache")
INSTALL = "pip install vllm==0.33.0 on a CUDA machine, `make vllm` for a CPU"


class VLLMEngine:
    """Samples from a copy of `model`'s weights; `sync()` after every change of them.

    Of all objects of this class in a process, the one whose `sync()` came last can sample.
    """

    tenant: ClassVar["weakref.ref[VLLMEngine] | None"] = None

    def __init__(
        self,
        model: PreTrainedModel,
        ids: SpecialIds,
        folder: Path,
        *,
        dtype: Dtype = "float32",
        memory_share: float = 0.3,
        tolerance: float = 1e-3,
        temperature: float = 1.0,
    ):
        """`folder` holds a model of the same architecture; `sync()` before the first sample.

        `tolerance`: nats a token by which the engine may differ from the model after a sync, both
        at `temperature`.
        """
        self.model, self.ids, self.temperature = model, ids, temperature
        self.tolerance, self.exact = tolerance, dtype == "float32"
        self.llm = _start(_architecture(model), str(folder), dtype, memory_share)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Completions:
        """See `Engine.generate`. The same seed, weights and prompts give the same tokens."""
        if self.tenant is None or self.tenant() is not self:
            raise StaleEngine("the engine holds another policy's weights: `sync()` comes first")
        require_tokens(prompts)
        require_room(prompts, sampling, self.llm.model_config.max_model_len)
        from vllm import SamplingParams

        own = ranks.mine(range(len(prompts)))
        requests = sampling_params(len(prompts), sampling, self.ids.ends)
        params = [SamplingParams(**requests[i], detokenize=False) for i in own]
        with _awake(self.llm), torch.random.fork_rng():
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(prompts[i])} for i in own], params, use_tqdm=False
            )
        drawn = [output.outputs[0] for output in outputs]
        count_samples(self.model, [prompts[i] for i in own], [d.token_ids for d in drawn])
        found = {row: _drawn(d) for row, d in zip(own, drawn, strict=True)}
        return in_order(ranks.gathered(found))

    def sync(self) -> float:
        """See `Engine.sync`. StaleEngine if the engine does not come to the model's weights."""
        VLLMEngine.tenant = weakref.ref(self)
        with _awake(self.llm), ranks.whole(self.model), torch.no_grad():
            self.llm.collective_rpc("klash_load", args=(plain_weights(self.model),))
            self.llm.reset_prefix_cache()
        return require_fresh(self, self.ids, self.temperature, self.tolerance)


def _drawn(output: Any) -> tuple[list[int], bool, list[float]]:
    """(token ids, whether it was cut, log-probabilities) of one of vLLM's completions."""
    at = zip(output.token_ids, output.logprobs, strict=True)
    logprobs = [found[token].logprob for token, found in at]
    return list(output.token_ids), output.finish_reason == "length", logprobs


def sampling_params(count: int, sampling: Sampling, ends: frozenset[int]) -> list[dict[str, Any]]:
    """One set of vLLM's sampling parameters for each prompt, each with a seed of its own.

    Only `ends` end a completion, whatever else the model's generation_config says, and nothing
    truncates the distribution.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    seeds = torch.randint(2**31, (count,), generator=generator).tolist()
    common = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": 0,
        "ignore_eos": True,
        "stop_token_ids": sorted(ends),
    }
    return [{**common, "seed": seed} for seed in seeds]


def require_room(prompts: Sequence[Sequence[int]], sampling: Sampling, length: int) -> None:
    """InputError if a prompt and its completion do not fit the model's context."""
    for number, prompt in enumerate(prompts):
        if len(prompt) + sampling.max_new_tokens > length:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens: with {sampling.max_new_tokens} new ones"
                f" that is more than the model's {length}; shorten it or lower "
                "`sampling.max_new_tokens`"
            )


def _architecture(model: PreTrainedModel) -> str:
    """What two models agree in if one engine can hold either."""
    config = model.config.to_dict()
    return json.dumps({key: config[key] for key in sorted(config) if key not in INCIDENTAL})


_running: dict[tuple[str, str, float], Any] = {}  # the one engine of this process


def _start(architecture: str, folder: str, dtype: Dtype, memory_share: float) -> Any:
    """vLLM in this process, for all models of this `architecture`; `folder` is any of them.

    vLLM keeps process-wide state, so that one engine ends before another starts.
    """
    key = architecture, dtype, memory_share
    if key in _running:
        return _running[key]
    for other in list(_running):
        _running.pop(other).llm_engine.engine_core.shutdown()
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    try:
        from vllm import LLM
    except ImportError as error:
        raise InputError(
            f"generation.engine is vllm, which cannot be imported ({error}); {INSTALL}, or "
            "--generation.engine transformers"
        ) from error
    gpu = on_gpu()
    extra: dict[str, Any] = {"gpu_memory_utilization": memory_share, "enable_sleep_mode": True}
    if not gpu:
        extra = {"block_size": CPU_BLOCK}
    with _own_threads_and_seeds():
        try:
            _running[key] = LLM(
                model=folder,
                dtype=dtype,
                enforce_eager=not gpu,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                worker_extension_cls=WORKER,
                **extra,
            )
        except (torch.OutOfMemoryError, ValueError, RuntimeError) as error:
            raise InputError(
                f"vLLM cannot start from {folder}: {error}\n"
                "if it lacks memory, lower `generation.memory_share`"
            ) from error
    return _running[key]


@contextmanager
def _own_threads_and_seeds() -> Iterator[None]:
    """Starting vLLM seeds torch and takes `torch.set_num_threads` away; this undoes both."""
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            torch.set_num_threads = set_threads
            torch.set_num_threads(threads)


@contextmanager
def _awake(llm: Any) -> Iterator[None]:
    """On a GPU, memory is the engine's only in here."""
    if on_gpu() and llm.llm_engine.is_sleeping():
        llm.wake_up()
    try:
        yield
    finally:
        if on_gpu():
            llm.sleep(level=1)
