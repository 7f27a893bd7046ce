"""One experiment from its configuration to a run folder, with progress on the way."""

import contextlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from benchmarks.compare import compare, tuning_seeds
from benchmarks.experiment import Experiment
from benchmarks.results import Results
from benchmarks.summary import Summary, side_by_side, training_curves
from shared.config import InputError
from shared.cost import matmul_rate
from shared.fit import checkpoint_steps, steps_of
from shared.stages import Stages, write_json

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy", "scipy")


def run_experiment(experiment: Experiment, runs: Path) -> Path:
    """Run `experiment`; returns its folder with results.json, samples.json and curves.json.

    Stages lie in `runs/.stages` and are shared by all runs below `runs`.
    """
    folder = runs / experiment.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot make this folder: {error.strerror}") from error
    torch.set_num_threads(experiment.threads)
    torch.use_deterministic_algorithms(True)
    quiet_libraries()
    rate = matmul_rate()
    with progress(stage_count(experiment)) as say:
        compared = compare(experiment, Stages(runs / ".stages", say, stage_context()))
        say("summary", "running", 0.0)
        results = Summary(experiment, compared, rate).results(environment(rate))
    write_json(folder / "results.json", results.model_dump(mode="json", by_alias=True))
    write_json(folder / "results.schema.json", Results.model_json_schema())
    write_json(folder / "experiment.json", experiment.model_dump(mode="json"))
    write_json(folder / "samples.json", side_by_side(compared, experiment.seeds[0], 12))
    write_json(folder / "curves.json", training_curves(compared))
    return folder


def stage_context() -> dict[str, Any]:
    """What changes results besides configuration and code: part of every stage's address."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {**versions, "threads": torch.get_num_threads()}


def stage_count(experiment: Experiment) -> int:
    """How many stages a run goes through, cached ones included."""
    seeds, shares = len(experiment.seeds), experiment.evaluation.checkpoints
    direct = experiment.direct
    steps = {
        "ppo": max(1, experiment.ppo.episodes // experiment.ppo.rollout_size),
        "direct": steps_of(experiment.preferences.pairs, direct.batch_size, direct.epochs),
    }
    total = 4 + 6 * seeds
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
    """A bar with the time left on a terminal, a plain line a stage elsewhere."""
    if not sys.stdout.isatty():
        done = 0

        def say(name: str, state: str, seconds: float) -> None:
            nonlocal done
            done += state in ("done", "cached")
            spent = f" in {seconds:.1f} s" if state == "done" else ""
            if state != "running":
                print(f"[{done}/{total}] {name}: {state}{spent}", flush=True)

        yield say
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console()) as bar:
        task = bar.add_task("start", total=total)

        def show(name: str, state: str, seconds: float) -> None:
            if state == "running":
                bar.update(task, description=name)
            else:
                bar.advance(task)

        yield show


def environment(rate: float) -> dict[str, Any]:
    """Versions and machine; the one part of the results that may differ between equal runs."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        **versions,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "matmul_flops_per_s": rate,
    }


def quiet_libraries() -> None:
    """No progress bars or loading notes of the libraries between our own lines."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
