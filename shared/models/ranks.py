"""Several processes, each on a device of its own, that do one stage together: ranks.

`torchrun` and `accelerate launch` start them. All go through the same stages with the same seeds.
Rows of passes without gradients are shared out and what comes of them is gathered, so that every
rank knows all of it; in a step each rank takes its part of the batch. Weights in training are
PyTorch's FSDP2: replicated, or sharded where Accelerate's settings say FSDP. One process is one
rank, and nothing here costs it anything.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from shared.models.device import device, on_gpu
from shared.models.lora import below_lora

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = timedelta(hours=12)  # a rank may wait for what another one does alone
RUN = "run_whole"  # the method of a sharded model in which its weights are whole
_alone = False


def join() -> None:
    """Become one of the ranks that `torchrun` or `accelerate launch` started; else do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    if on_gpu():
        torch.cuda.set_device(device())
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu() else "gloo", timeout=PATIENCE)


def count() -> int:
    """How many ranks work together here and now."""
    return 1 if _alone or not dist.is_initialized() else dist.get_world_size()


def number() -> int:
    """This process's among them, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process decides what is there, writes and speaks: rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """What runs in here is this process's own work: nothing is shared out, nobody waits."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def mine(rows: Sequence[T]) -> list[T]:
    """This rank's part of what is shared out: all of it for one rank, maybe none for several."""
    return list(rows[number() :: count()])


def part(batch: Sequence[T]) -> tuple[list[T], float]:
    """This rank's part of a batch, and how much each item counts: 1.

    Where there are fewer items than ranks, the first, which counts 0: all ranks make their passes.
    """
    own = mine(batch)
    return (own, 1.0) if own else ([batch[0]], 0.0)


def evenly(items: Sequence[T]) -> Iterator[tuple[T, bool]]:
    """(item, whether it counts), as often on every rank: who has fewer goes over the first again.

    For passes through sharded weights, which all ranks make at the same time.
    """
    for place in range(int(largest(len(items)))):
        yield items[place if place < len(items) else 0], place < len(items)


def total(numbers: Tensor) -> Tensor:
    """The sum over all ranks."""
    if count() > 1:
        numbers = numbers.contiguous().clone()
        dist.all_reduce(numbers)
    return numbers


def largest(number: float) -> float:
    """Of all ranks."""
    if count() == 1:
        return number
    found = torch.tensor(float(number), dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def gathered(found: Mapping[int, T]) -> dict[int, T]:
    """What each rank found, by row, put together."""
    if count() == 1:
        return dict(found)
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, dict(found))
    return {row: value for one in parts for row, value in one.items()}


def from_first(value: T) -> T:
    """Rank 0's `value`, a plain one, on every rank."""
    if count() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, 0)
    return held[0]


def tensors_from_first(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Rank 0's named tensors on every rank's CPU, one at a time; the others give none."""
    if count() == 1:
        yield from tensors
        return
    here = iter(tensors)
    while True:
        name, tensor = next(here, ("", None)) if is_first() else ("", None)
        kind = None if tensor is None else (tensor.shape, tensor.dtype)
        name, kind = from_first((name, kind))
        if kind is None:
            return
        tensor = torch.empty(kind[0], dtype=kind[1]) if tensor is None else tensor.contiguous()
        dist.broadcast(tensor, 0)
        yield name, tensor


def wait() -> None:
    """Until all ranks are here."""
    if count() > 1:
        dist.barrier()


# --- weights in training -------------------------------------------------------------------------


def spread(model: nn.Module) -> nn.Module:
    """`model` with its weights in step on all ranks: FSDP2 sums their gradients.

    Sharded over all ranks where Accelerate's settings ask for FSDP, else whole on each.
    """
    if count() == 1:
        return model
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    sizes = (1, count()) if sharded else (count(), 1)
    mesh = init_device_mesh(device().type, sizes, mesh_dim_names=("replicate", "shard"))
    blocks = set(getattr(below_lora(model), "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    setattr(model, RUN, MethodType(_run, model))
    register_fsdp_forward_method(model, RUN)
    run(lambda model: None, model)  # from here on blocks know that they are not the root
    model.reshard()  # pyright: ignore[reportCallIssue] # what an optimiser takes are the shards
    return model


def _run(model: nn.Module, function: Callable[..., R], *args: Any) -> R:
    return function(model, *args)


def run(function: Callable[..., R], model: Any, *args: Any) -> R:
    """`function(model, *args)`, a pass through a model that may be sharded."""
    within = getattr(model, RUN, None)
    return function(model, *args) if within is None else within(function, *args)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within it a sharded model's weights are whole tensors, however many passes each rank makes.

    For sampling, and for reading them; every rank goes in, and needs the memory.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def last_backward(model: nn.Module, last: bool) -> None:
    """Before a backward pass: gradients are summed over replicas after the `last` of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def whole_tensor(tensor: Any) -> Tensor:
    """A weight, a moment or a norm, put together where it is sharded; every rank asks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the shards of `like`, where that has any."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    placed = tensor.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)
