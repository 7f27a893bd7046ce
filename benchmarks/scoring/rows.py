"""A user's rows for a reward model: what is read, what is left out, and the same rows written."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from shared.config import InputError
from shared.data.examples import Numbered, Reading, no_rows_text, require_answers_alone
from shared.data.rows import DataConfig, Message, Row, Unusable
from shared.models.scorer import Answered, Scorer

CHUNK = 64  # rows that are scored together
TOO_LONG = "over-long"
SAID = {
    "pairs": "a pair",
    "labels": "an answer with a label",
    "answers": "an answer alone",
    "prompts": "a prompt without an answer",
}


@dataclass(frozen=True)
class RowOptions:
    """How the files are read."""

    format: str = "auto"
    """The files' format, one of docs/own-data.md's; `auto` finds it."""
    subset: str | None = None
    """Configuration of a dataset of the hub."""
    split: str | None = None
    """Split of a dataset of the hub or of a folder laid out like one, such as `train`."""
    chat: Literal["as-is", "messages"] = "as-is"
    """`messages` makes a text prompt the user's message, for the models' chat templates."""
    rated: Literal["best-worst", "all", "margin"] = "best-worst"
    """Which pairs n rated answers of one prompt make."""
    rating_margin: float = 0.0
    """Least difference of two ratings."""
    max_bad_rows: int = 0
    """Most rows that cannot be read before reading stops."""

    def config(self) -> DataConfig:
        """As the reader takes them."""
        if self.rating_margin < 0 or self.max_bad_rows < 0:
            raise InputError("--rating-margin and --max-bad-rows cannot be below 0")
        if self.rated == "margin" and self.rating_margin == 0:
            raise InputError("--rated margin needs a --rating-margin above 0")
        return DataConfig(
            format=self.format,
            subset=self.subset,
            split=self.split,
            chat=self.chat,
            rated=self.rated,
            margin=self.rating_margin,
            max_bad_rows=self.max_bad_rows,
        )


@dataclass(frozen=True)
class Rows:
    """The rows of some files that stay, known from a first pass; `reading.report` counts on.

    Files are read twice: what a later row contradicts, and how many rows there are, is known before
    a model is loaded, and no row is held.
    """

    sources: tuple[str, ...]
    reading: Reading
    count: int
    kind: str  # pairs, labels or answers

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, list[Numbered]]]:
        """(chunk number, its rows): the same row is in the same chunk in each pass."""
        again = Reading(self.reading.data, finish=True)
        rows = again.rows(self.sources, Path())
        for chunk, found in groupby(rows, lambda one: one.number // size):
            staying = [one for one in found if one.number not in self.reading.gone]
            if staying:
                yield chunk, staying


def survey(sources: Sequence[str], data: DataConfig, kinds: Sequence[str]) -> Rows:
    """Read all rows once; InputError where they cannot be used, or are none of `kinds`."""
    reading = Reading(data)
    for one in reading.rows(sources, Path()):
        if one.row.kind not in kinds:
            raise InputError(
                f"{one.where}: {SAID[one.row.kind]}; this command reads {', '.join(kinds)}"
            )
    if not reading.report.kept:
        raise InputError(no_rows_text(sources, reading.report))
    require_answers_alone(sources, reading.report)
    return Rows(tuple(sources), reading, reading.report.kept, reading.report.kind)


def in_trl_form(row: Row) -> dict[str, Any]:
    """The row as TRL's trainers read it: texts, or lists of messages; tools as their JSON."""
    names = ("chosen", "rejected") if row.rejected is not None else ("completion",)
    found: dict[str, Any] = {"prompt": row.prompt}
    for name, answer in zip(names, (row.chosen, row.rejected), strict=False):
        found[name] = answer if isinstance(answer, str) else [answer]
    if row.label is not None:
        found["label"] = row.label
    if row.tools:
        found["tools"] = json.dumps(row.tools, ensure_ascii=False)
    if row.template:
        found["chat_template_kwargs"] = row.template
    return found


def answered(row: Row, answer: str | Message, *, ended: bool = True) -> Answered:
    """One answer to the row's prompt."""
    return Answered(row.prompt, answer, ended, row.tools, row.template)


class Unscored(NamedTuple):
    """Why a row has no score."""

    reason: str
    said: str


def row_inputs(scorer: Scorer, rows: Sequence[Answered]) -> list[dict[str, list[int]]] | Unscored:
    """The reward model's inputs for all answers of one row, or why it cannot read them."""
    try:
        found = [scorer.inputs(row) for row in rows]
    except Unusable as fault:
        return Unscored(fault.reason, str(fault))
    longest = max(len(one["input_ids"]) for one in found)
    if scorer.room and longest > scorer.room:
        said = f"{longest} tokens of the reward model's, which reads {scorer.room}"
        return Unscored(TOO_LONG, said)
    return found


NOT_FINITE = Unscored("not-finite", "the reward model's score is not a number")
