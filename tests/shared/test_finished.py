"""The files of a trained stage: a log that is there while it trains, checkpoints, the end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import weights
from transformers import PreTrainedTokenizerBase

from dpo.train import DirectConfig, DirectData, Objective, train_direct
from rlhf.ppo import PPOConfig, train_ppo
from shared.generation.engine import EngineLost, Sampling
from shared.generation.hf import HFEngine
from shared.generation.start import Drawing
from shared.models.cost import Meter
from shared.models.load import Start, load_policy
from shared.stages import read_json
from shared.tasks.registry import TaskConfig
from shared.training.finished import LOG, Training, TrainingLog, read_log
from shared.training.fit import OptimizerConfig, Trainee, prepare

STEADY = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_share=0.0)


# The log


def test_a_line_is_on_disk_as_soon_as_its_step_is_done(tmp_path: Path):
    log = TrainingLog(tmp_path, steps=3)
    assert read_log(tmp_path) == []
    for step in (1, 2):
        log.add({"loss": 1.0 / step})
        assert len(log) == step
        text = (tmp_path / LOG).read_text()
        assert text.endswith("\n")
        assert json.loads(text.splitlines()[-1]) == {"step": step, "of": 3, "loss": 1.0 / step}
    assert read_log(tmp_path) == log.rows


def test_a_log_goes_on_only_where_it_is_told_to(tmp_path: Path):
    TrainingLog(tmp_path, steps=3).add({"loss": 1.0})
    again = TrainingLog(tmp_path, steps=3, kept=1)
    again.add({"loss": 0.5})
    assert [(row["step"], row["loss"]) for row in read_log(tmp_path)] == [(1, 1.0), (2, 0.5)]
    anew = TrainingLog(tmp_path, steps=2)
    assert read_log(tmp_path) == anew.rows == []
    anew.add({"loss": 0.25})
    assert read_log(tmp_path) == [{"step": 1, "of": 2, "loss": 0.25}]


def test_a_line_that_was_cut_off_is_not_read(tmp_path: Path):
    TrainingLog(tmp_path, steps=3).add({"loss": 1.0})
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 2, "of": 3, "lo')
    assert [row["step"] for row in read_log(tmp_path)] == [1]


def test_a_number_that_is_none_is_refused_and_leaves_no_line(tmp_path: Path):
    log = TrainingLog(tmp_path, steps=3)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.add({"loss": float("nan")})
    assert read_log(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path

from dpo.train import DirectConfig, DirectData, Objective, train_direct
from shared.models.load import Start

folder, policy, preferences, reference = map(Path, sys.argv[1:])
step, steps = Objective.step, []

def killed_in_its_third(self, trainee, numbers):
    steps.append(numbers)
    if len(steps) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, trainee, numbers)

Objective.step = killed_in_its_third
data, direct = DirectData(preferences, reference), DirectConfig(epochs=1, batch_size=4)
train_direct(folder, Start(policy), data, "dpo", {"beta": 0.1}, direct, ())
"""


def test_what_was_logged_before_a_kill_is_there_after_it(
    tmp_path: Path, policy_folder: Path, preferences_folder: Path, reference_folder: Path
):
    root = Path(__file__).parents[2]
    inputs = [str(p) for p in (tmp_path, policy_folder, preferences_folder, reference_folder)]
    command = [sys.executable, "-c", KILLED, *inputs]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == -signal.SIGKILL
    assert [(row["step"], row["of"]) for row in read_log(tmp_path)] == [(1, 6), (2, 6)]
    assert [p.name for p in tmp_path.iterdir()] == [LOG]


