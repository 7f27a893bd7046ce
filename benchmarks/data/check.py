"""`klash data check`: which of a user's rows can be used, and what they teach."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks.data import findings
from benchmarks.data.giveaways import Accuracies, Answers, accuracies, count_sides
from benchmarks.doctor.finding import Finding, finding_text, make_finding
from shared.config import InputError
from shared.data.chat import Encoded, Encoder, answer_text
from shared.data.cleaning import Dropped
from shared.data.examples import Numbered, Reading, iterate_encoded
from shared.data.rows import DataConfig
from shared.data.splits import near_duplicates, prompt_text, split_of
from shared.models.folders import listed_ends, places_known
from shared.models.opening import open_tokenizer
from shared.tasks.own import SIDES


@dataclass(frozen=True)
class Asked:
    """What is checked, beside the rows themselves."""

    model: Path | None = None
    """A transformers folder: rows are rendered and encoded by its tokenizer as well."""
    json: Path | None = None
    """File for the counts."""
    dropped: Path | None = None
    """File for what was dropped: a JSON object a line, of file, line and reason."""
    near_duplicates: bool = False
    """Look for prompts of different sides (train, validation, test) that are nearly the same."""
    judge_share: float = 0.0
    """Share of prompts that are kept for a judge, a side of its own in `near_duplicates`."""


@dataclass
class Seen:
    """What is counted while rows pass. `better` and `worse` line up for pairs."""

    better: Answers = field(default_factory=Answers)
    worse: Answers = field(default_factory=Answers)
    prompts: dict[int, str] = field(default_factory=dict)  # by the row's number
    context: int | None = None  # places that the model knows
    too_long: set[int] = field(default_factory=set)  # rows
    seconds: float = 0.0

    def add(self, one: Numbered, encoded: Encoded | None, keep_prompts: bool) -> None:
        """Count one row that stays."""
        row = one.row
        if row.chosen is not None:
            rejected = None if row.rejected is None else answer_text(row.rejected)
            sides = answer_text(row.chosen), rejected, row.label
            count_sides(self.better, self.worse, *sides, one.number)
        if keep_prompts:
            self.prompts[one.number] = prompt_text(row.prompt)
        if encoded is not None and self.context is not None:
            longest = max(len(encoded.chosen_ids), len(encoded.rejected_ids or ()))
            if len(encoded.prompt_ids) + longest > self.context:
                self.too_long.add(one.number)

    def leave_out(self, gone: set[int]) -> None:
        """Forget rows that passed and were dropped later."""
        self.better, self.worse = self.better.without(gone), self.worse.without(gone)
        self.prompts = {n: prompt for n, prompt in self.prompts.items() if n not in gone}
        self.too_long -= gone

    @property
    def giveaways(self) -> Accuracies | None:
        """What length and a few words alone tell."""
        return accuracies(self.better, self.worse)


def check(sources: Sequence[str], data: DataConfig, asked: Asked) -> bool:
    """Print each finding and the counts; True if the rows can be used.

    Raises InputError for what cannot be read at all.
    """
    with ExitStack() as files:
        drops = _open(asked.dropped, files)

        def write(dropped: Dropped) -> None:
            if drops is not None:
                drops.write(dropped.as_json() + "\n")

        reading = Reading(data, finish=True, on_drop=write)
        seen = read_all(sources, reading, asked.model, keep_prompts=asked.near_duplicates)
    found = list(all_findings(reading, seen, asked))
    for finding in found:
        print(finding_text(finding))
    passed = not any(finding.fix for finding in found) and reading.report.kept > 0
    counts = reading.report.as_json() | {
        "findings": [finding._asdict() for finding in found],
        "rows_per_second": round(reading.report.read / max(seen.seconds, 1e-9), 1),
    }
    if asked.json is not None:
        write_json(asked.json, counts)
    print(json.dumps({key: counts[key] for key in ("rows", "kept", "dropped", "format")}))
    return passed


def _open(path: Path | None, files: ExitStack) -> TextIO | None:
    if path is None:
        return None
    try:
        return files.enter_context(path.open("w", encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot write it: {error.strerror}") from error


def write_json(path: Path, value: Any) -> None:
    """`value` as a file."""
    try:
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot write it: {error.strerror}") from error


def read_all(
    sources: Sequence[str], reading: Reading, model: Path | None, keep_prompts: bool = False
) -> Seen:
    """Read every row once, through the model's tokenizer if there is one, and count."""
    seen = Seen()
    rows = _encoded(reading.rows(sources, Path()), reading, model, seen)
    started = time.perf_counter()  # the tokenizer is there
    for one, encoded in rows:
        seen.add(one, encoded, keep_prompts)
    seen.leave_out(reading.gone)
    seen.seconds = time.perf_counter() - started
    return seen


def _encoded(
    rows: Iterator[Numbered], reading: Reading, model: Path | None, seen: Seen
) -> Iterator[tuple[Numbered, Encoded | None]]:
    if model is None:
        return ((one, None) for one in rows)
    tokenizer = open_tokenizer(model)
    seen.context = places_known(model)
    return iterate_encoded(rows, reading, Encoder(tokenizer, listed_ends(model)))


def all_findings(reading: Reading, seen: Seen, asked: Asked) -> Iterator[Finding]:
    """What there is to say of the rows that were read."""
    report = reading.report
    yield from findings.of_rows(report, reading.data.max_bad_rows)
    yield from findings.of_labels(report)
    yield from findings.of_giveaways(seen.giveaways)
    if repeated := report.notes["repeated prompts"]:
        yield Finding("repeated prompts", f"{repeated} rows have the prompt of an earlier one")
    if asked.model is not None:
        yield from findings.of_tokens(report)
        yield make_finding(
            "lengths",
            not seen.too_long,
            f"{len(seen.too_long)} of {report.kept} rows are longer than the model's "
            f"{seen.context} tokens",
            "drop them: max_prompt_tokens and max_completion_tokens",
        )
        rate = report.read / max(seen.seconds, 1e-9)
        yield Finding("speed", f"{rate:,.0f} rows/s, {report.tokens:,} tokens of answers")
    if asked.near_duplicates:
        yield of_near_duplicates([*seen.prompts.values()], asked.judge_share)


def of_near_duplicates(prompts: Sequence[str], judge_share: float) -> Finding:
    """How many prompts stand on another side in nearly the same words."""
    sides = [SIDES[split_of(prompt, judge_share)] for prompt in prompts]
    pairs = near_duplicates(prompts, sides)
    first = ""
    if pairs:
        one, other = (prompts[n].strip()[:60] for n in pairs[0][:2])
        first = f", such as {one!r} and {other!r}"
    return Finding("near duplicates", f"{len(pairs)} pairs of prompts across sides{first}")
