"""A device that is the CPU in all but its name, for tests of where models and batches lie.

Tensors on it say `meta` and hold CPU data. As on a GPU, what mixes them with tensors of the CPU
raises; numbers (tensors without dimensions) may come from the CPU, and so may indices.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel

from shared.models import device as devices

PRETEND = torch.device("meta")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class Elsewhere(torch.Tensor):
    """`held` on the CPU, under another device's name."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Elsewhere":
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=PRETEND, requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, where its tensors lie; RuntimeError where they lie in two places."""
    name = func.__name__.partition(".")[0]
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    here = any(isinstance(t, Elsewhere) for t in tensors)
    to = kwargs.get("device")
    moves = name in ("_to_copy", "copy_")
    if here and not moves:
        for t in tensors[:1] if name in INDEXED else tensors:
            if not isinstance(t, Elsewhere) and t.dim() > 0:
                raise RuntimeError(f"{name}: tensors on two devices")
    target = PRETEND if here else None
    if to is not None:
        target = PRETEND if torch.device(to) == PRETEND else None
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name == "copy_":
        target = PRETEND if isinstance(args[0], Elsewhere) else None
    held = tree_map(lambda t: t.held if isinstance(t, Elsewhere) else t, (args, kwargs))
    out = func(*held[0], **held[1])
    if name.endswith("_") and not name.endswith("__") and isinstance(out, torch.Tensor):
        return args[0]
    if target is None:
        return out
    return tree_map(lambda t: Elsewhere(t) if isinstance(t, torch.Tensor) else t, out)


class Pretending(TorchDispatchMode):
    """Makes tensors on the pretended device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Lists(TorchFunctionMode):
    """`torch.tensor` works out of sight of the other mode: here on the CPU, then moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it all that Klash loads lies on the pretended device."""
    with monkeypatch.context() as patch, Pretending(), Lists():
        for module in [m for m in sys.modules.values() if holds_device(m)]:
            patch.setattr(module, "device", lambda: PRETEND)
        fused = "_get_fused_kernels_supported_devices"
        patch.setattr(sys.modules["torch.optim.optimizer"], fused, lambda: ["cpu", PRETEND.type])
        patch.setattr(PreTrainedModel, "to", moved)
        patch.setattr(torch, "is_autocast_enabled", lambda _: False)  # knows no device by this name
        yield


def moved(model: PreTrainedModel, *place: Any, **places: Any) -> PreTrainedModel:
    """`model.to`, which keeps tied weights one tensor only where data can be exchanged in place."""
    nn.Module.to(model, *place, **places)
    model.tie_weights()
    return model


def holds_device(module: Any) -> bool:
    """Whether a module has imported the function."""
    return vars(module).get("device") is devices.device
