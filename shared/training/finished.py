"""The files of a trained stage, written in one place: log, checkpoints, the end."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from shared.models import ranks
from shared.models.cost import Meter
from shared.models.load import save
from shared.stages import read_jsonl, write_json, write_jsonl
from shared.training.fit import Trainee

LOG = "log.jsonl"


class TrainingLog:
    """`log.jsonl`: a line an update or step, there as soon as it is made. `steps`: how many come.

    Of a training that was stopped the first `kept` lines stay, and it goes on behind them.
    """

    def __init__(self, folder: Path, steps: int, *, kept: int = 0):
        self.path, self.steps = folder / LOG, steps
        self.rows: list[dict[str, Any]] = ranks.from_first(read_log(folder)[:kept])
        if self.rows:
            write_jsonl(self.path, self.rows)
        else:
            self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, numbers: Mapping[str, float]) -> None:
        """One more update or step."""
        row = {"step": len(self.rows) + 1, "of": self.steps, **numbers}
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The log of a trained stage; empty if it failed in its first step."""
    return read_jsonl(folder / LOG) if (folder / LOG).exists() else []


class Training:
    """What becomes of one policy: `checkpoint-<step>` on the way, `final` and the rest at the end.

    `save_after`: the steps after which a checkpoint is kept, with their share of the training.
    """

    def __init__(
        self,
        folder: Path,
        trainee: Trainee,
        tokenizer: PreTrainedTokenizerBase,
        log: TrainingLog,
        save_after: dict[int, float],
    ):
        self.folder, self.trainee, self.tokenizer = folder, trainee, tokenizer
        self.log, self.save_after = log, save_after

    def step_done(self, numbers: Mapping[str, float]) -> None:
        """Log one step, and keep a checkpoint where one is due."""
        self.log.add(numbers)
        if len(self.log) in self.save_after:
            self._save(f"checkpoint-{len(self.log)}")

    def finish(
        self, meter: Meter, *, labels_used: int, failure: str = "", stopped_early: bool = False
    ) -> None:
        """The final policy, which checkpoint is which, how it ended, what it cost.

        `failure`: why training ended before its last step; the last good weights are the result.
        """
        self._save("final")
        points = {f"checkpoint-{s}": x for s, x in self.save_after.items() if s <= len(self.log)}
        write_json(self.folder / "checkpoints.json", {**points, "final": 1.0})
        ended = {"failed": failure, "stopped_early": stopped_early}
        write_json(self.folder / "stopped.json", ended)
        write_json(self.folder / "cost.json", {**meter.summary(), "labels_used": labels_used})

    def _save(self, name: str) -> None:
        save(self.trainee.model, self.tokenizer, self.folder / name)
