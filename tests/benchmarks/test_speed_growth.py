"""How training grows: known lines and curves, who takes turns with whom, and what a turn holds."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import linregress

from benchmarks.speed import growing, growth, measure
from benchmarks.speed.growing import (
    ARMS,
    BETA_ARMS,
    GrowthStep,
    GrowthTraining,
    step_case,
    train_all,
)
from benchmarks.speed.growth import (
    PLAN,
    Growth,
    GrowthPoint,
    GrowthSeries,
    MeasuredSize,
    Plan,
    growth_series,
    growth_table,
    measure_in_rounds,
    measure_steps,
    speed_growth,
)
from benchmarks.speed.sides import Choice, Round, Work
from shared.data.pairs import read_pairs
from shared.models.load import ModelConfig, load_policy
from shared.stages import Stage, Stages, fill_stage, write_json

MEGABYTE = 2**20
SMALL = ModelConfig(hidden_size=32, layers=1, intermediate_size=32)
TINY = GrowthStep(pairs=2, completion_tokens=4, model=SMALL)


class Here:
    """A worker without a process: its work is done here."""

    def __init__(self, make: Callable[..., Work], *inputs: Any, threads: int):
        self.work, self.rounds = make(*inputs), []

    def __call__(self) -> float:
        self.rounds.append(self.work())
        return 0.0

    def end(self) -> int:
        return (7 if self.rounds else 3) * MEGABYTE


# --- numbers ----------------------------------------------------------------------------------


def of_times(times: dict[float, float]) -> GrowthSeries:
    measured = [MeasuredSize(size, seconds, MEGABYTE) for size, seconds in times.items()]
    return growth_series("step", "pairs", measured, libraries=0)


def test_a_line_is_straight_and_a_parabola_is_not():
    sizes = (256.0, 512.0, 1024.0, 2048.0)
    line = of_times({x: 0.3 + 0.002 * x for x in sizes})
    assert line.r2 == pytest.approx(1)
    assert line.exponent < 1  # of what does not grow, more than a tenth
    through_zero = of_times({x: 0.002 * x for x in sizes})
    assert (through_zero.r2, through_zero.exponent) == pytest.approx((1, 1))
    parabola = of_times({x: 1e-6 * x**2 for x in sizes})
    assert parabola.exponent == pytest.approx(2)
    assert parabola.r2 < 0.98
    assert parabola.r2 == pytest.approx(linregress(sizes, [x**2 for x in sizes]).rvalue ** 2)


def test_times_that_say_nothing_of_the_size_lie_on_no_line():
    assert of_times({1.0: 2.0, 2.0: 1.0, 3.0: 2.0}).r2 == pytest.approx(0)


def test_numbers_are_over_the_smallest_size():
    measured = [MeasuredSize(8, 2.0, 600 * MEGABYTE), MeasuredSize(16, 5.0, 900 * MEGABYTE)]
    found = growth_series("training", "arms", measured, libraries=500 * MEGABYTE)
    assert found.points == [
        GrowthPoint(size=8, time=1, memory=1, own_memory=1),
        GrowthPoint(size=16, time=2.5, memory=1.5, own_memory=4),
    ]
    assert found.memory_spread == 1.5
    assert found.exponent == pytest.approx(math.log2(2.5))


def test_memory_that_cannot_be_read_is_not_known():
    found = growth_series(
        "step", "pairs", [MeasuredSize(1, 1.0, 0), MeasuredSize(2, 2.0, 0)], libraries=0
    )
    assert [(p.memory, p.own_memory) for p in found.points] == [(None, None)] * 2
    assert found.memory_spread is None


def test_the_table_holds_a_row_a_size_and_what_they_say_together():
    points = [
        GrowthPoint(size=256, time=1, memory=1, own_memory=1),
        GrowthPoint(size=2048, time=7.956, memory=1.012, own_memory=None),
    ]
    one = GrowthSeries(
        kind="training", axis="pairs", points=points, r2=0.9996, exponent=0.987, memory_spread=1.012
    )
    text = growth_table(
        Growth(
            machine="2 threads",
            rounds=3,
            series=[one],
            more_settings=1.044,
            more_settings_per_round=[1.03, 1.044, 1.1],
        )
    )
    assert text.startswith("Over the smallest size, the fastest of 3 rounds (2 threads).\n")
    assert text.endswith(
        """
