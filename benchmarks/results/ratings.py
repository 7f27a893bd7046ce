"""Where gold is learnt from people's ratings: how well it follows them, and what VADER says."""

import numpy as np

from benchmarks.evaluation.statistics import Estimate, crossed_interval
from benchmarks.pipeline.experiment import Experiment
from benchmarks.results.folders import EvaluationRows
from benchmarks.results.schema import UNDEFINED, GoldQuality
from shared.tasks.registry import make_task
from shared.tasks.snippets import Snippets


def _snippets(experiment: Experiment) -> Snippets | None:
    """The task whose gold is such a fit; the others are not made for it."""
    task = make_task(experiment.task) if experiment.task.name == "snippets" else None
    return task if isinstance(task, Snippets) else None


def gold_quality(experiment: Experiment) -> GoldQuality | None:
    """Gold on ratings that it was not fitted on; None where gold is no fit to ratings."""
    task = _snippets(experiment)
    if task is None:
        return None
    found = task.gold_quality()
    return GoldQuality(
        sentences=found.sentences,
        correlation=found.correlation,
        second_opinion=found.second_opinion,
    )


def second_opinion(experiment: Experiment, rows: EvaluationRows) -> Estimate:
    """What VADER, which has seen no rating, makes of the same answers; on `snippets` alone."""
    task = _snippets(experiment)
    if task is None:
        return UNDEFINED
    scores = [
        [task.second_opinion([row["prompt"]] * len(row["completions"]), row["completions"]).mean()
         for row in seed]
        for seed in rows.raw
    ]  # fmt: skip
    return crossed_interval(np.array(scores))
