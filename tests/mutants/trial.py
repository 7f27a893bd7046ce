"""One mutant on trial: a copy of the tree with one file changed, its tests run in a forked child.

The parent has imported the heavy libraries and nothing of Klash, so a child costs little more than
its tests. A fault counts as caught only if a test *asserted* against it: an exception that Klash's
own code raises is a crash, and is told apart.
"""

import compileall
import contextlib
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import hypothesis
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("shared", "rlhf", "dpo", "benchmarks")
HEAVY = (
    "torch", "transformers", "transformers.models.llama.modeling_llama", "accelerate", "datasets",
    "trl", "trl.trainer.dpo_trainer", "trl.trainer.kto_trainer", "trl.trainer.sft_trainer",
    "scipy.stats", "scipy.optimize", "matplotlib.pyplot", "pydantic", "tyro", "jinja2",
    "safetensors.torch", "vaderSentiment.vaderSentiment", "hypothesis.strategies",
)  # fmt: skip
OPTIONS = (
    "-m", "not slow and not gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors",
    "-W", "ignore", "--assert=plain",
)  # fmt: skip
CRASHES = 5  # exceptions that are no assertion, after which a trial ends
POLL = 0.05  # seconds
# A trial may compute for TIMES as long as its tests do without a fault, at least for LEAST_LIMIT.
# Seconds of a processor: another program on the machine, which only makes it wait, ends no trial.
# What waits for ever computes nothing: WALL times as long by the clock ends it too.
TIMES, LEAST_LIMIT, FIRST_LIMIT, WALL = 6, 120, 3600, 10

Outcome = Literal["caught", "crash", "timeout", "survived", "skipped"]


class Mutant(NamedTuple):
    """One changed file and the test files that look at it, the most relevant first."""

    name: str
    file: str
    text: str  # of the whole file, changed
    tests: tuple[str, ...]


class Trial(NamedTuple):
    """What the tests said of a mutant; `by` is the first test that asserted, or that crashed."""

    outcome: Outcome
    by: str
    seconds: dict[str, float]  # of a processor, each test file's


class Running(NamedTuple):
    """A child at work."""

    number: int  # of its mutant
    tree: Path
    end: float  # by the clock, when it is stopped


def try_all(
    mutants: Sequence[Mutant], workers: int, limits: dict[str, float]
) -> Iterator[tuple[int, Trial]]:
    """(number of the mutant, its trial) as they end.

    `limits` are the seconds that each test file computes for; FIRST_LIMIT where it is not there.
    """
    running: dict[int, Running] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = [copy_tree(Path(folder) / str(n)) for n in range(workers)]
        waiting = list(enumerate(mutants))[::-1]
        try:
            while waiting or running:
                while waiting and trees:
                    number, mutant = waiting.pop()
                    tree = trees.pop()
                    (tree / mutant.file).write_text(mutant.text, encoding="utf-8")
                    known = [limits.get(t, FIRST_LIMIT / TIMES) for t in mutant.tests]
                    limit = max(LEAST_LIMIT, int(TIMES * sum(known)))
                    child = start(tree, mutant.tests, limit)
                    running[child] = Running(number, tree, time.monotonic() + WALL * limit)
                time.sleep(POLL)
                for child, (number, tree, end) in list(running.items()):
                    status = ended(child, time.monotonic() > end)
                    if status is not None:
                        del running[child]
                        trees.append(tree)
                        shutil.copy2(ROOT / mutants[number].file, tree / mutants[number].file)
                        yield number, verdict(tree, status)
        finally:
            for child in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)


def ended(child: int, late: bool) -> int | None:
    """How a child ended, as `waitpid` has it; None if it has not. One that is late is stopped."""
    if late:
        os.killpg(child, signal.SIGXCPU)
    found, status = os.waitpid(child, 0 if late else os.WNOHANG)
    return status if found else None


def copy_tree(to: Path) -> Path:
    """The tree as it lies here, without what tests do not read."""
    skipped = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", "mutants")
    shutil.copytree(ROOT, to / "tree", ignore=skipped)
    for folder in (*PACKAGES, "tests"):  # a changed file is newer than its bytecode
        compileall.compile_dir(to / "tree" / folder, quiet=1)
    return to / "tree"


