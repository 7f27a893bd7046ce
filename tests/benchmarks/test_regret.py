"""The regret experiment: each arm at one beta, and what it writes."""

from pathlib import Path

import pytest
import torch
from checks import SMALL_WORLD, close

from benchmarks.evaluation.optimum import bradley_terry, ipo_logps, optimal_logps
from benchmarks.pipeline.loading import load_experiment
from benchmarks.results.schema import Results
from benchmarks.studies.regret import STEPS, at, curve, markdown, picture, regret_points
from shared.config import InputError
from shared.stages import read_json
from shared.training.fit import steps_of

EXACT = load_experiment("exact", [], quick=False)
SMALL = {
    **SMALL_WORLD,
    "seeds": "[0]",
    "sft.examples": 500,
    "preferences.held_out_pairs": 16,
    "reward.batch_size": 64,
    "direct.batch_size": 64,
    "evaluation.reward_pairs": 50,
}


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_every_arm_that_learns_from_labels_stands_at_the_beta(beta: float):
    arms = at(EXACT, 1000, beta).arms
    settings = {name: arm.settings for name, arm in arms.items()}
    assert settings == {
        "ppo": ({"kl_coef": beta},),
        "dpo": ({"beta": beta},),
        "ipo": ({"tau": beta / 4},),
        "kto": ({"beta": beta},),
    }


def test_ipo_at_a_quarter_of_beta_has_dpos_optimum_to_first_order_in_the_reward():
    """Halving the reward divides the difference of the two optima by 2^2 or more."""
    generator = torch.Generator().manual_seed(0)
    ref = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(1)
    reward = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    beta, apart = 0.7, []
    for size in (0.02, 0.01):
        ipo = ipo_logps(ref, bradley_terry(size * reward), tau=beta / 4)
        apart.append((ipo - optimal_logps(ref, size * reward, beta)).abs().max())
        assert apart[-1] < 0.02 * (ipo - ref).abs().max()
    assert apart[0] / apart[1] > 3.9


@pytest.mark.parametrize("pairs", [100, 1000, 10_000, 100_000])
def test_few_pairs_are_seen_often_and_many_once(pairs: int):
    experiment = at(EXACT, pairs, 0.5)
    for part in (experiment.direct, experiment.reward):
        steps = steps_of(pairs, part.batch_size, part.epochs)
        assert steps >= STEPS
        assert part.epochs == 1 or steps < STEPS + pairs / part.batch_size + 1


def test_an_endless_task_has_no_regret():
    with pytest.raises(InputError, match="finite task, not reviews"):
        at(load_experiment("reviews", [], quick=False), 100, 0.5)


def test_a_run_gives_each_methods_regret_at_its_end_and_at_its_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("benchmarks.studies.regret.STEPS", 16)
    base = load_experiment("exact", [f"--{k}={v}" for k, v in SMALL.items()], quick=False)
    points = regret_points(base, 200, 0.5, tmp_path)
    assert [p.method for p in points] == ["sft", "ppo", "dpo", "ipo", "kto"]
    results = Results.model_validate(read_json(next(tmp_path.glob("exact-200*/results.json"))))
    for point in points:
        (last,), (best,) = point.regret.per_seed, point.best.per_seed
        assert last is not None
        assert best is not None
        assert 0 <= best <= last
        if point.method in ("ppo", "dpo", "kto"):
            close(last, results.methods[point.method].regret.mean, 1e-9)
        if point.method == "dpo":
            assert len(curve(results.methods["dpo"])) == 4
    assert points[0].regret == points[0].best
    text = markdown(points, "the command", 1)
    assert f"| 200 | 0.5 | dpo | {points[2].regret.mean:.3f} |" in text
    drawn = picture(points, 0.5, 200)
    assert drawn.png.startswith(b"\x89PNG")
    assert b"KTO" in drawn.svg
