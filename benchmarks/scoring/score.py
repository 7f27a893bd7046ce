"""`klash score`: the reward model's score of each answer in a user's files."""

import json
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.pipeline.places import quiet_libraries
from benchmarks.scoring.chunks import Scored, score_chunk
from benchmarks.scoring.models import open_scorer, require_reward_model
from benchmarks.scoring.output import Pace, appear_whole, counted, require_rows_file
from benchmarks.scoring.rows import RowOptions, in_trl_form, survey
from shared.config import InputError
from shared.data.examples import dropped_lines
from shared.models.load import WeightDtype
from shared.models.scorer import require_differing

KINDS = ("pairs", "labels", "answers")


def score(
    sources: Sequence[str],
    reward_model: str,
    out: Path,
    options: RowOptions,
    dtype: WeightDtype = "float32",
) -> None:
    """Write each row with its scores to `out`, and print what came of it.

    A row's answers are scored together; no more than a chunk of rows is held. InputError, and no
    file, where model or rows cannot be used.
    """
    quiet_libraries()
    require_rows_file(out, sources)
    folder = require_reward_model(reward_model)
    rows = survey(sources, options.config(), KINDS)
    scorer, margins, all_scores = open_scorer(folder, dtype), array("f"), array("f")
    pace = Pace()
    with (
        appear_whole([out]) as [file],
        counted("scoring", rows.count, pace) as done,
    ):
        for _, chunk in rows.chunks():
            for one, scores in zip(chunk, score_chunk(scorer, chunk), strict=True):
                if "reason" in scores:
                    rows.reading.drop_passed(one, scores["reason"], scores["said"])
                    continue
                found = in_trl_form(one.row) | named(scores)
                file.write(json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n")
                all_scores.extend(scores.values())
                if "rejected" in scores:
                    margins.append(scores["chosen"] - scores["rejected"])
            done(len(chunk), True)
        report = rows.reading.report
        if not report.kept:
            raise InputError("\n".join(["no row has a score", *dropped_lines(report)]))
        require_differing(folder, all_scores)
    print(f"{out}: {report.kept:,} of {report.read:,} rows (format {report.format})")
    for line in dropped_lines(report):
        print(f"dropped: {line}")
    if margins:
        print(accuracy_text(np.asarray(margins)))
    print(f"{pace.rate:,.1f} rows/s")


def named(scores: Scored) -> dict[str, float]:
    """`score_chosen` and `score_rejected` of a pair, else `score`."""
    if "rejected" in scores:
        return {f"score_{side}": scores[side] for side in ("chosen", "rejected")}
    return {"score": scores["chosen"]}


def accuracy_text(margins: np.ndarray) -> str:
    """How often chosen scores above rejected, with Wilson's interval; a tie counts half."""
    right, pairs = float((margins > 0).sum() + (margins == 0).sum() / 2), len(margins)
    low, high = stats.binomtest(round(right), pairs).proportion_ci(method="wilson")
    ties = int((margins == 0).sum())
    said = f", {ties} ties, each half right" if ties else ""
    return (
        f"accuracy {right / pairs:.3f} [{low:.3f}, {high:.3f}]: the chosen answer scores higher "
        f"in {int((margins > 0).sum()):,} of {pairs:,} pairs{said}; mean margin "
        f"{margins.mean():.3f}"
    )
