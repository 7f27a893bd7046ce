"""`klash speed growth`: how time and memory of our training grow; `growth.json` and `growth.md`.

Two kinds of series: one DPO step of a small Llama against its batch, completions, vocabulary and
parameters; whole trainings, from sampling the pairs to the saved policy, against pairs, arms and
seeds. And what five more values of beta cost once the first one's run is there. Sizes of a series
take turns, each in a process of its own; a size's time is that of its fastest turn, since whatever
else runs on the machine only ever slows it down. Numbers are ratios to the series' smallest size.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from benchmarks.speed.direct import our_steps
from benchmarks.speed.growing import (
    ARMS,
    BETAS,
    Step,
    Training,
    more_settings,
    nothing,
    short_sft,
    step_case,
    whole_training,
)
from benchmarks.speed.sides import Choice, Work, Worker, cell, machine
from shared.config import Config
from shared.models.load import ModelConfig
from shared.stages import output_folder, write_json

STEPS_A_ROUND = 2  # a step is short beside a training, and so measured more often


class Plan(NamedTuple):
    """Series by what grows in them, with the sizes from the smallest on.

    A step's size None is its model's parameters, in thousands.
    """

    steps: dict[str, list[tuple[float | None, Step]]]
    trainings: dict[str, list[tuple[float, Training]]]
    settings: Training  # its first arm is there, and the others are added


def wide(hidden: int) -> Step:
    return Step(model=ModelConfig(hidden_size=hidden, intermediate_size=3 * hidden))


PLAN = Plan(
    steps={
        "pairs": [(n, Step(pairs=n)) for n in (16, 32, 64, 128)],
        "completion tokens": [(n, Step(completion_tokens=n)) for n in (8, 16, 32, 64)],
        "vocabulary": [(n, Step(vocabulary=n)) for n in (1024, 2048, 4096, 8192)],
        "parameters (thousands), by width": [(None, wide(n)) for n in (64, 128, 192, 256)],
        "parameters (thousands), by layers": [
            (None, Step(model=ModelConfig(layers=n))) for n in (2, 4, 6, 8)
        ],
    },
    trainings={
        "pairs": [(n, Training(pairs=n)) for n in (256, 512, 1024, 1536)],
        "arms": [(n, Training(arms=ARMS[:n])) for n in (1, 2, 3, 4)],
        "seeds": [(n, Training(seeds=n)) for n in (1, 2, 3)],
    },
    settings=Training(arms=BETAS),
)


class Point(Config):
    """One size; over the smallest size of the series. Null: not known on this machine."""

    size: float
    time: float
    memory: float | None  # the process's peak
    own_memory: float | None  # the same without what the libraries hold before any work


class Series(Config):
    """`r2`: of the least-squares line through the times; `exponent`: time ~ size^exponent.

    `memory_spread`: the largest peak over the smallest one.
    """

    kind: Literal["step", "training"]
    axis: str
    points: list[Point]
    r2: float
    exponent: float
    memory_spread: float | None


class Growth(Config):
    """`more_settings`: seconds of a run with more settings over those settings' own training,
    the rounds' median; above 1 is what finding the rest again costs."""

    machine: str
    rounds: int
    series: list[Series]
    more_settings: float
    more_settings_per_round: list[float]


class Measured(NamedTuple):
    """One size: seconds of its fastest turn, and the most bytes that its process held."""

    size: float
    seconds: float
    peak: int


def speed_growth(choice: Choice, plan: Plan = PLAN) -> str:
    """Measure every series; writes `growth.json` and `growth.md` below `runs/speed`, its text."""
    out, found = output_folder(choice.runs / "speed"), []
    libraries = start(nothing).end()
    for axis, steps in plan.steps.items():
        with TemporaryDirectory() as scratch:
            measured = measure_steps(steps, STEPS_A_ROUND * choice.rounds, Path(scratch))
        found.append(series("step", axis, measured, libraries))
    policy = short_sft(choice.runs)
    with TemporaryDirectory(dir=out) as scratch:  # a run's disk: its stages are synced to it
        for axis, trainings in plan.trainings.items():
            measured = measure_trainings(trainings, choice.rounds, policy, Path(scratch))
            found.append(series("training", axis, measured, libraries))
        worker = start(more_settings, policy, Path(scratch), plan.settings)
        in_turn([(1.0, worker)], choice.rounds)
    ratios = [done.seconds / done.units for done in worker.rounds[1:]]
    growth = Growth(
        machine=machine(),
        rounds=choice.rounds,
        series=found,
        more_settings=median(ratios),
        more_settings_per_round=ratios,
    )
    write_json(out / "growth.json", growth.model_dump(mode="json"))
    text = growth_table(growth)
    (out / "growth.md").write_text(text, encoding="utf-8")
    return text


