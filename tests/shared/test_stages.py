"""Stages: done once, whole or not at all, and never taken for good when damaged.

`work` functions stand at module level: a stage is known by the code of the module it comes from.
"""

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import shared
from benchmarks.pipeline.places import on_threads
from dpo.train import DirectData
from shared.code import code_of
from shared.config import Config
from shared.generation.engine import Sampling
from shared.generation.start import Drawing, GenerationConfig
from shared.models.load import Start
from shared.models.lora import LoRAConfig
from shared.stages import (
    SAVES,
    Missing,
    Stages,
    read_json,
    read_jsonl,
    stage_key,
    unfinished_folder,
    write_json,
    write_jsonl,
)

ROOT = Path(__file__).parents[2]


class Size(Config):
    rows: int = 3


SMALL = Size()


def fill(folder: Path, size: Size = SMALL, seed: int = 0, **others: object) -> None:
    """A stage of three files, one of them in a folder of its own."""
    (folder / "deep").mkdir()
    rng = random.Random(seed)
    write_jsonl(folder / "rows.jsonl", [{"x": rng.random()} for _ in range(size.rows)])
    (folder / "deep" / "weights.bin").write_bytes(rng.randbytes(500))
    write_json(folder / "log.json", {"seed": seed, "others": sorted(others)})


def fail(folder: Path, seed: int = 0) -> None:
    (folder / "half.txt").write_text("half")
    raise ArithmeticError("in the middle")


def count_threads(folder: Path) -> None:
    write_json(folder / "threads.json", torch.get_num_threads())


def count_and_fail(folder: Path) -> None:
    raise ArithmeticError(f"with {torch.get_num_threads()} threads")


class Store:
    """A fresh `Stages`, as the next run of the command has it, and what it reported."""

    def __init__(self, root: Path):
        self.root = root
        self.said: list[tuple[str, str]] = []

    def run(self, name: str = "fill", work=fill, **inputs: object) -> Path:
        return Stages(self.root, self._hear).run(name, work, **inputs)

    def _hear(self, name: str, state: str, seconds: float) -> None:
        assert seconds >= 0
        self.said.append((name, state))

    @property
    def folders(self) -> list[str]:
        """Finished stages: hidden names are unfinished or damaged ones."""
        return sorted(p.name for p in self.root.iterdir() if not p.name.startswith("."))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "stages")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- done once --------------------------------------------------------------------------------


def test_the_second_run_does_no_work_and_says_so(store: Store):
    first = store.run(seed=1)
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    assert store.run(seed=1) == first
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*")} == before
    assert store.said == [("fill", "running"), ("fill", "done"), ("fill", "cached")]


def test_a_store_that_may_not_fill_says_what_is_missing(store: Store):
    closed = Stages(store.root, store._hear, fill=None)
    with pytest.raises(Missing, match="the second"):
        closed.run("fill", fill, label="the second", seed=2)
    assert not store.root.exists()
    folder = store.run(seed=2)
    assert closed.run("fill", fill, seed=2) == folder


def test_one_run_tells_of_a_stage_once(tmp_path: Path):
    said: list[str] = []
    stages = Stages(tmp_path, lambda name, state, seconds: said.append(state))
    assert stages.run("fill", fill, seed=1) == stages.run("fill", fill, seed=1)
    assert said == ["running", "done"]


def test_stages_may_run_with_threads_of_their_own(tmp_path: Path):
    """Which their address tells; afterwards the process has as many as before."""
    here = Stages(tmp_path, lambda *_: None, {"threads": 1, "torch": "2"})
    alone = on_threads(here, 2)
    folders = [stages.run("count", count_threads) for stages in (alone, here)]
    assert [read_json(folder / "threads.json") for folder in folders] == [2, 1]
    as_two = Stages(tmp_path, lambda *_: None, {"threads": 2, "torch": "2"}, fill=None)
    assert as_two.run("count", count_threads) == folders[0]
    with pytest.raises(ArithmeticError, match="with 2 threads"):
        alone.run("fail", count_and_fail)
    assert torch.get_num_threads() == 1


def test_a_label_names_a_stage_on_screen_and_changes_nothing(store: Store):
    assert store.run(label="the first") == store.run(label="the second")
    assert store.said[-1] == ("the second", "cached")


