"""A stage reads folders and writes one folder: skipped when done, atomic, with a manifest.

A stage's folder is named by a hash of what went into it: its name, its part of the configuration,
the identities of the stages it reads, and the code it runs. Equal work is thus done once, by any
experiment, and a change of any input makes a new folder. The folder appears in one rename, after
its manifest (what went in, and the SHA-256 of every file) is on disk: a killed run leaves nothing
half done, and a training goes on from what it had saved (`shared.training.saves`).
"""

import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel

from shared.code import code_of
from shared.config import InputError

A = TypeVar("A")
B = TypeVar("B")
Work = Callable[..., None]
MACHINE = re.sub(r"[^A-Za-z0-9]", "_", platform.node())  # whose processes `is_running` knows
SAVES = "saves"  # in a stage's folder: what its work goes on from if it is stopped


class Missing(Exception):
    """A stage that is not there yet."""


class OnlyWith(NamedTuple):
    """A value of the context that counts for stages whose code reaches `file`, no others."""

    file: str
    value: Any


@dataclass(frozen=True)
class Given:
    """A user's file or folder, or a hub's, as a stage's input: its address is its content."""

    source: str
    content: str


@dataclass(frozen=True)
class Stage:
    """One piece of work: `work(folder, **inputs)` fills its folder.

    `origin` is what went into it as plain values (`inputs`, `code`, `context`): its address.
    """

    name: str
    work: Work
    inputs: dict[str, Any]
    origin: dict[str, Any]

    @property
    def key(self) -> str:
        """`name-<hash>`: changes with any input, the context, and any code that `work` reaches."""
        return f"{self.name}-{_digest([self.name, self.origin])[:16]}"


def stage_of(name: str, work: Work, inputs: dict[str, Any], context: dict[str, Any]) -> Stage:
    """The stage that does `work` on `inputs`, here and now."""
    code = code_of(work.__module__)
    counts = {
        key: value.value if isinstance(value, OnlyWith) else value
        for key, value in context.items()
        if not isinstance(value, OnlyWith) or value.file in code
    }
    origin = {"inputs": _plain(inputs), "code": code, "context": _plain(counts)}
    return Stage(name, work, inputs, origin)


def stage_key(
    name: str, work: Work, inputs: dict[str, Any], context: dict[str, Any] | None = None
) -> str:
    """The name of a stage's folder."""
    return stage_of(name, work, inputs, context or {}).key


def fill_stage(folder: Path, stage: Stage, *, taken_over: bool = False) -> float:
    """Set a damaged `folder` aside, and let the stage's work fill it; seconds.

    `taken_over`: who was at it on another machine has fallen, so that its saves are ours.
    """
    with suppress(FileNotFoundError):  # not there, or another process was first
        folder.rename(folder.with_name(f".damaged-{folder.name}-{time.time_ns()}"))
    start = time.perf_counter()
    with _appears_whole(folder, taken_over) as unfinished:
        stage.work(unfinished, **stage.inputs)
        write_manifest(unfinished, {"stage": stage.name, **stage.origin})
    return time.perf_counter() - start


