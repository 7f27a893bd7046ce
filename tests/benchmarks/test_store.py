"""What runs leave on disk: who needs which stage, and a removal that takes nothing else."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from checks import Klash

from benchmarks.pipeline.store import Kept, age, read_store, size_text
from shared.stages import SAVES, Stages, read_json, silent, unfinished_folder, write_json


def make(folder: Path, number: int, reads: Path | None = None) -> None:
    (folder / "data.bin").write_bytes(b"x" * 1000 * number)


@dataclass(frozen=True)
class Nested:
    """Folders deep in a stage's inputs."""

    folders: dict[str, list[Path]]


def summarise(folder: Path, parts: Nested) -> None:
    write_json(folder / "results.json", {"of": [p.name for p in parts.folders["all"]]})


def draw(folder: Path, run: Path) -> None:
    (folder / "index.html").write_text(str(read_json(run / "results.json")))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """One finished run of data, a training on it, a summary and a report; two stages of nobody."""
    runs = tmp_path / "runs"
    stages = Stages(runs / ".stages", silent)
    data = stages.run("data", make, number=1)
    trained = stages.run("ppo", make, number=2, reads=data)
    summary = stages.run("summary", summarise, parts=Nested({"all": [trained]}))
    report = stages.run("report", draw, run=summary)
    (runs / "mine").mkdir()
    shutil.copy(summary / "results.json", runs / "mine")
    shutil.copy(report / "index.html", runs / "mine")
    stages.run("ppo", make, number=3, reads=data)
    other = stages.run("data", make, number=4)
    stages.run("summary", summarise, parts=Nested({"all": [other]}))  # of a run that is gone
    return runs


def test_a_run_needs_what_its_summary_was_made_from_however_deep_and_its_report(runs: Path):
    store = read_store(runs)
    assert {name.rpartition("-")[0] for name in store.needs["mine"]} == {
        "data", "ppo", "summary", "report"
    }  # fmt: skip
    assert len(store.needs["mine"]) == 4
    assert sum(1000 * n for n in (3, 4)) < sum(one.size for one in store.unneeded) < 10_000
    assert len(store.unneeded) == 3
    assert store.unneeded == sorted(store.unneeded, key=lambda kept: kept.changed)


def test_a_run_is_listed_with_the_room_it_takes(runs: Path, klash: Klash):
    code, out, err = klash("runs")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["run", "age", "size", "stages", "their", "size"]
    assert lines[1].split()[0] == "mine"
    assert lines[1].split()[-3] == "4"
    assert "all stages: 7" in out
    assert "needed by no finished run: 3" in out
    _, out, _ = klash("runs", "--stages")
    rows = [line.split() for line in out.splitlines()[1:8]]
    assert [row[-1] for row in rows].count("mine") == 4
    assert [row[-1] for row in rows].count("-") == 3
    assert rows[0][0].startswith("data-")  # the largest


def test_clean_removes_what_nobody_needs_and_the_run_stands(runs: Path, klash: Klash):
    store = read_store(runs)
    code, out, err = klash("runs", "clean")  # a test has no terminal
    assert code == 2
    assert "--yes" in err
    assert read_store(runs) == store
    code, out, _ = klash("runs", "clean", "--yes")
    assert code == 0
    assert "removed 3 folders" in out
    left = {folder.name for folder in (runs / ".stages").iterdir()}
    assert left == store.needs["mine"]
    _, out, _ = klash("runs", "clean", "--yes")
    assert out.startswith("nothing to remove")
    states: list[str] = []
    again = Stages(runs / ".stages", lambda _, state, __: states.append(state))
    again.run("ppo", make, number=2, reads=again.run("data", make, number=1))
    assert states == ["cached", "cached"]


def test_what_is_younger_stays(runs: Path, klash: Klash):
    store = read_store(runs)
    oldest = store.unneeded[0].folder
    os.utime(oldest, (0, 0))
    _, out, _ = klash("runs", "clean", "--yes", "--days", "30")
    assert "removed 1 folders" in out
    assert not oldest.exists()
    assert len(read_store(runs).stages) == 6


def test_what_a_stopped_training_saved_goes_and_a_run_under_way_stops_the_removal(
    runs: Path, klash: Klash
):
    stopped = runs / ".stages" / ".stopped-ppo-0123456789abcdef" / SAVES
    stopped.mkdir(parents=True)
    working = unfinished_folder(runs / ".stages" / "ppo-0123456789abcdef", os.getpid())
    working.mkdir()
    code, _, err = klash("runs", "clean", "--yes")
    assert code == 2
    assert f"a run is under way (process {os.getpid()})" in err
    assert len(read_store(runs).stages) == 7
    working.rmdir()
    assert "removed 4 folders" in klash("runs", "clean", "--yes")[1]
    assert not stopped.exists()


def test_a_folder_without_runs_is_named(tmp_path: Path, klash: Klash):
    code, _, err = klash("runs", "--runs", str(tmp_path / "none"))
    assert code == 2
    assert "none: no runs here" in err


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (32_000_000_000, "32 GB"), (2e15, "2000 TB")],
)
def test_sizes_read_as_sizes(size: int, text: str):
    assert size_text([Kept(Path(), int(size), 0.0)]) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (120, "2 min"), (7200, "2 h"), (3 * 86400, "3 d")]
)
def test_ages_read_as_ages(seconds: float, text: str):
    assert age(seconds + 10.0, Kept(Path(), 0, 10.0)) == text
