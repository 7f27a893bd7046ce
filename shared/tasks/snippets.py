"""`snippets`: openings of real film reviews, scored by what people's ratings of others teach.

A prompt is the first four to eight words of a rated sentence ("This is a film well"), a completion
goes on from there (" worth seeing, talking and singing heads and all."). Gold is a ridge regression
on words (`regression`), fitted to people's mean ratings (`snippets_data`), from -4 to 4: it reads
prompt and completion together and shares no weights with any policy. VADER, which has never seen a
rating of these sentences, is the second opinion.

Every sentence is in one split only, by the hash of its first four words, so that an opening of two
sentences is in one split too. Gold is fitted on the sentences of `sft`, which is the largest for
that: SFT reads their text, never their ratings. Of the other splits' sentences policies and reward
models meet the openings alone, and gold has seen none of them; the ratings of those that nothing
trains on say how far gold can be trusted.
"""

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import norm
from transformers import PreTrainedTokenizerBase
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from shared.config import Config, InputError
from shared.data.splits import Split, part_of
from shared.seeds import seed_of
from shared.tasks.regression import TextRegression, choose_strength, words_of
from shared.tasks.snippets_data import Sentence, read_sentences, require_published
from shared.tasks.task import PlainTexts

Array = NDArray[np.float64]

KEY, LONGEST, REST = 4, 8, 4  # words: of the shortest opening, of the longest, and left at least
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
_SHARES: dict[Split, float] = {
    "sft": 0.60,
    "preference": 0.16,
    "reward-test": 0.05,
    "ppo": 0.13,
    "validation": 0.03,
    "test": 0.03,
}
_HELD_OUT: tuple[Split, ...] = ("reward-test", "validation", "test")  # nothing trains on them
_END = re.compile(r"""[.!?]["')\]]*$""")


class SnippetsConfig(Config):
    """The task `snippets`."""

    data: Path = Path("data/snippets")
    """The folder of the film sentences and their ratings; `make snippets` fills it."""
    longest_rest: int = Field(default=14, ge=REST)
    """Most words of a completion in the corpus: what a policy learns to end within."""


@dataclass(frozen=True)
class GoldQuality:
    """How well scores follow people's mean ratings of sentences that nothing was fitted on."""

    sentences: int
    correlation: float  # Pearson's, of gold
    second_opinion: float  # Pearson's, of VADER
    rater_sd: float  # of one person's rating of a sentence
    strength: float  # of the ridge


