"""A finite task through the pipeline: expectations over all completions, exact labels, gold reward.

The truth is enumeration, written out here, or sampling within its error.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import SMALL_WORLD, close
from torch import Tensor

from benchmarks.evaluation.evaluate import Prompts, evaluate
from benchmarks.evaluation.exact import World
from benchmarks.evaluation.optimum import kl, objective, optimal_logps
from benchmarks.pipeline.experiment import Experiment
from benchmarks.pipeline.loading import load_experiment
from benchmarks.results.folders import EvaluationRows
from benchmarks.results.schema import Results
from benchmarks.run import run_experiment
from rlhf.ppo import PPOConfig, train_ppo
from rlhf.rollout import GoldScorer
from shared.config import InputError
from shared.data.pairs import read_pairs
from shared.data.preferences import PreferenceConfig, make_preferences
from shared.data.samples import list_reference
from shared.generation.engine import Sampling
from shared.generation.hf import HFEngine
from shared.generation.start import Drawing
from shared.models.load import (
    ModelConfig,
    Start,
    load_policy,
    new_policy,
    new_scalar_model,
    save,
    special_ids,
)
from shared.stages import read_json, read_jsonl
from shared.tasks.exact import ExactConfig
from shared.tasks.registry import TaskConfig, make_task
from shared.training.fit import OptimizerConfig

TASK = TaskConfig(name="exact", exact=ExactConfig(words=3, prompts=4, cap=3))
SAMPLING = Sampling(max_new_tokens=3)
N = 1 + 4 + 16 + 64  # completions over pad and three words, of at most three tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(reference, another policy, a reward model), with weights that make them differ."""
    root, tokenizer = tmp_path_factory.mktemp("models"), make_task(TASK).tokenizer()
    config = ModelConfig(hidden_size=32, layers=1, intermediate_size=32)
    folders = [root / name for name in ("ref", "policy", "reward")]
    for seed, folder in enumerate(folders[:2]):
        model = new_policy(config, tokenizer, seed)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(4.0)
        save(model, tokenizer, folder)
    save(new_scalar_model(folders[1], seed=3), tokenizer, folders[2])
    return folders[0], folders[1], folders[2]


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory, models: tuple[Path, ...]) -> Path:
    folder = tmp_path_factory.mktemp("listed")
    list_reference(folder, TASK, models[0], SAMPLING, seed=0)
    return folder


def read(folder: Path, models: tuple[Path, ...], listed: Path | None, samples: int) -> list:
    """Evaluation rows of the second policy."""
    ref, policy, reward = models
    prompts = Prompts(TASK, "test", count=4, samples=samples, seed=0, listing=listed)
    evaluate(folder, policy, ".", ref, reward, None, prompts, Drawing(SAMPLING).at(seed=1))
    return read_jsonl(folder / "rows.jsonl")


def test_the_listing_is_a_distribution_over_every_completion(listed: Path):
    world = World(listed)
    assert world.log_ref.shape == world.gold.shape == (4, N)
    close(world.log_ref.exp().sum(1), torch.ones(4), 1e-12)
    for row in world.rows:
        assert len({tuple(c) for c in row.completions}) == N


def test_exact_rows_are_what_many_samples_come_to(
    models: tuple[Path, ...], listed: Path, tmp_path: Path
):
    """Every expectation within 4.5 standard errors of the mean of 4,000 samples a prompt."""
    for row in read(tmp_path, models, listed, samples=4000):
        assert set(row["exact"]) == {"gold", "kl", "length", "truncated", "win_rate", "score"}
        for name in ("gold", "kl", "length", "truncated", "score"):
            drawn = np.array(row[name], dtype=float)
            error = 4.5 * drawn.std() / np.sqrt(len(drawn)) + 1e-6
            assert abs(drawn.mean() - row["exact"][name]) < error, name


def test_the_exact_win_rate_is_that_of_independent_draws(models: tuple[Path, ...], listed: Path):
    world = World(listed)
    logps = world.logps(models[1], SAMPLING)
    found = world.win_rate(logps)
    for x in range(4):
        p, q, gold = logps[x].exp(), world.log_ref[x].exp(), world.gold[x]
        wins = sum(
            p[i] * q[j] * (1.0 if gold[i] > gold[j] else 0.5 if gold[i] == gold[j] else 0.0)
            for i, j in itertools.product(range(N), repeat=2)
        )
        close(found[x], wins, 1e-9)
    close(world.win_rate(world.log_ref), torch.full((4,), 0.5), 1e-12)


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_regret_is_what_the_objective_lacks_and_beta_times_the_kl_to_the_optimum(
    models: tuple[Path, ...], listed: Path, beta: float
):
    world = World(listed)
    logps = world.logps(models[1], SAMPLING)
    rows = world.expectations(logps, None, eos_id=1)
    gold, nats = (float(np.mean([row[name] for row in rows])) for name in ("gold", "kl"))
    best = optimal_logps(world.log_ref, world.gold, beta)
    lacks = objective(best, world.log_ref, world.gold, beta) - objective(
        logps, world.log_ref, world.gold, beta
    )
    found = world.regret(beta, gold, nats)
    close(found, lacks.mean(), 1e-9)
    close(found, beta * kl(logps, best).mean(), 1e-9)
    assert found > 0.1
    at_best = world.expectations(best, None, eos_id=1)
    gold, nats = (float(np.mean([row[name] for row in at_best])) for name in ("gold", "kl"))
    close(world.regret(beta, gold, nats), 0.0, 1e-9)