def test_the_manifest_says_what_went_in_and_what_came_out(store: Store):
    folder = store.run(size=Size(rows=2), seed=5)
    manifest = read_json(folder / "manifest.json")
    assert manifest["stage"] == "fill"
    assert manifest["inputs"] == {"size": {"rows": 2}, "seed": 5}
    found = contents(folder)
    assert set(manifest["files"]) == set(found) - {"manifest.json"}
    shasum = subprocess.run(["sha256sum", *manifest["files"]], cwd=folder, capture_output=True)
    lines = [line.split() for line in shasum.stdout.decode().splitlines()]
    assert {name: digest for digest, name in lines} == manifest["files"]


def test_work_gets_just_its_inputs_and_an_empty_folder(store: Store, tmp_path: Path):
    other = tmp_path / "elsewhere" / "sft-0"
    seen = store.run(size=Size(), seed=2, policy=other, beta=0.1)
    assert read_json(seen / "log.json") == {"seed": 2, "others": ["beta", "policy"]}


# --- another input, another folder ------------------------------------------------------------


INPUTS = {
    "size": Size(rows=3),
    "seed": 0,
    "beta": 0.5,
    "loss": "dpo",
    "policy": Path("/a/sft-12ab"),
    "checkpoints": (0.25, 0.5),
    "setting": {"tau": 0.1},
    "reward": None,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", Size(rows=4)),
        ("seed", 1),
        ("beta", 0.5000001),
        ("loss", "ipo"),
        ("policy", Path("/a/sft-12ac")),
        ("checkpoints", (0.25,)),
        ("checkpoints", (0.5, 0.25)),
        ("setting", {"tau": 0.2}),
        ("setting", {"beta": 0.1}),
        ("setting", {}),
        ("reward", Path("reward-1")),
    ],
)
def test_any_other_input_is_another_stage(name: str, value: object):
    changed = {**INPUTS, name: value}
    assert stage_key("s", fill, changed) != stage_key("s", fill, INPUTS)


GROUPED = {
    "start": Start(Path("/a/sft-12ab"), LoRAConfig(rank=4), seed=1),
    "drawing": Drawing(Sampling(seed=3), GenerationConfig(engine="vllm")),
    "data": DirectData(Path("/a/preferences-1"), Path("/a/reference-1")),
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("start", {"policy": Path("/a/sft-12ac")}),
        ("start", {"lora": LoRAConfig(rank=8)}),
        ("start", {"lora": None}),
        ("start", {"seed": 2}),
        ("drawing", {"sampling": Sampling(seed=4)}),
        ("drawing", {"generation": GenerationConfig()}),
        ("data", {"mismatched": Path("/a/mismatched-1")}),
        ("data", {"reference": Path("/a/reference-2")}),
    ],
)
def test_any_part_of_a_grouped_input_makes_another_stage(name: str, changes: dict[str, object]):
    changed = {**GROUPED, name: replace(GROUPED[name], **changes)}
    assert stage_key("s", fill, changed) != stage_key("s", fill, GROUPED)
    moved = {**GROUPED, "start": replace(GROUPED["start"], policy=Path("/b/sft-12ab"))}
    assert stage_key("s", fill, moved) == stage_key("s", fill, GROUPED)


def test_an_input_more_or_less_or_renamed_is_another_stage():
    less = {k: v for k, v in INPUTS.items() if k != "seed"}
    keys = [INPUTS, {**INPUTS, "more": 0}, less, {**less, "sede": 0}]
    assert len({stage_key("s", fill, inputs) for inputs in keys}) == 4


def test_another_name_is_another_stage():
    assert stage_key("s", fill, INPUTS) != stage_key("t", fill, INPUTS)


def test_the_order_of_inputs_does_not_matter():
    turned = dict(reversed(INPUTS.items()))
    assert stage_key("s", fill, turned) == stage_key("s", fill, INPUTS)


def test_a_folder_is_known_by_its_name_so_that_runs_can_be_moved():
    moved = {**INPUTS, "policy": Path("/b/elsewhere/sft-12ab")}
    assert stage_key("s", fill, moved) == stage_key("s", fill, INPUTS)


def test_a_stage_key_is_a_plain_folder_name():
    key = stage_key("best-of-n", fill, INPUTS)
    assert key.startswith("best-of-n-")
    assert Path(key).name == key
    assert set(key.removeprefix("best-of-n-")) <= set("0123456789abcdef")


