"""The commands that compare methods and draw what came of it."""

from pathlib import Path

from benchmarks.entry import Argument, Overrides
from benchmarks.pipeline.loading import load_experiment
from benchmarks.pipeline.reasons import plan_text
from benchmarks.pipeline.work import work_text
from benchmarks.report.build import build_report, read_results
from benchmarks.report.conclusion import conclude
from benchmarks.run import plan_experiment, run_experiment
from shared.config import InputError, suggest
from shared.models import ranks

RUNS = Path("runs")


def compare(
    file: Argument[str] = "reviews",
    /,
    quick: bool = False,
    runs: Path = RUNS,
    ray: str = "",
    overrides: Overrides = (),
) -> None:
    """A head-to-head: train, evaluate, write results.json and the report.

    Any key of the experiment can be changed: --ppo.epochs 4 --seeds "[0, 1]".

    Args:
        file: an experiment's TOML file, or the name of one that comes with Klash.
        quick: one seed, smaller, each arm at its first setting.
        runs: the folder of all runs and of the stages they share.
        ray: address of a Ray cluster whose machines all see `runs`, or auto: stages run there.
    """
    run = run_experiment(load_experiment(file, overrides, quick), runs, ray)
    if not ranks.is_first():
        return
    conclusion = conclude(read_results(run))
    print("\n".join([conclusion.answer, *(f"{word}: {fact}" for word, fact in conclusion.facts)]))
    print(f"report: {run / 'report' / 'index.html'}")


def plan(
    file: Argument[str] = "reviews",
    /,
    quick: bool = False,
    runs: Path = RUNS,
    overrides: Overrides = (),
) -> None:
    """What `klash compare` would do: which stages are there, which will run, why, and how much of
    training and sampling that is.

    Args:
        file: an experiment's TOML file, or the name of one that comes with Klash.
        quick: the experiment's smaller form.
        runs: the folder of all runs and of the stages they share.
    """
    experiment = load_experiment(file, overrides, quick)
    found = plan_experiment(experiment, runs)
    print(plan_text(found))
    if work := work_text(experiment, found):
        print(f"\n{work}")


def report(run: Argument[Path], /) -> None:
    """Draw the report of a finished run again.

    Args:
        run: the folder with results.json, or its name below runs.
    """
    if not run.is_dir() and (RUNS / run / "results.json").is_file():
        run = RUNS / run
    if not (run / "results.json").is_file():
        below = [f.parent.name for f in RUNS.glob("*/results.json")]
        known = suggest(run.name, below)
        raise InputError(
            f"{run}: no results.json here; `klash compare` writes it into runs/NAME{known}"
        )
    print(f"report: {build_report(run)}")
