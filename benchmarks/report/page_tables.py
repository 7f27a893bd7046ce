"""The report's tables, row by row, from the results."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from benchmarks.evaluation.statistics import Estimate
from benchmarks.report.conclusion import nats, winner
from benchmarks.report.style import look
from benchmarks.report.tables import (
    MINUS,
    NULL,
    Bar,
    Cell,
    Column,
    Table,
    count,
    duration,
    interval,
    kl_digits,
    number,
    percent,
    si,
)
from benchmarks.results.schema import Comparison, Method, Results, RewardModel

Show = Callable[[Estimate], Cell]


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


def by_gold(results: Results) -> list[tuple[str, Method]]:
    """Methods from the highest gold down; those without gold last, or by score if none has any."""

    def height(method: Method) -> float:
        mean = method.gold.mean if results.judged else method.proxy.mean
        return float("-inf") if mean is None else mean

    return sorted(results.methods.items(), key=lambda item: -height(item[1]))


def _method_cell(name: str, method: Method) -> Cell:
    setting = ", ".join(f"{key} {value:g}" for key, value in method.setting.items())
    return Cell(look(name).label, setting, (name, setting), method=name)


NAME = Column("Method", ("method", "setting"), numeric=False)
METHOD = Column("Method", ("method",), numeric=False)


def _estimate(digits: int = 2, signed: bool = False, scale: float = 1, unit: str = "") -> Show:
    def show(e: Estimate) -> Cell:
        mean = None if e.mean is None else scale * e.mean
        text = number(mean, digits, signed)
        shown = text if text == NULL else text + unit
        return Cell(shown, interval(e, digits, scale), (e.mean, e.low, e.high))

    return show


PERCENT = _estimate(0, scale=100, unit=" %")


def _within(show: Show, low: float, high: float) -> Show:
    """`show` with limits that stay where the measure itself does; files keep what was computed."""

    def clipped(e: Estimate) -> Cell:
        if e.low is None or e.high is None:
            return show(e)
        limits = {"low": max(low, e.low), "high": min(high, e.high)}
        return replace(show(e.model_copy(update=limits)), values=show(e).values)

    return clipped


SHARE = _within(PERCENT, 0.0, 1.0)


def _keys(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def _prefixed(cell: Cell, prefix: str) -> Cell:
    return Cell(prefix + cell.text, cell.note, cell.values) if cell.text != NULL else cell


def _scale(estimates: Sequence[Estimate], zero: bool = True) -> Callable[[Estimate], Bar | None]:
    """Bars on one scale for all `estimates`, from zero, which is marked if `zero`."""
    known = [v for e in estimates for v in (e.mean, e.low, e.high) if v is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    width = (high - low) or 1.0

    def at(value: float) -> float:
        return round(3 + 94 * (value - low) / width, 2)

    def bar(e: Estimate) -> Bar | None:
        if e.mean is None:
            return None
        ends = (e.mean if e.low is None else e.low), (e.mean if e.high is None else e.high)
        return Bar(at(ends[0]), at(e.mean), at(ends[1]), at(0.0) if zero else None)

    return bar


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
    rows = [[_method_cell(n, m), *(cell(m) for cell in cells)] for n, m in by_gold(results)]
    columns = [NAME, *(Column(label, _keys(key)) for label, (key, _) in shown.items())]
    return Table(name, caption, columns, rows)


def _measure(key: str, show: Show) -> tuple[str, Callable[[Method], Cell]]:
    return key, lambda m: show(getattr(m, key))


def _with_bars(results: Results, key: str, show: Show, zero: bool) -> Callable[[Method], Cell]:
    """`show`'s cell with a bar, on one scale for all methods."""
    bar = _scale([getattr(m, key) for m in results.methods.values()], zero)
    return lambda m: replace(show(getattr(m, key)), bar=bar(getattr(m, key)))


def _kl_cell(method: Method) -> Cell:
    kl = _estimate(kl_digits(method.kl.mean))(method.kl)
    return _prefixed(kl, "≤ " if method.kl_is_bound else "")


def _efficiency_cell(method: Method) -> Cell:
    return _prefixed(
        PERCENT(method.frontier_efficiency), "≥ " if method.efficiency_is_lower_bound else ""
    )


