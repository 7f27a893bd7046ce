"""JSON that holds what we can use: every key once, and text that tokenizers take."""

import json
import re
from typing import Any


def parse(text: str) -> Any:
    """The value of a whole text; ValueError, with `explained`, for whatever is wrong with it."""
    try:
        value = DECODER.decode(text)
        check_text(text, value)
    except RecursionError as error:
        raise ValueError(explained(error)) from error
    return value


def check_text(text: str, value: Any) -> None:
    """UnicodeEncodeError for half of a surrogate pair, which is no text: tokenizers refuse it."""
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()


def explained(error: Exception) -> str:
    """What is wrong with a text, for people."""
    if isinstance(error, UnicodeDecodeError):
        return f"its text is not UTF-8 (byte {error.start}: {error.reason})"
    if isinstance(error, UnicodeEncodeError):
        return "it holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error)


def _no_key_twice(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`{twice}` is there twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_no_key_twice)
BLANKS = re.compile(r"[ \t\r\n]*")
