"""How well the reward models know what labels are drawn from."""

import numpy as np

from benchmarks.evaluation.metrics import accuracy_from_gold, bayes_accuracy, calibration, pearson
from benchmarks.evaluation.statistics import seed_interval
from benchmarks.pipeline.compare import HeadToHead
from benchmarks.results.folders import Array
from benchmarks.results.schema import RewardModel
from shared.stages import read_json


def reward_model_quality(compared: HeadToHead) -> RewardModel:
    """All seeds' reward models on the same held-out pairs."""
    files = [read_json(seed.reward_scores / "scores.json") for seed in compared.seeds.values()]
    scores = [{key: np.array(values) for key, values in file.items()} for file in files]
    best = bayes_accuracy(scores[0]["p_a_wins"])
    accuracy = [accuracy_from_gold(s["score_a"], s["score_b"], s["p_a_wins"]) for s in scores]
    predicted = [1 / (1 + np.exp(s["score_b"] - s["score_a"])) for s in scores]
    fits = [calibration(p, s["p_a_wins"]) for p, s in zip(predicted, scores, strict=True)]
    return RewardModel(
        accuracy=seed_interval(accuracy),
        bayes_accuracy=best,
        share_of_attainable=seed_interval([(a - 0.5) / (best - 0.5) for a in accuracy]),
        calibration_error=seed_interval([error for error, _ in fits]),
        length_correlation=seed_interval([_score_correlation(s, "length") for s in scores]),
        gold_correlation=seed_interval([_score_correlation(s, "gold") for s in scores]),
        score_sd=seed_interval([float(s["scale"]) for s in scores]),
        pairs=len(scores[0]["p_a_wins"]),
        reliability=fits[0][1],
    )


def _score_correlation(scores: dict[str, Array], column: str) -> float:
    both = np.concatenate([scores["score_a"], scores["score_b"]])
    return pearson(both, np.concatenate([scores[f"{column}_a"], scores[f"{column}_b"]]))
