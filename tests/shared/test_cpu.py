"""What is written in C: compiled where that can be done, missed where it cannot; its products."""

import logging
import os
import subprocess
from pathlib import Path

import pytest
import torch
from test_ops import SEED, angles, drawn, in_float64, layers_of, off

from shared.cpu import native
from shared.cpu.kernels import takes_few_rows, takes_many_rows
from shared.models import ops
from shared.models.ops import linear, linears, rms_norm, rotate, swiglu

if native.library() is None:
    pytest.skip("no C compiler", allow_module_level=True)


def test_here_it_is_compiled_and_computes():
    """All tests of its functions rest on this."""
    assert ops.computed_by().startswith("C")
    gate, y = torch.ones(20), torch.zeros(20)
    native.call("swiglu", 20, gate, 2 * gate, y)
    torch.testing.assert_close(y, 2 * torch.ones(20).sigmoid())


def test_products_are_for_processors_on_which_they_are_faster():
    found = Path("/proc/cpuinfo").read_text()
    family = int(found.split("cpu family\t:")[1].split()[0])
    zen5 = "AuthenticAMD" in found and "avx512_bf16" in found and family >= 26
    assert native.products_are_faster() == zen5
    assert ops.computed_by() == ("C, products" if zen5 else "C")


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "no C compiler was found"), ("false", "failed")]
)
def test_without_a_compiler_there_is_nothing_and_the_log_says_why(
    compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.WARNING):
        assert native.library.__wrapped__() is None
    assert reason in caplog.text
    assert "PyTorch" in caplog.text


