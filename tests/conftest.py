"""What many tests stand on: a tiny policy with random weights, a reward model, a few pairs.

The weights are random but not small: attention matters, and a completion ends by itself about one
time in two, so that a wrong mask, position or EOS shows.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checks import Klash
from transformers import PreTrainedTokenizerBase
from works import DRAWING, Inputs

from benchmarks.cli import main
from benchmarks.pipeline.places import quiet_libraries
from dpo.reference import score_mismatched, score_reference
from shared.data.preferences import PreferenceConfig, make_preferences
from shared.data.samples import sample_reference
from shared.generation.engine import Sampling
from shared.generation.start import Drawing
from shared.models import ops
from shared.models.load import ModelConfig, new_policy, new_scalar_model, save, special_ids
from shared.models.reward_files import save_normalisation
from shared.tasks.registry import TaskConfig, make_task


@pytest.fixture(scope="session", autouse=True)
def quiet_and_single_threaded() -> None:
    torch.set_num_threads(1)
    quiet_libraries()


@pytest.fixture(autouse=True)
def single_threaded() -> None:
    """Whatever the tests before did: commands have threads of their own."""
    torch.set_num_threads(1)


@pytest.fixture
def without_c() -> Iterator[None]:
    with ops.using(ops.Shortcuts(c=False)):
        yield


@pytest.fixture(params=["PyTorch", "C", "C and its products"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A decoder's operations in PyTorch, in C, and in C with the products of any processor."""
    if request.param == "PyTorch":
        with ops.using(ops.Shortcuts(c=False)):
            yield
        return
    native = pytest.importorskip("shared.cpu.native")
    if native.library() is None:
        pytest.skip("no C compiler")
    faster = request.param == "C and its products"
    monkeypatch.setattr("shared.cpu.kernels.products_are_faster", lambda: faster)
    yield


@pytest.fixture(scope="session")
def task_config() -> TaskConfig:
    return TaskConfig()


@pytest.fixture(scope="session")
def tokenizer(task_config: TaskConfig) -> PreTrainedTokenizerBase:
    return make_task(task_config).tokenizer()


@pytest.fixture(scope="session")
def policy_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """A policy as `shared.models.load.save` writes it. Do not write here."""
    folder = tmp_path_factory.mktemp("policy")
    config = ModelConfig(hidden_size=32, layers=2, intermediate_size=64)
    model = new_policy(config, tokenizer, seed=0)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight  # tied to the output layer
        for weights in model.parameters():
            if weights.ndim == 2:
                weights *= 10 if weights is embeddings else 4
        embeddings[:, 0] += 2.0  # a direction that every state shares: along it lies EOS
        ids = special_ids(tokenizer)
        embeddings[ids.eos, 0] += 0.85
        embeddings[ids.pad, 0] -= 2.0  # never said: plain transformers reads a score before it
    save(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def reward_folder(
    tmp_path_factory: pytest.TempPathFactory,
    policy_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """A reward model with a normalisation that changes every score. Do not write here."""
    folder = tmp_path_factory.mktemp("reward")
    save(new_scalar_model(policy_folder, seed=1), tokenizer, folder)
    save_normalisation(folder, offset=0.25, scale=2.0)
    return folder


@pytest.fixture(scope="session")
def preferences_folder(
    tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, task_config: TaskConfig
) -> Path:
    """22 training pairs, sampled from the policy and labelled by the task. Do not write here."""
    folder = tmp_path_factory.mktemp("preferences")
    data = PreferenceConfig(pairs=22, held_out_pairs=2)
    drawing = Drawing(Sampling(max_new_tokens=10))
    make_preferences(folder, task_config, policy_folder, data, drawing, seed=0)
    return folder


@pytest.fixture(scope="session")
def reference_folder(
    tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, preferences_folder: Path
) -> Path:
    """Reference log-probabilities of those pairs and their mismatches. Do not write here."""
    folder = tmp_path_factory.mktemp("reference")
    score_reference(folder, policy_folder, preferences_folder)
    score_mismatched(folder, policy_folder, preferences_folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def inputs(
    tmp_path_factory: pytest.TempPathFactory,
    policy_folder: Path,
    reward_folder: Path,
    preferences_folder: Path,
    reference_folder: Path,
    task_config: TaskConfig,
) -> Inputs:
    """What every stage of `works` reads. Do not write here."""
    samples = tmp_path_factory.mktemp("samples")
    sample_reference(samples, task_config, policy_folder, "validation", 4, 3, DRAWING, 0)
    return Inputs(policy_folder, reward_folder, preferences_folder, reference_folder, samples)


@pytest.fixture
def klash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Klash:
    """Runs `klash <words>` in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["klash", *map(str, words)])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return (code if isinstance(code, int) else 1 if code else 0), out, err

    return run
