"""`klash compare --quick` killed twenty times over comes to the results of an undisturbed run."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.stages import intact

KILLS = 20
COMMAND = [str(Path(sys.executable).with_name("klash")), "compare", "reviews", "--quick", "--runs"]
MEASURED = {"wall_s", "phases", "peak_memory_bytes", "mfu"}  # differ between equal runs


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_leave_nothing_corrupt_and_the_same_results(tmp_path: Path):
    """Each run is killed at a random moment of its next stage or the one after."""
    rng = random.Random(0)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    subprocess.run([*COMMAND, str(undisturbed)], check=True)
    seconds = _seconds(undisturbed)
    finished: set[str] = set()
    for _ in range(KILLS):
        process = subprocess.Popen([*COMMAND, str(killed)], stdout=subprocess.DEVNULL)
        _wait_for(process, killed, len(finished) + rng.choice([0, 0, 1, 1]))
        time.sleep(rng.uniform(0, seconds / len(_finished(undisturbed))))
        assert process.poll() is None, "it ended before all kills were made"
        process.send_signal(signal.SIGKILL)
        process.wait()
        folders = _finished(killed)
        assert all(intact(folder) for folder in folders.values())
        assert finished <= set(folders), "a finished stage was lost"
        finished = set(folders)
    assert len(finished) > 10
    last = subprocess.run(
        [*COMMAND, str(killed)], check=True, capture_output=True, text=True
    ).stdout
    assert last.count(": cached") == len(finished)  # it went on from the last finished stage
    assert set(_finished(killed)) == set(_finished(undisturbed))
    assert _results(killed) == _results(undisturbed)


def _finished(runs: Path) -> dict[str, Path]:
    return {p.name: p for p in (runs / ".stages").glob("[a-z]*")}


def _seconds(runs: Path) -> float:
    """From the first stage's manifest to the last one's."""
    times = [(p / "manifest.json").stat().st_mtime for p in _finished(runs).values()]
    return max(times) - min(times)


def _wait_for(process: subprocess.Popen, runs: Path, stages: int) -> None:
    """Wait until so many stages are finished and the process is at work on another."""
    while process.poll() is None:
        working = list((runs / ".stages").glob(f".unfinished-*.{process.pid}"))
        if working and len(_finished(runs)) >= stages:
            return
        time.sleep(0.05)


def _results(runs: Path) -> dict:
    results = json.loads((runs / "reviews-quick" / "results.json").read_text())
    del results["environment"]
    for method in results["methods"].values():
        method["cost"] = {k: v for k, v in method["cost"].items() if k not in MEASURED}
    return results
