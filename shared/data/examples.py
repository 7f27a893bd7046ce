"""A user's files -> clean, encoded examples, and a report of what became of every row.

    sources -> raw rows -> rows of a format -> cleaned -> encoded -> cleaned again

`Reading.rows` is the first half, without a tokenizer and without holding rows; `read_examples` all.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from shared.config import InputError
from shared.data.chat import Encoded, Encoder, Rendered, answer_text
from shared.data.cleaning import REASONS, Cleaner, Dropped, Report, places_text
from shared.data.formats import find_format, fits, format_named, read_row, unread_keys
from shared.data.rows import DataConfig, Messages, Place, Row, Unreadable, Unusable
from shared.data.sources import Raw, iterate_raw
from shared.data.splits import prompt_text


class Example(NamedTuple):
    """One row as the methods use it.

    Of a pair `label` is None; of an answer with a label `chosen` is the answer and `rejected` None;
    of an answer alone both `rejected` and `label` are None, of a prompt alone there is no answer.
    Answers hold their EOS, unless they were cut.
    """

    where: str
    prompt: str  # what the model reads, special tokens rendered
    prompt_messages: Messages | None  # None of a text
    prompt_ids: list[int]
    chosen: str  # what the answer says, without special tokens
    chosen_ids: list[int]
    rejected: str | None
    rejected_ids: list[int] | None
    label: bool | None

    @property
    def key(self) -> str:
        """The prompt's text whatever the template: what `split_of` takes."""
        return prompt_text(self.prompt if self.prompt_messages is None else self.prompt_messages)


class Numbered(NamedTuple):
    """A row that passed, by the number under which the cleaner knows it."""

    number: int
    where: Place
    row: Row


REPEATED = "prompt-repeated"  # note of a row whose answers, as texts, begin with their prompt
OnDrop = Callable[[Dropped], object]


def repeats_prompt(row: Row) -> bool:
    """Whether every answer begins with the prompt's text, so that it would be read twice."""
    answers = [answer for answer in (row.chosen, row.rejected) if answer is not None]
    begin = row.prompt.strip() if isinstance(row.prompt, str) else ""
    texts = [answer.lstrip() for answer in answers if isinstance(answer, str)]
    return bool(begin and texts) and all(text.startswith(begin) for text in texts)


def ignore(dropped: Dropped) -> None:
    """For readers who do not ask what was dropped."""


