"""What several processes do together: started by `launch`, run by each of them."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import torch
from works import Inputs, fill

from benchmarks.pipeline.places import on_ranks, quiet_libraries
from shared.models import ranks
from shared.stages import Stages, silent
from shared.training.saves import Saves, save_every

ROOT = Path(__file__).parents[1]


def launch(command: Sequence[str], processes: int = 2, **environment: str) -> str:
    """`command` (module and words) under torchrun; what it said. AssertionError if it failed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*torchrun, "--nproc-per-node", str(processes), "-m", *command]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:20000]
    return done.stdout


def words(store: Path, names: Sequence[str], given: Inputs, stop_after: int = 0) -> list[str]:
    """The command that does stages of `works` in `store`.

    `stop_after`: how many saves, one a step, a training makes before all processes fall; 0: all.
    """
    folders = [str(folder) for folder in astuple(given)]
    return ["on_ranks", str(store), str(stop_after), "|".join(names), *folders]


def fall_after(steps: int) -> None:
    """Save after every step, and end as if killed after so many of them."""
    save_every(0)
    step_done = Saves.step_done

    def falling(self: Saves, done: int, **place: object) -> None:
        step_done(self, done, **place)
        if done == steps:
            ranks.wait()
            os._exit(0)

    Saves.step_done = falling


def one_stage(store: Path, name: str, given: Inputs) -> Path:
    """The folder of one of `works`, by as many ranks as there are."""
    stages = on_ranks(Stages(store, silent))
    return stages.run(name.replace(" ", "-").replace(",", ""), fill, trainer=name, given=given)


def main() -> None:
    store, stop_after, names, *folders = sys.argv[1:]
    torch.set_num_threads(1)
    quiet_libraries()
    ranks.join()
    if int(stop_after):
        fall_after(int(stop_after))
    given = Inputs(*map(Path, folders))
    for name in names.split("|"):
        found = one_stage(Path(store), name, given)
        if ranks.is_first():
            print(f"{name}\t{found}", flush=True)


if __name__ == "__main__":
    main()