A full training against its number of pairs:

| pairs | time | memory | without libraries |
|---|---|---|---|
| 256 | 1.00 | 1.00 | 1.00 |
| 2,048 | 7.96 | 1.01 | - |

R^2 of a line 1.000; time ~ size^0.99; largest peak / smallest 1.01.

Five more values of beta took 1.04 x the time of their own training (rounds: 1.03, 1.04, 1.10).
"""
    )


# --- turns ------------------------------------------------------------------------------------


def test_sizes_take_turns_and_the_fastest_after_the_first_counts():
    turns: list[str] = []

    def worker(name: str, seconds: list[float], memory: int | None) -> Here:
        left = iter(seconds)

        def work() -> Round:
            turns.append(name)
            return Round(1.0, next(left), memory=memory)

        return Here(lambda: work, threads=1)

    small = worker("small", [0.1, 3.0, 2.0, 4.0], memory=None)
    large = worker("large", [0.1, 5.0, 7.0, 6.0], memory=9 * MEGABYTE)
    measured = measure_in_rounds([(1.0, small), (2.0, large)], turns=3)  # pyright: ignore
    assert turns == ["small", "large"] * 4
    assert measured == [MeasuredSize(1.0, 2.0, 7 * MEGABYTE), MeasuredSize(2.0, 5.0, 9 * MEGABYTE)]


def test_a_training_is_done_anew_in_every_turn(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All its stages, those that arms share once for each seed; nothing is left behind."""
    done: Counter[str] = Counter()
    peaks = iter([100] * 10 + [900] + [100] * 100)  # the most is held in the middle

    def fill(folder: Path, stage: Stage) -> float:
        done[stage.name] += 1
        return fill_stage(folder, stage)

    monkeypatch.setattr(growing, "Stages", partial(Stages, fill=fill))
    monkeypatch.setattr(growing, "peak_memory_bytes", lambda: next(peaks))
    training = GrowthTraining(pairs=4, arms=ARMS[:2], seeds=2)
    work = growing.full_training(policy_folder, tmp_path, training)
    first = work()
    assert done == {"preferences": 2, "reference": 2, "direct": 4}
    assert first.memory == 900
    assert first.seconds > 0
    work()
    assert done == {"preferences": 4, "reference": 4, "direct": 8}
    assert list(tmp_path.iterdir()) == []


def test_more_settings_cost_what_their_run_takes_over_their_own_training(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[Path, int]] = []

    def pretended(stages: Stages, policy: Path, training: GrowthTraining) -> list[Path]:
        seen.append((stages.root, len(training.arms)))
        time.sleep(0.4 if len(seen) == 1 else 0.1)
        folders = [stages.root / str(number) for number in range(len(training.arms))]
        for folder, seconds in zip(folders, (100.0, 2.0, 3.0), strict=False):
            folder.mkdir(exist_ok=True)
            write_json(folder / "cost.json", {"wall_s": seconds})
        return folders

    monkeypatch.setattr(growing, "train_all", pretended)
    done = growing.more_settings(policy_folder, tmp_path, GrowthTraining(arms=BETA_ARMS[:3]))()
    assert [arms for _, arms in seen] == [1, 3]
    assert seen[0][0] == seen[1][0]
    assert done.units == 2.0 + 3.0
    assert 0.1 <= done.seconds < 0.4


def test_with_more_settings_what_is_there_is_found_again(policy_folder: Path, tmp_path: Path):
    heard: list[tuple[str, str]] = []

    def run(arms: int) -> list[Path]:
        stages = Stages(tmp_path, lambda name, state, _: heard.append((name, state)))
        return train_all(stages, policy_folder, GrowthTraining(pairs=4, arms=BETA_ARMS[:arms]))

    first = run(1)
    heard.clear()
    assert run(2)[:1] == first
    found = [name for name, state in heard if state == "cached"]
    assert found == ["preferences", "reference", "direct"]
    assert [name for name, state in heard if state == "done"] == ["direct"]


# --- sizes ------------------------------------------------------------------------------------


