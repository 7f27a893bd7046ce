"""A real vLLM server in a process of its own, as `klash serve` starts it; and its end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch
from checks import weights
from transformers import PreTrainedTokenizerBase

from rlhf.ppo import PPOConfig, train_ppo
from shared.config import InputError
from shared.generation.engine import EngineLost, Sampling, StaleEngine
from shared.generation.server import ServerEngine
from shared.generation.start import Drawing, GenerationConfig, make_engine
from shared.generation.sync import DRAWN, PROBES
from shared.models.load import (
    ModelConfig,
    Start,
    load_policy,
    load_tokenizer,
    new_policy,
    special_ids,
)
from shared.models.logprobs import token_logprobs
from shared.models.sequences import collate
from shared.stages import Stages, read_json
from shared.tasks.registry import TaskConfig, make_task
from shared.training.finished import read_log
from shared.training.fit import OptimizerConfig

pytestmark = pytest.mark.vllm
SAMPLING = Sampling(max_new_tokens=10)
PPO = PPOConfig(
    episodes=64,
    rollout_size=16,
    minibatch_size=8,
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_share=0.0),
)


class Server:
    """`klash serve` on a free port."""

    def __init__(self, folder: Path, log: Path):
        self.folder, self.log = folder, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        klash = [sys.executable, "-c", "from benchmarks.cli import main; main()"]
        command = [*klash, "serve", str(self.folder)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        for _ in range(600):
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.5)
        pytest.fail(self.log.read_text()[-3000:])

    def kill(self) -> None:
        """At once, with the process that holds its engine."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def server(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(policy_folder, tmp_path_factory.mktemp("server") / "log")
    found.start()
    yield found
    found.kill()


def config(server: Server) -> GenerationConfig:
    return GenerationConfig(engine="vllm", server=server.url)


@pytest.fixture
def engine(server: Server, policy_folder: Path) -> ServerEngine:
    model, ids = load_policy(policy_folder).eval(), special_ids(load_tokenizer(policy_folder))
    engine = make_engine(config(server), model, ids, policy_folder)
    assert isinstance(engine, ServerEngine)
    return engine


@pytest.fixture(scope="module")
def prompts(task_config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer(text).input_ids for text in make_task(task_config).prompts("test", 64, 0)]


def moved(engine: ServerEngine) -> None:
    """Weights as after some training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in engine.model.parameters():
            weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=generator)


def test_its_samples_are_the_policys_before_and_after_a_sync(
    engine: ServerEngine, prompts: list[list[int]]
):
    for _ in range(2):
        drawn = engine.generate(prompts, SAMPLING)
        batch = collate(prompts, drawn.ids, engine.ids.pad)
        with torch.no_grad():
            ours = token_logprobs(engine.model, batch)[batch.mask]
        theirs = torch.tensor([x for row in drawn.logprobs for x in row])
        assert (ours - theirs).abs().max() <= 1e-4
        for ids, truncated in zip(drawn.ids, drawn.truncated, strict=True):
            assert truncated == (ids[-1] != engine.ids.eos)
        assert engine.generate(prompts, SAMPLING) == drawn
        moved(engine)
        before = weights(engine.model).clone()
        assert engine.sync() <= 1e-4
        assert torch.equal(weights(engine.model), before)


def test_a_skipped_sync_is_caught(engine: ServerEngine, monkeypatch: pytest.MonkeyPatch):
    moved(engine)
    with monkeypatch.context() as patch:
        patch.setattr(ServerEngine, "_send_file", lambda self: None)
        with pytest.raises(StaleEngine):
            engine.sync()
    assert engine.sync() <= 1e-4


def test_a_model_of_another_shape_is_refused_by_name(
    server: Server, tokenizer: PreTrainedTokenizerBase, policy_folder: Path
):
    model = new_policy(ModelConfig(hidden_size=64, layers=2), tokenizer, seed=0)
    with pytest.raises(InputError, match=r"hidden_size is 32 there and 64 here"):
        make_engine(config(server), model, special_ids(tokenizer), policy_folder)


def test_a_prompt_that_leaves_no_room_is_named(engine: ServerEngine):
    with pytest.raises(InputError, match=r"prompt 1 has 250 tokens"):
        engine.generate([[5], [5] * 250], SAMPLING)


def test_what_the_server_refuses_is_told_in_its_words(engine: ServerEngine):
    with pytest.raises(InputError, match=r"completions: 400: "):
        engine.generate([[10_000_000]], SAMPLING)


def test_without_a_server_the_address_is_named_and_the_command_to_start_one(policy_folder: Path):
    away = GenerationConfig(engine="vllm", server="http://127.0.0.1:9")
    model, ids = load_policy(policy_folder), special_ids(load_tokenizer(policy_folder))
    with pytest.raises(EngineLost, match=r"http://127.0.0.1:9 does not answer.*klash serve"):
        make_engine(away, model, ids, policy_folder)


def test_a_run_that_loses_its_server_goes_on_where_it_stopped(
    server: Server,
    policy_folder: Path,
    reward_folder: Path,
    task_config: TaskConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Killed while it samples for the third of four updates; the end is that of a whole run."""
    inputs = {
        "start": Start(policy_folder), "reward_model": reward_folder, "task": task_config,
        "ppo": PPO, "kl_coef": 0.1, "drawing": Drawing(SAMPLING, config(server)),
        "checkpoints": (0.25,),
    }  # fmt: skip
    whole = Stages(tmp_path / "whole", lambda *_: None).run("ppo", train_ppo, **inputs)
    generate, calls = ServerEngine.generate, []

    def dies(self: ServerEngine, prompts: list[list[int]], sampling: Sampling):
        calls.append(len(prompts))
        if calls.count(PPO.rollout_size) == 3:
            server.kill()
        return generate(self, prompts, sampling)

    stages = Stages(tmp_path / "broken", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(ServerEngine, "generate", dies)
        with pytest.raises(EngineLost, match=r"PPO, update 3 of 4: .* does not answer"):
            stages.run("ppo", train_ppo, **inputs)
    with pytest.raises(EngineLost):  # still away: nothing is lost by asking
        stages.run("ppo", train_ppo, **inputs)
    server.start()
    calls.clear()
    resumed = stages.run("ppo", train_ppo, **inputs)
    logs = [read_log(folder) for folder in (whole, resumed)]
    assert len(logs[0]) == len(logs[1]) == 4
    assert logs[1][:2] == logs[0][:2]
    for row, other in zip(*logs, strict=True):
        assert row["objective/kl"] == pytest.approx(other["objective/kl"], rel=1e-3, abs=1e-4)
        assert row["objective/scores"] == pytest.approx(other["objective/scores"], rel=1e-3)
    assert sorted(p.name for p in resumed.iterdir()) == sorted(p.name for p in whole.iterdir())
    ends = [weights(load_policy(folder / "final")) for folder in (whole, resumed)]
    assert (ends[0] - ends[1]).abs().max() < 1e-3
    costs = [read_json(folder / "cost.json") for folder in (whole, resumed)]
    again = costs[1]["generated_tokens"] - costs[0]["generated_tokens"]
    assert 0 < again <= PROBES * DRAWN  # the third update's sync was probed twice
