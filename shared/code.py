"""The code that a piece of work reaches: which files of the project can change its result."""

import ast
import hashlib
import importlib.util
import re
from functools import cache
from pathlib import Path

PROJECT = ("shared", "rlhf", "dpo", "benchmarks")
C, PAGES = (".c", ".h"), (".html", ".css")
C_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'""", re.DOTALL
)


@cache
def code_of(module: str) -> dict[str, str]:
    """{file: hash} of `module`, of all project modules that it imports, and of what lies near.

    Of Python the syntax counts without docstrings, of C the text without comments and blank lines,
    of templates and style sheets everything. All three belong to the modules in their folder.
    """
    found, queue = {}, [module]
    while queue:
        current = queue.pop()
        path = _source(current)
        if path is None:
            continue
        package = path.name == "__init__.py"
        file = current.replace(".", "/") + ("/__init__.py" if package else ".py")
        if file in found:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[file] = _hash(ast.dump(_without_docstrings(tree)).encode())
        for near in path.parent.iterdir():
            if near.suffix in (*C, *PAGES):
                found[str(Path(file).with_name(near.name))] = _hash(_content(near))
        queue.extend(_project_imports(tree))
    return dict(sorted(found.items()))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """Sentences that explain change no result; the tree itself is changed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [part for part in node.body if not _is_text(part)]
    return tree


def _is_text(part: ast.stmt) -> bool:
    value = part.value if isinstance(part, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def without_comments(text: str) -> str:
    """C without comments, blank lines and spaces at the ends of lines."""
    bare = C_TOKEN.sub(lambda token: " " if token["comment"] else token[0], text)
    lines = (line.rstrip() for line in bare.split("\n"))
    return "\n".join(line for line in lines if line)


def _source(module: str) -> Path | None:
    """The file of `module`; None for a name in a module, a package without code, or one that is
    not there, such as `shared.cpu` where its folder was deleted."""
    package, _, _ = module.rpartition(".")
    parent = importlib.util.find_spec(package) if package else None
    if package and (parent is None or parent.submodule_search_locations is None):
        return None
    spec = importlib.util.find_spec(module)
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def _content(path: Path) -> bytes:
    if path.suffix not in C:
        return path.read_bytes()
    return without_comments(path.read_text(encoding="utf-8")).encode()


def _project_imports(tree: ast.AST) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
    return [name for name in names if name.split(".")[0] in PROJECT]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