def main_table(results: Results) -> Table:
    """One row per method at its tuned setting, by gold."""
    if not results.judged:
        return unjudged_table(results)
    if results.enumerated:
        last: Shown = {"Regret": _measure("regret", _estimate(3))}
    elif results.own_rows is not None:  # whose text has no grammar; what was cut is in `text`
        last = {}
    else:
        last = {"Well-formed": _measure("well_formed", SHARE)}
    limit: Shown = {"Of the limit": ("frontier_efficiency", _efficiency_cell)}
    shown: Shown = {
        "Gold": ("gold", _with_bars(results, "gold", _estimate(), zero=False)),
        "Gain": _measure("gain", _estimate(signed=True)),
        "KL, nats": ("kl", _kl_cell),
        "Win rate": _measure("win_rate", SHARE),
        **(limit if results.frontier else {}),
        "Hacking gap": _measure("hacking_gap", _estimate(signed=True)),
        **last,
        "Length": _measure("length", _estimate(1)),
        "Displacement": _measure("displacement", _estimate(1, signed=True)),
    }
    which = "tuned" if results.tuned else "first"
    caption = f"Every method at its {which} setting, on test prompts"
    return _methods_table(results, "main", caption, shown)


def unjudged_table(results: Results) -> Table:
    """What is known of each method without a judge."""
    gained = _with_bars(results, "proxy", _estimate(signed=True), zero=True)
    shown: Shown = {
        **({"Score gained": ("proxy", gained)} if results.scored else {}),
        "KL, nats": ("kl", _kl_cell),
        "Pair accuracy": _measure("pair_accuracy", SHARE),
        "Length": _measure("length", _estimate(1)),
        "Cut": _measure("truncated", SHARE),
        "Displacement": _measure("displacement", _estimate(1, signed=True)),
    }
    caption = "Every method at its first setting, on test prompts"
    return _methods_table(results, "main", caption, shown)


def text_table(results: Results) -> Table:
    """What the text is like, whoever judges it."""
    wins: Shown = {
        "Win rate, lengths equal": _measure("win_rate_length_controlled", SHARE),
        "Against chosen": _measure("win_rate_against_chosen", SHARE),
    }
    shown: Shown = {
        "Length": _measure("length", _estimate(1)),
        "Cut": _measure("truncated", SHARE),
        "Repeated 4-grams": _measure("repetition", SHARE),
        "Distinct-2": _measure("distinct_2", _estimate()),
        "Perplexity": _measure("perplexity", _estimate(1)),
        **(wins if results.judged else {}),
        "Pair accuracy": _measure("pair_accuracy", SHARE),
    }
    if results.gold_quality is not None:
        shown["VADER"] = _measure("second_opinion", _estimate())
    return _methods_table(results, "text", "The text of each method, on test prompts", shown)


def matched_table(results: Results) -> Table:
    """Gold at the preset levels of KL; SFT, which spends none, is left out."""
    keys = {k for m in results.methods.values() for k in m.gold_at_matched_kl}
    levels = sorted(keys, key=float)
    rows = []
    for name, method in by_gold(results):
        if name == "sft":
            continue
        cells = [_method_cell(name, method)]
        for level in levels:
            estimate = method.gold_at_matched_kl.get(level)
            if estimate is None or estimate.mean is None:
                cells.append(Cell("not reached", values=(None, None, None)))
            else:
                cells.append(_estimate()(estimate))
        rows.append(cells)
    columns = [NAME, *(Column(f"at {nats(float(k))}", _keys(f"gold_at_{k}")) for k in levels)]
    return Table("matched-kl", "Gold at the same KL from the start", columns, rows)


def comparison_tables(results: Results) -> list[Table]:
    """Differences between methods: one table per level of KL, and one at the tuned settings."""
    bar = _scale([c.difference for c in results.comparisons])
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
        difference = _estimate(signed=True)(c.difference)
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
        Column("Difference", _keys("difference")),
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
    return comparison_table(results, first, level, _scale([c.difference for c in first]))


def cost_table(results: Results) -> Table:
    """What one training run took."""
    rows = []
    for name, m in by_gold(results):
        c = m.cost
        rows.append(
            [
                _method_cell(name, m),
                Cell(duration(c.wall_s), values=(c.wall_s,)),
                Cell(si(c.train_tokens), values=(c.train_tokens,)),
                Cell(si(c.generated_tokens), values=(c.generated_tokens,)),
                Cell(si(c.flops), values=(c.flops,)),
                Cell(percent(c.mfu), values=(c.mfu,)),
                Cell(si(c.peak_memory_bytes, "B"), values=(c.peak_memory_bytes,)),
                Cell(str(c.models_held), values=(c.models_held,)),
                Cell(count(c.labels_used), values=(c.labels_used,)),
            ]
        )
    labels = {
        "Time": "wall_s",
        "Tokens trained": "train_tokens",
        "Tokens generated": "generated_tokens",
        "FLOPs": "flops",
        "Of peak FLOP/s": "mfu",
        "Peak memory": "peak_memory_bytes",
        "Models held": "models_held",
        "Labels used": "labels_used",
    }
    columns = [NAME, *(Column(label, (key,)) for label, key in labels.items())]
    return Table("cost", "One training run of each method; shared stages left out", columns, rows)


