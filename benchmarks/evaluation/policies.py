"""`klash evaluate`: what any policies make of a file's prompts, side by side, nothing trained.

    prompts of the file -> each policy's own samples, KL to the reference -> scores -> one table

Intervals are over prompts, which all policies share; win rates are paired by prompt.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.evaluation.answers import Answering, Question, answers_of, questions
from benchmarks.evaluation.judges import Judges, Scores, score_answers
from benchmarks.evaluation.metrics import win_rate
from benchmarks.evaluation.statistics import Estimate, crossed_interval
from benchmarks.evaluation.text import (
    TextMeasures,
    alarms,
    distinct,
    length_controlled_win_rate,
    repetition,
)
from benchmarks.pipeline.places import quiet_libraries
from benchmarks.scoring.models import as_folder, require_policy, require_positive
from benchmarks.scoring.output import require_writable
from benchmarks.scoring.rows import RowOptions, survey
from benchmarks.scoring.sampling import Policy, Sampled
from shared.config import InputError
from shared.data.examples import dropped_lines
from shared.stages import write_json

KINDS = ("pairs", "labels", "answers", "prompts")
SHOWN = 3  # prompts whose answers are in the JSON


@dataclass(frozen=True)
class Asked:
    """What the policies are asked, and against whom they are measured."""

    ref: str | None = None
    """The model that KL and wins are measured against, such as the SFT model."""
    prompts: int = 200
    """Most prompts."""
    all: bool = False
    """Take prompts of all sides, those too that training may have seen; else the test side's."""


@dataclass(frozen=True)
class Evaluating:
    """One evaluation as it was asked for."""

    models: tuple[str, ...]
    sources: tuple[str, ...]
    asked: Asked = field(default_factory=Asked)
    out: Path | None = None
    judges: Judges = field(default_factory=Judges)
    sampled: Sampled = field(default_factory=Sampled)
    options: RowOptions = field(default_factory=RowOptions)

    @property
    def names(self) -> list[str]:
        """The reference first, then all others."""
        ref = self.asked.ref
        return ([] if ref is None else [ref]) + [name for name in self.models if name != ref]

    def check(self) -> None:
        """InputError for what cannot be evaluated, before a model is loaded."""
        if not self.models:
            raise InputError("name the models: klash evaluate MODEL... --data DATA")
        if twice := [name for name, n in Counter(self.models).items() if n > 1]:
            raise InputError(f"{twice[0]}: named twice")
        require_positive(prompts=self.asked.prompts)
        self.sampled.check()
        if self.out is not None:
            require_writable(self.out)
        for name in self.names:
            require_policy(name)
        self.judges.check()


def evaluate_policies(evaluating: Evaluating) -> dict[str, Any]:
    """Print the table, write the JSON if wanted, and return what it holds.

    InputError where models, rows or options cannot be used.
    """
    quiet_libraries()
    evaluating.check()
    asked, judges, sampled = evaluating.asked, evaluating.judges, evaluating.sampled
    rows = survey(evaluating.sources, evaluating.options.config(), KINDS)
    asks = questions(rows, asked.prompts, sampled.seed, every_row=asked.all)
    answers = list(ask_all(evaluating, asks))
    scores, unread = score_answers(judges, asks, answers, sampled.dtype)
    for one in answers:
        unread = one.unread | unread
    usable = [n for n in range(len(asks)) if n not in unread]
    if not usable:
        raise InputError(f"no prompt can be read by all models: {next(iter(unread.values())).said}")
    found = {
        "data": list(evaluating.sources),
        "side": "all" if asked.all else "test",
        "prompts": len(usable),
        "prompts_left_out": dict(Counter(why.reason for why in unread.values())),
        "sampling": asdict(sampled),
        "ref": asked.ref,
        **asdict(judges),
        "win_rate_by": judges.decides,
        "notes": judges.notes,
        "dropped": dict(rows.reading.report.dropped),
        "models": measured(evaluating, asks, answers, scores, usable),
    }
    for line in dropped_lines(rows.reading.report):
        print(f"dropped: {line}")
    print(table(found))
    if evaluating.out is not None:
        write_json(evaluating.out, found)
    return found


def ask_all(evaluating: Evaluating, asks: Sequence[Question]) -> Iterator[Answering]:
    """Every model's answers, the reference's first; that one stays loaded for the KL."""
    ref_name, ref = evaluating.asked.ref, None
    with ExitStack() as held:
        for name in evaluating.names:
            with ExitStack() as stack:
                folder = (held if name == ref_name else stack).enter_context(as_folder(name))
                policy = Policy(folder, evaluating.sampled)
                found = answers_of(name, policy, ref, asks)
                if name == ref_name:
                    ref, found.kl = policy, {n: [0.0] * len(t) for n, t in found.texts.items()}
                del policy
                yield found


# --- the table ---------------------------------------------------------------------------------


def measured(
    evaluating: Evaluating,
    asks: Sequence[Question],
    answers: Sequence[Answering],
    scores: Scores,
    usable: Sequence[int],
) -> dict[str, dict[str, Any]]:
    """All numbers of each model, over the prompts that all could be asked."""
    decides = scores.get(evaluating.judges.decides or "")
    start = text_measures(answers[0], usable) if evaluating.asked.ref is not None else None
    found = {}
    for number, one in enumerate(answers):
        row: dict[str, Any] = {
            "kl": None if one.kl is None else over_prompts(one.kl, usable),
            **{name: over_prompts(by[number], usable) for name, by in scores.items()},
            "length": over_prompts(one.lengths, usable),
            "truncated": over_prompts(one.truncated, usable, share=True),
            **text_numbers(one, usable),
            "win_rate": None,
            "win_rate_chosen": None,
            "length_controlled_win_rate": None,
            "notes": one.notes,
            "alarms": [],
        }
        if decides is not None:
            row |= wins(
                decides, number, answers, usable, against_ref=evaluating.asked.ref is not None
            )
        if start is not None:
            row["alarms"] = alarms(text_measures(one, usable), start)
        row["examples"] = [
            {"prompt": asks[n].row.prompt, "answer": one.texts[n][0]} for n in usable[:SHOWN]
        ]
        found[one.name] = row
    return found


