"""Tables as data: rows of cells that become CSV (full numbers), LaTeX (booktabs) and HTML."""

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.evaluation.statistics import Estimate

NULL = "\u2013"  # an en dash: not defined, or not measured
MINUS = "\u2212"
Value = str | float | int | None

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    NULL: "--",
    MINUS: "$-$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "\u00d7": r"$\times$",
    "β": r"$\beta$",
    "τ": r"$\tau$",
}


@dataclass(frozen=True)
class Bar:
    """An interval drawn in a cell: positions in percent of the cell's width."""

    low: float
    mean: float
    high: float
    zero: float | None = None


@dataclass(frozen=True)
class Cell:
    """What a cell shows, the small print under it, and its numbers for the CSV."""

    text: str
    note: str = ""
    values: tuple[Value, ...] = ()
    bar: Bar | None = None
    method: str | None = None  # shown with this method's key
    strong: bool = False  # a difference that is shown


@dataclass(frozen=True)
class Column:
    """A heading, and the CSV's headings of its numbers."""

    label: str
    keys: tuple[str, ...]
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """`name` is the file's name; `caption` says what the rows are."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


def to_csv(table: Table) -> str:
    """Full numbers, nulls empty; text that a spreadsheet could run as a formula is quoted."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([key for column in table.columns for key in column.keys])
    for row in table.rows:
        writer.writerow([_csv_value(value) for cell in row for value in cell.values])
    return buffer.getvalue()


def _csv_value(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        risky = value.lstrip().startswith(("=", "+", "-", "@")) or value[:1] in ("\t", "\r", "\n")
        return f"'{value}" if risky and not _is_number(value) else value
    return repr(value) if isinstance(value, int) else f"{value:.10g}"


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) is not None


def to_latex(table: Table) -> str:
    """A booktabs tabular, to be put into a table environment of one's own."""
    align = "".join("r" if column.numeric else "l" for column in table.columns)
    head = " & ".join(escape_latex(column.label) for column in table.columns)
    body = [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in table.rows]
    lines = [
        r"% needs \usepackage{booktabs} and \usepackage[T1]{fontenc}",
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        rf"{head} \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _latex_cell(cell: Cell) -> str:
    text = escape_latex(f"{cell.text} {cell.note}".strip())
    return f"{{{text}}}" if text.startswith("[") else text  # \\ [..] would read as a length


def escape_latex(text: str) -> str:
    """`text` as LaTeX prints it literally; control characters become spaces."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    return "".join(_LATEX.get(c, c) for c in clean)


# --- numbers as people read them --------------------------------------------------------------


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """With a true minus sign, and never a negative zero."""
    if value is None or not math.isfinite(value):
        return NULL
    text = f"{abs(value):.{digits}f}"
    is_zero = not text.strip("0.")
    sign = "" if is_zero else MINUS if value < 0 else "+" if signed else ""
    return sign + text


def percent(value: float | None, digits: int = 0) -> str:
    """A share as percent."""
    return NULL if value is None else f"{number(100 * value, digits)} %"


def interval(estimate: Estimate, digits: int = 2, scale: float = 1) -> str:
    """`[low, high]`, or nothing without limits."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"[{number(scale * estimate.low, digits)}, {number(scale * estimate.high, digits)}]"


def kl_digits(value: float | None) -> int:
    """Decimals for a KL: two below ten, then one."""
    return 2 if value is None or value < 10 else 1


def si(value: float | None, unit: str = "") -> str:
    """Three digits and a prefix: 12.3 M."""
    if value is None:
        return NULL
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    step = 0
    while abs(value) >= 999.5 and step < len(prefixes) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g} {prefixes[step]}{unit}".strip()


def count(value: float) -> str:
    """Thousands separated by a space: 6 000."""
    return f"{value:,.0f}".replace(",", "\u00a0")


def duration(seconds: float | None) -> str:
    """`41 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None:
        return NULL
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds > 0 else "0 s"
    rounded = round(seconds)
    if rounded < 120:
        return f"{rounded} s"
    if rounded < 7200:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
