"""Ours beside a peer's: the same work, in turn, in one run; ratios, since seconds do not travel.

Each side runs once unmeasured and then in rounds, A B A B, so that a machine that slows down slows
both. The interval of the ratio is Student's t over the rounds' log ratios.
"""

import math
import multiprocessing
import os
from collections.abc import Callable
from statistics import mean
from typing import Any, NamedTuple

import torch
from pydantic import Field

from benchmarks.process import (
    keep_freed_memory,
    quiet_libraries,
    sleeping_threads,
    start_worker,
)
from benchmarks.results import Estimate
from benchmarks.statistics import seed_interval
from shared.config import Config
from shared.cost import peak_memory_bytes

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


def side_by_side(ours: Side, peer: Side, rounds: int) -> tuple[float, float, Estimate]:
    """(ours, peer, ours / peer): mean rates, and the ratio's geometric mean over the rounds."""
    ours()
    peer()
    pairs = [(ours(), peer()) for _ in range(rounds)]
    logs = seed_interval([math.log(a / b) for a, b in pairs])
    low, middle, high = (
        None if x is None else math.exp(x) for x in (logs.low, logs.mean, logs.high)
    )
    ratio = Estimate(mean=middle, low=low, high=high, per_seed=[a / b for a, b in pairs])
    return mean(a for a, _ in pairs), mean(b for _, b in pairs), ratio


class Done(NamedTuple):
    """One round of one side."""

    units: float  # of work
    seconds: float
    loss: float | None = None  # the first optimiser step's, for comparison with the other side's
    flops: float = 0.0  # counted, not measured
    tokens: float = 0.0  # generated


Work = Callable[[], Done]


class Worker:
    """A side in a process of its own: its memory and threads are its own, and it waits its turn.

    `make(*inputs)`, a function of a module, sets up there and returns the work of one round.
    """

    def __init__(self, make: Callable[..., Work], *inputs: Any, threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = os.getpid(), theirs, threads, make, inputs
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        with sleeping_threads():  # while the other side works
            self.process.start()
        theirs.close()
        self.rounds: list[Done] = []

    def __call__(self) -> float:
        """One round; units a second."""
        self.rounds.append(self._ask("round"))
        return self.rounds[-1].units / self.rounds[-1].seconds

    def end(self) -> int:
        """Stop; the most memory that the process ever held, in bytes."""
        peak = self._ask("end")
        self.process.join()
        return peak

    def _ask(self, word: str) -> Any:
        self.pipe.send(word)
        try:
            return self.pipe.recv()
        except EOFError as error:
            raise RuntimeError("a side of the comparison failed; its error is above") from error


def _serve(parent: int, pipe: Any, threads: int, make: Callable[..., Work], inputs: Any) -> None:
    start_worker(parent)
    torch.set_num_threads(threads)
    keep_freed_memory()
    quiet_libraries()
    work = make(*inputs)
    while pipe.recv() == "round":
        pipe.send(work())
    pipe.send(peak_memory_bytes())