class Reading:
    """One pass over the rows of some sources: its report, and which rows went after they passed.

    `finish` goes on after rows that cannot be read, however many; `on_drop` sees each dropped row.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        finish: bool = False,
        on_drop: OnDrop = ignore,
    ):
        self.data, self.finish, self.on_drop = data, finish, on_drop
        self.report, self.cleaner = Report(), Cleaner()
        self.gone: set[int] = set()  # numbers of rows that were dropped after they passed
        self.formats: list[str] = []
        self.first_fault = ""
        self._file, self._format, self._kind = "", "", ""

    def rows(self, sources: Sequence[str], beside: Path) -> Iterator[Numbered]:
        """Rows that pass, one by one; some go later (`gone`), when another contradicts them."""
        passed = 0
        for raw in iterate_raw(sources, beside, self.data):
            try:
                found = self._rows_of(raw)
            except Unreadable as fault:
                self.report.read += 1
                self._unreadable(raw.where, str(fault))
                continue
            except Unusable as fault:
                self.report.read += 1
                self.drop(raw.where, fault.reason, str(fault))
                continue
            self.report.read += len(found)
            for row in found:
                if self._stays(passed, raw.where, row):
                    yield Numbered(passed, raw.where, row)
                    passed += 1
        if not self.formats:
            said = self.first_fault or f"{', '.join(sources)}: no rows"
            raise InputError(said)
        self.report.format = " + ".join(self.formats)
        self.report.note("repeated prompts", count=self._repeated())

    def _repeated(self) -> int:
        return max(0, self.cleaner.passed - len(self.cleaner.prompts))

    def _rows_of(self, raw: Raw) -> list[Row]:
        """A raw row in its file's format; the first row of a file says which."""
        if raw.fault:
            raise Unreadable(raw.fault)
        if raw.where.file != self._file or not self._format:
            self._file, self._format = raw.where.file, ""
            named = self.data.format != "auto"
            self._format = format_named(self.data.format) if named else find_format(raw.value)
            if self._format not in self.formats:
                self.formats.append(self._format)
        elif self.data.format == "auto" and not fits(self._format, raw.value):
            self._check_same_format(raw)
        found = read_row(self._format, raw.value, self.data)
        kind = f"{found[0].kind} of {'texts' if isinstance(found[0].prompt, str) else 'chats'}"
        if self._kind and kind != self._kind:
            raise Unreadable(f"{kind}, where the rows before it are {self._kind}")
        self._kind, self.report.kind = kind, found[0].kind
        self.report.chats = not isinstance(found[0].prompt, str)
        for key in unread_keys(self._format, raw.value):
            self.report.note(f"column not read: {key}", raw.where)
        return found

    def _check_same_format(self, raw: Raw) -> None:
        """A row that lacks the format's keys may be in another format: say which."""
        try:
            other = find_format(raw.value)
        except Unreadable:
            return  # `read_row` says what is missing
        if other != self._format and {self._format, other} != {"hh-rlhf", "implicit-pairs"}:
            raise Unreadable(f"in the format {other}, where the rows before it are {self._format}")

    def _stays(self, number: int, where: Place, row: Row) -> bool:
        reason, earlier = self.cleaner.judge(number, where, row)
        if earlier is not None and earlier[0] not in self.gone:
            self.gone.add(earlier[0])
            self.report.kept -= 1
            self._count_label(earlier[1], not row.label if row.label is not None else None, -1)
            self.drop(earlier[1], "contradiction")
        if reason:
            self.drop(where, reason)
            return False
        self.report.kept += 1
        self._count_label(where, row.label, 1)
        if repeats_prompt(row):
            self.report.note(REPEATED, where)
        return True

    def _count_label(self, where: Place, label: bool | None, by: int) -> None:
        if label is not None:
            self.report.desirable += by * label
            self.report.undesirable += by * (not label)

    def drop_passed(self, passed: Numbered, reason: str, said: str = "") -> None:
        """Drop a row that had passed, for what its tokens are."""
        self.gone.add(passed.number)
        self.report.kept -= 1
        self._count_label(passed.where, passed.row.label, -1)
        self.drop(passed.where, reason, said)

    def drop(self, where: Place, reason: str, said: str = "") -> None:
        """Count a row that goes, and show it to whoever asked."""
        self.report.said.setdefault(reason, said)
        self.on_drop(self.report.drop(Dropped(where, reason, said)))

    def _unreadable(self, where: Place, said: str) -> None:
        self.first_fault = self.first_fault or f"{where}: {said}"
        self.drop(where, "undecodable", said)
        if not self.finish and self.report.dropped["undecodable"] > self.data.max_bad_rows:
            most = f" (max_bad_rows = {self.data.max_bad_rows})" if self.data.max_bad_rows else ""
            raise InputError(f"{where}: {said}{most}")


class Room(NamedTuple):
    """How many tokens a model has places for, and how many it may answer with."""

    places: int
    most_sampled: int

    def lacks(self, row: Encoded) -> bool:
        """Whether a row's answers, or the longest that is sampled, end behind the last place."""
        longest = max(len(row.chosen_ids), len(row.rejected_ids or ()), self.most_sampled)
        return len(row.prompt_ids) + longest > self.places


BATCH = 256  # rows that are encoded together
MOST_REPEATED = 0.5  # share of rows whose answers may repeat their prompt, as an echo


def iterate_encoded(
    rows: Iterator[Numbered], reading: Reading, encoder: Encoder, room: Room | None = None
) -> Iterator[tuple[Numbered, Encoded]]:
    """Rows with their token ids, without those that teach nothing once encoded and cut, and those
    that find no `room`.
    """
    while batch := list(islice(rows, BATCH)):
        rendered: list[tuple[Numbered, Rendered]] = []
        for one in batch:
            if one.number in reading.gone:
                continue
            try:
                rendered.append((one, encoder.render(one.row)))
            except Unusable as fault:
                reading.drop_passed(one, fault.reason, str(fault))
        found = encoder.encode([one.row for one, _ in rendered], [text for _, text in rendered])
        for (one, _), encoded in zip(rendered, found, strict=True):
            fitted, reason = fit(encoded, reading.data, answered=one.row.chosen is not None)
            said = ""
            if not reason and room is not None and room.lacks(fitted):
                reason, said = "over-long", f"longer than the model's {room.places} tokens"
            if reason:
                reading.drop_passed(one, reason, said)
                continue
            for note in fitted.notes:
                reading.report.note(note, one.where)
            answers = [*fitted.chosen_ids, *(fitted.rejected_ids or ())]
            reading.report.tokens += len(answers)
            reading.report.prompt_tokens += len(fitted.prompt_ids)
            if encoder.unknown is not None:
                reading.report.unknown_tokens += answers.count(encoder.unknown)
                reading.report.unknown_in_prompts += fitted.prompt_ids.count(encoder.unknown)
            yield one, fitted


