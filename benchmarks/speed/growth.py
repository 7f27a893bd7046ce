"""`klash speed growth`: how time and memory of our training grow; `growth.json` and `growth.md`.

Two kinds of series: one DPO step of a small Llama against its batch, completions, vocabulary and
parameters; full trainings, from sampling the pairs to the saved policy, against pairs, arms and
seeds. And what five more values of beta cost once the first one's run is cached. Sizes of a series
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
    BETA_ARMS,
    GrowthStep,
    GrowthTraining,
    full_training,
    idle,
    more_settings,
    short_sft,
    step_case,
)
from benchmarks.speed.sides import Choice, Work, Worker, machine, rounded
from shared.config import Config
from shared.models.load import ModelConfig
from shared.stages import output_folder, write_json

STEPS_A_ROUND = 2  # a step is shorter than a training, and so measured more often


class Plan(NamedTuple):
    """Series by what grows in them, with the sizes from the smallest on.

    A step's size None is its model's parameters, in thousands.
    """

    steps: dict[str, list[tuple[float | None, GrowthStep]]]
    trainings: dict[str, list[tuple[float, GrowthTraining]]]
    settings: GrowthTraining  # its first arm is cached, the others are added


def step_of_width(hidden: int) -> GrowthStep:
    return GrowthStep(model=ModelConfig(hidden_size=hidden, intermediate_size=3 * hidden))


PLAN = Plan(
    steps={
        "pairs": [(n, GrowthStep(pairs=n)) for n in (16, 32, 64, 128)],
        "completion tokens": [(n, GrowthStep(completion_tokens=n)) for n in (8, 16, 32, 64)],
        "vocabulary": [(n, GrowthStep(vocabulary=n)) for n in (1024, 2048, 4096, 8192)],
        "parameters (thousands), by width": [(None, step_of_width(n)) for n in (64, 128, 192, 256)],
        "parameters (thousands), by layers": [
            (None, GrowthStep(model=ModelConfig(layers=n))) for n in (2, 4, 6, 8)
        ],
    },
    trainings={
        "pairs": [(n, GrowthTraining(pairs=n)) for n in (256, 512, 1024, 1536)],
        "arms": [(n, GrowthTraining(arms=ARMS[:n])) for n in (1, 2, 3, 4)],
        "seeds": [(n, GrowthTraining(seeds=n)) for n in (1, 2, 3)],
    },
    settings=GrowthTraining(arms=BETA_ARMS),
)


class GrowthPoint(Config):
    """One size, as ratios to the series' smallest size. Null: not known on this machine."""

    size: float
    time: float
    memory: float | None  # the process's peak
    own_memory: float | None  # the same without what the libraries hold before any work


class GrowthSeries(Config):
    """`r2`: of the least-squares line through the times; `exponent`: time ~ size^exponent.

    `memory_spread`: the largest peak over the smallest one.
    """

    kind: Literal["step", "training"]
    axis: str
    points: list[GrowthPoint]
    r2: float
    exponent: float
    memory_spread: float | None


class Growth(Config):
    """`more_settings`: seconds of a run with more settings over those settings' own training,
    the rounds' median; what is above 1 is the cost of finding cached stages."""

    machine: str
    rounds: int
    series: list[GrowthSeries]
    more_settings: float
    more_settings_per_round: list[float]


class MeasuredSize(NamedTuple):
    """One size: seconds of its fastest turn, and its process's peak memory in bytes."""

    size: float
    seconds: float
    peak: int


def speed_growth(choice: Choice, plan: Plan = PLAN) -> str:
    """Measure every series; writes `growth.json` and `growth.md` below `runs/speed`, its text."""
    out, found = output_folder(choice.runs / "speed"), []
    libraries = new_worker(idle).end()
    for axis, steps in plan.steps.items():
        with TemporaryDirectory() as scratch:
            measured = measure_steps(steps, STEPS_A_ROUND * choice.rounds, Path(scratch))
        found.append(growth_series("step", axis, measured, libraries))
    policy = short_sft(choice.runs)
    with TemporaryDirectory(dir=out) as scratch:  # a run's disk: its stages are synced to it
        for axis, trainings in plan.trainings.items():
            measured = measure_trainings(trainings, choice.rounds, policy, Path(scratch))
            found.append(growth_series("training", axis, measured, libraries))
        worker = new_worker(more_settings, policy, Path(scratch), plan.settings)
        measure_in_rounds([(1.0, worker)], choice.rounds)
    ratios = [turn.seconds / turn.units for turn in worker.rounds[1:]]
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


def new_worker(make: Callable[..., Work], *inputs: Any) -> Worker:
    return Worker(make, *inputs, threads=torch.get_num_threads())


def measure_steps(
    steps: Sequence[tuple[float | None, GrowthStep]], turns: int, scratch: Path
) -> list[MeasuredSize]:
    """One optimiser step a turn."""
    workers = []
    for number, (size, step) in enumerate(steps):
        case, parameters = step_case(step, 1 + turns, scratch / str(number))
        workers.append((parameters / 1000 if size is None else size, new_worker(our_steps, case)))
    return measure_in_rounds(workers, turns)


def measure_trainings(
    trainings: Sequence[tuple[float, GrowthTraining]], turns: int, policy: Path, scratch: Path
) -> list[MeasuredSize]:
    """One full training a turn."""
    workers = [
        (size, new_worker(full_training, policy, scratch, training)) for size, training in trainings
    ]
    return measure_in_rounds(workers, turns)


def measure_in_rounds(workers: Sequence[tuple[float, Worker]], turns: int) -> list[MeasuredSize]:
    """Each size `turns` times after a first, unmeasured turn, in rounds over all sizes."""
    for _ in range(1 + turns):
        for _, worker in workers:
            worker()
    return [
        MeasuredSize(
            size,
            seconds=min(turn.seconds for turn in worker.rounds[1:]),
            peak=max(worker.end(), *(turn.memory or 0 for turn in worker.rounds)),
        )
        for size, worker in workers
    ]


def growth_series(
    kind: Literal["step", "training"], axis: str, measured: Sequence[MeasuredSize], libraries: int
) -> GrowthSeries:
    """Ratios to the first size, and how straight the line through the times is."""
    sizes, seconds, peaks = zip(*measured, strict=True)
    known = min(peaks) > 0
    points = [
        GrowthPoint(
            size=size,
            time=spent / seconds[0],
            memory=peak / peaks[0] if known else None,
            own_memory=(peak - libraries) / (peaks[0] - libraries) if known else None,
        )
        for size, spent, peak in measured
    ]
    return GrowthSeries(
        kind=kind,
        axis=axis,
        points=points,
        r2=float(np.corrcoef(sizes, seconds)[0, 1]) ** 2,
        exponent=float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0]),
        memory_spread=max(peaks) / min(peaks) if known else None,
    )


TITLES = {"step": "One DPO step against its", "training": "A full training against its number of"}


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
            cells = f"{point.size:,.0f}", rounded(point.time), rounded(point.memory)
            lines.append(f"| {' | '.join(cells)} | {rounded(point.own_memory)} |")
        lines += [
            "",
            f"R^2 of a line {one.r2:.3f}; time ~ size^{one.exponent:.2f}; "
            f"largest peak / smallest {rounded(one.memory_spread)}.",
        ]
    rounds = ", ".join(f"{ratio:.2f}" for ratio in growth.more_settings_per_round)
    lines += [
        "",
        f"Five more values of beta took {growth.more_settings:.2f} x the time of their own "
        f"training (rounds: {rounds}).",
    ]
    return "\n".join(lines) + "\n"
