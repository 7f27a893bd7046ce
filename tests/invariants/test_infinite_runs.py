"""With infinite data only optimisation is left: the experiment `infinite`, whole."""

from pathlib import Path

import pytest

from benchmarks.evaluation.exact import World
from benchmarks.pipeline.loading import load_experiment
from benchmarks.results.schema import Method, Results
from benchmarks.run import run_experiment
from shared.stages import read_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About seven minutes."""
    folder = tmp_path_factory.mktemp("runs")
    run_experiment(load_experiment("infinite", [], quick=False), folder)
    return folder


def attained(runs: Path, arm: str) -> float:
    """(J(pi) - J(ref)) / (J(pi*) - J(ref)) at the arm's beta."""
    results = Results.model_validate(read_json(runs / "infinite" / "results.json"))
    (listed,) = (runs / ".stages").glob("listing-*")
    method, sft = results.methods[arm], results.methods["sft"]
    start = World(listed).regret(beta(method), sft.gold.mean or 0.0, 0.0)
    assert method.regret.mean is not None
    return 1 - method.regret.mean / start


def beta(method: Method) -> float:
    return method.setting.get("beta", method.setting.get("kl_coef", 0.0))


@pytest.mark.parametrize("arm", ["ppo-gold-0.05", "ppo-gold-0.2", "ppo-gold-1"])
def test_ppo_with_the_true_reward_reaches_98_percent_of_the_optimum(runs: Path, arm: str):
    assert attained(runs, arm) >= 0.98


def test_a_reward_model_with_ppo_reaches_97_percent_of_the_optimum(runs: Path):
    assert attained(runs, "ppo-1") >= 0.97


def test_dpo_ends_within_a_thousandth_of_a_nat_of_the_optimum(runs: Path):
    """Regret is beta KL(pi || pi*)."""
    results = Results.model_validate(read_json(runs / "infinite" / "results.json"))
    dpo = results.methods["dpo-1"]
    assert dpo.regret.mean is not None
    assert dpo.regret.mean / beta(dpo) <= 1e-3