def fit(encoded: Encoded, data: DataConfig, *, answered: bool) -> tuple[Encoded, str]:
    """(the row within the limits of length, the reason for which it goes, if it does).

    `answered`: the row is no prompt alone, so that its answer must have tokens.
    """
    sides = [ids for ids in (encoded.chosen_ids, encoded.rejected_ids) if ids is not None]
    if data.max_prompt_tokens is not None and len(encoded.prompt_ids) > data.max_prompt_tokens:
        return encoded, "over-long"
    most = data.max_completion_tokens
    if most is not None and any(len(ids) > most for ids in sides):
        if data.over_long == "drop":
            return encoded, "over-long"
        sides = [ids[:most] for ids in sides]
        chosen, rejected = [*sides, None][:2]
        notes = tuple(sorted({*encoded.notes, "cut"}))
        encoded = encoded._replace(chosen_ids=chosen, rejected_ids=rejected, notes=notes)
    no_answer = answered and not encoded.chosen_ids
    if not encoded.prompt_ids or no_answer or encoded.rejected_ids == []:
        return encoded, "empty"
    if encoded.rejected_ids is not None and encoded.chosen_ids == encoded.rejected_ids:
        return encoded, "identical"
    return encoded, ""


def read_examples(
    sources: Sequence[str],
    beside: Path,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    ends: frozenset[int],
    on_drop: OnDrop = ignore,
    room: Room | None = None,
) -> tuple[list[Example], Report]:
    """All rows of `sources` that pass, encoded, and what became of the others.

    `ends` are the ids that end an answer, beside the tokenizer's EOS; `on_drop` sees each row that
    is dropped, one for which the model has no `room` too. Raises InputError for what cannot be
    read. What is left may be nothing, or end with nothing: `require_usable` is for who trains on
    it.
    """
    reading = Reading(data, on_drop=on_drop)
    rows = reading.rows(sources, beside)
    found = [
        (one.number, example_of(one, encoded))
        for one, encoded in iterate_encoded(rows, reading, Encoder(tokenizer, ends), room)
    ]
    examples = [example for number, example in found if number not in reading.gone]
    return examples, reading.report


def require_usable(sources: Sequence[str], report: Report) -> None:
    """InputError where no row is left, or no answer ends with a token that ends one."""
    if not report.kept:
        raise InputError(no_rows_text(sources, report))
    require_answers_alone(sources, report)
    if report.notes["without-end"] == report.kept > report.notes["cut"]:
        raise InputError(
            f"{', '.join(sources)}: no answer ends with a token that ends one: the chat template "
            "must end an answer with the tokenizer's eos_token, or one that generation_config lists"
        )


def require_answers_alone(sources: Sequence[str], report: Report) -> None:
    """InputError where most answers repeat their prompt, which would be read twice."""
    if report.notes[REPEATED] > MOST_REPEATED * report.kept:
        raise InputError(
            f"{', '.join(sources)}: the answers of {report.notes[REPEATED]} of {report.kept} rows "
            f"repeat the prompt ({places_text(report.places[REPEATED])}): take it out of them, or "
            "leave `prompt` out: what both sides begin with is the prompt then"
        )


def example_of(one: Numbered, encoded: Encoded) -> Example:
    """An example out of a row and its tokens."""
    row = one.row
    return Example(
        where=str(one.where),
        prompt=encoded.prompt,
        prompt_messages=None if isinstance(row.prompt, str) else row.prompt,
        prompt_ids=encoded.prompt_ids,
        chosen="" if row.chosen is None else answer_text(row.chosen),
        chosen_ids=encoded.chosen_ids,
        rejected=None if row.rejected is None else answer_text(row.rejected),
        rejected_ids=encoded.rejected_ids,
        label=row.label,
    )


def no_rows_text(sources: Sequence[str], report: Report) -> str:
    """Why nothing is left, with the first places of each reason."""
    lines = [f"{', '.join(sources)}: none of {report.read} rows is usable"]
    lines += dropped_lines(report)
    return "\n".join(lines)


def dropped_lines(report: Report) -> list[str]:
    """A line a reason: how many rows, why, and where."""
    return [
        f"{count} {reason}: {report.said.get(reason) or REASONS[reason]} "
        f"({places_text(report.places[reason])})"
        for reason, count in report.dropped.most_common()
    ]
