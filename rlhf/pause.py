"""PPO put aside in the middle and taken up again: the run is the one that was not interrupted."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from rlhf.rollout import Actors
from shared.stages import read_json, write_json
from shared.training.fit import Trainee, restore, state_of

TENSORS, PLAIN = "paused.safetensors", "paused.json"  # in the stage's folder


def pause(folder: Path, actors: Actors, kl_coef: float) -> None:
    """Write what the next update needs: the models in training, the penalty, the cost so far."""
    tensors, plain = {}, {"kl_coef": kl_coef, "cost": actors.meter.state()}
    for name, trainee in trainees(actors).items():
        found, plain[name] = state_of(trainee)
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in found.items()}
    save_file(tensors, folder / TENSORS)
    write_json(folder / PLAIN, plain)


def paused(folder: Path) -> bool:
    """Whether a run was put aside in `folder`."""
    return (folder / PLAIN).is_file()


def take_up(folder: Path, actors: Actors, kl_coef: float) -> float:
    """The penalty's coefficient of a run that was paused in `folder`, or `kl_coef` of a new one."""
    if not paused(folder):
        return kl_coef
    tensors, plain = load_file(folder / TENSORS), read_json(folder / PLAIN)
    for name, trainee in trainees(actors).items():
        start = f"{name}."
        own = {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
        restore(trainee, own, plain[name])
    actors.meter.restore(plain["cost"])
    for file in (TENSORS, PLAIN):
        (folder / file).unlink()
    return plain["kl_coef"]


def trainees(actors: Actors) -> dict[str, Trainee]:
    """The models in training: one, where policy and value function share a trunk."""
    found = {"policy": actors.policy, "value": actors.value}
    return {name: trainee for name, trainee in found.items() if trainee is not None}
