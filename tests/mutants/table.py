"""`reports/mutants.md`: what was changed and which test said no."""

from collections import Counter
from typing import Any

Rows = list[dict[str, Any]]


def markdown(results: dict[str, Any]) -> str:
    """Both parts of `reports/mutants.json` as tables; nothing here differs from run to run."""
    lines = ["# Mutants: proof that the tests can fail", ""]
    lines += [
        "Each row is one change of one file on a copy of the tree; `make mutants` runs them.",
        "",
    ]
    if "written" in results:
        lines += written(results["written"])
    if "drawn" in results:
        lines += drawn(results["drawn"]["mutants"], results["drawn"]["seed"])
    return "\n".join(lines)


def written(rows: Rows) -> list[str]:
    caught = sum(row["outcome"] == "caught" for row in rows)
    lines = [f"## Written by hand: {caught} of {len(rows)} caught by an assertion", ""]
    lines += ["| fault | what it breaks | caught by |", "|---|---|---|"]
    for row in rows:
        by = f"`{row['by']}`" if row["outcome"] == "caught" else f"{row['outcome']} `{row['by']}`"
        lines.append(f"| {row['name']} (`{row['file']}`) | {row['breaks']} | {cell(by)} |")
    return [*lines, ""]


def drawn(rows: Rows, seed: int) -> list[str]:
    """Counts a file, and the survivors in full."""
    total = Counter(row["outcome"] for row in rows)
    share = 1 - total["survived"] / len(rows)
    lines = [f"## Drawn with seed {seed}: {share:.1%} of {len(rows)} caught", ""]
    lines += [
        "| file | by an assertion | by a crash | by time | survived |",
        "|---|---|---|---|---|",
    ]
    for file in sorted({row["file"] for row in rows}):
        lines.append(counts(f"`{file}`", Counter(r["outcome"] for r in rows if r["file"] == file)))
    lines += [counts("all", total), ""]
    survivors = [row for row in rows if row["outcome"] == "survived"]
    if survivors:
        lines += ["Survivors, each explained in `tests/mutants/SURVIVORS.md`:", ""]
        lines += ["| file | was | is |", "|---|---|---|"]
        for r in survivors:
            lines.append(f"| `{r['file']}` | `{cell(r['old'])}` | `{cell(r['new'])}` |")
        lines.append("")
    return lines


def counts(name: str, outcomes: Counter[str]) -> str:
    numbers = (str(outcomes[kind]) for kind in ("caught", "crash", "timeout", "survived"))
    return f"| {name} | {' | '.join(numbers)} |"


def cell(text: str) -> str:
    return text.replace("|", "\\|")
