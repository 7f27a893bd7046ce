"""A policy's answers to some prompts of a file, with the KL of each to a reference."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.evaluation.evaluate import measure_kl
from benchmarks.scoring.output import Pace, counted
from benchmarks.scoring.rows import CHUNK, Rows, Unscored
from benchmarks.scoring.sampling import Policy
from shared.config import InputError
from shared.data.rows import Message, Row
from shared.data.splits import prompt_text, split_of
from shared.models.folders import embedding_count
from shared.models.scorer import same_tokens
from shared.seeds import seed_of
from shared.tasks.own import SIDES


class Question(NamedTuple):
    """A prompt, and the answer that the file says is good, if it has one."""

    row: Row
    chosen: str | Message | None


def questions(rows: Rows, count: int, seed: int, *, every_row: bool) -> list[Question]:
    """`count` different prompts, all if there are fewer, drawn by a hash of each and the seed.

    Without `every_row` those of the test side, as `klash compare` has it. InputError if none is.
    """
    found: dict[str, Question] = {}
    for _, chunk in rows.chunks():
        for one in chunk:
            row = one.row
            key = prompt_text(row.prompt) + (json.dumps(row.tools) if row.tools else "")
            if key in found or not (
                every_row or SIDES[split_of(prompt_text(row.prompt))] == "test"
            ):
                continue
            found[key] = Question(row, None if row.label is False else row.chosen)
    if not found:
        raise InputError(
            f"{', '.join(rows.sources)}: none of {rows.count} rows is on the test side, which has "
            "15 % of the prompts; give more rows, or take all with --all"
        )
    order = sorted(found, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    return [found[key] for key in order[:count]]


@dataclass
class Answering:
    """One model's answers: by the number of the question, an entry a sample."""

    name: str
    texts: dict[int, list[str]] = field(default_factory=dict)
    ids: dict[int, list[list[int]]] = field(default_factory=dict)
    truncated: dict[int, list[bool]] = field(default_factory=dict)
    kl: dict[int, list[float]] | None = None  # nats per sequence; None where there is none
    notes: list[str] = field(default_factory=list)
    unread: dict[int, Unscored] = field(default_factory=dict)

    @property
    def lengths(self) -> dict[int, list[int]]:
        """Tokens of each answer, EOS included."""
        return {n: [len(ids) for ids in found] for n, found in self.ids.items()}


def answers_of(
    name: str, policy: Policy, ref: Policy | None, asks: Sequence[Question]
) -> Answering:
    """A policy's samples; every policy draws from the same random numbers.

    `ref` is None of the reference itself, and where there is none.
    """
    found = Answering(name)
    if ref is not None:
        if reason := why_no_kl(policy, ref):
            found.notes.append(f"no KL: {reason}")
        else:
            found.kl = {}
    with counted(f"asking {name}", len(asks), Pace()) as done:
        for start in range(0, len(asks), CHUNK):
            numbers = range(start, min(start + CHUNK, len(asks)))
            answer_chunk(found, policy, ref, asks, numbers)
            done(len(numbers), True)
    return found


def answer_chunk(
    found: Answering,
    policy: Policy,
    ref: Policy | None,
    asks: Sequence[Question],
    numbers: Sequence[int],
) -> None:
    """Add the answers to some questions."""
    read = {n: policy.prompt_ids(asks[n].row) for n in numbers}
    found.unread |= {n: why for n, why in read.items() if isinstance(why, Unscored)}
    prompts = {n: ids for n, ids in read.items() if not isinstance(ids, Unscored)}
    if not prompts:
        return
    seed = seed_of(policy.sampled.seed, "evaluate", numbers[0])
    drawn, count = policy.answers(list(prompts.values()), seed), policy.sampled.samples
    kl: list[float] = []
    if ref is not None and found.kl is not None:
        measures = measure_kl(policy.model, ref.model, drawn.prompts, drawn.ids, policy.ids.pad)
        kl = measures["kl"]
    for place, n in enumerate(prompts):
        mine = slice(place * count, (place + 1) * count)
        found.texts[n], found.ids[n] = drawn.texts[mine], drawn.ids[mine]
        found.truncated[n] = drawn.truncated[mine]
        if found.kl is not None:
            found.kl[n] = kl[mine]


def why_no_kl(policy: Policy, ref: Policy) -> str:
    """Why two policies have no KL between them; empty where they have."""
    if policy.sampled.temperature != 1:
        return "it is an expectation over samples at temperature 1"
    if not (
        same_tokens(policy.tokenizer, ref.tokenizer)
        and same_tokens(ref.tokenizer, policy.tokenizer)
    ):
        return "its tokenizer is not the reference's"
    if policy.tokenizer.chat_template != ref.tokenizer.chat_template:
        return "its chat template is not the reference's, so that they read other prompts"
    widths = [embedding_count(one.model) for one in (policy, ref)]
    if widths[0] != widths[1]:
        return f"it has {widths[0]} embeddings, the reference {widths[1]}"
    return ""
