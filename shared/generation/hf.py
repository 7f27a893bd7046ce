"""Sampling with transformers: the model's own forward pass and key-value cache, step by step.

`model.generate` keeps computing rows that have ended; here they leave the batch and its cache,
which about halves the work where lengths differ. The distribution is the model's own, divided by
the temperature and nothing else.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from shared.generation.engine import Completions, Sampling, require_tokens
from shared.models import SpecialIds
from shared.sequences import by_length

LEAVE_BELOW = 0.8  # share of rows still going under which the ended ones leave the cache


class HFEngine:
    """Samples from the very weights that train: there is nothing to synchronise."""

    exact = True

    def __init__(self, model: PreTrainedModel, ids: SpecialIds, batch_size: int = 512):
        self.model, self.batch_size = model, batch_size
        self.pad_id, self.eos_id = ids

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Completions:
        """See `Engine.generate`. The same seed, weights and prompts give the same tokens."""
        require_tokens(prompts)
        ids: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        was_training = self.model.training
        self.model.eval()
        with torch.random.fork_rng():
            torch.manual_seed(sampling.seed)
            for rows in by_length([len(p) for p in prompts], self.batch_size):
                drawn = self._generate_batch([prompts[i] for i in rows], sampling)
                for row, tokens, at in zip(rows, *(t.tolist() for t in drawn), strict=True):
                    end = tokens.index(self.eos_id) + 1 if self.eos_id in tokens else len(tokens)
                    ids[row], logprobs[row] = tokens[:end], at[:end]
        self.model.train(was_training)
        return Completions(ids, [tokens[-1] != self.eos_id for tokens in ids], logprobs)

    def sync(self) -> float:
        """The weights are the model's own."""
        return 0.0

    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> tuple[Tensor, Tensor]:
        """(tokens, their log-probabilities), (B, max_new_tokens); after an EOS comes padding."""
        device, width = self.model.device, max(map(len, prompts))
        distinct = {tuple(p): number for number, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
        padded = [[self.pad_id] * (width - len(p)) + list(p) for p in distinct]
        real = [[0] * (width - len(p)) + [1] * len(p) for p in distinct]
        step, attention = torch.tensor(padded).to(device), torch.tensor(real).to(device)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        logits = self._next(step, attention, positions, cache)
        # a prompt is read once for all of its completions
        rows = torch.tensor([distinct[tuple(p)] for p in prompts], device=device)
        cache.batch_select_indices(rows)
        logits, attention, positions = logits[rows], attention[rows], positions[rows]
        output = step.new_full((len(prompts), sampling.max_new_tokens), self.pad_id)
        logprobs = torch.zeros(output.shape, device=device)
        going = torch.arange(len(prompts), device=device)  # output rows of the cache's rows
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        for t in range(sampling.max_new_tokens):
            tokens, logprobs[going, t] = _draw(logits.float(), sampling.temperature)
            output[going, t] = tokens.masked_fill(ended, self.pad_id)
            ended = ended | (tokens == self.eos_id)
            if ended.all() or t + 1 == sampling.max_new_tokens:
                break
            step, positions = tokens.unsqueeze(1), positions[:, -1:] + 1
            attention = torch.cat([attention, torch.ones_like(step)], dim=1)
            if (~ended).sum() < LEAVE_BELOW * len(ended):
                stay = (~ended).nonzero().squeeze(1)
                cache.batch_select_indices(stay)
                going, ended, step = going[stay], ended[stay], step[stay]
                attention, positions = attention[stay], positions[stay]
            logits = self._next(step, attention, positions, cache)
        return output, logprobs

    def _next(
        self, step: Tensor, attention: Tensor, positions: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Logits of the token after `step`, (B, V); `cache` takes `step` in."""
        return self.model(
            input_ids=step,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def _draw(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability, (B, V) -> (B,) each; at temperature 0 the likeliest.

    Greedy tokens have the log-probability of temperature 1.
    """
    probabilities = (logits / (temperature or 1.0)).softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        tokens = torch.multinomial(probabilities, 1)
    return tokens.squeeze(1), probabilities.gather(1, tokens).log().squeeze(1)
