"""What must hold whatever the method: the field's known traps that no module's own tests meet."""

from pathlib import Path

import pytest
import torch
from checks import close, weights
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from benchmarks.evaluation.evaluate import Prompts, evaluate
from benchmarks.pipeline.arms import Pipeline
from benchmarks.pipeline.loading import load_experiment
from benchmarks.pipeline.plan import Plan
from dpo.losses import LogRatios, rdpo_loss
from dpo.train import DirectConfig, DirectData, Objective
from rlhf.ppo import PPOConfig, prompt_stream, train_ppo, update_models
from rlhf.rollout import Actors, make_actors, rollout_numbers, score_rollout
from shared.data.pairs import read_pairs
from shared.generation.engine import Sampling
from shared.generation.hf import HFEngine
from shared.generation.start import Drawing
from shared.models.cost import Meter
from shared.models.load import Start, load_policy, load_scalar_model, save, special_ids
from shared.models.logprobs import sequence_logps
from shared.models.sequences import collate
from shared.seeds import seed_of
from shared.stages import read_jsonl
from shared.tasks.exact import Exact, ExactConfig
from shared.tasks.registry import TaskConfig, make_task
from shared.tasks.task import encode_corpus
from shared.training.finished import read_log
from shared.training.fit import OptimizerConfig, Trainee
from shared.training.sft import masked

PAD = 0
SAMPLING = Sampling(max_new_tokens=10)
STEADY = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_share=0.0)
PPO = PPOConfig(
    episodes=16,
    rollout_size=16,
    epochs=1,
    minibatch_size=16,
    optimizer=STEADY,
    value_learning_rate=1e-2,
    gamma=0.9,
    lam=0.8,
    whiten_rewards=True,
    max_approx_kl=100.0,
)


# PPO


@pytest.fixture
def actors(policy_folder: Path, reward_folder: Path) -> Actors:
    drawing = Drawing(SAMPLING)
    return make_actors(Start(policy_folder), reward_folder, PPO.optimizers(1), drawing, Meter())


