"""PPO: its first step, its scores and values, its penalty, and small runs of the whole stage."""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from checks import close, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from rlhf.ppo import KLController, PPOConfig, prompt_stream, train_ppo, update_models
from rlhf.rollout import (
    Actors,
    Rollout,
    compare_engine,
    make_actors,
    score_rollout,
    value_model,
    with_zero_head,
)
from shared.data.splits import split_of
from shared.generation.engine import Completions, EngineLost, Sampling
from shared.generation.hf import HFEngine
from shared.generation.start import Drawing
from shared.models.cost import Meter
from shared.models.load import (
    Start,
    load_policy,
    load_scalar_model,
    new_scalar_model,
    save,
    special_ids,
    state_values,
    token_scalars,
)
from shared.models.logprobs import sequence_logps, token_logprobs
from shared.models.lora import LoRAConfig
from shared.models.reward_files import save_normalisation
from shared.models.sequences import Sequences, collate
from shared.seeds import seed_of
from shared.stages import SAVES, read_json
from shared.tasks.registry import TaskConfig, make_task
from shared.training.finished import read_log
from shared.training.fit import OptimizerConfig, step

PAD, EOS = 0, 1
SAMPLING = Sampling(max_new_tokens=10)
STEADY = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_share=0.0)
SMALL = PPOConfig(
    episodes=48,
    rollout_size=16,
    epochs=2,
    minibatch_size=8,
    micro_batch_size=4,
    optimizer=STEADY,
    value_learning_rate=1e-2,
    max_approx_kl=100.0,
    max_kl=1e6,
)


