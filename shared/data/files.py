"""Preference files -> rows of text -> pairs of token ids: one function a format.

A file holds one JSON object a line with `prompt`, `chosen` and `rejected`. A format is a way of
saying what these three are; it is found from the rows themselves, and all rows must have the same.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from shared.config import InputError
from shared.data.pairs import Pair

Messages = list[dict[str, str]]
SIDES = ("prompt", "chosen", "rejected")


class Row(NamedTuple):
    """One comparison as the model reads it: of a chat, what its template makes of the messages."""

    prompt: str
    chosen: str
    rejected: str
    messages: tuple[Messages, Messages, Messages] | None = None  # of the three, if it is a chat


def read_pair_file(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Rows of a JSON lines file; an InputError names the line that is not one."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read it: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(f"{path}: no rows; one JSON object a line is expected")
    places = [f"{path}, line {number}" for number, _ in numbered]
    objects = [(at, read_object(line, at)) for at, (_, line) in zip(places, numbered, strict=True)]
    formats = {format_of(found, where) for where, found in objects}
    if len(formats) > 1:
        raise InputError(f"{path}: some rows are texts and some are chats; make them one of both")
    read = FORMATS[formats.pop()]
    return [read(found, where, tokenizer) for where, found in objects]


def read_object(line: str, where: str) -> dict[str, Any]:
    """One line with all three sides."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{where}: not an object with `prompt`, `chosen` and `rejected`")
    if missing := sorted(set(SIDES) - found.keys()):
        raise InputError(f"{where}: `{missing[0]}` is missing (found {', '.join(sorted(found))})")
    return found


def format_of(found: dict[str, Any], where: str) -> str:
    """Which of FORMATS a row is in."""
    sides = [found[side] for side in SIDES]
    if all(isinstance(side, str) for side in sides):
        return "texts"
    if all(is_chat(side) for side in sides):
        return "chats"
    raise InputError(
        f"{where}: `prompt`, `chosen` and `rejected` must be three texts, or three lists of "
        "messages {role, content}"
    )


def is_chat(side: Any) -> bool:
    """Whether `side` is a list of messages with their texts."""
    return (
        isinstance(side, list)
        and bool(side)
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in side
        )
    )


def read_texts(found: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Three texts, as they are."""
    return Row(*(found[side] for side in SIDES))


def read_chats(found: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Three lists of messages, through the model's chat template; completions may repeat the
    prompt's messages.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            f"{where}: chat messages, but the model's tokenizer has no chat template; set "
            "tokenizer.chat_template and save it, or give texts"
        )
    prompt, *answers = (found[side] for side in SIDES)
    chosen, rejected = (
        answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer for answer in answers
    )
    try:
        before = render(tokenizer, prompt, open_answer=True)
        texts = [_answer_text(tokenizer, prompt, before, answer) for answer in (chosen, rejected)]
    except TemplateError as error:
        raise InputError(f"{where}: the chat template refuses it: {error}") from error
    return Row(before, *texts, messages=(prompt, chosen, rejected))


def _answer_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, before: str, answer: Messages
) -> str:
    """What follows the prompt `before` in the template's text of both."""
    both = render(tokenizer, prompt + answer)
    if both.startswith(before):
        return both.removeprefix(before)
    return "".join(message["content"] for message in answer) + str(tokenizer.eos_token or "")


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, open_answer: bool = False
) -> str:
    """The text of a chat; `open_answer` ends it where the policy's answer begins."""
    return tokenizer.apply_chat_template(  # pyright: ignore[reportReturnType]
        messages, tokenize=False, add_generation_prompt=open_answer
    )


FORMATS: dict[str, Callable[[dict[str, Any], str, PreTrainedTokenizerBase], Row]] = {
    "texts": read_texts,
    "chats": read_chats,
}


def encode(tokenizer: PreTrainedTokenizerBase, row: Row, number: int) -> Pair:
    """Token ids of a row. A text gets its EOS here; of a chat, what follows the last EOS goes.

    Prompt and completion are encoded on their own, so that the policy goes on from the prompt's
    tokens.
    """
    chat, eos = row.messages is not None, token_id(tokenizer, "eos_token_id")
    prompt = tokenizer(row.prompt, add_special_tokens=not chat).input_ids

    def answer(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        if chat:
            return up_to_last(ids, eos)
        return [*ids, eos] if ids and eos is not None else ids

    return Pair(f"row {number}", row.prompt, prompt, answer(row.chosen), answer(row.rejected))


def token_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """The id of a special token, None where the tokenizer has none."""
    value = getattr(tokenizer, name)
    return value if isinstance(value, int) else None


def up_to_last(ids: list[int], eos: int | None) -> list[int]:
    """Templates end a turn with EOS and a line break; the policy stops at EOS."""
    if eos is None or eos not in ids:
        return ids
    return ids[: len(ids) - ids[::-1].index(eos)]
