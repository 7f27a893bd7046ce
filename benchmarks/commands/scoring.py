"""Reward models and policies on a user's rows. Each command imports its own part when it runs."""

from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.entry import Argument
from benchmarks.evaluation.judges import Judges
from benchmarks.evaluation.policies import Asked
from benchmarks.scoring.rows import RowOptions
from benchmarks.scoring.rule import Rule
from benchmarks.scoring.sampling import Sampled
from shared.models.load import WeightDtype

Flat = tyro.conf.arg(name="")  # its fields are flags of the command itself


def score(
    data: Argument[tuple[str, ...]],
    /,
    *,
    reward_model: str,
    out: Path,
    dtype: WeightDtype = "float32",
    reading: Annotated[RowOptions, Flat],
) -> None:
    """A reward model's score of each answer: the rows in TRL's form, with their scores.

    Pairs get `score_chosen` and `score_rejected`, single answers `score`; scores are centred and
    scaled where the reward model's folder holds its normalisation, and raw elsewhere. Printed: how
    often the chosen answer scores higher, rows a second, and what was dropped and why.

    Args:
        data: files, folders or datasets of the hub: pairs, answers with a label, or answers.
        reward_model: a folder or hub name; it reads texts through its own tokenizer and template.
        out: the JSON lines to write.
        dtype: precision of weights and arithmetic.
        reading: how rows are read.
    """
    from benchmarks.scoring.score import score as score_files

    score_files(data, reward_model, out, reading, dtype)


def filter_command(
    data: Argument[tuple[str, ...]],
    /,
    *,
    reward_model: str,
    out: Path,
    policy: str | None = None,
    rule: Annotated[Rule, Flat],
    sampled: Annotated[Sampled, Flat],
    reading: Annotated[RowOptions, Flat],
) -> None:
    """The reward model as a data filter: filtered DPO's rule, a threshold, or a best share.

    With --policy a row stays where its chosen answer scores above the policy's own answer to the
    same prompt (Morimura et al. 2024). Beside OUT.jsonl appear OUT.audit.jsonl, every row with its
    scores and whether it stays, OUT.random.jsonl, as many rows drawn blindly, and
    OUT.summary.json. A run that was stopped goes on where it was.

    Args:
        data: files, folders or datasets of the hub: pairs, or answers alone.
        reward_model: a folder or hub name; it reads texts through its own tokenizer and template.
        out: the JSON lines to write, in TRL's form.
        policy: a folder, hub name or .gguf file, whose own answers a chosen answer must beat.
        rule: what stays.
        sampled: how the policy answers.
        reading: how rows are read.
    """
    from benchmarks.scoring.filtering import Filtering, filter_rows

    filter_rows(Filtering(data, reward_model, out, rule, policy, sampled, reading))


def evaluate(
    models: Argument[tuple[str, ...]],
    /,
    *,
    data: tuple[str, ...],
    json: Path | None = None,
    asked: Annotated[Asked, Flat],
    judges: Annotated[Judges, Flat],
    sampled: Annotated[Sampled, Flat],
    reading: Annotated[RowOptions, Flat],
) -> None:
    """Any policies on a file's prompts, nothing trained: KL, score, gold, win rates, lengths.

    Each policy answers the same prompts with samples of its own; win rates are paired by prompt,
    ties count half, and intervals are over prompts. Without a judge the reward model says who wins.

    Args:
        models: folders, hub names or .gguf files.
        data: files, folders or datasets of the hub, of any kind of rows.
        json: file for all numbers and a few answers.
        asked: prompts and reference.
        judges: who scores.
        sampled: how policies answer.
        reading: how rows are read.
    """
    from benchmarks.evaluation.policies import Evaluating, evaluate_policies

    evaluate_policies(Evaluating(models, data, asked, json, judges, sampled, reading))
