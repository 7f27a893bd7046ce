"""Attention of packed tokens: row by row with SDPA, and which work is left out."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from shared import attention
from shared.attention import Pass, attend, cut_in_bands
from shared.packing import Packed, pack
from shared.sequences import collate

PAD, EOS = 0, 1
SHORT_PROMPTS = [[7, 8, 9], [7, 8, 9, 10, 11], [9], [7, 8, 9], [9], [PAD, 8, 9], [8, 9], [10]]
ENDED = [12, 13, EOS]
COMPLETIONS = [[5, 6, 7, EOS], [EOS], [5] * 8, [6, 5, EOS], ENDED, [5, 6], [PAD, 5, EOS], ENDED]
LONG, OTHER = [*range(20, 45)], [*range(20, 40)]
# Most of what their rows hold; the last row is another's, and computes nothing
LONG_PROMPTS = [LONG, LONG, OTHER, LONG, [9], OTHER, [8], [9]]


def over(prompts: list[list[int]]) -> tuple[Packed, Pass]:
    packed = pack(collate(prompts, COMPLETIONS, PAD))
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


@pytest.mark.parametrize("band", [1, 2**12, 2**30], ids=["many bands", "some", "one"])
@pytest.mark.parametrize("prompts", [SHORT_PROMPTS, LONG_PROMPTS], ids=["short", "long"])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_attention_and_its_gradient_are_sdpas_of_each_row(
    monkeypatch: pytest.MonkeyPatch, key_heads: int, prompts: list[list[int]], band: int
):
    """Query heads in groups on fewer key heads, as repeated keys would have it."""
    monkeypatch.setattr(attention, "BAND", band)
    if band == 1:
        monkeypatch.setattr(attention, "VECTOR", 1)
    torch.manual_seed(0)
    packed, told = over(prompts)
    tokens = packed.ids.shape[1]
    query = torch.randn(tokens, 4, 8, requires_grad=True)
    key, value = (torch.randn(tokens, key_heads, 8, requires_grad=True) for _ in range(2))
    outputs, gradients = [], []
    for output in (
        attend(query, key, value, told, 0.3),
        row_by_row(prompts, query, key, value),
    ):
        outputs.append(output)
        gradients.append(torch.autograd.grad(output.square().sum(), (query, key, value)))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    bands = told.heads(key_heads, 4 // key_heads).bands
    if band == 1:
        assert len(bands) > 4
    if band == 2**30:  # those that ask all of their queries, and those that need not
        assert len(bands) == (2 if prompts is LONG_PROMPTS else 1)


@pytest.mark.parametrize(("prompts", "times"), [(LONG_PROMPTS, 1), (SHORT_PROMPTS, 3)])
def test_the_queries_of_a_long_shared_beginning_are_asked_once(
    prompts: list[list[int]], times: int
):
    """And of a short one in every row: a mask for each row would cost more than it saves."""
    packed, told = over(prompts)
    asked = told.heads(1, 1).queries.tolist()
    shared = packed.rows[0, 1].item()  # the second token of the first prompt
    assert prompts.count(prompts[0]) > 1
    assert asked.count(shared) == times


def test_half_precision_goes_in_and_comes_out():
    packed, told = over(SHORT_PROMPTS)
    tokens = torch.randn(packed.ids.shape[1], 2, 8).bfloat16()
    found = attend(tokens, tokens, tokens, told, 0.3)
    alone = attend(*[tokens.float()] * 3, told, 0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, alone.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attend(*[tokens.float()] * 3, told, 0.3), alone)


def cost(bands: list[list[int]], queries: list[int], keys: list[int], heads: int) -> int:
    def area(band: list[int]) -> int:
        return len(band) * max(queries[i] for i in band) * max(keys[i] for i in band)

    return sum(heads * area(band) + attention.BAND for band in bands)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("heads", [1, 12])
def test_bands_are_the_cheapest_of_all_cuts(seed: int, heads: int):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(1, 60, (7,), generator=generator).tolist()
    queries = [max(1, k - 10 * (seed % 2)) for k in keys]
    order = sorted(range(7), key=keys.__getitem__)
    cuts = itertools.chain(*(itertools.combinations(range(1, 7), n) for n in range(7)))
    every = [
        [order[a:b] for a, b in itertools.pairwise((0, *cut, 7))]
        for cut in cuts
    ]  # fmt: skip
    best = min(cost(bands, queries, keys, heads) for bands in every)
    found = cut_in_bands(queries, keys, heads)
    assert cost(found, queries, keys, heads) == best
    assert sorted(itertools.chain(*found)) == list(range(7))


def test_no_rows_make_no_bands():
    assert cut_in_bands([], [], 4) == []
    assert cut_in_bands([3], [3], 4) == [[0]]
