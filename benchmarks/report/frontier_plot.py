"""The report's main figure: gold reached against KL spent, under the most that can be reached."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.evaluation.frontier import FrontierPoint
from benchmarks.report.labels import Label, place_labels
from benchmarks.report.style import CARD, FAINT, GRID, INK, MUTED, look, plain
from benchmarks.results.schema import Method, Results

Point = tuple[float, float]
TICKS = (0, 0.5, 1, 2, 5, 10, 20, 30, 50, 100, 200, 500, 1000, 2000, 5000)
BOUND = (0, (4, 2.5))
KL_CAP = 60.0  # settings further out are cut off, unless a tuned one lies there


def paint(results: Results, figure: Figure, narrow: bool) -> None:
    """Draw the frontier figure; without gold, the reward model's score in its place."""
    label = "Gold score" if results.enumerated else "Gold score, held-out prompts"
    if not results.judged:
        results, label = with_score_for_gold(results), "Reward-model score gained over the start"
    axes = figure.add_subplot()
    right = _right(results)
    axes.set_xscale("function", functions=(_square_root, np.square))
    lines = 2 * _limits(axes, results, right)  # twice: names keep off them all the more
    labels: list[Label] = []
    for name, method in results.methods.items():
        lines += _draw_method(axes, name, method, starting_point(results), narrow)
        point = _tuned_point(method)
        if point:
            labels.append(Label(plain(look(name).label), point))
    visible = [[p for p in line if p[0] <= right] for line in lines]
    points = [p for line in visible for p in line] + [label.anchor for label in labels]
    _frame(axes, right, points, 0.09 if narrow else 0.045, label)
    _legend(axes, figure, narrow, results)
    place_labels(axes, labels, [line for line in visible if line])


def with_score_for_gold(results: Results) -> Results:
    """For the figure alone: what is drawn as gold is the gain in the reward model's score."""
    methods = {
        name: method.model_copy(update={"gold": method.proxy, "sweep": []})
        for name, method in results.methods.items()
    }
    return results.model_copy(update={"methods": methods})


def starting_point(results: Results) -> Point | None:
    """Where every method starts: no KL, SFT's gold."""
    sft = results.methods.get("sft")
    return None if sft is None or sft.gold.mean is None else (0.0, sft.gold.mean)


def method_curve(method: Method, origin: Point | None) -> list[Point]:
    """From SFT through the settings, by KL; through the checkpoints where there is one setting."""
    finals = [(s.kl.mean, s.gold.mean) for s in method.sweep]
    if len(finals) < 2:
        finals += [(c.kl.mean, c.gold.mean) for s in method.sweep for c in s.checkpoints]
    known = sorted({(k, g) for k, g in finals if k is not None and g is not None})
    return [origin, *known] if origin and known else known


def _square_root(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(x, 0))


def _tuned_point(method: Method) -> Point | None:
    kl, gold = method.kl.mean, method.gold.mean
    return None if kl is None or gold is None else (max(kl, 0.0), gold)


def _right(results: Results) -> float:
    """Right edge: every tuned point with its interval, and settings up to KL_CAP."""
    tuned = [v for m in results.methods.values() for v in (m.kl.mean, m.kl.high) if v is not None]
    swept = [p[0] for m in results.methods.values() for p in method_curve(m, None)]
    return 1.12 * max([1.0, *tuned, *(min(k, KL_CAP) for k in swept)])


def beyond(results: Results) -> int:
    """How many settings lie beyond the right edge."""
    right = _right(results)
    return sum(p[0] > right for m in results.methods.values() for p in method_curve(m, None))


def _limits(axes: Axes, results: Results, right: float) -> list[Sequence[Point]]:
    """The most gold any policy can have, and the most this reward model can lead to."""
    drawn: list[Sequence[Point]] = []
    for points, colour, width, text in (
        (results.frontier, INK, 1.5, "Most any policy can reach"),
        (results.rm_frontier, MUTED, 0.9, "Most with this reward model"),
    ):
        solid, dashed = _split(points, starting_point(results), right)
        joined = solid + dashed[1:] if solid else dashed
        if len(joined) < 2:
            continue
        drawn.append(joined)
        style: dict[str, Any] = {"color": colour, "linewidth": width, "zorder": 2.5}
        bound = "Upper bound on it" if solid else "Upper bound for any policy"
        for line, dash, label in ((solid, "solid", text), (dashed, BOUND, bound)):
            if len(line) > 1:
                label = label if colour == INK or line is solid else "_"
                axes.plot(*zip(*line, strict=True), linestyle=dash, label=label, **style)
        if colour == INK:
            x, y = zip(*joined, strict=True)
            axes.fill_between(x, y, 10, color=GRID, alpha=0.45, linewidth=0, zorder=0.5)
    return drawn


