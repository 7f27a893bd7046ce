"""How well the reward models know what labels are drawn from."""

from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.evaluation.metrics import accuracy_from_gold, bayes_accuracy, calibration, pearson
from benchmarks.evaluation.statistics import Estimate, seed_interval
from benchmarks.pipeline.compare import HeadToHead
from benchmarks.pipeline.experiment import Experiment
from benchmarks.results.folders import Array
from benchmarks.results.schema import UNDEFINED, JudgeQuality, RewardModel
from shared.stages import read_json
from shared.tasks.judge import JudgeConfig


def reward_model_quality(compared: HeadToHead) -> RewardModel | None:
    """All seeds' reward models on the same held-out pairs; None where there is neither."""
    folders = [seed.reward_scores for seed in compared.seeds.values() if seed.reward_scores]
    if not folders:
        return None
    files = [read_json(folder / "scores.json") for folder in folders]
    scores = [{key: np.array(values) for key, values in file.items()} for file in files]
    labels, gold = scores[0]["p_a_wins"], scores[0]["gold_a"]
    best = None if np.isin(labels, (0, 1)).all() else bayes_accuracy(labels)
    accuracy = [accuracy_from_gold(s["score_a"], s["score_b"], s["p_a_wins"]) for s in scores]
    predicted = [1 / (1 + np.exp(s["score_b"] - s["score_a"])) for s in scores]
    fits = [calibration(p, s["p_a_wins"]) for p, s in zip(predicted, scores, strict=True)]
    shares = [] if best is None else [(a - 0.5) / (best - 0.5) for a in accuracy]
    judged = scores if gold.dtype != object else []
    return RewardModel(
        accuracy=seed_interval(accuracy),
        bayes_accuracy=best,
        share_of_attainable=seed_interval(shares),
        calibration_error=seed_interval([error for error, _ in fits]),
        length_correlation=seed_interval([_score_correlation(s, "length") for s in scores]),
        gold_correlation=seed_interval([_score_correlation(s, "gold") for s in judged]),
        score_sd=seed_interval([float(s["scale"]) for s in scores]),
        pairs=len(scores[0]["p_a_wins"]),
        reliability=fits[0][1],
    )


def _score_correlation(scores: dict[str, Array], column: str) -> float:
    both = np.concatenate([scores["score_a"], scores["score_b"]])
    return pearson(both, np.concatenate([scores[f"{column}_a"], scores[f"{column}_b"]]))


def _judge_name(judge: JudgeConfig) -> str:
    """As the report calls it: without the folders that lead to it."""
    if judge.function is not None:
        return f"`{judge.function.rpartition('/')[2]}`"
    if judge.model is not None:
        return Path(judge.model).name if Path(judge.model).is_absolute() else judge.model
    return f"a reward model trained on {judge.share:.0%} of the prompts, which nothing else sees"


def judge_quality(experiment: Experiment, compared: HeadToHead) -> JudgeQuality | None:
    """The judge on held-out labels; None where there is none, or gold is the task's own."""
    folder, judge = compared.common.judge_scores, experiment.judge
    own = experiment.reward.pretrained
    if folder is None:
        return None
    found = {k: np.array(v) for k, v in read_json(folder / "scores.json").items()}
    kind = "share" if judge.share else "function" if judge.function else "model"
    roles = ["the reward model"] if judge.model and judge.model == own else []
    named = {"kind": kind, "name": _judge_name(judge), "roles": roles}
    if not len(found["p_a_wins"]):  # labels held out are all of one kind
        return JudgeQuality(**named, accuracy=UNDEFINED, calibration_error=None, pairs=0)
    gap, label = found["gold_a"] - found["gold_b"], found["p_a_wins"]
    right = 0.5 + np.sign(gap) * (label - 0.5)
    low, high = stats.binomtest(round(right.sum()), len(right)).proportion_ci(method="wilson")
    error, _ = calibration(1 / (1 + np.exp(-found["log_odds"] * gap)), label)
    return JudgeQuality(
        **named,
        accuracy=Estimate(mean=float(right.mean()), low=float(low), high=float(high)),
        calibration_error=error,
        pairs=len(right),
    )
