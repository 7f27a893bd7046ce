"""One experiment from its configuration to a run folder, with progress on the way."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.pipeline.arms import unpaired
from benchmarks.pipeline.compare import Places, compare, timed_seeds, train_alone, tuning_seeds
from benchmarks.pipeline.experiment import Experiment
from benchmarks.pipeline.places import OnThreads, set_up_process, side_by_side, stage_context
from benchmarks.report.build import draw_report
from benchmarks.results.summary import summarise
from shared.stages import Stages, output_folder
from shared.training.fit import checkpoint_steps, steps_of

OTHERS = ("experiment.json", "samples.json", "curves.json")


def run_experiment(experiment: Experiment, runs: Path) -> Path:
    """Run `experiment`; returns its folder: results.json, report/, and what the report shows.

    Stages lie in `runs/.stages` and are shared by all runs below `runs`.
    """
    folder = output_folder(runs / experiment.name)
    set_up_process(experiment.threads)
    with progress(stage_count(experiment)) as say:
        stages = Stages(runs / ".stages", say, stage_context(experiment.generation))
        alone = timed_stages(experiment, stages)
        places = Places(stages, alone, timed_seeds(experiment))
        if places.timed != experiment.seeds:
            run_timed(experiment, places)
        compared = compare(experiment, places)
        summary = alone.run("summary", summarise, experiment=experiment, compared=compared)
        report = stages.run("report", draw_report, run=summary)
    for file in ("results.json", "results.schema.json", *OTHERS):
        put(summary / file, folder / file)
    for part in ("figures", "tables"):
        shutil.rmtree(folder / "report" / part, ignore_errors=True)
        shutil.copytree(report / part, folder / "report" / part)
    put(report / "index.html", folder / "report" / "index.html")
    return folder


def timed_stages(experiment: Experiment, stages: Stages) -> Stages:
    """`stages` with the threads of what is timed."""
    threads = experiment.timed_threads or experiment.threads
    return OnThreads(stages.root, stages.report, stages.context, threads=threads)


def run_timed(experiment: Experiment, places: Places) -> None:
    """All stages, `experiment.workers` at a time, but what a report gives seconds of: that alone.

    Only the last seed is timed: what is chosen on the first ones is known by then.
    """
    timed, workers = places.timed, experiment.workers
    others = tuple(seed for seed in experiment.seeds if seed not in timed)
    with contextlib.ExitStack() as open_:
        beside = places
        if workers > 1:
            pool = open_.enter_context(side_by_side(places.stages, workers, experiment.threads))
            beside = replace(places, stages=pool)
        if not set(timed) & set(experiment.seeds[: experiment.tuning_seeds]):
            compare(experiment, beside, only=others)
        for seed in timed:
            train_alone(experiment, places, seed)
        compare(experiment, beside)


def put(source: Path, target: Path) -> None:
    """Copy a file in one rename: a reader sees the old one or the new one."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def stage_count(experiment: Experiment) -> int:
    """How many stages a run goes through, cached ones included."""
    seeds, shares = len(experiment.seeds), experiment.evaluation.checkpoints
    direct = experiment.direct
    steps = {
        "ppo": max(1, experiment.ppo.episodes // experiment.ppo.rollout_size),
        "direct": steps_of(experiment.preferences.pairs, direct.batch_size, direct.epochs),
    }
    total = 6 + (6 + unpaired(experiment)) * seeds
    for arm in experiment.arms.values():
        tuning = len(tuning_seeds(experiment, arm))
        final = seeds + (len(arm.settings) - 1) * tuning
        if arm.kind == "best-of-n":
            total += len(arm.settings) * tuning + final
        else:
            if arm.kind == "filtered":
                early = experiment.filtering.epochs - 1 if shares else 0
            else:
                early = len(checkpoint_steps(steps[arm.kind], shares))
            total += len(arm.settings) * tuning + final * (2 + early)
    return total


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str, str, float], None]]:
    """A bar with the time left on a terminal, a plain line a stage elsewhere; each stage once."""
    told: set[str] = set()
    if not sys.stdout.isatty():

        def say(name: str, state: str, seconds: float) -> None:
            if state == "running" or name in told:
                return
            told.add(name)
            spent = f" in {seconds:.1f} s" if state == "done" else ""
            print(f"[{len(told)}/{total}] {name}: {state}{spent}", flush=True)

        yield say
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console()) as bar:
        task = bar.add_task("start", total=total)

        def show(name: str, state: str, seconds: float) -> None:
            if state == "running":
                bar.update(task, description=name)
            elif name not in told:
                told.add(name)
                bar.advance(task)

        yield show