def digest(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def four_models(
    policy: Path, reward_model: Path, ppo: PPOConfig, sampling: Sampling, updates: int
) -> Actors:
    """As `train_ppo` makes them."""
    optimizers = ppo.optimizers(updates)
    return make_actors(Start(policy), reward_model, optimizers, Drawing(sampling), Meter())


@pytest.fixture
def actors(policy_folder: Path, reward_folder: Path) -> Actors:
    return four_models(policy_folder, reward_folder, SMALL, SAMPLING, 3)


@pytest.fixture(scope="module")
def prompts(task_config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """24 prompts of several lengths, one of a single token."""
    texts = make_task(task_config).prompts("ppo", 24, 0)
    return [[17], *[tokenizer(text).input_ids for text in texts[1:]]]


@pytest.fixture(scope="module")
def completions(policy_folder: Path, reward_folder: Path, prompts: list[list[int]]) -> Completions:
    """What the policy answers: some end by themselves, some are cut."""
    engine = four_models(policy_folder, reward_folder, SMALL, SAMPLING, 3).engine
    drawn = engine.generate(prompts, SAMPLING)
    assert 0.2 < sum(drawn.truncated) / len(drawn.truncated) < 0.8
    return drawn


@pytest.fixture
def rollout(
    actors: Actors, prompts: list[list[int]], completions: Completions
) -> tuple[Rollout, Tensor]:
    return score_rollout(actors, prompts, completions.ids)


# The penalty's coefficient


@given(
    kl=st.floats(0, 100), target=st.floats(0.1, 50), n=st.integers(1, 1000), coef=st.floats(1e-3, 1)
)
def test_the_controller_follows_ziegler_et_al(kl: float, target: float, n: int, coef: float):
    controller = KLController(coef, target, horizon=10000)
    controller.update(kl, n)
    error = sorted([-0.2, kl / target - 1, 0.2])[1]
    assert controller.coef == pytest.approx(coef * (1 + error * n / 10000))


def test_the_controller_by_hand():
    for kl, expected in [(6.0, 0.1), (6.6, 0.1 * 1.01), (60.0, 0.1 * 1.02), (0.0, 0.1 * 0.98)]:
        controller = KLController(0.1, target=6.0, horizon=1000)
        controller.update(kl, 100)
        assert controller.coef == pytest.approx(expected)


def test_without_a_target_the_coefficient_stays():
    controller = KLController(0.1)
    controller.update(100.0, 512)
    assert controller.coef == 0.1


# The first step


def test_before_the_first_step_policy_and_reference_agree_exactly(rollout):
    found, _ = rollout
    assert torch.equal(found.logprobs, found.ref_logprobs)


def test_the_ratio_of_the_first_minibatch_is_1(actors: Actors, rollout):
    """The policy that trains reads its own samples as it did when it sampled them."""
    found, _ = rollout
    assert actors.policy.model.training
    for rows in ([0, 1, 2, 3], [5], [23, 2, 11, 7, 8]):
        part = found.rows(torch.tensor(rows))
        log_ratio = token_logprobs(actors.policy.model, part.sequences) - part.logprobs
        assert log_ratio.abs().max() <= 1e-5
    found = found._replace(advantages=torch.randn(found.values.shape), returns=found.values)
    numbers = update_models(actors, found, SMALL, seed=0)
    assert numbers["ppo/first_ratio"] == pytest.approx(1, abs=1e-6)


def test_rollout_and_update_are_read_at_the_sampling_temperature(
    policy_folder: Path, reward_folder: Path, prompts, completions
):
    warm = SAMPLING.model_copy(update={"temperature": 0.7})
    actors = four_models(policy_folder, reward_folder, SMALL, warm, 3)
    found, _ = score_rollout(actors, prompts, completions.ids)
    batch = collate(prompts, completions.ids, PAD)
    expected = token_logprobs(load_policy(policy_folder), batch, temperature=0.7)
    close(found.logprobs, expected)
    close(found.ref_logprobs, expected)
    found = found._replace(advantages=torch.ones(found.values.shape), returns=found.values)
    assert update_models(actors, found, SMALL, 0)["ppo/first_ratio"] == pytest.approx(1, abs=1e-6)


def test_in_bfloat16_rollout_and_update_round_alike(
    policy_folder: Path, reward_folder: Path, prompts: list[list[int]], completions: Completions
):
    half = OptimizerConfig(**{**SMALL.optimizer.model_dump(), "precision": "bfloat16"})
    rounded = SMALL.model_copy(update={"optimizer": half})
    actors = four_models(policy_folder, reward_folder, rounded, SAMPLING, 3)
    exact = four_models(policy_folder, reward_folder, SMALL, SAMPLING, 3)
    found, scores = score_rollout(actors, prompts, completions.ids)
    other, other_scores = score_rollout(exact, prompts, completions.ids)
    apart = (found.logprobs - other.logprobs).abs().max()
    assert 1e-4 < apart < 0.1
    assert (found.ref_logprobs - found.logprobs).abs().max() < 1e-5
    assert 1e-4 < (found.values - other.values).abs().max() < 0.1
    assert torch.equal(scores, other_scores)  # a measurement: float32
    found = found._replace(advantages=torch.ones_like(found.values), returns=found.values)
    assert update_models(actors, found, rounded, 0)["ppo/first_ratio"] == pytest.approx(1, abs=1e-4)
    assert {p.dtype for p in actors.policy.model.parameters()} == {torch.float32}


# Scores and values


def test_scores_of_sampled_ids_equal_plain_transformers(
    reward_folder: Path, prompts: list[list[int]], completions: Completions, rollout
):
    """On the same right-padded ids, cut rows included: what was sampled is what is scored."""
    plain = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32)
    rows = [[*p, *c] for p, c in zip(prompts, completions.ids, strict=True)]
    assert all(row[-1] != PAD for row in rows)  # transformers looks for the last other token
    ids = torch.full((len(rows), max(map(len, rows))), plain.config.pad_token_id)
    attention = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        attention[row, : len(tokens)] = 1
    with torch.no_grad():
        raw = plain(input_ids=ids, attention_mask=attention).logits[:, 0]
    stored = json.loads((reward_folder / "normalisation.json").read_text())
    close(rollout[1], (raw - stored["offset"]) / stored["scale"])


def test_the_value_model_starts_as_the_normalised_score(
    actors: Actors, reward_folder: Path, rollout
):
    stored = json.loads((reward_folder / "normalisation.json").read_text())
    assert stored["scale"] != 1
    assert stored["offset"] != 0
    batch = rollout[0].sequences
    reward = load_scalar_model(reward_folder)
    real = batch.attention.bool()
    raw = token_scalars(actors.value.model, batch, real) * stored["scale"] + stored["offset"]
    close(raw, token_scalars(reward, batch, real))


def test_without_a_reward_model_the_value_model_starts_at_0(policy_folder: Path, rollout):
    assert state_values(with_zero_head(policy_folder), rollout[0].sequences).abs().max() == 0.0


def test_a_value_looks_at_the_tokens_before_its_own(actors: Actors, rollout):
    """V_t belongs to the state in which token t is chosen."""
    found, _ = rollout
    batch = found.sequences
    real = batch.attention.bool()
    every = torch.zeros(real.shape).masked_scatter(
        real, token_scalars(actors.value.model, batch, real)
    )
    width = batch.mask.shape[1]
    start = batch.ids.shape[1] - width
    for row, length in enumerate(batch.lengths.tolist()):
        close(found.values[row, :length], every[row, start - 1 : start - 1 + length])
        assert (found.values[row, length:] == 0).all()
    changed = batch.ids.clone()
    changed[:, -1] = 40
    moved = state_values(actors.value.model, Sequences(changed, batch.attention, batch.mask))
    close(moved, state_values(actors.value.model, batch))  # the last token is in no state


# Cutting a rollout


def test_rows_of_a_rollout_keep_every_token_and_change_no_logprob(actors: Actors, rollout, prompts):
    found, _ = rollout
    whole = found.sequences
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 5, 24):
        index = torch.randperm(24, generator=generator)[:count]
        part = found.rows(index)
        ids, attention, mask = part.sequences
        assert mask.shape[1] == int(whole.lengths[index].max())
        for row, original in enumerate(index.tolist()):
            before = whole.ids[original][whole.attention[original].bool()]
            assert torch.equal(ids[row][attention[row].bool()], before)
            assert part.sequences.lengths[row] == whole.lengths[original]
            assert int(attention[row].sum()) == len(prompts[original]) + whole.lengths[original]
        longest = max(len(prompts[i]) for i in index)
        assert ids.shape[1] == longest + mask.shape[1]  # and no column is for nothing
        columns = mask.shape[1]
        close(token_logprobs(actors.policy.model, part.sequences), found.logprobs[index, :columns])
        for ours, theirs in zip(part[1:], found[1:], strict=True):
            assert torch.equal(ours, theirs[index, :columns])


