"""What tells chosen from rejected without reading them: length, the first words, the last word.

A method learns the easiest thing that the labels show. Where length alone is right nearly always,
that is what every method will learn first.
"""

from array import array
from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np

WINDOW = 100  # characters at either end in which these words are looked for
LIMIT = 0.9  # accuracy at which one of these gives the labels away
# What an answer begins and ends with: 0 is its blanks and whether a capital follows, then words.
FIRST, LAST = ("first 0", "first 1", "first 2", "first 3"), ("last 0", "last 1")
FEWEST = 32  # pairs below which that may be chance


class Accuracies(NamedTuple):
    """Share of pairs in which each alone finds the chosen answer, ties half; 0.5 says nothing.

    Words are counted on one half of the pairs and tried on the other.
    """

    pairs: int
    longer_chosen: float
    first_words: float
    last_words: float

    @property
    def length(self) -> float:
        """Accuracy of the better of `the longer` and `the shorter is chosen`."""
        return max(self.longer_chosen, 1 - self.longer_chosen)


class Answers:
    """Length and a few words of each answer, in some bytes a row."""

    def __init__(self) -> None:
        self.numbers, self.lengths = array("q"), array("q")
        self.words = {name: array("q") for name in (*FIRST, *LAST)}

    def add(self, answer: str, number: int = 0) -> None:
        """Take what is counted of one more answer, of the row called `number`."""
        self.numbers.append(number)
        self.lengths.append(len(answer))
        first = answer[:WINDOW].lower().split(None, 3)[:3]
        last = answer[-WINDOW:].lower().rsplit(None, 1)[-1:]
        for count in (1, 2, 3):
            self.words[f"first {count}"].append(hash(tuple(first[:count])))
        self.words["last 1"].append(hash(tuple(last)))
        begin, end = answer.lstrip()[:1], answer.rstrip()
        blanks = answer[: len(answer) - len(answer.lstrip())]
        self.words["first 0"].append(hash((blanks, begin.isupper(), begin.islower())))
        self.words["last 0"].append(hash(answer[len(end) :]))

    def without(self, gone: set[int]) -> "Answers":
        """But for those of the rows in `gone`."""
        if not gone:
            return self
        kept, stays = Answers(), [number not in gone for number in self.numbers]
        kept.numbers = array("q", compress(self.numbers, stays))
        kept.lengths = array("q", compress(self.lengths, stays))
        kept.words = {n: array("q", compress(each, stays)) for n, each in self.words.items()}
        return kept

    def __len__(self) -> int:
        return len(self.lengths)


def count_sides(
    better: Answers,
    worse: Answers,
    chosen: str,
    rejected: str | None,
    label: bool | None,
    number: int = 0,
) -> None:
    """Count a row's answers: of a pair both, of an answer with a label the one it is."""
    if rejected is not None:
        better.add(chosen, number)
        worse.add(rejected, number)
    elif label is not None:
        (better if label else worse).add(chosen, number)


def accuracies(better: Answers, worse: Answers) -> Accuracies | None:
    """How well each alone tells `better` from `worse`, which line up; None of no pairs.

    Of answers with labels the two are as many of each as there are of the rarer.
    """
    count = min(len(better), len(worse))
    if count == 0:
        return None
    longer, shorter = (np.array(side.lengths[:count]) for side in (better, worse))
    by_words = {
        name: _by_words(better.words[name][:count], worse.words[name][:count])
        for name in better.words
    }
    return Accuracies(
        pairs=count,
        longer_chosen=float(np.mean(longer > shorter) + np.mean(longer == shorter) / 2),
        first_words=max(by_words[name] for name in FIRST),
        last_words=max(by_words[name] for name in LAST),
    )


def _by_words(better: Sequence[int], worse: Sequence[int]) -> float:
    """Accuracy of "whose words were chosen more often than rejected", across two halves."""
    _, numbers = np.unique(np.concatenate([np.array(better), np.array(worse)]), return_inverse=True)
    chosen, rejected = numbers[: len(better)], numbers[len(better) :]
    right = 0.0
    for half in (0, 1):
        seen = np.arange(len(chosen)) % 2 != half
        size = numbers.max() + 1
        counts = [np.bincount(side[seen], minlength=size) + 1 for side in (chosen, rejected)]
        score = np.log(counts[0] / counts[1])
        margin = score[chosen[~seen]] - score[rejected[~seen]]
        right += float((margin > 0).sum() + (margin == 0).sum() / 2)
    return right / len(chosen)
