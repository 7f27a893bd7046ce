"""Sampling with transformers' `generate`."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel

from shared.generation.engine import Completions, Sampling
from shared.logprobs import by_length
from shared.models import SpecialIds


class HFEngine:
    """Samples from the very weights that train: there is nothing to synchronise."""

    def __init__(self, model: PreTrainedModel, ids: SpecialIds, batch_size: int = 1024):
        self.model, self.batch_size = model, batch_size
        self.pad_id, self.eos_id = ids

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Completions:
        """See `Engine.generate`. The same seed, weights and prompts give the same tokens."""
        ids: list[list[int]] = [[] for _ in prompts]
        was_training = self.model.training
        self.model.eval()
        with torch.random.fork_rng():
            torch.manual_seed(sampling.seed)
            for rows in by_length([len(p) for p in prompts], self.batch_size):
                outputs = self._generate_batch([prompts[i] for i in rows], sampling)
                for row, tokens in zip(rows, outputs, strict=True):
                    ids[row] = self._until_eos(tokens)
        self.model.train(was_training)
        return Completions(ids, [tokens[-1] != self.eos_id for tokens in ids])

    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts])
        attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        output = self.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids.to(self.model.device),
            attention_mask=attention.to(self.model.device),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=sampling.temperature > 0,
                temperature=sampling.temperature or None,
                top_k=0 if sampling.temperature else None,
                top_p=1.0 if sampling.temperature else None,
                pad_token_id=self.pad_id,
                eos_token_id=self.eos_id,
            ),
        )
        return output[:, width:].tolist()

    def _until_eos(self, tokens: list[int]) -> list[int]:
        end = tokens.index(self.eos_id) + 1 if self.eos_id in tokens else len(tokens)
        return tokens[:end]