# The update


def updated(
    policy_folder: Path, reward_folder: Path, prompts, completions, **changes
) -> tuple[Actors, dict[str, float]]:
    ppo = SMALL.model_copy(update={"optimizer": STEADY, **changes})
    actors = four_models(policy_folder, reward_folder, ppo, SAMPLING, 3)
    found, _ = score_rollout(actors, prompts, completions.ids)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *found.values.shape, generator=generator) * found.sequences.mask
    found = found._replace(advantages=noise[0], returns=found.values + noise[1])
    return actors, update_models(actors, found, ppo, seed=0)


def test_the_micro_batch_size_changes_no_update(
    policy_folder: Path, reward_folder: Path, prompts, completions
):
    gentle = STEADY.model_copy(update={"learning_rate": 1e-4, "adam_epsilon": 1e-3})
    small = {"optimizer": gentle, "value_learning_rate": 1e-4, "minibatch_size": 12}
    given_data = policy_folder, reward_folder, prompts, completions
    whole, log = updated(*given_data, **small, micro_batch_size=12)
    for size in ((1, 10**6), (5, 10**6), (12, 60)):  # rows, tokens
        limit = dict(zip(("micro_batch_size", "micro_batch_tokens"), size, strict=True))
        cut, cut_log = updated(*given_data, **small, **limit)
        close(weights(cut.policy.model), weights(whole.policy.model), 1e-6)
        close(weights(cut.value.model), weights(whole.value.model), 1e-6)
        assert cut_log == pytest.approx(log, rel=1e-3, abs=1e-4)
    start = weights(load_policy(policy_folder))
    assert (weights(whole.policy.model) - start).abs().max() > 1e-5


