"""Sampling with transformers: the model's own forward pass, step by step.

`model.generate` keeps computing rows that have ended; here they leave the batch and its cache,
which about halves the work where lengths differ, and a prompt is read once for all of its
completions. The distribution is the model's own, divided by the temperature and nothing else.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from shared.generation.decoding import Decoding
from shared.generation.engine import Completions, Drawn, Sampling, in_order, require_tokens
from shared.models import ops, ranks
from shared.models.cost import count_samples
from shared.models.load import SpecialIds
from shared.models.lora import merged
from shared.models.packing import packs
from shared.models.sequences import Limit, by_length

SAMPLING = Limit(512, 2**16)  # whose keys and values are held at once
LEAVE_BELOW = 0.8  # share of rows still going under which the ended ones leave the cache


class HFEngine:
    """Samples from the very weights that train: there is nothing to synchronise."""

    exact = True

    def __init__(self, model: PreTrainedModel, ids: SpecialIds, limit: Limit = SAMPLING):
        self.model, self.ids, self.limit = model, ids, limit

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Completions:
        """See `Engine.generate`. The same seed, weights and prompts give the same tokens."""
        require_tokens(prompts)
        found: dict[int, Drawn] = {}
        own = ranks.mine(range(len(prompts)))
        was_training = self.model.training
        self.model.eval()
        # A prompt's numbers are its own: what others draw, and when they end, changes none
        generator = torch.Generator().manual_seed(sampling.seed)
        numbers = torch.rand(
            len(prompts), sampling.max_new_tokens, generator=generator, dtype=torch.float64
        )
        with ranks.whole(self.model), merged(self.model):
            room = [sampling.max_new_tokens] * len(own)
            for group in by_length([len(prompts[i]) for i in own], room, self.limit):
                rows = [own[i] for i in group]
                batch = [prompts[i] for i in rows], numbers[torch.tensor(rows)]
                drawn = self._generate_batch(*batch, sampling.temperature)
                for row, tokens, at in zip(rows, *(t.tolist() for t in drawn), strict=True):
                    end = length_of(tokens, self.ids.ends)
                    cut = tokens[end - 1] not in self.ids.ends
                    found[row] = tokens[:end], cut, at[:end]
        self.model.train(was_training)
        count_samples(self.model, [prompts[i] for i in own], [found[i][0] for i in own])
        return in_order(ranks.gathered(found))

    def sync(self) -> float:
        """The weights are the model's own."""
        return 0.0

    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], numbers: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """(tokens, their log-probabilities), (B, T) each; after an end comes padding.

        `numbers` (B, T), in [0, 1): each draws a token, of at most T.
        """
        read, rows = _read_once(prompts) if ops.active().beginnings_once else _read_each(prompts)
        if packs(self.model) and ops.active().packed_sampling:
            decoding = Decoding(self.model, read, rows, room=numbers.shape[1])
        else:
            decoding = PaddedDecoding(self.model, read, rows, pad_id=self.ids.pad)
        logits, device = decoding.start(), self.model.device
        numbers = numbers.to(device)
        ends = torch.tensor(sorted(self.ids.ends), device=device)
        output = torch.full(numbers.shape, self.ids.pad, device=device)
        logprobs = torch.zeros(output.shape, device=device)
        going = torch.arange(len(prompts), device=device)  # output rows of those still decoded
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        for t in range(numbers.shape[1]):
            tokens, logprobs[going, t] = _draw(logits.float(), numbers[going, t], temperature)
            output[going, t] = tokens.masked_fill(ended, self.ids.pad)
            ended = ended | torch.isin(tokens, ends)
            if ended.all() or t + 1 == numbers.shape[1]:
                break
            if (~ended).sum() < LEAVE_BELOW * len(ended):
                stay = moved_up(~ended)
                decoding.keep(stay)
                going, ended, tokens = going[stay], ended[stay], tokens[stay]
            logits = decoding.step(tokens)
        return output, logprobs


def length_of(tokens: list[int], ends: frozenset[int]) -> int:
    """Tokens up to the first that ends a completion, with it; all where none does."""
    return next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))


def moved_up(going: Tensor) -> Tensor:
    """The rows that are `going`, (B,), with those at the end where others have gone: few move."""
    count = int(going.sum())
    order = torch.arange(count, device=going.device)
    gone = (~going[:count]).nonzero().squeeze(1)
    order[gone] = count + going[count:].nonzero().squeeze(1)
    return order


class PaddedDecoding:
    """`Decoding` for models that do not pack: transformers' cache, prompts padded on the left."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], rows: Tensor, pad_id: int
    ):
        self.model, self.rows = model, rows.to(model.device)
        width = max(map(len, prompts))
        padded = [[pad_id] * (width - len(p)) + list(p) for p in prompts]
        real = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        self.ids = torch.tensor(padded, device=model.device)
        self.attention = torch.tensor(real, device=model.device)
        self.cache = DynamicCache(config=model.config)

    def start(self) -> Tensor:
        self.positions = (self.attention.cumsum(1) - 1).clamp(min=0)
        logits = self._next(self.ids)
        self.positions = self.positions[:, -1:]
        self.keep(self.rows)
        return logits[self.rows]

    def step(self, tokens: Tensor) -> Tensor:
        self.positions = self.positions + 1
        step = tokens.unsqueeze(1)
        self.attention = torch.cat([self.attention, torch.ones_like(step)], dim=1)
        return self._next(step)

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.attention, self.positions = self.attention[rows], self.positions[rows]

    def _next(self, ids: Tensor) -> Tensor:
        return self.model(
            input_ids=ids,
            attention_mask=self.attention,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def _draw(logits: Tensor, numbers: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability, (B, V) -> (B,) each; at temperature 0 the likeliest.

    A row's token is where its number, in [0, 1), falls among the cumulated probabilities, summed in
    float64. Greedy tokens have the log-probability of temperature 1.
    """
    probabilities = (logits / (temperature or 1.0)).softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        up_to = probabilities.cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(up_to, numbers.unsqueeze(1) * up_to[:, -1:], right=True)
        tokens = tokens.clamp(max=logits.shape[1] - 1)
    return tokens.squeeze(1), probabilities.gather(1, tokens).log().squeeze(1)


def _read_once(prompts: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], Tensor]:
    """(different prompts, the number of each row's among them)."""
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    return list(distinct), torch.tensor([distinct[tuple(p)] for p in prompts])


def _read_each(prompts: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], Tensor]:
    """`_read_once` where each row has its own."""
    return list(map(tuple, prompts)), torch.arange(len(prompts))
