"""How a command starts and ends: the keys it changes on the command line, and its exit code."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, TypeVar

import tyro

from benchmarks.pipeline.experiment import Experiment
from shared.config import InputError
from shared.generation.engine import EngineLost, StaleEngine
from shared.training.fit import Diverged

T = TypeVar("T")
Argument = Annotated[T, tyro.conf.Positional]  # given without a `--name`
Overrides = Annotated[tuple[str, ...], tyro.conf.Suppress]  # keys of the experiment, as they came


@contextmanager
def exit_codes(command: str) -> Iterator[None]:
    """0 done, 1 a check failed or a guard stopped the run, 2 the input is wrong, 130 interrupted.

    What the user can mend, or a guard stopped, is one line on standard error, not a traceback.
    """
    try:
        yield
    except InputError as error:
        print(f"{command}: {error}", file=sys.stderr)
        sys.exit(2)
    except (Diverged, EngineLost, StaleEngine) as error:
        print(f"{command}: stopped: {error}", file=sys.stderr)
        sys.exit(1)


def split_overrides(
    words: Sequence[str], own_flags: Sequence[str]
) -> tuple[list[str], tuple[str, ...]]:
    """(the command's own words, the experiment's keys and values among them).

    A key is `--section.key`, or `--key` of the experiment itself; what is in `own_flags` is not.
    """
    own: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, _ = word.removeprefix("--").partition("=")
        field = key.replace("-", "_")
        is_key = "." in key or (field in Experiment.model_fields and field not in own_flags)
        if not (word.startswith("--") and is_key):
            own.append(word)
            continue
        overrides.append(word)
        if not equals and rest:
            overrides.append(rest.pop(0))
    return own, tuple(overrides)
