"""Gold at equal KL, seed by seed, who is compared where, and what a method costs."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.pipeline.arms import SeedData, paid_stages
from benchmarks.pipeline.compare import ArmRun
from benchmarks.pipeline.experiment import Arm
from benchmarks.results.costs import cost_of
from benchmarks.results.matched import KLCurve, matched_gold
from benchmarks.results.summary import comparisons_of
from shared.stages import write_json


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


@pytest.mark.parametrize(
    ("arm", "paid"),
    [
        (Arm(kind="best-of-n", settings=[{"n": 2}]), ["reward", "end"]),
        (Arm(kind="ppo", settings=[{"kl_coef": 0.1}]), ["reward", "end"]),
        (Arm(kind="ppo", gold=True, settings=[{"kl_coef": 0.1}]), ["end"]),
        (Arm(kind="direct", loss="dpo", settings=[{"beta": 0.1}]), ["reference", "end"]),
        (Arm(kind="direct", loss="kto", settings=[{"beta": 0.1}]), ["reference", "other", "end"]),
        (Arm(kind="filtered", settings=[{"beta": 0.1}]), ["reward", "reference", "end"]),
    ],
)
def test_an_arm_pays_for_what_it_needs_and_for_nothing_else(arm: Arm, paid: list[str]):
    folders = map(Path, ("preferences", "reward", "reference", "other"))
    assert paid_stages(arm, SeedData(0, *folders), Path("end")) == tuple(map(Path, paid))


def test_a_run_costs_the_sum_of_its_stages_and_the_memory_of_the_largest(tmp_path: Path):
    stages = []
    for name, size in (("reward-1", 1), ("ppo-2", 3)):
        numbers = ("wall_s", "train_tokens", "generated_tokens", "flops", "peak_memory_bytes")
        (tmp_path / name).mkdir()
        cost = {**dict.fromkeys(numbers, size), "models_held": size, "phases": {"train": size}}
        write_json(tmp_path / name / "cost.json", cost)
        stages.append(tmp_path / name)
    run = ArmRun({}, 0, None, {}, tuple(stages))
    cost = cost_of([run], labels=5, matmul_rate=0.5, timed=(0,))
    assert cost.wall_s == cost.train_tokens == cost.generated_tokens == cost.flops == 4
    assert cost.peak_memory_bytes == cost.models_held == 3
    assert cost.mfu == 4 / 4 / 0.5
    assert cost.phases == {"reward": 1, "ppo: train": 3}
