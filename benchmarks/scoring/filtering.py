"""`klash filter`: the reward model as a data filter, on its own.

    rows -> scores (in a log that outlives a kill) -> which stay -> filtered rows, audit, control

Filtered DPO (Morimura et al. 2024, arXiv:2404.13846) keeps a pair where the reward of its chosen
answer beats that of the policy's own sample; this is its first epoch, on any file.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from benchmarks.pipeline.places import quiet_libraries
from benchmarks.scoring.chunks import Scored, score_chunk
from benchmarks.scoring.log import ScoreLog, chunk_key
from benchmarks.scoring.models import (
    as_folder,
    open_scorer,
    require_policy,
    require_reward_model,
)
from benchmarks.scoring.output import Pace, appear_whole, counted, require_rows_file
from benchmarks.scoring.rows import (
    CHUNK,
    RowOptions,
    Rows,
    in_trl_form,
    survey,
)
from benchmarks.scoring.rule import Rule, blindly
from benchmarks.scoring.sampling import Policy, Sampled
from shared.code import code_of
from shared.config import InputError
from shared.data.examples import Numbered, dropped_lines
from shared.models.cost import versions
from shared.models.device import on_gpu
from shared.models.names import address_of_model
from shared.models.scorer import Scorer, require_differing
from shared.seeds import seed_of
from shared.stages import write_json

KINDS = ("pairs", "answers")
CHUNK_OF_GPUS = 512  # rows that a GPU samples for at once; a CPU's are few: a kill costs one chunk


@dataclass(frozen=True)
class Filtering:
    """One filtering as it was asked for."""

    sources: tuple[str, ...]
    reward_model: str
    out: Path
    rule: Rule
    policy: str | None = None
    sampled: Sampled = field(default_factory=Sampled)
    options: RowOptions = field(default_factory=RowOptions)

    @property
    def chunk(self) -> int:
        """Rows that are sampled for and scored together."""
        slow = not on_gpu() and self.sampled.engine == "transformers"
        return CHUNK if slow else CHUNK_OF_GPUS

    @property
    def outputs(self) -> tuple[Path, Path, Path, Path]:
        """(filtered rows, audit, control, summary)."""
        endings = (".audit.jsonl", ".random.jsonl", ".summary.json")
        audit, control, summary = (self.out.with_suffix(ending) for ending in endings)
        return self.out, audit, control, summary

    def check(self) -> None:
        """InputError for options that are out of range, or for files that cannot be written."""
        for path in self.outputs:
            require_rows_file(path, self.sources)
        self.rule.check(policy=self.policy is not None)
        self.sampled.check()
        if self.policy is not None:
            require_policy(self.policy)

    def origin(self, reward_model: Path) -> dict[str, Any]:
        """All that the scores depend on but the rows: models by their content, options, and the
        program.
        """
        found: dict[str, Any] = {
            "reward model": address_of_model(str(reward_model)),
            "policy": None if self.policy is None else address_of_model(self.policy),
            "scored answers": "chosen, rejected" if self.rule.by == "margin" else "chosen",
            "rows": asdict(self.options),
            "chunk": self.chunk,
            "dtype": self.sampled.dtype,
            "code": digest_of(code_of(__name__)),
            "library versions": versions(),
        }
        if self.policy is not None:
            found["sampling"] = asdict(self.sampled)
        return found


def digest_of(code: dict[str, str]) -> str:
    """One short hash of all files of `code_of`."""
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def filter_rows(asked: Filtering) -> None:
    """Write the rows that stay, and beside them the audit, the random control and a summary.

    What was scored when a run was stopped is not scored again. InputError, and no file, where
    models, rows or options cannot be used.
    """
    quiet_libraries()
    asked.check()
    reward_model = require_reward_model(asked.reward_model)
    rows = survey(asked.sources, asked.options.config(), KINDS)
    asked.rule.check(policy=asked.policy is not None, kind=rows.kind)
    origin, pace = asked.origin(reward_model), Pace()
    with ScoreLog(asked.out, origin) as log:
        score_rows(asked, log, rows, reward_model, pace)
        summary = write_outputs(asked, log, rows)
        write_json(asked.outputs[3], {**summary, "of": origin})
        log.finish()
    for line in dropped_lines(rows.reading.report):
        print(f"dropped: {line}")
    print(summary_text(asked, summary))
    if pace.rows:
        print(f"{pace.rate:,.1f} rows/s")


def score_rows(asked: Filtering, log: ScoreLog, rows: Rows, reward_model: Path, pace: Pace) -> None:
    """Fill the log; models are loaded for the first chunk that it lacks."""
    models: tuple[Scorer, Policy | None] | None = None
    with ExitStack() as stack, counted("scoring", rows.count, pace) as done:
        for number, chunk in rows.chunks(asked.chunk):
            key = chunk_key(number, [in_trl_form(one.row) for one in chunk])
            scored = log.take(key)
            if scored is not None:
                done(len(chunk), False)
                continue
            if models is None:
                models = open_models(asked, reward_model, stack)
                pace.begin()
            seed = seed_of(asked.sampled.seed, "filter", number)
            scorer, policy = models
            both = asked.rule.by == "margin"
            log.add(key, score_chunk(scorer, chunk, both=both, policy=policy, seed=seed))
            done(len(chunk), True)
    log.end()


def open_models(
    asked: Filtering, reward_model: Path, stack: ExitStack
) -> tuple[Scorer, Policy | None]:
    """The reward model, and the policy if there is one."""
    scorer = open_scorer(reward_model, asked.sampled.dtype)
    if asked.policy is None:
        return scorer, None
    return scorer, Policy(stack.enter_context(as_folder(asked.policy)), asked.sampled)


def write_outputs(asked: Filtering, log: ScoreLog, rows: Rows) -> dict[str, Any]:
    """Decide with all scores known, and write; the counts."""
    scores, others, scored = read_scores(asked.rule, log)
    if not len(scores):
        for one, result in logged(asked, log, rows):
            rows.reading.drop_passed(one, result["reason"], result["said"])
        lines = dropped_lines(rows.reading.report)
        raise InputError("\n".join([f"{asked.reward_model}: no row has a score", *lines]))
    both = scores if others is None else torch.cat([scores, others])
    require_differing(asked.reward_model, both.tolist())
    stays = asked.rule.stays(scores, others)
    if not stays.any():
        ranges = f"chosen answers score from {scores.min():.4g} to {scores.max():.4g}"
        if others is not None:
            ranges += f", what they must beat from {others.min():.4g} to {others.max():.4g}"
        raise InputError(
            f"no row stays ({asked.rule.said()}; {ranges}): lower what they must beat, or set "
            "--floor; the scores are kept for the next try"
        )
    control = blindly(stays, asked.sampled.seed)
    decisions = iter(zip(stays.tolist(), control.tolist(), strict=True))
    values = iter(others.tolist() if others is not None else [None] * len(scores))
    with appear_whole(asked.outputs[:3]) as (kept, audit, random):
        for one, result in logged(asked, log, rows):
            if "reason" in result:
                rows.reading.drop_passed(one, result["reason"], result["said"])
                put(audit, place_of(one) | {"kept": False, **result})
                continue
            stay, drawn = next(decisions)
            put(audit, place_of(one) | audited(asked, result, next(values)) | {"kept": stay})
            if stay:
                put(kept, in_trl_form(one.row))
            if drawn:
                put(random, in_trl_form(one.row))
    summary = counts_of(scores, others, stays)
    report = rows.reading.report
    return {
        "rule": asked.rule.said(),
        **asdict(asked.rule),
        "rows": report.read,
        "scored": scored,
        "dropped": dict(report.dropped),
        **summary,
    }


def logged(asked: Filtering, log: ScoreLog, rows: Rows) -> Iterator[tuple[Numbered, Scored]]:
    """Every row with its scores, in order."""
    for (_, chunk), scored in zip(rows.chunks(asked.chunk), log.all(), strict=True):
        yield from zip(chunk, scored, strict=True)


def read_scores(rule: Rule, log: ScoreLog) -> tuple[Tensor, Tensor | None, int]:
    """(scores of chosen answers, of what they stand against or None, how many rows have them)."""
    chosen, others = array("f"), array("f")
    for scored in log.all():
        for row in scored:
            if "reason" in row:
                continue
            chosen.append(row["chosen"])
            if "samples" in row:
                samples = row["samples"]
                others.append(max(samples) if rule.against == "best" else float(np.mean(samples)))
            elif "rejected" in row:
                others.append(row["rejected"])
    scores = torch.tensor(chosen)
    return scores, torch.tensor(others) if others else None, len(scores)


def place_of(one: Numbered) -> dict[str, Any]:
    """Where the row stands in the user's files."""
    return {"file": one.where.file, one.where.unit: one.where.number}


