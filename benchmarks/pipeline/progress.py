"""What a run shows while it runs: each stage once, and how training goes in those under way.

A trainer writes a line of `log.jsonl` at every step, in whichever process it runs: the last line of
each unfinished stage is what is shown here.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shared.models import ranks
from shared.stages import silent
from shared.training.finished import LOG

LOOK, SAY = 0.5, 15.0  # seconds between looks at the logs; between lines about one stage
TAIL = 2**14  # bytes, more than a line of a log has
SHOWN = {  # the first of these that a line holds, and what it is called on screen
    "loss": ("loss", "loss/policy_avg"),
    "KL": ("objective/kl",),
    "score": ("objective/scores",),
    "accuracy": ("rewards/accuracies", "accuracy"),
    "margin": ("rewards/margins", "margin"),
}


@contextlib.contextmanager
def progress(root: Path, labels: Mapping[str, str]) -> Iterator[Callable[[str, str, float], None]]:
    """A bar with the time left on a terminal, plain lines elsewhere.

    `labels`: of every stage below `root` that will be reported, by its key.
    """
    if not ranks.is_first():
        yield silent
        return
    shown = _bar if sys.stdout.isatty() else _lines
    with shown(len(labels)) as (say, tell), _watching(root, labels, tell):
        yield say


Say = Callable[[str, str, float], None]
Tell = Callable[[str, str], None]  # a stage's label, and how its training goes


@contextlib.contextmanager
def _lines(total: int) -> Iterator[tuple[Say, Tell]]:
    seen: set[str] = set()
    last: dict[str, float] = {}

    def say(label: str, state: str, seconds: float) -> None:
        if state == "running":
            last[label] = time.monotonic()
        elif label not in seen:
            seen.add(label)
            spent = f" in {seconds:.1f} s" if state == "done" else ""
            print(f"[{len(seen)}/{total}] {label}: {state}{spent}", flush=True)

    def tell(label: str, text: str) -> None:
        now = time.monotonic()
        if label not in seen and now - last.setdefault(label, now) >= SAY:
            last[label] = now
            print(f"      {label}: {text}", flush=True)

    yield say, tell


@contextlib.contextmanager
def _bar(total: int) -> Iterator[tuple[Say, Tell]]:
    seen: set[str] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console()) as bar:
        task = bar.add_task("start", total=total)

        def say(label: str, state: str, seconds: float) -> None:
            if state == "running":
                bar.update(task, description=label)
            elif label not in seen:
                seen.add(label)
                bar.advance(task)

        def tell(label: str, text: str) -> None:
            if label not in seen:
                bar.update(task, description=f"{label}: {text}")

        yield say, tell


@contextlib.contextmanager
def _watching(root: Path, labels: Mapping[str, str], tell: Tell) -> Iterator[None]:
    """Within it a thread tells of each new line of the logs below `root`."""
    ended = Event()

    def watch() -> None:
        shown: dict[Path, dict[str, Any]] = {}
        while not ended.wait(LOOK):
            for log in root.glob(f".unfinished-*/{LOG}"):
                key = log.parent.name.removeprefix(".unfinished-").rpartition("-")[0]
                row = last_row(log)
                if row is not None and key in labels and shown.get(log) != row:
                    shown[log] = row
                    tell(labels[key], text_of(row))

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def last_row(log: Path) -> dict[str, Any] | None:
    """The last whole line of a log; None if there is none, or the stage has just ended."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1]) if lines else None
    except FileNotFoundError:
        return None


def text_of(row: Mapping[str, Any]) -> str:
    """`step 12 of 40, loss 0.312, KL 1.20, score 0.84`"""
    found = {
        word: next((row[name] for name in names if name in row), None)
        for word, names in SHOWN.items()
    }
    numbers = [f"{word} {value:.3g}" for word, value in found.items() if value is not None]
    return ", ".join([f"step {row['step']} of {row['of']}", *numbers])
