"""Control: with labels tossed by a coin no method may gain, and with true labels each one must.

    klash study control benchmarks/experiments/control.toml --out reports

runs the experiment twice, with true and with shuffled labels, and writes NAME.json and NAME.md,
NAME the experiment's. Exit code 1 if the control fails.

That no method gains is one claim about all of them, so it is judged by limits that hold together
with 95 %: each at 1 - 0.05 / (number of methods), Bonferroni's. At 95 % each, one table in three
would show some method off 0 by chance.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.entry import Argument, Overrides
from benchmarks.evaluation.statistics import Estimate, seed_interval
from benchmarks.pipeline.experiment import Experiment
from benchmarks.pipeline.loading import load_experiment
from benchmarks.results.schema import Results
from benchmarks.run import run_experiment
from shared.config import InputError
from shared.stages import output_folder, read_json, write_json

LABELS = ("bradley-terry", "shuffled")
KEYS = ("gain_true", "gain_shuffled", "gain_shuffled_simultaneous", "difference")
Gains = dict[str, list[float]]  # of a method, one a seed


def control(
    file: Argument[str] = "control",
    /,
    runs: Path = Path("runs"),
    out: Path = Path("reports"),
    overrides: Overrides = (),
) -> bool:
    """Run both and compare; True if the control holds for every trained method.

    Any key of the experiment can be changed: --seeds "[5, 6]" --name control-fresh.

    Args:
        file: an experiment's TOML file, or the name of one that comes with Klash.
        runs: the folder of all runs.
        out: where the two files go.
    """
    name = load_experiment(file, overrides, quick=False).name
    output_folder(out)
    gains = {labels: _gains(_labelled(file, overrides, labels), runs) for labels in LABELS}
    methods = compare_gains(gains["bradley-terry"], gains["shuffled"])
    command = shlex.join(["klash", "study", "control", file, *overrides])
    write_json(out / f"{name}.json", {"command": command, "methods": methods})
    text = _markdown(command, methods)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
    return all(method["holds"] for method in methods.values())


def compare_gains(true: Gains, shuffled: Gains) -> dict[str, dict[str, Any]]:
    """A method holds if 0 lies in its shuffled gain's interval and not in the difference's.

    The former is judged together with the other methods', the latter on its own.
    """
    methods, simultaneous = {}, 1 - 0.05 / len(true)
    for name in true:
        gap = [t - s for t, s in zip(true[name], shuffled[name], strict=True)]
        together = seed_interval(shuffled[name], simultaneous)
        methods[name] = {
            "gain_true": seed_interval(true[name]).model_dump(),
            "gain_shuffled": seed_interval(shuffled[name]).model_dump(),
            "difference": seed_interval(gap).model_dump(),
            "gain_shuffled_simultaneous": together.model_dump(),
            "holds": _contains_zero(together) and not _contains_zero(seed_interval(gap)),
        }
    return methods


def _labelled(file: str, overrides: Sequence[str], labels: str) -> Experiment:
    overrides = [*overrides, f"--preferences.labels={labels}"]
    experiment = load_experiment(file, overrides, quick=False)
    return experiment.model_copy(update={"name": f"{experiment.name}-{labels}"})


def _gains(experiment: Experiment, runs: Path) -> Gains:
    """Each trained method's gain in gold over SFT, one number a seed."""
    results = Results.model_validate(read_json(run_experiment(experiment, runs) / "results.json"))
    return {
        name: [value for value in method.gain.per_seed if value is not None]
        for name, method in results.methods.items()
        if name != "sft"
    }


def _contains_zero(estimate: Estimate) -> bool:
    if estimate.low is None or estimate.high is None:
        raise InputError("the control needs two seeds or more")
    return estimate.low <= 0 <= estimate.high


def _markdown(command: str, methods: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Control: shuffled labels",
        "",
        f"`{command}`:",
        "gain in gold over SFT, mean and 95 % interval over seeds. `together`: limits that hold",
        "for all methods at once with 95 %. The control holds where these include 0 and those of",
        "the difference do not.",
        "",
        "| method | true labels | shuffled labels | together | true - shuffled | holds |",
        "|---|---|---|---|---|---|",
    ]
    for name, m in methods.items():
        cells = [Estimate(**m[key]).text("+.3f") for key in KEYS]
        cells[2] = cells[2].partition(" ")[2]
        lines.append(f"| {name} | {' | '.join(cells)} | {'yes' if m['holds'] else 'NO'} |")
    return "\n".join(lines) + "\n"