def test_keys_do_not_depend_on_the_process(tmp_path: Path):
    """Hash randomisation must not lose yesterday's work."""
    code = (
        "from shared.config import load; from shared.stages import stage_key; "
        "print(stage_key('sft', load, {'seed': 1, 'b': {'x': 1, 'y': 2}}))"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(keys) == 1


# --- other code, another folder ---------------------------------------------------------------


class Project:
    """Modules of the package `shared` that only this test sees: `shared.probe_*`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, name: str, text: str) -> None:
        path = self.folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")

    def hash(self, module: str = "shared.probe_top") -> dict[str, str]:
        importlib.invalidate_caches()
        code_of.cache_clear()  # one process reads its code once
        return code_of(module)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    monkeypatch.setattr(shared, "__path__", [*shared.__path__, str(tmp_path)])
    probe = Project(tmp_path)
    probe.write("probe_top", "from shared.probe_mid import f\nx = 1\n")
    probe.write("probe_mid", "import shared.probe_low\ndef f(): return 1\n")
    probe.write("probe_low", "y = 2\n")
    yield probe
    code_of.cache_clear()


def test_a_changed_module_changes_the_hash(project: Project):
    before = project.hash()
    project.write("probe_top", "from shared.probe_mid import f\nx = 2\n")
    assert project.hash() != before


@pytest.mark.parametrize("module", ["probe_mid", "probe_low"])
def test_a_changed_import_changes_the_hash_however_far_it_lies(project: Project, module: str):
    before = project.hash()
    path = project.folder / f"{module}.py"
    path.write_text(path.read_text() + "z = 3\n")
    assert project.hash() != before


@pytest.mark.parametrize("name", ["page.html", "page.css", "work.c", "work.h"])
def test_what_a_module_reads_beside_it_counts(project: Project, name: str):
    """C and its headers, templates and style sheets; no other file."""
    beside = project.folder / name
    beside.write_text("1")
    before = project.hash()
    beside.write_text("2")
    assert project.hash() != before
    before = project.hash()
    (project.folder / "notes.txt").write_text("1")
    assert project.hash() == before


def test_an_import_inside_a_function_counts(project: Project):
    project.write("probe_top", "def g():\n    from shared.probe_late import h\n    return h()\n")
    project.write("probe_late", "def h(): return 1\n")
    before = project.hash()
    project.write("probe_late", "def h(): return 2\n")
    assert project.hash() != before


def test_a_module_taken_from_its_package_counts(project: Project):
    """`from shared import probe_low` reads the same file as `import shared.probe_low`."""
    project.write("probe_top", "from shared import probe_low\nx = probe_low.y\n")
    before = project.hash()
    project.write("probe_low", "y = 3\n")
    assert project.hash() != before


def test_comments_and_layout_do_not_change_the_hash(project: Project):
    before = project.hash()
    project.write(
        "probe_mid", "# new\nimport shared.probe_low\n\n\ndef f():\n    return (1)  # x\n"
    )
    assert project.hash() == before


def test_what_is_not_imported_does_not_change_the_hash(project: Project):
    before = project.hash()
    project.write("probe_alone", "a = 1\n")
    assert project.hash() == before


def test_a_package_that_may_be_missing_has_no_part_in_the_hash(project: Project):
    """As `shared/cpu/`, which can be deleted."""
    guarded = "try:\n    from shared.absent import x\nexcept ModuleNotFoundError:\n    x = None\n"
    project.write("probe_low", guarded)
    assert project.hash()


def test_modules_that_import_each_other_have_a_hash(project: Project):
    project.write("probe_low", "import shared.probe_top\n")
    before = project.hash()
    project.write("probe_low", "import shared.probe_top\ny = 4\n")
    assert project.hash() != before


def test_changed_code_runs_the_stage_again(project: Project, store: Store):
    project.write("probe_top", "def work(folder):\n    (folder / 'a').write_text('1')\n")
    project.hash()
    first = store.run("probe", importlib.import_module("shared.probe_top").work)
    project.write("probe_top", "def work(folder):\n    (folder / 'a').write_text('2')\n")
    project.hash()
    module = importlib.reload(sys.modules["shared.probe_top"])
    second = store.run("probe", module.work)
    del sys.modules["shared.probe_top"]
    assert (first / "a").read_text() == "1"
    assert (second / "a").read_text() == "2"


# --- whole or not at all ----------------------------------------------------------------------


def test_an_error_leaves_no_stage(store: Store):
    with pytest.raises(ArithmeticError, match="in the middle"):
        store.run("fail", fail)
    assert store.folders == []
    assert ("fail", "done") not in store.said


def test_after_an_error_the_same_process_can_try_again(store: Store):
    tries = []

    def flaky(folder: Path) -> None:
        tries.append(folder)
        (folder / "half.txt").write_text("half")
        if len(tries) == 1:
            raise ArithmeticError("the first time")

    with pytest.raises(ArithmeticError):
        store.run("flaky", flaky)
    assert contents(store.run("flaky", flaky)).keys() == {"half.txt", "manifest.json"}
    assert len(tries) == 2


def test_an_error_leaves_nothing_behind(store: Store):
    with pytest.raises(ArithmeticError):
        store.run("fail", fail)
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError, MemoryError])
def test_work_with_saves_finds_what_it_had_written_and_others_see_no_stage(
    store: Store, error: type[BaseException]
):
    tries = []

    def slow(folder: Path) -> None:
        tries.append(sorted(p.name for p in folder.iterdir()))
        (folder / SAVES).mkdir(exist_ok=True)
        (folder / f"{len(tries)}.txt").write_text("")
        if len(tries) < 3:
            raise error("not now")

    for _ in range(2):
        with pytest.raises(error, match="not now"):
            store.run("slow", slow)
        assert store.folders == []
    done = store.run("slow", slow)
    assert tries == [[], ["1.txt", SAVES], ["1.txt", "2.txt", SAVES]]
    assert contents(done).keys() == {"1.txt", "2.txt", "3.txt", "manifest.json"}
    assert [p.name for p in store.root.iterdir()] == [done.name]


KILLED = """
import os, signal, sys
from pathlib import Path
from shared.stages import Stages

sys.path.insert(0, {tests!r})
import test_stages

def die(folder, **inputs):
    test_stages.fill(folder, **inputs)
    (folder / "half.txt").write_text("half")
    print(folder, flush=True)
    {death}

die.__module__ = test_stages.fill.__module__
Stages(Path({root!r}), lambda *a: None).run("fill", die, seed=7)
"""


@pytest.mark.parametrize("death", ["os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_killed_run_leaves_nothing_half_done_and_the_next_one_completes(store: Store, death: str):
    code = KILLED.format(tests=str(Path(__file__).parent), root=str(store.root), death=death)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode in (3, -signal.SIGKILL), result.stderr
    left = Path(result.stdout.strip())
    assert left.is_dir()  # it died in the middle of its work
    assert store.folders == []
    folder = store.run(seed=7)
    assert "half.txt" not in contents(folder)
    assert not left.exists()  # what the dead process left is cleared away
    assert [p.name for p in store.root.iterdir()] == [folder.name]


def test_a_process_with_the_number_of_a_dead_one_is_not_in_its_way(store: Store):
    """In a container every run may have the same process number."""
    key = stage_key("fill", fill, {"seed": 3})
    left = unfinished_folder(store.root / key, os.getpid())
    left.mkdir(parents=True)
    (left / "half.txt").write_text("half")
    folder = store.run(seed=3)
    assert "half.txt" not in contents(folder)


def test_the_unfinished_folder_of_a_living_process_is_left_alone(store: Store):
    key = stage_key("fill", fill, {"seed": 3})
    others = unfinished_folder(store.root / key, os.getppid())
    others.mkdir(parents=True)
    store.run(seed=3)
    assert others.is_dir()


def slow(folder: Path, seed: int, meeting: Path) -> None:
    """Waits until another process is at work on the same stage."""
    (meeting / str(os.getpid())).touch()
    end = time.monotonic() + 20
    while len(list(meeting.iterdir())) < 2:
        assert time.monotonic() < end, "the other process never came"
        time.sleep(0.01)
    fill(folder, seed=seed)


def race(root: Path, meeting: Path, queue: "multiprocessing.Queue[str]") -> None:
    folder = Stages(root, lambda *_: None).run("race", slow, seed=1, meeting=meeting)
    queue.put(str(folder))


def test_two_processes_at_one_stage_both_succeed(store: Store, tmp_path: Path):
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[str] = context.Queue()
    runners = [context.Process(target=race, args=(store.root, meeting, queue)) for _ in range(2)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(30)
    assert [runner.exitcode for runner in runners] == [0, 0]
    first, second = queue.get(timeout=5), queue.get(timeout=5)
    assert first == second
    assert len(list(meeting.iterdir())) == 2  # both did the work
    assert [p.name for p in store.root.iterdir()] == [Path(first).name]
    store.run("race", slow, seed=1, meeting=meeting)
    assert store.said == [("race", "cached")]


# --- never taken for good when damaged --------------------------------------------------------


def damage(folder: Path, rng: random.Random) -> str:
    """One accident to a finished stage; says which."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    kind = rng.choice(["flip", "flip", "flip", "truncate", "grow", "remove", "manifest"])
    data = [p for p in files if p.name != "manifest.json"]
    path = rng.choice(data if kind in ("flip", "grow") else files)
    if kind == "manifest":
        path = folder / "manifest.json"
    content = bytearray(path.read_bytes())
    if kind == "flip":
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
    elif kind in ("truncate", "manifest"):
        del content[rng.randrange(len(content)) :]
    elif kind == "grow":
        content += rng.randbytes(1)
    if kind == "remove":
        path.unlink()
    else:
        path.write_bytes(content)
    return f"{kind} {path.name}"


def test_a_hundred_accidents_are_all_found_and_mended(tmp_path: Path):
    rng = random.Random(0)
    original = Store(tmp_path / "original")
    whole = contents(original.run(seed=4))
    missed = []
    for number in range(100):
        store = Store(tmp_path / str(number))
        shutil.copytree(original.root, store.root)
        what = damage(next(store.root.iterdir()), rng)
        mended = store.run(seed=4)
        if store.said != [("fill", "running"), ("fill", "done")] or contents(mended) != whole:
            missed.append(what)
    assert missed == []


def test_a_changed_bit_of_the_manifest_is_found(tmp_path: Path):
    """Also where it speaks of the inputs: what is recorded of a result must be true."""
    original = Store(tmp_path / "original")
    folder = original.run(seed=4, beta=0.25)
    whole = (folder / "manifest.json").read_bytes()
    missed = []
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1
        (folder / "manifest.json").write_bytes(changed)
        store = Store(original.root)
        store.run(seed=4, beta=0.25)
        if store.said[-1] == ("fill", "cached"):
            missed.append(whole[max(0, place - 8) : place + 8].decode())
        (folder / "manifest.json").write_bytes(whole)
        for old in original.root.glob(".damaged-*"):
            shutil.rmtree(old)
    assert missed == []


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"files": []}', "\0" * 50])
def test_a_manifest_that_is_something_else_is_found(store: Store, text: str):
    folder = store.run(seed=4)
    whole = contents(folder)
    (folder / "manifest.json").write_text(text)
    assert contents(store.run(seed=4)) == whole
    assert store.said[-1] == ("fill", "done")


