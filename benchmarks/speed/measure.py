"""`klash speed [WORK]`: which comparisons there are, and what they leave behind."""

import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.speed.generation import speed_generation
from benchmarks.speed.ppo import speed_ppo
from benchmarks.speed.sides import Speed
from shared.config import InputError
from shared.stages import output_folder, write_json

WORKS: dict[str, Callable[[Path, int], list[Speed]]] = {
    "generation": speed_generation,
    "ppo": speed_ppo,
}


def measure(works: Sequence[str], runs: Path, rounds: int) -> list[Speed]:
    """Run the comparisons named, or all; writes `runs/speed/speed.json` and `speed.md`."""
    for work in works:
        if work not in WORKS:
            raise InputError(f"`klash speed` knows {sorted(WORKS)}, not {work!r}")
    out = output_folder(runs / "speed")
    found = [row for work in works or WORKS for row in WORKS[work](runs, rounds)]
    write_json(out / "speed.json", [row.model_dump(mode="json") for row in found])
    (out / "speed.md").write_text(table(found), encoding="utf-8")
    return found


def table(rows: Sequence[Speed]) -> str:
    """Markdown: ratios with their 95 % intervals over rounds."""
    machine = f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    lines = [
        f"Ours / peer, each in turn in one run; 95 % over rounds ({machine}).",
        "",
        "| work | model | dtype | shape | peer | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row.ratio
        limits = f" [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio.low and ratio.high else ""
        what = f"| {row.work} | {row.model} | {row.dtype} | {row.shape} | {row.peer_name} "
        lines.append(f"{what}| {ratio.mean:.2f}{limits} |")
    return "\n".join(lines) + "\n"