@pytest.mark.parametrize("bad", [1, 3])
def test_a_training_that_diverges_keeps_the_lines_of_its_steps(
    bad: int,
    tmp_path: Path,
    policy_folder: Path,
    preferences_folder: Path,
    reference_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Also where there is none: then no file is there, and the log is read as empty."""
    step, steps = Objective.step, []

    def spoilt(self: Objective, trainee: Trainee, numbers: list[int]) -> dict[str, float]:
        steps.append(numbers)
        if len(steps) == bad:
            self.ref_logps = self.ref_logps * float("nan")
        return step(self, trainee, numbers)

    monkeypatch.setattr(Objective, "step", spoilt)
    data = DirectData(preferences_folder, reference_folder)
    direct = DirectConfig(epochs=1, batch_size=4, optimizer=STEADY)
    train_direct(tmp_path, Start(policy_folder), data, "dpo", {"beta": 0.1}, direct, (0.1, 0.9))
    assert "not finite" in read_json(tmp_path / "stopped.json")["failed"]
    assert torch.isfinite(weights(load_policy(tmp_path / "final"))).all()
    assert [row["step"] for row in read_log(tmp_path)] == [*range(1, bad)]
    early = {"checkpoint-1": 0.1} if bad == 3 else {}
    assert read_json(tmp_path / "checkpoints.json") == {**early, "final": 1.0}
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == early.keys()


# Checkpoints and the end


def test_checkpoints_and_the_end_are_plain_folders(
    tmp_path: Path, policy_folder: Path, tokenizer: PreTrainedTokenizerBase
):
    """On the way as at the end; each has the weights of its moment."""
    model = load_policy(policy_folder)
    trainee = prepare(model, STEADY, 3)
    training = Training(tmp_path, trainee, tokenizer, TrainingLog(tmp_path, 3), {2: 0.5, 9: 0.9})
    for step in (1, 2, 3):
        with torch.no_grad():
            model.get_input_embeddings().weight.fill_(float(step))
        training.step_done({"loss": 1.0})
        assert (tmp_path / "checkpoint-2").is_dir() == (step >= 2)
    assert not (tmp_path / "final").exists()
    training.finish(Meter(), labels_used=7, failure="why", stopped_early=True)
    for name, value in (("checkpoint-2", 2.0), ("final", 3.0)):
        saved = load_policy(tmp_path / name)
        assert saved.get_input_embeddings().weight.unique().tolist() == [value]
    assert read_json(tmp_path / "checkpoints.json") == {"checkpoint-2": 0.5, "final": 1.0}
    assert read_json(tmp_path / "stopped.json") == {"failed": "why", "stopped_early": True}
    cost = read_json(tmp_path / "cost.json")
    assert cost["labels_used"] == 7
    assert cost.keys() > {"wall_s", "flops", "train_tokens", "peak_memory_bytes", "phases"}


def test_ppos_last_checkpoint_is_its_end(
    tmp_path: Path, policy_folder: Path, reward_folder: Path, task_config: TaskConfig
):
    """File by file: a checkpoint is written as the end is."""
    ppo = PPOConfig(episodes=32, rollout_size=16, minibatch_size=8, optimizer=STEADY)
    drawing = Drawing(Sampling(max_new_tokens=10))
    inputs = reward_folder, task_config, ppo, 0.1, drawing, (0.5, 1.0)
    train_ppo(tmp_path, Start(policy_folder), *inputs)
    points = read_json(tmp_path / "checkpoints.json")
    assert points == {"checkpoint-1": 0.5, "checkpoint-2": 1.0, "final": 1.0}
    ends = [
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
        for name in ("checkpoint-2", "final", "checkpoint-1")
    ]
    assert ends[0] == ends[1]
    assert ends[0].keys() == ends[2].keys()
    assert ends[0]["model.safetensors"] != ends[2]["model.safetensors"]


def test_a_run_that_was_put_aside_goes_on_behind_its_log_and_one_that_was_not_begins_anew(
    tmp_path: Path, policy_folder: Path, reward_folder: Path, task_config: TaskConfig
):
    ppo = PPOConfig(episodes=48, rollout_size=16, minibatch_size=8, optimizer=STEADY)
    drawing = Drawing(Sampling(max_new_tokens=10))
    inputs = Start(policy_folder), reward_folder, task_config, ppo, 0.1, drawing, ()
    sync, calls = HFEngine.sync, []

    def lost_once(self: HFEngine) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise EngineLost("gone")
        return sync(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFEngine, "sync", lost_once)
        with pytest.raises(EngineLost, match="update 3 of 3"):
            train_ppo(tmp_path, *inputs)
    first = read_log(tmp_path)
    assert [(row["step"], row["of"]) for row in first] == [(1, 3), (2, 3)]
    train_ppo(tmp_path, *inputs)
    whole = read_log(tmp_path)
    assert [(row["step"], row["episodes"]) for row in whole] == [(1, 16), (2, 32), (3, 48)]
    assert whole[:2] == first
    train_ppo(tmp_path, *inputs)  # nothing is put aside any more
    assert read_log(tmp_path) == whole
