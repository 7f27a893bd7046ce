"""Splits: a prompt has one, whatever else is there; near-duplicates across them are found."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.splits import SHARES, near_duplicates, normalised, prompt_text, split_of

PROMPTS = st.text(min_size=1, max_size=30)


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(PROMPTS, min_size=1, max_size=20), st.lists(PROMPTS, max_size=10), st.floats(0, 0.5)
)
def test_no_prompt_in_two_splits_and_none_moves_when_others_come(
    prompts: list[str], others: list[str], judge_share: float
):
    """A generated dataset each; a prompt's other spellings are the same prompt."""
    before = {prompt: split_of(prompt, judge_share) for prompt in prompts}
    after = {prompt: split_of(prompt, judge_share) for prompt in [*others, *reversed(prompts)]}
    assert before.items() <= after.items()
    by_text: dict[str, set[str]] = {}
    for prompt, split in after.items():
        by_text.setdefault(normalised(prompt), set()).add(split)
    assert all(len(splits) == 1 for splits in by_text.values())
    for prompt, split in before.items():
        assert split_of(f"  {prompt}\n", judge_share) == split
        assert split in ("judge", split_of(prompt))  # the others stay where they are without one


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Where is  Oslo?", "where is oslo?"),
        ("\ufb01ne", "FINE"),  # a ligature
        ("cafe\u0301", "Caf\u00e9"),  # an accent on its own
        ("a\u00a0b", "a b"),
        ("stra\u00dfe", "STRASSE"),
    ],
)
def test_spellings_of_one_prompt(one: str, other: str):
    assert normalised(one) == normalised(other)


@given(PROMPTS)
def test_normalising_again_changes_nothing(prompt: str):
    assert normalised(normalised(prompt)) == normalised(prompt)


def test_shares():
    """Binomial: 20,000 prompts are within 5 standard errors of every share."""
    count, judge = 20_000, 0.1
    found = [split_of(f"prompt {n}", judge) for n in range(count)]
    for name, share in {**{k: (1 - judge) * v for k, v in SHARES.items()}, "judge": judge}.items():
        error = np.sqrt(share * (1 - share) / count)
        assert abs(found.count(name) / count - share) < 5 * error
    assert sum(SHARES.values()) == pytest.approx(1)


def test_a_chat_of_one_message_and_its_text_are_one_prompt():
    ask = {"role": "user", "content": "Why?"}
    assert prompt_text([ask]) == prompt_text("Why?")
    assert prompt_text([{"role": "system", "content": "S"}, ask]) != prompt_text([ask])


def jaccard(one: str, other: str) -> float:
    """The definition, with Python's sets."""
    sets = [
        {text[n : n + 13] for n in range(max(1, len(text) - 12))}
        for text in map(normalised, (one, other))
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_near_duplicates_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(400)]
    prompts = [" ".join(rng.choice(words, 30)) for _ in range(60)]
    for n in range(30):  # copies with more and more words changed
        changed = prompts[n].split()
        for place in rng.choice(30, n // 4, replace=False):
            changed[place] = "x"
        prompts.append(" ".join(changed))
    groups = ["train" if n < 60 else "test" for n in range(len(prompts))]
    expected = {
        (a, b): jaccard(prompts[a], prompts[b])
        for a, b in itertools.combinations(range(len(prompts)), 2)
        if groups[a] != groups[b] and jaccard(prompts[a], prompts[b]) >= 0.7
    }
    found = near_duplicates(prompts, groups)
    assert len(expected) > 5
    assert {(a, b): pytest.approx(value) for a, b, value in found} == expected


def test_within_a_split_and_short_prompts():
    assert near_duplicates(["Why is that so, my friend?"] * 2, ["a", "a"]) == []
    assert near_duplicates(["Why?", "WHY?", "Who?"], ["a", "b", "b"]) == [(0, 1, 1.0)]
