"""A row of preference data as text or messages, before any tokenizer; and what is wrong with one.

A format (`shared.data.files`) makes rows out of what a file holds. A row that cannot be read raises
`Unreadable`, one that can but teaches nothing raises `Unusable` with the reason it is counted by.
"""

import math
import re
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from shared.config import Config, Misfit
from shared.data.strict_json import explained, parse

Message = dict[str, Any]  # role, content, and what templates know beside: name, tool_calls, ...
Messages = list[Message]
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
ASKING = ("user", "tool", "ipython")  # who speaks before an answer


class DataConfig(Config):
    """How a file of preferences is read."""

    format: str = "auto"
    """The files' format, one of docs/own-data.md's; `auto` finds it from the rows."""
    subset: str | None = None
    """Configuration of a dataset of the hub, such as `preference` of `nvidia/HelpSteer3`."""
    split: str | None = None
    """Split of a dataset of the hub or of a folder laid out like one, such as `train`."""
    chat: Literal["as-is", "messages"] = "as-is"
    """What becomes of texts: `as-is` they stay texts; `messages` makes prompt and answer, or a
    transcript's turns, messages for the model's chat template."""
    rated: Literal["best-worst", "all", "margin"] = "best-worst"
    """Which pairs n rated answers of one prompt make: the best with the worst, all that differ, or
    all whose ratings differ by `margin`."""
    margin: float = Field(default=0.0, ge=0)
    """Least difference of two ratings; one that is smaller is a tie."""
    over_long: Literal["drop", "cut"] = "drop"
    """What becomes of an answer longer than `max_completion_tokens`: the row goes, or its end with
    the EOS, as if sampling had been cut. A prompt is never cut: its row goes."""
    max_prompt_tokens: int | None = Field(default=None, gt=0)
    """Most tokens of a prompt."""
    max_completion_tokens: int | None = Field(default=None, gt=0)
    """Most tokens of an answer, its EOS included."""
    max_bad_rows: int = Field(default=0, ge=0)
    """Most rows that cannot be read before reading stops; those are counted and left out."""

    @model_validator(mode="after")
    def a_margin_needs_a_size(self) -> "DataConfig":
        if self.rated == "margin" and self.margin == 0:
            raise Misfit("rated = margin needs a margin above 0", "margin")
        return self


ANSWERS = ("completions", "responses", "answers")  # keys of several answers to a prompt
RATINGS = ("scores", "ratings", "rewards")  # and of their ratings


class Place(NamedTuple):
    """Where a row stands: `pairs.jsonl, line 3`, or `row 3` of a file without lines."""

    file: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


class Row(NamedTuple):
    """One comparison, or one answer with a label, or one answer, or a prompt alone.

    Of a chat the prompt is its messages and an answer is the assistant's message; else all are
    texts. `chosen` is the only answer where there is no other, and None of a prompt alone.
    """

    prompt: str | Messages
    chosen: str | Message | None
    rejected: str | Message | None = None
    label: bool | None = None  # whether `chosen`, alone, is desirable
    tools: list[Any] | None = None
    template: dict[str, Any] | None = None  # further words for the chat template

    @property
    def kind(self) -> str:
        """What the row can teach: `pairs`, `labels`, `answers` or `prompts`."""
        if self.rejected is not None:
            return "pairs"
        if self.label is not None:
            return "labels"
        return "prompts" if self.chosen is None else "answers"


class Unreadable(Exception):
    """A row is not what its format says: a key is missing, or a value has another type."""


class Unusable(Exception):
    """A row can be read and teaches nothing, or the wrong thing; it is dropped and counted."""

    def __init__(self, reason: str, said: str = ""):
        super().__init__(said or reason)
        self.reason = reason


def shown(value: Any) -> str:
    """A value as a message shows it: short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def text_at(raw: dict[str, Any], key: str) -> str:
    """A key's text."""
    value = raw[key]
    if type(value) is not str:
        raise Unreadable(f"`{key}` must be a text (found {shown(value)})")
    return value


def number_at(raw: dict[str, Any], key: str) -> float:
    """A key's number; one that is not finite makes the row unusable."""
    return finite(raw[key], key)


