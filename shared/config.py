"""Typed, frozen configuration: one TOML file is one experiment.

`load` reads a file and the command line's dotted overrides into a `Config` subclass. An unknown
key, a wrong type or a value out of range is an `InputError` that names the file, the key and,
where one is close, the key that was probably meant. `keys` lists what may stand in a file, each key
with the sentence under its field.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo


class InputError(Exception):
    """The user's input is wrong: a file, a key or a value. The command ends with exit code 2."""


class Misfit(ValueError):
    """What a section's validator raises; `at` is the key within the section that does not fit."""

    def __init__(self, message: str, *at: str | int):
        super().__init__(message)
        self.at = at


class Config(BaseModel):
    """Base of every configuration section: immutable, and it refuses keys it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def a_section_keeps_the_defaults_of_its_place(cls, values: Any) -> Any:
        """`ppo.optimizer` with one key set keeps what else holds there, not in every optimizer."""
        if not isinstance(values, dict):
            return values
        return {name: _filled(cls.model_fields.get(name), value) for name, value in values.items()}


def _filled(field: FieldInfo | None, value: Any) -> Any:
    """A section's keys, with those of its default that are not among them."""
    if field is None or not isinstance(value, dict) or not isinstance(field.default, BaseModel):
        return value
    return {name: getattr(field.default, name) for name in type(field.default).model_fields} | value


C = TypeVar("C", bound=Config)
COMMAND_LINE = "command line"
NONE = "none"  # what a key without a value is set to there


def load(
    model: type[C],
    path: Path | None,
    overrides: Sequence[str] = (),
    complete: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
) -> C:
    """Read `path` (TOML), apply `overrides` (`--a.b value` or `--a.b=value`), and validate.

    `complete` fills in what depends on what is there. Raises InputError for an unreadable file, an
    unknown key or a wrong value.
    """
    raw = {} if path is None else read_toml(path)
    changes = list(_parse_overrides(overrides))
    optional = {key.name for key in keys(model) if key.default == NONE} if changes else set()
    for key, value in changes:
        _assign(raw, key, None if value == NONE and key in optional else value)
    changed = [key for key, _ in changes]
    return validate(model, complete(raw), str(path or COMMAND_LINE), changed)


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds; InputError if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors may put a mark first
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error


def validate(model: type[C], raw: dict[str, Any], source: str, overridden: Sequence[str] = ()) -> C:
    """Build `model` from plain values; an InputError names what does not fit and its `source`,
    the command line if it is at a key that was `overridden` there.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = _place(item)
            changed = any(_is_at(item, key, override) for override in overridden)
            lines.append(f"{COMMAND_LINE if changed else source}: {_explain(model, item, key)}")
        raise InputError("\n".join(lines)) from error


def _is_at(error: Any, key: str, override: str) -> bool:
    """Whether the error at `key` is of the key `override`: below it, or of a section that only it
    names.
    """
    section = {"extra_forbidden": key, "missing": key.rpartition(".")[0]}.get(error["type"])
    above = bool(section) and f"{override}.".startswith(f"{section}.")
    return above or f"{key}.".startswith(f"{override}.")


class Key(NamedTuple):
    """One key of a configuration, as it is written in a file or after `--`."""

    name: str  # dotted
    type: str  # `section` where keys of its own follow
    default: str
    sentence: str


def keys(
    model: type[BaseModel], prefix: str = "", section: BaseModel | None = None
) -> Iterator[Key]:
    """All keys of `model`, a section before the keys in it; those of a dict are below `NAME`.

    `section` holds the defaults, where they are not the model's own: `ppo.optimizer`.
    """
    for field, about in model.model_fields.items():
        value = getattr(section, field) if section else about.get_default()
        required = section is None and about.is_required()
        default = "required" if required else _default_text(value)
        name, inside = f"{prefix}{field}", _section(about.annotation)
        if get_origin(about.annotation) is dict and inside is not None:
            name = f"{name}.NAME"
        if inside is None:
            yield Key(name, _type_text(about.annotation), default, _sentence(about.description))
        else:
            default = default if required or value is None else ""
            yield Key(name, "section", default, _sentence(about.description))
            below = value if isinstance(value, BaseModel) else None
            yield from keys(inside, f"{name}.", below)


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
            raise InputError(f"{COMMAND_LINE}: expected --dotted.key, found {word!r}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"{COMMAND_LINE}: --{key} needs a value")
            value = rest.pop(0)
        yield key.replace("-", "_") if "." not in key else key, _literal(value)


def _literal(text: str) -> Any:
    """A TOML value if it reads as one (`0.2`, `true`, `[1, 2]`), else the string itself.

    Words in a list need no quotes, which a shell would take away: `[a, b]`.
    """
    for written in (text, _BARE_ITEM.sub(_quoted, text)):
        try:
            return tomllib.loads(f"value = {written}")["value"]
        except tomllib.TOMLDecodeError:
            pass
    return text


_BARE_ITEM = re.compile(r"""(?<=[\[,])\s*([^\s\[\]{},"'=][^\[\]{},"'=]*?)\s*(?=[,\]])""")


def _quoted(item: re.Match[str]) -> str:
    try:
        tomllib.loads(f"value = {item[1]}")
    except tomllib.TOMLDecodeError:
        return json.dumps(item[1])
    return item[1]


def _assign(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise InputError(f"{COMMAND_LINE}: --{key}: `{parent}` is a value, not a section")
    raw[last] = value


def _place(error: Any) -> str:
    """The dotted key of what does not fit, an item of a list by its number: `seeds.1`."""
    cause = error.get("ctx", {}).get("error")
    at = cause.at if isinstance(cause, Misfit) else ()
    return ".".join(str(part) for part in (*error["loc"], *at))


def _explain(model: type[BaseModel], error: Any, key: str) -> str:
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, error["loc"][:-1])
        return f"unknown key `{key}`{suggest(str(error['loc'][-1]), known)}"
    if error["type"] == "missing":
        return f"`{key}` is missing"
    if error["type"] == "value_error":  # a validator's own words, which show what it found
        return f"`{key}`: {error['ctx']['error']}"
    said = _OWN_WORDS.get(error["type"], error["msg"])
    return f"`{key}`: {said} (found {error['input']!r})"


_OWN_WORDS = {
    "tuple_type": "Input should be a list, such as [0, 1]",
    "dict_type": "Input should be a section of keys",
    "model_type": "Input should be a section of keys",
}


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


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field or each value of its dict holds, None for a plain value."""
    for option in _flatten(annotation):
        if get_origin(option) is dict:
            return _section(get_args(option)[1])
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _type_text(annotation: Any) -> str:
    """`FLOAT`, `[INT, ...]`, `linear|cosine`: what stands for a value on the command line."""
    plain = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(inside[0])
    if origin is Literal:
        return "|".join(str(choice) for choice in inside)
    if origin is tuple:
        return f"[{_type_text(inside[0])}, ...]"
    if origin is dict:
        return f"{{NAME = {_type_text(inside[1])}}}"
    options = _flatten(annotation)
    if options != [annotation]:
        return "|".join(_type_text(option) for option in options)
    return plain[annotation]


def _default_text(value: Any) -> str:
    """As TOML has it, without quotes; `none`: by default the key is left out."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(_default_text(item) for item in value)}]"
    return str(value).replace("e-0", "e-")


def _sentence(description: str | None) -> str:
    return " ".join((description or "").split())
