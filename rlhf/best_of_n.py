"""Best-of-n: the arm without training. Sample n answers, keep the reward model's favourite."""

import torch
from torch import Tensor

from shared.generation.engine import Completions, Engine, Sampling
from shared.models.scorer import Scorer


def best_of_n(
    engine: Engine,
    scorer: Scorer,
    prompts: list[list[int]],
    n: int,
    sampling: Sampling,
) -> Completions:
    """The highest-scored of `n` samples for each prompt; the first one where scores tie.

    Its KL to the sampled policy is at most log n - (n - 1) / n (Beirami et al. 2024,
    arXiv:2401.01879).
    """
    repeated = [p for p in prompts for _ in range(n)]
    drawn = engine.generate(repeated, sampling)
    scores: Tensor = scorer.score_all(repeated, drawn.ids)
    best = scores.view(len(prompts), n).argmax(1) + n * torch.arange(len(prompts))
    return drawn.rows(best.tolist())