def finite(value: Any, name: str) -> float:
    """`value` as a number. CSV files hold numbers as text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise Unreadable(f"`{name}` must be a number (found {shown(value)})") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unreadable(f"`{name}` must be a number (found {shown(value)})")
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise Unusable("not-finite", f"`{name}` is {shown(value)}")
    return number


_LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def label_at(raw: dict[str, Any], key: str) -> bool:
    """A key's label: true or false, 1 or 0, which a column with gaps holds as 1.0 or 0.0."""
    value = raw[key]
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float | str) and (word := str(value).strip().lower()) in _LABELS:
        return _LABELS[word]
    raise Unreadable(f"`{key}` must be true or false (found {shown(value)})")


# Blanks, and characters that no one sees: soft hyphen, joiners, marks of direction, fillers, BOM.
_NOTHING = re.compile(
    r"[\s\u00ad\u034f\u061c\u115f\u1160\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    r"\ufe00-\ufe0f\ufeff\uffa0]*"
)


def is_blank(answer: str | Message) -> bool:
    """Whether an answer says nothing: no text that one can see, and no call of a tool."""
    if isinstance(answer, str):
        return _NOTHING.fullmatch(answer) is not None
    return is_blank(str(answer.get("content") or "")) and not answer.get("tool_calls")


def blank_sides(row: Row) -> bool:
    """Whether the prompt, of a chat what the user says last, or an answer says nothing."""
    prompt = row.prompt
    last = prompt if isinstance(prompt, str) else prompt[-1]
    asks = isinstance(last, str) or last["role"] == "user"
    return (asks and is_blank(last)) or any(
        answer is not None and is_blank(answer) for answer in (row.chosen, row.rejected)
    )


def messages_at(raw: dict[str, Any], key: str) -> Messages:
    """A key's messages; InputError's kin if one is not {role, content}."""
    value = raw[key]
    if not isinstance(value, list) or not value:
        raise Unreadable(f"`{key}` must be a list of messages (found {shown(value)})")
    return [message_of(one, f"{key}[{n}]") for n, one in enumerate(value)]


def message_of(value: Any, name: str) -> Message:
    """One message, of {role, content} or {from, value}; without the keys that hold nothing."""
    if not isinstance(value, dict):
        raise Unreadable(f"`{name}` must be a message {{role, content}} (found {shown(value)})")
    if "from" in value and "value" in value:
        return _from_value(value, name)
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or ("content" not in value and "tool_calls" not in value):
        keys = ", ".join(map(str, value))
        no_text = "role" in value and not isinstance(role, str)
        found = f"role {shown(role)}" if no_text else f"keys {keys}"
        raise Unreadable(f"`{name}` must be a message {{role, content}} (found {found})")
    role = role.strip().lower() if role not in ROLES else role
    if role not in ROLES:
        raise Unusable("wrong-role", f"`{name}` has the unknown role {shown(value['role'])}")
    if isinstance(content, list):
        content = _joined(content, name)
    if not isinstance(content, str) and not (content is None and value.get("tool_calls")):
        raise Unreadable(f"`{name}.content` must be a text (found {shown(content)})")
    kept = {k: v for k, v in value.items() if v is not None and k not in ("role", "content")}
    return {"role": role, "content": content or "", **kept}


_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "system": "system",
    "observation": "tool", "tool": "tool", "function_call": "assistant",
}  # fmt: skip


def _from_value(value: dict[str, Any], name: str) -> Message:
    """A message of ShareGPT's and LLaMA-Factory's kind."""
    speaker, text = value["from"], value["value"]
    if not isinstance(speaker, str) or not isinstance(text, str):
        raise Unreadable(f"`{name}` must be a message {{from, value}} of texts")
    if speaker.strip().lower() not in _SHAREGPT:
        raise Unusable("wrong-role", f"`{name}` has the unknown role {shown(speaker)}")
    role = _SHAREGPT[speaker.strip().lower()]
    if speaker != "function_call":
        return {"role": role, "content": text}
    call = decoded(text, f"{name}.value")
    calls = call if isinstance(call, list) else [call]
    calls = [{"type": "function", "function": one} for one in calls]
    return {"role": role, "content": "", "tool_calls": calls}


def _joined(parts: list[Any], name: str) -> str:
    """The text of a content given in parts."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise Unreadable(f"`{name}.content` holds something that is not text: {shown(part)}")
    return "".join(texts)


def decoded(text: str, name: str) -> Any:
    """JSON inside a text."""
    try:
        return parse(text)
    except ValueError as error:
        raise Unreadable(f"`{name}` is not JSON: {explained(error)}") from None
