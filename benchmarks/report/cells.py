"""What all tables of the report are made of: cells of estimates and shares, methods, bars."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.evaluation.statistics import Estimate
from benchmarks.report.style import look
from benchmarks.report.tables import (
    NULL,
    Bar,
    Cell,
    Column,
    interval,
    number,
)
from benchmarks.results.schema import Method, Results

Show = Callable[[Estimate], Cell]


def by_gold(results: Results) -> list[tuple[str, Method]]:
    """Methods from the highest gold down; those without gold last, or by score if none has any."""

    def height(method: Method) -> float:
        mean = method.gold.mean if results.judged else method.proxy.mean
        return float("-inf") if mean is None else mean

    return sorted(results.methods.items(), key=lambda item: -height(item[1]))


def method_cell(name: str, method: Method) -> Cell:
    setting = ", ".join(f"{key} {value:g}" for key, value in method.setting.items())
    return Cell(look(name).label, setting, (name, setting), method=name)


NAME = Column("Method", ("method", "setting"), numeric=False)
METHOD = Column("Method", ("method",), numeric=False)


def estimate_cell(digits: int = 2, signed: bool = False, scale: float = 1, unit: str = "") -> Show:
    def show(e: Estimate) -> Cell:
        mean = None if e.mean is None else scale * e.mean
        text = number(mean, digits, signed)
        shown = text if text == NULL else text + unit
        return Cell(shown, interval(e, digits, scale), (e.mean, e.low, e.high))

    return show


PERCENT = estimate_cell(0, scale=100, unit=" %")


def within(show: Show, low: float, high: float) -> Show:
    """`show` with limits that stay where the measure itself does; files keep what was computed."""

    def clipped(e: Estimate) -> Cell:
        if e.low is None or e.high is None:
            return show(e)
        limits = {"low": max(low, e.low), "high": min(high, e.high)}
        return replace(show(e.model_copy(update=limits)), values=show(e).values)

    return clipped


SHARE = within(PERCENT, 0.0, 1.0)


def value_keys(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def prefixed(cell: Cell, prefix: str) -> Cell:
    return Cell(prefix + cell.text, cell.note, cell.values) if cell.text != NULL else cell


def bar_scale(estimates: Sequence[Estimate], zero: bool = True) -> Callable[[Estimate], Bar | None]:
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
