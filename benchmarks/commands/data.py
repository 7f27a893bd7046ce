"""`klash data`: what is in a user's files. Each command imports its own part when it runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.data.check import Asked
from benchmarks.entry import Argument
from shared.data.rows import DataConfig

ASKED, AS_FOUND = Asked(), DataConfig()
Flat = tyro.conf.arg(name="")  # its fields are flags of the command itself


def check(
    data: Argument[tuple[str, ...]],
    /,
    asked: Annotated[Asked, Flat] = ASKED,
    reading: Annotated[DataConfig, Flat] = AS_FOUND,
) -> bool:
    """What of a file can be used: rows read, kept, and dropped by reason; 1 if a finding fails.

    Args:
        data: files, folders or datasets of the hub.
        asked: what is checked.
        reading: how rows are read.
    """
    from benchmarks.data.check import check as check_rows

    return check_rows(data, reading, asked)


def stats(
    data: Argument[tuple[str, ...]],
    /,
    out: Path | None = None,
    reading: Annotated[DataConfig, Flat] = AS_FOUND,
) -> None:
    """Lengths, how often the longer answer is chosen, balance of labels, and splits.

    Args:
        data: files, folders or datasets of the hub.
        out: a folder for stats.json and the plots, as PNG and SVG.
        reading: how rows are read.
    """
    from benchmarks.data.check import write_json
    from benchmarks.data.stats import draw, statistics, statistics_text

    found = statistics(data, reading)
    print(statistics_text(found))
    if out is not None:
        paths = draw(found, out)
        write_json(out / "stats.json", {key: found[key] for key in found if key != "values"})
        print(f"\n{', '.join(map(str, paths))}")


def show(
    data: Argument[tuple[str, ...]],
    /,
    rows: int = 3,
    model: Path | None = None,
    reading: Annotated[DataConfig, Flat] = AS_FOUND,
) -> None:
    """The first rows as they are read.

    Args:
        data: files, folders or datasets of the hub.
        rows: how many.
        model: a transformers folder: rows as this model reads them.
        reading: how rows are read.
    """
    from benchmarks.data.stats import rows_text

    for text in rows_text(data, reading, rows, model):
        print(text + "\n")


def data_commands() -> dict[str, Callable[..., bool | None]]:
    """The commands below `klash data` by name."""
    return {"check": check, "show": show, "stats": stats}


def data(name: Argument[str]) -> None:
    """What is in a file of preferences; `klash data check|stats|show --help` say more.

    Args:
        name: check, stats or show.
    """
