"""What a finished head-to-head's folders hold: evaluation rows, answers, training logs."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.stats import chat_text
from benchmarks.pipeline.compare import HeadToHead
from shared.stages import read_jsonl
from shared.tasks.own import OwnData, read_own
from shared.training.finished import read_log

Array = NDArray[np.float64]


class EvaluationRows:
    """One method's evaluation rows over seeds: `rows["gold"]` is (seeds, prompts, samples)."""

    def __init__(self, folders: list[Path]):
        self.raw = [read_jsonl(folder / "rows.jsonl") for folder in folders]

    def __contains__(self, column: str) -> bool:
        row = self.raw[0][0]
        return column in row or column in row.get("exact", {})

    def __getitem__(self, column: str) -> Array:
        return np.array([[row[column] for row in rows] for rows in self.raw], dtype=np.float64)

    def column(self, name: str) -> Array:
        """What has one number a prompt, (seeds, prompts)."""
        return np.array([[row[name] for row in rows] for rows in self.raw], dtype=np.float64)

    @property
    def exact(self) -> bool:
        """Whether the rows hold expectations over all completions of a finite task."""
        return "exact" in self

    def mean(self, column: str) -> Array:
        """(seeds, prompts); of a finite task (seeds, 1), the mean over its prompts.

        A finite task has no other prompts, so that its intervals are over seeds alone.
        """
        if not self.exact:
            return self[column].mean(-1)
        if column not in self.raw[0][0]["exact"]:
            return self[column].mean(-1).mean(-1, keepdims=True)
        values = [[row["exact"][column] for row in rows] for rows in self.raw]
        return np.array(values, dtype=np.float64).mean(-1, keepdims=True)


def answers_by_method(compared: HeadToHead, seed: int, count: int) -> dict[str, Any]:
    """The first test prompts, each answered by every method (`samples.json`)."""
    folders = {"sft": compared.seeds[seed].sft_rows}
    for name, runs in compared.runs.items():
        run = next(r for r in runs if r.seed == seed and r.setting == compared.tuned[name])
        folders[name] = run.rows[1.0]
    rows = {name: read_jsonl(folder / "rows.jsonl")[:count] for name, folder in folders.items()}
    task = compared.common.task
    own = read_own(task.data) if isinstance(task, OwnData) else ()
    chats = {e.prompt: chat_text(e.messages) for e in own if e.messages is not None}
    return {
        "prompts": [
            {
                "prompt": rows["sft"][i]["prompt"],
                "chat": chats.get(rows["sft"][i]["prompt"]),
                "answers": {
                    name: {"text": r[i]["completions"][0], "gold": r[i]["gold"][0]}
                    for name, r in rows.items()
                },
            }
            for i in range(len(rows["sft"]))
        ]
    }


def training_curves(compared: HeadToHead, points: int = 100) -> dict[str, Any]:
    """Training logs at the tuned settings, by method, seed and metric (`curves.json`)."""
    folders = {("reward", s.seed): s.reward for s in compared.seeds.values() if s.reward}
    for name, runs in compared.runs.items():
        for run in runs:
            if run.model is not None and run.setting == compared.tuned[name]:
                folders[name, run.seed] = run.model
    curves: dict[str, Any] = {}
    for (name, seed), folder in folders.items():
        log = read_log(folder)
        if not log:  # it failed in its first step
            continue
        stride = max(1, len(log) // points)
        curves.setdefault(name, {})[str(seed)] = {
            metric: [[i + 1, log[i][metric]] for i in range(0, len(log), stride)]
            for metric in log[0]
            if metric not in ("step", "of")
        }
    return curves
