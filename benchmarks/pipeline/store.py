"""What lies in a folder of runs: finished runs, the stages that they need, and what nobody needs.

Stages belong to no run: a run needs the summary whose results it shows, and whatever that was made
from. Which stages these are is read from manifests, so it does not depend on today's code.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import InputError
from shared.stages import MACHINE, is_running, owner_of, read_manifest

DAY, HOUR = 86_400.0, 3_600.0


@dataclass(frozen=True)
class Kept:
    """A folder on disk: a run's own, a stage's, or what a stage left behind."""

    folder: Path
    size: int  # bytes
    changed: float  # seconds since 1970


@dataclass(frozen=True)
class Store:
    """Everything in a folder of runs: `needs` names the stages of each finished run."""

    runs: dict[str, Kept]
    stages: dict[str, Kept]
    needs: dict[str, set[str]]
    leftovers: list[Kept]  # of stages that came to no end: what they saved, or damaged files

    @property
    def unneeded(self) -> list[Kept]:
        """Stages that no finished run shows, and leftovers; the oldest first."""
        needed = set().union(*self.needs.values())
        found = [kept for name, kept in self.stages.items() if name not in needed]
        return sorted([*found, *self.leftovers], key=lambda kept: kept.changed)


def read_store(runs: Path) -> Store:
    """Look through `runs`; InputError if there is no such folder."""
    root = runs / ".stages"
    if not root.is_dir():
        raise InputError(f"{runs}: no runs here; name their folder with --runs")
    folders = [folder for folder in root.iterdir() if folder.is_dir()]
    stages = {f.name: kept(f) for f in folders if not f.name.startswith(".")}
    manifests = {name: read_manifest(root / name) or {} for name in stages}
    reads = {name: names_in(m.get("inputs"), stages) for name, m in manifests.items()}
    finished = [f for f in runs.iterdir() if (f / "results.json").is_file()]
    return Store(
        runs={folder.name: kept(folder) for folder in sorted(finished)},
        stages=stages,
        needs={folder.name: needed_by(folder, manifests, reads) for folder in finished},
        leftovers=[kept(f) for f in folders if f.name.startswith(".")],
    )


def kept(folder: Path) -> Kept:
    """Its size is that of the files in it."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return Kept(folder, sum(file.st_size for file in files), folder.stat().st_mtime)


def names_in(value: Any, known: dict[str, Kept]) -> set[str]:
    """The stages that a manifest's inputs name, however deep."""
    if isinstance(value, str):
        return {value} & known.keys()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*(names_in(part, known) for part in parts))


def needed_by(
    run: Path, manifests: dict[str, dict[str, Any]], reads: dict[str, set[str]]
) -> set[str]:
    """The stages behind a run's results.json, and reports drawn from them."""
    shown = (run / "results.json").read_bytes()
    summaries = [
        name
        for name in manifests
        if name.startswith("summary-") and same_results(run.parent / ".stages" / name, shown)
    ]
    found, queue = set(), summaries
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue += reads[name]
    drawn = {n for n in reads if n.startswith("report-") and reads[n] & set(found)}
    return found | drawn


def same_results(stage: Path, shown: bytes) -> bool:
    """Whether a summary is the one that a run shows."""
    file = stage / "results.json"
    return file.is_file() and file.read_bytes() == shown


def at_work(store: Store) -> Iterator[str]:
    """The processes that are filling a stage now; of another machine those that did an hour ago."""
    for left in store.leftovers:
        machine, process = owner_of(left.folder)
        if not left.folder.name.startswith(".unfinished-") or not machine:
            continue
        if machine != MACHINE and time.time() - left.changed < HOUR:
            yield f"process {process} of {machine}"
        elif machine == MACHINE and is_running(process):
            yield f"process {process}"


def remove(store: Store, folders: Sequence[Kept]) -> None:
    """Remove what is not needed; InputError while a run is under way, whose stages no run shows."""
    for process in at_work(store):
        raise InputError(f"a run is under way ({process}): wait until it has ended")
    for one in folders:
        gone = one.folder.with_name(f".damaged-{one.folder.name}-{os.getpid()}")
        one.folder.rename(gone)  # a removal that is stopped leaves no half of a stage
        shutil.rmtree(gone)


def store_text(store: Store, now: float | None = None, *, stages: bool = False) -> str:
    """A line a run, or with `stages` a line a stage, and what could go."""
    now = time.time() if now is None else now
    lines = [("run", "age", "size", "stages", "their size")]
    for name, run in store.runs.items():
        needed = [store.stages[stage] for stage in store.needs[name]]
        lines.append((name, age(now, run), size_text([run]), f"{len(needed)}", size_text(needed)))
    if stages:
        lines = [("stage", "age", "size", "needed by")]
        for name, stage in sorted(store.stages.items(), key=lambda item: -item[1].size):
            users = [run for run, needs in store.needs.items() if name in needs]
            lines.append((name, age(now, stage), size_text([stage]), ", ".join(users) or "-"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    free = store.unneeded
    text.append(f"all stages: {len(store.stages)}, {size_text([*store.stages.values()])}")
    if free:
        text.append(
            f"needed by no finished run: {len(free)}, {size_text(free)}; "
            "`klash runs clean` removes them"
        )
    return "\n".join(text)


def size_text(folders: Sequence[Kept]) -> str:
    """`3.1 GB`; a stage that several runs need counts in each."""
    size, units = float(sum(one.size for one in folders)), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if size >= 10 or units[0] == "B" else f"{size:.1f} {units[0]}"


def age(now: float, one: Kept) -> str:
    """Since it was finished."""
    seconds = max(0.0, now - one.changed)
    for length, unit in ((DAY, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
