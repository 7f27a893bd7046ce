"""What a stage costs: seconds by phase, tokens, FLOPs, peak memory, models held at once."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shared.packing import distinct_tokens, packs
from shared.sequences import Sequences

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy", "scipy")


class Meter:
    """Counts as the work goes on; `summary()` is what a stage's manifest keeps.

    FLOPs count non-padding tokens and unmasked attention: a forward pass of n tokens is
    2 n parameters + 2 n^2 hidden layers, the output head at completion tokens only; a backward
    pass twice that, less the gradients of matrices that do not train. For a sum over rows.
    """

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.train_tokens = 0
        self.generated_tokens = 0
        self.flops = 0.0
        self.models_held = 1
        reset_peak_memory()
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    def forward(
        self,
        model: PreTrainedModel,
        batch: Sequences,
        backward: bool = False,
        *,
        logits: bool = True,
    ) -> None:
        """Counts a pass over `batch`; with `backward` also its gradient and the trained tokens.

        A prompt that a packed pass computes once for several rows is counted once; without
        `logits` a policy's output head is not used.
        """
        lengths = batch.attention.sum(1).tolist()
        tokens = distinct_tokens(batch) if packs(model) else sum(lengths)
        predicted = int(batch.mask.sum()) if logits else 0
        flops = forward_flops(model, lengths, tokens, predicted)
        self.flops += flops
        if backward:
            sizes = matrices(model)
            frozen = tokens * sizes.frozen_trunk + predicted * sizes.frozen_head
            self.flops += 2 * flops - 2.0 * frozen
            self.train_tokens += sum(lengths)

    def generation(
        self, model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]
    ) -> None:
        """Counts sampled completions (token ids); a prompt is computed once for all of its own."""
        generated = sum(map(len, completions))
        self.generated_tokens += generated
        lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
        tokens = distinct_prompt_tokens(prompts) + generated
        self.flops += forward_flops(model, lengths, tokens, generated)

    def state(self) -> dict[str, Any]:
        """What `restore` goes on from, in another process too."""
        return {**vars(self), "_start": time.perf_counter() - self._start}

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _start=time.perf_counter() - state["_start"])

    def summary(self) -> dict[str, float | int | dict[str, float]]:
        return {
            "wall_s": time.perf_counter() - self._start,
            "train_tokens": self.train_tokens,
            "generated_tokens": self.generated_tokens,
            "flops": self.flops,
            "peak_memory_bytes": peak_memory_bytes(),
            "models_held": self.models_held,
            "phases": dict(self.phases),
        }


def forward_flops(
    model: PreTrainedModel,
    lengths: list[int],
    tokens: int | None = None,
    predicted: int | None = None,
) -> float:
    """FLOPs of a forward pass over rows of these lengths.

    `tokens`: how many go through the matrices, if rows share some; `predicted`: for how many the
    output head makes logits, if not for all.
    """
    config, sizes = model.config.get_text_config(), matrices(model)
    causal = config.num_hidden_layers * config.hidden_size
    through = sum(lengths) if tokens is None else tokens
    at_head = through if predicted is None else predicted
    products = through * sizes.trunk + at_head * sizes.head
    return 2.0 * products + sum(2.0 * n * n * causal for n in lengths)


def distinct_prompt_tokens(prompts: list[list[int]]) -> int:
    return sum(map(len, set(map(tuple, prompts))))


class Matrices(NamedTuple):
    """Parameters that a token is multiplied with, in the output head and below; which are frozen.

    Embeddings that are tied to the head count as head.
    """

    trunk: int
    head: int
    frozen_trunk: int
    frozen_head: int


_matrices: WeakKeyDictionary[nn.Module, Matrices] = WeakKeyDictionary()


def matrices(model: PreTrainedModel) -> Matrices:
    """Counted once a model."""
    if model not in _matrices:
        head = model.get_output_embeddings()
        sizes = [0, 0, 0, 0]
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                part, weight = module is head, module.weight
                sizes[part] += weight.numel()  # pyright: ignore
                sizes[2 + part] += 0 if weight.requires_grad else weight.numel()  # pyright: ignore
        _matrices[model] = Matrices(*sizes)
    return _matrices[model]


def matmul_rate(seconds: float = 0.5, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a plain matrix product on the CPU, measured now: what `mfu` is a share of."""
    a = torch.randn(1024, 1024, dtype=dtype)
    torch.mm(a, a)
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        torch.mm(a, a)
        count += 1
    return 2 * 1024**3 * count / spent


def versions() -> dict[str, str]:
    """Of the libraries that results depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def environment(rate: float) -> dict[str, Any]:
    """Versions and machine; the one part of the results that may differ between equal runs."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        **versions(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "matmul_flops_per_s": rate,
    }


def peak_memory_bytes() -> int:
    """Most memory held since the last Meter began: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak_memory() -> None:
    """`peak_memory_bytes` forgets what was held before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access(clear := Path("/proc/self/clear_refs"), os.W_OK):
        clear.write_text("5")  # Linux: start VmHWM anew