def test_exact_labels_carry_the_probability_and_listed_pairs_cover_the_world(
    models: tuple[Path, ...], tmp_path: Path
):
    data = PreferenceConfig(pairs=3000, held_out_pairs=100, labels="exact", listed=True)
    make_preferences(tmp_path, TASK, models[0], data, Drawing(SAMPLING), seed=0)
    pairs = read_pairs(tmp_path / "train.jsonl")
    assert len(pairs) == 3000
    for pair in pairs:
        assert pair.p == pytest.approx(
            1 / (1 + np.exp(pair.rejected_gold - pair.chosen_gold)), abs=1e-12
        )
    seen = {(p.prompt, tuple(c)) for p in pairs for c in (p.chosen_ids, p.rejected_ids)}
    assert len(seen) == 4 * N  # 17 draws a completion
    counts = np.array([sum(p.prompt == x for p in pairs) for x in {p.prompt for p in pairs}])
    assert counts.max() - counts.min() <= 100


def test_equal_pairs_with_other_labels_are_data_of_a_finite_task(
    models: tuple[Path, ...], tmp_path: Path
):
    data = PreferenceConfig(pairs=2000, held_out_pairs=100)
    make_preferences(tmp_path, TASK, models[0], data, Drawing(SAMPLING), seed=0)
    pairs = read_pairs(tmp_path / "train.jsonl")
    ways = {(p.prompt, tuple(p.chosen_ids), tuple(p.rejected_ids)) for p in pairs}
    assert any((x, b, a) in ways for x, a, b in ways)
    assert len(ways) < len(pairs) == 2000
    assert all(p.chosen_ids != p.rejected_ids for p in pairs)
    won = np.array([p.chosen_gold > p.rejected_gold for p in pairs], dtype=float)
    p = np.array([1 / (1 + np.exp(-abs(q.chosen_gold - q.rejected_gold))) for q in pairs])
    apart = np.array([q.chosen_gold != q.rejected_gold for q in pairs])
    assert abs((won - p)[apart].sum()) < 4 * np.sqrt((p * (1 - p))[apart].sum())


def test_an_endless_task_cannot_be_listed(policy_folder: Path, tmp_path: Path):
    data = PreferenceConfig(pairs=10, held_out_pairs=2, listed=True)
    with pytest.raises(InputError, match="`reviews`: its completions cannot be listed"):
        make_preferences(tmp_path, TaskConfig(), policy_folder, data, Drawing(SAMPLING), seed=0)


def test_gold_as_a_reward_is_the_tasks_score_of_the_tokens(models: tuple[Path, ...]):
    task = make_task(TASK)
    tokenizer = task.tokenizer()
    texts = task.prompts("ppo", 4, 0) * 8
    ids = [tokenizer(text).input_ids for text in texts]
    engine = HFEngine(load_policy(models[1]), special_ids(tokenizer))
    drawn = engine.generate(ids, SAMPLING).ids
    expected = [
        task.gold([text], [" ".join(tokenizer.convert_ids_to_tokens([t for t in c if t > 1]))])[0]
        for text, c in zip(texts, drawn, strict=True)
    ]
    close(GoldScorer(task, tokenizer).score_all(ids, drawn), expected, 1e-5)


def test_gold_as_a_reward_reads_words_and_no_special_tokens(models: tuple[Path, ...]):
    class CountsWords:
        def gold(self, prompts: list[str], completions: list[str]) -> list[float]:
            counts = [[len(text.split()) for text in texts] for texts in (prompts, completions)]
            return [c - 10.0 * p for p, c in zip(*counts, strict=True)]

    tokenizer = make_task(TASK).tokenizer()
    scorer = GoldScorer(CountsWords(), tokenizer)
    pad, eos = special_ids(tokenizer).pad, special_ids(tokenizer).eos
    found = scorer.score_all([[2], [2, 3]], [[2, 3, eos], [pad, 2, 2]])
    close(found, torch.tensor([2.0 - 10, 2.0 - 20]))


