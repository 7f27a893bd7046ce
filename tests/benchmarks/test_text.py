"""Measures of text: closed forms, known tables, and the alarms that a broken policy sets off."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.evaluation.text import (
    TextMeasures,
    alarms,
    distinct,
    length_controlled_win_rate,
    repetition,
)

SOUND = TextMeasures(
    length=20.0, repetition=0.01, distinct_2=0.9, perplexity=12.0, truncated=0.1, empty=0.0
)
ids = st.lists(st.integers(0, 3), max_size=12)


def test_repetition_of_known_texts():
    assert repetition([1, 2, 3, 4, 5, 6, 7]) == 0  # four 4-grams, all different
    assert repetition([1] * 7) == pytest.approx(3 / 4)  # four 4-grams, one kind
    assert repetition([1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)  # 1212 2121 1212
    assert repetition([1, 2, 3]) == 0  # none


def test_distinct_of_known_texts():
    assert distinct([[1, 2, 3], [1, 2, 3]]) == 0.5
    assert distinct([[1, 2], [2, 1]]) == 1.0
    assert distinct([[5], []]) == 1.0


@given(text=ids, n=st.integers(1, 4))
def test_repetition_is_one_minus_distinct_of_one_text(text: list[int], n: int):
    assert repetition(text, n) == pytest.approx(1 - distinct([text], n))


@given(texts=st.lists(ids, min_size=1, max_size=4))
def test_saying_all_twice_halves_what_is_distinct(texts: list[list[int]]):
    if any(len(text) > 1 for text in texts):
        assert distinct(texts * 2) == pytest.approx(distinct(texts) / 2)


def test_at_equal_lengths_the_controlled_win_rate_is_the_win_rate():
    rng = np.random.default_rng(0)
    gold, other = rng.normal(0.5, 1, (400, 2)), rng.normal(0, 1, (400, 2))
    length = np.full((400, 2), 10.0)
    plain = ((1 + np.sign(gold[:, :, None] - other[:, None, :])) / 2).mean()
    assert length_controlled_win_rate(gold, length, other, length) == pytest.approx(plain, abs=5e-3)


def test_where_length_alone_wins_control_leaves_a_coin():
    rng = np.random.default_rng(1)
    length, other_length = rng.normal(30, 5, (2000, 2)), rng.normal(20, 5, (2000, 2))
    noise = rng.normal(0, 8, (2, 2000, 2))
    gold, other = length + noise[0], other_length + noise[1]
    plain = (gold[:, :, None] > other[:, None, :]).mean()
    assert plain > 0.75
    found = length_controlled_win_rate(gold, length, other, other_length)
    assert found == pytest.approx(0.5, abs=0.04)


def test_the_start_raises_no_alarm_and_neither_does_a_policy_near_it():
    assert alarms(SOUND, SOUND) == []
    near = TextMeasures(
        length=30.0, repetition=0.04, distinct_2=0.7, perplexity=20.0, truncated=0.2, empty=0.02
    )
    assert alarms(near, SOUND) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"repetition": 0.6}, "repeats itself: 60%"),
        ({"empty": 0.5}, "50% of the answers are empty"),
        ({"distinct_2": 0.2}, "says the same to all"),
        ({"length": 2.0}, "0.1 times as long"),
        ({"length": 90.0}, "4.5 times as long"),
        ({"truncated": 0.9}, "90% of its answers are cut"),
        ({"perplexity": 300.0}, "25.0 times as surprising"),
    ],
)
def test_each_way_of_going_wrong_has_its_alarm(change: dict[str, float], said: str):
    (found,) = alarms(replace(SOUND, **change), SOUND)
    assert said in found
