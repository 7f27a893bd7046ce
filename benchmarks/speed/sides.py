"""Ours against a peer's: the same work, in turn, in one run; ratios, since seconds do not travel.

Each side runs once unmeasured and then in rounds, A B A B, so that a machine that slows down slows
both. The interval of the ratio is Student's t over the rounds' log ratios.
"""

import math
import multiprocessing
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any, NamedTuple

import torch
from pydantic import Field

from benchmarks.evaluation.statistics import Estimate, seed_interval
from benchmarks.pipeline.places import end_with, keep_freed_memory, quiet_libraries
from shared.config import Config
from shared.models.cost import finish_queued, peak_memory_bytes, reset_peak_memory

Side = Callable[[], float]  # does the work once, returns units a second


class Speed(Config):
    """One comparison. `ratio`: ours / peer. Null: not measured, or of no meaning for this work."""

    work: str
    model: str
    dtype: str
    shape: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    ratio: Estimate
    loss_difference: float | None = None
    memory_ratio: float | None = None
    mfu: float | None = None
    setting: dict[str, float] = Field(default_factory=dict)


class Choice(NamedTuple):
    """Which comparisons to make, how often each side is measured, and where models lie."""

    runs: Path
    rounds: int
    models: Sequence[str] = ()  # empty: all, and likewise below
    dtypes: Sequence[str] = ()
    shapes: Sequence[str] = ()
    quick: bool = False  # an experiment in its smaller form

    def takes(self, model: str, dtype: str, shape: str) -> bool:
        filters = (model, self.models), (dtype, self.dtypes), (shape, self.shapes)
        return all(name in names for name, names in filters if names)


class Rates(NamedTuple):
    """Mean units a second of both sides, and ours / peer: its geometric mean over the rounds."""

    ours: float
    peer: float
    ratio: Estimate


def compare_rates(ours: Side, peer: Side, rounds: int) -> Rates:
    """Each side once unmeasured, then `rounds` times in turn."""
    ours()
    peer()
    pairs = [(ours(), peer()) for _ in range(rounds)]
    logs = seed_interval([math.log(a / b) for a, b in pairs])
    low, middle, high = (
        None if x is None else math.exp(x) for x in (logs.low, logs.mean, logs.high)
    )
    ratio = Estimate(mean=middle, low=low, high=high, per_seed=[a / b for a, b in pairs])
    return Rates(mean(a for a, _ in pairs), mean(b for _, b in pairs), ratio)


class Round(NamedTuple):
    """One round of one side; of a side that trains, one optimiser step."""

    units: float  # of work
    seconds: float
    loss: float | None = None  # that step's, for comparison with the other side's
    tokens: float | None = None  # trained on so far, without padding; likewise compared
    flops: float | None = None
    memory: int | None = None  # peak bytes, of work that resets the process's peak itself


Work = Callable[[], Round]


class Worker:
    """A side in a process of its own, with its own memory and threads, that waits for its turn.

    `make(*inputs)`, a function of a module, sets up there and returns the work of one round. Where
    the loop is not ours to write, as a trainer's is not, it `loops`: `make(turns, *inputs)` sets
    up, goes through the rounds with `turns`, and returns when they are over.
    """

    def __init__(
        self, make: Callable[..., Work | None], *inputs: Any, threads: int, loops: bool = False
    ):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = os.getpid(), theirs, threads, make, inputs, loops
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.rounds: list[Round] = []

    def __call__(self) -> float:
        """One round; units a second."""
        self.rounds.append(self._ask("round"))
        return self.rounds[-1].units / self.rounds[-1].seconds

    def end(self) -> int:
        """Stop; the process's peak memory from its first round on, in bytes."""
        peak = self._ask("end")
        self.process.join()
        return peak

    def _ask(self, word: str) -> Any:
        try:
            self.pipe.send(word)
            return self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError("a side of the comparison failed; its error is above") from error


class Turns:
    """A side's end of the pipe: hears when a round is due, and sends its result."""

    def __init__(self, pipe: Any):
        self._pipe = pipe
        self._started = False

    def wait(self) -> bool:
        """Sleep until the next round is due; False if there is none."""
        if not self._started:
            self._started = True
            reset_peak_memory()  # of setting up
        return self._pipe.recv() == "round"

    def send(self, result: Round) -> None:
        self._pipe.send(result)


def seconds_since(start: float) -> float:
    """Since `start` (a `perf_counter`), a GPU's queue of work included."""
    finish_queued()
    return perf_counter() - start


def machine(threads: int | None = None) -> str:
    """The machine, as tables name it; `threads`: if not this process's."""
    threads = threads or torch.get_num_threads()
    return f"{threads} threads, {platform.machine()}, torch {torch.__version__}"


def rounded(number: float | None, form: str = ".2f") -> str:
    """A number in a table; "-": not measured."""
    return "-" if number is None else format(number, form)


def _serve(
    parent: int, pipe: Any, threads: int, make: Callable[..., Any], inputs: Any, loops: bool
) -> None:
    end_with(parent)
    torch.set_num_threads(threads)
    if not loops:  # a peer's process is as its users start it
        keep_freed_memory()
    quiet_libraries()
    turns = Turns(pipe)
    if loops:
        make(turns, *inputs)
    else:
        work = make(*inputs)
        while turns.wait():
            turns.send(work())
    pipe.send(peak_memory_bytes())