class Snippets(PlainTexts):
    """The task `snippets`; see `shared.tasks.task.Task`."""

    name = "snippets"
    has_gold = True
    most_gold = 4.0

    def __init__(self, config: SnippetsConfig):
        self.config = config
        self.film = read_film(config.data)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """None of its own: prompts are plain text, and the policy brings its tokenizer."""
        raise InputError(
            "task `snippets` needs a pretrained model, whose tokenizer it takes: set "
            "`model.pretrained`, such as models/smollm2-135m (`make smollm2`)"
        )

    def prompts(self, split: Split, count: int, seed: int) -> list[str]:
        """Different sentences before a second opening of the same one."""
        found = dict.fromkeys(opening for opening, _ in self._openings(split, seed))
        if len(found) < count:
            raise InputError(
                f"snippets: found {len(found)} different `{split}` openings in {self.config.data}, "
                f"{count} were asked for; ask for fewer"
            )
        return [*found][:count]

    def corpus(self, count: int, seed: int) -> list[tuple[str, str]]:
        """Openings of `sft` sentences with the rest, a space before it, that is short enough."""
        most = self.config.longest_rest
        rows = [(o, f" {r}") for o, r in self._openings("sft", seed) if len(r.split()) <= most]
        if len(rows) < count:
            raise InputError(
                f"snippets: found {len(rows)} examples of at most {most} words after the opening, "
                f"{count} were asked for; lower `sft.examples` or raise "
                "`task.snippets.longest_rest`"
            )
        return rows[:count]

    def gold(self, prompts: Sequence[str], completions: Sequence[str]) -> Array:
        """The rating, -4 to 4, that the regression expects of prompt and completion."""
        return self.rate([p + c for p, c in zip(prompts, completions, strict=True)])

    def second_opinion(self, prompts: Sequence[str], completions: Sequence[str]) -> Array:
        """VADER's compound score, -1 to 1, of prompt and completion."""
        return vader([p + c for p, c in zip(prompts, completions, strict=True)])

    def rate(self, texts: Sequence[str]) -> Array:
        """Gold of whole texts, (N,)."""
        return self.film.gold(texts).clip(-self.most_gold, self.most_gold)

    def well_formed(self, completion: str) -> bool:
        """It ends as a sentence does; three in four of its words, and one at least, are known from
        the sentences; no word stands three times running, and no pair of words three times.
        """
        words = words_of(completion)
        known = sum(word in self.film.vocabulary for word in words)
        pairs = Counter(pairwise(words))
        return (
            _END.search(completion.rstrip()) is not None
            and known >= max(1, 0.75 * len(words))
            and not any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False))
            and max(pairs.values(), default=0) < 3
        )

    def preference(self, gold_a: Array, gold_b: Array) -> Array:
        """P(one person rates a above b): each side is rated once, by gold plus normal noise of
        the raters' own spread within a sentence.

            P = Phi((gold_a - gold_b) / (sqrt(2) spread))

        Simulated ratings are not rounded, so that none tie. Whole numbers of the same spread, with
        ties tossed by a coin, would give the same to within 0.02.
        """
        return norm.cdf((gold_a - gold_b) / (2**0.5 * self.film.rater_sd))

    def gold_quality(self) -> GoldQuality:
        """Of gold and the second opinion, on sentences that nothing trains or is fitted on."""
        sentences = [s for split in _HELD_OUT for s in self.film.splits[split]]
        texts, means = [s.text for s in sentences], _means(sentences)
        of_gold, of_vader = (np.corrcoef(f(texts), means)[0, 1] for f in (self.rate, vader))
        numbers = float(of_gold), float(of_vader), self.film.rater_sd, self.film.gold.strength
        return GoldQuality(len(sentences), *numbers)

    def _openings(self, split: Split, seed: int) -> list[tuple[str, str]]:
        """(opening, rest) of the split's sentences, in a seeded order: of each a first one, then
        of each a second one, as long as there are. An opening does not end a sentence."""
        rng = np.random.default_rng(seed_of(seed, f"{split} prompts"))
        sentences = [s.text.split() for s in self.film.splits[split]]
        rounds: list[list[tuple[str, str]]] = [[] for _ in range(KEY, LONGEST + 1)]
        for number in rng.permutation(len(sentences)):
            words = sentences[number]
            longest = min(LONGEST, len(words) - REST)
            open_ended = [n for n in range(KEY, longest + 1) if not _END.search(words[n - 1])]
            lengths = rng.permutation(np.array(open_ended, dtype=int))
            for turn, length in zip(rounds, lengths, strict=False):
                turn.append((" ".join(words[:length]), " ".join(words[length:])))
        return [opening for turn in rounds for opening in turn]


@dataclass(frozen=True)
class Film:
    """The sentences by split, and what was fitted to those of `sft`."""

    splits: dict[Split, list[Sentence]]
    gold: TextRegression
    rater_sd: float  # of one person's rating of a sentence
    vocabulary: frozenset[str]  # words of all sentences


@functools.lru_cache(maxsize=4)  # a process makes the task many times, and fitting takes seconds
def read_film(folder: Path) -> Film:
    """The published sentences in `folder` by split; any others are refused, since a stage's address
    holds the folder's name and not what is in it."""
    require_published(folder)
    return fit_film(read_sentences(folder))


def fit_film(sentences: Sequence[Sentence]) -> Film:
    """The sentences, without near-copies, by split; gold fitted to those of `sft`."""
    splits: dict[Split, list[Sentence]] = {split: [] for split in _SHARES}
    for sentence in without_copies(sentences):
        splits[part_of(key_of(sentence.text), _SHARES)].append(sentence)
    fitted, ratings = [s.text for s in splits["sft"]], _means(splits["sft"])
    gold = TextRegression.fit(fitted, ratings, choose_strength(fitted, ratings, STRENGTHS))
    within = np.mean([np.var(s.ratings, ddof=1) for s in splits["sft"]])
    vocabulary = frozenset(word for s in sentences for word in words_of(s.text))
    return Film(splits, gold, float(within**0.5), vocabulary)


def key_of(text: str) -> str:
    """What decides in which split a sentence and all of its openings are: the first four words,
    in lower case and without punctuation."""
    return " ".join(re.sub(r"\W", "", word.casefold()) for word in text.split()[:KEY])


def without_copies(sentences: Sequence[Sentence]) -> list[Sentence]:
    """The sentences, but for those of which a run of eight words stands in an earlier one."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for sentence in sentences:
        words = words_of(sentence.text)
        runs = {tuple(words[i : i + 8]) for i in range(max(1, len(words) - 7))}
        if not runs & seen:
            kept.append(sentence)
            seen |= runs
    return kept


def vader(texts: Sequence[str]) -> Array:
    """VADER's compound scores, -1 to 1, (N,)."""
    analyzer = _analyzer()
    return np.array([analyzer.polarity_scores(text)["compound"] for text in texts])


@functools.cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def _means(sentences: Sequence[Sentence]) -> Array:
    return np.array([float(np.mean(s.ratings)) for s in sentences])
