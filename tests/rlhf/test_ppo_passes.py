"""PPO in fewer passes: log-probabilities that the engine told, one trunk, LoRA as reference."""

import json
import math
from pathlib import Path

import pytest
import torch
from checks import close, weights
from families import CONFIGS
from test_ppo import SAMPLING, SMALL, run
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    PreTrainedTokenizerBase,
)
from works import Inputs, works

from rlhf.losses import policy_loss, value_loss
from rlhf.ppo import PPOConfig, engine_is_exact, ppo_update, update_models
from rlhf.rollout import Actors, GoldScorer, make_actors, score_rollout
from shared.config import InputError
from shared.generation.start import Drawing
from shared.models.cost import Meter
from shared.models.load import Start, load_policy, load_scalar_model, save
from shared.models.logprobs import logprobs_and_values, token_logprobs
from shared.models.lora import LoRAConfig, value_head
from shared.models.sequences import Limit
from shared.tasks.registry import TaskConfig, make_task
from shared.training.fit import OptimizerConfig

LORA = LoRAConfig(rank=4, alpha=8)
FORMS = {
    "four models": {},
    "shared trunk": {"shared_trunk": True},
    "lora": {"lora": LORA},
    "lora, shared trunk": {"lora": LORA, "shared_trunk": True},
}


@pytest.fixture(scope="module")
def prompts(task_config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer(text).input_ids for text in make_task(task_config).prompts("ppo", 16, 0)]


def actors_of(
    policy: Path,
    reward: Path | GoldScorer,
    ppo: PPOConfig = SMALL,
    *,
    shared_trunk: bool = False,
    lora: LoRAConfig | None = None,
) -> Actors:
    optimizers = ppo.model_copy(update={"shared_trunk": shared_trunk}).optimizers(3)
    return make_actors(Start(policy, lora), reward, optimizers, Drawing(SAMPLING), Meter())


