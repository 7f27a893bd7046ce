"""Which split a prompt belongs to: by the hash of its normalised text, whatever else is there.

A prompt written with other capitals, blanks or forms of the same letters is the same prompt. The
same in other words is found by the runs of 13 characters that two prompts share.
"""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Split = Literal["sft", "preference", "reward-test", "ppo", "validation", "test", "judge"]

SHARES: dict[Split, float] = {
    "sft": 0.30,
    "preference": 0.30,
    "reward-test": 0.10,
    "ppo": 0.20,
    "validation": 0.05,
    "test": 0.05,
}


def normalised(prompt: str) -> str:
    """One form of letters (NFKC), no capitals, single blanks."""
    text = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join(unicodedata.normalize("NFKC", text).split())


def split_of(prompt: str, judge_share: float = 0.0) -> Split:
    """The one split of a prompt, by its hash: no prompt meets two splits, whatever the seed.

    A share of all prompts, drawn by a hash of its own, belongs to `judge`; the others stay where
    they are without one.
    """
    text = normalised(prompt)
    if judge_share > 0 and _point(f"judge\0{text}") < judge_share:
        return "judge"
    return part_of(text, SHARES)


def part_of(text: str, shares: Mapping[Split, float]) -> Split:
    """The split of a text that is normalised, by its hash: each has its share of all texts."""
    point = _point(text)
    splits = list(shares)
    for split in splits[:-1]:
        if point < shares[split]:
            return split
        point -= shares[split]
    return splits[-1]


def _point(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def prompt_text(prompt: str | Sequence[dict[str, Any]]) -> str:
    """What is hashed of a prompt: its text, or its messages' texts, whatever the chat template.

    A user's message alone is its text, so that a text and a chat of it are one prompt.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


class NearDuplicate(NamedTuple):
    """Two prompts, by their places in the list, and the share of shingles that both have."""

    first: int
    second: int
    jaccard: float


SHINGLE = 13  # characters of the normalised prompt
BANDS, ROWS = 32, 4  # finds a pair of Jaccard 0.7 with probability 1 - (1 - 0.7^4)^32 = 0.9998


def near_duplicates(
    prompts: Sequence[str], groups: Sequence[str], threshold: float = 0.7
) -> list[NearDuplicate]:
    """Pairs of prompts of different groups whose shingles have a Jaccard index of `threshold`.

    Candidates come from MinHash (Broder 1997) in bands, and are then measured exactly. Prompts that
    are the same once normalised count as 1.
    """
    shingles = [_shingles(normalised(prompt)) for prompt in prompts]
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for number, found in enumerate(shingles):
        for band, values in enumerate(_minhash(found).reshape(BANDS, ROWS)):
            buckets.setdefault((band, values.tobytes()), []).append(number)
    candidates = {
        (first, second)
        for bucket in buckets.values()
        for place, second in enumerate(bucket)
        for first in bucket[max(0, place - NEIGHBOURS) : place]
        if groups[first] != groups[second]
    }
    measured = (
        NearDuplicate(first, second, _jaccard(shingles[first], shingles[second]))
        for first, second in sorted(candidates)
    )
    return [pair for pair in measured if pair.jaccard >= threshold]


NEIGHBOURS = 64  # of a bucket that hold more, such as prompts of one pattern, each meets so many


def _shingles(text: str) -> np.ndarray:
    """Distinct hashes of all runs of `SHINGLE` characters, (N,) uint64; of a shorter text one."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    if len(points) < SHINGLE:
        points = np.pad(points, (0, SHINGLE - len(points)))
    windows = np.lib.stride_tricks.sliding_window_view(points, SHINGLE)
    with np.errstate(over="ignore"):
        return np.unique(_mixed((windows * _ODD[:SHINGLE]).sum(axis=1, dtype=np.uint64)))


def _minhash(shingles: np.ndarray) -> np.ndarray:
    """(BANDS * ROWS,) uint64: the least of the shingles under each of so many hashes."""
    with np.errstate(over="ignore"):
        return _mixed(shingles[:, None] * _ODD[SHINGLE:] + _SHIFTS).min(axis=0)


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit depends on every other."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


_DRAWN = np.random.default_rng(13).integers(
    2**63, size=(2, SHINGLE + BANDS * ROWS), dtype=np.uint64
)
_ODD, _SHIFTS = _DRAWN[0] * np.uint64(2) + np.uint64(1), _DRAWN[1][SHINGLE:]
