"""Stages on a Ray cluster: the results of one machine, also where a machine falls."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checks import TINY, Klash

from benchmarks.pipeline.ray import Machine as RayMachine
from benchmarks.pipeline.ray import memory_of, require_alike
from shared.config import InputError
from shared.stages import Stage, fill_stage, read_json, stage_of, write_json

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

ARMS = """
[arms.dpo]
kind = "direct"
loss = "dpo"
settings = [{ beta = 0.1 }]
[arms.ppo]
kind = "ppo"
settings = [{ kl_coef = 0.1 }]
"""
MEASURED = {
    "environment", "seconds", "phases", "peak_memory_bytes", "mfu", "tokens_per_second",
    "train_tokens_per_second", "generated_tokens_per_second", "wall_s", "cost", "costs",
}  # fmt: skip
LARGE = 4 * 2**30  # bytes that a machine says it has


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that computes nothing and two machines of one processor, as processes."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        made.add_node(num_cpus=1, memory=LARGE)
    yield made
    made.shutdown()


def unmeasured(value: Any) -> Any:
    """Results without what a clock or a memory said."""
    if isinstance(value, dict):
        return {k: unmeasured(v) for k, v in value.items() if k not in MEASURED}
    return [unmeasured(v) for v in value] if isinstance(value, list) else value


def command(folder: Path, runs: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.cli", "compare", str(folder / "tiny.toml"),
            "--runs", str(folder / runs), *words]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_whose_machine_falls_ends_as_one_on_a_single_machine(
    machines: Cluster, tmp_path: Path
):
    """One of two is killed in the middle, with all that ran on it."""
    (tmp_path / "tiny.toml").write_text(TINY + ARMS)
    on_ray = command(tmp_path, "ray", "--ray", machines.address)
    with (tmp_path / "said").open("w") as said:
        running = subprocess.Popen(on_ray, stdout=said, stderr=subprocess.STDOUT)
        stages = tmp_path / "ray" / ".stages"
        end = time.monotonic() + 300
        while len(list(stages.glob("[a-z]*"))) < 6 and running.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert running.poll() is None, (tmp_path / "said").read_text()
        machines.remove_node(machines.worker_nodes.copy().pop(), allow_graceful=False)
        assert running.wait(600) == 0, (tmp_path / "said").read_text()
    subprocess.run(command(tmp_path, "here"), check=True, capture_output=True)
    found, expected = (read_json(tmp_path / r / "tiny" / "results.json") for r in ("ray", "here"))
    assert unmeasured(found) == unmeasured(expected)
    assert (tmp_path / "ray" / "tiny" / "report" / "index.html").is_file()


def write(folder: Path, text: str) -> None:
    """Stage: a file."""
    if text == "wrong":
        raise InputError("this text is wrong")
    write_json(folder / "text.json", text)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://head:10001", "auto", "nowhere"])
def test_no_cluster_is_one_line(klash: Klash, tmp_path: Path, address: str):
    (tmp_path / "tiny.toml").write_text(TINY + ARMS)
    code, _, err = klash("compare", "tiny.toml", "--ray", address)
    assert code == 2
    assert "no cluster answers there" in err
    assert "ray start --head" in err


def test_machines_that_compute_other_digits_are_refused():
    one = RayMachine("one", {"torch": "2.13", "operations": "C"}, False, True)
    require_alike(one, one)
    other = RayMachine("two", {"torch": "2.13", "operations": "PyTorch"}, False, True)
    with pytest.raises(InputError, match="operations is PyTorch on two and C on one"):
        require_alike(other, one)


def test_a_stage_has_room_for_the_models_that_it_reads(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"0" * 1000)
    stage = stage_of("x", write, {"start": {"policy": tmp_path / "model"}, "text": "a"}, {})
    assert memory_of(stage) == 2**30 + 4000
    assert memory_of(Stage("x", write, {"text": "a"}, {})) == 2**30


def test_what_fell_on_another_machine_is_taken_over_only_where_ray_says_so(tmp_path: Path):
    stage = stage_of("write", write, {"text": "a"}, {})
    folder = tmp_path / stage.key
    for taken, left in ((False, True), (True, False)):
        other = tmp_path / f".unfinished-{stage.key}-elsewhere.7"
        (other / "saves").mkdir(parents=True, exist_ok=True)
        fill_stage(folder, stage, taken_over=taken)
        assert other.exists() == left
        assert read_json(folder / "text.json") == "a"
