"""`own`: a user's pairs, or answers with a label, as a task. Prompts and demonstrations come from
them, gold from a judge.

Prompts go to three sides by their hash. What trains, SFT, pairs and PPO's prompts alike, is of the
first; settings are chosen on the second; the third is for what the report says.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from shared.config import InputError
from shared.data.pairs import Labelled, Pair
from shared.data.rows import Messages
from shared.data.splits import Split
from shared.models.load import load_tokenizer
from shared.models.scorer import Answered, Scorer
from shared.seeds import seed_of
from shared.stages import read_jsonl
from shared.tasks.judge import Judge, judged_by_function
from shared.tasks.task import Demonstration

Side = Literal["train", "validation", "test", "judge"]
SIDES: dict[Split, Side] = {
    "sft": "train",
    "preference": "train",
    "ppo": "train",
    "validation": "validation",
    "reward-test": "test",
    "test": "test",
    "judge": "judge",
}


class OwnExample(NamedTuple):
    """One comparison of a user's file, or one answer with a label: then `chosen` is the answer.

    A chat's prompt as text holds its template's markers.
    """

    where: str
    side: Side
    prompt: str
    messages: Messages | None
    prompt_ids: list[int]
    chosen: str
    chosen_ids: list[int]
    rejected: str | None = None  # None of an answer with a label
    rejected_ids: list[int] | None = None
    label: bool | None = None  # whether `chosen`, alone, is desirable; None of a comparison

    @property
    def good(self) -> bool:
        """Whether `chosen` is an answer that one would want."""
        return self.label is not False


@dataclass(frozen=True)
class OwnData:
    """A prepared file, the model it was prepared for, and who judges: a stage's task."""

    data: Path
    policy: Path
    judge: Judge | None = None
    name: Literal["own"] = "own"
    finite: Literal[False] = False


class Own:
    """The task `own`; see `shared.tasks.task.Task`."""

    name = "own"
    most_gold = float("inf")

    def __init__(self, config: OwnData):
        self.config, self.has_gold = config, config.judge is not None
        self._examples = read_own(config.data)
        self._ids = {e.prompt: e.prompt_ids for e in self._examples}
        self._messages = {e.prompt: e.messages or e.prompt for e in self._examples}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.config.policy)

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
        """As the file's reader encoded them."""
        return [self._ids[prompt] for prompt in prompts]

    def prompts(self, split: Split, count: int, seed: int) -> list[str]:
        """Different prompts in a seeded order, all if there are fewer; of what trains, in turn."""
        side = SIDES[split]
        found = list(dict.fromkeys(e.prompt for e in self._examples if e.side == side))
        if not found:
            raise InputError(f"own data: no prompt is left for {side}; more rows are needed")
        order = np.random.default_rng(seed_of(seed, f"{split} prompts")).permutation(len(found))
        wanted = count if side == "train" else min(count, len(found))
        return [found[order[i % len(order)]] for i in range(wanted)]

    def demonstrations(
        self, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
    ) -> list[Demonstration]:
        """The chosen or desirable answers of what trains, at most `count` of them."""
        found = [e for e in examples_of(self._examples, "train") if e.good]
        order = np.random.default_rng(seed_of(seed, "corpus")).permutation(len(found))
        chosen = [found[i] for i in order[:count]]
        return [Demonstration(e.prompt_ids, e.chosen_ids) for e in chosen]

    def gold(self, prompts: Sequence[str], completions: Sequence[str]) -> NDArray[np.float64]:
        """The judge's scores; NaN without a judge.

        It reads texts and messages: an answer that was cut is judged as if it had ended there.
        """
        judge = self.config.judge
        if judge is None:
            return np.full(len(completions), np.nan)
        said = [self._messages[prompt] for prompt in prompts]
        if judge.folder is None:
            return judged_by_function(judge, said, completions)
        rows = [Answered(*one) for one in zip(said, completions, strict=True)]
        return Scorer(judge.folder).score_said(rows).double().numpy()

    def chosen_gold(self, prompts: Sequence[str]) -> list[float | None]:
        """The judge's mean score of the file's chosen or desirable answers to each prompt; None
        where it has none.
        """
        answers: dict[str, list[str]] = defaultdict(list)
        for example in self._examples:
            if example.good:
                answers[example.prompt].append(example.chosen)
        many = [(prompt, answer) for prompt in prompts for answer in answers[prompt]]
        scores = iter(self.gold([p for p, _ in many], [a for _, a in many]).tolist())
        found = ([next(scores) for _ in answers[p]] for p in prompts)
        return [float(np.mean(each)) if each else None for each in found]

    def well_formed(self, completion: str) -> bool:
        """Whether it says anything: of one's own task no more is known."""
        return bool(completion.strip())

    def preference(
        self, gold_a: NDArray[np.float64], gold_b: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Bradley-Terry on the judge's scores, in log-odds."""
        scale = self.config.judge.log_odds if self.config.judge else 1.0
        return 1.0 / (1.0 + np.exp(-scale * (gold_a - gold_b)))


@functools.lru_cache(maxsize=4)  # a process makes the task anew for each stage
def read_own(data: Path) -> tuple[OwnExample, ...]:
    """What the stage `data` wrote."""
    return tuple(OwnExample(**row) for row in read_jsonl(data / "examples.jsonl"))


def examples_of(examples: Sequence[OwnExample], side: Side) -> list[OwnExample]:
    """The comparisons of one side, in the file's order."""
    return [e for e in examples if e.side == side]


def labelled_of(example: OwnExample) -> Labelled:
    """The answer with its label as trainers read it."""
    assert example.label is not None
    return Labelled(
        id=example.where,
        prompt=example.prompt,
        prompt_ids=example.prompt_ids,
        completion_ids=example.chosen_ids,
        desirable=example.label,
    )


def pair_of(example: OwnExample) -> Pair:
    """The comparison as trainers read it."""
    assert example.rejected_ids is not None
    return Pair(
        id=example.where,
        prompt=example.prompt,
        prompt_ids=example.prompt_ids,
        chosen_ids=example.chosen_ids,
        rejected_ids=example.rejected_ids,
    )
