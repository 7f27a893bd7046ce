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
    rng = random.Random(0)
    subprocess.run([*COMMAND, str(tmp_path / "undisturbed")], check=True)
    killed = tmp_path / "killed"
    finished: set[str] = set()
    for _ in range(KILLS):
        process = subprocess.Popen([*COMMAND, str(killed)], stdout=subprocess.DEVNULL)
        _wait_for_a_stage(process, killed)
        time.sleep(rng.uniform(0, 6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        folders = {p.name: p for p in (killed / ".stages").glob("[a-z]*")}
        assert all(intact(folder) for folder in folders.values())
        assert finished <= set(folders), "a finished stage was lost"
        finished = set(folders)
    last = subprocess.run(
        [*COMMAND, str(killed)], check=True, capture_output=True, text=True
    ).stdout
    assert last.count(": cached") >= len(finished)
    assert _results(killed) == _results(tmp_path / "undisturbed")


def _wait_for_a_stage(process: subprocess.Popen, runs: Path) -> None:
    """Wait until the process is at work on a stage, or has ended by itself."""
    while process.poll() is None:
        if list((runs / ".stages").glob(f".unfinished-*-{process.pid}")):
            return
        time.sleep(0.05)


def _results(runs: Path) -> dict:
    results = json.loads((runs / "reviews-quick" / "results.json").read_text())
    del results["environment"]
    for method in results["methods"].values():
        method["cost"] = {k: v for k, v in method["cost"].items() if k not in MEASURED}
    return results
