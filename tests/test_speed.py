"""Side by side: each in its turn, and the ratio's interval."""

import math

import pytest
from scipy import stats

from benchmarks.results import Estimate
from benchmarks.speed.measure import table
from benchmarks.speed.sides import Speed, side_by_side


def test_each_side_warms_up_and_then_they_take_turns():
    turns: list[str] = []
    rates = {"ours": iter([1.0, 20.0, 30.0, 45.0]), "peer": iter([1.0, 10.0, 10.0, 15.0])}

    def side(name: str) -> float:
        turns.append(name)
        return next(rates[name])

    ours, peer, ratio = side_by_side(lambda: side("ours"), lambda: side("peer"), rounds=3)
    assert turns == ["ours", "peer"] * 4
    assert (ours, peer) == pytest.approx((95 / 3, 35 / 3))
    logs = [math.log(2), math.log(3), math.log(3)]
    low, high = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert ratio.mean == pytest.approx(18 ** (1 / 3))
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(low), math.exp(high)))
    assert ratio.per_seed == pytest.approx([2.0, 3.0, 3.0])


def test_a_row_of_the_table_holds_the_ratio_and_its_limits():
    row = Speed(
        work="generation", model="m", dtype="bfloat16", shape="64 x 64", unit="tokens/s",
        ours=2.0, peer=1.0, peer_name="p", ratio=Estimate(mean=2.0, low=1.5, high=2.667),
    )  # fmt: skip
    assert "| generation | m | bfloat16 | 64 x 64 | p | 2.00 [1.50, 2.67] |" in table([row])