def audited(asked: Filtering, result: Scored, other: float | None) -> dict[str, Any]:
    """The scores that decided on a row, and what the policy said."""
    if asked.policy is not None:
        return {"chosen": result["chosen"], "sample": other, "samples": result["samples"],
                "texts": result["texts"]}  # fmt: skip
    return {"chosen": result["chosen"]} | ({} if other is None else {"rejected": other})


def counts_of(scores: Tensor, others: Tensor | None, stays: Tensor) -> dict[str, Any]:
    """What the decision came to, in numbers."""
    found = {
        "kept": int(stays.sum()),
        "kept_share": stays.float().mean().item(),
        "mean_chosen": scores.mean().item(),
        "mean_chosen_of_kept": scores[stays].mean().item(),
    }
    if others is not None:
        found["mean_other"] = others.mean().item()
        found["chosen_beats_other"] = (scores > others).float().mean().item()
    return found


def put(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def summary_text(asked: Filtering, summary: dict[str, Any]) -> str:
    """What a user reads at the end."""
    kept, audit, control, _ = asked.outputs
    lines = [
        f"{summary['rule']}",
        f"{kept}: {summary['kept']:,} of {summary['scored']:,} scored rows stay "
        f"({summary['kept_share']:.1%})",
        f"{control}: as many, drawn without looking at them",
        f"{audit}: every row with its scores and whether it stays",
        f"mean score of chosen answers: {summary['mean_chosen']:.3f}, of those kept "
        f"{summary['mean_chosen_of_kept']:.3f}",
    ]
    if "mean_other" in summary:
        other = "the policy's own" if asked.policy is not None else "rejected answers"
        lines[-1] += (
            f"; of {other} {summary['mean_other']:.3f}; chosen is above in "
            f"{summary['chosen_beats_other']:.1%}"
        )
    return "\n".join(lines)
