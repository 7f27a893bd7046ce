"""Scores of policies' answers, and of a file's own, by a reward model and by a judge."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evaluation.answers import Answering, Question
from benchmarks.pipeline.given import given_function
from benchmarks.scoring.models import open_scorer, require_reward_model
from benchmarks.scoring.rows import NOT_FINITE, Unscored, answered, row_inputs
from benchmarks.scoring.sampling import answered_by_sample
from shared.config import InputError
from shared.data.chat import answer_text
from shared.models.load import WeightDtype
from shared.models.scorer import Answered, Scorer, require_differing
from shared.tasks.judge import Judge, judged_by_function, load_function


@dataclass(frozen=True)
class Judges:
    """Who scores the answers."""

    reward_model: str | None = None
    """A reward model, a folder or hub name: its score is what training would have seen."""
    judge: str | None = None
    """A reward model that nothing trained on: its score is gold, and it decides who wins."""
    judge_function: str | None = None
    """`file.py:function` of (prompts, completions) that returns a number each, as the judge."""

    def check(self) -> None:
        """InputError for a judge that is not there, or two of them."""
        if self.judge is not None and self.judge_function is not None:
            raise InputError("--judge and --judge-function: a judge is one of them")
        for name in (self.reward_model, self.judge):
            if name is not None:
                require_reward_model(name)
        if self.judge_function is not None:
            load_function(self.function())

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the roles that models have."""
        if self.judge is None or self.reward_model is None:
            return []
        if Path(self.judge).resolve() != Path(self.reward_model).resolve():
            return []
        return ["the judge is the reward model: gold is no second opinion, and it favours what "
                "was trained on that model"]  # fmt: skip

    def function(self) -> Judge:
        """The judge's function and its file."""
        assert self.judge_function is not None
        name = self.judge_function.rpartition(":")[2]
        return Judge(function=name, file=given_function(self.judge_function))

    @property
    def decides(self) -> str | None:
        """By what answers win: `gold` of a judge, else the reward model's `score`."""
        if self.judge is not None or self.judge_function is not None:
            return "gold"
        return None if self.reward_model is None else "score"


Scores = dict[str, list[dict[int, list[float]]]]  # by what, of each model, of each prompt


def score_answers(
    judges: Judges, asks: Sequence[Question], answers: Sequence[Answering], dtype: WeightDtype
) -> tuple[Scores, dict[int, Unscored]]:
    """(`score` and `gold`, of each model and, last, of the file's chosen answers; prompts that the
    reward model or the judge cannot read).
    """
    scores: Scores = {}
    unread: dict[int, Unscored] = {}
    said = [said_to(asks, one) for one in answers] + [chosen_of(asks)]
    for name, folder in (("score", judges.reward_model), ("gold", judges.judge)):
        if folder is not None:
            scorer = open_scorer(require_reward_model(folder), dtype)
            scores[name] = [scored_by(scorer, rows, unread) for rows in said]
            each = [x for found in scores[name] for given in found.values() for x in given]
            require_differing(folder, each)
            del scorer
    if judges.judge_function is not None:
        scores["gold"] = [by_function(judges.function(), rows) for rows in said]
    return scores, unread


def said_to(asks: Sequence[Question], answering: Answering) -> dict[int, list[Answered]]:
    """A model's answers to each prompt."""
    return {
        n: [
            answered_by_sample(asks[n].row, text, cut)
            for text, cut in zip(texts, answering.truncated[n], strict=True)
        ]
        for n, texts in answering.texts.items()
    }


def chosen_of(asks: Sequence[Question]) -> dict[int, list[Answered]]:
    """The file's own chosen answers, where it has them."""
    return {n: [answered(one.row, one.chosen)] for n, one in enumerate(asks) if one.chosen}


def scored_by(
    scorer: Scorer, rows: Mapping[int, list[Answered]], unread: dict[int, Unscored]
) -> dict[int, list[float]]:
    """A reward model's scores; prompts that it cannot read, or to whose answers it gives no
    number, join `unread`.
    """
    inputs = {n: row_inputs(scorer, answers) for n, answers in rows.items()}
    unread |= {n: found for n, found in inputs.items() if isinstance(found, Unscored)}
    readable = {n: found for n, found in inputs.items() if not isinstance(found, Unscored)}
    scores = iter(
        scorer.score_inputs([one for found in readable.values() for one in found]).tolist()
    )
    values = {n: [next(scores) for _ in found] for n, found in readable.items()}
    broken = {n for n, scores in values.items() if not all(map(math.isfinite, scores))}
    said = f"{scorer.folder}: a score is not a number; is it broken, or dtype narrow?"
    unread |= dict.fromkeys(broken, NOT_FINITE._replace(said=said))
    return {n: scores for n, scores in values.items() if n not in broken}


def by_function(judge: Judge, rows: Mapping[int, list[Answered]]) -> dict[int, list[float]]:
    """A function's scores of all answers at once."""
    flat = [one for answers in rows.values() for one in answers]
    if not flat:
        return {}
    texts = [answer_text(one.answer) for one in flat]
    scores = iter(judged_by_function(judge, [one.prompt for one in flat], texts).tolist())
    return {n: [next(scores) for _ in answers] for n, answers in rows.items()}
