"""The one optimiser step and the plain loop around it, on one rank or several.

A loss function gets the model and one micro-batch and returns the mean over its items (pairs,
tokens, ...) with a few numbers to log; the caller says how many items each micro-batch holds, and
gradients and logged numbers are weighted by them, over all ranks. So cutting a batch into
micro-batches, or sharing it among ranks, changes memory and speed, never the result.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler

from shared.config import Config
from shared.models import ranks
from shared.models.device import device

T = TypeVar("T")
Precision = Literal["float32", "bfloat16"]
Loss = Callable[[PreTrainedModel, T], tuple[Tensor, Mapping[str, Tensor | float]]]


class Diverged(Exception):
    """Training left the finite numbers. The weights before the step are kept."""


class OptimizerConfig(Config):
    """AdamW, linear warm-up, then the schedule."""

    learning_rate: float = Field(gt=0)
    """Highest learning rate, reached at the end of the warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate falls to 0 after the warm-up; `constant`: it does not."""
    warmup_share: float = Field(default=0.05, ge=0, le=1)
    """Share of all steps in which the learning rate rises from 0."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Norm that a larger gradient is scaled down to."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay; a step subtracts learning rate * weight decay * weight."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon, added to the root of the second moment."""
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    """AdamW's beta2, the decay of the second moment; beta1 is 0.9."""
    precision: Precision = "float32"
    """Precision of matrix products; weights, optimiser state and losses are float32 in any case."""
    gradient_checkpointing: bool = False
    """Keep each block's input alone and compute the rest again for its gradient: far less memory,
    a third more time, the same gradients."""


@dataclass
class Trainee:
    """A model on its way: its optimiser and schedule."""

    model: PreTrainedModel
    optimizer: Any
    scheduler: Any
    max_grad_norm: float
    precision: Precision = "float32"


def prepare(model: PreTrainedModel, config: OptimizerConfig, steps: int) -> Trainee:
    """Put `model` in train mode under a fresh AdamW with a schedule of `steps` steps."""
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ranks.spread(model.train())
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    scheduler = get_scheduler(name, optimizer, math.ceil(config.warmup_share * steps), steps)
    return Trainee(model, optimizer, scheduler, config.max_grad_norm, config.precision)


def arithmetic(precision: Precision) -> AbstractContextManager[Any]:
    """Within it matrix products run at `precision`, on float32 weights."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device().type, torch.bfloat16)


def state_of(trainee: Trainee) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
    """(tensors by name, plain values) from which training goes on as if it had not stopped.

    Every rank goes through the tensors, which are whole one at a time.
    """
    optimizer = trainee.optimizer.state_dict()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, p in _in_training(trainee).items():
            yield f"model.{name}", ranks.whole_tensor(p.detach())
        for number, moments in optimizer["state"].items():
            for key, moment in moments.items():
                yield f"optimizer.{number}.{key}", ranks.whole_tensor(moment)

    plain = {"groups": optimizer["param_groups"], "scheduler": trainee.scheduler.state_dict()}
    return tensors(), plain


@torch.no_grad()
def restore(trainee: Trainee, tensors: Iterable[tuple[str, Tensor]], plain: dict[str, Any]) -> None:
    """What `state_of` gave, into a trainee that was prepared in the same way, for as many ranks as
    there are now.
    """
    weights, state = _in_training(trainee), dict[int, dict[str, Tensor]]()
    numbered = [p for group in trainee.optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors:
        part, _, rest = name.partition(".")
        if part == "model":
            weights[rest].copy_(ranks.as_part_of(tensor, weights[rest]))
        else:
            number, _, key = rest.partition(".")
            own = ranks.as_part_of(tensor, numbered[int(number)])
            state.setdefault(int(number), {})[key] = own
    trainee.optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})
    trainee.scheduler.load_state_dict(plain["scheduler"])


def _in_training(trainee: Trainee) -> dict[str, Tensor]:
    """What is frozen comes from the model's folder, again."""
    return {name: p for name, p in trainee.model.named_parameters() if p.requires_grad}


def step(
    trainee: Trainee, micro_batches: Sequence[tuple[T, float]], loss: Loss[T]
) -> dict[str, float]:
    """One optimiser step over `(micro_batch, items)`; returns item-weighted means of the log.

    Of several ranks each brings its own micro-batches of the step, one at least. Raises Diverged,
    before any weight changes, if a loss or the gradient is not finite.
    """
    own = torch.tensor(sum(items for _, items in micro_batches), dtype=torch.float64)
    total, shares = ranks.total(own).item(), list(ranks.evenly(micro_batches))
    sums: dict[str, Tensor] = {}
    for place, ((micro_batch, items), counts) in enumerate(shares, 1):
        items = items if counts else 0.0
        with arithmetic(trainee.precision):
            value, numbers = ranks.run(loss, trainee.model, micro_batch)
        ranks.last_backward(trainee.model, place == len(shares))
        (value * (items / total * ranks.count())).backward()  # the mean over ranks is taken
        for key, number in {"loss": value.detach(), **numbers}.items():
            here = torch.as_tensor(number, dtype=torch.float64, device=value.device)
            sums[key] = sums.get(key, 0.0) + here * items / total
    norm = nn.utils.clip_grad_norm_(trainee.model.parameters(), trainee.max_grad_norm)
    log = dict(zip(sums, ranks.total(torch.stack([*sums.values()])).tolist(), strict=True))
    log["grad_norm"] = float(ranks.whole_tensor(norm))
    if not (math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"])):
        trainee.optimizer.zero_grad()
        raise Diverged(f"loss {log['loss']}, gradient norm {log['grad_norm']}: not finite")
    log["learning_rate"] = trainee.scheduler.get_last_lr()[0]
    trainee.optimizer.step()
    trainee.scheduler.step()
    trainee.optimizer.zero_grad()
    return log


def batches(count: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Row numbers of each batch, shuffled anew every epoch; the last, partial batch is kept."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, batch_size):
            yield order[start : start + batch_size]


def steps_of(count: int, batch_size: int, epochs: int) -> int:
    """How many batches `batches` yields."""
    return math.ceil(count / batch_size) * epochs


def checkpoint_steps(steps: int, shares: Sequence[float]) -> dict[int, float]:
    """After which step (counted from 1) to evaluate: {step: share of the training done}.

    Shares that fall on one step are one checkpoint, named by the last of them.
    """
    return {max(1, round(share * steps)): share for share in shares}
