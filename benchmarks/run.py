"""One experiment from its configuration to a run folder, with progress on the way."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from benchmarks.pipeline.arms import Pipeline
from benchmarks.pipeline.compare import Pipelines, compare, first_seeds, timed_seeds, train_alone
from benchmarks.pipeline.experiment import Experiment
from benchmarks.pipeline.places import (
    on_ranks,
    on_threads,
    set_up_process,
    stage_context,
    with_workers,
)
from benchmarks.pipeline.plan import Plan, planned_pipelines
from benchmarks.pipeline.progress import progress
from benchmarks.report.build import draw_report
from benchmarks.results.summary import summarise
from shared.config import InputError
from shared.models import ranks
from shared.stages import Stages, output_folder

OTHERS = ("experiment.json", "samples.json", "curves.json")


def run_experiment(experiment: Experiment, runs: Path, ray: str = "") -> Path:
    """Run `experiment`; returns its folder: results.json, report/, and what the report shows.

    Stages lie in `runs/.stages` and are shared by all runs below `runs`. `ray`: the address of a
    Ray cluster that runs them.
    """
    folder = output_folder(runs / experiment.name)
    if ray:
        summary, report = run_on_cluster(experiment, runs, ray)
    else:
        summary, report = run_here(experiment, runs)
    if not ranks.is_first():
        return folder
    for file in ("results.json", "results.schema.json", *OTHERS):
        put(summary / file, folder / file)
    for part in ("figures", "tables"):
        shutil.rmtree(folder / "report" / part, ignore_errors=True)
        shutil.copytree(report / part, folder / "report" / part)
    put(report / "index.html", folder / "report" / "index.html")
    return folder


def run_on_cluster(experiment: Experiment, runs: Path, address: str) -> tuple[Path, Path]:
    """(summary, report): all stages as tasks of the cluster, what is timed one after another."""
    from benchmarks.pipeline.ray import Start, cluster

    threads, root = experiment.threads, (runs / ".stages").resolve()
    set_up_process(threads, experiment.save_minutes)
    start = Start(threads, experiment.save_minutes, experiment.generation, root)
    with cluster(address, start) as machines:
        plan = Plan(root, machines.context)
        finish(planned_pipelines(experiment, plan))
        with progress(plan.root, plan.labels) as say:
            stages = Stages(plan.root, say, plan.context)
            timed = machines.stages(stages, experiment.timed_threads or threads)
            seeds = timed_seeds(experiment)
            shared = Pipeline(experiment, machines.stages(stages, threads))
            pipelines = Pipelines(shared, Pipeline(experiment, timed), seeds)
            if seeds != experiment.seeds:
                run_timed(pipelines, pipelines)
            return finish(pipelines)


def run_here(experiment: Experiment, runs: Path) -> tuple[Path, Path]:
    """(summary, report): all stages on this machine."""
    plan = plan_experiment(experiment, runs)
    with progress(plan.root, plan.labels) as say:
        stages = on_ranks(Stages(plan.root, say, plan.context))
        pipelines = pipelines_of(experiment, stages)
        if pipelines.timed_seeds != experiment.seeds:
            with with_workers(stages, experiment.workers, experiment.threads) as runner:
                run_timed(pipelines, replace(pipelines, shared=Pipeline(experiment, runner)))
        return finish(pipelines)


def plan_experiment(experiment: Experiment, runs: Path) -> Plan:
    """All stages that `run_experiment` goes through."""
    set_up_process(experiment.threads, experiment.save_minutes)
    if ranks.count() > 1 and experiment.workers > 1:
        raise InputError(
            f"`workers` is {experiment.workers}: {ranks.count()} ranks do each stage together; "
            "set it to 1, or start klash without torchrun"
        )
    plan = Plan(runs / ".stages", stage_context(experiment.generation))
    finish(planned_pipelines(experiment, plan))
    return plan


def finish(pipelines: Pipelines) -> tuple[Path, Path]:
    """(summary, report): all stages, one after the other, where they are not there yet."""
    experiment, compared = pipelines.experiment, compare(pipelines)
    summary = pipelines.timed.run("summary", summarise, experiment=experiment, compared=compared)
    return summary, pipelines.shared.run("report", draw_report, run=summary)


def pipelines_of(experiment: Experiment, stages: Stages) -> Pipelines:
    """What is timed runs with threads of its own number."""
    timed = on_threads(stages, experiment.timed_threads or experiment.threads)
    return Pipelines(
        Pipeline(experiment, stages), Pipeline(experiment, timed), timed_seeds(experiment)
    )


def run_timed(alone: Pipelines, together: Pipelines) -> None:
    """All stages `together`, several at a time, but what a report gives seconds of: that `alone`.

    Only the last seed is timed: what is chosen on the first ones is known by then.
    """
    experiment, timed = alone.experiment, alone.timed_seeds
    if not set(timed) & set(first_seeds(experiment)):
        compare(together, only=tuple(seed for seed in experiment.seeds if seed not in timed))
    for seed in timed:
        train_alone(alone, seed)
    compare(together)


def put(source: Path, target: Path) -> None:
    """Copy a file in one rename: a reader sees the old one or the new one."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, temporary)
    temporary.replace(target)
