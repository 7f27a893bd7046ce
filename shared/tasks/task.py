"""What the pipeline needs of a task: prompts, a corpus to start from, the true score, labels."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from shared.data.splits import Split


class Demonstration(NamedTuple):
    """Token ids of a prompt and of what follows it, its EOS included."""

    prompt: list[int]
    completion: list[int]


def encode_corpus(
    tokenizer: PreTrainedTokenizerBase, corpus: Sequence[tuple[str, str]]
) -> list[Demonstration]:
    """Plain texts, prompt and completion encoded on their own; the completion gets its EOS."""
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    return [
        Demonstration(
            tokenizer(prompt).input_ids,
            [*tokenizer(completion, add_special_tokens=False).input_ids, eos],
        )
        for prompt, completion in corpus
    ]


class Task(Protocol):
    """A source of prompts, with a true score if `has_gold`, of `most_gold` at the most."""

    name: str
    has_gold: bool
    most_gold: float

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of a policy trained from scratch."""
        ...

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
        """The token ids that a policy goes on from."""
        ...

    def prompts(self, split: Split, count: int, seed: int) -> list[str]:
        """`count` prompts of `split`, different ones unless the task is finite."""
        ...

    def demonstrations(
        self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
    ) -> list[Demonstration]:
        """What SFT trains on: `count` prompts of the `sft` split with a completion each."""
        ...

    def gold(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """The true score of each completion, (N,); NaN without one.

        Texts are all it sees: a completion that was cut counts as if it had ended there.
        """
        ...

    def well_formed(self, completion: str) -> bool:
        """Whether a completion that ended (was not cut) is proper text of this task."""
        ...

    def preference(self, gold_a: np.ndarray, gold_b: np.ndarray) -> np.ndarray:
        """Bradley-Terry P(a beats b), (N,)."""
        ...


class PlainTexts(ABC):
    """What tasks of plain texts share: the tokenizer puts before a prompt what it puts before any
    text, and SFT trains on the task's `corpus`.
    """

    @abstractmethod
    def corpus(self, count: int, seed: int) -> list[tuple[str, str]]:
        """Prompts of the `sft` split with a completion each."""

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
        return [tokenizer(prompt).input_ids for prompt in prompts]

    def demonstrations(
        self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
    ) -> list[Demonstration]:
        return encode_corpus(tokenizer, self.corpus(count, seed))