def test_a_pass_of_an_update_holds_no_more_than_its_limit_but_for_a_row_alone(
    policy_folder: Path, reward_folder: Path, prompts, completions, monkeypatch
):
    passes: list[Sequences] = []

    def seen(trainee, parts, loss):
        passes.extend(part.sequences for part, _ in parts)
        return step(trainee, parts, loss)

    monkeypatch.setattr("rlhf.ppo.step", seen)
    given_data = policy_folder, reward_folder, prompts, completions
    updated(*given_data, minibatch_size=12, micro_batch_size=5, micro_batch_tokens=60)
    assert {len(rows.ids) for rows in passes} > {1}
    for rows in passes:
        assert len(rows.ids) == 1 or (len(rows.ids) <= 5 and rows.ids.numel() <= 60)


def test_an_update_trains_policy_and_value_model_and_neither_of_the_others(
    policy_folder: Path, reward_folder: Path, prompts, completions
):
    actors, _ = updated(policy_folder, reward_folder, prompts, completions)
    sft, reward = load_policy(policy_folder), load_scalar_model(reward_folder)
    assert torch.equal(weights(actors.ref), weights(sft))
    assert torch.equal(weights(actors.scorer.model), weights(reward))
    assert (weights(actors.policy.model) - weights(sft)).abs().max() > 1e-3
    value = value_model(reward_folder, actors.scorer)
    assert (weights(actors.value.model) - weights(value)).abs().max() > 1e-3


def test_an_update_ends_early_once_the_policy_has_moved_too_far(
    policy_folder: Path, reward_folder: Path, prompts, completions
):
    given_data = policy_folder, reward_folder, prompts, completions
    _, log = updated(*given_data)
    assert log["ppo/minibatches"] == 6  # 2 epochs of 3
    _, log = updated(*given_data, max_approx_kl=1e-6)
    assert log["ppo/minibatches"] == 2  # the first is at ratio 1


def test_an_update_makes_good_tokens_likelier(
    policy_folder: Path, reward_folder: Path, prompts, completions
):
    """Advantage +1 on rows that end by themselves, -1 on rows that were cut."""
    gentle = STEADY.model_copy(update={"learning_rate": 1e-3})
    ppo = SMALL.model_copy(update={"optimizer": gentle})
    actors = four_models(policy_folder, reward_folder, ppo, SAMPLING, 3)
    found, _ = score_rollout(actors, prompts, completions.ids)
    ends = ~torch.tensor(completions.truncated)
    sign = torch.where(ends, 1.0, -1.0).unsqueeze(1) * found.sequences.mask
    update_models(actors, found._replace(advantages=sign, returns=found.values), ppo, seed=0)
    change = sequence_logps(actors.policy.model, found.sequences) - found.logprobs.sum(1)
    assert change[ends].mean() > 0 > change[~ends].mean()


# The prompts


def test_prompts_come_in_full_batches_in_another_order_each_pass(
    tokenizer: PreTrainedTokenizerBase, task_config: TaskConfig
):
    ppo = PPOConfig(episodes=64, rollout_size=16)  # 32 prompts, two passes
    found = [
        batch
        for batch, _ in zip(prompt_stream(tokenizer, task_config, ppo, 0), range(4), strict=False)
    ]
    assert [len(batch) for batch in found] == [16] * 4
    first, second = ([tuple(p) for batch in half for p in batch] for half in (found[:2], found[2:]))
    assert sorted(first) == sorted(second)
    assert first != second
    other = next(prompt_stream(tokenizer, task_config, ppo, 1))
    assert other != found[0]