def test_what_cannot_be_loaded_is_missed_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As from a temporary folder that is mounted so that nothing in it may be run."""
    monkeypatch.setattr(native.subprocess, "run", lambda command, **_: touched(command))
    assert native.library.__wrapped__() is None
    assert "cannot be loaded" in caplog.text


def touched(command: list[str]) -> subprocess.CompletedProcess[str]:
    Path(command[command.index("-o") + 1]).touch()
    return subprocess.CompletedProcess(command, 0, "", "")


def test_a_compiler_with_options_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CC", "cc -O1")
    assert native.library.__wrapped__() is not None


def test_what_the_compiler_says_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    broken = tmp_path / "kernels.c"
    broken.write_text("int f(void) { return nothing; }")
    monkeypatch.setattr(native, "SOURCES", [broken])
    assert native.library.__wrapped__() is None
    assert "nothing" in caplog.text


@pytest.mark.parametrize("machine", ["native", "x86-64-v3"])
def test_products_are_right_and_of_their_own_memory_only(tmp_path: Path, machine: str):
    """As the address sanitizer sees it: what lies beyond is seldom what makes a number wrong."""
    program, here = tmp_path / "check", Path(__file__)
    sanitized = "-fsanitize=address,undefined", "-fno-sanitize=alignment"
    options = (
        "-g",
        "-O1",
        "-fopenmp",
        f"-march={machine}",
        *sanitized,
        f"-I{native.SOURCES[0].parent}",
    )
    command = ["cc", *options, "-o", str(program), str(here.with_name("products_check.c")), "-lm"]
    subprocess.run(command, check=True)
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
    }
    done = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "wrong",
    [torch.ones(20, dtype=torch.float64), torch.ones(20, 2)[:, 0]],
    ids=["dtype", "strides"],
)
def test_a_tensor_of_another_layout_is_no_argument(wrong: torch.Tensor):
    """C would read other numbers, or beyond them."""
    with pytest.raises(AssertionError):
        native.call("swiglu", 20, torch.ones(20), wrong, torch.zeros(20))


def test_other_devices_are_left_to_pytorch():
    assert ops.rms_norm(torch.ones(2, 4, device="meta"), torch.ones(4, device="meta"), 0.0).is_meta


@torch.no_grad()
@pytest.mark.parametrize("rows", [5, 15, 16, 17, 32, 33, 63, 64])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (40, 48), (96, 32), (131, 64)])
def test_a_product_of_few_rows_is_a_product(rows: int, n: int, k: int):
    """Columns that fill no vector of 16 lie in two blocks; rows fill 1, 2 or 4 vectors."""
    x, weight, bias = drawn(rows, k), drawn(n, k), drawn(n)
    assert takes_few_rows(x, weight)
    truth = (x.double() @ weight.double().T).float()
    found = linear(x, weight, None)
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-5)
    assert torch.equal(linear(x.view(1, rows, k), weight, None)[0], found)
    assert torch.equal(linear(x, weight, bias), found + bias)


@torch.no_grad()
def test_a_product_of_few_rows_reads_rows_where_they_lie():
    """Of a transposed tensor, and of none but its own: NaN beside it stays there."""
    whole, weight = torch.full((40, 32), torch.nan), drawn(48, 32)
    whole[7:20] = drawn(13, 32)
    truth = whole[7:20] @ weight.T
    torch.testing.assert_close(linear(whole[7:20], weight, None), truth, atol=1e-5, rtol=1e-5)
    x = drawn(32, 20).T
    torch.testing.assert_close(linear(x, weight, None), x @ weight.T, atol=1e-5, rtol=1e-5)
    wrong = linear(whole[5:25], weight, None).isnan()
    assert wrong.all(1).nonzero().flatten().tolist() == [0, 1, 15, 16, 17, 18, 19]
    assert wrong.any(1).sum() == 7


@torch.no_grad()
def test_other_products_are_left_to_pytorch():
    x, weight = drawn(16, 32), drawn(48, 32)
    assert takes_few_rows(x, weight)
    for rows, others in ((4, (48, 32)), (65, (48, 32)), (16, (15, 32)), (16, (48, 40))):
        x, weight, bias = drawn(rows, others[1]), drawn(*others), drawn(others[0])
        assert not takes_few_rows(x, weight)
        torch.testing.assert_close(linear(x, weight, bias), x @ weight.T + bias)
    x, weight = drawn(16, 32), drawn(48, 32)
    assert not takes_few_rows(x.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_few_rows(x, weight)
    with torch.enable_grad():
        assert not takes_few_rows(x, weight)
        assert linear(x, weight, None).requires_grad


def test_products_of_numbers_of_bfloat16_are_exact(monkeypatch: pytest.MonkeyPatch):
    """Whole numbers below 256, whose sums are exact too."""
    monkeypatch.setattr("shared.cpu.kernels.products_are_faster", lambda: True)
    x, weight = (torch.randint(-255, 256, s, generator=SEED).float() for s in ((80, 64), (48, 64)))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = linear(x, weight, None)
    assert torch.equal(y.double(), x.double() @ weight.double().T)
    g = torch.randint(-255, 256, y.shape, generator=SEED).float()
    of_x, of_weight = torch.autograd.grad(y, (x, weight), g)
    assert torch.equal(of_x.double(), g.double() @ weight.double())
    assert torch.equal(of_weight.double(), g.double().T @ x.double())


@pytest.mark.parametrize("faster", [False, True])
def test_many_rows_are_multiplied_in_c_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, faster: bool
):
    """In bfloat16 any number of rows: what a token gets must not depend on the others."""
    monkeypatch.setattr("shared.cpu.kernels.products_are_faster", lambda: faster)
    x, weight = drawn(65, 16), drawn(16, 16)
    assert takes_many_rows(x, weight, weight) == faster
    assert not takes_many_rows(x[:64], weight)
    assert not takes_many_rows(x[:, :15], weight[:, :15])
    assert not takes_many_rows(x, weight[:15], weight)
    assert not takes_many_rows(x.double(), weight.double())
    assert not takes_many_rows(x, weight, weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert takes_many_rows(x, weight) == takes_many_rows(x[:1], weight) == faster
        kind = linears(x, layers_of(16, (16, 16)))[0].dtype
        assert kind == (torch.float32 if faster else torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        assert not takes_many_rows(x, weight)


@pytest.mark.parametrize(("faster", "limit"), [(True, 1e-6), (False, 5e-3)])
def test_products_in_bfloat16_are_those_of_rounded_numbers(
    monkeypatch: pytest.MonkeyPatch, faster: bool, limit: float
):
    """In C their sums are float32; PyTorch rounds them."""
    monkeypatch.setattr("shared.cpu.kernels.products_are_faster", lambda: faster)
    x, layers = drawn(70, 48), layers_of(48, (33, 64), bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = linears(x, layers)
    weights = [torch.randn(70, n, generator=SEED).bfloat16().float() for n in (33, 64)]
    about = [x, *(layer.weight for layer in layers)]
    total = sum((y * w).sum() for y, w in zip(found, weights, strict=True))
    gradients = torch.autograd.grad(total, about)  # pyright: ignore[reportArgumentType]
    rounded = [t.detach().bfloat16().float() for t in about]
    for layer, weight in zip(layers, rounded[1:], strict=True):
        layer.weight.data = weight
    outputs, truths = in_float64(rounded[0].requires_grad_(), layers, weights)
    for mine, truth in zip((*found, *gradients), (*outputs, *truths), strict=True):
        assert off(mine.float(), truth) < limit


def test_in_a_region_of_bfloat16_they_compute_in_float32():
    x, weight, (cos, sin) = drawn(5, 2, 8), drawn(8), angles(5, 8)
    alone = [rms_norm(x, weight, 1e-6), rotate(x, cos, sin), swiglu(x, x)]
    with torch.autocast("cpu", torch.bfloat16):
        region = [rms_norm(x, weight, 1e-6), rotate(x, cos, sin), swiglu(x, x)]
    assert all(torch.equal(a, b) for a, b in zip(alone, region, strict=True))
