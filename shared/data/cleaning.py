"""Dropping what teaches nothing or the wrong thing, with a reason that is counted.

Rows pass one after the other; of those before only hashes are kept, so that a million rows fit. A
row that contradicts an earlier one takes it out as well.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shared.data.rows import Message, Messages, Place, Row, blank_sides

REASONS = {
    "undecodable": "the row cannot be read",
    "wrong-role": "the last turn is not the assistant's, or the prompt's not the user's",
    "several-turns": "an answer holds more than one turn",
    "prompt-mismatch": "the prompts of the two sides differ",
    "single-answer": "fewer than two rated answers",
    "not-finite": "a score is not a finite number",
    "tie": "the two answers are rated the same",
    "empty": "the prompt or an answer holds nothing but blanks",
    "identical": "both answers are the same, also once encoded and cut",
    "duplicate": "the row was there before",
    "contradiction": "the row was there before the other way round; both go",
    "over-long": "the prompt or an answer has more tokens than allowed",
    "refused": "the chat template refuses the messages",
}


class Dropped(NamedTuple):
    """A row that is not used, and why."""

    where: Place
    reason: str
    said: str = ""

    def as_json(self) -> str:
        """A line of the file of what was dropped."""
        row = {"file": self.where.file, self.where.unit: self.where.number, "reason": self.reason}
        return json.dumps(row | ({"said": self.said} if self.said else {}), ensure_ascii=False)


@dataclass
class Report:
    """What became of the rows of one reading. `read` = `kept` + the sum of `dropped`, always."""

    format: str = ""
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)  # what was seen in rows that are kept
    desirable: int = 0  # of answers with a label
    undesirable: int = 0
    kind: str = ""  # pairs, labels, answers or prompts
    chats: bool = False  # messages, not texts
    tokens: int = 0  # of answers, where a tokenizer was there
    unknown_tokens: int = 0
    prompt_tokens: int = 0
    unknown_in_prompts: int = 0
    places: dict[str, list[Place]] = field(default_factory=dict)  # the first of each reason or note
    said: dict[str, str] = field(default_factory=dict)  # of each reason what its first row is told

    def drop(self, dropped: Dropped) -> Dropped:
        """Count a row that goes."""
        self.dropped[dropped.reason] += 1
        self.remember(dropped.reason, dropped.where)
        return dropped

    def note(self, name: str, where: Place | None = None, count: int = 1) -> None:
        """Count something about a row that stays."""
        self.notes[name] += count
        if where is not None:
            self.remember(name, where)

    def remember(self, name: str, where: Place) -> None:
        """Keep the first places of a reason or a note."""
        places = self.places.setdefault(name, [])
        if len(places) < SHOWN:
            places.append(where)

    def as_json(self) -> dict[str, Any]:
        """What `klash data check --json` writes."""
        found: dict[str, Any] = {
            "rows": self.read,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "format": self.format,
            "kind": self.kind,
            "notes": dict(sorted(self.notes.items())),
        }
        if self.kind == "labels":
            found |= {"desirable": self.desirable, "undesirable": self.undesirable}
        return found


SHOWN = 100  # places that are kept for each reason


def places_text(places: Iterable[Place]) -> str:
    """`pairs.jsonl, lines 3, 8 to 10`: where rows stand, in few words."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place in places:
        groups.setdefault((place.file, place.unit), []).append(place.number)
    texts = []
    for (file, unit), numbers in groups.items():
        spans = list(_spans(sorted(set(numbers))))
        more = ", ..." if len(spans) > 12 else ""
        many = "s" if len(numbers) > 1 else ""
        texts.append(f"{file}, {unit}{many} {', '.join(spans[:12])}{more}")
    return "; ".join(texts)


def _spans(numbers: list[int]) -> Iterator[str]:
    first = last = numbers[0]
    for number in [*numbers[1:], None]:
        if number is not None and number == last + 1:
            last = number
            continue
        yield (
            f"{first}"
            if first == last
            else f"{first} to {last}"
            if last > first + 1
            else (f"{first}, {last}")
        )
        if number is not None:
            first = last = number


class Cleaner:
    """Decides row by row what goes; `earlier` rows can go later, when one contradicts them."""

    def __init__(self) -> None:
        self.seen: dict[bytes, tuple[int, Place, bool]] = {}  # by answers in either order
        self.contested: set[bytes] = set()
        self.prompts: set[bytes] = set()
        self.passed = 0

    def judge(self, number: int, where: Place, row: Row) -> tuple[str, tuple[int, Place] | None]:
        """(the reason for which a row goes, or "", the earlier row that goes with it if any).

        `number` counts the rows that were kept before. Repeated prompts stay.
        """
        if blank_sides(row):
            return "empty", None
        sides = [_text(part) for part in (row.chosen, row.rejected)]
        about = _text(row.prompt)
        if row.tools is not None or row.template is not None:  # the model reads another prompt
            about += _json([row.tools, row.template])
        if row.rejected is not None and sides[0] == sides[1]:
            return "identical", None
        reverse = row.label is False or (row.rejected is not None and sides[1] < sides[0])
        if row.rejected is not None and reverse:
            sides.reverse()
        key = _digest("\0".join([about, *sides]))
        if key in self.contested:
            return "contradiction", None
        if key in self.seen:
            before, place, was_reverse = self.seen[key]
            if was_reverse == reverse:
                return "duplicate", None
            self.contested.add(key)
            del self.seen[key]
            return "contradiction", (before, place)
        self.seen[key] = number, where, reverse
        self.prompts.add(_digest(about))
        self.passed += 1
        return "", None


def _text(part: str | Message | Messages | None) -> str:
    """What tells one part of a row from another."""
    if isinstance(part, str):
        return part
    if part is None:
        return "\1"
    if isinstance(part, dict) and len(part) == 2:
        return f"{part['role']}\1{part['content']}"
    return _json(part)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