class Runner(Protocol):
    """What gives stages' folders: done here, in other processes, or only planned."""

    def run(self, name: str, work: Work, *, label: str = "", **inputs: Any) -> Path:
        """The folder of stage `name`, filled by `work(folder, **inputs)`; `label` is for people."""
        ...

    def each(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """`function` of each item: the items are independent, so that their order is free."""
        ...


@dataclass
class Stages:
    """The store of finished stages below `root`; `report(label, state, seconds)` hears of each.

    `context` is hashed into every stage: what may change results besides inputs and code, such as
    the versions of libraries and the number of threads. `fill` does a stage's work and returns its
    seconds; where it is None, Missing is raised instead. `there` tells whether a folder is
    finished. Folders in `checked` were found intact.
    """

    root: Path
    report: Callable[[str, str, float], None]
    context: dict[str, Any] = field(default_factory=dict)
    fill: Callable[[Path, Stage], float] | None = fill_stage
    there: Callable[[Path], bool] = lambda folder: intact(folder)
    checked: set[Path] = field(default_factory=set)

    def run(self, name: str, work: Work, *, label: str = "", **inputs: Any) -> Path:
        """The folder of stage `name`; `work(folder, **inputs)` fills it if no finished one exists.

        `inputs` are plain values, configuration models and folders of earlier stages: what is
        hashed is exactly what `work` gets. A damaged folder is set aside and its stage runs again.
        An error in `work`, or a kill, leaves no stage; work that had made SAVES finds its folder
        as it was the next time.
        """
        stage = stage_of(name, work, inputs, self.context)
        folder = self.root / stage.key
        if folder not in self.checked:
            if self.there(folder):
                self.report(label or name, "cached", 0.0)
            elif self.fill is None:
                raise Missing(label or name)
            else:
                self.report(label or name, "running", 0.0)
                self.report(label or name, "done", self.fill(folder, stage))
            self.checked.add(folder)
        return folder

    def each(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """`function` of each item, in order."""
        return [function(item) for item in items]


def silent(label: str, state: str, seconds: float) -> None:
    """Reports nothing."""


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
    """Write a line a row in one rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    temporary.replace(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write_manifest(folder: Path, origin: dict[str, Any]) -> None:
    """`manifest.json`: what the stage was, the SHA-256 of its files, and a digest of all that."""
    files = {str(p.relative_to(folder)): _sha256(p) for p in _files(folder)}
    manifest = {**origin, "files": files}
    write_json(folder / "manifest.json", {**manifest, "digest": _digest(manifest)})
    flush_to_disk(folder)


def flush_to_disk(folder: Path) -> None:
    """What `folder` holds, but for SAVES, survives the machine's fall too."""
    for path in [*_files(folder), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A stage's manifest as it was written; None if it is missing or damaged."""
    try:
        manifest = read_json(folder / "manifest.json")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: not JSON, not UTF-8
        return None
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != _digest(manifest):
        return None
    return manifest


def intact(folder: Path, files: Iterable[str] | None = None) -> bool:
    """Whether a stage's manifest is sound and its files (or just `files`) have their hashes."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    hashes = manifest["files"]
    return all(
        (folder / f).is_file() and _sha256(folder / f) == hashes.get(f) for f in files or hashes
    )


@contextmanager
def _appears_whole(folder: Path, taken_over: bool) -> Iterator[Path]:
    """A folder to fill that becomes `folder` in one rename; another process may get there first."""
    stopped = folder.with_name(f".stopped-{folder.name}")
    for abandoned in folder.parent.glob(f".unfinished-{folder.name}-*"):
        machine, process = owner_of(abandoned)
        here = machine == MACHINE and (process == os.getpid() or not is_running(process))
        if here or (machine != MACHINE and taken_over):
            _put_aside(abandoned, stopped)
    unfinished = unfinished_folder(folder, os.getpid())
    unfinished.mkdir(parents=True)
    with suppress(FileNotFoundError):
        stopped.rename(unfinished)
    try:
        yield unfinished
        unfinished.rename(folder)
    except OSError:
        if not intact(folder):
            raise
    finally:
        _put_aside(unfinished, stopped)  # it is gone if it has become `folder`
    for saves in (folder / SAVES, stopped):
        shutil.rmtree(saves, ignore_errors=True)
    _flush(folder.parent)


def unfinished_folder(folder: Path, process: int) -> Path:
    """Where a process of this machine fills `folder`."""
    return folder.with_name(f".unfinished-{folder.name}-{MACHINE}.{process}")


def owner_of(unfinished: Path) -> tuple[str, int]:
    """(machine, process) that fills a folder, or did; ("", 0) where its name does not say."""
    machine, _, process = unfinished.name.rpartition("-")[2].rpartition(".")
    return (machine, int(process)) if process.isdigit() and machine else ("", 0)


def _put_aside(unfinished: Path, stopped: Path) -> None:
    """What stopped before its end waits as `stopped` if it had SAVES to go on from."""
    if (unfinished / SAVES).is_dir():
        shutil.rmtree(stopped, ignore_errors=True)
        with suppress(FileNotFoundError):  # another process was first
            unfinished.rename(stopped)
    else:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_running(process: int) -> bool:
    """Whether there is a process of this number."""
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
    if isinstance(value, Given):
        return value.content
    if is_dataclass(value):
        return _plain(vars(value))
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _files(folder: Path) -> list[Path]:
    """Of the stage itself: what it could have gone on from is not part of it."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return sorted(p for p in found if p.relative_to(folder).parts[0] != SAVES)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
