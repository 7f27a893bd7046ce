"""The command `klash`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks.doctor.examine import report as report_findings
from benchmarks.doctor.patient import admit
from benchmarks.exits import exit_codes
from benchmarks.experiment import Experiment, load_experiment
from benchmarks.process import set_up_process
from benchmarks.report.build import build_report
from benchmarks.run import run_experiment
from benchmarks.speed.measure import measure_named
from benchmarks.speed.sides import Choice
from shared.config import InputError
from shared.generation.engine import Dtype
from shared.generation.server import become_server

Argument = tyro.conf.Positional


def main() -> None:
    """Exit codes: 0 done, 1 a check failed or a guard stopped the run, 2 the input is wrong."""
    words, overrides = split_overrides(sys.argv[1:])
    with exit_codes("klash"):
        if overrides and words[:1] not in (["compare"], ["doctor"]):
            raise InputError(f"only `compare` and `doctor` change keys (found {overrides[0]})")
        commands = {
            "compare": compare_with(overrides),
            "doctor": doctor_with(overrides),
            "report": report,
            "serve": serve,
            "speed": speed,
        }
        tyro.extras.subcommand_cli_from_dict(commands, args=words, prog="klash")


def compare_with(overrides: list[str]) -> Callable[..., None]:
    """`klash compare` with the configuration keys that were changed on the command line."""

    def compare(
        file: Annotated[str, Argument] = "reviews",
        /,
        quick: bool = False,
        runs: Path = Path("runs"),
    ) -> None:
        """A head-to-head: train, evaluate, write results.json and the report.

        Any key of the experiment can be changed: --ppo.epochs 4 --seeds "[0, 1]".

        Args:
            file: an experiment's TOML file, or the name of one that comes with Klash.
            quick: one seed, smaller, each arm at its first setting.
            runs: the folder of all runs and of the stages they share.
        """
        run = run_experiment(load_experiment(file, overrides, quick), runs)
        print(f"report: {run / 'report' / 'index.html'}")

    return compare


def doctor_with(overrides: list[str]) -> Callable[..., None]:
    """`klash doctor` with the configuration keys that were changed on the command line."""

    def doctor(
        file: Annotated[str, Argument] = "reviews",
        /,
        quick: bool = False,
        runs: Path = Path("runs"),
    ) -> None:
        """RLHF's known traps on one's own model, tokenizer and data: each passes or has a fix.

        FILE is an experiment, whose SFT model, pairs and reward model are examined (and made, if
        they are not there), or a TOML file with `model` (a transformers folder), `data` (JSON
        lines of prompt, chosen, rejected: texts or chat messages) and, if wanted, `reward_model`,
        `reference`, `adapter`, `temperature`, `max_length`, `max_new_tokens`.

        Args:
            file: the TOML file, or the name of an experiment that comes with Klash.
            quick: the experiment's smaller form.
            runs: the folder of all runs and of the stages they share.
        """
        if not report_findings(admit(file, runs, overrides, quick)):
            sys.exit(1)

    return doctor


def report(run: Annotated[Path, Argument], /) -> None:
    """Draw the report of a finished run again.

    Args:
        run: the folder with results.json.
    """
    if not (run / "results.json").is_file():
        raise InputError(f"{run}: no results.json here; `klash compare` writes it")
    print(f"report: {build_report(run)}")


def serve(
    model: Annotated[Path, Argument],
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: Dtype = "float32",
    transfer: Literal["file", "nccl"] = "file",
) -> None:
    """A vLLM server for `--generation.server`: it samples, and takes the policy's weights over.

    Args:
        model: a transformers folder of the policy's architecture, such as the SFT model.
        host: where it listens; whoever reaches it can replace its weights.
        port: likewise.
        dtype: of weights and arithmetic, as `generation.dtype`.
        transfer: how weights come, as `generation.transfer`.
    """
    become_server(model, host=host, port=port, dtype=dtype, transfer=transfer)


def speed(
    work: Annotated[tuple[str, ...], Argument] = (),
    /,
    rounds: int = 4,
    threads: int = 2,
    runs: Path = Path("runs"),
    models: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
    shapes: tuple[str, ...] = (),
    quick: bool = False,
) -> None:
    """Ours beside the peers', in turn in one run: RUNS/speed/speed.json and speed.md.

    Two works run only if named, and alone: `growth`, how time and memory of our training grow
    (RUNS/speed/growth.json and growth.md), and `experiment`, all trainings of `reviews` on both
    sides, once (experiment.json and experiment.md).

    Args:
        work: what to compare (generation, dpo, ipo, kto, reward, ppo), all if none is named; or
            growth; or experiment.
        rounds: measured turns of each side.
        threads: of both sides; an experiment has its own.
        runs: the folder of all runs.
        models: only on these (smollm2-135m, reviews).
        dtypes: only in these (float32, bfloat16).
        shapes: only of these, such as prompt-heavy, equal or completion-heavy; see the table.
        quick: of `experiment`: its smaller form.
    """
    set_up_process(threads)
    choice = Choice(runs, rounds, models, dtypes, shapes, quick)
    print(measure_named(work, choice))


def run_study(name: str, study_with: Callable[[list[str]], Callable[..., bool | None]]) -> None:
    """`python -m benchmarks.NAME`, with keys changed as for `klash compare`.

    Exit codes as `main`; 1 also where the study returns False.
    """
    words, overrides = split_overrides(sys.argv[1:])
    with exit_codes(name):
        held = tyro.cli(study_with(overrides), args=words, prog=f"python -m benchmarks.{name}")
    sys.exit(1 if held is False else 0)


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """(the command's own words, the configuration keys and values among them)."""
    own: list[str] = []
    overrides: list[str] = []
    mine = {"quick", "threads"} if words[:1] == ["speed"] else {"quick"}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, _ = word.removeprefix("--").partition("=")
        field = key.replace("-", "_")
        is_key = "." in key or (field in Experiment.model_fields and field not in mine)
        if not (word.startswith("--") and is_key):
            own.append(word)
            continue
        overrides.append(word)
        if not equals and rest:
            overrides.append(rest.pop(0))
    return own, overrides