def start(make: Callable[..., Work], *inputs: Any) -> Worker:
    return Worker(make, *inputs, threads=torch.get_num_threads())


def measure_steps(
    steps: Sequence[tuple[float | None, Step]], turns: int, scratch: Path
) -> list[Measured]:
    """One optimiser step a turn."""
    workers = []
    for number, (size, step) in enumerate(steps):
        case, parameters = step_case(step, 1 + turns, scratch / str(number))
        workers.append((parameters / 1000 if size is None else size, start(our_steps, case)))
    return in_turn(workers, turns)


def measure_trainings(
    trainings: Sequence[tuple[float, Training]], turns: int, policy: Path, scratch: Path
) -> list[Measured]:
    """One whole training a turn."""
    workers = [
        (size, start(whole_training, policy, scratch, training)) for size, training in trainings
    ]
    return in_turn(workers, turns)


def in_turn(workers: Sequence[tuple[float, Worker]], turns: int) -> list[Measured]:
    """Each size `turns` times after a first, unmeasured turn, in rounds over all sizes."""
    for _ in range(1 + turns):
        for _, worker in workers:
            worker()
    return [
        Measured(
            size,
            seconds=min(done.seconds for done in worker.rounds[1:]),
            peak=max(worker.end(), *(done.memory or 0 for done in worker.rounds)),
        )
        for size, worker in workers
    ]


def series(
    kind: Literal["step", "training"], axis: str, measured: Sequence[Measured], libraries: int
) -> Series:
    """Ratios to the first size, and how straight the line through the times is."""
    sizes, seconds, peaks = zip(*measured, strict=True)
    known = min(peaks) > 0
    points = [
        Point(
            size=size,
            time=spent / seconds[0],
            memory=peak / peaks[0] if known else None,
            own_memory=(peak - libraries) / (peaks[0] - libraries) if known else None,
        )
        for size, spent, peak in measured
    ]
    return Series(
        kind=kind,
        axis=axis,
        points=points,
        r2=float(np.corrcoef(sizes, seconds)[0, 1]) ** 2,
        exponent=float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0]),
        memory_spread=max(peaks) / min(peaks) if known else None,
    )


TITLES = {"step": "One DPO step against its", "training": "A whole training against its number of"}


def growth_table(growth: Growth) -> str:
    """Markdown: a table an axis; "-": not known."""
    lines = [
        f"Over the smallest size, the fastest of {growth.rounds} rounds ({growth.machine}).",
        "Memory: the process's peak, and the same without what the libraries hold.",
    ]
    for one in growth.series:
        lines += [
            *("", f"{TITLES[one.kind]} {one.axis}:", ""),
            f"| {one.axis} | time | memory | without libraries |",
            "|---|---|---|---|",
        ]
        for point in one.points:
            cells = f"{point.size:,.0f}", cell(point.time), cell(point.memory)
            lines.append(f"| {' | '.join(cells)} | {cell(point.own_memory)} |")
        lines += [
            "",
            f"R^2 of a line {one.r2:.3f}; time ~ size^{one.exponent:.2f}; "
            f"largest peak / smallest {cell(one.memory_spread)}.",
        ]
    rounds = ", ".join(f"{ratio:.2f}" for ratio in growth.more_settings_per_round)
    lines += [
        "",
        f"Five more values of beta took {growth.more_settings:.2f} x the time of their own "
        f"training (rounds: {rounds}).",
    ]
    return "\n".join(lines) + "\n"
