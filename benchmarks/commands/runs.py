"""The command that looks after what runs leave on disk."""

import sys
import time
from pathlib import Path
from typing import Literal

from benchmarks.entry import Argument
from benchmarks.pipeline.store import DAY, read_store, remove, size_text, store_text
from shared.config import InputError


def runs_command(
    action: Argument[Literal["list", "clean"]] = "list",
    /,
    runs: Path = Path("runs"),
    stages: bool = False,
    days: float = 0.0,
    yes: bool = False,
) -> None:
    """Finished runs, how much room their stages take, and what no finished run needs.

    `clean` removes what no finished run needs, after asking: stages of other settings and older
    code, those of runs that were not finished and of studies among them, and what stopped trainings
    had saved. Whatever is needed again is made again.

    Args:
        action: list, or clean.
        runs: the folder of all runs and of the stages they share.
        stages: list every stage, the largest first.
        days: clean only what is older.
        yes: clean without asking.
    """
    store = read_store(runs)
    if action == "list":
        print(store_text(store, stages=stages))
        return
    old = [one for one in store.unneeded if time.time() - one.changed >= days * DAY]
    if not old:
        print("nothing to remove: every stage is needed by a finished run")
        return
    print(f"needed by no finished run: {len(old)} folders, {size_text(old)}")
    if not yes:
        if not sys.stdin.isatty():
            raise InputError("nobody to ask: say --yes, or first look with `klash runs --stages`")
        if input("Remove them? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return
    remove(store, old)
    print(f"removed {len(old)} folders, {size_text(old)}")
