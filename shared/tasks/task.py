"""What the pipeline needs of a task: prompts, a corpus to start from, the true score, labels."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerFast

from shared.data.splits import Split


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
