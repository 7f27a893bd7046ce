"""The optimiser step and the loop around it: schedules, AdamW's settings, batches, checkpoints."""

import json
import math
from pathlib import Path

import pytest
import torch
from checks import close, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shared.models.load import Start
from shared.models.logprobs import token_logprobs
from shared.models.lora import LoRAConfig
from shared.models.sequences import collate
from shared.training.fit import (
    OptimizerConfig,
    batches,
    checkpoint_steps,
    prepare,
    restore,
    state_of,
    step,
    steps_of,
)


def line() -> nn.Linear:
    """Three weights and a bias."""
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def squares(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
    return (model(batch) - 3).pow(2).mean(), {}


def inputs(rows: int) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(1))


SCHEDULES = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_rises_in_a_line_and_then_follows_its_schedule(schedule: str):
    """Ten steps of warm-up out of forty; the log holds the rate that each step went at."""
    config = OptimizerConfig(learning_rate=0.2, schedule=schedule, warmup_share=0.25)
    trainee, batch = prepare(line(), config, 40), inputs(4)
    rates = [step(trainee, [(batch, 4.0)], squares)["learning_rate"] for _ in range(40)]
    assert rates[:10] == pytest.approx([0.2 * t / 10 for t in range(10)])
    assert rates[10:] == pytest.approx([0.2 * SCHEDULES[schedule](t / 30) for t in range(30)])


def test_a_share_of_a_step_warms_up_for_a_whole_one():
    config = OptimizerConfig(learning_rate=0.2, schedule="constant", warmup_share=0.05)
    trainee, batch = prepare(line(), config, 30), inputs(4)
    rates = [step(trainee, [(batch, 4.0)], squares)["learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([0.0, 0.1, 0.2])  # 1.5 steps are two


def test_steps_are_those_of_adamw_at_the_configured_settings():
    """Against torch's own, with a second moment, epsilon and decay far from its defaults."""
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="constant",
        warmup_share=0.0,
        max_grad_norm=1e9,
        weight_decay=0.5,
        adam_epsilon=0.3,
        adam_beta2=0.6,
    )
    trainee, plain, batch = prepare(line(), config, 5), line(), inputs(4)
    peer = torch.optim.AdamW(
        plain.parameters(), lr=0.1, betas=(0.9, 0.6), eps=0.3, weight_decay=0.5
    )
    for _ in range(5):
        step(trainee, [(batch, 4.0)], squares)
        peer.zero_grad()
        squares(plain, batch)[0].backward()
        peer.step()
    close(weights(trainee.model), weights(plain))


def test_a_prepared_model_trains_and_its_frozen_weights_stay():
    model = line().eval()
    model.bias.requires_grad_(False)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", warmup_share=0.0, weight_decay=0.5
    )
    trainee = prepare(model, config, 1)
    assert model.training
    step(trainee, [(inputs(4), 4.0)], squares)
    assert (model.weight != before[0]).all()
    assert torch.equal(model.bias, before[1])


def test_the_gradient_is_clipped_at_the_configured_norm():
    config = OptimizerConfig(learning_rate=0.1, max_grad_norm=0.5)
    assert prepare(line(), config, 1).max_grad_norm == 0.5


@given(count=st.integers(1, 20), size=st.integers(1, 7), epochs=st.integers(1, 3))
def test_each_epoch_deals_every_row_once_and_steps_are_counted_right(count, size, epochs):
    found = list(batches(count, size, epochs, seed=0))
    assert len(found) == steps_of(count, size, epochs)
    per_epoch = len(found) // epochs
    for epoch in range(epochs):
        rows = found[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for batch in rows for row in batch) == list(range(count))
        assert all(len(batch) == size for batch in rows[:-1])


def test_the_order_is_another_in_each_epoch_and_for_each_seed():
    first, second, third = batches(50, 50, 3, seed=0)
    assert first != second != third != first
    assert list(batches(50, 50, 1, seed=1)) != [first]
    assert list(batches(50, 50, 3, seed=0)) == [first, second, third]


def test_checkpoints_are_taken_at_the_nearest_step_and_never_before_the_first():
    assert checkpoint_steps(40, [0.25, 0.5]) == {10: 0.25, 20: 0.5}
    assert checkpoint_steps(10, [0.26, 0.34]) == {3: 0.34}  # both round to 3: the last names it
    assert checkpoint_steps(3, [0.01]) == {1: 0.01}
    assert checkpoint_steps(3, []) == {}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_training_goes_on_from_a_saved_state_as_if_it_had_not_stopped(schedule: str):
    """To the bit: weights, moments, and a rate that is in the middle of its schedule."""
    config = OptimizerConfig(learning_rate=0.1, schedule=schedule, warmup_share=0.3)
    whole = prepare(line(), config, steps=8)
    rates = [step(whole, [(inputs(4 + i), 4.0 + i)], squares)["learning_rate"] for i in range(4)]
    tensors, plain = state_of(whole)
    tensors = {name: tensor.clone() for name, tensor in tensors}
    later = prepare(line(), config, steps=8)
    restore(later, tensors.items(), json.loads(json.dumps(plain)))
    for i in range(4, 8):
        logs = [step(t, [(inputs(4 + i), 4.0 + i)], squares) for t in (whole, later)]
        assert logs[0] == logs[1]
        assert logs[0]["learning_rate"] not in rates[-1:]
        assert torch.equal(weights(whole.model), weights(later.model))


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
@pytest.mark.usefixtures("each_way")
def test_checkpointing_keeps_less_and_changes_no_gradient(
    policy_folder: Path, lora: LoRAConfig | None
):
    rows = [([1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11, 12]), ([1, 2, 3], [9, 10, 11, 12, 13])]
    batch = collate(*map(list, zip(*rows, strict=True)), 0)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.numel() * (not tensor.requires_grad or tensor.grad_fn is not None)
        return tensor

    gradients = []
    for checkpointed in (False, True):
        config = OptimizerConfig(learning_rate=0.1, gradient_checkpointing=checkpointed)
        model = prepare(Start(policy_folder, lora).load(), config, 1).model
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.fill_(0.01)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = token_logprobs(model, batch).sum()
        loss.backward()
        found = [p.grad for p in model.parameters() if p.requires_grad]
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    assert gradients[0].abs().max() > 0.1
    close(gradients[1], gradients[0], 1e-6)
    assert kept[1] < 0.5 * kept[0]
