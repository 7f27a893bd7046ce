"""Scores of some rows at once: of their own answers, and of a policy's samples to their prompts."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.scoring.rows import NOT_FINITE, Unscored, answered, row_inputs
from benchmarks.scoring.sampling import Policy, answered_by_sample
from shared.data.examples import Numbered
from shared.data.rows import Row
from shared.models.scorer import Answered, Scorer

Scored = dict[str, Any]  # of one row
Inputs = list[dict[str, list[int]]] | Unscored


def score_chunk(
    scorer: Scorer,
    chunk: Sequence[Numbered],
    *,
    both: bool = True,
    policy: Policy | None = None,
    seed: int = 0,
) -> list[Scored]:
    """Of each row its scores, or `reason` and `said` where it cannot have them.

    `chosen`, of a row's only answer too; of a pair, if `both`, `rejected`. With a policy `samples`,
    a score each, and their `texts`.
    """
    rows = [one.row for one in chunk]
    found = [row_inputs(scorer, own_answers(row, both=both)) for row in rows]
    texts: list[list[str]] = [[] for _ in rows]
    if policy is not None:
        found, texts = with_samples(scorer, policy, rows, found, seed)
    flat = [one for inputs in found if not isinstance(inputs, Unscored) for one in inputs]
    scores = iter(scorer.score_inputs(flat).tolist())
    return [result_of(inputs, scores, said) for inputs, said in zip(found, texts, strict=True)]


def result_of(inputs: Inputs, scores: Iterator[float], texts: list[str]) -> Scored:
    """One row's share of the scores, by name."""
    if isinstance(inputs, Unscored):
        return inputs._asdict()
    values = [next(scores) for _ in inputs]
    if not all(map(math.isfinite, values)):
        return NOT_FINITE._asdict()
    chosen, *others = values
    if texts:
        return {"chosen": chosen, "samples": others, "texts": texts}
    return {"chosen": chosen, "rejected": others[0]} if others else {"chosen": chosen}


def own_answers(row: Row, *, both: bool) -> list[Answered]:
    """The row's answers that are scored."""
    answers = [row.chosen, row.rejected] if both else [row.chosen]
    return [answered(row, answer) for answer in answers if answer is not None]


def with_samples(
    scorer: Scorer, policy: Policy, rows: Sequence[Row], found: Sequence[Inputs], seed: int
) -> tuple[list[Inputs], list[list[str]]]:
    """(each row's inputs with those of the policy's samples behind them, the samples' texts)."""
    inputs, texts = list(found), [list[str]() for _ in rows]
    asked: list[tuple[int, list[int]]] = []
    for n, row in enumerate(rows):
        if isinstance(inputs[n], Unscored):
            continue
        prompt = policy.prompt_ids(row)
        if isinstance(prompt, Unscored):
            inputs[n] = prompt
        else:
            asked.append((n, prompt))
    if not asked:
        return inputs, texts
    answers, count = policy.answers([p for _, p in asked], seed), policy.sampled.samples
    for place, (n, _) in enumerate(asked):
        mine = slice(place * count, (place + 1) * count)
        texts[n] = answers.texts[mine]
        drawn = zip(texts[n], answers.truncated[mine], strict=True)
        of_samples = row_inputs(scorer, [answered_by_sample(rows[n], *one) for one in drawn])
        before = inputs[n]
        if isinstance(of_samples, Unscored) or isinstance(before, Unscored):
            inputs[n], texts[n] = of_samples, []
        else:
            inputs[n] = [*before, *of_samples]
    return inputs, texts
