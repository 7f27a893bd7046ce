"""The commands around a head-to-head. Each imports its own part when it runs: some take seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from benchmarks.entry import Argument, Overrides
from shared.generation.engine import Dtype


def doctor(
    file: Argument[str] = "reviews",
    /,
    quick: bool = False,
    runs: Path = Path("runs"),
    overrides: Overrides = (),
) -> bool:
    """RLHF's known traps on one's own model, tokenizer and data: each passes or has a fix.

    FILE is an experiment, whose SFT model, pairs and reward model are examined (and made, if
    they are not there), or a TOML file that names one's own `model`, `data` and, if wanted,
    `reward_model` and others: see below.

    Args:
        file: the TOML file, or the name of an experiment that comes with Klash.
        quick: the experiment's smaller form.
        runs: the folder of all runs and of the stages they share.
    """
    from benchmarks.doctor.examine import print_findings
    from benchmarks.doctor.patient import admit

    return print_findings(admit(file, runs, overrides, quick))


def serve(
    model: Argument[Path],
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
    from shared.generation.server import become_server

    become_server(model, host=host, port=port, dtype=dtype, transfer=transfer)


def speed(
    work: Argument[tuple[str, ...]] = (),
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
    from benchmarks.pipeline.places import set_up_process
    from benchmarks.speed.measure import measure_named
    from benchmarks.speed.sides import Choice

    set_up_process(threads)
    print(measure_named(work, Choice(runs, rounds, models, dtypes, shapes, quick)))


def study(name: Argument[Literal["control", "engines", "onoff", "regret"]]) -> None:
    """An experiment repeated to answer one question; `klash study NAME --help` says which.

    Args:
        name: of the study.
    """


def studies() -> dict[str, Callable[..., bool | None]]:
    """The studies by name."""
    from benchmarks.studies.control import control
    from benchmarks.studies.engines import engines
    from benchmarks.studies.onoff.study import onoff
    from benchmarks.studies.regret import regret

    return {"control": control, "engines": engines, "onoff": onoff, "regret": regret}
