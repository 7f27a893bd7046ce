"""A decoder's operations, in PyTorch and in C: transformers' own layers, sums, properties."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from shared.models.ops import adapted, linear, linears, rms_norm, rotate, swiglu

pytestmark = pytest.mark.usefixtures("each_way")
SEED = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=SEED).requires_grad_()


def angles(tokens: int, size: int) -> tuple[Tensor, Tensor]:
    """Of positions 0, 1, ..., each angle twice, as Llama has them: (N, 1, size)."""
    speeds = 10_000 ** (-torch.arange(0, size, 2) / size)
    angle = (torch.arange(tokens).unsqueeze(1) * speeds).repeat(1, 2).unsqueeze(1)
    return angle.cos(), angle.sin()


def both(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Equal values and equal gradients, at random weights of the outputs."""
    found, truth = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-5)
    weights = torch.randn(truth.shape, generator=SEED)
    gradients = [torch.autograd.grad((y * weights).sum(), inputs) for y in (found, truth)]
    for mine, theirs in zip(*gradients, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(7, 16), (1, 90, 16), (5, 3, 16)])
def test_rms_norm_is_llamas(shape: tuple[int, ...]):
    layer = LlamaRMSNorm(16, eps=0.1)  # so large that it matters

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, x)

    both(lambda x, weight: rms_norm(x, weight, 0.1), plain, drawn(*shape), drawn(16))


def test_rms_norm_leaves_a_mean_square_of_1_whatever_the_mean():
    x = drawn(6, 64) * 3 + 5
    found = rms_norm(x, torch.ones(64), 0.0)
    torch.testing.assert_close(found.square().mean(-1), torch.ones(6))
    torch.testing.assert_close(rms_norm(7 * x, torch.ones(64), 0.0), found)


@pytest.mark.parametrize("heads", [1, 3])
def test_rotate_is_llamas(heads: int):
    cos, sin = angles(9, 8)

    def plain(x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).unsqueeze(0)  # (1, heads, N, size)
        turned, _ = apply_rotary_pos_emb(rows, rows, cos.squeeze(1)[None], sin.squeeze(1)[None])
        return turned[0].transpose(0, 1)

    both(lambda x: rotate(x, cos, sin), plain, drawn(9, heads, 8))


def test_a_product_of_rotated_vectors_knows_only_how_far_apart_they_are():
    """What rotary positions are for (Su et al. 2021, eq. 11)."""
    cos, sin = angles(12, 8)
    query, key = (rotate(drawn(1, 1, 8).expand(12, 1, 8), cos, sin).squeeze(1) for _ in range(2))
    products = query @ key.T
    for apart in range(-8, 9):
        along = products.diagonal(apart)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(3,), (16,), (5, 19), (2, 3, 32)])
def test_swiglu_is_a_gated_silu(shape: tuple[int, ...]):
    """Vectors hold 16 numbers: what is left of them counts too."""
    both(swiglu, lambda gate, up: silu(gate) * up, 4 * drawn(*shape), drawn(*shape))


def test_swiglu_far_out_is_the_gate_or_nothing():
    gate = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4], requires_grad=True)
    up = torch.full((5,), 2.0, requires_grad=True)
    found = swiglu(gate, up)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.0, 180.0, 2e4]))
    of_gate, of_up = torch.autograd.grad(found.sum(), (gate, up))
    torch.testing.assert_close(of_gate, torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0]))
    torch.testing.assert_close(of_up, torch.tensor([0.0, 0.0, 0.0, 90.0, 1e4]))


def test_what_is_not_a_number_is_not_hidden():
    """Else a training that has diverged would go on."""
    x, weight = torch.ones(3, 20), torch.ones(20)
    x[1, 4] = torch.nan
    assert rms_norm(x, weight, 1e-6).isnan().any(1).tolist() == [False, True, False]
    for gated in (swiglu(x, torch.ones(3, 20)), swiglu(torch.ones(3, 20), x)):
        assert gated.isnan().nonzero().tolist() == [[1, 4]]


