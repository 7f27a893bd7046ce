"""LoRA: a policy as its frozen start and a small difference that trains.

Hu et al. 2021 (arXiv:2106.09685): W + alpha / rank * B A in every linear layer but the head. peft
does it; here is how Klash uses it. With the adapter off the policy is its start, so that PPO holds
no second copy of the model as its reference.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.config import Config
from shared.models import ops

VALUE_HEAD = "value_head"  # of a policy whose trunk PPO's value function shares
SCALAR_HEAD = "score"  # of reward and value models, as transformers names it


class LoRAConfig(Config):
    """W + alpha / rank * B A in every linear layer but the head."""

    rank: int = Field(default=16, gt=0)
    """Rank r of each layer's difference B A."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale of the difference, which is multiplied by alpha / rank."""


def with_lora(model: PreTrainedModel, lora: LoRAConfig | None, seed: int) -> PreTrainedModel:
    """`model` under a fresh adapter, which alone trains; without `lora` the model as it is.

    B starts at 0, so that nothing it says changes; `seed` draws A. The head of a model of scalars
    (`score`) has no adapter and trains whole.
    """
    if lora is None:
        return model
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = getattr(model, SCALAR_HEAD, None)
        whole = None if head is None else [SCALAR_HEAD]
        policy: Any = peft.get_peft_model(model, adapter(lora, whole))
    for layer in adapted_layers(policy).values():
        layer.forward = MethodType(_forward, layer)
    if head is not None:
        head.requires_grad_(True)
    return policy


def _forward(self: Any, x: Tensor) -> Tensor:
    """`forward` of an adapted layer, as peft has it, in fewer passes over memory."""
    base, weight = self.base_layer, self.base_layer.weight
    off = self.disable_adapters or self.merged
    single = x.dtype == weight.dtype == torch.float32
    autocast = torch.is_autocast_enabled(x.device.type)
    if off or type(base) is not nn.Linear or not single or autocast:
        return type(self).forward(self, x)
    (name,) = self.active_adapters
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    return ops.adapted(x, weight, base.bias, a, b, self.scaling[name])


def adapter(lora: LoRAConfig, whole: list[str] | None = None) -> Any:
    """`lora` as peft's configuration; layers named `whole` get no adapter."""
    import peft  # here, since it takes seconds to import

    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        target_modules="all-linear",
        exclude_modules=whole,
    )


def below_lora(model: Any) -> PreTrainedModel:
    """The transformers model itself, with the adapter's layers in it where there are any."""
    base = getattr(model, "get_base_model", None)  # peft's
    return model if base is None else base()


def plain_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The weights as a plain transformers folder would hold them, detached; no value head.

    LoRA is added to copies, one matrix at a time: the base weights are read and never written.
    Weights that two layers share are named once.
    """
    adapted = adapted_layers(model)
    for name, weight in below_lora(model).named_parameters():
        if ".lora_" in name or name.startswith(f"{VALUE_HEAD}."):
            continue
        plain = name.replace(".base_layer.", ".")
        layer = adapted.get(plain.removesuffix(".weight"))
        yield plain, weight.detach() if layer is None else merged_weight(layer)


def adapted_layers(model: PreTrainedModel) -> dict[str, Any]:
    """peft's LoRA layers by name; of a model without an adapter none."""
    if (below := below_lora(model)) is model:
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in below.named_modules() if isinstance(m, LoraLayer)}


def merged_weight(layer: Any) -> Tensor:
    """A layer's weight with LoRA added, a copy."""
    weight = layer.base_layer.weight.detach()
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter).detach()
    return weight


@contextmanager
def merged(model: PreTrainedModel) -> Iterator[None]:
    """Within it the policy says the same from fewer products: LoRA is in its weights.

    For passes without gradients. Afterwards the base weights are what they were, to the bit.
    """
    layers = [*adapted_layers(model).values()]
    if not layers:
        yield
        return
    kept = [layer.base_layer.weight for layer in layers]
    try:
        for layer in layers:
            layer.base_layer.weight = nn.Parameter(merged_weight(layer), requires_grad=False)
        with model.disable_adapter():  # pyright: ignore[reportCallIssue]
            yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.base_layer.weight = weight


def add_value_head(model: PreTrainedModel) -> PreTrainedModel:
    """Let the policy say V too, of its last hidden states: V = 0 at the start."""
    below = below_lora(model)
    head = nn.Linear(below.config.get_text_config().hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    setattr(below, VALUE_HEAD, head.to(below.device))
    return model


def value_head(model: PreTrainedModel) -> nn.Linear:
    """What `add_value_head` added."""
    return getattr(below_lora(model), VALUE_HEAD)
