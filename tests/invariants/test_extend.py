"""docs/extend.md as its reader follows it: four code blocks, put where the page says, must do.

The tree is copied, the blocks go into the copy, the page's own test passes there, and
`klash compare` trains with the new method.
"""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from checks import TINY

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
STEP = re.compile(r"^\d\. (?P<said>.*?)\n\n {3}```\w+\n(?P<code>.*?)\n {3}```$", re.M | re.S)
PLACES = ["dpo/losses.py", "dpo/losses.py", "simpo.toml", "tests/dpo/test_simpo.py"]


def steps() -> list[tuple[str, str]]:
    """(the file that a step of the page names, its code block)."""
    return [(named(step["said"]), textwrap.dedent(step["code"])) for step in STEP.finditer(PAGE)]


def named(said: str) -> str:
    return next(word for word in re.findall(r"`([\w./]+)`", said) if "." in word)


def run(tree: Path, *words: str) -> str:
    """What `python <words>` prints in `tree`; its own packages are imported there."""
    result = subprocess.run(
        [sys.executable, *words], cwd=tree, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with the page's steps taken. What a test writes lies beside it."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("shared", "rlhf", "dpo", "benchmarks", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    (_, function), (_, line), (toml, arm), (test, closed_form) = steps()
    losses = copy / "dpo" / "losses.py"
    before, mark, table = losses.read_text(encoding="utf-8").partition("LOSSES: dict")
    assert mark
    head, brace, entries = table.partition("{\n")
    table = f"{head}{brace}{textwrap.indent(line, '    ')}\n{entries}"
    losses.write_text(f"{before}{function}\n\n\n{mark}{table}", encoding="utf-8")
    (copy / toml).write_text(f"{TINY}\n{arm}\n", encoding="utf-8")
    (copy / test).write_text(f"{closed_form}\n", encoding="utf-8")
    return copy


def test_a_method_takes_four_places():
    assert [place for place, _ in steps()] == PLACES


def test_klash_does_not_ship_the_example():
    for package in ("shared", "rlhf", "dpo", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            assert "simpo" not in path.read_text(encoding="utf-8").lower(), path


def test_the_pages_own_test_passes(tree: Path):
    assert "1 passed" in run(tree, "-m", "pytest", "-p", "no:xdist", "tests/dpo/test_simpo.py")


def test_the_pages_code_passes_the_linter(tree: Path):
    """The copy is beside no pyproject of another: the rules are this project's."""
    run(tree, "-m", "ruff", "check", "dpo", "tests/dpo/test_simpo.py")
    run(tree, "-m", "ruff", "format", "--check", "dpo", "tests/dpo/test_simpo.py")


@pytest.mark.slow
def test_the_new_method_trains_is_compared_and_drawn(tree: Path):
    (command,) = re.findall(r"^```\n(klash .*)\n```$", PAGE, re.M)
    main = "from benchmarks.cli import main; main()"
    out = run(tree, "-c", main, *command.split()[1:])
    assert "runs/tiny/report/index.html" in out
    results = json.loads((tree / "runs/tiny/results.json").read_text(encoding="utf-8"))
    method = results["methods"]["simpo"]
    assert method["kind"] == "direct"
    assert [s["setting"] for s in method["sweep"]] == [
        {"beta": 2.0, "gamma": 1.0},
        {"beta": 2.0, "gamma": 0.5, "learning_rate": 2e-4},
    ]
    assert all(gold is not None for gold in method["gold"]["per_seed"])
    page = (tree / "runs/tiny/report/index.html").read_text(encoding="utf-8")
    assert "simpo" in page
    assert method["kl"]["mean"] > 0  # it left its start
    assert len([*tree.glob("runs/.stages/direct-*/final")]) == 3  # two settings, the best one again


@pytest.mark.slow
def test_nothing_else_in_the_tests_asks_for_a_fifth_place(tree: Path):
    run(tree, "-m", "pytest", "-p", "no:xdist", "-m", "not slow", "tests/dpo")
