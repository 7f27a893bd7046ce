"""The reward model's stages: what training, normalising and examining leave behind."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import close
from transformers import AutoModelForSequenceClassification

from benchmarks.evaluation.metrics import accuracy_from_gold, bayes_accuracy
from rlhf.reward import RewardConfig, examine_reward, train_reward
from shared.data.batches import PairRows
from shared.data.pairs import read_pairs
from shared.data.preferences import PreferenceConfig, make_preferences, make_reward_test
from shared.data.samples import read_samples, sample_reference
from shared.generation.engine import Sampling
from shared.generation.start import Drawing
from shared.models.cost import Meter
from shared.models.load import (
    ModelConfig,
    load_scalar_model,
    new_scalar_model,
    sequence_scores,
)
from shared.models.lora import LoRAConfig
from shared.models.scorer import Scorer
from shared.seeds import seed_of
from shared.stages import read_json, write_jsonl
from shared.tasks.registry import TaskConfig
from shared.training.finished import read_log
from shared.training.fit import Diverged, OptimizerConfig, batches
from shared.training.sft import SftConfig, train_sft

DRAWING = Drawing(Sampling(max_new_tokens=10))
STEADY = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_share=0.0)
LONG = RewardConfig(optimizer=STEADY, epochs=12, batch_size=11, micro_batch_size=32)
SMALL = RewardConfig(optimizer=STEADY, epochs=6, batch_size=11, micro_batch_size=32)


@pytest.fixture(scope="module")
def references(
    tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, task_config: TaskConfig
) -> Path:
    """Six samples of each of eight prompts."""
    folder = tmp_path_factory.mktemp("references")
    sample_reference(folder, task_config, policy_folder, "validation", 8, 6, DRAWING, 0)
    return folder


def trained(
    folder: Path, policy: Path, preferences: Path, references: Path, config: RewardConfig = SMALL
) -> Path:
    folder.mkdir()
    train_reward(folder, policy, preferences, references, config, seed=3)
    return folder


@pytest.fixture(scope="module")
def reward(
    tmp_path_factory: pytest.TempPathFactory,
    policy_folder: Path,
    preferences_folder: Path,
    references: Path,
) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "reward"
    return trained(folder, policy_folder, preferences_folder, references)


def plain_scores(folder: Path, rows: list[list[int]]) -> torch.Tensor:
    """Raw scores of token rows one by one, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    with torch.no_grad():
        return torch.stack([model(torch.tensor([row])).logits[0, 0] for row in rows])


def test_training_ranks_the_chosen_answers_higher(reward: Path, preferences_folder: Path):
    pairs = read_pairs(preferences_folder / "train.jsonl")
    chosen = plain_scores(reward, [p.prompt_ids + p.chosen_ids for p in pairs])
    rejected = plain_scores(reward, [p.prompt_ids + p.rejected_ids for p in pairs])
    assert (chosen > rejected).float().mean() > 0.9
    log = read_log(reward)
    assert len(log) == 12  # 22 pairs in batches of 11, six times over
    assert log[-1]["loss"] < log[0]["loss"]
    assert read_json(reward / "cost.json")["labels_used"] == 22


def test_by_lora_each_matrix_moves_by_the_rank_the_head_moves_whole_and_nothing_else_does(
    tmp_path: Path, policy_folder: Path, preferences_folder: Path, references: Path
):
    """What is saved is a plain reward model, which ranks the pairs as one trained whole does."""
    config = SMALL.model_copy(update={"lora": LoRAConfig(rank=2), "epochs": 12})
    reward = trained(tmp_path / "lora", policy_folder, preferences_folder, references, config)
    before = new_scalar_model(policy_folder, seed_of(3, "reward head")).state_dict()
    after = load_scalar_model(reward).state_dict()
    assert before.keys() == after.keys()
    for name, weights in after.items():
        moved = weights - before[name]
        if name == "score.weight":
            assert moved.abs().max() > 1e-3
        elif "_proj" in name:
            assert torch.linalg.matrix_rank(moved, rtol=1e-3) == 2, name
        else:
            assert not moved.any(), name
    pairs = read_pairs(preferences_folder / "train.jsonl")
    chosen = plain_scores(reward, [p.prompt_ids + p.chosen_ids for p in pairs])
    rejected = plain_scores(reward, [p.prompt_ids + p.rejected_ids for p in pairs])
    assert (chosen > rejected).float().mean() > 0.9


