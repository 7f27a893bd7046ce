"""The house: who may import whom, and what appears nowhere. Read from the source, run by nobody."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[2]
PACKAGES = ("shared", "rlhf", "dpo", "benchmarks")
ALLOWED = {
    "shared": {"shared"},
    "rlhf": {"shared", "rlhf"},
    "dpo": {"shared", "dpo"},
    "benchmarks": {"shared", "rlhf", "dpo", "benchmarks"},
}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> set[str]:
    """Every module that may be meant: `from a import b` is a, and a.b if that is a module."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reached(module: str) -> set[str]:
    """All modules below `module`, its own packages followed."""
    files = {module_of(path): path for path in SOURCES}
    seen, queue = set(), [module]
    while queue:
        current = queue.pop()
        if current not in seen:
            seen.add(current)
            queue += imports(TREES[files[current]]) if current in files else []
    return seen


def calls(tree: ast.AST) -> Iterator[str]:
    """`f` and `a.b.f` of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_there_is_something_to_read():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES)
    assert len(SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_go_one_way(path: Path):
    """shared <- rlhf, dpo <- benchmarks; rlhf and dpo never meet."""
    package = path.relative_to(ROOT).parts[0]
    roots = {name.partition(".")[0] for name in imports(TREES[path])}
    assert roots & set(PACKAGES) <= ALLOWED[package]
    assert "tests" not in roots


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_are_absolute_and_name_what_they_take(path: Path):
    """The hash of a stage's code follows absolute imports."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"line {node.lineno}: *"


@pytest.mark.parametrize(
    "module",
    [module_of(p) for p in SOURCES if p.parent == ROOT / "benchmarks" / "report"],
)
def test_the_report_reaches_no_torch(module: str):
    heavy = {"torch", "transformers", "trl", "accelerate", "datasets", "peft", "safetensors"}
    assert not {name.partition(".")[0] for name in reached(module)} & heavy


def test_nothing_but_the_command_and_the_run_import_the_report():
    """Numbers do not depend on how they are drawn."""
    users = {
        module_of(path)
        for path in SOURCES
        if any(name.startswith("benchmarks.report") for name in imports(TREES[path]))
        and path.parent != ROOT / "benchmarks" / "report"
    }
    assert users <= {
        "benchmarks.commands.head_to_head",
        "benchmarks.run",
        "benchmarks.studies.regret",
    }


def test_one_place_knows_of_c():
    """`shared/cpu/` can be deleted: everything runs, slower."""
    outside = [path for path in SOURCES if path.parent != ROOT / "shared" / "cpu"]
    users = {
        module_of(path)
        for path in outside
        if any(name.startswith("shared.cpu") for name in imports(TREES[path]))
    }
    assert users == {"shared.models.ops"}


def test_one_place_asks_for_a_gpu():
    """The device is said once: who asked by himself would load beside the others."""
    users = {module_of(p) for p in SOURCES if "torch.cuda.is_available" in p.read_text("utf-8")}
    assert users == {"shared.models.device"}


def test_without_the_folder_of_c_operations_are_pytorchs():
    code = (
        "import sys; sys.modules['shared.cpu'] = None; import torch; from shared.models import ops;"
        "ops.linear(torch.ones(8, 16), torch.ones(16, 16), None);"
        "print(ops.computed_by())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("PyTorch\n", "")


def test_no_module_is_in_a_circle():
    for path in SOURCES:
        module = module_of(path)
        below = set().union(*(reached(name) for name in imports(TREES[path])))
        assert module not in below, f"{module} imports itself through others"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_no_function_takes_more_than_eight_parameters(path: Path):
    """Stage functions too: what belongs together is a frozen dataclass."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef):
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            others = [a for a in named if a.arg not in ("self", "cls", "ctx")]
            assert len(others) <= 8, f"line {node.lineno}: {node.name} takes {len(others)}"


def test_init_files_are_empty():
    inits = [path for path in SOURCES if path.name == "__init__.py"]
    assert {path.parent for path in SOURCES} == {path.parent for path in inits}
    assert [path for path in inits if path.read_bytes().strip()] == []


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_nothing_runs_code_that_comes_from_data(path: Path):
    modules = {name.partition(".")[0] for name in imports(TREES[path])}
    assert not modules & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    refused = {"eval", "exec", "compile", "torch.load", "torch.save", "yaml.load", "os.system"}
    assert not refused & set(calls(TREES[path]))
    keywords = {
        word.arg: word.value
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Call)
        for word in node.keywords
    }
    assert not {"allow_pickle", "trust_remote_code", "shell"} & keywords.keys()


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_no_error_is_swallowed_whole(path: Path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            names = ast.unparse(node.type)
            broad = {"Exception", "BaseException"} & set(names.strip("()").split(", "))
            assert not broad, f"line {node.lineno}: except {names}"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_nothing_is_left_to_do(path: Path):
    text = path.read_text(encoding="utf-8")
    assert not [mark for mark in ("TODO", "FIXME", "XXX", "HACK") if mark in text]


def test_every_package_is_installed():
    """A folder left out, such as one without `__init__.py`, would import from a clone alone."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = find_packages(str(ROOT), include=listed["find"]["include"])
    assert set(found) == {module_of(path.with_name("__init__.py")) for path in SOURCES}


def test_configuration_loads_without_torch():
    """A wrong key is refused at once, not after seconds of imports."""
    code = "import sys, shared.config, shared.stages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
