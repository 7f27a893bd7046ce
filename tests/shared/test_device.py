"""Which device a process computes on, and which GPU a worker sees."""

import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks.pipeline.places import side_by_side, stage_context
from shared.models.device import device, device_name, see_one_gpu, visible_gpus
from shared.models.load import load_policy
from shared.stages import Stages, silent, write_json

VISIBLE = "CUDA_VISIBLE_DEVICES"


@pytest.fixture(autouse=True)
def looked_at_anew(monkeypatch: pytest.MonkeyPatch):
    """What was visible at first is asked once a process."""
    monkeypatch.setenv(VISIBLE, "")
    visible_gpus.cache_clear()
    yield
    visible_gpus.cache_clear()


@pytest.mark.parametrize(
    ("listed", "number", "sees"),
    [
        ("2,3", 0, "2"),
        ("2,3", 1, "3"),
        ("2, 3", 2, "2"),
        ("GPU-8f,GPU-9a", 1, "GPU-9a"),
        ("5", 3, "5"),
        ("", 0, ""),
    ],
)
def test_of_several_gpus_a_process_sees_one(
    listed: str, number: int, sees: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(VISIBLE, listed)
    see_one_gpu(number)
    assert os.environ[VISIBLE] == sees


def test_what_was_visible_at_first_stays_known(monkeypatch: pytest.MonkeyPatch):
    """Workers take theirs of all, though the process that starts them has taken the first."""
    monkeypatch.setenv(VISIBLE, "4,7")
    see_one_gpu()
    assert visible_gpus() == ("4", "7")
    see_one_gpu(1)
    assert os.environ[VISIBLE] == "7"


def say_what_is_seen(folder: Path, number: int) -> None:
    """Stage: the GPUs that its process sees."""
    (folder.parent / f"met-{number}").touch()
    while len(list(folder.parent.glob("met-*"))) < 2:  # both workers are at work at once
        time.sleep(0.05)
    write_json(folder / "seen.json", os.environ[VISIBLE])


def test_each_worker_takes_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VISIBLE, "4,7")
    visible_gpus()
    stages = Stages(tmp_path, silent)
    with side_by_side(stages, workers=2, threads=1) as beside:
        folders = beside.each(lambda n: beside.run("seen", say_what_is_seen, number=n), range(2))
    assert {(folder / "seen.json").read_text() for folder in folders} == {'"4"', '"7"'}


def test_the_device_is_part_of_the_address_of_what_computes(policy_folder: Path):
    place = stage_context()["device"]
    assert place.file == "shared/models/device.py"
    assert place.value == device_name()
    assert load_policy(policy_folder).device.type == device().type
    if not torch.cuda.is_available():
        assert device_name() == "cpu"