def test_a_reward_model_costs_its_training_and_its_normalisation(
    reward: Path, preferences_folder: Path, references: Path
):
    """The same passes once more: those of every step with a gradient, those of the samples not."""
    cost = read_json(reward / "cost.json")
    pairs, samples = read_pairs(preferences_folder / "train.jsonl"), read_samples(references)
    rows, model = PairRows(pairs, 0, SMALL.limit), load_scalar_model(reward)
    meter = Meter()
    for numbers in batches(22, 11, 6, seed_of(3, "reward batches")):
        for batch in rows.of_pairs(numbers):
            sequence_scores(model, batch.sequences).sum().backward()
    assert cost["train_tokens"] == meter.train_tokens
    sizes = [2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs]
    assert meter.train_tokens == 6 * sum(sizes)
    prompts = [row.prompt_ids for row in samples for _ in range(6)]
    Scorer(reward).score_all(prompts, [c for row in samples for c in row.completions])
    assert cost["flops"] == pytest.approx(meter.flops)
    assert cost["phases"].keys() == {"train", "normalise"}


def test_swapped_labels_teach_the_opposite(
    reward: Path, tmp_path: Path, policy_folder: Path, preferences_folder: Path, references: Path
):
    pairs = read_pairs(preferences_folder / "train.jsonl")
    rows = [
        p._replace(chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids)._asdict() for p in pairs
    ]
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    other = trained(tmp_path / "reward", policy_folder, tmp_path / "data", references)
    texts = [p.prompt_ids + c for p in pairs for c in (p.chosen_ids, p.rejected_ids)]
    mine, theirs = (plain_scores(folder, texts).view(-1, 2) for folder in (reward, other))
    assert ((mine[:, 0] > mine[:, 1]) != (theirs[:, 0] > theirs[:, 1])).float().mean() > 0.9


def test_a_pair_and_its_mirror_with_the_opposite_probability_teach_the_same(
    tmp_path: Path, policy_folder: Path, preferences_folder: Path, references: Path
):
    pairs = read_pairs(preferences_folder / "train.jsonl")
    swapped = [p._replace(chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in pairs]
    scores = []
    for name, rows, p in (("pairs", pairs, 0.8), ("mirrored", swapped, 0.2)):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [r._replace(p=p)._asdict() for r in rows])
        model = trained(
            tmp_path / f"{name}-reward", policy_folder, tmp_path / name, references, LONG
        )
        texts = [r.prompt_ids + c for r in pairs for c in (r.chosen_ids, r.rejected_ids)]
        scores.append(plain_scores(model, texts))
    close(*scores, 1e-3)
    margin = (scores[0].view(-1, 2) @ torch.tensor([1.0, -1.0])).mean()
    close(margin, torch.tensor(0.8).logit(), 0.4)


def test_scores_of_sft_samples_have_mean_0_and_a_deviation_of_1_within_prompts(
    reward: Path, references: Path
):
    samples = read_samples(references)
    raw = plain_scores(reward, [row.prompt_ids + c for row in samples for c in row.completions])
    stored = json.loads((reward / "normalisation.json").read_text())
    close(stored["offset"], raw.mean(), 1e-5)
    scores = ((raw - stored["offset"]) / stored["scale"]).view(8, 6)
    close(scores.mean(), 0.0, 1e-5)
    close(scores.var(1).mean(), 1.0, 1e-4)
    scorer = Scorer(reward)
    prompts = [row.prompt_ids for row in samples for _ in range(6)]
    ours = scorer.score_all(prompts, [c for row in samples for c in row.completions])
    close(ours, scores.flatten(), 1e-4)


