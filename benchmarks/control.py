"""Control: with labels tossed by a coin no method may gain, and with true labels each one must.

    python -m benchmarks.control benchmarks/experiments/control.toml --out reports

runs the experiment twice, with true and with shuffled labels, and writes control.json and
control.md. Exit code 1 if the control fails.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.experiment import Experiment, load_experiment
from benchmarks.results import Estimate, Results
from benchmarks.run import run_experiment
from benchmarks.statistics import seed_interval
from shared.config import InputError
from shared.stages import read_json, write_json


def control(
    file: Annotated[str, tyro.conf.Positional] = "control",
    /,
    runs: Path = Path("runs"),
    out: Path = Path("reports"),
) -> bool:
    """Run both and compare; True if the control holds for every trained method.

    Args:
        file: an experiment's TOML file, or the name of one that comes with Klash.
        runs: the folder of all runs.
        out: where control.json and control.md go.
    """
    gains = {labels: _gains(_labelled(file, labels), runs) for labels in LABELS}
    methods = {}
    for name, true in gains["bradley-terry"].items():
        shuffled = gains["shuffled"][name]
        difference = seed_interval([t - s for t, s in zip(true, shuffled, strict=True)])
        methods[name] = {
            "gain_true": seed_interval(true).model_dump(),
            "gain_shuffled": seed_interval(shuffled).model_dump(),
            "difference": difference.model_dump(),
            "holds": _contains_zero(seed_interval(shuffled)) and not _contains_zero(difference),
        }
    write_json(out / "control.json", {"experiment": file, "methods": methods})
    (out / "control.md").write_text(_markdown(file, methods), encoding="utf-8")
    print((out / "control.md").read_text(encoding="utf-8"))
    return all(method["holds"] for method in methods.values())


LABELS = ("bradley-terry", "shuffled")


def _labelled(file: str, labels: str) -> Experiment:
    overrides = [f"--preferences.labels={labels}"]
    experiment = load_experiment(file, overrides, quick=False)
    return experiment.model_copy(update={"name": f"{experiment.name}-{labels}"})


def _gains(experiment: Experiment, runs: Path) -> dict[str, list[float]]:
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


def _markdown(file: str, methods: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Control: shuffled labels",
        "",
        f"`python -m benchmarks.control {file}`: gain in gold over SFT, mean and 95 %",
        "interval over seeds. It holds where the gain with shuffled labels includes 0 and the",
        "difference does not.",
        "",
        "| method | true labels | shuffled labels | true - shuffled | holds |",
        "|---|---|---|---|---|",
    ]
    for name, m in methods.items():
        cells = [_text(m[key]) for key in ("gain_true", "gain_shuffled", "difference")]
        lines.append(f"| {name} | {' | '.join(cells)} | {'yes' if m['holds'] else 'NO'} |")
    return "\n".join(lines) + "\n"


def _text(e: dict[str, Any]) -> str:
    return f"{e['mean']:+.3f} [{e['low']:+.3f}, {e['high']:+.3f}]"


def main() -> None:
    """Exit codes as `klash`'s."""
    try:
        held = tyro.cli(control, prog="python -m benchmarks.control")
    except InputError as error:
        print(f"control: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
