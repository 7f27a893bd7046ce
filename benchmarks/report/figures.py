"""The report's other figures, and the list of all of them. Each takes numbers and paints axes."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from benchmarks.evaluation.statistics import Estimate
from benchmarks.report import frontier_plot
from benchmarks.report.cells import by_gold
from benchmarks.report.style import (
    CARD,
    FAINT,
    INK,
    MUTED,
    PALETTE,
    Look,
    Picture,
    columns_for,
    draw,
    look,
    plain,
)
from benchmarks.report.training_plot import Curve, Curves, known, training_picture
from benchmarks.results.schema import Cost, CurvePoint, Method, Results, RewardModel


def draw_all(results: Results, curves: Curves) -> dict[str, Picture]:
    """Every figure that the results have something for, by name."""
    found: list[Picture] = []
    if results.judged or results.scored:
        found.append(
            draw(
                "frontier",
                "Gold score against KL spent, by method, under the limit of any policy.",
                lambda f, narrow: frontier_plot.paint(results, f, narrow),
                wide=(11.9, 4.8),
                narrow=(3.9, 4.7),
            )
        )
    if _learners(results):
        found.append(
            draw(
                "learning",
                "Gold and KL on test prompts at checkpoints of the tuned runs, by method.",
                lambda f, narrow: _paint_learning(results, f, narrow),
                wide=(11.9, 3.7),
                narrow=(3.9, 6.2),
            )
        )
    found.append(_cost_picture(results))
    if results.reward_model is not None:
        found.append(_reward_picture(results.reward_model))
    if any(m.filtering for m in results.methods.values()):
        found.append(
            draw(
                "filtering",
                "Share of pairs kept before each epoch, by method.",
                lambda f, narrow: _paint_filtering(results, f),
                wide=(5.4, 3.1),
                narrow=(3.9, 2.9),
            )
        )
    found += [training_picture(i, m, seeds) for i, (m, seeds) in enumerate(curves.items())]
    return {picture.name: picture for picture in found}


def _style_ticks(axes: Axes) -> None:
    axes.tick_params(length=3, color=FAINT)


def _draw_line(axes: Axes, points: Curve, style: Look, width: float = 1.6) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=style.colour, linestyle=style.dash, linewidth=width, label="_")


# --- learning curves on test prompts ---------------------------------------------------------


def _checkpoints(method: Method) -> Sequence[CurvePoint]:
    tuned = [s for s in method.sweep if s.tuned]
    return sorted(tuned[0].checkpoints, key=lambda c: c.fraction) if tuned else []


def _learners(results: Results) -> list[str]:
    """Methods with checkpoints; best-of-n is not trained."""
    trained = {name: m for name, m in results.methods.items() if m.kind != "best-of-n"}
    return [name for name, method in trained.items() if _checkpoints(method)]


def _paint_learning(results: Results, figure: Figure, narrow: bool) -> None:
    origin = frontier_plot.starting_point(results)
    shown: list[tuple[str, str, float | None]] = [("kl", "KL spent (nats per sequence)", 0.0)]
    if results.judged:
        shown.insert(0, ("gold", "Gold score", origin[1] if origin else None))
    grid = (len(shown), 1) if narrow else (1, len(shown))
    panels = figure.subplots(*grid, squeeze=False).ravel()
    for axes, (metric, title, first) in zip(panels, shown, strict=True):
        for name in _learners(results):
            steps = [(c.fraction, getattr(c, metric)) for c in _checkpoints(results.methods[name])]
            _band(axes, steps, first, look(name))
        axes.set_title(title)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        _style_ticks(axes)
    panels[-1].set_ylim(bottom=0)
    for axes in panels[-1:] if narrow else panels:
        axes.set_xlabel("Share of training done")
    _method_legend(figure, _learners(results))


def _band(
    axes: Axes, steps: Sequence[tuple[float, Estimate]], first: float | None, style: Look
) -> None:
    """The mean with its markers, and the interval as a light band."""
    begin: Curve = [] if first is None else [(0.0, first)]
    line = begin + known((x, e.mean) for x, e in steps if x > 0)
    if not line:
        return
    _draw_line(axes, line, style)
    x, y = zip(*line, strict=True)
    axes.plot(x, y, style.marker, color=style.colour, markersize=4.4, clip_on=False, zorder=3)
    limits = [(x, e.low, e.high) for x, e in steps if e.low is not None and e.high is not None]
    if limits:
        anchor = [(0.0, first, first)] if first is not None else []
        at, low, high = zip(*anchor, *limits, strict=True)
        axes.fill_between(at, low, high, color=style.colour, alpha=0.09, linewidth=0)


def _method_legend(figure: Figure, methods: Sequence[str]) -> None:
    looks = [look(name) for name in methods]
    handles = [
        Axes.plot(figure.axes[0], [], [], color=s.colour, marker=s.marker, ls=s.dash, ms=4.5)[0]
        for s in looks
    ]
    labels = [plain(s.label) for s in looks]
    columns = columns_for(figure, labels)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


# --- costs, reward model, filtering ----------------------------------------------------------


_WORK = {
    "reward": "reward model",
    "reference": "reference scored",
    "mismatched": "reference scored",
    "direct": "training",
    "filtered: train": "training",
    "ppo: update": "training",
    "ppo: generate": "sampling",
    "best-of-n": "sampling",
    "ppo: score": "scoring",
    "filtered: filter": "filtering",
}


def _cost_picture(results: Results) -> Picture:
    methods = [n for n, m in by_gold(results) if m.cost.wall_s > 0 or m.cost.flops > 0]
    height = 0.27 * max(1, len(methods))
    return draw(
        "cost",
        "Seconds by phase and floating-point operations of one training run, by method.",
        lambda f, narrow: _paint_cost(results, methods, f, narrow),
        wide=(11.9, height + 1.3),
        narrow=(3.9, 2 * height + 2.5),
    )


def _paint_cost(results: Results, methods: Sequence[str], figure: Figure, narrow: bool) -> None:
    panels = figure.subplots(*((2, 1) if narrow else (1, 2)), sharey=not narrow)
    costs = [results.methods[name].cost for name in methods]
    seconds = [_by_work(c) for c in costs]
    phases = list(dict.fromkeys(phase for each in seconds for phase in each))
    left = [0.0] * len(methods)
    for i, phase in enumerate(phases):
        width = [each.get(phase, 0.0) for each in seconds]
        colour = PALETTE[f"phase-{min(i, 5)}"][0]
        panels[0].barh(range(len(methods)), width, 0.62, left, color=colour, label=plain(phase, 40))
        left = [a + b for a, b in zip(left, width, strict=True)]
    colours = [look(name).colour for name in methods]
    panels[1].barh(range(len(methods)), [c.flops for c in costs], 0.62, color=colours)
    for axes, title in zip(panels, ("Seconds, on this machine", "FLOPs"), strict=True):
        axes.set_title(title)
        axes.set_yticks(range(len(methods)), [plain(look(n).label, 16) for n in methods])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.tick_params(axis="x", length=3, color=FAINT)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(visible=False, axis="y")
    panels[1].xaxis.set_major_formatter(EngFormatter())
    panels[0].invert_yaxis()
    if narrow:
        panels[1].invert_yaxis()
    columns = columns_for(figure, [plain(phase, 40) for phase in phases])
    figure.legend(loc="outside upper left", ncols=columns, handlelength=1.0)


def _by_work(cost: Cost) -> dict[str, float]:
    """Seconds by kind of work, whichever stage did it."""
    found: dict[str, float] = {}
    for phase, seconds in (cost.phases or {"all": cost.wall_s}).items():
        work = _WORK.get(phase, phase)
        found[work] = found.get(work, 0.0) + seconds
    return found


def _reward_picture(reward_model: RewardModel) -> Picture:
    return draw(
        "reward-model",
        "Predicted against observed probability that the first of two answers wins.",
        lambda f, narrow: _paint_reliability(reward_model, f),
        wide=(4.6, 3.7),
        narrow=(3.9, 3.3),
    )


def _paint_reliability(reward_model: RewardModel, figure: Figure) -> None:
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 2.5)))
    points = sorted(reward_model.reliability)
    if points:
        x, y, n = zip(*points, strict=True)
        axes.plot(x, y, color=PALETTE["dpo"][0], linewidth=1.2, alpha=0.6)
        sizes = [12 + 70 * count / max(1, *n) for count in n]
        axes.scatter(x, y, s=sizes, color=PALETTE["dpo"][0], edgecolor=CARD, zorder=3)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("Probability the reward model gives")
    axes.set_ylabel("Share that wins")
    axes.text(0.98, 0.04, "larger dot: more pairs", ha="right", color=MUTED, fontsize=7.5)
    _style_ticks(axes)


def _paint_filtering(results: Results, figure: Figure) -> None:
    axes = figure.add_subplot()
    names = [name for name, method in results.methods.items() if method.filtering]
    for name in names:
        epochs, style = results.methods[name].filtering or [], look(name)
        for epoch in epochs:
            for share in epoch.kept_share_per_seed:
                axes.plot(epoch.epoch, share, ".", color=style.colour, alpha=0.45, markersize=4)
        _draw_line(axes, [(e.epoch, e.kept_share) for e in epochs], style)
        axes.plot(
            [e.epoch for e in epochs],
            [e.kept_share for e in epochs],
            style.marker,
            color=style.colour,
            markersize=6,
        )
    axes.set_ylim(0, 1.05)
    axes.margins(x=0.08)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Epoch")
    axes.set_ylabel("Pairs kept")
    _style_ticks(axes)
    _method_legend(figure, names)
