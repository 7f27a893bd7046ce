"""Attention where a batch's tokens are packed (`shared.models.packing`).

Rows of tokens attend causally, a shared beginning's tokens once, in the row that computes them.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from shared.models import ops


@dataclass
class Pass:
    """One packed pass: what attention and the last layer's MLP need to know of its tokens."""

    rows: Tensor  # (B, L) number of the token in each place; 0 where there is padding
    back: Tensor  # (N,) where in the flattened `rows` each token's attention is read
    starts: Tensor  # (B,) tokens of a row that another one computes: a shared beginning's
    lengths: Tensor  # (B,) tokens of a row
    read: Tensor  # (R,) numbers of the tokens whose last states are read

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Causal, (N, heads, size), (N, kv, size) twice -> (N, heads, size)."""
        return ops.attend(query, key, value, self, scaling)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """For transformers: (1, heads, N, size) of packed tokens -> (1, N, heads, size); else SDPA.

    `packed` knows which of the tokens see each other: a Pass, or what sampling keeps.
    """
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    tokens = (t[0].transpose(0, 1) for t in (query, key, value))
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return packed.attend(module, *tokens, scaling).unsqueeze(0), None


def rotary_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`forward` of an attention layer of Llama's kind, as its class has it, but that packed tokens
    take no detour over (1, heads, N, size)."""
    packed = options.get("packed")
    if packed is None or position_embeddings is None:
        rest = position_embeddings, attention_mask, past_key_values
        return type(self).forward(self, hidden_states, *rest, **options)
    cos, sin = (t[0].unsqueeze(1) for t in position_embeddings)
    query, key, value = (
        states[0].unflatten(-1, (-1, self.head_dim))
        for states in ops.linears(hidden_states, (self.q_proj, self.k_proj, self.v_proj))
    )
    if hasattr(self, "q_norm"):
        query, key = self.q_norm(query), self.k_norm(key)
    query, key = ops.rotate(query, cos, sin), ops.rotate(key, cos, sin)
    output = packed.attend(self, query, key, value, self.scaling)
    return self.o_proj(output.flatten(1).unsqueeze(0)), None
