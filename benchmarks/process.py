"""What a process that runs stages starts with, and seeds in processes of their own."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.compare import compare
from benchmarks.experiment import Experiment
from shared.cost import versions
from shared.generation.start import TRANSFORMERS, GenerationConfig, engine_version
from shared.stages import Missing, Stages

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
PARENT_DEATH_SIGNAL = 1  # of prctl(2)


def set_up_process(threads: int) -> None:
    """What every process that runs stages starts with."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what it would fill, and filling doubles the time of SFT.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
    keep_freed_memory()
    quiet_libraries()


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors; else each large one is mapped and cleared anew.

    Worth 8 to 10 % of a training step of the small model; nothing where there is no glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(TRIM_THRESHOLD, 2**30)


def quiet_libraries() -> None:
    """No progress bars or loading notes of the libraries between our own lines."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def stage_context(generation: GenerationConfig = TRANSFORMERS) -> dict[str, Any]:
    """What changes results besides configuration and code: part of every stage's address."""
    return {**versions(), **engine_version(generation), "threads": torch.get_num_threads()}


def run_side_by_side(experiment: Experiment, stages: Stages) -> None:
    """Fill the stages of all seeds but the first, `experiment.workers` seeds at a time.

    Each process has as many threads as one alone, so that its results are the same to the bit;
    waiting threads sleep, or two processes on two cores would spin. If a seed fails, the others
    are finished before its error is raised.
    """
    seeds = [seed for seed in experiment.seeds[1:] if not finished(experiment, stages, seed)]
    if not seeds:
        return
    context = multiprocessing.get_context("spawn")
    with (
        sleeping_threads(),
        context.Manager() as manager,
        ProcessPoolExecutor(experiment.workers, context, start_worker, (os.getpid(),)) as pool,
    ):
        messages = manager.Queue()
        work = experiment.model_dump_json(), stages.root, messages
        futures = [pool.submit(run_seed, *work, seed) for seed in seeds]
        while any(not future.done() for future in futures) or not messages.empty():
            with contextlib.suppress(Empty):
                stages.report(*messages.get(timeout=0.2))
        for future in futures:
            future.result()


def run_seed(experiment: str, root: Path, messages: Any, seed: int) -> None:
    """In a process of its own: all stages of one seed; tells of those that it ran."""

    def tell(label: str, state: str, seconds: float) -> None:
        if state != "cached":
            messages.put((label, state, seconds))

    whole = Experiment.model_validate_json(experiment)
    set_up_process(whole.threads)
    stages = Stages(root, tell, stage_context(whole.generation))
    compare(whole, stages, only=(seed,))


def start_worker(parent: int) -> None:
    """A process that ends when the one that started it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


@contextlib.contextmanager
def sleeping_threads() -> Iterator[None]:
    """Processes that start in here have OpenMP threads that sleep while they wait."""
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_WAIT_POLICY"]
        else:
            os.environ["OMP_WAIT_POLICY"] = before


def finished(experiment: Experiment, stages: Stages, seed: int) -> bool:
    """Whether nothing of this seed is left to do."""
    try:
        compare(experiment, replace(stages, fill=False), only=(seed,))
    except Missing:
        return False
    return True
