"""Evaluation of a finite task: expectations over all completions in the samples' place."""

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.evaluation.optimum import expected, kl, log_partition
from shared.data.listing import listed_logps
from shared.data.samples import PromptSamples, listing_of, read_log_ref, read_samples
from shared.generation.engine import Sampling
from shared.models.load import load_policy, load_tokenizer, special_ids
from shared.models.scorer import Scorer


class World:
    """What the stage `list_reference` wrote: P prompts with N completions each."""

    def __init__(self, listed: Path):
        self.rows: list[PromptSamples] = read_samples(listed)
        self.log_ref = torch.tensor(read_log_ref(listed), dtype=torch.float64)
        self.gold = torch.tensor([row.gold for row in self.rows], dtype=torch.float64)

    def logps(self, folder: Path, sampling: Sampling) -> Tensor:
        """log of a policy's probability of every completion, (P, N)."""
        prompts = [row.prompt_ids for row in self.rows]
        pad_id = special_ids(load_tokenizer(folder)).pad
        with torch.no_grad():
            model = load_policy(folder).eval()
            return listed_logps(model, prompts, listing_of(folder, sampling), pad_id)

    def scores(self, reward_model: Path) -> Tensor:
        """The reward model's score of every completion, (P, N)."""
        completions = [c for row in self.rows for c in row.completions]
        prompts = [row.prompt_ids for row in self.rows for _ in row.completions]
        return Scorer(reward_model).score_all(prompts, completions).double().view_as(self.gold)

    def expectations(
        self, logps: Tensor, scores: Tensor | None, eos_id: int
    ) -> list[dict[str, float]]:
        """One row a prompt: gold, KL and what else evaluation rows hold, exact. `logps` (P, N)."""
        lengths = torch.tensor([[len(c) for c in row.completions] for row in self.rows])
        cut = torch.tensor([[c[-1] != eos_id for c in row.completions] for row in self.rows])
        columns = {
            "gold": expected(logps, self.gold),
            "kl": kl(logps, self.log_ref),
            "length": expected(logps, lengths.double()),
            "truncated": expected(logps, cut.double()),
            "win_rate": self.win_rate(logps),
        }
        if scores is not None:
            columns["score"] = expected(logps, scores)
        return [
            {name: column[i].item() for name, column in columns.items()}
            for i in range(len(self.rows))
        ]

    def win_rate(self, logps: Tensor) -> Tensor:
        """P(gold > the reference's gold) + P(equal) / 2, (P,)."""
        sign = (self.gold.unsqueeze(2) - self.gold.unsqueeze(1)).sign()
        return (1 + torch.einsum("pi,pij,pj->p", logps.exp(), sign, self.log_ref.exp())) / 2

    def regret(self, beta: float, gold: float, kl: float) -> float:
        """J(pi*) - J(pi) of a policy with mean `gold` and mean `kl`, both over all prompts.

        J = gold - beta * KL, and J(pi*) = beta log Z: in gold's units. It is beta * KL(pi || pi*).
        """
        best = beta * log_partition(self.log_ref, self.gold, beta).mean()
        return float(best) - (gold - beta * kl)
