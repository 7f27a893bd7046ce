"""PPO put aside in the middle and taken up again: the run is the one that was not interrupted."""

from pathlib import Path
from typing import Any

import torch

from rlhf.rollout import Actors
from shared.fit import restore, state_of

STATE = "paused.pt"  # in the stage's folder


def pause(folder: Path, actors: Actors, kl_coef: float, log: list[dict[str, Any]]) -> None:
    """Write what the next update needs: two models in training, the penalty, the log, the cost."""
    state = {
        "policy": state_of(actors.policy),
        "value": state_of(actors.value),
        "kl_coef": kl_coef,
        "log": log,
        "cost": actors.meter.state(),
    }
    torch.save(state, folder / STATE)


def take_up(folder: Path, actors: Actors, kl_coef: float) -> tuple[float, list[dict[str, Any]]]:
    """(the penalty's coefficient, the log so far): of a paused run, or those of a new one."""
    path = folder / STATE
    if not path.is_file():
        return kl_coef, []
    state = torch.load(path, weights_only=True, map_location="cpu")
    path.unlink()
    restore(actors.policy, state["policy"])
    restore(actors.value, state["value"])
    actors.meter.restore(state["cost"])
    return state["kl_coef"], state["log"]