def test_threads_change_no_bit():
    x, weight, gate = drawn(50, 2, 32), drawn(32), drawn(50, 2, 32)
    cos, sin = angles(50, 32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            z = linear(swiglu(gate, rotate(rms_norm(x, weight, 1e-6), cos, sin)), gate[:, 0], None)
            with torch.no_grad():
                product = linear(x[:20, 0], gate[:, 0], None)
            found.append([product, z, *torch.autograd.grad(z.square().sum(), (x, weight, gate))])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def layers_of(k: int, sizes: tuple[int, ...], bias: bool = False) -> list[nn.Linear]:
    """Of N(0, 1) weights and biases."""
    layers = [nn.Linear(k, n, bias) for n in sizes]
    for weights in (p for layer in layers for p in layer.parameters()):
        weights.data = drawn(*weights.shape).detach()
    return layers


def in_float64(
    x: Tensor, layers: list[nn.Linear], weights: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The layers' outputs; gradients of x and of their parameters at `weights` of the outputs."""
    about = [x, *(p for layer in layers for p in layer.parameters())]
    wide = [t.detach().double().requires_grad_() for t in about]
    rest = iter(wide[1:])
    outputs = [
        nn.functional.linear(wide[0], next(rest), None if layer.bias is None else next(rest))
        for layer in layers
    ]
    total = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return outputs, [*torch.autograd.grad(total, wide)]  # pyright: ignore[reportArgumentType]


def off(found: Tensor, truth: Tensor) -> float:
    """How far apart they are, as a share of the truth: root mean squares."""
    return ((found - truth).square().mean() / truth.square().mean()).sqrt().item()


SHAPES = [  # rows, numbers of a row, columns: 32 are one square; 256 or 512 numbers one sweep
    (65, 16, (16,)),
    (70, 48, (130, 17)),
    (96, 64, (64, 32, 32)),
    (257, 600, (31, 96, 530)),
    (1100, 40, (33,)),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "k", "sizes"), SHAPES)
def test_products_of_many_rows_are_products(rows: int, k: int, sizes: tuple[int, ...], bias: bool):
    """Forward as exact as float32, gradients to 16 bits at least."""
    x, layers = drawn(rows, k), layers_of(k, sizes, bias)
    weights = [torch.randn(rows, n, generator=SEED) for n in sizes]
    found = linears(x, layers)
    outputs, gradients = in_float64(x, layers, weights)
    for mine, truth in zip(found, outputs, strict=True):
        assert off(mine, truth) < 5e-7
        assert (mine - truth).abs().max() < 2e-5 * k**0.5
    about = [x, *(p for layer in layers for p in layer.parameters())]
    total = sum((y * w).sum() for y, w in zip(found, weights, strict=True))
    for mine, truth in zip(torch.autograd.grad(total, about), gradients, strict=True):  # pyright: ignore
        assert mine.shape == truth.shape
        assert off(mine, truth) < 1e-5
        assert (mine - truth).abs().max() < 1e-4 * truth.square().mean().sqrt()


def test_products_of_many_rows_give_gradients_to_those_that_ask():
    """A frozen layer beside one that learns, and inputs that do not."""
    for asking in ((True, False, True), (False, True, False), (False, True, True)):
        x, layers = drawn(70, 32), layers_of(32, (48, 40))
        inputs = [x, *(layer.weight for layer in layers)]
        plain = [t.detach().clone().requires_grad_(a) for t, a in zip(inputs, asking, strict=True)]
        for t, asked in zip(inputs, asking, strict=True):
            t.requires_grad_(asked)
        sum(y.square().sum() for y in linears(x, layers)).backward()  # pyright: ignore
        sum((plain[0] @ w.T).square().sum() for w in plain[1:]).backward()  # pyright: ignore
        for mine, theirs, asked in zip(inputs, plain, asking, strict=True):
            assert (mine.grad is not None) == asked
            if asked:
                torch.testing.assert_close(mine.grad, theirs.grad, atol=5e-2, rtol=1e-4)


def test_products_of_many_rows_read_rows_where_they_lie():
    """Of transposed tensors too, and of none but their own: NaN beside them stays there."""
    around = torch.full((140, 64), torch.nan)
    around[20:100, :40] = torch.randn(80, 40, generator=SEED)
    x, weight = around[20:100, :40].requires_grad_(), drawn(40, 50).detach().T.requires_grad_()
    y = linear(x, weight, None)
    g = torch.randn(50, 80, generator=SEED).T
    of_x, of_weight = torch.autograd.grad(y, (x, weight), g)
    torch.testing.assert_close(y, x @ weight.T, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(of_x, g @ weight, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(of_weight, g.T @ x, atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        wrong = linear(around[19:101, :40], weight, None).isnan()
    assert wrong.all(1).nonzero().flatten().tolist() == [0, 81]
    assert wrong.any(1).sum() == 2


def test_a_layer_that_a_hook_listens_to_is_called():
    """Gate and up are one product otherwise, and no layer's call."""
    (layer, other), heard = layers_of(16, (16, 32)), []
    layer.register_forward_hook(lambda _, __, y: heard.append(y))
    found = linears(drawn(70, 16), (layer, other))
    assert [y.shape for y in found] == [(70, 16), (70, 32)]
    assert heard == [found[0]]


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 12)], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6)])
def test_an_adapted_product_is_that_of_the_sum_of_the_weights(
    shape: tuple[int, ...], bias: Tensor | None
):
    weight = drawn(12, 6).detach()

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight + 1.5 * b @ a, bias)

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return adapted(x, weight, bias, a, b, 1.5)

    inputs = drawn(*shape), drawn(4, 6), drawn(12, 4)
    both(ours, plain, *inputs)
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), plain(*inputs), atol=1e-5, rtol=1e-5)


def test_an_adapted_product_of_many_rows_is_one_too():
    weight, a, b, x = drawn(64, 48).detach(), drawn(4, 48), drawn(64, 4), drawn(2, 40, 48)
    found = adapted(x, weight, None, a, b, 0.5)
    layer = nn.Linear(48, 64, bias=False)
    layer.weight.data = (weight + 0.5 * b @ a).detach()
    weights = torch.randn(found.shape, generator=SEED)
    (truth,), gradients = in_float64(x, [layer], [weights])
    assert off(found, truth) < 1e-6
    (of_x,) = torch.autograd.grad((found * weights).sum(), x)
    assert off(of_x, gradients[0]) < 1e-5


def test_without_a_gradient_values_are_the_same_to_the_bit():
    x, weight, gate, (cos, sin) = drawn(5, 2, 8), drawn(8), drawn(5, 2, 8), angles(5, 8)

    def each() -> list[Tensor]:
        return [rms_norm(x, weight, 1e-6), rotate(x, cos, sin), swiglu(gate, x)]

    with torch.no_grad():
        alone = each()
    for a, b in zip(each(), alone, strict=True):
        assert a.requires_grad and not b.requires_grad
        assert torch.equal(a, b)