def test_prompts_are_of_ppos_own_split(tokenizer: PreTrainedTokenizerBase, task_config: TaskConfig):
    """What it is tuned and measured on it never sees."""
    stream = prompt_stream(tokenizer, task_config, PPOConfig(episodes=64, rollout_size=32), 0)
    assert {split_of(text) for text in tokenizer.batch_decode(next(stream))} == {"ppo"}


@settings(deadline=None, max_examples=20)
@given(updates=st.integers(1, 7), size=st.integers(1, 6), rest=st.integers(0, 5))
def test_prompts_last_for_the_whole_run(
    tokenizer: PreTrainedTokenizerBase, task_config: TaskConfig, updates: int, size: int, rest: int
):
    ppo = PPOConfig(episodes=updates * size + min(rest, size - 1), rollout_size=size)
    stream = prompt_stream(tokenizer, task_config, ppo, 0)
    assert all(len(next(stream)) == size for _ in range(updates))


@pytest.mark.parametrize("updates", [2, 4, 20])
def test_an_even_number_of_updates_sees_each_prompt_twice(
    tokenizer: PreTrainedTokenizerBase, task_config: TaskConfig, updates: int
):
    ppo = PPOConfig(episodes=updates * 8, rollout_size=8)
    stream = prompt_stream(tokenizer, task_config, ppo, 0)
    seen = [tuple(prompt) for _ in range(updates) for prompt in next(stream)]
    assert {seen.count(prompt) for prompt in seen} == {2}


# The whole stage


def run(
    folder: Path,
    policy: Path,
    reward: Path | None,
    task: TaskConfig,
    ppo: PPOConfig,
    *,
    kl_coef: float = 0.1,
    checkpoints: Sequence[float] = (),
    seed: int = 0,
    lora: LoRAConfig | None = None,
) -> tuple[list[dict[str, float]], dict]:
    """(log, how it ended) of a PPO stage."""
    folder.mkdir()
    inputs = reward, task, ppo, kl_coef, Drawing(SAMPLING), checkpoints
    train_ppo(folder, Start(policy, lora, seed), *inputs)
    return read_log(folder), read_json(folder / "stopped.json")


@pytest.fixture(scope="module")
def small_run(
    tmp_path_factory: pytest.TempPathFactory,
    policy_folder: Path,
    reward_folder: Path,
    task_config: TaskConfig,
) -> tuple[Path, list[dict[str, float]], dict]:
    before = digest(policy_folder), digest(reward_folder)
    folder = tmp_path_factory.mktemp("ppo") / "run"
    log, stopped = run(
        folder, policy_folder, reward_folder, task_config, SMALL, checkpoints=(0.34, 0.67)
    )
    assert (digest(policy_folder), digest(reward_folder)) == before
    return folder, log, stopped


def test_a_run_writes_plain_folders_that_transformers_loads(small_run, policy_folder: Path):
    folder, _, stopped = small_run
    points = json.loads((folder / "checkpoints.json").read_text())
    assert points == {"checkpoint-1": 0.34, "checkpoint-2": 0.67, "final": 1.0}
    assert stopped == {"failed": "", "stopped_early": False}
    found = []
    for name in points:
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        assert (
            tokenizer("the plot was").input_ids
            == AutoTokenizer.from_pretrained(policy_folder)("the plot was").input_ids
        )
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, EOS)
        found.append(weights(model))
    distances = [(x - weights(load_policy(policy_folder))).norm() for x in found]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_a_run_logs_the_fields_names_at_every_update(small_run):
    _, log, _ = small_run
    assert [row["episodes"] for row in log] == [16, 32, 48]
    names = {
        "objective/kl",
        "objective/k3",
        "objective/scores",
        "objective/rlhf_reward",
        "objective/entropy",
        "ppo/policy/approxkl",
        "ppo/policy/clipfrac",
        "ppo/policy/ratio",
        "ppo/val/clipfrac",
        "ppo/val/explained_variance",
        "ppo/val/grad_norm",
        "ppo/completion_length",
        "ppo/missing_eos",
        "ppo/kl_coef",
        "ppo/first_ratio",
        "loss/policy_avg",
        "loss/value_avg",
        "grad_norm",
        "learning_rate",
    }
    for row in log:
        assert names <= row.keys()
        assert row["ppo/first_ratio"] == pytest.approx(1, abs=1e-5)
        assert row["objective/k3"] >= 0
        assert 0 <= row["ppo/policy/clipfrac"] <= 1
        assert 0 < row["ppo/completion_length"] <= 10


