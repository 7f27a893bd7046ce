"""Gold at equal KL, seed by seed, and who is compared where."""

import numpy as np
import pytest

from benchmarks.results.matched import KLCurve, matched_gold
from benchmarks.results.summary import comparisons_of


def test_gold_is_read_off_each_prompts_own_curve_halfway_in_the_root_of_kl():
    """Prompts start at 0 and 1 and end at 2 and 5, at 4 nats: at 1 nat they are halfway."""
    curve = KLCurve([0.0, 4.0], [np.array([0.0, 1.0]), np.array([2.0, 5.0])])
    assert curve.gold_at(1.0) == pytest.approx([1.0, 3.0])
    assert curve.gold_at(4.1) is None


def test_a_level_that_one_seed_does_not_reach_has_no_value():
    near, far = (KLCurve([0.0, end], [np.zeros(2), np.ones(2)]) for end in (1.0, 4.0))
    assert matched_gold([near, far], 4.0) is None
    assert matched_gold([far, far], 4.0) == pytest.approx(np.ones((2, 2)))


def test_every_two_methods_are_compared_at_every_level_that_both_reach():
    """Three seeds, whose differences are 1 whatever the prompt."""
    low = np.arange(6.0).reshape(3, 2)
    found = comparisons_of(
        {
            "a": {None: low, 1.0: low, 5.0: None},
            "b": {None: low + 1, 1.0: low + 1, 5.0: low},
            "c": {None: low, 1.0: low, 5.0: low},
        }
    )
    assert [(c.a, c.b, c.kl) for c in found] == [
        (a, b, kl) for a, b in ("ab", "ac", "bc") for kl in (None, 1.0, 5.0)
    ]
    first, at_1, at_5 = found[:3]
    assert first.difference.mean == at_1.difference.mean == -1
    assert first.verdict == "b is ahead of a in gold"
    assert at_1.verdict == "b is ahead of a in gold at 1 nats"
    assert at_5.difference.mean is None
    assert at_5.verdict == "not reached: gold at 5 nats has no value for every seed of both"
