"""The mutator: what it draws is a change of the code and of nothing else, the same for a seed."""

import ast
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mutants.__main__ import complaints, unchanged
from mutants.change import changed, changed_c
from mutants.draw import TESTS, difference, drawn, replaced, sites
from mutants.faults import FAULTS, applied, compiles, skipped, written_by_hand
from mutants.table import markdown
from mutants.trial import ROOT, Mutant, Trial, asserts, ended, path_of_tests, verdict

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


def test_every_fault_written_by_hand_is_one_change_that_parses():
    assert len(FAULTS) >= 80
    for mutant in written_by_hand():
        original = (ROOT / mutant.file).read_text(encoding="utf-8")
        if mutant.file.endswith(".c"):
            assert mutant.text != original
            options = "-fopenmp", "-march=native", "-w", f"-I{(ROOT / mutant.file).parent}"
            assert skipped(mutant) or compiles(mutant.text, *options), mutant.name
        else:
            assert trees(mutant.text) != trees(original), mutant.name


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_faults_in_c_are_left_out_and_others_are_not(
    compiler: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CC", compiler)
    left_out = [mutant.file for mutant in written_by_hand() if skipped(mutant)]
    assert set(left_out) == {"shared/cpu/kernels.c"}
    monkeypatch.setenv("CC", "true")  # takes any text
    assert not any(map(skipped, written_by_hand()))


# How a place is found


SOURCE = '''
class Half:
    def of(self, values, mask):
        return 0.5 * mean(values, mask, axis=1)

def loss(chosen, rejected, weight=1.0):
    """0.5 * (chosen - rejected)"""
    total = (chosen - rejected) * weight
    log(total)
    return total.clamp(min=0)
'''


@pytest.mark.parametrize(
    ("where", "old", "new", "line"),
    [
        ("loss", "_a - _b", "_b - _a", "total = ((rejected - chosen)) * weight"),
        ("loss", "_x.clamp(min=0)", "_x", "return total"),
        ("loss", "log(...)", "pass", "pass"),
        ("Half.of", "0.5 * _x", "_x", "return mean(values, mask, axis=1)"),
        ("Half.of", "mean(_v, ...)", "mean(...)", "return 0.5 * mean(mask, axis=1)"),
        ("Half.of", "mean(..., axis=_a)", "mean(...)", "return 0.5 * mean(values, mask)"),
        ("", "total = _a * _w", "total = _w / _a", "total = weight / (chosen - rejected)"),
    ],
)
def test_a_change_is_found_by_its_syntax(where: str, old: str, new: str, line: str):
    _, after = difference(SOURCE, changed(SOURCE, where, old, new))
    assert after == line


@pytest.mark.parametrize(
    ("where", "old", "message"),
    [
        ("loss", "_a + _b", "found 0 times"),
        ("loss", "total", "found 3 times"),
        ("loss", "_a - _a", "found 0 times"),
        ("gone", "_a - _b", "`gone` is found 0 times"),
        ("Half.loss", "_a - _b", "`loss` is found 0 times"),
    ],
)
def test_a_fault_without_a_place_or_with_several_is_an_error(where: str, old: str, message: str):
    with pytest.raises(ValueError, match=message):
        changed(SOURCE, where, old, "_a")


def test_the_error_names_the_fault():
    with pytest.raises(ValueError, match=re.escape(FAULTS[0].name)):
        applied(FAULTS[0]._replace(old="no_such_name"))


def test_a_change_of_c_keeps_to_its_function_and_leaves_spaces_out_of_account():
    text = "int one(void) {\n    return a  +\n b;\n}\n\nint two(void) {\n    return a + b;\n}\n"
    assert changed_c(text, "one", "a+b", "a") == text.replace("a  +\n b", "a")
    with pytest.raises(ValueError, match="found 0 times"):
        changed_c(text, "two", "b + a", "a")
    with pytest.raises(ValueError, match="`three` is not found"):
        changed_c(text, "three", "a + b", "a")


def test_every_test_file_that_is_named_exists():
    named = {name for fault in FAULTS for name in fault.tests}
    for tests in TESTS.values():
        named |= set(tests)
    assert {path_of_tests(name).name for name in named} == named


def test_drawn_faults_parse_differ_and_have_names_of_their_own():
    found = drawn(0, 300)
    assert len({mutant.name for mutant in found}) == len(found) == 300
    for mutant in found:
        original = (ROOT / mutant.file).read_text(encoding="utf-8")
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


# Time and tables


def test_what_computes_for_too_long_ran_out_of_time_and_what_died_crashed(tmp_path: Path):
    tree = tmp_path / "tree"
    assert verdict(tree, signal.SIGXCPU) == Trial("timeout", "", {})
    assert verdict(tree, signal.SIGKILL) == Trial("crash", "died", {})


@pytest.mark.parametrize(("limit", "work"), [(None, "time.sleep(60)"), (1, "while True: pass")])
def test_a_child_is_stopped_by_the_clock_or_by_what_it_computes(limit: int | None, work: str):
    """One that waits computes nothing, one that computes sees no clock."""
    lines = ["import resource, time"]
    if limit:
        lines.append(f"resource.setrlimit(resource.RLIMIT_CPU, ({limit}, {limit + 5}))")
    child = subprocess.Popen([sys.executable, "-c", "\n".join([*lines, work])], process_group=0)
    status = ended(child.pid, late=limit is None)
    while status is None:
        time.sleep(0.05)
        status = ended(child.pid, late=False)
    child.returncode = status
    assert verdict(Path("no such folder"), status).outcome == "timeout"


@pytest.mark.parametrize("mended", [True, False])
def test_tests_that_fail_without_a_fault_get_a_second_chance(
    mended: bool, monkeypatch: pytest.MonkeyPatch
):
    outcomes = iter(["crash", "survived" if mended else "crash"])

    def tried(mutants: list[Mutant], *_: object) -> list[Trial]:
        return [Trial(next(outcomes), "by", {"test_a.py": 1.0}) for _ in mutants]

    monkeypatch.setattr("mutants.__main__.tried", tried)
    mutant = Mutant("a", "dpo/losses.py", "", ("test_a.py",))
    if mended:
        assert unchanged([mutant], 1) == {"test_a.py": 1.0}
    else:
        with pytest.raises(SystemExit, match=r"test_a\.py: crash by"):
            unchanged([mutant], 1)


def test_each_seed_is_told_on_its_own_and_the_next_adds_to_it():
    def row(name: str, outcome: str) -> dict[str, str]:
        return {"name": name, "file": "a.py", "old": "1", "new": "2", "outcome": outcome, "by": "t"}

    outcomes = ["caught", "crash", "timeout", "survived"]
    results = {"drawn": {"0": [row(o, o) for o in outcomes], "1": [row("x", "survived")]}}
    page = markdown(results, "explained: `survived`")
    assert "Drawn: 60.0% of 5 caught" in page
    assert "| 0 | 4 | 75.0% | 1 | 1 | 1 | 1 | 0 |" in page
    assert "| 1 | 1 | 0.0% | 0 | 0 | 0 | 0 | 1 |" in page
    assert any("seed 1: 0.0% are caught" in line for line in complaints(results))


def test_what_was_skipped_is_no_failure():
    rows = [{"name": "a", "file": "a.c", "breaks": "b", "outcome": "skipped", "by": "no compiler"}]
    assert complaints({"written": rows}) == []
    assert "0 of 0 caught" in markdown({"written": rows}, "")
