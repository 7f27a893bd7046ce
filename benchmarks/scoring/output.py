"""Files that appear whole, and what a long pass over rows shows while it runs."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shared.config import InputError

SAY = 15.0  # seconds between two lines where there is no terminal


def require_rows_file(path: Path, sources: Sequence[str]) -> None:
    """InputError if JSON lines cannot be written to `path`, or it is among the files read."""
    if path.suffix not in (".jsonl", ".json"):
        raise InputError(f"{path}: what is written is JSON lines; name it .jsonl")
    require_writable(path)
    for source in map(Path, sources):
        if source.resolve() == path.resolve():
            raise InputError(f"{path}: is what is read; name another file to write")
        if source.is_dir() and path.resolve().is_relative_to(source.resolve()):
            raise InputError(
                f"{path}: lies in {source}, which is read, so that it would be read the next time; "
                "write it elsewhere"
            )


def require_writable(path: Path) -> None:
    """InputError, before work starts, if a file cannot be made at `path`."""
    if path.is_dir():
        raise InputError(f"{path}: a folder, where a file is to be written")
    if not path.parent.is_dir():
        raise InputError(f"{path}: no such folder ({path.parent})")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: no permission to write into {path.parent}")


@contextlib.contextmanager
def appear_whole(paths: Sequence[Path]) -> Iterator[Sequence[TextIO]]:
    """Files to write, each of which takes its name in one rename at the end, the first one last.

    Whatever goes wrong before leaves none, and what was there as it was.
    """
    unfinished = [path.with_name(f".{path.name}.{os.getpid()}") for path in paths]
    with contextlib.ExitStack() as stack:
        for path in unfinished:
            stack.callback(path.unlink, missing_ok=True)
        files = [stack.enter_context(path.open("w", encoding="utf-8")) for path in unfinished]
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        for source, target in reversed([*zip(unfinished, paths, strict=True)]):
            source.replace(target)


class Pace:
    """How many rows a second were done, without those that were there before."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Count from now on: what was done before, such as loading models, is not work on rows."""
        self.started, self.rows = time.monotonic(), 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / max(self.seconds, 1e-9)


Done = Callable[[int, bool], None]  # rows that are done now, and whether they were computed


@contextlib.contextmanager
def counted(what: str, total: int, pace: Pace) -> Iterator[Done]:
    """Progress of `total` rows: a bar with the time left on a terminal, lines elsewhere."""
    shown = _bar if sys.stdout.isatty() else _lines
    with shown(what, total, pace) as done:
        yield done


@contextlib.contextmanager
def _bar(what: str, total: int, pace: Pace) -> Iterator[Done]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console()) as bar:
        task = bar.add_task(what, total=total)

        def done(rows: int, computed: bool = True) -> None:
            pace.rows += rows * computed
            bar.update(task, description=f"{what}, {pace.rate:,.1f} rows/s", advance=rows)

        yield done


@contextlib.contextmanager
def _lines(what: str, total: int, pace: Pace) -> Iterator[Done]:
    so_far, said = 0, time.monotonic()

    def done(rows: int, computed: bool = True) -> None:
        nonlocal so_far, said
        pace.rows += rows * computed
        so_far += rows
        if time.monotonic() - said >= SAY:
            said = time.monotonic()
            left = duration((total - so_far) / pace.rate) if pace.rows else "?"
            print(
                f"{what}: {so_far:,} of {total:,} rows, {pace.rate:,.1f} rows/s, {left} left",
                flush=True,
            )

    yield done


def duration(seconds: float) -> str:
    """`0:42`, `1:03:20`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
