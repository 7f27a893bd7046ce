"""How a command starts and ends: the keys it changes on the command line, and its exit code.

This module imports only what is quick to import, so that Ctrl-C is one line from the start.
"""

import errno
import itertools
import os
import select
import shutil
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from shared.config import InputError

T = TypeVar("T")
Argument = Annotated[T, tyro.conf.Positional]  # given without a `--name`
Overrides = Annotated[tuple[str, ...], tyro.conf.Suppress]  # keys of the experiment, as they came
DISK_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))


@dataclass
class ExitCodes:
    """0 done, 1 a check failed or a guard stopped the run, 2 the input is wrong, 130 interrupted,
    141 nobody reads what is printed.

    What the user can mend, or a guard stopped, is one line on standard error, not a traceback. Any
    other error goes its way. `runs`: the folder that a full disk is looked for in.
    """

    command: str
    runs: Path = Path("runs")

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if nobody_reads(error):
            sys.exit(141)  # as a shell has it of a program that SIGPIPE ended
        if isinstance(error, KeyboardInterrupt):
            code, text = 130, "interrupted; what was finished is kept: the same command goes on"
        elif isinstance(error, InputError):
            code, text = 2, str(error)
        elif isinstance(error, Exception) and is_disk_full(error):
            folder = full_folder(error, self.runs)
            code, text = 1, f"stopped: the disk of {folder} is full: free some space"
        elif isinstance(error, Exception) and isinstance(error, guards()):
            code, text = 1, f"stopped: {error}"
        else:
            return
        rank = os.environ.get("RANK", "0")  # torchrun's
        name = self.command if rank == "0" else f"{self.command}, rank {rank}"
        print(f"{name}: {text}", file=sys.stderr)
        sys.exit(code)


def nobody_reads(error: BaseException | None) -> bool:
    """Whether what is printed has lost its reader, as in `klash plan | head`; it goes nowhere then.

    `error`: what a command ended with; a broken pipe may be one to a worker.
    """
    if error is not None and not isinstance(error, BrokenPipeError):
        return False
    try:
        sys.stdout.flush()
        if error is None or not has_no_reader(sys.stdout.fileno()):
            return False
    except BrokenPipeError:
        pass
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def has_no_reader(descriptor: int) -> bool:
    """Whether the other end of a pipe is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def guards() -> tuple[type[Exception], ...]:
    """Errors with which a run stops itself."""
    from shared.generation.engine import EngineLost, StaleEngine
    from shared.training.fit import Diverged

    return Diverged, EngineLost, StaleEngine


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space; libraries in Rust have no OSError for it."""
    texts = [str(found) for found in (error, error.__cause__) if found is not None]
    return any(reason in text for reason in DISK_FULL for text in texts)


def full_folder(error: BaseException, runs: Path) -> Path:
    """Where space is missing: beside the file that could not be written, if the error names one,
    else the folder of runs or of temporary files, whichever disk has less left.
    """
    files = [getattr(found, "filename", None) for found in (error, error.__cause__)]
    named = [Path(file).parent for file in files if isinstance(file, str)]
    folders = [existing(path) for path in named or (runs, Path(tempfile.gettempdir()))]
    return min(folders, key=lambda folder: shutil.disk_usage(folder).free)


def existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that is there: what a stage began is cleared away."""
    return next(path for path in (folder, *folder.parents, Path()) if path.is_dir())


def runs_folder(words: Sequence[str]) -> Path:
    """What `--runs` says on the command line, or else the folder that all commands take."""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        if option == "--runs" and (value or following):
            return Path(value if equals else following)
    return Path("runs")


def split_overrides(
    words: Sequence[str], own_flags: Collection[str], keys: Collection[str]
) -> tuple[list[str], tuple[str, ...]]:
    """(the command's own words, the keys and values that it changes in a file).

    A key is `--section.key`, or `--key` for one of `keys` that is not in `own_flags`.
    """
    own: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, _ = word.removeprefix("--").partition("=")
        field = key.replace("-", "_")
        is_key = "." in key or (field in keys and field not in own_flags)
        if not (word.startswith("--") and is_key):
            own.append(word)
            continue
        overrides.append(word)
        if not equals and rest:
            overrides.append(rest.pop(0))
    return own, tuple(overrides)