def test_a_damaged_folder_is_set_aside_and_not_lost(store: Store):
    folder = store.run(seed=4)
    (folder / "rows.jsonl").write_text("mine now")
    store.run(seed=4)
    aside = [p for p in store.root.iterdir() if p.name.startswith(".damaged-")]
    assert [(p / "rows.jsonl").read_text() for p in aside] == ["mine now"]


def test_a_folder_that_someone_made_is_not_taken_for_a_stage(store: Store):
    (store.root / stage_key("fill", fill, {"seed": 4})).mkdir(parents=True)
    folder = store.run(seed=4)
    assert (folder / "rows.jsonl").is_file()


# --- files ------------------------------------------------------------------------------------


def test_json_and_lines_come_back_as_they_went(tmp_path: Path):
    value = {"a": [1, 2.5, None, True, "ünï\u2028\n"], "b": {}}
    write_json(tmp_path / "a.json", value)
    write_jsonl(tmp_path / "a.jsonl", [value, {}, value])
    assert read_json(tmp_path / "a.json") == value
    assert read_jsonl(tmp_path / "a.jsonl") == [value, {}, value]
    write_jsonl(tmp_path / "none.jsonl", [])
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path: Path):
    """JSON lets U+2028 and U+0085 stand as they are; other writers do not escape them."""
    rows = [{"text": "one\u2028two"}, {"text": "three\u0085four"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_jsonl(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_json_are_refused_and_the_old_file_stays(tmp_path: Path, value: float):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": value})
    assert json.loads(path.read_text()) == {"a": 1}