def timed_alone(results: Results) -> str:
    """Which seeds' seconds are shown, where not all seeds had the machine to themselves."""
    timed = next((m.cost.timed_seeds for m in results.methods.values() if m.cost.timed_seeds), [])
    if not timed or timed == results.seeds:
        return ""
    which = f"seed {timed[0]}" if len(timed) == 1 else f"seeds {', '.join(map(str, timed))}"
    return f"Time, memory and share of peak are of {which}, run alone; others ran side by side."


# where the labels' noise is known, or somebody judges
IF_KNOWN = ("bayes_accuracy", "share_of_attainable", "gold_correlation")


def reward_table(rm: RewardModel) -> Table:
    """The reward model's numbers, one per row."""
    cells = [
        (
            "Accuracy on held-out pairs",
            "accuracy",
            _within(_estimate(1, scale=100, unit=" %"), 0, 1)(rm.accuracy),
        ),
        (
            "Best possible accuracy",
            "bayes_accuracy",
            Cell(percent(rm.bayes_accuracy, 1), values=(rm.bayes_accuracy, None, None)),
        ),
        ("Share of what is attainable", "share_of_attainable", PERCENT(rm.share_of_attainable)),
        (
            "Calibration error",
            "calibration_error",
            _within(_estimate(3), 0, 1)(rm.calibration_error),
        ),
        ("Correlation with length", "length_correlation", _estimate()(rm.length_correlation)),
        ("Correlation with gold", "gold_correlation", _estimate()(rm.gold_correlation)),
        ("Score's standard deviation", "score_sd", _estimate()(rm.score_sd)),
        ("Held-out pairs", "pairs", Cell(count(rm.pairs), values=(rm.pairs, None, None))),
    ]
    columns = [Column("Measure", ("measure",), numeric=False), Column("Value", _keys("value"))]
    rows = [
        [Cell(label, values=(key,)), cell]
        for label, key, cell in cells
        if cell.text != NULL or key not in IF_KNOWN
    ]
    return Table("reward-model", "The reward model, on pairs it has not seen", columns, rows)


def stability_table(results: Results) -> Table:
    """How the runs of each method went, over seeds and settings."""
    rows = []
    for name, m in by_gold(results):
        s = m.stability
        counts = (s.runs, s.failed, s.stopped_early)
        iqr = Cell(number(s.gold_iqr), values=(s.gold_iqr,))
        final = Cell(percent(s.final_over_best), values=(s.final_over_best,))
        rows.append(
            [
                Cell(look(name).label, values=(name,), method=name),
                *(Cell(str(n), values=(n,)) for n in counts),
                *([iqr, final] if results.judged else []),
                Cell(number(s.kl_overshoot), values=(s.kl_overshoot,)),
                Cell(str(s.gradient_spikes), values=(s.gradient_spikes,)),
            ]
        )
    of_gold = {"Gold, quartile range": "gold_iqr", "Final / best gold": "final_over_best"}
    labels = {
        "Runs": "runs",
        "Failed": "failed",
        "Stopped early": "stopped_early",
        **(of_gold if results.judged else {}),
        "KL overshoot": "kl_overshoot",
        "Gradient spikes": "gradient_spikes",
    }
    columns = [METHOD, *(Column(label, (key,)) for label, key in labels.items())]
    return Table("stability", "Runs over all seeds and settings", columns, rows)


def filtering_table(results: Results) -> Table:
    """What the filter kept before each epoch, and of the spoiled pairs where there are any."""
    filtered = {name: m.filtering for name, m in results.methods.items() if m.filtering}
    spoiled = any(e.spoiled_kept_per_seed for epochs in filtered.values() for e in epochs)
    labels = {"Epoch": "epoch", "Pairs kept": "kept_share"}
    labels |= {"Spoiled pairs kept": "spoiled_kept_share"} if spoiled else {}
    labels |= {"Seeds at the floor": "floor_bound"}
    rows = []
    for name, epochs in filtered.items():
        for epoch in epochs:
            shares = epoch.spoiled_kept_per_seed
            kept = [epoch.kept_share] + ([None if shares is None else fmean(shares)] * spoiled)
            rows.append(
                [
                    Cell(look(name).label, values=(name,), method=name),
                    Cell(str(epoch.epoch), values=(epoch.epoch,)),
                    *(Cell(percent(share), values=(share,)) for share in kept),
                    Cell(str(epoch.floor_bound), values=(epoch.floor_bound,)),
                ]
            )
    columns = [METHOD, *(Column(label, (key,)) for label, key in labels.items())]
    return Table("filtering", "Pairs kept by the filter", columns, rows)
