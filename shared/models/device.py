"""The one device that a process computes on, said once: models are loaded there, batches follow."""

import os
from functools import cache

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"
LOCAL_RANK = "LOCAL_RANK"  # set by torchrun and accelerate launch


def device() -> torch.device:
    """The first visible GPU, of ranks on one machine each its own; the CPU where there is none."""
    number = int(os.environ.get(LOCAL_RANK, "0"))
    return torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")


def on_gpu() -> bool:
    """Whether that is a GPU."""
    return device().type == "cuda"


def device_name() -> str:
    """`cpu`, or the GPU's model: numbers of two kinds of device differ in their last digits."""
    return torch.cuda.get_device_name(device()) if on_gpu() else "cpu"


@cache
def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process saw at first, as CUDA_VISIBLE_DEVICES names them."""
    listed = os.environ.get(VISIBLE)
    if listed is None:
        return tuple(map(str, range(torch.cuda.device_count())))
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def see_one_gpu(number: int = 0, gpus: tuple[str, ...] | None = None) -> None:
    """Before CUDA starts: of several `gpus` this process sees one, the `number`th, in turn.

    By default of those that it saw at first. Libraries that see several spread a model over all.
    """
    gpus = visible_gpus() if gpus is None else gpus
    if len(gpus) > 1 and LOCAL_RANK not in os.environ:  # each rank knows which is its own
        os.environ[VISIBLE] = gpus[number % len(gpus)]
