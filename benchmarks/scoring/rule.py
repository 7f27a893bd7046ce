"""Which rows a reward model keeps: fDPO's rule, a threshold, or the best share.

All three are `dpo.filtered.keep`, the rule that filtered DPO trains by: a score must beat what it
stands against.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dpo.filtered import keep, random_keep
from shared.config import InputError
from shared.seeds import seed_of


@dataclass(frozen=True)
class Rule:
    """What a row needs to stay; with a policy its chosen answer must beat the policy's own."""

    threshold: float | None = None
    """Without a policy: a row stays where its chosen answer scores above this."""
    best_share: float | None = None
    """Without a policy: the share of the rows that stays, those that score best."""
    by: Literal["chosen", "margin"] = "chosen"
    """What `--threshold` and `--best-share` look at: the score of the chosen answer, or by how much
    it is above that of the rejected one."""
    against: Literal["mean", "best"] = "mean"
    """What several samples of one prompt stand for: the mean of their scores, which is what one
    sample has on average, or the best of them, which few chosen answers beat."""
    margin: float = 0.0
    """By how much the chosen answer must beat the policy's."""
    floor: float = 0.0
    """Least share of the rows that stays: those that come closest to the margin."""

    def check(self, *, policy: bool, kind: str = "pairs") -> None:
        """InputError for options that do not go together, or are out of range."""
        ways = [policy, self.threshold is not None, self.best_share is not None]
        if sum(ways) != 1:
            raise InputError(
                "name one of --policy, --threshold and --best-share: what a chosen answer must beat"
            )
        if self.best_share is not None and not 0 < self.best_share <= 1:
            raise InputError(f"--best-share must be in (0, 1] (found {self.best_share:g})")
        if not 0 <= self.floor <= 1:
            raise InputError(f"--floor is a share, in [0, 1] (found {self.floor:g})")
        for name in ("threshold", "margin"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise InputError(f"--{name} must be a finite number (found {value:g})")
        if policy and self.by == "margin":
            raise InputError("--by margin goes with --threshold or --best-share, not with --policy")
        unused = [n for n in ("margin", "floor") if getattr(self, n) and not policy]
        if unused:
            raise InputError(f"--{unused[0]} goes with --policy")
        if self.by == "margin" and kind != "pairs":
            raise InputError(f"--by margin needs pairs, and these rows are {kind}")

    def stays(self, scores: Tensor, others: Tensor | None) -> Tensor:
        """Which rows stay, (N,) bool; `scores` and `others` (N,) are finite.

        `others`: of the policy's samples, or of rejected answers with `by` = margin. A tie goes.
        """
        if self.threshold is not None or self.best_share is not None:
            value = scores if others is None else scores - others
            if self.threshold is not None:
                return keep(value, torch.full_like(value, self.threshold), floor=0)
            count = max(1, round((self.best_share or 0) * len(value)))
            return keep(value, torch.zeros_like(value), margin=math.inf, floor=count)
        assert others is not None
        floor = round(self.floor * len(scores))
        return keep(scores, others, margin=self.margin, floor=floor)

    def said(self) -> str:
        """The rule in words."""
        what = "score of the chosen answer"
        if self.by == "margin":
            what = "margin, score(chosen) - score(rejected)"
        if self.threshold is not None:
            return f"a row stays where its {what} is above {self.threshold:g}"
        if self.best_share is not None:
            return f"the {self.best_share:.0%} of rows with the highest {what} stay"
        own = {"mean": "the mean score", "best": "the best"}[self.against]
        more = f"more than {self.margin:g} above" if self.margin else "above"
        floor = f"; at least {self.floor:.0%} of all rows stay" if self.floor else ""
        return (
            f"a row stays where its chosen answer scores {more} {own} of the policy's own answers"
            f"{floor}"
        )


def blindly(stays: Tensor, seed: int) -> Tensor:
    """As many rows drawn without looking at them: the control of the same size."""
    return random_keep(stays, seed_of(seed, "kept blindly"))
