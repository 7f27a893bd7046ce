"""Which format a row is in, and its comparisons with what stands beside them in the row."""

import re
from collections.abc import Iterator
from functools import cache

from shared.config import InputError, suggest
from shared.data.files import ALIASES, FORMATS, SIDES, Raw
from shared.data.rows import (
    DataConfig,
    Message,
    Row,
    Unreadable,
    Unusable,
    decoded,
    number_at,
    shown,
    text_at,
)
from shared.data.turns import user

AROUND = ("system", "tools", "chat_template_kwargs")  # read in every format
UNSUPPORTED = ("images", "image", "videos", "video", "audio", "audios")
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("rating_chosen", "rating_rejected"),
)
METADATA = {
    "id", "idx", "index", "uid", "uuid", "prompt_id", "post_id", "row_id", "__index_level_0__",
    "source", "origin", "dataset", "domain", "category", "subset", "split", "language", "lang",
    "model", "models", "chosen_model", "rejected_model", "generations", "worker", "batch", "extra",
    "score_A", "score_B", "score_ratio", "upvote_ratio", "root_id_A", "root_id_B",
    "created_at_utc_A", "created_at_utc_B", "seconds_difference", "c_root_id_A", "c_root_id_B",
    "individual_preference", "preference_statement", "preference_elaboration", "timestamp",
    "messages", "num_turns", "metadata", "correct_answers", "incorrect_answers", "principle",
    *(key for both in SCORES for key in both),
}  # fmt: skip
QUESTIONS = ("question", "query", "input", "instruction", "problem", "user", "context")
# A message, or a list of them, as JSON or as Python prints it.
SERIALISED = re.compile(
    r"""\s*\[?\s*\{(?=\s*['"](role|from|content|value)['"]\s*:)"""
    r"""[^{}]*?['"](role|from)['"]\s*:\s*['"](system|user|assistant|human|gpt|tool)['"]""",
)


def format_named(name: str) -> str:
    """The format of this name or alias; InputError if there is none."""
    if name in FORMATS or name in ALIASES:
        return ALIASES.get(name, name)
    raise InputError(f"format: no format `{name}`{suggest(name, ['auto', *FORMATS, *ALIASES])}")


def fits(name: str, raw: Raw) -> bool:
    """Whether a row has a format's keys, and values of its kind."""
    form = FORMATS[name]
    return all(key in raw for key in form.keys) and form.fits(raw)


def find_format(raw: Raw) -> str:
    """The first format that a row fits."""
    for name in FORMATS:
        if fits(name, raw):
            return name
    keys = ", ".join(f"`{key}`" for key in raw) or "none"
    missing = [key for key in ("prompt", "chosen", "rejected") if key not in raw]
    near = f"; of a pair `{missing[0]}` is missing" if len(missing) == 1 else ""
    inside = [key for key, value in raw.items() if isinstance(value, list) and value]
    if inside and all(isinstance(one, dict) for one in raw[inside[0]]):
        near += f"; if the rows are in `{inside[0]}`, write that list alone"
    raise Unreadable(
        f"in no known format (its keys: {keys}){near}; the commonest are `prompt`, `chosen`, "
        "`rejected`, or `prompt`, `completion`, `label`"
    )


def read_row(name: str, raw: Raw, data: DataConfig) -> list[Row]:
    """The comparisons of a raw row, with its system message and tools.

    Raises Unreadable where it is not in the format `name`, Unusable where it teaches nothing.
    """
    form = FORMATS[name]
    if missing := [key for key in form.keys if key not in raw]:
        keys = ", ".join(map(str, raw))
        raise Unreadable(f"`{missing[0]}` is missing (format {name}; found {keys})")
    for key in UNSUPPORTED:
        if raw.get(key):
            raise Unreadable(f"`{key}`: only text is read")
    for chosen, rejected in SCORES:
        if chosen in raw and rejected in raw and None not in (raw[chosen], raw[rejected]):
            _check_scores(raw, chosen, rejected)
    if name == "implicit-pairs":
        _check_no_question(raw)
    rows = form.read(raw, data)
    for row in rows:
        _check_texts(row)
    if data.chat == "messages":
        rows = [as_chat(row) for row in rows]
    around = {key: raw[key] for key in AROUND if raw.get(key)}
    return [_with_surroundings(row, around) for row in rows] if around else rows


def _check_no_question(raw: Raw) -> None:
    """What both sides begin with is no prompt where another key holds it."""
    asked = [key for key in QUESTIONS if isinstance(raw.get(key), str) and raw[key].strip()]
    alone = all(isinstance(raw[side], str | dict) or len(raw[side] or ()) == 1 for side in SIDES)
    if asked and alone:
        raise Unreadable(
            f"`chosen` and `rejected` hold answers alone, and `{asked[0]}` is not read: rename it "
            "to `prompt`"
        )


def _check_texts(row: Row) -> None:
    """Messages that were written into a text would be read as what someone says."""
    for part in (row.prompt, row.chosen, row.rejected):
        if isinstance(part, str) and SERIALISED.match(part):
            raise Unreadable(
                f"a text that holds messages ({shown(part)}): give the list itself, in a CSV file "
                "as JSON (json.dumps)"
            )


def _check_scores(raw: Raw, chosen: str, rejected: str) -> None:
    if number_at(raw, chosen) == number_at(raw, rejected):
        raise Unusable("tie", f"`{chosen}` and `{rejected}` are the same")


def as_chat(row: Row) -> Row:
    """A text prompt as the user's message, and its answers as the assistant's."""
    if not isinstance(row.prompt, str):
        return row
    answers = (
        {"role": "assistant", "content": text} if isinstance(text, str) else text
        for text in (row.chosen, row.rejected)
    )
    return row._replace(prompt=[user(row.prompt)])._replace(
        **dict(zip(SIDES, answers, strict=True))
    )


def _with_surroundings(row: Row, around: Raw) -> Row:
    """System message, tools and words for the template that stand beside the messages."""
    if isinstance(row.prompt, str):
        raise Unreadable(
            f"`{next(iter(around))}` needs messages, and `prompt` is a text; set chat = messages"
        )
    system, tools, words = (around.get(key) for key in AROUND)
    prompt: list[Message] = row.prompt
    if system is not None:
        if prompt[0]["role"] == "system":
            raise Unreadable("a `system` text beside messages that have their own")
        prompt = [{"role": "system", "content": text_at(around, "system")}, *prompt]
    tools = decoded(tools, "tools") if isinstance(tools, str) else tools
    if tools is not None and not isinstance(tools, list):
        raise Unreadable(f"`tools` must be a list of functions (found {shown(tools)})")
    if words is not None and not isinstance(words, dict):
        raise Unreadable(f"`chat_template_kwargs` must be an object (found {shown(words)})")
    return row._replace(prompt=prompt, tools=tools, template=words)


def unread_keys(name: str, raw: Raw) -> Iterator[str]:
    """Keys of a row that no one reads, and that are not known to be about where it comes from."""
    known = _known_keys(name)
    return (key for key in raw if key not in known and raw[key] is not None)


@cache
def _known_keys(name: str) -> set[str]:
    form = FORMATS[name]
    return {*form.keys, *form.also, *AROUND, *UNSUPPORTED} | METADATA
