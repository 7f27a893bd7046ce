"""A policy of each method is anybody's: transformers, TRL and vLLM read it with our numbers."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from dpo.filtered import Filter, FilterConfig, train_filtered
from dpo.train import DirectConfig, DirectData, train_direct
from rlhf.ppo import PPOConfig, train_ppo
from shared.data.pairs import Pair, read_pairs
from shared.generation.engine import Sampling
from shared.generation.start import Drawing, GenerationConfig, make_engine
from shared.models.load import Start, load_policy, load_tokenizer, special_ids
from shared.models.logprobs import score_logps, token_logprobs
from shared.models.lora import LoRAConfig
from shared.models.sequences import collate
from shared.tasks.registry import TaskConfig
from shared.training.fit import OptimizerConfig

FAST = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_share=0.0)
DIRECT = DirectConfig(optimizer=FAST, epochs=1, batch_size=8)
PPO = PPOConfig(episodes=16, rollout_size=8, minibatch_size=8, optimizer=FAST, max_kl=1e6)
DRAWING = Drawing(Sampling(max_new_tokens=8))
METHODS = ("sft", "dpo", "ipo", "kto", "fdpo", "ppo", "ppo in one trunk", "dpo with lora")


@pytest.fixture(scope="module", params=METHODS)
def trained(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    policy_folder: Path,
    reward_folder: Path,
    preferences_folder: Path,
    reference_folder: Path,
) -> Path:
    """A few steps of a method, which move the policy."""
    method, folder = request.param, tmp_path_factory.mktemp("trained")
    data = DirectData(preferences_folder, reference_folder, reference_folder)
    start = Start(policy_folder, LoRAConfig(rank=4) if "lora" in method else None)
    settings = {"ipo": {"tau": 0.2}}
    if method == "sft":
        return policy_folder
    if method == "fdpo":
        filtering = Filter(reward_folder, FilterConfig(epochs=1), DRAWING)
        train_filtered(folder, start, data, filtering, {"beta": 0.1}, DIRECT, [])
    elif method.startswith("ppo"):
        ppo = PPO.model_copy(update={"shared_trunk": "trunk" in method})
        train_ppo(folder, start, reward_folder, TaskConfig(), ppo, 0.01, DRAWING, [])
    else:
        loss = method.split()[0]
        setting = settings.get(loss, {"beta": 0.1})
        train_direct(folder, start, data, loss, setting, DIRECT, [])
    return folder / "final"


@pytest.fixture(scope="module")
def pairs(preferences_folder: Path) -> list[Pair]:
    return read_pairs(preferences_folder / "train.jsonl")


def sides(pairs: list[Pair]) -> tuple[list[list[int]], list[list[int]]]:
    completions = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    return [p.prompt_ids for p in pairs] * 2, completions


def our_logps(folder: Path, pairs: list[Pair]) -> Tensor:
    pad = special_ids(load_tokenizer(folder), folder).pad
    return score_logps(load_policy(folder).eval(), *sides(pairs), pad)


@torch.no_grad()
def test_transformers_gives_our_log_probabilities(
    trained: Path, policy_folder: Path, pairs: list[Pair]
):
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    found = []
    for prompt, completion in zip(*sides(pairs), strict=True):
        ids = torch.tensor([prompt + completion])
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(logprobs.gather(1, ids[0, len(prompt) :, None]).sum())
    ours = our_logps(trained, pairs)
    torch.testing.assert_close(torch.stack(found), ours, atol=1e-4, rtol=1e-5)
    if trained != policy_folder:
        assert (ours - our_logps(policy_folder, pairs)).abs().max() > 1e-3  # it was trained


def test_trls_dpo_trainer_gives_our_log_probabilities(
    trained: Path, pairs: list[Pair], tmp_path: Path
):
    row = {"prompt": "the plot was dull and", "chosen": " it", "rejected": " was"}
    tokenizer = AutoTokenizer.from_pretrained(trained)
    trainer = DPOTrainer(
        model=str(trained),
        args=DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    chosen, rejected = trainer.compute_ref_log_probs(model, collator([p._asdict() for p in pairs]))
    found = torch.cat([chosen, rejected]).float()
    torch.testing.assert_close(found, our_logps(trained, pairs), atol=1e-4, rtol=1e-5)


@pytest.mark.vllm
def test_vllm_samples_with_our_log_probabilities(trained: Path, pairs: list[Pair]):
    model, ids = load_policy(trained).eval(), special_ids(load_tokenizer(trained), trained)
    engine = make_engine(GenerationConfig(engine="vllm"), model, ids, trained)
    prompts = [p.prompt_ids for p in pairs]
    drawn = engine.generate(prompts, Sampling(max_new_tokens=8))
    batch = collate(prompts, drawn.ids, ids.pad)
    with torch.no_grad():
        ours = token_logprobs(model, batch)[batch.mask]
    theirs = torch.tensor([number for row in drawn.logprobs for number in row])
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
