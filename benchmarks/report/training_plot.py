"""What each trainer logged, as small multiples: a panel per metric, a line per seed."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.report.style import FAINT, INK, Look, Picture, draw, look, plain

Curve = list[tuple[float, float]]
Curves = dict[str, dict[str, dict[str, Curve]]]  # method, seed, metric


class Panel(NamedTuple):
    """One metric, and in the same axes, dashed, a second one where it was logged."""

    title: str
    metric: str
    dashed: str = ""
    dashed_name: str = ""


PANELS = (
    Panel("Loss", "loss"),
    Panel("Accuracy on the batch", "rewards/accuracies"),
    Panel("Implicit reward margin", "rewards/margins"),
    Panel("log p", "logps/chosen", "logps/rejected", "rejected"),
    Panel("KL to the reference (nats)", "objective/kl", "objective/k3", "k3"),
    Panel("KL estimate of KTO (nats)", "kl"),
    Panel("Reward-model score", "objective/scores"),
    Panel("Score minus KL penalty", "objective/rlhf_reward"),
    Panel("Score margin", "margin"),
    Panel("Entropy (nats)", "objective/entropy"),
    Panel("Policy loss", "loss/policy_avg"),
    Panel("Value loss", "loss/value_avg"),
    Panel("Clipped share", "ppo/policy/clipfrac", "ppo/val/clipfrac", "value"),
    Panel("KL of an update (nats)", "ppo/policy/approxkl"),
    Panel("Probability ratio", "ppo/policy/ratio"),
    Panel("Ratio before the first step", "ppo/first_ratio"),
    Panel("Explained variance", "ppo/val/explained_variance"),
    Panel("KL coefficient", "ppo/kl_coef"),
    Panel("Completion length (tokens)", "ppo/completion_length"),
    Panel("Share without EOS", "ppo/missing_eos"),
    Panel("Minibatches of an update", "ppo/minibatches"),
    Panel("Accuracy", "accuracy"),
    Panel("Gradient norm", "grad_norm", "ppo/val/grad_norm", "value"),
    Panel(
        "Engine's error in log p",
        "generation/logprob_difference",
        "generation/logprob_difference_max",
        "largest",
    ),
    Panel("Engine's error after a sync", "generation/sync_difference"),
    Panel("Learning rate", "learning_rate"),
)
# a counter, and what the study of shortcuts reads
NOT_DRAWN = {"episodes", "ppo/first_policy_loss", "ppo/first_value_loss"}
MAX_POINTS = 150


def training_picture(index: int, method: str, seeds: dict[str, dict[str, Curve]]) -> Picture:
    """One method's log: a panel per metric that was logged, a line per seed."""
    logged = {metric for log in seeds.values() for metric, points in log.items() if known(points)}
    panels = _panels(logged)
    rows = max(1, math.ceil(len(panels) / 4)), max(1, math.ceil(len(panels) / 2))
    return draw(
        f"training-{index}",
        f"Training log of {plain(look(method).label)}.",
        lambda f, narrow: _training(f, panels, seeds, look(method), 2 if narrow else 4),
        wide=(11.9, 1.75 * rows[0]),
        narrow=(3.9, 1.4 * rows[1]),
    )


def _panels(logged: set[str]) -> list[Panel]:
    """The known panels whose metrics were `logged`, then one for each other metric, by its name."""
    found = []
    for panel in PANELS:
        if panel.metric in logged and panel.dashed in logged:
            title = f"{panel.title}, {panel.dashed_name} dashed"
            found.append(panel._replace(title=title))
        elif panel.metric in logged:
            found.append(panel)
    known_metrics = {metric for panel in PANELS for metric in (panel.metric, panel.dashed)}
    others = sorted(logged - known_metrics - NOT_DRAWN)
    return [*found, *(Panel(plain(metric), metric) for metric in others)]


def _training(
    figure: Figure,
    panels: Sequence[Panel],
    seeds: dict[str, dict[str, Curve]],
    style: Look,
    columns: int,
) -> None:
    colour = style.colour if style.family != "other" else INK
    grid = _grid(figure, len(panels), columns)
    for axes, panel in zip(grid, panels, strict=True):
        for metric, dash in ((panel.metric, "solid"), (panel.dashed, (0, (2.5, 1.5)))):
            for log in seeds.values():
                points = _thinned(known(log.get(metric, [])))
                if points:
                    x, y = zip(*points, strict=True)
                    axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.0, alpha=0.7)
        axes.set_title(panel.title, fontsize=8.5, pad=5)
        axes.tick_params(length=2, pad=2, color=FAINT, labelsize=7.5)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(3))


def _grid(figure: Figure, count: int, columns: int) -> list[Axes]:
    """`count` axes at fixed places, in inches: quicker to lay out than by measuring."""
    figure.set_layout_engine(None)
    width, height = figure.get_size_inches()
    rows = max(1, math.ceil(count / columns))
    cell = (width / columns, height / rows)
    left, bottom, right, top = 0.5, 0.25, 0.13, 0.27
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


def _thinned(points: Curve) -> Curve:
    """At most MAX_POINTS points: means of neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def known(points: Iterable[tuple[float, float | None]]) -> Curve:
    """The points whose value is a finite number."""
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]
