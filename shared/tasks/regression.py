"""A score learnt from rated texts: ridge regression on TF-IDF of words, their stems and pairs.

    score(text) = mean rating + x(text) . w,   w = argmin |X w - (y - mean)|^2 + strength |w|^2

x is the text's TF-IDF vector of length 1 (Salton & Buckley 1988, with the smoothed idf that
scikit-learn has: ln((1 + n) / (1 + df)) + 1), over the terms that two texts or more hold: words,
pairs of neighbouring words, and the first six letters of longer words, which "captivates" and
"captivating" share. A text without a known term scores the mean. No weights of any language model
are in it.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.linalg import lsqr

Array = NDArray[np.float64]

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
MIN_TEXTS = 2  # in which a term must stand
STEM = 6  # letters of a longer word that are a term of their own


def words_of(text: str) -> list[str]:
    """Words in lower case, an apostrophe within them kept: `isn't`."""
    return _WORD.findall(text.casefold())


@dataclass(frozen=True)
class Terms:
    """The terms of a set of texts, each with its weight: what turns texts into vectors."""

    column: dict[str, int]
    idf: Array

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Terms":
        """Terms that stand in `MIN_TEXTS` of the texts or more."""
        found = Counter(term for text in texts for term in set(_terms(text)))
        kept = sorted(term for term, count in found.items() if count >= MIN_TEXTS)
        counts = np.array([found[term] for term in kept], dtype=np.float64)
        idf = np.log((1 + len(texts)) / (1 + counts)) + 1
        return cls({term: number for number, term in enumerate(kept)}, idf)

    def vectors(self, texts: Sequence[str]) -> csr_array:
        """(N, terms): term counts times idf, each row of length 1, or 0 without a known term."""
        values, columns, ends = [], [], [0]
        for text in texts:
            counts = Counter(self.column[t] for t in _terms(text) if t in self.column)
            row = np.array([*counts.values()]) * self.idf[[*counts]] if counts else np.zeros(0)
            values.append(row / np.linalg.norm(row) if counts else row)
            columns.extend(counts)
            ends.append(len(columns))
        data = np.concatenate([np.zeros(0), *values])
        return csr_array((data, columns, ends), shape=(len(texts), len(self.column)))


@dataclass(frozen=True)
class TextRegression:
    """A fitted score of texts."""

    terms: Terms
    weights: Array
    mean: float
    strength: float

    @classmethod
    def fit(cls, texts: Sequence[str], ratings: Array, strength: float) -> "TextRegression":
        """Fitted to `ratings` (N,) at one ridge `strength`."""
        terms, mean = Terms.of(texts), float(ratings.mean())
        weights = _ridge(terms.vectors(texts), ratings - mean, strength)
        return cls(terms, weights, mean, strength)

    def __call__(self, texts: Sequence[str]) -> Array:
        """The scores of `texts`, (N,), in units of the ratings."""
        return np.asarray(self.terms.vectors(texts) @ self.weights) + self.mean


def choose_strength(
    texts: Sequence[str], ratings: Array, strengths: Sequence[float], folds: int = 5
) -> float:
    """The ridge strength of the least squared error on parts that were not fitted on.

    Text number i is in fold i mod `folds`. Terms and weights come from the other folds.
    """
    errors = dict.fromkeys(strengths, 0.0)
    fold = np.arange(len(texts)) % folds
    for out in range(folds):
        fitted = [text for text, number in zip(texts, fold, strict=True) if number != out]
        left = [text for text, number in zip(texts, fold, strict=True) if number == out]
        terms, mean = Terms.of(fitted), ratings[fold != out].mean()
        x, held_out = terms.vectors(fitted), terms.vectors(left)
        for strength in strengths:
            weights = _ridge(x, ratings[fold != out] - mean, strength)
            errors[strength] += float(
                ((mean + held_out @ weights - ratings[fold == out]) ** 2).sum()
            )
    return min(errors, key=errors.__getitem__)


def _ridge(x: csr_array, y: Array, strength: float) -> Array:
    """argmin |x w - y|^2 + strength |w|^2 (Paige & Saunders 1982)."""
    return lsqr(x, y, damp=strength**0.5, atol=1e-8, btol=1e-8, iter_lim=1000)[0]


def _terms(text: str) -> list[str]:
    words = words_of(text)
    pairs = [f"{a} {b}" for a, b in pairwise(words)]
    return [*words, *pairs, *(f"{word[:STEM]}-" for word in words if len(word) > STEM)]
