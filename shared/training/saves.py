"""What a training that was stopped, killed even, goes on from: to the bit, on a CPU.

Every `minutes` weights in training, optimiser, schedule, cost and place go into a folder of
`saves/` in the stage's folder, in one rename behind its manifest; the last two are kept. A stage
that does not come to its end leaves its folder to the next attempt, which takes up the newest save
that is whole. When the stage is finished, `shared.stages` removes them.
"""

import shutil
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.models import ranks
from shared.models.cost import Meter
from shared.stages import (
    SAVES,
    flush_to_disk,
    intact,
    read_json,
    write_json,
    write_manifest,
)
from shared.training.fit import Trainee, restore, state_of

KEPT = 2
TENSORS, PLAIN = "state.safetensors", "state.json"
_minutes = 10.0


def save_every(minutes: float) -> None:
    """From now on in this process; 0: after every step."""
    global _minutes
    _minutes = minutes


def minutes_between() -> float:
    """How long a training goes on without a save: the most that can be lost."""
    return _minutes


class Saves:
    """The saves of one training: `place` is where the newest whole one was made, or empty.

    First `place` is read, then `follow` puts back what it was; `step_done` says where training is.
    """

    def __init__(self, folder: Path, meter: Meter):
        self.folder, self.meter = folder / SAVES, meter
        self.trainees: dict[str, Trainee] = {}
        self.last = time.monotonic()
        # rank 0 has the folder, and tells the others what lies in it
        self.newest = next((save for save in self._newest_first() if intact(save)), None)
        found = {} if self.newest is None else read_json(self.newest / PLAIN)
        self.state: dict[str, Any] = ranks.from_first(found)

    @property
    def place(self) -> dict[str, Any]:
        """What the trainer said of where it was, `steps` among it; empty where it begins."""
        return self.state.get("place", {})

    @property
    def steps(self) -> int:
        """How many were done."""
        return self.place.get("steps", 0)

    def follow(self, **trainees: Trainee | None) -> None:
        """Save these from now on; after a stop they, and the cost, are first what they were."""
        self.trainees = {name: t for name, t in trainees.items() if t is not None}
        if not self.state:
            return
        tensors = {} if self.newest is None else load_file(self.newest / TENSORS)
        for name, trainee in self.trainees.items():
            start = f"{name}."
            own = ((k.removeprefix(start), t) for k, t in tensors.items() if k.startswith(start))
            restore(trainee, ranks.tensors_from_first(own), self.state["trainees"][name])
        self.meter.restore(self.state["cost"])

    def step_done(self, steps: int, **place: Any) -> None:
        """Save if it is time to: rank 0's clock says."""
        if ranks.from_first(time.monotonic() - self.last >= 60 * _minutes):
            self.save(steps, **place)

    def save(self, steps: int, **place: Any) -> None:
        """Save now; an older save than the last two goes once this one is whole."""
        tensors, plain = {}, {}
        for name, trainee in self.trainees.items():
            found, plain[name] = state_of(trainee)
            for key, tensor in found:  # every rank helps to put it together, rank 0 keeps it
                if ranks.is_first():
                    tensors[f"{name}.{key}"] = tensor.cpu().contiguous()
        cost = self.meter.state()
        if ranks.is_first():
            place = {"steps": steps, **place}
            self._write(tensors, {"place": place, "trainees": plain, "cost": cost})
        self.last = time.monotonic()

    def _write(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        target = self.folder / f"{state['place']['steps']:08d}"
        unfinished = self.folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_file(tensors, unfinished / TENSORS)
        write_json(unfinished / PLAIN, state)
        write_manifest(unfinished, {})
        flush_to_disk(self.folder.parent)  # the log and checkpoints up to here
        shutil.rmtree(target, ignore_errors=True)  # a damaged one, or this very place
        unfinished.rename(target)
        for older in self._newest_first()[KEPT:]:
            shutil.rmtree(older)

    def _newest_first(self) -> list[Path]:
        found = [f for f in self.folder.glob("[0-9]*") if f.is_dir()]
        return sorted(found, reverse=True)
