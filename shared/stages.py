"""A stage reads folders and writes one folder: skipped when done, atomic, with a manifest.

A stage's folder is named by a hash of what went into it: its name, its part of the configuration,
the identities of the stages it reads, and the code it runs. Equal work is thus done once, by any
experiment, and a change of any input makes a new folder. The folder appears in one rename, after
its manifest (the SHA-256 of every file) is on disk: a killed run leaves nothing half done.
"""

import ast
import hashlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from shared.config import InputError

A = TypeVar("A")
B = TypeVar("B")
PACKAGES = ("shared", "rlhf", "dpo", "benchmarks")


class Missing(Exception):
    """A stage that is not there yet."""


class Paused(Exception):
    """Work stopped where it can go on: the stage's folder waits, as it is, for the next attempt."""


@dataclass
class Stages:
    """The store of finished stages below `root`; `report(name, state, seconds)` hears of each.

    `context` is hashed into every stage: what may change results besides inputs and code, such as
    the versions of libraries and the number of threads. Without `fill`, Missing is raised where a
    stage would have to be run.
    """

    root: Path
    report: Callable[[str, str, float], None]
    context: dict[str, Any] = field(default_factory=dict)
    fill: bool = True
    _checked: set[Path] = field(default_factory=set)

    def run(self, name: str, work: Callable[..., None], *, label: str = "", **inputs: Any) -> Path:
        """The folder of stage `name`; `work(folder, **inputs)` fills it if no finished one exists.

        `inputs` are plain values, configuration models and folders of earlier stages: what is
        hashed is exactly what `work` gets. A damaged folder is set aside and its stage runs again.
        An error in `work` leaves no folder, but one that is Paused finds in its folder, the next
        time, what it had written.
        """
        folder = self.root / stage_key(name, work, inputs, self.context)
        if folder not in self._checked:
            if intact(folder):
                self.report(label or name, "cached", 0.0)
            elif not self.fill:
                raise Missing(label or name)
            else:
                self.report(label or name, "running", 0.0)
                seconds = self.fill_one(folder, name, work, inputs)
                self.report(label or name, "done", seconds)
            self._checked.add(folder)
        return folder

    def fill_one(
        self, folder: Path, name: str, work: Callable[..., None], inputs: dict[str, Any]
    ) -> float:
        """Do the work of one stage here and now; seconds."""
        return fill_stage(folder, name, work, inputs)

    def each(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """`function` of each item: the items are independent, so that their order is free."""
        return [function(item) for item in items]


def fill_stage(folder: Path, name: str, work: Callable[..., None], inputs: dict[str, Any]) -> float:
    """Set a damaged `folder` aside, and let `work` fill it; seconds."""
    with suppress(FileNotFoundError):  # not there, or another process was first
        folder.rename(folder.with_name(f".damaged-{folder.name}-{time.time_ns()}"))
    start = time.perf_counter()
    with _appears_whole(folder) as unfinished:
        work(unfinished, **inputs)
        write_manifest(unfinished, {"stage": name, "inputs": _plain(inputs)})
    return time.perf_counter() - start


def stage_key(
    name: str,
    work: Callable[..., Any],
    inputs: dict[str, Any],
    context: dict[str, Any] | None = None,
) -> str:
    """`name-<hash>`: changes with any input, the `context`, and any code that `work` reaches."""
    about = [name, _plain(inputs), code_hash(work.__module__), context or {}]
    return f"{name}-{_digest(about)[:16]}"


@cache
def code_hash(module: str) -> str:
    """Hash of the syntax (not the comments) of `module` and of all project modules it imports.

    Templates, style sheets and C beside a module belong to it.
    """
    found, queue = {}, [module]
    while queue:
        current = queue.pop()
        if current in found:
            continue
        package, _, _ = current.rpartition(".")
        parent = importlib.util.find_spec(package) if package else None
        if parent is not None and parent.submodule_search_locations is None:
            continue  # `current` is a name in a module, not a module
        spec = importlib.util.find_spec(current)
        if spec is None or spec.origin is None:
            continue
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        found[current] = hashlib.sha256(ast.dump(tree).encode()).hexdigest()
        for beside in Path(spec.origin).parent.iterdir():
            if beside.suffix in (".html", ".css", ".c", ".h"):
                found[str(beside.name)] = _sha256(beside)
        queue.extend(_project_imports(tree))
    return _digest(found)


def output_folder(folder: Path) -> Path:
    """`folder`, made if need be; InputError if it cannot be: before work starts, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot make this folder: {error.strerror}") from error
    return folder


def write_json(path: Path, value: Any) -> None:
    """Write `value` in one rename, so that a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """`manifest.json`: what the stage was, the SHA-256 of its files, and a digest of all that."""
    about = {**about, "files": {str(p.relative_to(folder)): _sha256(p) for p in _files(folder)}}
    write_json(folder / "manifest.json", {**about, "digest": _digest(about)})
    for path in [*_files(folder), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def intact(folder: Path) -> bool:
    """Whether a stage's folder is whole: its manifest is sound and every file has its hash."""
    try:
        manifest = read_json(folder / "manifest.json")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: not JSON, not UTF-8
        return False
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != _digest(manifest):
        return False
    files = manifest["files"]
    return all((folder / f).is_file() and _sha256(folder / f) == h for f, h in files.items())


@contextmanager
def _appears_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes `folder` in one rename; another process may get there first."""
    for abandoned in folder.parent.glob(f".unfinished-{folder.name}-*"):
        owner = int(abandoned.name.rpartition("-")[2])
        if owner == os.getpid() or not _alive(owner):
            shutil.rmtree(abandoned, ignore_errors=True)
    unfinished = folder.with_name(f".unfinished-{folder.name}-{os.getpid()}")
    paused = folder.with_name(f".paused-{folder.name}")
    unfinished.mkdir(parents=True)
    with suppress(FileNotFoundError):
        paused.rename(unfinished)
    try:
        yield unfinished
        unfinished.rename(folder)
    except Paused:
        shutil.rmtree(paused, ignore_errors=True)
        unfinished.rename(paused)
        raise
    except OSError:
        if not intact(folder):
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """`value` as JSON; a stage's folder is known by its name, which is its content's address."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return value.name
    if is_dataclass(value):
        return _plain(vars(value))
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _project_imports(tree: ast.AST) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
    return [name for name in names if name.split(".")[0] in PACKAGES]


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