def wins(
    decides: list[dict[int, list[float]]],
    number: int,
    answers: Sequence[Answering],
    usable: Sequence[int],
    *,
    against_ref: bool,
) -> dict[str, Any]:
    """How often a model's answer beats the reference's, and the file's chosen one; ties half."""
    ours, found = decides[number], {}
    if against_ref and number > 0:
        mine, theirs = as_table(ours, usable), as_table(decides[0], usable)
        found["win_rate"] = interval(win_rate(mine[None], theirs[None])[0], share=True)
        lengths = (as_table(one.lengths, usable) for one in (answers[number], answers[0]))
        mine_long, theirs_long = lengths
        found["length_controlled_win_rate"] = length_controlled_win_rate(
            mine, mine_long, theirs, theirs_long
        )
    chosen, both = decides[-1], [n for n in usable if n in decides[-1]]
    if both:
        mine, theirs = as_table(ours, both), as_table(chosen, both)
        found["win_rate_chosen"] = interval(win_rate(mine[None], theirs[None])[0], share=True)
    return found


def as_table(values: Mapping[int, Sequence[float]], usable: Sequence[int]) -> NDArray[np.float64]:
    """(prompts, samples)"""
    return np.array([values[n] for n in usable], dtype=np.float64)


def over_prompts(
    values: Mapping[int, Sequence[float]], usable: Sequence[int], *, share: bool = False
) -> dict[str, float | None]:
    """The mean over samples and prompts, with limits for new prompts."""
    return interval(as_table(values, usable).mean(1), share=share)


def interval(by_prompt: NDArray[np.float64], *, share: bool = False) -> dict[str, float | None]:
    """Mean and limits of one number a prompt: prompts are what the interval draws anew.

    Limits of a `share` stay in [0, 1].
    """
    found = crossed_interval(by_prompt[:, None])
    if share and found.low is not None and found.high is not None:
        found = found.model_copy(update={"low": max(0, found.low), "high": min(1, found.high)})
    return {"mean": found.mean, "low": found.low, "high": found.high}


def text_numbers(one: Answering, usable: Sequence[int]) -> dict[str, Any]:
    """How a model writes, whoever judges it."""
    ids = [completion for n in usable for completion in one.ids[n]]
    return {
        "repetition": over_prompts(
            {n: [repetition(ids) for ids in one.ids[n]] for n in usable}, usable, share=True
        ),
        "distinct_2": distinct(ids),
        "empty": over_prompts(
            {n: [float(not text.strip()) for text in one.texts[n]] for n in usable},
            usable,
            share=True,
        ),
    }


def text_measures(one: Answering, usable: Sequence[int]) -> TextMeasures:
    """What alarms look at."""
    numbers = text_numbers(one, usable)
    return TextMeasures(
        length=float(as_table(one.lengths, usable).mean()),
        repetition=numbers["repetition"]["mean"],
        distinct_2=numbers["distinct_2"],
        perplexity=None,
        truncated=float(as_table(one.truncated, usable).mean()),
        empty=numbers["empty"]["mean"],
    )


COLUMNS = {  # what the table shows, and how
    "kl": ("KL, nats", ".2f"),
    "score": ("score", ".3f"),
    "gold": ("gold", ".3f"),
    "win_rate": ("wins against ref", ".2f"),
    "win_rate_chosen": ("wins against chosen", ".2f"),
    "length": ("tokens", ".1f"),
    "truncated": ("cut", ".2f"),
    "repetition": ("repetition", ".3f"),
    "distinct_2": ("distinct-2", ".2f"),
}


def table(found: Mapping[str, Any]) -> str:
    """What a user reads: a line a model, then what there is to say of each."""
    models: dict[str, dict[str, Any]] = found["models"]
    shown = [k for k in COLUMNS if any(row.get(k) is not None for row in models.values())]
    lines = [["model", *(COLUMNS[key][0] for key in shown)]]
    for name, row in models.items():
        mark = f"{name} (ref)" if name == found["ref"] else name
        lines.append([mark, *(_cell(row.get(key), COLUMNS[key][1]) for key in shown)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    samples = found["sampling"]["samples"]
    each = f"{samples} sample{'s' if samples > 1 else ''}"
    side = "of all sides" if found["side"] == "all" else "of the test side"
    text.append(f"{found['prompts']} prompts {side}, {each} each; 95 % intervals over prompts")
    text += [f"{n} prompts left out: {why}" for why, n in found["prompts_left_out"].items()]
    if found["win_rate_by"] is not None:
        by = {"gold": "the judge", "score": "the reward model, since there is no judge"}
        text.append(f"who wins is decided by {by[found['win_rate_by']]}")
    text += found["notes"]
    for name, row in models.items():
        text += [f"{name}: {said}" for said in (*row["notes"], *row["alarms"])]
    return "\n".join(text)


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return Estimate(**value).text(form)
    return format(value, form)
