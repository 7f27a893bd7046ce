"""The functions in C, compiled by the machine's C compiler when a process first needs them: a
second's work. Where there is no compiler (or `CC=false` says so) there are none.
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
    "swiglu": "n***",
    "swiglu_backward": "n*****",
    "linear": "nnn***",
    "attend": "******",
    "attend_step": "nnnnnnf*****",
    "attend_backward": "**********",
    "products": "nnnn****",
    "products_backward": "nnnn******",
}


def call(function: str, *arguments: Any) -> None:
    """Run a function that is written in C on this process's threads.

    Tensors are contiguous float32. A list holds tensors, each of which may be None, or numbers.
    """
    getattr(library(), function)(torch.get_num_threads(), *map(_as_c, arguments))


def _as_c(argument: Any) -> Any:
    if isinstance(argument, list):
        if isinstance(argument[0], int):
            return (ctypes.c_int64 * len(argument))(*argument)
        return (ctypes.c_void_p * len(argument))(*map(_as_c, argument))
    if not isinstance(argument, Tensor):
        return argument
    assert argument.is_contiguous() and argument.dtype == torch.float32
    return argument.data_ptr()


@cache
def products_are_faster() -> bool:
    """Whether C multiplies matrices of many rows faster than PyTorch here: AMD's from Zen 5 on."""
    found = library()
    return found is not None and bool(found.products_are_faster())


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
