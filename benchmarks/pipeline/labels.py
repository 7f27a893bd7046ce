"""Single answers with a label in place of pairs: what trains on them, and why the rest cannot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.losses import UNPAIRED
from shared.config import InputError
from shared.data.own import find_kind
from shared.tasks.registry import TaskConfig

OWN_REWARD_MODEL = "the reward model is trained on pairs; name your own in `reward.pretrained`"


def holds_labels(task: TaskConfig) -> bool:
    """Whether the files hold single answers with a label: as it is named, or by their first row.

    What is wrong with the files is said by the stage that reads them.
    """
    if task.name != "own" or task.rows != "auto":
        return task.name == "own" and task.rows == "labels"
    sources = (task.pairs,) if isinstance(task.pairs, str) else task.pairs
    try:
        return find_kind(sources, Path(), task.data) == "labels"
    except InputError:
        return False


def lacks_pairs(kind: str, loss: str, reward_model: bool) -> str:
    """Why an arm of this kind and loss cannot train on labels; "" if it can.

    `reward_model`: one is given.
    """
    if kind in ("ppo", "best-of-n"):
        return "" if reward_model else OWN_REWARD_MODEL
    unpaired = kind == "direct" and loss in UNPAIRED
    return "" if unpaired else "the loss compares two answers of one prompt"


def left_out_text(source: str, reasons: Mapping[str, str]) -> str:
    """The line that says what of the defaults is left out, and why."""
    why: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        why.setdefault(reason, []).append(name)
    told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in why.items())
    return f"{source}: single answers with a label, so these are left out ({told})"


def refused_text(source: str, reasons: Mapping[str, str]) -> str:
    """A line for each key that cannot be, and why."""
    return "\n".join(
        f"`{key}`: {source} holds single answers with a label: {reason}"
        for key, reason in reasons.items()
    )


def is_named(key: str, raw: Mapping[str, Any], overrides: list[str]) -> bool:
    """Whether `key`, dotted, stands in a file, or was changed on the command line."""
    if any(f"{word.partition('=')[0]}.".startswith(f"--{key}.") for word in overrides):
        return True
    found: Any = raw
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return False
        found = found[part]
    return True
