"""What the pipeline needs of a task: prompts, a corpus to start from, the true score, labels."""

import hashlib
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast

Split = Literal["sft", "preference", "reward-test", "ppo", "validation", "test"]

_SHARES: dict[Split, float] = {
    "sft": 0.30,
    "preference": 0.30,
    "reward-test": 0.10,
    "ppo": 0.20,
    "validation": 0.05,
    "test": 0.05,
}


def split_of(prompt: str) -> Split:
    """The one split of a prompt, by its hash: no prompt meets two splits, whatever the seed."""
    point = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64
    for split, share in _SHARES.items():
        if point < share:
            return split
        point -= share
    return "test"


class Task(Protocol):
    """A source of prompts with a known true score."""

    name: str

    def tokenizer(self) -> PreTrainedTokenizerFast: ...

    def prompts(self, split: Split, count: int, seed: int) -> list[str]:
        """`count` prompts of `split`, different ones unless the task is finite."""
        ...

    def corpus(self, count: int, seed: int) -> list[tuple[str, str]]:
        """Prompts of the `sft` split with a completion each."""
        ...

    def gold(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """The true score of each completion, (N,)."""
        ...

    def well_formed(self, completion: str) -> bool:
        """Whether a completion that ended (was not cut) is proper text of this task."""
        ...

    def preference(self, gold_a: np.ndarray, gold_b: np.ndarray) -> np.ndarray:
        """Bradley-Terry P(a beats b), (N,)."""
        ...
