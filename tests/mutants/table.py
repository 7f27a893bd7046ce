"""`reports/mutants.md`: what was changed and which test said no."""

from collections import Counter
from typing import Any

Rows = list[dict[str, Any]]
KINDS = ("caught", "crash", "timeout")


def markdown(results: dict[str, Any], explained: str) -> str:
    """`reports/mutants.json` as tables; `explained` is the text that explains survivors."""
    lines = ["# Mutants: proof that the tests can fail", ""]
    lines += ["Each is one change of one file on a copy of the tree; `make mutants` runs them.", ""]
    if "written" in results:
        lines += written(results["written"])
    if "drawn" in results:
        seeds = sorted(results["drawn"].items(), key=lambda item: int(item[0]))
        lines += drawn({seed: rows for seed, rows in seeds if rows}, explained)
    return "\n".join(lines)


def written(rows: Rows) -> list[str]:
    tried = [row for row in rows if row["outcome"] != "skipped"]
    caught = sum(row["outcome"] == "caught" for row in tried)
    lines = [f"## Written by hand: {caught} of {len(tried)} caught by an assertion", ""]
    lines += ["| fault | what it breaks | caught by |", "|---|---|---|"]
    for row in rows:
        by = f"`{row['by']}`" if row["outcome"] == "caught" else f"{row['outcome']}: {row['by']}"
        lines.append(f"| {row['name']} (`{row['file']}`) | {row['breaks']} | {cell(by)} |")
    return [*lines, ""]


def drawn(by_seed: dict[str, Rows], explained: str) -> list[str]:
    """A line a seed, one a file, and the survivors in full."""
    every = [row for rows in by_seed.values() for row in rows]
    lines = [f"## Drawn: {share_caught(every):.1%} of {len(every)} caught", ""]
    heads = ("by an assertion", "by a crash", "by time", "survived, explained", "not explained")
    table = [f"{' | '.join(heads)} |", f"{'---|' * len(heads)}"]
    lines += [f"| seed | drawn | caught | {table[0]}", f"|---|---|---|{table[1]}"]
    for seed, rows in by_seed.items():
        first = f"| {seed} | {len(rows)} | {share_caught(rows):.1%}"
        lines.append(f"{first} | {counts(rows, explained)} |")
    lines += ["", f"| file | {table[0]}", f"|---|{table[1]}"]
    for file in sorted({row["file"] for row in every}):
        own = [row for row in every if row["file"] == file]
        lines.append(f"| `{file}` | {counts(own, explained)} |")
    survivors = [(s, r) for s, rows in by_seed.items() for r in rows if r["outcome"] == "survived"]
    if survivors:
        lines += ["", "Survivors; `tests/mutants/SURVIVORS.md` explains them:", ""]
        lines += ["| seed | file | was | is | |", "|---|---|---|---|---|"]
    for seed, r in survivors:
        known = "" if is_explained(r, explained) else "not explained"
        change = f"`{cell(r['old'])}` | `{cell(r['new'])}`"
        lines.append(f"| {seed} | `{r['file']}` | {change} | {known} |")
    return [*lines, ""]


def counts(rows: Rows, explained: str) -> str:
    outcomes = Counter(row["outcome"] for row in rows)
    survivors = [row for row in rows if row["outcome"] == "survived"]
    known = sum(is_explained(row, explained) for row in survivors)
    numbers = [*(outcomes[kind] for kind in KINDS), known, len(survivors) - known]
    return " | ".join(map(str, numbers))


def is_explained(row: dict[str, Any], explained: str) -> bool:
    """Whether a survivor is named in `explained`."""
    return f"`{row['name']}`" in explained


def share_caught(rows: Rows) -> float:
    """Of those that were tried."""
    tried = [row for row in rows if row["outcome"] != "skipped"]
    return 1 - sum(row["outcome"] == "survived" for row in tried) / max(1, len(tried))


def cell(text: str) -> str:
    return text.replace("|", "\\|")