def moved(actors: Actors) -> Actors:
    """Away from the reference, adapters and heads included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in actors.policy.model.parameters():
            if p.requires_grad:
                p += 0.03 * torch.randn(p.shape, generator=generator)
    return actors


# What the engine told


def test_what_the_engine_told_is_what_the_policy_says(
    policy_folder: Path, reward_folder: Path, prompts: list[list[int]]
):
    actors = moved(actors_of(policy_folder, reward_folder))
    drawn = actors.engine.generate(prompts, SAMPLING)
    (read, scores), (told, other) = (
        score_rollout(actors, prompts, drawn.ids, sampled) for sampled in (None, drawn.logprobs)
    )
    close(told.logprobs, read.logprobs)
    assert torch.equal(told.logprobs == 0, ~told.sequences.mask)
    assert torch.equal(told.ref_logprobs, read.ref_logprobs)
    assert torch.equal(told.values, read.values)
    assert torch.equal(scores, other)


def test_scoring_in_many_passes_changes_no_number(
    policy_folder: Path,
    reward_folder: Path,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
):
    actors = moved(actors_of(policy_folder, reward_folder))
    drawn = actors.engine.generate(prompts, SAMPLING)
    whole, scores = score_rollout(actors, prompts, drawn.ids)
    monkeypatch.setattr("rlhf.rollout.SCORING", Limit(256, 40))
    cut, other = score_rollout(actors, prompts, drawn.ids)
    for found, expected in zip((*cut[1:], other), (*whole[1:], scores), strict=True):
        close(found, expected)


def test_a_told_number_is_taken_and_one_that_is_off_shows_in_the_log(
    policy_folder: Path, reward_folder: Path, prompts: list[list[int]]
):
    """The first minibatch compares: it is read before any step."""
    actors = actors_of(policy_folder, reward_folder)
    generate = actors.engine.generate
    found = []
    for off in (0.0, 0.25):

        def lying(prompts, sampling, off=off):
            drawn = generate(prompts, sampling)
            return drawn._replace(logprobs=[[x - off for x in row] for row in drawn.logprobs])

        actors.engine.generate = lying
        found.append(ppo_update(actors, prompts, SMALL, 0.1, SAMPLING))
    honest, off = found
    assert honest["generation/logprob_difference_max"] < 1e-5
    assert honest["ppo/first_ratio"] == pytest.approx(1, abs=1e-5)
    assert off["generation/logprob_difference"] == pytest.approx(0.25, abs=1e-4)
    assert off["generation/logprob_difference_max"] == pytest.approx(0.25, abs=1e-4)
    assert off["ppo/first_ratio"] == pytest.approx(math.exp(0.25), abs=1e-3)


def test_whose_numbers_are_taken(policy_folder: Path, reward_folder: Path):
    half = OptimizerConfig(**{**SMALL.optimizer.model_dump(), "precision": "bfloat16"})
    whole = actors_of(policy_folder, reward_folder)
    rounded = actors_of(policy_folder, reward_folder, SMALL.model_copy(update={"optimizer": half}))
    assert engine_is_exact(whole, SMALL)
    assert not engine_is_exact(rounded, SMALL)  # it samples in float32
    for change in ({"reuse_logprobs": False}, {"importance_cap": 2.0}):
        assert not engine_is_exact(whole, SMALL.model_copy(update=change))
    whole.engine.exact = False
    assert not engine_is_exact(whole, SMALL)


def test_it_saves_one_pass_and_changes_no_result(
    tmp_path: Path, policy_folder: Path, reward_folder: Path, task_config: TaskConfig
):
    gentle = SMALL.optimizer.model_copy(update={"learning_rate": 1e-3})
    ppo = SMALL.model_copy(update={"optimizer": gentle, "episodes": 32})
    logs, flops = [], []
    for reuse in (True, False):
        changed = ppo.model_copy(update={"reuse_logprobs": reuse})
        folder = tmp_path / str(reuse)
        logs.append(run(folder, policy_folder, reward_folder, task_config, changed)[0])
        flops.append(json.loads((folder / "cost.json").read_text())["flops"])
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        for name in ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg"):
            assert one[name] == pytest.approx(two[name], abs=2e-4)
    assert logs[1][0]["objective/kl"] == 0  # read in one way, policy and reference agree to the bit
    # sampling, scores, reference, values, and the policy: one pass each; two epochs of two models
    assert 1 - flops[0] / flops[1] == pytest.approx(1 / (5 + 2 * 2 * 3), rel=0.12)


# One trunk, and LoRA


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_policy_and_reference_start_alike_whatever_the_form(
    form: dict, policy_folder: Path, reward_folder: Path, prompts: list[list[int]]
):
    actors = actors_of(policy_folder, reward_folder, **form)
    drawn = actors.engine.generate(prompts, SAMPLING)
    rollout, _ = score_rollout(actors, prompts, drawn.ids)
    plain = token_logprobs(load_policy(policy_folder), rollout.sequences).detach()
    close(rollout.logprobs, plain)
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    after, _ = score_rollout(moved(actors), prompts, drawn.ids)
    assert (after.logprobs - plain).abs().max() > 0.01
    assert torch.equal(after.ref_logprobs, rollout.ref_logprobs)  # it has stayed


def test_a_shared_trunk_needs_two_models_less_and_lora_one(
    policy_folder: Path, reward_folder: Path
):
    held = {
        name: actors_of(policy_folder, reward_folder, **form).meter.models_held
        for name, form in FORMS.items()
    }
    assert held == {"four models": 4, "shared trunk": 3, "lora": 3, "lora, shared trunk": 2}


def test_one_step_follows_policy_loss_and_a_share_of_the_value_loss(
    policy_folder: Path, reward_folder: Path, prompts: list[list[int]]
):
    """The gradient's norm and the logged losses, from the two losses on plain sums."""
    ppo = SMALL.model_copy(update={"epochs": 1, "minibatch_size": 16, "vf_coef": 0.7})
    actors = moved(actors_of(policy_folder, reward_folder, ppo, shared_trunk=True))
    drawn = actors.engine.generate(prompts, SAMPLING)
    rollout, _ = score_rollout(actors, prompts, drawn.ids)
    noise = torch.randn(2, *rollout.values.shape, generator=torch.Generator().manual_seed(0))
    returns = rollout.values + noise[1]
    rollout = rollout._replace(advantages=noise[0], returns=returns)
    logprobs, values = logprobs_and_values(actors.policy.model, rollout.sequences)
    mask = rollout.sequences.mask
    expected = (
        policy_loss(logprobs, rollout.logprobs, noise[0], mask, clip=0.2)[0],
        value_loss(values, rollout.values, returns, mask, clip=0.2)[0],
    )
    (expected[0] + 0.7 * expected[1]).backward()
    norm = torch.cat([p.grad.flatten() for p in actors.policy.model.parameters()]).norm().item()
    actors.policy.model.zero_grad()
    before = value_head(actors.policy.model).weight.clone()
    numbers = update_models(actors, rollout, ppo, seed=0)
    assert numbers["loss/policy_avg"] == pytest.approx(expected[0].item(), abs=1e-5)
    assert numbers["loss/value_avg"] == pytest.approx(expected[1].item(), rel=1e-4)
    assert numbers["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert not torch.equal(value_head(actors.policy.model).weight, before)


def test_with_lora_an_update_leaves_the_start_alone(
    policy_folder: Path, reward_folder: Path, prompts: list[list[int]]
):
    actors = actors_of(policy_folder, reward_folder, lora=LORA, shared_trunk=True)
    for seed in range(2):
        draw = SAMPLING.model_copy(update={"seed": seed})
        ppo_update(actors, prompts, SMALL, 0.1, draw)
    base = dict(load_policy(policy_folder).named_parameters())
    for name, p in actors.policy.model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if plain in base:
            assert torch.equal(p, base[plain])
    assert (value_head(actors.policy.model).weight != 0).any()


@pytest.mark.parametrize("name", ["shared trunk", "lora", "lora, shared trunk"])
def test_a_whole_run_is_saved_as_a_plain_policy(
    name: str,
    tmp_path: Path,
    policy_folder: Path,
    reward_folder: Path,
    task_config: TaskConfig,
):
    form = FORMS[name]
    ppo = SMALL.model_copy(update={"shared_trunk": form.get("shared_trunk", False)})
    inputs = policy_folder, reward_folder, task_config, ppo
    log, stopped = run(tmp_path / "run", *inputs, lora=form.get("lora"), checkpoints=(0.34,))
    assert stopped == {"failed": "", "stopped_early": False}
    assert all(row["ppo/first_ratio"] == pytest.approx(1, abs=1e-5) for row in log)
    assert all(row["generation/logprob_difference_max"] < 1e-4 for row in log)
    assert log[-1]["objective/k3"] > 1e-4
    assert log[0]["loss/value_avg"] > 0
    start, early, final = (
        AutoModelForCausalLM.from_pretrained(f)
        for f in (policy_folder, tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "final")
    )
    names = [name for name, _ in start.named_parameters()]
    assert [name for name, _ in final.named_parameters()] == names
    assert 0 < (weights(early) - weights(start)).norm() < (weights(final) - weights(start)).norm()


@pytest.mark.parametrize("form", [FORMS["shared trunk"], FORMS["lora, shared trunk"]])
def test_a_shared_trunk_learns_a_reward_that_is_easy_to_earn(
    form: dict, tmp_path: Path, policy_folder: Path, task_config: TaskConfig
):
    """The task's gold, of which a random policy has almost nothing."""
    ppo = PPOConfig(
        episodes=640,
        rollout_size=64,
        minibatch_size=32,
        optimizer=OptimizerConfig(learning_rate=5e-3, schedule="constant", warmup_share=0.0),
        missing_eos_penalty=3.0,
        max_approx_kl=1.0,
        shared_trunk=True,
    )
    lora = form.get("lora")
    log, _ = run(tmp_path / "run", policy_folder, None, task_config, ppo, lora=lora, kl_coef=0.02)
    assert log[-1]["ppo/missing_eos"] < log[0]["ppo/missing_eos"] / 2
    assert log[-1]["objective/rlhf_reward"] > log[0]["objective/rlhf_reward"] + 0.5
    assert log[-1]["loss/value_avg"] < 0.8 * log[0]["loss/value_avg"]


def test_gold_needs_no_reward_model_in_one_trunk(
    policy_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    task_config: TaskConfig,
    prompts: list[list[int]],
):
    gold = GoldScorer(make_task(task_config), tokenizer)
    actors = actors_of(policy_folder, gold, shared_trunk=True)
    assert actors.meter.models_held == 2
    numbers = ppo_update(actors, prompts, SMALL, 0.1, SAMPLING)
    assert numbers["loss/value_avg"] > 0


def test_a_family_that_cannot_share_its_trunk_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2, pad_token_id=0
    )
    save(BloomForCausalLM(config), tokenizer, tmp_path / "bloom")
    save(load_scalar_model(tmp_path / "bloom", new_head=True), tokenizer, tmp_path / "reward")
    given = tmp_path / "bloom", tmp_path / "reward"
    with pytest.raises(InputError, match=r"bloom cannot share its trunk.*ppo\.shared_trunk"):
        actors_of(*given, shared_trunk=True)
    assert actors_of(*given).meter.models_held == 4
    assert "bloom" not in CONFIGS


def test_checkpointing_changes_no_policy(inputs: Inputs, tmp_path: Path):
    """Sampling, scoring and updates of both models; sums may be taken in another order."""
    found = []
    for name in ("ppo", "ppo, checkpointed"):
        folder = tmp_path / name
        folder.mkdir()
        works(inputs)[name](folder)
        found.append(weights(load_policy(folder / "final")))
    close(found[1], found[0], 1e-6)
    assert not torch.equal(found[0], weights(load_policy(inputs.policy)))
