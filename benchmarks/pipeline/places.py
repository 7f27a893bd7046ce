"""What a process that runs stages starts with, and stages in processes of their own."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from threading import Lock, Thread
from typing import Any, TypeVar

import torch
from transformers.utils import logging as transformers_logging

from shared.generation.start import TRANSFORMERS, GenerationConfig, engine_version
from shared.models import ranks
from shared.models.cost import versions
from shared.models.device import device_name, see_one_gpu, visible_gpus
from shared.models.ops import computed_by
from shared.stages import (
    OnlyWith,
    Runner,
    Stage,
    Stages,
    Work,
    fill_stage,
    intact,
    stage_key,
)
from shared.training.saves import minutes_between, save_every

A = TypeVar("A")
B = TypeVar("B")
THREADS = 64  # that wait for processes
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt(3)
WATCH = 0.2  # seconds between looks at the parent
BY_ONE = ("start", "data", "listing", "judge-scores", "summary", "report")  # ranks share no work


def set_up_process(threads: int, save_minutes: float = 10.0) -> None:
    """What every process that runs stages starts with."""
    see_one_gpu()
    ranks.join()
    save_every(save_minutes)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what it would fill, and filling doubles the time of SFT.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
    keep_freed_memory()
    quiet_libraries()


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors; else each large one is mapped and cleared anew.

    Worth 6 to 13 % of a training step of SmolLM2-135M; nothing where there is no glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, -1)  # never give any back


def quiet_libraries() -> None:
    """No progress bars or loading notes of the libraries between our own lines."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def stage_context(generation: GenerationConfig = TRANSFORMERS) -> dict[str, Any]:
    """What changes results besides configuration and code: part of every stage's address."""
    operations = OnlyWith("shared/models/ops.py", computed_by())
    place = OnlyWith("shared/models/device.py", device_name())
    here = {"threads": torch.get_num_threads(), "operations": operations, "device": place}
    return {**versions(), **engine_version(generation), **here}


def with_threads(context: dict[str, Any], threads: int) -> dict[str, Any]:
    """The context of stages that run with another number of threads."""
    return {**context, "threads": threads}


def on_ranks(stages: Stages) -> Stages:
    """`stages` that all ranks do together, where `torchrun` has started several.

    Rank 0 decides what is there and writes it; what the others write goes nowhere.
    """
    if ranks.count() == 1:
        return stages

    def fill(folder: Path, stage: Stage) -> float:
        seconds = 0.0
        if stage.name in BY_ONE:
            with ranks.alone():
                seconds = fill_stage(folder, stage) if ranks.is_first() else 0.0
        elif ranks.is_first():
            seconds = fill_stage(folder, stage)
        else:
            with tempfile.TemporaryDirectory(prefix="klash-rank-") as scratch:
                stage.work(Path(scratch), **stage.inputs)
        ranks.wait()  # a folder appears when it is whole
        return seconds

    def there(folder: Path) -> bool:
        return ranks.from_first(ranks.is_first() and intact(folder))

    return replace(stages, fill=fill, there=there)


def on_threads(stages: Stages, threads: int) -> Stages:
    """`stages` that run here with `threads` threads, however many this process has."""
    fill_here = stages.fill or fill_stage

    def fill(folder: Path, stage: Stage) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return fill_here(folder, stage)
        finally:
            torch.set_num_threads(before)

    return replace(stages, context=with_threads(stages.context, threads), fill=fill)


class SideBySide:
    """Stages that run in processes of their own, several at a time.

    Each process has as many threads as one that runs without others, so that results are the same
    to the bit. If one of `each` items fails, the others are finished before its error is raised.
    """

    def __init__(self, stages: Stages, processes: Executor):
        def fill(folder: Path, stage: Stage) -> float:
            """In the next process that is free."""
            with no_interrupts():  # the process that it may start inherits this
                future = processes.submit(fill_stage, folder, stage)
            return future.result()

        self.stages = replace(stages, fill=fill)
        self.filling: defaultdict[str, Lock] = defaultdict(Lock)
        self.parsing = Lock()

    def run(self, name: str, work: Work, *, label: str = "", **inputs: Any) -> Path:
        """See `Stages.run`: who comes second for a stage waits until the first one has it."""
        with self.parsing:  # Python 3.11 parses code, which the key needs, in one thread at a time
            filling = self.filling[stage_key(name, work, inputs, self.stages.context)]
        with filling:
            return self.stages.run(name, work, label=label, **inputs)

    def each(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """In threads, which wait for the processes."""
        with ThreadPoolExecutor(THREADS) as threads:
            futures = [threads.submit(function, item) for item in items]
        return [future.result() for future in futures]


@contextlib.contextmanager
def side_by_side(stages: Stages, workers: int, threads: int) -> Iterator[SideBySide]:
    """`stages` with `workers` processes of `threads` threads; they start when there is work.

    Each takes a GPU of its own, as long as there are any more.
    """
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    start = (os.getpid(), threads, minutes_between(), numbers, visible_gpus())
    with (
        sleeping_threads(),
        ProcessPoolExecutor(workers, context, start_worker, start) as processes,
    ):
        try:
            yield SideBySide(stages, processes)
        except KeyboardInterrupt:  # else leaving the pool waits for what its processes do
            for process in multiprocessing.active_children():
                process.terminate()
            raise


@contextlib.contextmanager
def no_interrupts() -> Iterator[None]:
    """Ctrl-C does not reach processes that start in here: the one that started them ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def with_workers(stages: Stages, workers: int, threads: int) -> Iterator[Runner]:
    """`stages` that run `workers` at a time: here if that is one."""
    if workers == 1:
        yield stages
        return
    with side_by_side(stages, workers, threads) as together:
        yield together


def start_worker(
    parent: int,
    threads: int,
    save_minutes: float,
    numbers: "SimpleQueue[int]",
    gpus: tuple[str, ...],
) -> None:
    """A process that runs stages, on the GPU of the next of `numbers`."""
    end_with(parent)
    see_one_gpu(numbers.get(), gpus)
    set_up_process(threads, save_minutes)


def end_with(parent: int) -> None:
    """Let this process end when the one that started it is gone, killed or not."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


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
