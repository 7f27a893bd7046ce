"""`klash speed [WORK]`: which comparisons there are, and the files they write."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from benchmarks.speed.direct import speed_steps
from benchmarks.speed.experiment import speed_experiment
from benchmarks.speed.generation import speed_generation
from benchmarks.speed.growth import speed_growth
from benchmarks.speed.ppo import speed_ppo
from benchmarks.speed.sides import Choice, Speed, machine, rounded
from shared.config import InputError
from shared.stages import output_folder, write_json

SPEED_COMPARISONS: dict[str, Callable[[Choice], Iterable[Speed]]] = {
    "generation": speed_generation,
    "dpo": partial(speed_steps, "dpo"),
    "ipo": partial(speed_steps, "ipo"),
    "kto": partial(speed_steps, "kto"),
    "reward": partial(speed_steps, "reward"),
    "ppo": speed_ppo,
}
ALONE: dict[
    str, Callable[[Choice], str]
] = {  # with tables of their own: measured only where they are named
    "experiment": speed_experiment,
    "growth": speed_growth,
}


def measure_named(works: Sequence[str], choice: Choice) -> str:
    """Measure what `works` names, or all comparisons; the table."""
    for work in works:
        if work not in SPEED_COMPARISONS and work not in ALONE:
            raise InputError(
                f"`klash speed` knows {sorted({**SPEED_COMPARISONS, **ALONE})}, not {work!r}"
            )
    alone = next((work for work in works if work in ALONE), None)
    if alone is None:
        return speed_table(run_comparisons(works, choice))
    if len(works) > 1:
        raise InputError(f"`klash speed {alone}` takes no other work beside it")
    if choice.models or choice.dtypes or choice.shapes:
        raise InputError(f"`klash speed {alone}` has no --models, --dtypes or --shapes")
    return ALONE[alone](choice)


def run_comparisons(works: Sequence[str], choice: Choice) -> list[Speed]:
    """Run the comparisons named, or all.

    `runs/speed/speed.json` and `speed.md` are written after each, so that a run that is stopped
    keeps what it has measured.
    """
    out = output_folder(choice.runs / "speed")
    found: list[Speed] = []
    for work in works or SPEED_COMPARISONS:
        for row in SPEED_COMPARISONS[work](choice):
            found.append(row)
            write_json(out / "speed.json", [row.model_dump(mode="json") for row in found])
            (out / "speed.md").write_text(speed_table(found), encoding="utf-8")
    if not found:
        raise InputError("`klash speed`: no comparison has these --models, --dtypes and --shapes")
    return found


def speed_table(rows: Sequence[Speed]) -> str:
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
            *(
                rounded(row.loss_difference, ".1e"),
                rounded(row.memory_ratio),
                rounded(row.mfu),
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
