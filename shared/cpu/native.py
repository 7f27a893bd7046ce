"""What is written in C, compiled by the machine's C compiler when a process first needs it:
a second's work.

Where there is no compiler (or `CC=false` says so), PyTorch's own operations do the same, slower.
"""

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = [Path(__file__).with_name(name) for name in ("kernels.c", "products.c")]
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")
TYPES = {"n": ctypes.c_int64, "f": ctypes.c_float, "*": ctypes.c_void_p}
FUNCTIONS = {  # after the number of threads: whole numbers, floats, tensors
    "rms_norm": "nnf****",
    "rms_norm_backward": "nnn******",
    "rotate": "nnnf****",
    "log_sum_exp": "nn**",
    "log_sum_exp_backward": "nn****",
    "swiglu": "n***",
    "swiglu_backward": "n*****",
    "linear": "nnn***",
    "attend": "******",
    "attend_step": "nnnnnnf*****",
    "attend_backward": "**********",
    "products": "nnnn****",
    "products_backward": "nnnn******",
}
BY = (None, "tiles", "vectors")  # as `by` in C numbers them


def here(tensor: Tensor) -> bool:
    """Whether `call` can compute with `tensor`."""
    return tensor.is_cpu and library() is not None


def call(function: str, *arguments: Any) -> None:
    """Run a function that is written in C on this process's threads.

    Tensors are contiguous float32. A list holds tensors, each of which may be None, or numbers.
    """
    getattr(library(), function)(torch.get_num_threads(), *map(_told, arguments))


def _told(argument: Any) -> Any:
    if isinstance(argument, list):
        if isinstance(argument[0], int):
            return (ctypes.c_int64 * len(argument))(*argument)
        return (ctypes.c_void_p * len(argument))(*map(_told, argument))
    if not isinstance(argument, Tensor):
        return argument
    assert argument.is_contiguous() and argument.dtype == torch.float32
    return argument.data_ptr()


def kind() -> str:
    """What runs the operations that are written in C: results differ in their last digits."""
    return "PyTorch" if library() is None else f"C, {products_by()}" if products_by() else "C"


@cache
def products_by() -> str | None:
    """What multiplies matrices of many rows, where that is faster here than PyTorch: the matrix
    unit's "tiles" (Intel's AMX), or "vectors" (AMD's processors from Zen 5 on).
    """
    found = library()
    return found and BY[found.by()]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None: the reason is logged once."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        return _missing(f"no C compiler was found ({compiler[0]})")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.so"
        command = [*compiler, *FLAGS, "-o", str(target), *map(str, SOURCES), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            return _missing(f"{compiler[0]} failed: {done.stderr.strip()[:500]}")
        try:
            found = ctypes.CDLL(str(target))
        except OSError as error:  # such as a temporary folder from which nothing may be run
            return _missing(f"what {compiler[0]} made cannot be loaded: {error}")
    for name, types in FUNCTIONS.items():
        getattr(found, name).argtypes = [ctypes.c_int, *(TYPES[t] for t in types)]
        getattr(found, name).restype = None
    return found


def _missing(reason: str) -> None:
    logging.getLogger(__name__).warning(
        "norms, MLPs, attention and sampling run on PyTorch's own operations, some slower: %s",
        reason,
    )