def _legend(axes: Axes, figure: Figure, narrow: bool, results: Results) -> None:
    """What lines and markers mean; methods are named at their points."""
    which = "Tuned setting" if results.tuned else "First setting"
    tuned = f"{which}, 95 % interval" if len(results.seeds) > 1 else which
    axes.plot([], [], "o", color=FAINT, markersize=6.5, label=tuned)
    axes.plot([], [], "o", color=FAINT, markersize=3.4, label="Other setting")
    figure.legend(
        loc="outside upper left",
        ncols=2 if narrow else 5,
        labelcolor=MUTED,
        fontsize=7.5 if narrow else 8.5,
        columnspacing=1.0 if narrow else 1.8,
    )


def _split(
    points: Sequence[FrontierPoint], origin: Point | None, right: float
) -> tuple[list[Point], list[Point]]:
    """Estimated part and bound; both are cut at the right edge, and the bound is drawn up to it."""
    known = sorted((p.kl, p.gold, p.is_bound) for p in points)
    solid = [(k, g) for k, g, bound in known if not bound]
    if origin and solid and solid[0][0] > 0:
        solid.insert(0, origin)
    dashed = solid[-1:] + [(k, g) for k, g, bound in known if bound]
    return _cut(solid, right), _cut(dashed, right)


def _cut(line: list[Point], right: float) -> list[Point]:
    inside = [p for p in line if p[0] <= right]
    if not inside or len(inside) == len(line):
        return inside
    x, y = zip(*line, strict=True)
    return [*inside, (right, float(np.interp(right, x, y)))]


def _draw_method(
    axes: Axes, name: str, method: Method, origin: Point | None, narrow: bool
) -> list[Sequence[Point]]:
    """One method's curve, faint checkpoints, settings and tuned point; returns what it covers."""
    style, drawn = look(name), []
    through = method_curve(method, origin)
    if len(through) > 1:
        axes.plot(*zip(*through, strict=True), color=style.colour, linestyle=style.dash, alpha=0.85)
        small = [p for p in through if p not in (origin, _tuned_point(method))]
        axes.plot(
            [x for x, _ in small],
            [y for _, y in small],
            linestyle="none",
            marker=style.marker,
            markersize=3.4,
            color=style.colour,
            alpha=0.85,
        )
        drawn.append(through)
    steps = [(c.kl.mean, c.gold.mean) for s in method.sweep for c in s.checkpoints]
    known = [(k, g) for k, g in steps if k is not None and g is not None]
    if known:
        x, y = zip(*known, strict=True)
        axes.scatter(x, y, s=5, color=style.colour, alpha=0.3, linewidths=0, zorder=1.5)
    point = _tuned_point(method)
    if point:
        drawn += _draw_tuned(axes, name, method, point, 6.5 if narrow else 8)
    return drawn


def _draw_tuned(
    axes: Axes, name: str, method: Method, point: Point, size: float
) -> list[Sequence[Point]]:
    style = look(name)
    (x, y), drawn = point, []
    for low, high, along in (
        (method.kl.low, method.kl.high, 0),
        (method.gold.low, method.gold.high, 1),
    ):
        if low is not None and high is not None:
            ends = [(max(low, 0), y), (high, y)] if along == 0 else [(x, low), (x, high)]
            axes.plot(*zip(*ends, strict=True), color=style.colour, linewidth=1.2, zorder=4)
            drawn.append(ends)
    axes.plot(
        [x],
        [y],
        marker=style.marker,
        markersize=size * (1.2 if style.marker == "*" else 1),
        color=style.colour,
        markerfacecolor=CARD if method.kl_is_bound else style.colour,
        markeredgecolor=style.colour if method.kl_is_bound else CARD,
        markeredgewidth=1.5 if method.kl_is_bound else 0.9,
        zorder=5,
        clip_on=False,
    )
    return drawn


def _frame(axes: Axes, right: float, points: Sequence[Point], least_gap: float, label: str) -> None:
    gold = [g for _, g in points] or [0.0, 1.0]
    pad = max(0.04, 0.07 * (max(gold) - min(gold)))
    axes.set_xlim(0, right)
    axes.set_ylim(min(gold) - pad, max(gold) + pad)
    ticks, last = [], -1.0
    for tick in (t for t in TICKS if t <= right):
        place_at = (tick / right) ** 0.5
        if place_at - last > least_gap:
            ticks.append(tick)
            last = place_at
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.tick_params(length=3, color=FAINT)
    axes.set_xlabel("KL spent, nats per sequence (square-root scale)")
    axes.set_ylabel(label)