@pytest.fixture
def prompts(task_config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return next(prompt_stream(tokenizer, task_config, PPO, 0))


def test_what_is_read_of_a_rollout_does_not_depend_on_the_other_rows(
    actors: Actors, prompts: list[list[int]]
):
    """So no padding is counted: KL, scores, length and the entropy of a token, row by row."""
    with torch.no_grad():  # away from the reference
        for parameter in actors.policy.model.parameters():
            parameter += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
    completions = actors.engine.generate(prompts, SAMPLING).ids
    lengths = [len(c) for c in completions]
    assert len(set(lengths)) > 3
    together, scores = score_rollout(actors, prompts, completions)
    whole = rollout_numbers(together, scores, torch.zeros(16))
    alone = []
    for prompt, completion in zip(prompts, completions, strict=True):
        rollout, score = score_rollout(actors, [prompt], [completion])
        alone.append(rollout_numbers(rollout, score, torch.zeros(1)))
    for name in ("objective/kl", "objective/k3", "objective/scores", "ppo/completion_length"):
        expected = sum(row[name] for row in alone) / len(alone)
        assert whole[name] == pytest.approx(expected, abs=1e-4)
    assert abs(whole["objective/kl"]) > 0.01
    nats = sum(n * row["objective/entropy"] for n, row in zip(lengths, alone, strict=True))
    assert whole["objective/entropy"] == pytest.approx(nats / sum(lengths), rel=1e-5)


def test_reward_whitening_keeps_the_mean_reward(
    tmp_path: Path,
    policy_folder: Path,
    reward_folder: Path,
    task_config: TaskConfig,
    actors: Actors,
    prompts: list[list[int]],
):
    """Read off the first update's value loss, half a mean squared advantage; its KL is 0."""
    inputs = reward_folder, task_config, PPO, 0.1, Drawing(SAMPLING), ()
    train_ppo(tmp_path, Start(policy_folder), *inputs)
    drawn = actors.engine.generate(
        prompts, SAMPLING.model_copy(update={"seed": seed_of(0, "rollout", 1)})
    )
    rollout, scores = score_rollout(actors, prompts, drawn.ids)
    rows = [[0.0] * (len(c) - 1) for c in drawn.ids]
    for row, score, cut in zip(rows, scores.tolist(), drawn.truncated, strict=True):
        row.append(score - cut)
    every = torch.tensor([r for row in rows for r in row], dtype=torch.float64)
    centre, scale = every.mean().item(), every.std(correction=0).item()
    assert abs(centre) > 0.02
    squares = []
    for row, values in zip(rows, rollout.values.tolist(), strict=True):
        after, following = 0.0, 0.0
        for t in reversed(range(len(row))):
            reward = (row[t] - centre) / scale + centre
            after = reward + 0.9 * following - values[t] + 0.9 * 0.8 * after
            following = values[t]
            squares.append(after**2)
    (log,) = read_log(tmp_path)
    assert log["loss/value_avg"] == pytest.approx(sum(squares) / len(squares) / 2, rel=1e-4)


def test_the_next_rollout_is_drawn_from_the_weights_that_the_update_left(
    tmp_path: Path,
    actors: Actors,
    prompts: list[list[int]],
    policy_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
):
    """A sampler left behind would still show a ratio of 1: the trainer reads its own weights."""
    before = actors.engine.generate(prompts, SAMPLING)
    rollout, _ = score_rollout(actors, prompts, before.ids)
    noise = torch.randn(rollout.values.shape, generator=torch.Generator().manual_seed(0))
    update_models(actors, rollout._replace(advantages=noise, returns=rollout.values), PPO, 0)
    save(actors.policy.model, tokenizer, tmp_path)
    after = actors.engine.generate(prompts, SAMPLING)
    fresh = HFEngine(load_policy(tmp_path), special_ids(tokenizer)).generate(prompts, SAMPLING)
    assert after == fresh
    assert after != before


# Sampling and precision


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p", "repetition_penalty"])
def test_no_setting_can_make_the_sampled_distribution_another_than_the_scored_one(name: str):
    with pytest.raises(ValidationError, match=name):
        Sampling(**{name: 0.9})


def test_evaluation_samples_at_temperature_1_whatever_training_samples_at(
    tmp_path: Path, policy_folder: Path, task_config: TaskConfig
):
    found = []
    for temperature in (1.0, 0.3):
        folder = tmp_path / str(temperature)
        folder.mkdir()
        prompts = Prompts(task_config, "test", count=4, samples=2, seed=0)
        drawing = Drawing(SAMPLING).at(temperature=temperature, seed=0)
        evaluate(folder, policy_folder, ".", policy_folder, None, None, prompts, drawing)
        found.append(read_jsonl(folder / "rows.jsonl"))
    assert found[0] == found[1]


def test_weights_saved_in_half_precision_are_read_and_trained_in_float32(
    tmp_path: Path, policy_folder: Path, reward_folder: Path, tokenizer: PreTrainedTokenizerBase
):
    """Ratios of bfloat16 log-probabilities are noise; 7 bits are left to see the rounding by."""
    for folder, load in ((policy_folder, load_policy), (reward_folder, load_scalar_model)):
        whole = load(folder)
        half = tmp_path / load.__name__
        save(load(folder).to(torch.bfloat16), tokenizer, half)
        read = load(half)
        assert {p.dtype for p in read.parameters()} == {torch.float32}
        assert torch.equal(weights(read), weights(whole).bfloat16().float())


# Tokens


def corpora() -> list[tuple[PreTrainedTokenizerBase, list[tuple[str, str]]]]:
    tasks = make_task(TaskConfig()), Exact(ExactConfig())
    return [(task.tokenizer(), task.corpus(200, seed=0)) for task in tasks]


@pytest.mark.parametrize(("tokenizer", "corpus"), corpora(), ids=["reviews", "exact"])
def test_sft_sees_the_prompts_that_are_sampled_from_and_one_eos_at_the_end(
    tokenizer: PreTrainedTokenizerBase, corpus: list[tuple[str, str]]
):
    """No token merges over the boundary, no BOS is added, and the loss looks at EOS too."""
    eos = special_ids(tokenizer).eos
    for prompt, completion in corpus:
        (demonstration,) = encode_corpus(tokenizer, [(prompt, completion)])
        row, before = masked(demonstration), tokenizer(prompt).input_ids
        ids, mask = row["input_ids"], row["completion_mask"]
        assert ids[: len(before)] == before
        assert ids == [*tokenizer(f"{prompt} {completion}").input_ids, eos]
        assert eos not in ids[:-1]
        assert mask == [0] * len(before) + [1] * (len(ids) - len(before))


# Direct methods


def test_rdpo_falls_without_end_and_ever_at_the_same_pace():
    """Why its runs need an end: d loss / d h goes to -beta e / (1 - 2 e), not to 0."""
    beta, e = 0.3, 0.2
    h = torch.tensor([1e3, 1e4, 1e5], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.float64)
    loss = rdpo_loss(LogRatios(h, zero, zero + 1, zero + 1), beta=beta, label_smoothing=e)
    loss.sum().backward()
    close(h.grad, [-beta * e / (1 - 2 * e)] * 3)
    assert (loss < -90).all()
    assert loss[2] < 9 * loss[1] < 81 * loss[0]


@pytest.mark.parametrize("rows", [[3], [25], [3, 7, 11], [25, 30, 40]])
def test_a_kto_step_of_one_row_or_of_one_label_reads_the_baseline_of_another_prompt(
    rows: list[int], policy_folder: Path, preferences_folder: Path, reference_folder: Path
):
    """A row matched with itself would make the baseline its own log-ratio and the loss a half."""
    folders = DirectData(preferences_folder, reference_folder, reference_folder)
    data = Objective(folders, PAD, "kto", {"beta": 0.5}, DirectConfig().limit)
    model, ref = load_policy(policy_folder), load_policy(policy_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.3
    pairs = read_pairs(preferences_folder / "train.jsonl")
    prompts = [p.prompt_ids for p in pairs] * 2
    completions = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]

    @torch.no_grad()
    def ratio(prompt: int, completion: int) -> float:
        batch = collate([prompts[prompt]], [completions[completion]], PAD)
        return float(sequence_logps(model, batch) - sequence_logps(ref, batch))

    partner = data.mismatched.partner.tolist()
    assert all(prompts[i] != prompts[partner[i]] for i in rows)
    z = max(0.0, sum(ratio(i, partner[i]) for i in rows) / len(rows))
    sign = 1 if rows[0] < len(pairs) else -1
    terms = [torch.tensor(sign * 0.5 * (z - ratio(i, i))).sigmoid().item() for i in rows]
    assert max(abs(t - 0.5) for t in terms) > 0.02
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    log = data.step(Trainee(model, optimizer, scheduler, 1.0), rows)
    assert log["loss"] == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def addresses(*overrides: str) -> dict[str, str]:
    """Where the stages that all arms of seed 0 share would lie, by their labels; none is run."""
    experiment = load_experiment("reviews", list(overrides), quick=False)
    plan = Plan(Path("stages"), {})
    pipeline = Pipeline(experiment, plan)
    pipeline.prepare_seed(pipeline.prepare_common(), 0)
    return {stage.label: folder.name for folder, stage in plan.stages.items()}


REFERENCE = "reference log-probabilities, seed 0"
MISMATCHED = "mismatched completions, seed 0"


@pytest.mark.parametrize(
    "change",
    [
        ("--arms.dpo.settings", "[{ beta = 0.7 }]"),
        ("--arms.kto.settings", "[{ beta = 0.7, learning_rate = 0.1 }]"),
        ("--direct.optimizer.learning_rate", "0.1"),
        ("--direct.batch_size", "7"),
        ("--ppo.clip", "0.5"),
        ("--filtering.margin", "2.0"),
    ],
)
def test_what_arms_share_is_found_again_at_another_beta_rate_or_batch(change: tuple[str, str]):
    found = addresses(*change)
    assert found == addresses()
    assert {REFERENCE, MISMATCHED} <= found.keys()


@pytest.mark.parametrize(
    "change",
    [
        ("--sft.learning_rate", "0.1"),  # other weights
        ("--model.layers", "1"),
        ("--task_seed", "5"),
        ("--preferences.pairs", "77"),  # other rows
        ("--preferences.labels", "shuffled"),
        ("--sampling.max_new_tokens", "7"),  # cut elsewhere
        ("--sampling.temperature", "0.5"),
    ],
)
def test_reference_log_probabilities_are_scored_anew_for_other_weights_tokens_or_cuts(
    change: tuple[str, str],
):
    before, after = addresses(), addresses(*change)
    for label in (REFERENCE, MISMATCHED):
        assert before[label] != after[label]