def start(tree: Path, tests: Sequence[str], limit: int) -> int:
    """Fork a child that runs `tests` on `tree`, computing for `limit` seconds at most; its number.

    The limit is that of each process: those that a test starts have their own.
    """
    for left in tree.parent.glob("result.json"):
        left.unlink()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        run_tests(tree, tests)
        status = 0
    finally:
        os._exit(status)


def run_tests(tree: Path, tests: Sequence[str]) -> None:
    """In the child: pytest on the copy, which goes before whatever is installed."""
    output = os.open(tree.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    here = {"", str(ROOT), str(ROOT / "tests")}
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in here)]
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    watcher = Watcher(tree)
    paths = [str(path_of_tests(name).relative_to(ROOT)) for name in tests]
    code = pytest.main([*OPTIONS, f"--basetemp={tree.parent / 'tmp'}", *paths], plugins=[watcher])
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if name.partition(".")[0] in PACKAGES and path:
            assert Path(path).is_relative_to(tree), f"{name} is not the copy's: {path}"
    assert code in (0, 1, 2), f"pytest did no tests: exit code {code}"
    (tree.parent / "result.json").write_text(json.dumps(watcher.result()))


def path_of_tests(name: str) -> Path:
    """The test file of this name, in whichever folder it lies."""
    (found,) = (ROOT / "tests").rglob(name)
    return found


def verdict(tree: Path, status: int) -> Trial:
    """What the child left behind; a child that died without a word crashed."""
    path = tree.parent / "result.json"
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return Trial("timeout", "", {})
    return Trial(**json.loads(path.read_text())) if path.exists() else Trial("crash", "died", {})


def computed() -> float:
    """Seconds of a processor that this process and those it started have had."""
    whose = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    used = map(resource.getrusage, whose)
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


class Watcher:
    """A pytest plugin: ends the run at the first assertion, or after some crashes."""

    def __init__(self, tree: Path):
        self.tree, self.asserted, self.crashed = tree, "", []
        self.seconds: dict[str, float] = {}
        self.before = computed()

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        if asserts(call.excinfo, self.tree):
            self.asserted = node.nodeid
        else:
            self.crashed.append(node.nodeid)
        if self.asserted or len(self.crashed) >= CRASHES:
            node.session.shouldstop = "enough is known"

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = Path(report.nodeid.partition("::")[0]).name
        before, self.before = self.before, computed()
        self.seconds[name] = self.seconds.get(name, 0.0) + self.before - before

    def result(self) -> dict[str, Any]:
        outcome = "caught" if self.asserted else "crash" if self.crashed else "survived"
        by = self.asserted or next(iter(self.crashed), "")
        return {"outcome": outcome, "by": by.removeprefix("tests/"), "seconds": self.seconds}


def asserts(info: Any, tree: Path) -> bool:
    """Whether a test said no: an assertion, `pytest.fail` or a missing exception, in a test file.

    An assertion inside Klash's own code or inside a library that it called is a crash.
    """
    errors = [info.value]
    while isinstance(errors[0], BaseExceptionGroup):
        errors = [*errors[0].exceptions]
    said_no = any(isinstance(e, AssertionError | pytest.fail.Exception) for e in errors)
    ours = [
        folder
        for entry in info.traceback
        for folder in (*PACKAGES, "tests")
        if Path(entry.path).is_relative_to(tree / folder)
    ]
    return said_no and ours[-1:] == ["tests"]


def prepare() -> None:
    """In the parent, once: import what every child needs, and nothing of Klash.

    Hypothesis gets the same examples in every trial and no deadline that a busy machine could miss.
    """
    for name in HEAVY:
        importlib.import_module(name)
    hypothesis.settings.register_profile(
        "mutants", derandomize=True, deadline=None, database=None, print_blob=False
    )
    hypothesis.settings.load_profile("mutants")
    ours = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    assert not ours, f"imported before the copy could be: {ours}"
    gc.freeze()  # so that a child collects its own garbage alone
