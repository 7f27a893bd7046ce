"""The task `exact`: its chain, its score and its listing agree with each other."""

import collections
import itertools

import numpy as np
import pytest

from shared.data.listing import list_completions
from shared.tasks.exact import EOS, Exact, ExactConfig

TASK = Exact(ExactConfig())
PROMPTS = TASK.prompts("test", 8, 0)


def test_there_are_as_many_prompts_and_completions_as_an_exact_answer_needs():
    tokenizer = TASK.tokenizer()
    assert len(tokenizer) <= 16
    assert len(set(PROMPTS)) == 8
    listing = list_completions(len(tokenizer), tokenizer.eos_token_id, TASK.config.cap)
    assert len(listing.completions) >= 500
    assert max(map(len, listing.completions)) == 4


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_chains_completions_are_a_distribution(prompt: str):
    listed = TASK.chain_probabilities(prompt)
    assert sum(listed.values()) == pytest.approx(1, abs=1e-12)
    assert min(listed.values()) > 0
    words = len(TASK.words)
    assert len(listed) == sum(words**n for n in range(4)) + words**4


def test_the_corpus_is_drawn_from_the_chain():
    """Counts of 40,000 completions, by prompt, within 5 standard errors."""
    drawn = collections.defaultdict(collections.Counter)
    for prompt, text in TASK.corpus(40_000, seed=1):
        words = tuple(text.split())
        drawn[prompt][words if len(words) == 4 else (*words, EOS)] += 1
    for prompt in PROMPTS:
        total = drawn[prompt].total()
        for words, p in TASK.chain_probabilities(prompt).items():
            error = np.sqrt(total * p * (1 - p))
            assert abs(drawn[prompt][words] - total * p) < 5 * error + 2


def test_gold_has_a_deviation_of_1_within_prompts():
    variances = []
    for prompt in PROMPTS:
        listed = TASK.chain_probabilities(prompt)
        texts = [" ".join(w for w in words if w != EOS) for words in listed]
        gold, p = TASK.gold([prompt] * len(texts), texts), np.array(list(listed.values()))
        variances.append((p * (gold - (p * gold).sum()) ** 2).sum())
    assert np.mean(variances) == pytest.approx(1, abs=1e-12)


def test_gold_is_a_sum_over_words_and_neighbours():
    """So inserting a word changes it by that word and its two new pairs, whatever else there is."""
    prompt, (a, b, c, d) = PROMPTS[0], TASK.words
    last = prompt.split()[-1]

    def gold(*words: str, of: str = prompt) -> float:
        return TASK.gold([of], [" ".join(words)])[0]

    def pair(x: str, y: str) -> float:
        return gold(x, y) - gold(x) - TASK._single[TASK.words.index(y)]

    for x, y in itertools.product(TASK.words, repeat=2):
        assert gold(x, y, x) == pytest.approx(
            gold(x) + pair(x, y) + pair(y, x)
            + TASK._single[TASK.words.index(y)] + TASK._single[TASK.words.index(x)]
        )  # fmt: skip
    other = next(p for p in PROMPTS if p.split()[-1] == last and p != prompt)
    assert gold(a, b, c, d) == gold(a, b, c, d, of=other)  # only the prompt's last word counts
    assert gold() == 0


def test_labels_are_bradley_terry():
    a, b = np.array([0.0, 1.0]), np.array([0.0, -1.0])
    np.testing.assert_allclose(TASK.preference(a, b), [0.5, 1 / (1 + np.exp(-2))])


def test_the_seed_makes_another_world_and_the_same_seed_the_same():
    same, other = Exact(ExactConfig()), Exact(ExactConfig(seed=1))
    texts = [" ".join(words) for words in itertools.product(TASK.words, repeat=3)]
    gold = [task.gold([PROMPTS[0]] * len(texts), texts) for task in (TASK, same, other)]
    np.testing.assert_array_equal(gold[0], gold[1])
    assert np.abs(gold[0] - gold[2]).max() > 0.1


def test_prompts_come_in_turn_in_every_split():
    drawn = TASK.prompts("preference", 20, seed=3)
    counts = collections.Counter(drawn)
    assert set(counts) == set(PROMPTS)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert TASK.prompts("preference", 20, seed=4) != drawn
    assert set(TASK.prompts("test", 8, seed=0)) == set(TASK.prompts("sft", 8, seed=5))


def test_more_prompts_than_the_words_make_are_refused():
    with pytest.raises(ValueError, match="9 prompts, not 12"):
        Exact(ExactConfig(words=3, prompts=12))
