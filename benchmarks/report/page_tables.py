"""The report's tables, row by row, from the results."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.evaluation.statistics import Estimate
from benchmarks.report.cells import (
    NAME,
    PERCENT,
    SHARE,
    Show,
    bar_scale,
    by_gold,
    estimate_cell,
    method_cell,
    prefixed,
    value_keys,
)
from benchmarks.report.conclusion import nats, winner
from benchmarks.report.run_tables import cost_table, filtering_table, reward_table, stability_table
from benchmarks.report.style import look
from benchmarks.report.tables import (
    MINUS,
    Bar,
    Cell,
    Column,
    Table,
    kl_digits,
)
from benchmarks.results.schema import Comparison, Method, Results


def all_tables(results: Results) -> dict[str, Table]:
    """Every table, by name."""
    tables = [
        main_table(results),
        text_table(results),
        matched_table(results),
        *comparison_tables(results),
        cost_table(results),
        *([] if results.reward_model is None else [reward_table(results.reward_model)]),
        stability_table(results),
        filtering_table(results),
    ]
    return {table.name: table for table in tables}


Shown = dict[str, tuple[str, Callable[[Method], Cell]]]  # heading: the measure, its cell


def _methods_table(results: Results, name: str, caption: str, shown: Shown) -> Table:
    """One row per method, by gold; what no method has is no column."""
    methods = results.methods.values()
    shown = {
        label: (key, cell)
        for label, (key, cell) in shown.items()
        if any(getattr(m, key).mean is not None for m in methods)
    }
    cells = [cell for _, cell in shown.values()]
    rows = [[method_cell(n, m), *(cell(m) for cell in cells)] for n, m in by_gold(results)]
    columns = [NAME, *(Column(label, value_keys(key)) for label, (key, _) in shown.items())]
    return Table(name, caption, columns, rows)


def _measure(key: str, show: Show) -> tuple[str, Callable[[Method], Cell]]:
    return key, lambda m: show(getattr(m, key))


def _with_bars(results: Results, key: str, show: Show, zero: bool) -> Callable[[Method], Cell]:
    """`show`'s cell with a bar, on one scale for all methods."""
    bar = bar_scale([getattr(m, key) for m in results.methods.values()], zero)
    return lambda m: replace(show(getattr(m, key)), bar=bar(getattr(m, key)))


def _kl_cell(method: Method) -> Cell:
    kl = estimate_cell(kl_digits(method.kl.mean))(method.kl)
    return prefixed(kl, "≤ " if method.kl_is_bound else "")


def _efficiency_cell(method: Method) -> Cell:
    return prefixed(
        PERCENT(method.frontier_efficiency), "≥ " if method.efficiency_is_lower_bound else ""
    )


def main_table(results: Results) -> Table:
    """One row per method at its tuned setting, by gold."""
    if not results.judged:
        return unjudged_table(results)
    if results.enumerated:
        last: Shown = {"Regret": _measure("regret", estimate_cell(3))}
    elif results.own_rows is not None:  # whose text has no grammar; what was cut is in `text`
        last = {}
    else:
        last = {"Well-formed": _measure("well_formed", SHARE)}
    shown: Shown = {
        "Gold": ("gold", _with_bars(results, "gold", estimate_cell(), zero=False)),
        "Gain": _measure("gain", estimate_cell(signed=True)),
        "KL, nats": ("kl", _kl_cell),
        "Win rate": _measure("win_rate", SHARE),
        "Of the limit": ("frontier_efficiency", _efficiency_cell),
        "Hacking gap": _measure("hacking_gap", estimate_cell(signed=True)),
        **last,
        "Length": _measure("length", estimate_cell(1)),
        "Displacement": _measure("displacement", estimate_cell(1, signed=True)),
    }
    which = "tuned" if results.tuned else "first"
    caption = f"Every method at its {which} setting, on test prompts"
    return _methods_table(results, "main", caption, shown)


def unjudged_table(results: Results) -> Table:
    """What is known of each method without a judge."""
    shown: Shown = {
        "Score gained": (
            "proxy",
            _with_bars(results, "proxy", estimate_cell(signed=True), zero=True),
        ),
        "KL, nats": ("kl", _kl_cell),
        "Pair accuracy": _measure("pair_accuracy", SHARE),
        "Length": _measure("length", estimate_cell(1)),
        "Cut": _measure("truncated", SHARE),
        "Displacement": _measure("displacement", estimate_cell(1, signed=True)),
    }
    caption = "Every method at its first setting, on test prompts"
    return _methods_table(results, "main", caption, shown)


