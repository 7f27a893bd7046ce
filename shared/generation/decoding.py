"""Sampling's forward passes of a model that packs: prompts without padding, then a token a row.

Each step sees one flat row of tokens, as packed passes do. Attention alone knows the rows:
their keys and values of all layers lie in one tensor with room for all that will come, prompts
aligned to the right, so that a step writes one column and copies nothing else.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.models import ops
from shared.models.attention import Pass
from shared.models.load import trunk
from shared.models.packing import pack_rows, pass_inputs


class Decoding:
    """B rows, each a prompt's, which grow by a token a step, at most `room` times.

    Row b begins with `prompts[rows[b]]`, all different; what they begin with in common is read
    once.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], rows: Tensor, room: int
    ):
        self.model, self.prompts, self.rows = model, prompts, rows.to(model.device)
        self.width = max(map(len, prompts))  # columns that are filled
        self.columns = -(-(self.width + room) // ops.VECTOR) * ops.VECTOR
        self.cache: Tensor | None = None  # (layers, 2, B, kv, columns, size)

    def start(self) -> Tensor:
        """Read the prompts: logits of each row's first token, (B, V)."""
        device = self.model.device
        padded = [[*prompt, *[-1] * (self.width - len(prompt))] for prompt in self.prompts]
        packed = pack_rows(torch.tensor(padded, device=device))
        lengths = packed.lengths
        last = packed.rows.gather(1, lengths.unsqueeze(1) - 1).squeeze(1)
        prompts = _Prompts(self, *packed[3:], read=last)
        self.first = self.width - lengths[self.rows]  # (B,) columns before each row's prompt
        places = torch.arange(self.width, device=device) - self.first.unsqueeze(1)
        self.tokens = packed.rows[self.rows].gather(1, places.clamp(min=0))  # (B, width)
        self.positions = lengths[self.rows] - 1
        states = self._states(packed.ids, packed.positions, prompts)[last]
        return self._logits(states)[self.rows]

    def step(self, tokens: Tensor) -> Tensor:
        """Let each row grow by its token, (B,): logits of the next one, (B, V)."""
        self.positions = self.positions + 1
        states = self._states(tokens.unsqueeze(0), self.positions.unsqueeze(0), self)
        self.width += 1
        return self._logits(states)

    def keep(self, rows: Tensor) -> None:
        """Go on with `rows` only, in this order: those that are where they were are not copied."""
        assert self.cache is not None
        new = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        self.cache[:, :, new, :, : self.width] = self.cache[:, :, rows[new], :, : self.width]
        self.cache = self.cache[:, :, : len(rows)]
        self.first, self.positions = self.first[rows], self.positions[rows]

    def attend(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Of a step: (B, heads, size), (B, kv, size) twice -> (B, heads, size), in float32."""
        assert self.cache is not None
        keys, values = self.cache[layer.layer_idx]
        keys[:, :, self.width], values[:, :, self.width] = key, value
        output = ops.attend_step(query, keys, values, self.first, self.width + 1, scaling)
        return output.to(value.dtype)

    def take(self, layer: Any, key: Tensor, value: Tensor) -> None:
        """Keep the prompts' keys and values of a layer, (N, kv, size), for every row."""
        if self.cache is None:
            layers = self.model.config.get_text_config().num_hidden_layers
            room = layers, 2, len(self.rows), key.shape[1], self.columns, key.shape[2]
            self.cache = torch.empty(room, device=key.device)
            self.cache[..., self.width : ops.VECTOR, :] = 0  # hidden, but read
        for kept, tokens in zip(self.cache[layer.layer_idx], (key, value), strict=True):
            kept[:, :, : self.width] = tokens[self.tokens].transpose(1, 2)

    def _states(self, ids: Tensor, positions: Tensor, packed: Any) -> Tensor:
        return trunk(self.model)(**pass_inputs(ids, positions, packed)).last_hidden_state[0]

    def _logits(self, states: Tensor) -> Tensor:
        head: nn.Module = self.model.get_output_embeddings()  # pyright: ignore
        return head(states)


class _Prompts(Pass):
    """The first pass, whose keys and values are kept."""

    def __init__(self, decoding: Decoding, *rows: Tensor, read: Tensor):
        super().__init__(*rows, read=read)
        self.decoding = decoding

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        self.decoding.take(layer, key, value)
        return super().attend(layer, query, key, value, scaling)
