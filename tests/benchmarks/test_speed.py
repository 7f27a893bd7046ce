"""Side by side: each in its turn, each in its own process, and the ratio's interval."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from scipy import stats

from benchmarks.evaluation.statistics import Estimate
from benchmarks.speed.measure import SPEED_COMPARISONS, run_comparisons, speed_table
from benchmarks.speed.sides import Choice, Round, Speed, Turns, Work, Worker, compare_rates
from shared.config import InputError
from shared.stages import read_json

MEGABYTE = 2**20


def test_each_side_warms_up_and_then_they_take_turns():
    turns: list[str] = []
    rates = {"ours": iter([1.0, 20.0, 30.0, 45.0]), "peer": iter([1.0, 10.0, 10.0, 15.0])}

    def side(name: str) -> float:
        turns.append(name)
        return next(rates[name])

    ours, peer, ratio = compare_rates(lambda: side("ours"), lambda: side("peer"), rounds=3)
    assert turns == ["ours", "peer"] * 4
    assert (ours, peer) == pytest.approx((95 / 3, 35 / 3))
    logs = [math.log(2), math.log(3), math.log(3)]
    low, high = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert ratio.mean == pytest.approx(18 ** (1 / 3))
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(low), math.exp(high)))
    assert ratio.per_seed == pytest.approx([2.0, 3.0, 3.0])


def row(**known: float) -> Speed:
    return Speed(
        work="generation", model="m", dtype="bfloat16", shape="64 x 64", unit="tokens/s",
        ours=2.0, peer=1.0, peer_name="p", ratio=Estimate(mean=2.0, low=1.5, high=2.667), **known,
    )  # fmt: skip


def test_a_row_of_the_table_holds_the_ratio_and_its_limits_and_what_else_is_known():
    start = "| generation | m | bfloat16 | 64 x 64 | p | 2.00 [1.50, 2.67] |"
    assert f"{start} - | - | - |\n" in speed_table([row()])
    known = row(loss_difference=3.14e-6, memory_ratio=0.512, mfu=0.7)
    assert f"{start} 3.1e-06 | 0.51 | 0.70 |\n" in speed_table([known])


def test_a_choice_that_leaves_nothing_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no comparison has these"):
        run_comparisons([], Choice(tmp_path, 1, models=["nosuch"]))
    assert not (tmp_path / "speed" / "speed.json").exists()


def test_a_run_that_stops_keeps_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stops(choice: Choice) -> Iterator[Speed]:
        yield row()
        raise KeyboardInterrupt

    monkeypatch.setitem(SPEED_COMPARISONS, "dpo", stops)
    with pytest.raises(KeyboardInterrupt):
        run_comparisons(["dpo"], Choice(tmp_path, 1))
    assert read_json(tmp_path / "speed" / "speed.json") == [row().model_dump(mode="json")]
    assert (tmp_path / "speed" / "speed.md").read_text() == speed_table([row()])


# --- a side in a process of its own -----------------------------------------------------------


def holding(before: int, during: int) -> Work:
    """Holds so many megabytes while it sets up, and others in each round, of which it counts."""
    torch.ones(before * MEGABYTE // 4)
    rounds = 0

    def work() -> Round:
        nonlocal rounds
        rounds += 1
        torch.ones(during * MEGABYTE // 4)
        return Round(units=60.0, seconds=60.0 if rounds == 1 else 10.0 * rounds, loss=os.getpid())

    return work


def looping(turns: Turns, during: int) -> None:
    """The same with a loop of its own, at half a unit a second."""
    while turns.wait():
        torch.ones(during * MEGABYTE // 4)
        turns.send(Round(units=torch.get_num_threads(), seconds=2.0, loss=os.getpid()))


def failing(_: str) -> Work:
    raise ValueError("no such model")


class Pair(NamedTuple):
    """Two sides after a warm-up and two rounds: what came of them, and the most that each held."""

    sides: tuple[Worker, Worker]
    result: tuple[float, float, Estimate]
    peaks: tuple[int, int]


@pytest.fixture(scope="module")
def pair() -> Pair:
    ours = Worker(holding, 900, 100, threads=1)
    peer = Worker(looping, 400, threads=1, loops=True)
    result = compare_rates(ours, peer, rounds=2)
    return Pair((ours, peer), result, (ours.end(), peer.end()))


def test_sides_run_in_processes_of_their_own_and_keep_their_rounds(pair: Pair):
    homes = [{done.loss for done in side.rounds} for side in pair.sides]
    assert [len(home) for home in homes] == [1, 1]
    assert len({os.getpid(), *homes[0], *homes[1]}) == 3
    assert [done.seconds for done in pair.sides[0].rounds] == [60.0, 20.0, 30.0]
    assert [side.process.exitcode for side in pair.sides] == [0, 0]


def test_the_first_round_is_not_measured(pair: Pair):
    ours, peer, ratio = pair.result
    assert (ours, peer) == ((3.0 + 2.0) / 2, 0.5)
    assert ratio.per_seed == [6.0, 4.0]


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here"
)
def test_a_sides_peak_is_its_own_and_of_its_rounds(pair: Pair):
    """The small side's set-up held more than the large side ever does.

    Memory that it goes on holding may let two rounds' tensors lie beside each other.
    """
    small, large = pair.peaks
    assert large - small == pytest.approx(250 * MEGABYTE, abs=110 * MEGABYTE)


def test_a_side_that_fails_says_so(capfd: pytest.CaptureFixture[str]):
    side = Worker(failing, "nosuch", threads=1)
    with pytest.raises(RuntimeError, match="a side of the comparison failed; its error is above"):
        side()
    assert "ValueError: no such model" in capfd.readouterr().err
