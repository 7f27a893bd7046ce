"""Attention of packed tokens: row by row with SDPA, where a shared beginning is there once."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from shared.models import ops
from shared.models.attention import Pass
from shared.models.ops import attend
from shared.models.packing import Packed, pack
from shared.models.sequences import collate

PAD, EOS = 0, 1
pytestmark = pytest.mark.usefixtures("each_way")
PROMPTS = [[7, 8, 9], [7, 8, 9, 10, 11], [9], [7, 8, 9], [9], [PAD, 8, 9], [8, 9], [10]]
ENDED = [12, 13, EOS]
COMPLETIONS = [[5, 6, 7, EOS], [EOS], [5] * 8, [6, 5, EOS], ENDED, [5, 6], [PAD, 5, EOS], ENDED]
LONG, OTHER = [*range(20, 45)], [*range(20, 40)]
# Most of what their rows hold; the last row is another's, and computes nothing
LONG_PROMPTS = [LONG, LONG, OTHER, LONG, [9], OTHER, [8], [9]]
# More positions than are computed at a time, and rows that begin in the middle of those
SPREAD = [
    [*range(20, 90)],
    [*range(20, 90)],
    [9],
    [*range(20, 53)],
    [8],
    [9],
    [*range(20, 84)],
    [10],
]
Heads = tuple[Tensor, Tensor, Tensor]
EACH = {"short": PROMPTS, "long": LONG_PROMPTS, "spread": SPREAD}


def over(prompts: list[list[int]]) -> tuple[Packed, Pass]:
    batch = collate(prompts, COMPLETIONS, PAD)
    packed = pack(batch, batch.last)
    return packed, Pass(*packed[3:], read=packed.back)


def row_by_row(prompts: list[list[int]], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each token's attention, of a shared beginning in the first row that holds it."""
    packed, _ = over(prompts)
    output, done = torch.zeros_like(query), torch.zeros(len(query), dtype=torch.bool)
    for row, (prompt, completion) in enumerate(zip(prompts, COMPLETIONS, strict=True)):
        numbers = packed.rows[row, : len(prompt + completion)]
        q, k, v = (t[numbers].transpose(0, 1) for t in (query, key, value))
        alone = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        new = ~done[numbers]
        output = output.index_copy(0, numbers[new], alone.transpose(0, 1)[new])
        done[numbers] = True
    return output


def drawn(tokens: int, key_heads: int, size: int, scale: float = 1.0) -> Heads:
    """Query (of 4 heads), key, value."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, size) for heads in (4, key_heads, key_heads)]
    q, k, v = ((torch.randn(s, generator=generator) * scale).requires_grad_() for s in shapes)
    return q, k, v


@pytest.mark.parametrize("size", [8, 32, 40])
@pytest.mark.parametrize("prompts", EACH.values(), ids=EACH)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_attention_and_its_gradient_are_sdpas_of_each_row(
    key_heads: int, prompts: list[list[int]], size: int
):
    """Query heads in groups on fewer key heads, as repeated keys would have it."""
    packed, told = over(prompts)
    tensors = drawn(packed.ids.shape[1], key_heads, size)
    q, k, v = (t.detach().double().requires_grad_() for t in tensors)
    output, truth = attend(*tensors, told, 0.3), row_by_row(prompts, q, k, v)
    torch.testing.assert_close(output, truth.float(), atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad(output.square().sum(), tensors)
    theirs = torch.autograd.grad(truth.square().sum(), (q, k, v))
    for found, expected in zip(ours, theirs, strict=True):
        largest = expected.abs().max().item()
        assert largest > 1
        torch.testing.assert_close(found, expected.float(), atol=4e-6 * largest, rtol=1e-5)


def test_large_logits_attend_to_the_largest_alone():
    packed, told = over(PROMPTS)
    tensors = drawn(packed.ids.shape[1], 2, 8, scale=100.0)
    output, truth = attend(*tensors, told, 0.3), row_by_row(PROMPTS, *tensors)
    torch.testing.assert_close(output, truth, atol=1e-4, rtol=1e-4)
    assert all(t.isfinite().all() for t in torch.autograd.grad(output.sum(), tensors))


@pytest.mark.parametrize("which", range(3))
def test_what_is_not_a_number_is_not_hidden(which: int, request: pytest.FixtureRequest):
    """Else a training that has diverged would go on. (PyTorch's own attention on a CPU makes 0 of a
    query that is no number: the residual stream beside it still holds it.)"""
    if "PyTorch" in request.node.name and which == 0:
        return
    packed, told = over(PROMPTS)
    tensors = drawn(packed.ids.shape[1], 4, 8)
    with torch.no_grad():
        tensors[which][packed.rows[2, 0]] = torch.nan
    output = attend(*tensors, told, 0.3)
    assert output[packed.rows[2, :9]].isnan().all(2).any(1).any()
    assert all(t.isnan().any() for t in torch.autograd.grad(output.sum(), tensors)[:2])
    assert output[packed.rows[1, :6]].isfinite().all()  # another row


def test_threads_change_no_bit():
    packed, told = over(LONG_PROMPTS)
    tensors, found = drawn(packed.ids.shape[1], 2, 32), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            output = attend(*tensors, told, 0.3)
            found.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_half_precision_goes_in_and_comes_out():
    packed, told = over(PROMPTS)
    tokens = torch.randn(packed.ids.shape[1], 2, 8).bfloat16()
    found = attend(tokens, tokens, tokens, told, 0.3)
    whole = tokens.float()
    alone = attend(whole, whole, whole, told, 0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, alone.bfloat16(), atol=1e-3, rtol=0.016)
    if ops.active().c:
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(attend(whole, whole, whole, told, 0.3), alone)
