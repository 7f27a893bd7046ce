"""`reviews`: film reviews from a seeded probabilistic grammar, scored by VADER.

A prompt is the opening of a review ("the plot was not very memorable but"), a completion goes on
from there ("the hero seemed brave ."). The gold score is VADER's compound score of the two read
together, in [-1, 1]: negation, boosters and "but" make it compositional (Hutto & Gilbert 2014).
The same grammar that writes the corpus parses what a policy writes.
"""

import bisect
import functools
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from shared.config import Config, InputError
from shared.data.splits import Split, split_of
from shared.seeds import seed_of
from shared.tasks.task import PlainTexts

Grammar = dict[str, list[tuple[float, tuple[str, ...]]]]

# Adjectives and verbs: VADER's own words, and neutral ones that it does not know.
_WORDS = {
    "GOOD": "good great brave charming brilliant clever funny beautiful excellent wonderful "
    "delightful inspiring superb perfect",
    "BAD": "bad terrible awful boring dull weak stupid ugly horrible messy painful pathetic "
    "disappointing miserable",
    "PLAIN": "memorable quiet long modern familiar simple slow predictable",
    "LIKED": "loved liked enjoyed admired",
    "LIKE": "love like enjoy admire",
    "LOATHED": "hated disliked despised regretted",
    "LOATHE": "hate dislike despise regret",
    "SAW": "noticed remembered watched",
    "SEE": "notice remember watch",
    "NOUN": "plot ending script music acting cast director dialogue pacing camera setting sequel "
    "scene story song twist opening finale soundtrack editing premise lighting narrator costume",
    "PERSON": "i we they everyone",
    "COPULA": "was seemed felt looked",
    "BOOST": "very really extremely incredibly quite slightly somewhat barely",
}

# Clauses have a mood. A prompt's mood and its conjunction make the mood of what follows likely
# ("... was dull and" goes on downcast), so that the language model learns which words belong
# together; MIXED derives any sequence of clauses, so that no steering by mood is ill-formed.
GRAMMAR: Grammar = {
    "PROMPT": [
        (0.35, ("UP", "CONJUNCTION")),
        (0.4, ("DOWN", "CONJUNCTION")),
        (0.25, ("FLAT", "CONJUNCTION")),
    ],
    "CONJUNCTION": [(0.5, ("but",)), (0.5, ("and",))],
    "COMPLETION": [(0.34, ("UPBEAT",)), (0.36, ("DOWNBEAT",)), (0.30, ("MIXED",))],
    "AFTER_UP_and": [(0.60, ("UPBEAT",)), (0.15, ("DOWNBEAT",)), (0.25, ("MIXED",))],
    "AFTER_UP_but": [(0.15, ("UPBEAT",)), (0.55, ("DOWNBEAT",)), (0.30, ("MIXED",))],
    "AFTER_DOWN_and": [(0.15, ("UPBEAT",)), (0.60, ("DOWNBEAT",)), (0.25, ("MIXED",))],
    "AFTER_DOWN_but": [(0.55, ("UPBEAT",)), (0.15, ("DOWNBEAT",)), (0.30, ("MIXED",))],
    "AFTER_FLAT_and": [(0.30, ("UPBEAT",)), (0.30, ("DOWNBEAT",)), (0.40, ("MIXED",))],
    "AFTER_FLAT_but": [(0.35, ("UPBEAT",)), (0.35, ("DOWNBEAT",)), (0.30, ("MIXED",))],
    "UPBEAT": [(0.7, ("UP", ".")), (0.3, ("UP", ".", "UPBEAT"))],
    "DOWNBEAT": [(0.7, ("DOWN", ".")), (0.3, ("DOWN", ".", "DOWNBEAT"))],
    "MIXED": [(0.8, ("SENTENCE",)), (0.2, ("SENTENCE", "MIXED"))],
    "SENTENCE": [(0.85, ("CLAUSE", ".")), (0.15, ("CLAUSE", "CONJUNCTION", "CLAUSE", "."))],
    "CLAUSE": [(0.28, ("UP",)), (0.30, ("DOWN",)), (0.42, ("FLAT",))],
    "UP": [(0.7, ("THING", "COPULA", "PRAISE")), (0.3, ("PERSON", "LIKING", "THING"))],
    "DOWN": [(0.7, ("THING", "COPULA", "BLAME")), (0.3, ("PERSON", "LOATHING", "THING"))],
    "FLAT": [(0.7, ("THING", "COPULA", "REMARK")), (0.3, ("PERSON", "SEEING", "THING"))],
    "THING": [(1.0, ("the", "NOUN"))],
    "PRAISE": [
        (0.50, ("GOOD",)),
        (0.30, ("BOOST", "GOOD")),
        (0.14, ("not", "BAD")),
        (0.06, ("not", "BOOST", "BAD")),
    ],
    "BLAME": [
        (0.50, ("BAD",)),
        (0.30, ("BOOST", "BAD")),
        (0.14, ("not", "GOOD")),
        (0.06, ("not", "BOOST", "GOOD")),
    ],
    "REMARK": [(0.5, ("PLAIN",)), (0.3, ("BOOST", "PLAIN")), (0.2, ("not", "PLAIN"))],
    "LIKING": [(0.6, ("LIKED",)), (0.2, ("really", "LIKED")), (0.2, ("did", "not", "LOATHE"))],
    "LOATHING": [(0.6, ("LOATHED",)), (0.2, ("really", "LOATHED")), (0.2, ("did", "not", "LIKE"))],
    "SEEING": [(0.75, ("SAW",)), (0.25, ("did", "not", "SEE"))],
} | {name: [(1.0, (word,)) for word in words.split()] for name, words in _WORDS.items()}

