"""Forward passes over tokens that matter: no padding, what rows begin with in common once, and no
token that nothing reads, such as the EOS that ends a completion whose log-probability is asked for.

What rows have in common is a prompt with several completions, a chat's system prompt, a template's
first words.

Everything in a decoder but attention works token by token, so those parts see one flat row of the
batch's distinct tokens; `shared.models.attention` knows which of them see each other.

It plugs into transformers as an attention implementation, so the models stay the library's own.
The last layer's MLP sees only the tokens whose states are read: its others end in nothing. Models
of Llama's kind also take `shared.models.ops` for their norms, rotary positions and MLPs.
Families other than FAMILIES, and models that attend through a sliding window, run on padded rows.
"""

from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from shared.models import ops
from shared.models.attention import Pass, packed_attention, rotary_attention
from shared.models.sequences import Sequences

PACKED, READ = "klash_packed", "packed_read"
ROTARY = ("llama", "qwen2", "qwen3")  # RMSNorm, and rotary positions on whole heads
FAMILIES = (*ROTARY, "gpt_neox", "gpt2")


class Packed(NamedTuple):
    """N distinct tokens of a batch of B rows, the longest with L real tokens."""

    ids: Tensor  # (1, N)
    positions: Tensor  # (1, N), of each token in its own row
    place: Tensor  # (B, P + T) number of the token there; 0 where there is padding
    rows: Tensor  # (B, L) the same with rows aligned to the left
    back: Tensor  # (N,) where in the flattened `rows` each token's attention is read
    starts: Tensor  # (B,) tokens of a row that another one computes: a shared beginning's
    lengths: Tensor  # (B,) tokens of a row


def pack(batch: Sequences, at: Tensor) -> Packed:
    """The distinct tokens of `batch` that states at `at` (B, P + T) depend on.

    What rows begin with in common is there once, and what follows a row's last `at` is not.
    """
    real = seen_from(batch, at) if ops.active().read_only else batch.attention.bool()
    start, lengths = real.int().argmax(1), real.sum(1)
    column = torch.arange(int(lengths.max()), device=real.device)
    ids = batch.ids.gather(1, (start.unsqueeze(1) + column).clamp(max=real.shape[1] - 1))
    inside = column < lengths.unsqueeze(1)
    packed = pack_rows(ids.masked_fill(~inside, -1))
    place = torch.zeros_like(batch.ids).masked_scatter(real, packed.rows[inside])
    return packed._replace(place=place)


def seen_from(batch: Sequences, at: Tensor) -> Tensor:
    """The real tokens of each row up to its last one `at`, (B, P + T)."""
    return batch.attention.bool() & at.flip(1).cummax(1).values.flip(1)


def pack_rows(ids: Tensor) -> Packed:
    """`pack` of rows that are aligned to the left, with -1 after each, (B, L)."""
    new, rows = number_distinct(ids) if ops.active().beginnings_once else number_all(ids)
    lengths = (ids >= 0).sum(1)
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)[new]
    back = new.flatten().nonzero().squeeze(1)
    return Packed(ids[new][None], positions[None], rows, rows, back, lengths - new.sum(1), lengths)


