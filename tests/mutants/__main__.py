"""Proof that the tests can fail: single faults, and what the fast tests say of each.

    cd tests && python -m mutants                     # both parts; writes reports/mutants.{json,md}
    cd tests && python -m mutants --part drawn --seed 1 --only metrics

Exit code 1 if a fault written by hand is not caught by an assertion, if fewer than 95 % of the
drawn ones are caught, or if a drawn one survives that SURVIVORS.md does not explain.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mutants.draw import drawn, line_of
from mutants.faults import FAULTS, written_by_hand
from mutants.table import markdown
from mutants.trial import ROOT, Mutant, Trial, prepare, try_all

LEAST_CAUGHT = 0.95  # of the drawn ones
REPORT = ROOT / "reports" / "mutants"
SURVIVORS = Path(__file__).with_name("SURVIVORS.md")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.add_argument("--part", choices=("written", "drawn"), help="one part only")
    parser.add_argument("--only", default="", help="mutants whose name holds this; writes nothing")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn ones")
    parser.add_argument("--count", type=int, default=200, help="how many are drawn")
    parser.add_argument("--workers", type=int, default=2, help="children at once")
    words = parser.parse_args()
    written = [] if words.part == "drawn" else written_by_hand()
    found = [] if words.part == "written" else drawn(words.seed, words.count)
    parts = {"written": written, "drawn": found}
    for name, mutants in parts.items():
        parts[name] = [m for m in mutants if words.only in m.name]
    prepare()
    limits = unchanged([m for mutants in parts.values() for m in mutants], words.workers)
    report = REPORT.with_suffix(".json")
    results = json.loads(report.read_text()) if report.exists() else {}
    failures: list[str] = []
    for part, mutants in parts.items():
        if not mutants:
            continue
        trials = tried(mutants, words.workers, limits)
        rows = [row(part, m, t) for m, t in zip(mutants, trials, strict=True)]
        failures += complaints(part, rows)
        results[part] = {"seed": words.seed, "mutants": rows} if part == "drawn" else rows
        if not words.only:
            report.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            REPORT.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print("\n".join(failures) or "mutants: every part holds")
    sys.exit(1 if failures else 0)


def unchanged(mutants: Sequence[Mutant], workers: int) -> dict[str, float]:
    """Seconds of each test file on the tree as it is; SystemExit if one fails there."""
    tests = sorted({name for mutant in mutants for name in mutant.tests})
    text = (ROOT / "dpo/losses.py").read_text(encoding="utf-8")
    as_it_is = [Mutant(name, "dpo/losses.py", text, (name,)) for name in tests]
    trials = tried(as_it_is, workers, {})
    failing = [
        f"{n}: {t.by}" for n, t in zip(tests, trials, strict=True) if t.outcome != "survived"
    ]
    if failing:
        sys.exit("mutants: these fail without any fault:\n" + "\n".join(failing))
    return {name: sum(t.seconds.values()) for name, t in zip(tests, trials, strict=True)}


def tried(mutants: Sequence[Mutant], workers: int, limits: dict[str, float]) -> list[Trial]:
    """In the order of `mutants`; a line for each as it ends."""
    trials: dict[int, Trial] = {}
    for number, trial in try_all(mutants, workers, limits):
        trials[number] = trial
        said = f"{len(trials)}/{len(mutants)} {mutants[number].name}: {trial.outcome} {trial.by}"
        print(said, flush=True)
    return [trials[number] for number in range(len(mutants))]


def row(part: str, mutant: Mutant, trial: Trial) -> dict[str, Any]:
    """What the report keeps: nothing that differs from run to run."""
    about = {"name": mutant.name, "file": mutant.file}
    if part == "written":
        about["breaks"] = next(f.breaks for f in FAULTS if f.name == mutant.name)
    else:
        about["old"], about["new"] = line_of(mutant)
    return {**about, "outcome": trial.outcome, "by": trial.by}


def complaints(part: str, rows: list[dict[str, Any]]) -> list[str]:
    """Why a part does not hold, one line each."""
    if part == "written":
        return [f"{r['name']}: {r['outcome']}" for r in rows if r["outcome"] != "caught"]
    survivors = [r for r in rows if r["outcome"] == "survived"]
    explained = SURVIVORS.read_text(encoding="utf-8")
    found = [f"not explained: {r['name']}" for r in survivors if f"`{r['name']}`" not in explained]
    share = 1 - len(survivors) / len(rows)
    if share < LEAST_CAUGHT:
        found.append(f"{share:.1%} of the drawn ones are caught, must be {LEAST_CAUGHT:.0%}")
    return found


if __name__ == "__main__":
    main()
