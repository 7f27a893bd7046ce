"""What a reward model's folder holds beside its weights: normalisation, ends, chats of prompts."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from shared.config import InputError
from shared.data.rows import Messages
from shared.models.folders import (
    CHATS,
    NORMALISATION,
    read_object,
)
from shared.stages import read_jsonl, write_jsonl

Chats = Mapping[tuple[int, ...], Messages]  # of prompts, by their token ids


def write_chats(folder: Path, chats: Chats) -> None:
    """`chats.jsonl`: the messages of prompts that are chats, for `take_reward` and `Scorer`."""
    rows = [{"prompt_ids": list(ids), "messages": said} for ids, said in chats.items()]
    write_jsonl(folder / CHATS, rows)


def read_chats(folder: Path) -> Chats:
    """What `write_chats` wrote; nothing where there is none."""
    if not (folder / CHATS).is_file():
        return {}
    try:
        rows = read_jsonl(folder / CHATS)
        return {tuple(row["prompt_ids"]): row["messages"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / CHATS}: not the messages of prompts, which Klash keeps under this name "
            f"beside a reward model ({error!r}): move the file elsewhere"
        ) from error


def save_normalisation(
    folder: Path, offset: float, scale: float, ends: frozenset[int] | None = None
) -> None:
    """Write what turns raw scores into `score` beside the reward model.

    `ends`: of one that was trained here, the tokens that ended an answer in its training.
    InputError where they cannot: the scores are all one, or not numbers.
    """
    require_scale(folder, offset, scale)
    trained = {} if ends is None else {"ends": sorted(ends)}
    text = json.dumps({"offset": offset, "scale": scale, **trained})
    (folder / NORMALISATION).write_text(text)


def read_normalisation(folder: Path) -> tuple[float, float]:
    """(offset, scale); (0, 1) for a reward model without: its scores are raw."""
    path = folder / NORMALISATION
    if not path.is_file():
        return 0.0, 1.0
    values = read_object(path)
    try:
        offset, scale = float(values["offset"]), float(values["scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not {{offset, scale}}: {error!r}") from error
    require_scale(folder, offset, scale)
    return offset, scale


def read_ends(folder: Path) -> frozenset[int] | None:
    """The tokens that ended an answer where the reward model was trained here; None of others."""
    path = folder / NORMALISATION
    ends = read_object(path).get("ends") if path.is_file() else None
    if ends is None:
        return None
    if not isinstance(ends, list) or not all(type(end) is int for end in ends):
        raise InputError(f"{path}: `ends` is a list of token ids (found {ends!r})")
    return frozenset(ends)


def require_scale(folder: Path, offset: float, scale: float) -> None:
    """InputError unless scores can be centred by `offset` and divided by `scale`."""
    if not (math.isfinite(offset) and math.isfinite(scale) and scale > 0):
        raise InputError(
            f"{folder}: the reward model's scores do not differ between samples of a prompt (mean "
            f"{offset:g}, deviation {scale:g}): train it, or look for a head of zeros; and two "
            "samples a prompt are the fewest that can differ"
        )
