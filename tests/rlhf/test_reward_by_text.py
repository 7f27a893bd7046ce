"""PPO and filtered DPO with a reward model that reads texts: a decoder or an encoder of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import byte_tokenizer, write_encoder, write_reward
from transformers import PreTrainedModel

from dpo.filtered import Filter, FilterConfig, train_filtered
from dpo.train import DirectConfig, DirectData
from rlhf.ppo import PPOConfig, train_ppo
from rlhf.rollout import make_actors
from shared.data.pairs import read_pairs
from shared.generation.engine import Sampling
from shared.generation.start import Drawing
from shared.models.cost import Meter
from shared.models.load import Start, load_policy, load_tokenizer, state_values
from shared.models.scorer import scorer_of
from shared.models.sequences import collate
from shared.stages import read_json, read_jsonl
from shared.tasks.registry import TaskConfig
from shared.training.finished import read_log
from shared.training.fit import OptimizerConfig

FAST = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_share=0.0)
PPO = PPOConfig(episodes=16, rollout_size=8, minibatch_size=8, optimizer=FAST)
DRAWING = Drawing(Sampling(max_new_tokens=8))


@pytest.fixture(params=["decoder", "encoder"])
def reward(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tokenizer = byte_tokenizer(turned=True, pad_token="<pad>", eos_token="<|im_end|>")
    write: Any = write_reward if request.param == "decoder" else write_encoder
    write(tmp_path / "reward", tokenizer)
    return tmp_path / "reward"


def test_ppos_value_model_starts_from_the_policy_at_zero(policy_folder: Path, reward: Path):
    actors = make_actors(Start(policy_folder), reward, PPO.optimizers(2), DRAWING, Meter())
    assert actors.meter.models_held == 4
    assert actors.value is not None
    assert isinstance(actors.scorer.model, PreTrainedModel)
    batch = collate([[5, 6]], [[7, 8, 1]], 0)
    assert torch.equal(state_values(actors.value.model, batch), torch.zeros(1, 3))
    theirs = dict(load_policy(policy_folder).named_parameters())
    for name, value in actors.value.model.named_parameters():
        assert name.startswith("score.") or torch.equal(value, theirs[name])


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_ppo_runs_to_its_end(policy_folder: Path, reward: Path, tmp_path: Path, shared_trunk: bool):
    ppo = PPO.model_copy(update={"shared_trunk": shared_trunk})
    folder = tmp_path / "ppo"
    folder.mkdir()
    train_ppo(folder, Start(policy_folder), reward, TaskConfig(), ppo, 0.05, DRAWING, [])
    assert read_json(folder / "stopped.json") == {"failed": "", "stopped_early": False}
    assert len(read_log(folder)) == 2
    load_policy(folder / "final")


def test_filtered_dpo_keeps_what_the_texts_scores_say(
    policy_folder: Path,
    preferences_folder: Path,
    reference_folder: Path,
    reward: Path,
    tmp_path: Path,
):
    folder, config = tmp_path / "filtered", FilterConfig(epochs=1, floor=0.05)
    folder.mkdir()
    data = DirectData(preferences_folder, reference_folder)
    filtering = Filter(reward, config, DRAWING)
    direct = DirectConfig(optimizer=FAST, batch_size=8)
    train_filtered(folder, Start(policy_folder), data, filtering, {"beta": 0.1}, direct, [])
    pairs = {p.id: p for p in read_pairs(preferences_folder / "train.jsonl")}
    scorer = scorer_of(reward, policy_folder)
    rows = read_jsonl(folder / "audit.jsonl")
    chosen = scorer.score_all(
        [pairs[row["id"]].prompt_ids for row in rows], [pairs[row["id"]].chosen_ids for row in rows]
    )
    assert [row["chosen"] for row in rows] == pytest.approx(chosen.tolist(), abs=1e-5)
    assert all(row["kept"] == (row["chosen"] > row["sample"]) for row in rows)
    assert load_tokenizer(folder / "final").eos_token_id is not None
