"""A training that is stopped, in whatever way, ends as one that was not."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from torch import nn
from works import TRAINERS, Inputs, works

from shared.models.cost import Meter
from shared.stages import SAVES, read_json
from shared.training import saves, sft
from shared.training.fit import OptimizerConfig, Trainee, prepare
from shared.training.saves import Saves, save_every

ASIDE = {"cost.json", "manifest.json"}  # with what was measured; only of a stage


@pytest.fixture(autouse=True)
def after_every_step() -> Iterator[None]:
    before = saves.minutes_between()
    save_every(0)
    yield
    save_every(before)


def ends(folder: Path) -> dict[str, bytes]:
    """Every file of a finished training by name, what was measured and what was saved aside."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {n: p.read_bytes() for n, p in files.items() if n not in ASIDE and SAVES not in n}


# The saves


def trainee() -> Trainee:
    torch.manual_seed(0)
    return prepare(nn.Linear(3, 2), OptimizerConfig(learning_rate=0.1), steps=10)  # pyright: ignore


def stepped(trainee: Trainee) -> Trainee:
    """After one step more."""
    trainee.model(torch.ones(1, 3)).sum().backward()
    trainee.optimizer.step()
    trainee.scheduler.step()
    trainee.optimizer.zero_grad()
    return trainee


def saved(folder: Path, steps: int) -> list[list[float]]:
    """Weights after each step, each saved."""
    model, found = trainee(), []
    made = Saves(folder, Meter())
    made.follow(model=model)
    for step in range(1, steps + 1):
        stepped(model)
        made.step_done(step, seen=step * 10)
        found.append(model.model.weight.flatten().tolist())
    return found


def test_the_last_two_are_kept_and_the_newest_is_taken_up(tmp_path: Path):
    weights = saved(tmp_path, 4)
    assert sorted(f.name for f in (tmp_path / SAVES).iterdir()) == ["00000003", "00000004"]
    found, model = Saves(tmp_path, Meter()), trainee()
    assert (found.steps, found.place) == (4, {"steps": 4, "seen": 40})
    found.follow(model=model)
    assert model.model.weight.flatten().tolist() == weights[-1]
    assert model.scheduler.get_last_lr() != trainee().scheduler.get_last_lr()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no manifest"])
def test_a_save_that_is_damaged_is_passed_over(tmp_path: Path, damage: str):
    weights = saved(tmp_path, 4)
    newest = tmp_path / SAVES / "00000004"
    file = newest / "state.safetensors"
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        file.unlink()
    else:
        (newest / "manifest.json").unlink()
    found, model = Saves(tmp_path, Meter()), trainee()
    found.follow(model=model)
    assert found.steps == 3
    assert model.model.weight.flatten().tolist() == weights[2]


def test_a_save_that_was_not_finished_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saved(tmp_path, 2)
    monkeypatch.setattr(saves, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError("full")))
    again = Saves(tmp_path, Meter())
    again.follow(model=trainee())
    with pytest.raises(OSError, match="full"):
        again.save(3)
    monkeypatch.undo()
    assert Saves(tmp_path, Meter()).steps == 2


def test_nothing_is_saved_before_it_is_time(tmp_path: Path):
    save_every(10)
    saved(tmp_path, 3)
    assert not (tmp_path / SAVES).exists()
    assert Saves(tmp_path, Meter()).place == {}


# Trainers


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("moment", ["after a save", "in a save", "in a step"])
def test_a_training_that_is_stopped_ends_as_one_that_was_not(
    name: str, moment: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every file to the bit, but for seconds and memory; it is stopped twice."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    work = works(inputs)[name]
    work(whole)
    by_trl = name == "sft"
    place = {
        "after a save": (sft.Saving, "on_save") if by_trl else (Saves, "save"),
        "in a save": (sft if by_trl else saves, "write_manifest"),
        "in a step": (sft.Saving, "on_step_end") if by_trl else (Saves, "step_done"),
    }[moment]
    real, calls = getattr(*place), []

    def interrupted(*words: object, **named: object) -> None:
        calls.append(1)
        if moment == "after a save":
            real(*words, **named)
        if len(calls) in (1, 3):
            raise KeyboardInterrupt
        if moment != "after a save":
            real(*words, **named)

    with monkeypatch.context() as patch:
        patch.setattr(*place, interrupted)
        for _ in range(2):
            if len(calls) >= 3:
                break
            try:
                work(stopped)
            except KeyboardInterrupt:
                continue
            break
    work(stopped)
    assert calls
    assert ends(stopped) == ends(whole)
    if by_trl:  # nobody asks what it cost
        return
    costs = [read_json(folder / "cost.json") for folder in (whole, stopped)]
    for key in ("generated_tokens", "train_tokens", "flops", "labels_used"):
        assert costs[0][key] == costs[1][key]
    assert costs[0]["phases"].keys() == costs[1]["phases"].keys()


KILLED = """
import sys, time
from pathlib import Path

sys.path.insert(0, {tests!r})
import torch
from works import Inputs, fill
from shared.stages import Stages, silent
from shared.training import saves, sft

torch.set_num_threads(1)
saves.save_every(0)
store, name, slow, *folders = sys.argv[1:]
finish, given = saves.write_manifest, Inputs(*map(Path, folders))

def slowly(*words):
    print("saving", flush=True)
    time.sleep(float(slow))
    finish(*words)
    print("saved", flush=True)

saves.write_manifest = sft.write_manifest = slowly
print(Stages(Path(store), silent).run("filled", fill, trainer=name, given=given), flush=True)
"""


def kill_once(command: list[str], rng: random.Random, in_save: bool) -> bool:
    """Start it and kill it at a random moment, or in a save; whether it was still at work."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(rng.randint(1, 3)):
        while (line := process.stdout.readline()) and line != "saving\n":
            pass
    if not in_save:
        time.sleep(rng.uniform(0.2, 0.6))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_kills_over_all_trainers_lose_at_most_a_step(inputs: Inputs, tmp_path: Path):
    """By SIGKILL, ten of them inside a save; every end has the bytes of an undisturbed one."""
    rng, kills, in_saves = random.Random(0), 0, 0
    code = KILLED.format(tests=str(Path(__file__).parents[1]))
    folders = [str(path) for path in astuple(inputs)]
    for number in range(100):
        if kills >= 30:
            break
        name, store = TRAINERS[number % len(TRAINERS)], tmp_path / f"store-{number}"
        command = [sys.executable, "-c", code, str(store), name]
        for n in range(4):
            in_save = n % 2 == 0
            killed = kill_once([*command, "0.3", *folders], rng, in_save)
            kills, in_saves = kills + killed, in_saves + (killed and in_save)
        last = subprocess.run([*command, "0", *folders], capture_output=True, text=True, check=True)
        found, undisturbed = Path(last.stdout.splitlines()[-1]), tmp_path / f"whole-{number}"
        undisturbed.mkdir()
        works(inputs)[name](undisturbed)
        assert ends(found) == ends(undisturbed)
        assert [path.name for path in store.iterdir()] == [found.name]
        assert not (found / SAVES).exists()
    assert kills >= 30
    assert in_saves >= 10
