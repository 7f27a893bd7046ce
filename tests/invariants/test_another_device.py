"""Where models and batches lie: every stage on a device that is not the CPU, by name.

Tensors on two devices raise there, as on a GPU; results equal the CPU's.
"""

import json
from pathlib import Path

import pytest
import torch
from pretend import PRETEND, pretended
from safetensors.torch import load_file
from works import OTHERS, TRAINERS, Inputs, works

from shared.models import cost

pytestmark = pytest.mark.usefixtures("without_c")

TIMES = {"wall_s", "phases", "peak_memory_bytes"}
COIN_TOSSES = {
    "rewards/accuracies"
}  # of the first step, where both sides are equal but for rounding


OURS = [name for name in TRAINERS if name != "sft"]  # where SFT computes is TRL's to decide


@pytest.mark.parametrize("name", [*OURS, *OTHERS])
def test_a_stage_computes_on_the_device_what_it_computes_on_the_cpu(
    name: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here, there, seen = tmp_path / "cpu", tmp_path / "device", []
    counted = cost.matrices
    work = works(inputs)[name]
    here.mkdir()
    there.mkdir()
    work(here)
    monkeypatch.setattr(cost, "matrices", lambda m: seen.append(m.device) or counted(m))
    with pretended(monkeypatch):
        work(there)
    assert seen
    assert {device.type for device in seen} == {PRETEND.type}
    files = sorted(p.relative_to(here) for p in here.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(there) for p in there.rglob("*") if p.is_file())
    for file in files:
        require_same(here / file, there / file)


def require_same(here: Path, there: Path) -> None:
    """Equal but for rounding, and for what was measured."""
    if here.suffix == ".safetensors":
        ours, theirs = load_file(here), load_file(there)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(theirs[key], ours[key], rtol=1e-5, atol=1e-6)
    elif here.suffix in (".json", ".jsonl"):
        ours, theirs = ([json.loads(x) for x in p.read_text().splitlines()] if p.suffix == ".jsonl"
                        else json.loads(p.read_text()) for p in (here, there))  # fmt: skip
        assert comparable(theirs) == comparable(ours)


def comparable(value: object) -> object:
    """Numbers that a test compares with a tolerance."""
    if isinstance(value, dict):
        return {k: comparable(v) for k, v in value.items() if k not in TIMES | COIN_TOSSES}
    if isinstance(value, list):
        return [comparable(v) for v in value]
    return pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
