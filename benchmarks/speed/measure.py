"""`klash speed [WORK]`: which comparisons there are, and what they leave behind."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from benchmarks.speed.direct import speed_steps
from benchmarks.speed.experiment import speed_experiment
from benchmarks.speed.generation import speed_generation
from benchmarks.speed.growth import speed_growth
from benchmarks.speed.ppo import speed_ppo
from benchmarks.speed.sides import Choice, Speed, cell, machine
from shared.config import InputError
from shared.stages import output_folder, write_json

WORKS: dict[str, Callable[[Choice], Iterable[Speed]]] = {
    "generation": speed_generation,
    "dpo": partial(speed_steps, "dpo"),
    "ipo": partial(speed_steps, "ipo"),
    "kto": partial(speed_steps, "kto"),
    "reward": partial(speed_steps, "reward"),
    "ppo": speed_ppo,
}
ALONE: dict[str, Callable[[Choice], str]] = {  # no rows of one table: only where they are named
    "experiment": speed_experiment,
    "growth": speed_growth,
}


def measure_named(works: Sequence[str], choice: Choice) -> str:
    """Measure what `works` names, or all comparisons; the table."""
    for work in works:
        if work not in WORKS and work not in ALONE:
            raise InputError(f"`klash speed` knows {sorted({**WORKS, **ALONE})}, not {work!r}")
    alone = next((work for work in works if work in ALONE), None)
    if alone is None:
        return table(measure(works, choice))
    if len(works) > 1:
        raise InputError(f"`klash speed {alone}` takes no other work beside it")
    if choice.models or choice.dtypes or choice.shapes:
        raise InputError(f"`klash speed {alone}` has no --models, --dtypes or --shapes")
    return ALONE[alone](choice)


def measure(works: Sequence[str], choice: Choice) -> list[Speed]:
    """Run the comparisons named, or all; writes `runs/speed/speed.json` and `speed.md`.

    After each comparison: who stops a long run keeps what it has measured.
    """
    out = output_folder(choice.runs / "speed")
    found: list[Speed] = []
    for work in works or WORKS:
        for row in WORKS[work](choice):
            found.append(row)
            write_json(out / "speed.json", [row.model_dump(mode="json") for row in found])
            (out / "speed.md").write_text(table(found), encoding="utf-8")
    if not found:
        raise InputError("`klash speed`: no comparison has these --models, --dtypes and --shapes")
    return found


def table(rows: Sequence[Speed]) -> str:
    """Markdown: ratios ours / peer with their 95 % intervals over rounds; "-": not measured."""
    lines = [
        f"Ours / peer, each in turn in one run; 95 % over rounds ({machine()}).",
        "",
        "| work | model | dtype | shape | peer | ratio | loss difference | memory | mfu |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row.ratio
        limits = f" [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio.low and ratio.high else ""
        cells = [
            *(row.work, row.model, row.dtype, row.shape, row.peer_name),
            f"{ratio.mean:.2f}{limits}",
            *(cell(row.loss_difference, ".1e"), cell(row.memory_ratio), cell(row.mfu)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