def text_table(results: Results) -> Table:
    """What the text is like, whoever judges it."""
    shown: Shown = {
        "Length": _measure("length", estimate_cell(1)),
        "Cut": _measure("truncated", SHARE),
        "Repeated 4-grams": _measure("repetition", SHARE),
        "Distinct-2": _measure("distinct_2", estimate_cell()),
        "Perplexity": _measure("perplexity", estimate_cell(1)),
        "Win rate, lengths equal": _measure("win_rate_length_controlled", SHARE),
        "Against chosen": _measure("win_rate_against_chosen", SHARE),
        "Pair accuracy": _measure("pair_accuracy", SHARE),
        "VADER": _measure("second_opinion", estimate_cell()),
    }
    return _methods_table(results, "text", "The text of each method, on test prompts", shown)


def matched_table(results: Results) -> Table:
    """Gold at the preset levels of KL; SFT, which spends none, is left out."""
    keys = {k for m in results.methods.values() for k in m.gold_at_matched_kl}
    levels = sorted(keys, key=float)
    rows = []
    for name, method in by_gold(results):
        if name == "sft":
            continue
        cells = [method_cell(name, method)]
        for level in levels:
            estimate = method.gold_at_matched_kl.get(level)
            if estimate is None or estimate.mean is None:
                cells.append(Cell("not reached", values=(None, None, None)))
            else:
                cells.append(estimate_cell()(estimate))
        rows.append(cells)
    columns = [NAME, *(Column(f"at {nats(float(k))}", value_keys(f"gold_at_{k}")) for k in levels)]
    return Table("matched-kl", "Gold at the same KL from the start", columns, rows)


def comparison_tables(results: Results) -> list[Table]:
    """Differences between methods: one table per level of KL, and one at the tuned settings."""
    bar = bar_scale([c.difference for c in results.comparisons])
    groups: dict[float | None, list[Comparison]] = {}
    for comparison in results.comparisons:
        level = comparison.kl if comparison.metric == "gold_at_matched_kl" else None
        groups.setdefault(level, []).append(comparison)
    levels = sorted(groups, key=lambda k: float("inf") if k is None else k)
    return [comparison_table(results, groups[level], level, bar) for level in levels]


def comparison_table(
    results: Results,
    comparisons: Sequence[Comparison],
    level: float | None,
    bar: Callable[[Estimate], Bar | None],
) -> Table:
    """One level's differences, as a forest of intervals."""
    rows = []
    for c in sorted(comparisons, key=lambda c: c.difference.mean is None):  # what is known first
        best = winner(c, results)
        text = f"{look(best).label} higher" if best else "not shown"
        if c.difference.mean is None:
            text = "not reached by both"
        raw = f"{best} higher" if best else text
        difference = estimate_cell(signed=True)(c.difference)
        rows.append(
            [
                Cell(f"{look(c.a).label} {MINUS} {look(c.b).label}", values=(c.a, c.b)),
                Cell(difference.text, difference.note, difference.values, bar=bar(c.difference)),
                Cell(text, values=(raw,), strong=best is not None),
            ]
        )
    tuned = "at the tuned settings" if results.tuned else "at the settings that ran"
    where = tuned if level is None else f"at {nats(level)}"
    columns = [
        Column("Pair", ("a", "b"), numeric=False),
        Column("Difference", value_keys("difference")),
        Column("Verdict", ("verdict",), numeric=False),
    ]
    return Table(comparison_name(level), f"Differences in gold {where}", columns, rows)


def comparison_name(level: float | None) -> str:
    """The table's name; `level` in nats, None at the tuned settings."""
    return "differences-tuned" if level is None else f"differences-{level:g}-nats"


def headline_table(results: Results, headline: Sequence[Comparison], most: int = 5) -> Table:
    """The first screen's differences: those with PPO first."""
    first = sorted(headline, key=lambda c: "ppo" not in (c.a, c.b))[:most]
    level = first[0].kl if first and first[0].metric == "gold_at_matched_kl" else None
    return comparison_table(results, first, level, bar_scale([c.difference for c in first]))
