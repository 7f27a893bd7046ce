"""Typed, frozen configuration: one TOML file is one experiment.

`load` reads a file and the command line's dotted overrides into a `Config` subclass. An unknown
key, a wrong type or a value out of range is an `InputError` that names the file, the key and,
where one is close, the key that was probably meant.
"""

import difflib
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


class InputError(Exception):
    """The user's input is wrong: a file, a key or a value. The command ends with exit code 2."""


class Config(BaseModel):
    """Base of every configuration section: immutable, and it refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


C = TypeVar("C", bound=Config)


def load(model: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """Read `path` (TOML), apply `overrides` (`--a.b value` or `--a.b=value`), and validate.

    Raises InputError for an unreadable file, an unknown key or a wrong value.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot read it: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid TOML: {error}") from error
    for key, value in _parse_overrides(overrides):
        _assign(raw, key, value)
    return validate(model, raw, source=str(path or "command line"))


def validate(model: type[C], raw: dict[str, Any], source: str) -> C:
    """Build `model` from plain values; an InputError names `source` and what does not fit."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [f"{source}: {_explain(model, item)}" for item in error.errors()]
        raise InputError("\n".join(lines)) from error


def suggest(word: str, known: Sequence[str]) -> str:
    """' (did you mean `x`?)' for the closest known word, else the list of known words."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f" (did you mean `{close[0]}`?)"
    return f" (known: {', '.join(sorted(known))})" if known else ""


def _parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise InputError(f"command line: expected --dotted.key, found {word!r}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"command line: --{key} needs a value")
            value = rest.pop(0)
        yield key.replace("-", "_") if "." not in key else key, _literal(value)


def _literal(text: str) -> Any:
    """A TOML value if it reads as one (`0.2`, `true`, `[1, 2]`), else the string itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise InputError(f"command line: --{key}: `{parent}` is a value, not a section")
    raw[last] = value


def _explain(model: type[BaseModel], error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"`{key}`: {error['msg']} (found {error['input']!r})"
    known = _fields_at(model, error["loc"][:-1])
    return f"unknown key `{key}`{suggest(str(error['loc'][-1]), known)}"


def _fields_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    """Field names of the section at `location`, through nested models, dicts and unions."""
    candidates = [model]
    for part in location:
        step: list[Any] = []
        for candidate in candidates:
            for option in _flatten(candidate):
                if isinstance(option, type) and issubclass(option, BaseModel):
                    if part in option.model_fields:
                        step.append(option.model_fields[part].annotation)
                    elif option in candidates:
                        step.append(option)
                else:
                    step.extend(get_args(option)[-1:])
        candidates = step
    models = [m for c in candidates for m in _flatten(c) if hasattr(m, "model_fields")]
    return sorted({name for m in models for name in m.model_fields})


def _flatten(annotation: Any) -> list[Any]:
    """The members of a union, or the annotation alone."""
    args = [a for a in get_args(annotation) if a is not type(None)]
    is_union = args and not isinstance(annotation, type) and not hasattr(annotation, "__origin__")
    return [m for a in args for m in _flatten(a)] if is_union else [annotation]
