"""Two processes do what one does: losses, gradients, logs, weights, and each stage once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import TINY
from on_ranks import launch, one_stage, words
from safetensors.torch import load_file
from works import OTHERS, TRAINERS, Inputs, works

from shared.models import ranks
from shared.models.load import load_policy
from shared.stages import intact, read_json, read_jsonl
from shared.training.finished import read_log

SHARDED = {"ACCELERATE_USE_FSDP": "true"}  # as `accelerate launch` with fsdp2.yaml sets it
Results = Callable[[str], Path]
TOLERANCE = 1e-5


@pytest.mark.parametrize(("items", "processes"), [(5, 2), (2, 3), (1, 4), (6, 3)])
def test_each_item_counts_once(items: int, processes: int, monkeypatch: pytest.MonkeyPatch):
    """And every rank has one to make a pass of, if only to keep step with the others."""
    monkeypatch.setattr(ranks, "count", lambda: processes)
    counted = [0.0] * items
    for number in range(processes):
        monkeypatch.setattr(ranks, "number", lambda number=number: number)
        own, counts = ranks.part(range(items))
        assert own
        for item in own:
            counted[item] += counts
    assert counted == [1.0] * items


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({}, marks=pytest.mark.slow, id="replicated"),
        pytest.param(SHARDED, id="sharded"),
    ],
)
def both(
    request: pytest.FixtureRequest, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], Results]:
    """(folders of two ranks' stages by name, those of one process)."""
    store, alone = tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("alone")
    names = [*TRAINERS, *OTHERS]
    said = launch(words(store, names, inputs), **request.param)
    found = dict(line.split("\t") for line in said.splitlines() if "\t" in line)
    assert {path.name for path in store.iterdir()} == {Path(f).name for f in found.values()}

    def by_one(name: str) -> Path:
        folder = alone / name
        if not folder.exists():
            folder.mkdir()
            works(inputs)[name](folder)
        return folder

    return {name: Path(folder) for name, folder in found.items()}, by_one


def near(found: object, expected: object) -> None:
    """Equal, numbers to 1e-5 of their size; seconds and memory aside."""
    if isinstance(expected, dict):
        assert isinstance(found, dict)
        assert found.keys() == expected.keys()
        for key in expected:
            near(found[key], expected[key])
    elif isinstance(expected, list):
        assert isinstance(found, list)
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            near(*pair)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    else:
        assert found == expected


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TRAINERS)
def test_a_training_on_two_ranks_is_that_of_one(both: tuple[dict[str, Path], Results], name: str):
    """With batches that the ranks cannot halve, and passes that some make more of."""
    together, alone = both[0][name], both[1](name)
    assert intact(together)
    assert len(read_log(together)) > 1
    near(read_log(together), read_log(alone))
    weights = sorted(path.relative_to(alone) for path in alone.rglob("*.safetensors"))
    assert weights
    for path in weights:
        ours, theirs = load_file(together / path), load_file(alone / path)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, atol=TOLERANCE, rtol=TOLERANCE)
    files = {str(p.relative_to(alone)) for p in alone.rglob("*") if p.is_file()}
    found = {str(p.relative_to(together)) for p in together.rglob("*") if p.is_file()}
    assert found == files | {"manifest.json"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", OTHERS)
def test_rows_that_two_ranks_share_are_those_of_one(
    both: tuple[dict[str, Path], Results], name: str
):
    together, alone = both[0][name], both[1](name)
    for file in alone.rglob("*"):
        path = together / file.relative_to(alone)
        if file.suffix == ".jsonl":
            near(read_jsonl(path), read_jsonl(file))
        elif file.suffix == ".json" and file.name != "cost.json":
            near(read_json(path), read_json(file))
        elif file.suffix == ".safetensors":
            near({k: t.tolist() for k, t in load_file(path).items()},
                 {k: t.tolist() for k, t in load_file(file).items()})  # fmt: skip


@pytest.mark.timeout(300)
def test_what_two_ranks_cost_is_the_work_of_both(both: tuple[dict[str, Path], Results]):
    """At least what one process does: the pass that a rank makes so that both make as many."""
    for name in ("dpo", "ppo", "reward"):
        ours, theirs = (read_json(f / "cost.json") for f in (both[0][name], both[1](name)))
        assert theirs["flops"] * 0.99 <= ours["flops"] <= theirs["flops"] * 1.7
        assert ours["generated_tokens"] == theirs["generated_tokens"]


@pytest.mark.timeout(300)
def test_the_folder_of_a_sharded_policy_is_a_plain_one(both: tuple[dict[str, Path], Results]):
    final = both[0]["dpo"] / "final"
    assert read_json(final / "config.json")["architectures"] == ["LlamaForCausalLM"]
    assert all(torch.isfinite(p).all() for p in load_policy(final).parameters())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("name", ["dpo", "ppo", "reward by LoRA"])
def test_what_some_ranks_saved_others_go_on_from(
    inputs: Inputs, tmp_path: Path, name: str, first: int
):
    """Shards are put together in a save: two ranks go on from one's, and one from two's."""
    launch(words(tmp_path, [name], inputs, stop_after=1), first, **SHARDED)
    assert [path.name.startswith(".unfinished") for path in tmp_path.iterdir()] == [True]
    launch(words(tmp_path, [name], inputs), 3 - first, **SHARDED)
    whole = tmp_path / "whole"
    whole.mkdir()
    works(inputs)[name](whole)
    found = one_stage(tmp_path, name, inputs)  # it is there
    near(read_log(found), read_log(whole))
    assert len(read_log(found)) > 1


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("environment", [{}, SHARDED], ids=["replicated", "sharded"])
def test_an_experiment_on_two_ranks(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """`klash compare` under torchrun: one report, each stage once, nearly one process's numbers."""
    arms = """
[arms.ppo]
kind = "ppo"
settings = [{ kl_coef = 0.1 }]
[arms.dpo]
kind = "direct"
loss = "dpo"
settings = [{ beta = 0.1 }]
"""
    (tmp_path / "tiny.toml").write_text(TINY + arms)
    command = ["benchmarks.cli", "compare", str(tmp_path / "tiny.toml"), "--runs"]
    said = launch([*command, str(tmp_path / "two")], **environment)
    assert said.count("index.html") == 1
    alone = launch([*command, str(tmp_path / "one")], processes=1)
    assert alone.count("index.html") == 1
    two, one = (read_json(tmp_path / n / "tiny" / "results.json") for n in ("two", "one"))
    stages = [{p.name for p in (tmp_path / n / ".stages").iterdir()} for n in ("two", "one")]
    assert stages[0] == stages[1]
    for method in ("sft", "ppo", "dpo"):
        for key in ("gold", "kl"):
            close = one["methods"][method][key]["mean"]
            assert two["methods"][method][key]["mean"] == pytest.approx(close, abs=1e-4)
