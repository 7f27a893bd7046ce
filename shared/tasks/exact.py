"""`exact`: so few words that every completion can be listed, and every optimum is a number.

A prompt is two words; a completion goes on for up to `cap` tokens. The corpus is a seeded Markov
chain over the words with an end; the gold score is a seeded effect of every word and of every pair
of neighbours, the prompt's last word included, scaled to a standard deviation of 1 within prompts
under the chain. Nothing is held out: there are few prompts, and the question is not generalisation
but how near a method comes to the optimum.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shared.config import Config
from shared.data.splits import Split
from shared.seeds import seed_of
from shared.tasks.task import PlainTexts

PAD, EOS = "<pad>", "</s>"
_WORDS = [
    *("ash", "birch", "cedar", "elm", "fir", "hazel", "juniper"),
    *("larch", "maple", "oak", "pine", "rowan", "spruce"),
]
Array = NDArray[np.float64]


class ExactConfig(Config):
    """The task `exact`: `words` and `cap` bound how many completions are listed for each prompt,
    781 with 4 and 4, those with a pad token among the words included.
    """

    words: int = Field(default=4, ge=3, le=len(_WORDS))
    """Words that prompts and completions are made of."""
    prompts: int = Field(default=8, gt=1)
    """Prompts, two words each; training, validation and test all use the same ones."""
    cap: int = Field(default=4, gt=0, le=6)
    """Most tokens of a completion; `sampling.max_new_tokens` must be the same number."""
    seed: int = Field(default=0, ge=0)
    """Draws the Markov chain behind the corpus, and the effects of words behind gold."""


class Exact(PlainTexts):
    """The task `exact`; see `shared.tasks.task.Task`."""

    name = "exact"
    has_gold = True
    most_gold = float("inf")

    def __init__(self, config: ExactConfig):
        self.config, self.words = config, list(_WORDS[: config.words])
        rng = np.random.default_rng(seed_of(config.seed, "chain and effects"))
        size = config.words
        # Rows: the word before; columns: the next word, and last the end.
        chain = rng.gamma(1.5, size=(size, size + 1))
        self.chain: Array = chain / chain.sum(1, keepdims=True)
        effects = rng.normal(size=size), rng.normal(size=(size, size))
        pairs = [" ".join(pair) for pair in itertools.product(self.words, repeat=2)]
        self._prompts = [pairs[i] for i in rng.permutation(len(pairs))[: config.prompts]]
        if len(self._prompts) < config.prompts:
            raise ValueError(f"{size} words make {len(pairs)} prompts, not {config.prompts}")
        self._single, self._double = effects
        scale = self._deviation()
        self._single, self._double = (effect / scale for effect in effects)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a word; pad and EOS apart."""
        vocabulary = {word: index for index, word in enumerate([PAD, EOS, *self.words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)

    def prompts(self, split: Split, count: int, seed: int) -> list[str]:
        """All prompts in turn, in a seeded order, until there are `count`; as in any split."""
        rng = np.random.default_rng(seed_of(seed, f"{split} prompts"))
        order = rng.permutation(len(self._prompts))
        return [self._prompts[order[i % len(order)]] for i in range(count)]

    def corpus(self, count: int, seed: int) -> list[tuple[str, str]]:
        """Prompts with what the chain goes on with, cut at the cap."""
        rng = np.random.default_rng(seed_of(seed, "corpus"))
        return [(prompt, self._sample(prompt, rng)) for prompt in self.prompts("sft", count, seed)]

    def gold(self, prompts: Sequence[str], completions: Sequence[str]) -> Array:
        return np.array(
            [self._effect(p, c.split()) for p, c in zip(prompts, completions, strict=True)]
        )

    def well_formed(self, completion: str) -> bool:
        """Anything goes: drift has no meaning here."""
        return True

    def preference(self, gold_a: Array, gold_b: Array) -> Array:
        """sigmoid(gold_a - gold_b): gold is the reward r of the theory, in log-odds."""
        return 1.0 / (1.0 + np.exp(gold_b - gold_a))

    def chain_probabilities(self, prompt: str) -> dict[tuple[str, ...], float]:
        """P(completion | prompt) under the chain: ended ones end with EOS, cut ones do not."""
        found: dict[tuple[str, ...], float] = {}
        going: dict[tuple[str, ...], float] = {(): 1.0}
        for _ in range(self.config.cap):
            further: dict[tuple[str, ...], float] = {}
            for words, p in going.items():
                row = self.chain[self._index(words[-1] if words else prompt.split()[-1])]
                found[(*words, EOS)] = p * row[-1]
                for word, share in zip(self.words, row[:-1], strict=True):
                    further[(*words, word)] = p * share
            going = further
        return found | going

    def _sample(self, prompt: str, rng: np.random.Generator) -> str:
        words, last = [], self._index(prompt.split()[-1])
        while len(words) < self.config.cap:
            last = int(rng.choice(len(self.words) + 1, p=self.chain[last]))
            if last == len(self.words):
                break
            words.append(self.words[last])
        return " ".join(words)

    def _effect(self, prompt: str, words: Sequence[str]) -> float:
        row = [self._index(word) for word in (prompt.split()[-1], *words) if word in self.words]
        return float(
            sum(self._single[i] for i in row[1:])
            + sum(self._double[i, j] for i, j in itertools.pairwise(row))
        )

    def _deviation(self) -> float:
        """Of gold within prompts, under the chain: the root of the mean variance."""
        variances = []
        for prompt in self._prompts:
            listed = self.chain_probabilities(prompt)
            p = np.array(list(listed.values()))
            gold = np.array([self._effect(prompt, words) for words in listed])
            variances.append((p * gold**2).sum() - (p * gold).sum() ** 2)
        return float(np.sqrt(np.mean(variances)))

    def _index(self, word: str) -> int:
        return self.words.index(word)