def test_the_first_update_starts_at_the_reference(small_run):
    _, log, _ = small_run
    assert log[0]["objective/kl"] == pytest.approx(0, abs=1e-5)  # of a sequence
    assert log[0]["objective/k3"] == pytest.approx(0, abs=1e-9)
    assert log[1]["objective/k3"] > 1e-4


def test_a_first_update_by_its_definitions(
    tmp_path: Path,
    policy_folder: Path,
    reward_folder: Path,
    task_config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
):
    """One minibatch at ratio 1 and KL 0, put together row by row from plain sums."""
    ppo = SMALL.model_copy(
        update={"episodes": 16, "epochs": 1, "minibatch_size": 16, "gamma": 0.9, "lam": 0.8}
    )
    log, _ = run(tmp_path / "run", policy_folder, reward_folder, task_config, ppo)
    batch = next(prompt_stream(tokenizer, task_config, ppo, 0))
    actors = four_models(policy_folder, reward_folder, ppo, SAMPLING, 1)
    drawn = actors.engine.generate(
        batch, SAMPLING.model_copy(update={"seed": seed_of(0, "rollout", 1)})
    )
    found, scores = score_rollout(actors, batch, drawn.ids)
    advantages, returns = [], []
    for row, tokens in enumerate(drawn.ids):
        end = scores[row].item() - ppo.missing_eos_penalty * drawn.truncated[row]
        values = found.values[row].tolist()
        after = 0.0
        backwards = []
        for t in reversed(range(len(tokens))):
            last = t == len(tokens) - 1
            delta = (end if last else 0.9 * values[t + 1]) - values[t]
            after = delta + 0.9 * 0.8 * after
            backwards.append(after)
        advantages += backwards[::-1]
        returns += [a + v for a, v in zip(backwards[::-1], values, strict=False)]
    flat, targets = torch.tensor(advantages), torch.tensor(returns)
    (row,) = log
    assert row["loss/policy_avg"] == pytest.approx(0, abs=1e-6)  # advantages are whitened,
    assert row["loss/value_avg"] == pytest.approx((flat**2).mean().item() / 2)  # returns are not
    unexplained = flat.var(unbiased=False) / targets.var(unbiased=False)
    assert row["ppo/val/explained_variance"] == pytest.approx(1 - unexplained.item(), abs=1e-5)
    white = (flat - flat.mean()) / flat.std(unbiased=False)
    logprobs = token_logprobs(actors.policy.model, found.sequences)[found.sequences.mask]
    (-(white * logprobs).mean()).backward()
    norm = torch.cat([p.grad.flatten() for p in actors.policy.model.parameters()]).norm()
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_a_run_counts_what_it_generates_and_trains_on(small_run):
    folder, log, _ = small_run
    cost = json.loads((folder / "cost.json").read_text())
    assert cost["generated_tokens"] == sum(16 * row["ppo/completion_length"] for row in log)
    assert cost["models_held"] == 4
    assert cost["labels_used"] == 0
    assert cost["train_tokens"] % 4 == 0  # every token: two epochs, two models
    assert cost["train_tokens"] > 4 * cost["generated_tokens"]
    assert cost["phases"].keys() == {"generate", "score", "update"}


def test_equal_seeds_give_equal_runs(
    small_run, tmp_path: Path, policy_folder: Path, reward_folder: Path, task_config: TaskConfig
):
    folder, log, _ = small_run
    again, _ = run(tmp_path / "a", policy_folder, reward_folder, task_config, SMALL)
    assert again == log
    assert digest(tmp_path / "a" / "final") == digest(folder / "final")
    other, _ = run(tmp_path / "b", policy_folder, reward_folder, task_config, SMALL, seed=1)
    assert other != log


