"""`klash data stats` and `klash data show`: lengths, balance and rows, to look at."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import findings
from benchmarks.data.check import read_all
from shared.config import InputError
from shared.data.chat import Encoder, answer_text
from shared.data.examples import (
    Example,
    Numbered,
    Reading,
    example_of,
    iterate_encoded,
    no_rows_text,
)
from shared.data.rows import DataConfig, Message, Messages
from shared.data.splits import prompt_text, split_of
from shared.models.folders import listed_ends
from shared.models.opening import open_tokenizer
from shared.tasks.own import SIDES

LEVELS = {"min": 0, "median": 50, "p90": 90, "p99": 99, "max": 100}  # percentiles


def statistics(sources: Sequence[str], data: DataConfig) -> dict[str, Any]:
    """Counts, lengths in characters and words, and what tells chosen from rejected, by name."""
    reading = Reading(data, finish=True)
    seen = read_all(sources, reading, model=None, keep_prompts=True)
    report, told = reading.report, seen.giveaways
    if not report.kept:
        raise InputError(no_rows_text(sources, report))
    found = report.as_json()
    prompts = [*seen.prompts.values()]
    lengths = {"prompt": [len(prompt) for prompt in prompts]}
    names = ("desirable", "undesirable") if report.kind == "labels" else ("chosen", "rejected")
    for name, side in zip(names, (seen.better, seen.worse), strict=True):
        if len(side):
            lengths[name] = list(side.lengths)
    found["characters"] = {name: quantiles(values) for name, values in lengths.items()}
    found["values"] = lengths
    if told is not None:
        found["accuracy"] = told._asdict() | {"length": told.length}
    sides = [SIDES[split_of(prompt)] for prompt in prompts]
    found["prompts"] = len(set(prompts))
    found["sides"] = {name: sides.count(name) for name in ("train", "validation", "test")}
    found["labels"] = [finding.observed for finding in findings.of_labels(report)]
    return found


def quantiles(values: Sequence[int]) -> dict[str, float]:
    """Mean and a few quantiles."""
    at = {name: float(np.percentile(values, level)) for name, level in LEVELS.items()}
    return {"mean": round(float(np.mean(values)), 1), **at}


def statistics_text(found: dict[str, Any]) -> str:
    """The statistics as lines for a terminal."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in found["dropped"].items())
    lines = [
        f"format    {found['format']}",
        f"rows      {found['rows']:,} read, {found['kept']:,} kept; dropped: {dropped or 'none'}",
        f"prompts   {found['prompts']:,} different ones",
        "sides     " + ", ".join(f"{name} {count:,}" for name, count in found["sides"].items()),
        "",
        f"{'characters':12}" + "".join(f"{name:>9}" for name in ("mean", *LEVELS)),
    ]
    for name, at in found["characters"].items():
        lines.append(f"{name:12}" + "".join(f"{value:9,.0f}" for value in at.values()))
    if told := found.get("accuracy"):
        lines += [
            "",
            f"the longer answer is chosen in {told['longer_chosen']:.1%} of {told['pairs']:,} "
            "pairs",
            f"length alone is right in {told['length']:.1%}, the first words in "
            f"{told['first_words']:.1%}, the last word in {told['last_words']:.1%}",
        ]
    return "\n".join([*lines, *found["labels"]])


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Histograms of the lengths, as PNG and SVG in `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot write there: {error.strerror}") from error
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    top = max(2, max(max(values, default=0) for values in found["values"].values()))
    bins = np.geomspace(1, top + 1, 50)
    for name, values in found["values"].items():
        axes.hist(np.maximum(values, 1), bins=bins, histtype="step", linewidth=1.6, label=name)  # pyright: ignore
    axes.set(xscale="log", xlabel="characters", ylabel="rows", title=f"{found['kept']:,} rows")
    axes.legend(frameon=False)
    paths = [folder / f"lengths.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return paths


def rows_text(
    sources: Sequence[str], data: DataConfig, count: int, model: Path | None
) -> Iterator[str]:
    """The first `count` rows that are kept, as they are read, or as a model reads them.

    InputError where there is none, or none is asked for.
    """
    if count < 1:
        raise InputError(f"--rows must be 1 or more, found {count}")
    reading = Reading(data, finish=True)
    rows = reading.rows(sources, Path())
    texts = _as_read(rows) if model is None else _as_encoded(rows, reading, model)
    first = next(texts, None)
    if first is None:
        raise InputError(no_rows_text(sources, reading.report))
    yield first
    yield from islice(texts, count - 1)


def _as_read(rows: Iterator[Numbered]) -> Iterator[str]:
    for one in rows:
        prompt = one.row.prompt
        said = prompt if isinstance(prompt, str) else chat_text(prompt)
        first, second = (None if a is None else answer_text(a) for a in one.row[1:3])
        yield _row_text(str(one.where), prompt_text(prompt), said, first, second, one.row.label)


def _as_encoded(rows: Iterator[Numbered], reading: Reading, model: Path) -> Iterator[str]:
    tokenizer = open_tokenizer(model)
    encoder = Encoder(tokenizer, listed_ends(model))
    for one, encoded in iterate_encoded(rows, reading, encoder):
        example: Example = example_of(one, encoded)
        first, second = (
            None if ids is None else f"{tokenizer.decode(ids)}  [{len(ids)} tokens]"
            for ids in (example.chosen_ids, example.rejected_ids)
        )
        said = f"{tokenizer.decode(example.prompt_ids)}  [{len(example.prompt_ids)} tokens]"
        yield _row_text(example.where, example.key, said, first, second, example.label)


def chat_text(messages: Messages) -> str:
    """Messages a line each."""
    return "\n".join(f"{message['role']}: {_said(message)}" for message in messages)


def _said(message: Message) -> str:
    return str(message["content"] or message.get("tool_calls", ""))


def _row_text(
    where: str, key: str, prompt: str, first: str | None, second: str | None, label: bool | None
) -> str:
    name = {None: "chosen" if second is not None else "answer", True: "desirable",
            False: "undesirable"}[label]  # fmt: skip
    parts = [f"--- {where} ({SIDES[split_of(key)]} side)", f"prompt: {prompt}"]
    parts += [f"{name}: {first}"] if first is not None else []
    parts += [f"rejected: {second}"] if second is not None else []
    return "\n".join(parts)
