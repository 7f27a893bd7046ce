"""The mutator: what it draws is a change of the code and of nothing else, the same for a seed."""

import ast
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mutants.draw import TESTS, drawn, replaced, sites
from mutants.faults import FAULTS, applied, written_by_hand
from mutants.trial import ROOT, Mutant, asserts, path_of_tests

PROGRAMS = [  # of what is written in C, with its headers; the last by tiles, wherever this is
    ("shared/cpu/kernels.c", "-march=native"),
    ("tests/shared/products_check.c", "-march=x86-64-v3"),
    ("tests/shared/products_check.c", "-march=x86-64-v3", "-DEMULATED"),
]
SAMPLE = '''
def mean(values: list[float], scale: float = 2.0) -> float:
    """Not touched: 1 + 1."""
    if not values:
        raise ValueError(f"no {1 + 1} values")
    total = 0.0
    for value in values:
        total += scale * value
    return total / len(values)
'''


def trees(text: str) -> str:
    return ast.dump(ast.parse(text))


def test_every_fault_written_by_hand_is_one_change_that_parses(tmp_path: Path):
    assert len(FAULTS) >= 40
    for mutant in written_by_hand():
        original = (ROOT / mutant.file).read_text(encoding="utf-8")
        if mutant.file.endswith((".c", ".h")):
            assert compiles(mutant, tmp_path), mutant.name
        else:
            assert trees(mutant.text) != trees(original), mutant.name


def compiles(mutant: Mutant, folder: Path) -> bool:
    """Whether C with the fault in it does."""
    for name in ("shared/cpu", "tests/shared"):
        sources = [p for p in (ROOT / name).iterdir() if p.suffix in (".c", ".h")]
        (folder / name).mkdir(parents=True, exist_ok=True)
        for source in sources:
            shutil.copy(source, folder / name)
    (folder / mutant.file).write_text(mutant.text, encoding="utf-8")
    headers = folder / "shared/cpu"
    checks = (
        [
            "cc",
            "-fopenmp",
            "-w",
            f"-I{headers}",
            "-fsyntax-only",
            *options,
            folder / file,
        ]
        for file, *options in PROGRAMS
    )
    return all(subprocess.run(check).returncode == 0 for check in checks)


def test_a_fault_whose_text_is_gone_is_an_error():
    with pytest.raises(ValueError, match="found 0 times"):
        applied(FAULTS[0]._replace(old="no such text"))
    with pytest.raises(ValueError, match="times"):
        applied(FAULTS[0]._replace(old="return"))


def test_every_test_file_that_is_named_exists():
    named = {name for fault in FAULTS for name in fault.tests}
    for tests in TESTS.values():
        named |= set(tests)
    assert {path_of_tests(name).name for name in named} == named


def test_drawn_faults_parse_differ_and_have_names_of_their_own(tmp_path: Path):
    found = drawn(0, 300)
    assert len({mutant.name for mutant in found}) == len(found) == 300
    for mutant in found:
        original = (ROOT / mutant.file).read_text(encoding="utf-8")
        if mutant.file.endswith((".c", ".h")):
            assert compiles(mutant, tmp_path), mutant.name
        else:
            assert trees(mutant.text) != trees(original), mutant.name


def test_a_seed_decides_what_is_drawn_and_more_begin_with_fewer():
    assert drawn(0, 30) == drawn(0, 60)[:30]
    assert drawn(0, 30) != drawn(1, 30)


def test_names_texts_and_annotations_stay():
    kinds, texts = set(), []
    for site in sites("sample.py", SAMPLE):
        kinds.add(site.kind)
        texts.append(site.text)
        assert '"""Not touched: 1 + 1."""' in site.text
        assert "list[float]" in site.text
        assert "no {1 + 1} values" in site.text or "raise" not in site.text
    assert {"default", "condition", "unary", "constant", "arithmetic", "deleted"} <= kinds
    assert any("total -= scale * value" in text for text in texts)
    assert any("return (total * len(values))" in text for text in texts)


def test_a_smaller_expression_keeps_its_place_in_a_larger_one():
    """`a * b` inside `a * b * c` becomes `(a + b) * c`; columns count bytes, not characters."""
    text = 'name = "é", a * b * c\n'
    product = ast.parse(text).body[0].value.elts[1].left
    other = ast.BinOp(product.left, ast.Add(), product.right)
    assert replaced(text, product, other) == 'name = "é", (a + b) * c\n'


def no_error() -> None:
    with pytest.raises(ValueError):
        pass


def two_failures() -> None:
    raise ExceptionGroup("as hypothesis raises them", [AssertionError("a"), AssertionError("b")])


def wrong_sum() -> None:
    assert torch.ones(2).sum() == 3


@pytest.mark.parametrize("says_no", [no_error, two_failures, wrong_sum])
def test_a_test_that_says_no_is_an_assertion(says_no: Callable[[], None]):
    with pytest.raises((pytest.fail.Exception, AssertionError, ExceptionGroup)) as error:
        says_no()
    assert asserts(error, ROOT)


@pytest.mark.parametrize(
    ("where", "line"), [("shared", "assert False"), ("tests", "1 / 0"), ("shared", "1 / 0")]
)
def test_what_breaks_is_a_crash_and_so_is_an_assertion_of_the_code_itself(where: str, line: str):
    code = compile(line, str(ROOT / where / "sample.py"), "exec")
    with pytest.raises((AssertionError, ZeroDivisionError)) as error:
        exec(code)
    assert not asserts(error, ROOT)