def test_only_a_cut_row_pays_for_its_missing_eos(
    tmp_path: Path, policy_folder: Path, reward_folder: Path, task_config: TaskConfig
):
    """At KL 0 the mean reward is the mean score less the penalty times the share of cut rows."""
    for penalty in (0.0, 3.0):
        ppo = SMALL.model_copy(update={"missing_eos_penalty": penalty, "episodes": 16})
        log, _ = run(tmp_path / f"{penalty}", policy_folder, reward_folder, task_config, ppo)
        share = log[0]["ppo/missing_eos"]
        assert 0 < share < 1
        assert share != 0.5
        difference = log[0]["objective/rlhf_reward"] - log[0]["objective/scores"]
        assert difference == pytest.approx(-penalty * share, abs=1e-5)


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_the_logged_reward_is_score_less_penalties_in_their_own_units(
    tmp_path: Path,
    policy_folder: Path,
    reward_folder: Path,
    task_config: TaskConfig,
    whiten_rewards: bool,
):
    ppo = SMALL.model_copy(update={"whiten_rewards": whiten_rewards})
    log, _ = run(tmp_path / "run", policy_folder, reward_folder, task_config, ppo, kl_coef=0.3)
    assert log[-1]["objective/kl"] != 0
    for row in log:
        penalty = 0.3 * row["objective/kl"] + ppo.missing_eos_penalty * row["ppo/missing_eos"]
        assert row["objective/rlhf_reward"] == pytest.approx(
            row["objective/scores"] - penalty, abs=1e-5
        )


@pytest.mark.parametrize(("share", "error"), [(1.1, 0.1), (0.2, -0.2)])
def test_with_a_target_the_coefficient_follows_the_kl_of_sequences(
    small_run,
    tmp_path: Path,
    policy_folder: Path,
    reward_folder: Path,
    task_config: TaskConfig,
    share: float,
    error: float,
):
    """A KL 10 % above its target moves the coefficient by that much, a far one by 20 % at most."""
    second = small_run[1][1]["objective/kl"]  # the coefficient has not acted on it yet
    assert second > 0.01
    ppo = SMALL.model_copy(update={"kl_target": second / share, "kl_horizon": 100})
    log, _ = run(tmp_path / "run", policy_folder, reward_folder, task_config, ppo)
    first = 0.1 * (1 - 0.2 * 16 / 100)  # the first KL is 0
    expected = [0.1, first, first * (1 + error * 16 / 100)]
    assert [row["ppo/kl_coef"] for row in log] == pytest.approx(expected)


def test_a_runaway_stops_and_says_so(
    tmp_path: Path, policy_folder: Path, reward_folder: Path, task_config: TaskConfig
):
    ppo = SMALL.model_copy(update={"max_kl": 1e-6, "episodes": 160})
    log, stopped = run(
        tmp_path / "run", policy_folder, reward_folder, task_config, ppo, checkpoints=(0.1, 0.9)
    )
    assert stopped == {"failed": "", "stopped_early": True}
    assert len(log) < 10
    assert log[-1]["objective/kl"] > 1e-6
    points = json.loads((tmp_path / "run" / "checkpoints.json").read_text())
    assert points == {"checkpoint-1": 0.1, "final": 1.0}
    assert not (tmp_path / "run" / "checkpoint-9").exists()


def test_a_run_that_diverges_keeps_its_last_finite_weights_and_says_so(
    tmp_path: Path, policy_folder: Path, reward_folder: Path, task_config: TaskConfig
):
    wild = STEADY.model_copy(update={"learning_rate": 1e30})
    ppo = SMALL.model_copy(update={"optimizer": wild})
    _, stopped = run(tmp_path / "run", policy_folder, reward_folder, task_config, ppo)
    assert "not finite" in stopped["failed"]
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert torch.isfinite(weights(final)).all()