def number_distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where tokens are computed, and the number of the token in each place, 0 after a row; (B, L).

    `ids` (B, L): rows, then -1. Of rows that are equal up to a token one computes it. In
    alphabetical order a row has most in common with the one before it.
    """
    order = torch.tensor(sorted(range(len(ids)), key=ids.tolist().__getitem__), device=ids.device)
    own, ordered = torch.arange(len(ids), device=ids.device).unsqueeze(1), ids[order]
    shared = torch.zeros_like(ids, dtype=torch.bool)
    shared[1:] = (ordered[1:] == ordered[:-1]).cumprod(1)
    holder = own.masked_fill(shared, 0).cummax(0).values
    holder = order[holder][order.argsort()]  # the row that computes the token in each place
    new = (holder == own) & (ids >= 0)
    number = new.flatten().cumsum(0).view(new.shape) - 1
    return new, number.gather(0, holder).masked_fill(ids < 0, 0)


def number_all(ids: Tensor) -> tuple[Tensor, Tensor]:
    """`number_distinct` where every row computes all of its tokens."""
    new = ids >= 0
    number = new.flatten().cumsum(0).view(new.shape) - 1
    return new, number.masked_fill(~new, 0)


def packs(model: PreTrainedModel) -> bool:
    """Whether `model` runs on packed tokens."""
    return model.config._attn_implementation == PACKED


def let_pack(model: PreTrainedModel) -> PreTrainedModel:
    """Switch `model` to packed passes if its family is known; generation works as before."""
    windows = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
    if ops.active().packed and model.config.model_type in FAMILIES and not windows:
        model.set_attn_implementation(PACKED)
        below: Any = getattr(model, model.base_model_prefix)
        last = below.h[-1] if model.config.model_type == "gpt2" else below.layers[-1]
        if not hasattr(last.mlp, READ):
            last.mlp.packed_read = None
            last.register_forward_pre_hook(_tell_mlp, with_kwargs=True)
            last.mlp.register_forward_pre_hook(_gather_read)
            last.mlp.register_forward_hook(_spread_read)
        with_ops(model)
    return model


def with_ops(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model` compute with `shared.models.ops`, packed or not: all of Llama's kind, and of
    others the matrix products.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_linear, module)
    if model.config.model_type in ROTARY:
        for module in model.modules():
            if hasattr(module, "q_proj"):
                module.forward = MethodType(rotary_attention, module)
            elif hasattr(module, "variance_epsilon"):
                module.forward = MethodType(_norm, module)
            elif hasattr(module, "up_proj") and model.config.hidden_act == "silu":
                module.forward = MethodType(_mlp, module)
    return model


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    """`forward` of an RMSNorm layer, as its class has it."""
    return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _linear(self: Any, x: Tensor) -> Tensor:
    """`forward` of a linear layer, as its class has it."""
    return ops.linear(x, self.weight, self.bias)


def _mlp(self: Any, x: Tensor) -> Tensor:
    """`forward` of an MLP with SwiGLU, as its class has it."""
    return self.down_proj(ops.swiglu(*ops.linears(x, (self.gate_proj, self.up_proj))))


def packed_inputs(packed: Packed, read: Tensor) -> dict[str, Any]:
    """Arguments of a forward pass after which the states of the tokens with the numbers `read` are
    right, and others not. The mask is not read: of four axes, it is taken as it is.
    """
    wanted = packed.ids.new_zeros(packed.ids.shape[1], dtype=torch.bool)
    wanted[read] = True
    rows = Pass(
        packed.rows, packed.back, packed.starts, packed.lengths, read=wanted.nonzero().squeeze(1)
    )
    return pass_inputs(packed.ids, packed.positions, rows)


def pass_inputs(ids: Tensor, positions: Tensor, packed: Any) -> dict[str, Any]:
    """Of tokens, (1, N), in a pass whose rows `packed` knows."""
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
        "use_cache": False,
        "packed": packed,
    }


def _tell_mlp(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Of the last layer: its MLP is not told by transformers what is read."""
    packed = kwargs.get("packed")
    read = getattr(packed, "read", None) if ops.active().read_only else None
    layer.mlp.packed_read = None if read is None else (read, len(packed.back))  # pyright: ignore


def _gather_read(mlp: Any, args: tuple[Tensor]) -> Tensor | None:
    return None if mlp.packed_read is None else args[0].index_select(1, mlp.packed_read[0])


def _spread_read(mlp: Any, args: Any, output: Tensor) -> Tensor | None:
    if mlp.packed_read is None:
        return None
    (read, tokens), mlp.packed_read = mlp.packed_read, None
    return output.new_zeros(1, tokens, output.shape[2]).index_copy(1, read, output)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