@pytest.mark.parametrize(
    "cut", [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"micro_batch_tokens": 150}]
)
def test_micro_batches_change_no_step(
    tmp_path: Path, policy_folder: Path, preferences_folder: Path, references: Path, cut
):
    """Logged before any step has moved the weights far: the first two steps."""
    gentle = STEADY.model_copy(update={"learning_rate": 1e-4, "adam_epsilon": 1e-3})
    logs = []
    for name, part in (("cut", cut), ("whole", {})):
        config = SMALL.model_copy(update={**part, "epochs": 1, "optimizer": gentle})
        folder = tmp_path / name
        trained(folder, policy_folder, preferences_folder, references, config)
        logs.append(read_log(folder))
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_centering_keeps_scores_near_0(
    tmp_path: Path, policy_folder: Path, preferences_folder: Path, references: Path, reward: Path
):
    pairs = read_pairs(preferences_folder / "train.jsonl")
    texts = [p.prompt_ids + c for p in pairs for c in (p.chosen_ids, p.rejected_ids)]
    config = SMALL.model_copy(update={"center": 1.0})
    centred = trained(tmp_path / "r", policy_folder, preferences_folder, references, config)
    sums = [plain_scores(f, texts).view(-1, 2).sum(1).pow(2).mean() for f in (centred, reward)]
    assert sums[0] < 0.25 * sums[1]


def test_a_reward_model_that_diverges_says_which_key_to_change(
    tmp_path: Path, policy_folder: Path, preferences_folder: Path, references: Path
):
    wild = SMALL.model_copy(update={"optimizer": STEADY.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(Diverged, match=r"reward model, step 2: .*reward\.optimizer\.learning_rate"):
        trained(tmp_path / "r", policy_folder, preferences_folder, references, wild)


def test_examining_keeps_raw_scores_beside_the_truth(
    reward: Path, tmp_path: Path, policy_folder: Path, task_config: TaskConfig
):
    make_reward_test(tmp_path, task_config, policy_folder, 40, DRAWING, 0)
    examine_reward(tmp_path, reward, tmp_path)
    found, pairs = read_json(tmp_path / "scores.json"), read_pairs(tmp_path / "pairs.jsonl")
    close(
        torch.tensor(found["score_b"]),
        plain_scores(reward, [p.prompt_ids + p.rejected_ids for p in pairs]),
        1e-4,
    )
    gap = np.array([p.chosen_gold - p.rejected_gold for p in pairs])
    np.testing.assert_allclose(found["p_a_wins"], 1 / (1 + np.exp(-3 * gap)), rtol=1e-12)
    assert found["length_a"] == [len(p.chosen_ids) for p in pairs]


@pytest.mark.slow  # SFT, 100,000 samples and a long training: minutes
@pytest.mark.timeout(3600)
def test_with_fifty_thousand_pairs_the_reward_model_comes_within_three_points_of_the_best(
    tmp_path: Path,
):
    """At the default model size; accuracy with the label noise integrated out, 5,000 new pairs."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    task, drawing = TaskConfig(), Drawing(Sampling())
    folders = {name: tmp_path / name for name in ("sft", "scale", "data", "test", "reward")}
    for folder in folders.values():
        folder.mkdir()
    train_sft(folders["sft"], task, ModelConfig(), SftConfig(examples=12000, epochs=1), 0)
    sft = folders["sft"]
    sample_reference(folders["scale"], task, sft, "validation", 256, 8, drawing, 0)
    make_reward_test(folders["test"], task, sft, 5000, drawing, 0)
    data = PreferenceConfig(pairs=50_000, per_prompt=3)
    make_preferences(folders["data"], task, sft, data, drawing, 0)
    config = RewardConfig(batch_size=64, micro_batch_size=64)
    train_reward(folders["reward"], sft, folders["data"], folders["scale"], config, 0)
    examine_reward(folders["reward"], folders["reward"], folders["test"])
    torch.set_num_threads(before)
    found = {k: np.array(v) for k, v in read_json(folders["reward"] / "scores.json").items()}
    accuracy = accuracy_from_gold(found["score_a"], found["score_b"], found["p_a_wins"])
    best = bayes_accuracy(found["p_a_wins"])
    print(f"accuracy {accuracy:.4f}, best possible {best:.4f}")
    assert accuracy > best - 0.03
