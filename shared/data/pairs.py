"""A labelled comparison of two completions, or one with a label; what makes pairs clean."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from shared.config import InputError
from shared.stages import read_jsonl


class Pair(NamedTuple):
    """One labelled comparison. Completions hold their EOS unless they were cut.

    `p` is the label: the probability that the chosen one wins, 1 for a label that was drawn.
    """

    id: str
    prompt: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_gold: float | None = None  # the task's true scores, where it has them
    rejected_gold: float | None = None
    p: float = 1.0


class Labelled(NamedTuple):
    """One completion with a label: desirable or not. It holds its EOS unless it was cut."""

    id: str
    prompt: str
    prompt_ids: list[int]
    completion_ids: list[int]
    desirable: bool


def swapped(pair: Pair) -> Pair:
    """The same comparison with the other completion as the winner."""
    return pair._replace(
        chosen_ids=pair.rejected_ids,
        rejected_ids=pair.chosen_ids,
        chosen_gold=pair.rejected_gold,
        rejected_gold=pair.chosen_gold,
    )


def clean(pairs: Sequence[Pair], *, repeats: bool = False) -> tuple[list[Pair], Counter[str]]:
    """Drop what teaches nothing or the wrong thing; count why.

    `empty`: a side without tokens. `identical`: both sides the same tokens. `duplicate`: seen
    before. `contradiction`: seen before the other way round (both are kept out). With `repeats`
    the last two are data like any other, and stay.
    """
    dropped: Counter[str] = Counter()
    kept: list[Pair] = []
    seen: dict[tuple[tuple[int, ...], ...], Pair] = {}
    contested: set[tuple[tuple[int, ...], ...]] = set()
    for pair in pairs:
        sides = tuple(map(tuple, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)))
        reverse = (sides[0], sides[2], sides[1])
        if not pair.prompt_ids or not pair.chosen_ids or not pair.rejected_ids:
            dropped["empty"] += 1
        elif pair.chosen_ids == pair.rejected_ids:
            dropped["identical"] += 1
        elif repeats:
            kept.append(pair)
        elif sides in contested or reverse in contested:
            dropped["contradiction"] += 1
        elif sides in seen:
            dropped["duplicate"] += 1
        elif reverse in seen:
            dropped["contradiction"] += 2
            contested.add(reverse)
            del seen[reverse]
        else:
            seen[sides] = pair
    return kept if repeats else list(seen.values()), dropped


def read_pairs(path: Path) -> list[Pair]:
    """Pairs as `make_preferences` wrote them; InputError where the file holds single answers."""
    found = read_training(path)
    pairs = [row for row in found if isinstance(row, Pair)]
    if len(pairs) < len(found):
        raise InputError(f"{path}: single answers with a label, and pairs are needed")
    return pairs


def read_training(path: Path) -> list[Pair] | list[Labelled]:
    """What a run trains on: pairs, or single answers with a label."""
    rows = read_jsonl(path)
    if rows and "desirable" in rows[0]:
        return [Labelled(**row) for row in rows]
    return [Pair(**row) for row in rows]