_KINDS = {name: frozenset(words.split()) for name, words in _WORDS.items()}

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"


class ReviewsConfig(Config):
    """The task `reviews`."""

    label_scale: float = 3.0
    """How sharply labels follow gold: P(a beats b) = sigmoid(label_scale * (gold_a - gold_b))."""


class Reviews(PlainTexts):
    """The task `reviews`; see `shared.tasks.task.Task`."""

    name = "reviews"
    has_gold = True
    most_gold = 1.0

    def __init__(self, config: ReviewsConfig):
        self.config = config
        self._vader = SentimentIntensityAnalyzer()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a word; pad, eos and unk apart."""
        words = sorted({s for rules in GRAMMAR.values() for _, rule in rules for s in rule})
        words = [PAD, EOS, UNKNOWN, *(word for word in words if word not in GRAMMAR)]
        vocabulary = {word: index for index, word in enumerate(words)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN
        )

    def prompts(self, split: Split, count: int, seed: int) -> list[str]:
        return list(_prompts(split, count, seed))

    def corpus(self, count: int, seed: int) -> list[tuple[str, str]]:
        rng = np.random.default_rng(seed_of(seed, "corpus"))
        prompts = self.prompts("sft", count, seed)
        return [(prompt, sample(_what_follows(prompt), rng)) for prompt in prompts]

    def gold(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        texts = (f"{p} {c}" for p, c in zip(prompts, completions, strict=True))
        return np.array([self._vader.polarity_scores(text)["compound"] for text in texts])

    def well_formed(self, completion: str) -> bool:
        return _is_review(completion)

    def preference(self, gold_a: np.ndarray, gold_b: np.ndarray) -> np.ndarray:
        return 1.0 / (1.0 + np.exp(-self.config.label_scale * (gold_a - gold_b)))


@functools.lru_cache(maxsize=16)  # a process evaluates many policies on the same prompts
def _prompts(split: Split, count: int, seed: int) -> tuple[str, ...]:
    rng = np.random.default_rng(seed_of(seed, f"{split} prompts"))
    found: dict[str, None] = {}
    drawn = 0
    while len(found) < count:
        prompt = sample("PROMPT", rng)
        drawn += 1
        if split_of(prompt) == split:
            found[prompt] = None
        if drawn > 1000 + 200 * count:
            raise InputError(
                f"reviews: found {len(found)} different `{split}` prompts, {count} were asked "
                "for; the grammar has no more, ask for fewer"
            )
    return tuple(found)


def sample(symbol: str, rng: np.random.Generator) -> str:
    """Text drawn from `symbol`."""
    if symbol not in GRAMMAR:
        return symbol
    cumulative, rules = _rules(symbol)
    choice = bisect.bisect_right(cumulative, rng.random(), hi=len(rules) - 1)
    return " ".join([sample(part, rng) for part in rules[choice]])


def accepts(symbol: str, words: Sequence[str]) -> bool:
    """Whether `symbol` derives exactly `words`."""
    return len(words) in _ends(symbol, words, {0})


@functools.lru_cache(maxsize=200_000)
def _is_review(completion: str) -> bool:
    return accepts("COMPLETION", completion.split())


def _what_follows(prompt: str) -> str:
    """The symbol that a prompt's own mood and conjunction lead to."""
    *clause, conjunction = prompt.split()
    mood = next(mood for mood in ("UP", "DOWN", "FLAT") if accepts(mood, clause))
    return f"AFTER_{mood}_{conjunction}"


def _ends(symbol: str, words: Sequence[str], starts: set[int]) -> set[int]:
    """Where a derivation of `symbol` that begins at one of `starts` can end (no left recursion)."""
    if symbol in _KINDS or symbol not in GRAMMAR:
        kind = _KINDS.get(symbol, (symbol,))
        return {i + 1 for i in starts if i < len(words) and words[i] in kind}
    ends: set[int] = set()
    for _, rule in GRAMMAR[symbol]:
        positions = starts
        for part in rule:
            positions = _ends(part, words, positions) if positions else positions
        ends |= positions
    return ends


@functools.cache
def _rules(symbol: str) -> tuple[list[float], list[tuple[str, ...]]]:
    weights = np.array([weight for weight, _ in GRAMMAR[symbol]])
    return np.cumsum(weights / weights.sum()).tolist(), [rule for _, rule in GRAMMAR[symbol]]
