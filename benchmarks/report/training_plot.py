"""What each trainer logged, as small multiples: a panel per metric, a line per seed."""

import math
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.report.style import FAINT, INK, Look, Picture, draw, look, plain

Series = list[tuple[float, float]]
Curves = dict[str, dict[str, dict[str, Series]]]  # method, seed, metric

# panel title: the metrics drawn in it; the second one dashed
PANELS = {
    "Loss": ("loss",),
    "Accuracy on the batch": ("rewards/accuracies",),
    "Implicit reward margin": ("rewards/margins",),
    "log p, rejected dashed": ("logps/chosen", "logps/rejected"),
    "KL to the reference (nats)": ("objective/kl",),
    "Reward-model score": ("objective/scores",),
    "Entropy (nats)": ("objective/entropy",),
    "Clipped share": ("ppo/policy/clipfrac",),
    "Explained variance": ("ppo/val/explained_variance",),
    "KL coefficient": ("ppo/kl_coef",),
    "Accuracy": ("accuracy",),
    "Gradient norm": ("grad_norm",),
}
MAX_POINTS = 150


def training_picture(index: int, method: str, seeds: dict[str, dict[str, Series]]) -> Picture:
    """One method's log: a panel per metric that was logged, a line per seed."""
    logged = {metric for log in seeds.values() for metric, points in log.items() if known(points)}
    titled = {metric for metrics in PANELS.values() for metric in metrics}
    panels = {t: m for t, m in PANELS.items() if logged & set(m)}
    panels |= {plain(metric): (metric,) for metric in sorted(logged - titled)}
    rows = max(1, math.ceil(len(panels) / 4)), max(1, math.ceil(len(panels) / 2))
    return draw(
        f"training-{index}",
        f"Training log of {plain(look(method).label)}.",
        lambda f, narrow: _training(f, panels, seeds, look(method), 2 if narrow else 4),
        wide=(11.9, 1.75 * rows[0]),
        narrow=(3.9, 1.4 * rows[1]),
    )


def _training(
    figure: Figure,
    panels: dict[str, tuple[str, ...]],
    seeds: dict[str, dict[str, Series]],
    style: Look,
    columns: int,
) -> None:
    colour = style.colour if style.family != "other" else INK
    grid = _grid(figure, len(panels), columns)
    for axes, (title, metrics) in zip(grid, panels.items(), strict=True):
        for metric, dash in zip(metrics, ("solid", (0, (2.5, 1.5))), strict=False):
            for log in seeds.values():
                points = _thinned(known(log.get(metric, [])))
                if points:
                    x, y = zip(*points, strict=True)
                    axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.0, alpha=0.7)
        axes.set_title(title, fontsize=8.5, pad=5)
        axes.tick_params(length=2, pad=2, color=FAINT, labelsize=7.5)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(3))


def _grid(figure: Figure, count: int, columns: int) -> list[Axes]:
    """`count` axes at fixed places, in inches: quicker to lay out than by measuring."""
    figure.set_layout_engine(None)
    width, height = figure.get_size_inches()
    rows = max(1, math.ceil(count / columns))
    cell = (width / columns, height / rows)
    left, bottom, right, top = 0.42, 0.25, 0.13, 0.27
    return [
        figure.add_axes(
            (
                (i % columns * cell[0] + left) / width,
                1 - ((i // columns + 1) * cell[1] - bottom) / height,
                (cell[0] - left - right) / width,
                (cell[1] - bottom - top) / height,
            )
        )
        for i in range(count)
    ]


def _thinned(points: Series) -> Series:
    """At most MAX_POINTS points: means of neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def known(points: Iterable[tuple[float, float | None]]) -> Series:
    """The points whose value is a finite number."""
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]
