"""`klash speed ppo`: a turn of either side is one whole update, and both do the same work."""

import subprocess
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.speed import ppo as speed
from benchmarks.speed.ppo import STEADY, Inputs, Update, compare_updates, install_trl, our_updates
from benchmarks.speed.sides import Round, Turns, Worker
from rlhf.ppo import PPOConfig
from shared.config import InputError
from shared.generation.engine import Sampling
from shared.generation.hf import HFEngine
from shared.models.cost import At, forward_flops
from shared.models.load import load_policy, load_scalar_model, special_ids
from shared.tasks.registry import TaskConfig, make_task

EPOCHS, EPISODES, MINIBATCH = 2, 32, 8
UPDATE = Update(
    "tiny",
    "32 x 10",
    PPOConfig(rollout_size=EPISODES, epochs=EPOCHS, minibatch_size=MINIBATCH, **STEADY),
    Sampling(max_new_tokens=10),
)


@pytest.fixture(scope="module")
def inputs(
    policy_folder: Path,
    reward_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    task_config: TaskConfig,
) -> Inputs:
    """Prompts that begin differently: in any minibatch all of their tokens are computed."""
    texts = make_task(task_config).prompts("ppo", EPISODES, 0)
    prompts = [[5 + row, *tokenizer(text).input_ids] for row, text in enumerate(texts)]
    return Inputs(policy_folder, reward_folder, prompts)


@pytest.mark.parametrize("trunk", [False, True])
@pytest.mark.parametrize("reuse", [False, True])
def test_the_passes_of_an_update_are_those_that_its_flops_count(
    inputs: Inputs, trunk: bool, reuse: bool
):
    form = {"shared_trunk": trunk, "reuse_logprobs": reuse}
    update = UPDATE._replace(ppo=UPDATE.ppo.model_copy(update=form))
    done = our_updates(update, inputs)()
    policy, value = load_policy(inputs.policy), load_scalar_model(inputs.reward)
    drawn = HFEngine(policy, special_ids_of(inputs)).generate(inputs.prompts, update.sampling)
    lengths = [len(p) + len(c) for p, c in zip(inputs.prompts, drawn.ids, strict=True)]
    sampled = done.tokens
    assert sampled == sum(map(len, drawn.ids))
    read = [n - 1 for n in lengths]  # what a last token would predict, no one asks
    whole, needed = sum(lengths), sum(read)
    sampling = forward_flops(policy, lengths, At(whole, whole, sampled))
    of_policy = forward_flops(policy, read, At(needed, sampled, sampled))
    of_value = forward_flops(value, read, At(needed, sampled, 0))
    trunk_alone = forward_flops(policy, read, At(needed, sampled, 0))
    scores = forward_flops(value, lengths, At(whole, EPISODES, 0))
    each = 3 * EPOCHS
    expected = sampling + scores + (1 + each) * of_policy  # the reference's pass, and epochs
    if not trunk:
        expected += (1 + each) * of_value + (0 if reuse else of_policy)
        assert update.passes == 3 + each + 1 + each + (not reuse)
    else:
        expected += trunk_alone if reuse else of_policy
        assert update.passes == 3 + each + 1
    assert done.flops == pytest.approx(expected, rel=2e-3)  # a value head is a row of 32
    assert (done.units, done.seconds > 0) == (EPISODES, True)


def special_ids_of(inputs: Inputs):
    return special_ids(speed.load_tokenizer(inputs.policy))


def test_the_same_work_comes_with_other_samples_each_round(inputs: Inputs):
    work = our_updates(UPDATE, inputs)
    assert len({work().tokens for _ in range(4)}) > 1


def test_trl_is_installed_once_and_a_failure_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commands: list[list[str]] = []

    def fails(command: list[str]) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(InputError, match=r"pip install .*--target \S*/there trl==1.12.0"):
        install_trl(tmp_path / "there")
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "there").mkdir()
    assert install_trl(tmp_path / "there") == tmp_path / "there"
    assert len(commands) == 1


# With TRL 1.12.0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_trl(tmp_path_factory.mktemp("library") / "trl")


def steps_of_trl(turns: Turns, update: Update, inputs: Inputs, library: Path) -> None:
    """Its rounds, with the optimiser's steps for units."""
    steps, make, send = [], speed.trl_trainer, turns.send

    def watched(*given):
        trainer = make(*given)
        trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
        return trainer

    def send_steps(result: Round) -> None:
        send(result._replace(units=len(steps)))
        steps.clear()

    speed.trl_trainer, turns.send = watched, send_steps
    speed.trl_updates(turns, update, inputs, library)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trl_steps_after_every_minibatch_of_a_turn_as_we_do(inputs: Inputs, library: Path):
    worker = Worker(steps_of_trl, UPDATE, inputs, library, threads=1, loops=True)
    for _ in range(2):
        worker()
    worker.end()
    assert [done.units for done in worker.rounds] == [EPOCHS * EPISODES // MINIBATCH] * 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_comparison_with_trl_is_of_equal_work(inputs: Inputs, library: Path):
    row = compare_updates(UPDATE, inputs, library, rounds=3)
    assert len(row.ratio.per_seed) == 3
    assert row.ratio.mean > 0
    assert row.memory_ratio is not None and row.memory_ratio > 0
    assert row.loss_difference is None
    assert row.setting["passes"] == 1 + 3 + EPOCHS * 3 * 2  # sampled, scored, two models stepped
    ours, theirs = row.setting["completion_tokens"], row.setting["peer_completion_tokens"]
    assert 1 < ours < 10
    assert theirs == pytest.approx(ours, abs=1.5)  # 96 completions of 1 to 10 tokens each
    if not torch.cuda.is_available():
        assert row.mfu is not None and 0 < row.mfu < 1
