"""What a stage costs: seconds by phase, tokens, FLOPs, peak memory, models held at once."""

import ctypes
import gc
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shared.models import ops, ranks
from shared.models.device import device, device_name, on_gpu
from shared.models.packing import READ

CPU_MATRIX, GPU_MATRIX = 1024, 8192  # rows of the product that the rate is measured with
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy", "scipy")


class Meter:
    """Counts what this process does from now on, until another one is made; `summary()` is what a
    stage keeps of it. Passes and samples report themselves where they run (`count_pass`).

    FLOPs count non-padding tokens and unmasked attention: a forward pass of n tokens is
    2 n parameters + 2 n^2 hidden layers, where the output head and, packed, the last layer's MLP
    see only the tokens that are read; a backward pass twice that, less the gradients of matrices
    that do not train. For a sum over rows.
    """

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.train_tokens = 0
        self.generated_tokens = 0
        self.flops = 0.0
        self.models_held = 1
        reset_peak_memory()
        self._start = time.perf_counter()
        self._open: dict[str, float] = {}  # phases that go on: since when
        global _counting
        _counting = self

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to phase `name`."""
        self._open[name] = time.perf_counter()
        try:
            yield
        finally:
            finish_queued()
            self.phases[name] = self._so_far()[name]
            del self._open[name]

    def _so_far(self) -> dict[str, float]:
        """Seconds by phase, of those too that go on."""
        now = time.perf_counter()
        going = {n: self.phases.get(n, 0.0) + now - start for n, start in self._open.items()}
        return self.phases | going

    def _backward(self, flops: float, tokens: int, gradient: Tensor) -> None:
        self.flops += flops
        self.train_tokens += tokens

    def state(self) -> dict[str, Any]:
        """What `restore` goes on from, in another process too."""
        now = {"phases": self._so_far(), "_start": time.perf_counter() - self._start}
        kept = {name: value for name, value in vars(self).items() if name != "_open"}
        return {**kept, **self._of_all_ranks(), **now}

    def restore(self, state: dict[str, Any]) -> None:
        if ranks.is_first():  # the others add what they do from now on
            vars(self).update(state, _start=time.perf_counter() - state["_start"])

    def _of_all_ranks(self) -> dict[str, Any]:
        own = [float(self.train_tokens), float(self.generated_tokens), self.flops]
        train, generated, flops = ranks.total(torch.tensor(own, dtype=torch.float64)).tolist()
        return {"train_tokens": int(train), "generated_tokens": int(generated), "flops": flops}

    def summary(self) -> dict[str, float | int | dict[str, float]]:
        """Of all ranks: what they did in all, and the most that one of them held."""
        return {
            "wall_s": time.perf_counter() - self._start,
            **self._of_all_ranks(),
            "peak_memory_bytes": int(ranks.largest(peak_memory_bytes())),
            "models_held": self.models_held,
            "phases": dict(self.phases),
        }


_counting: Meter | None = None


def count_pass(model: PreTrainedModel, work: "Work", output: Tensor) -> None:
    """A forward pass that has run; its gradient counts when it comes, through `output`."""
    meter = _counting
    if meter is None:
        return
    flops = forward_flops(model, work.lengths, work.at)
    meter.flops += flops
    if output.requires_grad:
        frozen = zip(work.at, matrices(model)[1], strict=True)
        backward = 2 * flops - 2.0 * sum(seen * size for seen, size in frozen)
        output.register_hook(partial(meter._backward, backward, work.tokens))


def count_samples(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> None:
    """Completions that were sampled (token ids); what prompts begin with in common counts once."""
    if _counting is None:
        return
    generated = sum(map(len, completions))
    _counting.generated_tokens += generated
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    tokens = distinct_beginnings([list(p) for p in prompts]) + generated
    _counting.flops += forward_flops(model, lengths, At(tokens, tokens, generated))


class At(NamedTuple):
    """Numbers for the parts of a model: tokens that go through them, or parameters of matrices."""

    trunk: int  # all but the others
    last_mlp: int  # of a model that packs
    head: int  # makes logits; tied embeddings count here


class Work(NamedTuple):
    """What one forward pass computes."""

    lengths: list[int]  # tokens of each row, for attention
    at: At
    tokens: int  # of all rows without padding: those it trains on, where it does


def forward_flops(model: PreTrainedModel, lengths: list[int], at: At | None = None) -> float:
    """FLOPs of a forward pass over rows of these lengths; `at`: of fewer tokens than all."""
    config = model.config.get_text_config()
    causal = config.num_hidden_layers * config.hidden_size
    at = at or At(*[sum(lengths)] * 3)
    products = sum(seen * size for seen, size in zip(at, matrices(model)[0], strict=True))
    return 2.0 * products + sum(2.0 * n * n * causal for n in lengths)


def distinct_beginnings(rows: list[list[int]]) -> int:
    """Tokens of `rows`, those that they begin with in common once."""
    shared = map(os.path.commonprefix, pairwise(sorted(rows)))
    return sum(map(len, rows)) - sum(map(len, shared))


_matrices: WeakKeyDictionary[nn.Module, tuple[At, At]] = WeakKeyDictionary()


def matrices(model: PreTrainedModel) -> tuple[At, At]:
    """Parameters that a token is multiplied with, and those of them that are frozen; counted once
    a model."""
    if model not in _matrices:
        found, frozen = [0, 0, 0], [0, 0, 0]
        mlp = {m for top in model.modules() if hasattr(top, READ) for m in top.modules()}
        head = model.get_output_embeddings()
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                part, weight = 2 if module is head else int(module in mlp), module.weight
                found[part] += weight.numel()  # pyright: ignore
                frozen[part] += 0 if weight.requires_grad else weight.numel()  # pyright: ignore
        _matrices[model] = At(*found), At(*frozen)
    return _matrices[model]


def matmul_rate(seconds: float = 0.5, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a plain matrix product on the device, measured now: what `mfu` is a share of.

    Of PyTorch's or of ours (`shared.models.ops`), whichever is faster here.
    """
    here, size = device(), GPU_MATRIX if on_gpu() else CPU_MATRIX
    a = torch.randn(size, size, device=here)
    cast, half = a.to(dtype), dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast(here.type, torch.bfloat16, enabled=half):
        ways = lambda: torch.mm(cast, cast), lambda: ops.linear(a, a, None)
        return 2 * size**3 * max(_per_second(way, seconds / len(ways)) for way in ways)


def _per_second(work: Callable[[], object], seconds: float) -> float:
    work()
    finish_queued()
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        work()
        finish_queued()
        count += 1
    return count / spent


def finish_queued() -> None:
    """Wait for what the GPU, if there is one, has still to do: it works behind Python's back."""
    if on_gpu():
        torch.cuda.synchronize()


def versions() -> dict[str, str]:
    """Of the libraries that results depend on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def environment(rate: float) -> dict[str, Any]:
    """Versions and machine; the one part of the results that may differ between equal runs."""
    return {
        "python": platform.python_version(),
        **versions(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": device_name() if on_gpu() else None,
        "matmul_flops_per_s": rate,
    }


def peak_memory_bytes() -> int:
    """Most memory held since the last Meter began: of the GPU where there is one, else resident."""
    if on_gpu():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@cache
def set_modules_aside() -> None:
    """Once: what modules hold is no garbage, and to look at it takes a fifth of a second a time."""
    gc.freeze()


def reset_peak_memory() -> None:
    """`peak_memory_bytes` forgets what was held before."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    elif os.access(clear := Path("/proc/self/clear_refs"), os.W_OK):
        gc.collect()
        set_modules_aside()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what earlier work freed would count
        clear.write_text("5")  # Linux: start VmHWM anew