def test_ppo_learns_a_reward_that_is_easy_to_earn(
    tmp_path: Path,
    policy_folder: Path,
    task_config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
):
    """The reward model likes a last token that is EOS: 1 for it, less for most others."""
    reward = tmp_path / "reward"
    model = new_scalar_model(policy_folder, seed=0)
    with torch.no_grad():
        for layer in model.model.layers:  # no attention, no MLP: the score of a token is its own
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        eos = model.model.norm(model.model.embed_tokens.weight[special_ids(tokenizer).eos])
        mean = model.model.norm(model.model.embed_tokens.weight).mean(0)
        model.score.weight[0] = (eos - mean) / (eos - mean).pow(2).sum()
    save(model, tokenizer, reward)
    save_normalisation(reward, offset=0.0, scale=0.5)
    ppo = PPOConfig(
        episodes=640,
        rollout_size=64,
        minibatch_size=32,
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_share=0.0),
        value_learning_rate=3e-3,
        missing_eos_penalty=0.0,
        max_approx_kl=1.0,
    )
    log, _ = run(tmp_path / "run", policy_folder, reward, task_config, ppo, kl_coef=0.02)
    first, last = log[0], log[-1]
    assert last["objective/scores"] > first["objective/scores"] + 0.5
    assert last["ppo/missing_eos"] < first["ppo/missing_eos"] / 2
    assert last["objective/kl"] > 0.1


# The engine that sampled


def test_the_engines_log_probabilities_are_compared_token_by_token(
    actors: Actors, rollout, completions: Completions
):
    """The engine is ours here: no difference. Where it is off by a number, that number."""
    found, _ = rollout
    same, numbers = compare_engine(found, completions.logprobs, cap=None)
    assert same is found
    assert numbers["generation/logprob_difference_max"] < 1e-4
    off = [[x - 0.5 for x in row] for row in completions.logprobs]
    off[0][0] += 1.0
    weighed, numbers = compare_engine(found, off, cap=1.2)
    assert numbers["generation/logprob_difference"] == pytest.approx(0.5, abs=1e-4)
    assert numbers["generation/logprob_difference_max"] == pytest.approx(0.5, abs=1e-4)
    mask = found.sequences.mask.clone()
    close(weighed.weights[0, 0], math.exp(-0.5), 1e-4)  # the policy finds it less likely
    mask[0, 0] = False
    close(weighed.weights[mask], torch.full((int(mask.sum()),), 1.2), 1e-4)  # exp(0.5), capped


def test_a_run_that_was_paused_ends_as_one_that_was_not(
    policy_folder: Path, reward_folder: Path, task_config: TaskConfig, tmp_path: Path
):
    """Weights, log and cost, to the bit; seconds and memory aside."""
    ppo = SMALL.model_copy(update={"episodes": 64, "kl_target": 0.5})
    drawing = Drawing(SAMPLING)
    inputs = Start(policy_folder), reward_folder, task_config, ppo, 0.1, drawing, (0.25,)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    train_ppo(whole, *inputs)
    sync, calls = HFEngine.sync, []

    def lost_once(self: HFEngine) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise EngineLost("gone")
        return sync(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFEngine, "sync", lost_once)
        with pytest.raises(EngineLost, match="PPO, update 3 of 4: gone"):
            train_ppo(broken, *inputs)
        assert [row["step"] for row in read_log(broken)] == [1, 2]
        train_ppo(broken, *inputs)
    assert len(calls) == 3 + 2
    shutil.rmtree(broken / SAVES)
    ends, others = digest(whole), digest(broken)
    assert {n for n in {*ends, *others} if ends.get(n) != others.get(n)} == {"cost.json"}
    costs = [json.loads((folder / "cost.json").read_text()) for folder in (whole, broken)]
    for key in ("generated_tokens", "train_tokens", "flops"):
        assert costs[0][key] == costs[1][key]
    assert costs[1]["phases"].keys() == costs[0]["phases"].keys()
