"""Who says in the end which answer is better: a reward model, a function, or nobody."""

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from shared.config import Config, InputError
from shared.data.pairs import read_pairs
from shared.data.rows import Messages
from shared.stages import Given, write_json

Score = Callable[[list[str | Messages], list[str]], Any]


class JudgeConfig(Config):
    """The judge of one's own task. It should be none of the models that PPO or a filter uses."""

    model: str | None = None
    """A reward model, a transformers folder or hub name with one label; it reads texts through its
    own tokenizer and template."""
    revision: str | None = None
    """Branch, tag or commit of a `model` of the hub; by default its main branch."""
    function: str | None = None
    """A function of (prompts, completions), `file.py:name` or `module:name`, which returns a number
    each; prompts are texts, or lists of messages where the data are chats."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """Train a reward model as the judge on this share of the prompts, which nothing else sees."""
    log_odds: float = Field(default=1.0, gt=0)
    """Log-odds that an answer is preferred, a unit of the judge's score: how sharply labels of
    sampled pairs follow it."""

    @model_validator(mode="after")
    def one_judge(self) -> "JudgeConfig":
        named = [n for n in ("model", "function", "share") if getattr(self, n) is not None]
        if len(named) > 1:
            raise ValueError(f"`{named[0]}` and `{named[1]}`: a judge is one of them")
        return self

    @property
    def named(self) -> bool:
        """Whether there is one."""
        return (self.model, self.function, self.share) != (None, None, None)


@dataclass(frozen=True)
class Judge:
    """A judge that is there: a reward model's folder, or a function's name and its file."""

    model: Path | Given | None = None
    function: str = ""
    file: Given | None = None
    log_odds: float = 1.0

    @property
    def folder(self) -> Path | None:
        """The reward model's."""
        return Path(self.model.source) if isinstance(self.model, Given) else self.model


def judged_by_function(
    judge: Judge, prompts: Sequence[str | Messages], completions: Sequence[str]
) -> NDArray[np.float64]:
    """What a judge's function makes of each completion, (N,); InputError if it is no number."""
    returned = load_function(judge)(list(prompts), list(completions))
    try:
        scores = np.asarray(returned, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"judge `{judge.function}`: it must return numbers: {error}") from error
    if scores.shape != (len(completions),):
        raise InputError(
            f"judge `{judge.function}`: {len(completions)} completions, but what it returns has "
            f"shape {scores.shape}; it must return one number each"
        )
    if not np.isfinite(scores).all():
        first = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise InputError(
            f"judge `{judge.function}`: {scores[first]} for the completion "
            f"{completions[first][:80]!r}; it must return finite numbers"
        )
    return scores


@functools.cache  # its file runs once: it may load a model
def load_function(judge: Judge) -> Score:
    """The judge's function; InputError if its file has none of that name."""
    assert judge.file is not None
    path, name = Path(judge.file.source), judge.function
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for what it imports
    spec = importlib.util.spec_from_file_location(f"judge_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise InputError(f"judge.function: {path} cannot be loaded: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"judge.function: {path} has no function `{name}`")
    return function


def examine_judge(folder: Path, pairs: Path, judge: Judge) -> None:
    """Stage: `scores.json`, what the judge makes of labelled pairs that nothing trained on.

    `pairs` holds gold by this judge; P(a wins) is the label.
    """
    rows = read_pairs(pairs / "pairs.jsonl")
    scores = {
        "gold_a": [row.chosen_gold for row in rows],
        "gold_b": [row.rejected_gold for row in rows],
        "p_a_wins": [row.p for row in rows],
        "log_odds": judge.log_odds,
    }
    write_json(folder / "scores.json", scores)
