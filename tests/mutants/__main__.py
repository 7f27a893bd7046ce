"""Proof that the tests can fail: single faults, and what the fast tests say of each.

    cd tests && python -m mutants                     # both parts; writes reports/mutants.{json,md}
    cd tests && python -m mutants --part drawn --seed 1 --count 100   # beside other seeds' results
    cd tests && python -m mutants --part drawn --only metrics         # some of them; writes nothing
    cd tests && python -m mutants --part none         # what is there, told anew

Exit code 1 if a fault written by hand is not caught by an assertion, if fewer than 95 % of a seed's
drawn ones are caught, or if a drawn one survives that SURVIVORS.md does not explain.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mutants.draw import drawn, line_of
from mutants.faults import FAULTS, skipped, written_by_hand
from mutants.table import is_explained, markdown, share_caught
from mutants.trial import ROOT, Mutant, Trial, prepare, try_all

LEAST_CAUGHT = 0.95  # of the drawn ones
REPORT = ROOT / "reports" / "mutants"
SURVIVORS = Path(__file__).with_name("SURVIVORS.md")
PARTS = ("written", "drawn", "none")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="one part only")
    parser.add_argument("--only", default="", help="mutants whose name holds this; writes nothing")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn ones")
    parser.add_argument("--count", type=int, default=100, help="how many are drawn")
    parser.add_argument("--workers", type=int, default=2, help="children at once")
    words = parser.parse_args()
    written = written_by_hand() if words.part in ("written", None) else []
    found = drawn(words.seed, words.count) if words.part in ("drawn", None) else []
    parts = {"written": written, "drawn": found}
    for name, mutants in parts.items():
        parts[name] = [m for m in mutants if words.only in m.name]
    every = [m for mutants in parts.values() for m in mutants if not skipped(m)]
    report = REPORT.with_suffix(".json")
    results = json.loads(report.read_text()) if report.exists() else {}
    limits: dict[str, float] = {}
    if every:
        prepare()
        limits = unchanged(every, words.workers)
    for part, mutants in parts.items():
        if not mutants:
            continue
        trials = tried(mutants, words.workers, limits)
        rows = [row(part, m, t) for m, t in zip(mutants, trials, strict=True)]
        if part == "written":
            results[part] = rows
        else:
            results.setdefault(part, {})[str(words.seed)] = rows
        if not words.only:
            report.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if not words.only:
        explained = SURVIVORS.read_text(encoding="utf-8")
        REPORT.with_suffix(".md").write_text(markdown(results, explained), encoding="utf-8")
    failures = complaints(results)
    print("\n".join(failures) or "mutants: every part holds")
    sys.exit(1 if failures else 0)


def unchanged(mutants: Sequence[Mutant], workers: int) -> dict[str, float]:
    """What each test file takes on the tree as it is; SystemExit if one fails there, twice."""
    tests = sorted({name for mutant in mutants for name in mutant.tests})
    text = (ROOT / "dpo/losses.py").read_text(encoding="utf-8")
    limits, failing = {}, dict.fromkeys(tests, "")
    for _ in ("first", "and once more"):
        if not failing:
            break
        as_it_is = [Mutant(name, "dpo/losses.py", text, (name,)) for name in failing]
        trials = dict(zip(failing, tried(as_it_is, workers, {}), strict=True))
        failing = {n: f"{t.outcome} {t.by}" for n, t in trials.items() if t.outcome != "survived"}
        limits |= {name: sum(trial.seconds.values()) for name, trial in trials.items()}
    if failing:
        said = [f"{name}: {what}" for name, what in failing.items()]
        sys.exit("mutants: these fail without any fault:\n" + "\n".join(said))
    return limits


def tried(mutants: Sequence[Mutant], workers: int, limits: dict[str, float]) -> list[Trial]:
    """In the order of `mutants`; a line for each as it ends."""
    trials = {n: Trial("skipped", why, {}) for n, m in enumerate(mutants) if (why := skipped(m))}
    waiting = [n for n in range(len(mutants)) if n not in trials]
    for number, trial in try_all([mutants[n] for n in waiting], workers, limits):
        trials[waiting[number]] = trial
        name = mutants[waiting[number]].name
        print(f"{len(trials)}/{len(mutants)} {name}: {trial.outcome} {trial.by}", flush=True)
    return [trials[number] for number in range(len(mutants))]


def row(part: str, mutant: Mutant, trial: Trial) -> dict[str, Any]:
    """What the report keeps: nothing that differs from run to run."""
    about = {"name": mutant.name, "file": mutant.file}
    if part == "written":
        about["breaks"] = next(f.breaks for f in FAULTS if f.name == mutant.name)
    else:
        about["old"], about["new"] = line_of(mutant)
    return {**about, "outcome": trial.outcome, "by": trial.by}


def complaints(results: dict[str, Any]) -> list[str]:
    """Why a part does not hold, one line each."""
    found: list[str] = []
    for r in results.get("written", []):
        if r["outcome"] not in ("caught", "skipped"):
            found.append(f"{r['name']}: {r['outcome']} {r['by']}")
    explained = SURVIVORS.read_text(encoding="utf-8")
    for seed, rows in results.get("drawn", {}).items():
        for r in rows:
            if r["outcome"] == "survived" and not is_explained(r, explained):
                found.append(f"not explained: {r['name']}")
        if (share := share_caught(rows)) < LEAST_CAUGHT:
            found.append(f"seed {seed}: {share:.1%} are caught, must be {LEAST_CAUGHT:.0%}")
    return found


if __name__ == "__main__":
    main()