def test_ppo_on_gold_climbs_to_most_of_what_the_optimum_gains(
    models: tuple[Path, ...], listed: Path, tmp_path: Path
):
    """At beta 0.5, from J(ref) towards J(pi*), in a few updates of a small model."""
    beta, world = 0.5, World(listed)
    ppo = PPOConfig(
        episodes=256 * 30,
        rollout_size=256,
        minibatch_size=128,
        micro_batch_size=128,
        missing_eos_penalty=0,
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="linear", adam_epsilon=1e-5),
        value_learning_rate=3e-3,
    )
    train_ppo(tmp_path, Start(models[0]), None, TASK, ppo, beta, Drawing(SAMPLING), ())
    cost = read_json(tmp_path / "cost.json")
    assert cost["models_held"] == 3
    found = world.logps(tmp_path / "final", SAMPLING)
    best = optimal_logps(world.log_ref, world.gold, beta)
    j = [objective(p, world.log_ref, world.gold, beta).mean() for p in (world.log_ref, found, best)]
    assert (j[1] - j[0]) / (j[2] - j[0]) > 0.9


def small(folder: Path, *overrides: str) -> Experiment:
    """exact.toml, with a small world and hardly any training."""
    sizes = {
        **SMALL_WORLD,
        "seeds": "[0, 1]",
        "sft.examples": 1000,
        "preferences.pairs": 300,
        "direct.epochs": 1,
        "evaluation.reward_pairs": 100,
        "evaluation.checkpoints": "[0.5]",
    }
    words = [f"--{key}={value}" for key, value in sizes.items()]
    return load_experiment("exact", [*words, *overrides], quick=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    return run_experiment(small(runs), runs)


def test_a_whole_run_reports_exact_numbers(finished: Path):
    results = Results.model_validate(read_json(finished / "results.json"))
    methods = results.methods
    assert set(methods) == {"sft", "best-of-n", "ppo", "ppo-gold", "dpo", "ipo", "kto"}
    assert methods["sft"].kl.mean == pytest.approx(0, abs=1e-9)
    assert methods["sft"].win_rate.mean == pytest.approx(0.5, abs=1e-9)
    assert methods["sft"].frontier_margin.mean == pytest.approx(0, abs=1e-6)
    assert not methods["best-of-n"].kl_is_bound
    assert methods["ipo"].regret.mean is None
    for name in ("ppo", "ppo-gold", "dpo", "kto"):
        method = methods[name]
        assert method.regret.low is not None
        assert min(method.regret.per_seed) > 0  # pyright: ignore[reportArgumentType]
    for method in methods.values():
        assert max(v for v in method.frontier_margin.per_seed if v is not None) < 1e-4
    assert not any(point.is_bound for point in results.frontier[:2])
    assert "report" in {path.name for path in finished.iterdir()}


def test_regret_in_the_results_is_that_of_the_rows(finished: Path):
    results = Results.model_validate(read_json(finished / "results.json"))
    (listed,) = (finished.parent / ".stages").glob("listing-*")
    dpo = results.methods["dpo"]
    for gold, nats, found in zip(
        dpo.gold.per_seed, dpo.kl.per_seed, dpo.regret.per_seed, strict=True
    ):
        assert gold is not None
        assert nats is not None
        assert found == pytest.approx(World(listed).regret(0.5, gold, nats), abs=1e-9)


def test_rows_of_a_finite_task_are_one_column_of_its_prompts(
    models: tuple[Path, ...], listed: Path, tmp_path: Path
):
    rows = read(tmp_path, models, listed, samples=3)
    table = EvaluationRows([tmp_path, tmp_path])
    assert table.exact
    close(Tensor(table.mean("gold")), [[np.mean([r["exact"]["gold"] for r in rows])]] * 2, 1e-6)
    sampled = np.mean([r["k1"] for r in rows])
    close(Tensor(table.mean("k1")), [[sampled]] * 2, 1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--evaluation.prompts=5", "`evaluation.prompts`: must be 4"),
        ("--sampling.max_new_tokens=4", "`sampling.max_new_tokens`: must be 3"),
        ("--arms.dpo.gold=true", "`arms.dpo.gold`: only arms of kind `ppo` have it"),
    ],
)
def test_what_does_not_fit_a_listing_is_refused(tmp_path: Path, override: str, message: str):
    with pytest.raises(InputError, match=message):
        small(tmp_path, override)


def test_listed_pairs_of_an_endless_task_are_refused():
    with pytest.raises(InputError, match="the completions of reviews are endless"):
        load_experiment("reviews", ["--preferences.listed=true"], quick=False)
