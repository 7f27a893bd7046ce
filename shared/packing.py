"""Forward passes over real tokens only: no padding, and a prompt once for all of its completions.

Everything in a decoder but attention works token by token, so those parts see one flat row of the
batch's distinct tokens. Attention alone needs rows: it gathers them from the flat row (a shared
prompt's keys and values into each row that holds it), runs causally on rows aligned to the left,
where padding comes last and is never looked at, and puts the outputs back.

It plugs into transformers as an attention implementation, so the models stay the library's own.
The last layer's MLP sees only the tokens whose states are read: its others end in nothing.
Families other than FAMILIES, and models that attend through a sliding window, run on padded rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from shared.sequences import Sequences

PACKED, READ = "klash_packed", "packed_read"
SHORT = 2**22  # attention weights of a layer, up to which they are computed all at once
FAMILIES = ("llama", "gpt_neox", "gpt2", "qwen2", "qwen3")


class Packed(NamedTuple):
    """N distinct tokens of a batch of B rows, the longest with L real tokens."""

    ids: Tensor  # (1, N)
    positions: Tensor  # (1, N), of each token in its own row
    place: Tensor  # (B, P + T) number of the token there; 0 where there is padding
    rows: Tensor  # (B, L) the same with rows aligned to the left
    back: Tensor  # (N,) where in the flattened `rows` each token's attention is read


def pack(batch: Sequences) -> Packed:
    """The distinct tokens of `batch`: all completions, and each distinct prompt once."""
    real, width = batch.attention.bool(), batch.prompt_width
    owner = prompt_owners(batch)
    kept = real.clone()
    kept[:, :width] &= (owner == torch.arange(len(real), device=real.device)).unsqueeze(1)
    number = kept.flatten().cumsum(0).view(real.shape) - 1
    number[:, :width] = number[owner, :width]
    place = number.masked_fill(~real, 0)

    start, length = real.int().argmax(1), real.sum(1)
    column = torch.arange(int(length.max()), device=real.device)
    source = (start.unsqueeze(1) + column).clamp(max=real.shape[1] - 1)
    rows = place.gather(1, source).masked_fill(column >= length.unsqueeze(1), 0)
    in_row, in_column = kept.nonzero(as_tuple=True)
    back = in_row * len(column) + in_column - start[in_row]
    return Packed(batch.ids[kept][None], batch.positions[kept][None], place, rows, back)


def distinct_tokens(batch: Sequences) -> tuple[int, int]:
    """How many tokens `pack` leaves, and how many of them predict a completion's."""
    owner = prompt_owners(batch)
    prompts = batch.attention[:, : batch.prompt_width].sum(1)
    alone = owner == torch.arange(len(owner), device=owner.device)
    completions, again = int(batch.mask.sum()), int((~alone).sum())
    return int(prompts[alone].sum()) + completions, completions - again


def prompt_owners(batch: Sequences) -> Tensor:
    """The first row with the same prompt, of each row, (B,).

    By a dictionary, which takes a third of the time of `unique`, row by row as that is.
    """
    width = batch.prompt_width
    padding = batch.attention[:, :width] == 0
    prompts = batch.ids[:, :width].masked_fill(padding, -1).cpu().numpy()
    first: dict[bytes, int] = {}
    owners = [first.setdefault(prompt.tobytes(), row) for row, prompt in enumerate(prompts)]
    return torch.tensor(owners, device=batch.ids.device)


def packs(model: PreTrainedModel) -> bool:
    """Whether `model` runs on packed tokens."""
    return model.config._attn_implementation == PACKED


def let_pack(model: PreTrainedModel) -> PreTrainedModel:
    """Switch `model` to packed passes if its family is known; generation works as before."""
    windows = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
    if model.config.model_type in FAMILIES and not windows:
        model.set_attn_implementation(PACKED)
        below: Any = getattr(model, model.base_model_prefix)
        last = below.h[-1] if model.config.model_type == "gpt2" else below.layers[-1]
        if not hasattr(last.mlp, READ):
            last.mlp.packed_read = None
            last.register_forward_pre_hook(_tell_mlp, with_kwargs=True)
            last.mlp.register_forward_pre_hook(_gather_read)
            last.mlp.register_forward_hook(_spread_read)
    return model


def packed_inputs(packed: Packed, read: Tensor) -> dict[str, Any]:
    """Arguments of a forward pass after which the states of the tokens with the numbers `read` are
    right, and others not. The mask is not read: of four axes, it is taken as it is.
    """
    wanted = packed.ids.new_zeros(packed.ids.shape[1], dtype=torch.bool)
    wanted[read] = True
    return {
        "input_ids": packed.ids,
        "position_ids": packed.positions,
        "attention_mask": packed.ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
        "use_cache": False,
        "packed_rows": packed.rows,
        "packed_back": packed.back,
        "packed_read": wanted.nonzero().squeeze(1),
    }


def _tell_mlp(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Of the last layer: its MLP is not told by transformers what is read."""
    read = kwargs.get("packed_read")
    layer.mlp.packed_read = None if read is None else (read, len(kwargs["packed_back"]))


def _gather_read(mlp: Any, args: tuple[Tensor]) -> Tensor | None:
    return None if mlp.packed_read is None else args[0].index_select(1, mlp.packed_read[0])


def _spread_read(mlp: Any, args: Any, output: Tensor) -> Tensor | None:
    if mlp.packed_read is None:
        return None
    (read, tokens), mlp.packed_read = mlp.packed_read, None
    return output.new_zeros(1, tokens, output.shape[2]).index_copy(1, read, output)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_rows: Tensor | None = None,
    packed_back: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA, on rows gathered from (1, heads, N, size) where tokens are packed."""
    if packed_rows is None or packed_back is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query, key, value = (_gather(t, packed_rows) for t in (query, key, value))
    if query.is_cpu and query[..., 0].numel() * packed_rows.shape[1] <= SHORT:
        output = short_attention(query, key, value, options.get("scaling"))
    else:
        rows = query, key, value
        output, _ = sdpa_attention_forward(module, *rows, attention_mask=None, **options)
    return output.flatten(0, 1).index_select(0, packed_back).unsqueeze(0), None


def short_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention, (B, heads, L, size) -> (B, L, heads, size), in float32, whatever surrounds.

    Three plain steps, all weights at once: on a CPU faster for short rows than SDPA's blocks, in
    bfloat16 several times. Fewer key heads than query heads are shared as in the models.
    """
    count, heads, length, size = query.shape
    shared = key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        q = query.float().reshape(count * shared, -1, size) * (scaling or size**-0.5)
        k, v = (t.reshape(count * shared, length, size) for t in (key.float(), value))
        future = torch.full((length, length), -torch.inf).triu(1).repeat(heads // shared, 1)
        weights = torch.baddbmm(future.expand(len(q), -1, -1), q, k.transpose(1, 2)).softmax(-1)
        output = torch.bmm(weights.to(v.dtype), v)
    return output.view(count, heads, length, size).transpose(1, 2).to(query.dtype)


def _gather(tensor: Tensor, rows: Tensor) -> Tensor:
    """(1, heads, N, size) -> (B, heads, L, size)"""
    flat = tensor[0].transpose(0, 1).index_select(0, rows.flatten())
    return flat.view(*rows.shape, *flat.shape[1:]).transpose(1, 2)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
