"""What is written in C is compiled where that can be done, and missed where it cannot."""

import logging
import os
import subprocess
from pathlib import Path

import pytest
import torch

from shared.cpu import native


def test_here_it_is_compiled_and_computes():
    """All tests of its functions rest on this."""
    assert native.kind().startswith("C")
    gate, y = torch.ones(20), torch.zeros(20)
    native.call("swiglu", 20, gate, 2 * gate, y)
    torch.testing.assert_close(y, 2 * torch.ones(20).sigmoid())


def test_products_are_by_what_the_processor_has():
    found = Path("/proc/cpuinfo").read_text()
    family = int(found.split("cpu family\t:")[1].split()[0])
    zen5 = "AuthenticAMD" in found and "avx512f" in found and family >= 26
    by = "tiles" if "amx_bf16" in found else "vectors" if zen5 else None
    assert native.products_by() == by
    assert native.kind() == (f"C, {by}" if by else "C")


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


@pytest.mark.parametrize(
    "machine",
    [
        ["-march=native"],
        ["-march=native", "-mno-amx-bf16"],
        ["-march=x86-64-v3"],
        ["-march=x86-64-v3", "-DEMULATED"],
    ],
    ids=["here", "no tiles", "vectors", "tiles"],
)
def test_products_are_right_and_of_their_own_memory_only(tmp_path: Path, machine: list[str]):
    """As the address sanitizer sees it: what lies beyond is seldom what makes a number wrong.
    Whatever this processor has, by vectors and by tiles of a unit that is made here.
    """
    program, here = tmp_path / "check", Path(__file__)
    sanitized = "-fsanitize=address,undefined", "-fno-sanitize=alignment"
    options = "-g", "-O1", "-fopenmp", *machine, *sanitized, f"-I{native.SOURCES[0].parent}"
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
    assert native.here(torch.ones(1))
    assert not native.here(torch.ones(1, device="meta"))