def test_a_step_is_of_the_size_that_it_says(tmp_path: Path):
    step = GrowthStep(pairs=3, completion_tokens=9, vocabulary=500, model=SMALL)
    case, parameters = step_case(step, 2, tmp_path)
    pairs = read_pairs(case.data / "train.jsonl")
    assert (case.work, case.batch, len(pairs)) == ("dpo", 3, 6)
    lengths = {len(side) for p in pairs for side in (p.chosen_ids, p.rejected_ids)}
    assert lengths == {9}
    assert {len(p.prompt_ids) for p in pairs} == {12}
    model = load_policy(case.model)
    assert model.get_input_embeddings().weight.shape == (500, 32)
    attention, mlp, norms = 4 * 32 * 32, 3 * 32 * 32, 3 * 32
    assert parameters == 500 * 32 + attention + mlp + norms


def test_in_a_series_one_thing_grows():
    for axis, steps in PLAN.steps.items():
        differ = {
            name
            for _, step in steps
            for name, value in step._asdict().items()
            if value != GrowthStep._field_defaults[name]
        }
        assert len(differ) == 1, axis
        sizes = [size for size, _ in steps]
        known = [size for size in sizes if size is not None]
        assert known == sorted(known), axis
        assert len(known) in (0, len(sizes)), axis
    models = [step.model for _, step in PLAN.steps["parameters (thousands), by width"]]
    assert {model.layers for model in models} == {ModelConfig().layers}
    for axis, trainings in PLAN.trainings.items():
        for size, training in trainings:
            value = getattr(training, axis)
            assert size == (len(value) if axis == "arms" else value)
            assert (
                training._replace(**{axis: GrowthTraining._field_defaults[axis]})
                == GrowthTraining()
            )
    assert len(set(map(json.dumps, PLAN.settings.arms))) == 1 + 5


# --- the whole command ------------------------------------------------------------------------


@pytest.mark.slow
def test_larger_steps_take_more_time_and_memory_in_processes_of_their_own(tmp_path: Path):
    sizes = [(16.0, TINY._replace(pairs=16)), (None, GrowthStep(completion_tokens=16))]
    small, large = measure_steps(sizes, 2, tmp_path)
    assert small.size == 16
    assert large.size == pytest.approx(802, abs=100)  # 4 layers of 128 x (4 x 128 + 3 x 384)
    assert large.seconds > 5 * small.seconds
    assert large.peak > small.peak + 50 * MEGABYTE


def test_every_series_is_measured_and_written(
    policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(growth, "Worker", Here)
    monkeypatch.setattr(growth, "short_sft", lambda _: policy_folder)
    plan = Plan(
        steps={"pairs": [(n, TINY._replace(pairs=n)) for n in (2, 64)]},
        trainings={"arms": [(n, GrowthTraining(pairs=256, arms=ARMS[:n])) for n in (1, 4)]},
        settings=GrowthTraining(pairs=8, arms=BETA_ARMS[:2]),
    )
    text = speed_growth(Choice(tmp_path, rounds=1), plan)
    found = Growth.model_validate_json((tmp_path / "speed" / "growth.json").read_text())
    assert [(one.kind, one.axis) for one in found.series] == [
        ("step", "pairs"),
        ("training", "arms"),
    ]
    for one in found.series:
        assert one.points[0].time == 1
        assert one.points[1].time > 1
        assert 0 < one.exponent < 3
    assert 0.8 < found.more_settings < 20
    assert len(found.more_settings_per_round) == 1
    folder = tmp_path / "speed"
    assert (folder / "growth.md").read_text() == text == growth_table(found)
    assert {path.name for path in folder.iterdir()} == {"growth.json", "growth.md"}


def test_only_comparisons_are_measured_where_nothing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[list[str]] = []
    monkeypatch.setattr(measure, "run_comparisons", lambda works, _: asked.append(works))
    monkeypatch.setattr(measure, "speed_table", lambda _: "ratios\n")
    monkeypatch.setattr(measure, "ALONE", {"growth": lambda _: "growth\n"})
    choice = Choice(tmp_path, 1)
    assert measure.measure_named([], choice) == "ratios\n"
    assert measure.measure_named(["growth"], choice) == "growth\n"
    assert asked == [[]]
