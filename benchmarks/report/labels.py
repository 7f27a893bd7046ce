"""Names written next to their points: of all places around a point, those that cover least."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from numpy.typing import NDArray

from benchmarks.report.style import CARD, FAINT, INK

Array = NDArray[np.float64]
Line = Sequence[tuple[float, float]]

_RADII, _ANGLES = (9.0, 13.0, 18.0, 25.0, 34.0, 46.0, 60.0), 16  # points; directions
_LEADER_FROM = 14.0  # points: a name further away than this is tied to its point by a line
_ROUNDS = 6


@dataclass(frozen=True)
class Label:
    """`text` for the point (x, y), in data units."""

    text: str
    anchor: tuple[float, float]


def place_labels(axes: Axes, labels: Sequence[Label], lines: Sequence[Line]) -> None:
    """Write `labels` clear of each other and of `lines` (data units); limits must be set already.

    Each label in turn moves to its cheapest place given the others, a few times over.
    """
    if not labels:
        return
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # fixes the layout, and with it the data's place in pixels
    figure.set_layout_engine(None)
    unit = figure.dpi / 72
    to_pixels = axes.transData.transform
    ink = np.concatenate(
        [np.empty((0, 2)), *(_dense(to_pixels(list(line)), unit) for line in lines)]
    )
    texts = [_write(axes, label) for label in labels]
    renderer = FigureCanvasAgg(figure).get_renderer()
    sizes = [np.array(text.get_window_extent(renderer).size) for text in texts]
    anchors = [to_pixels(label.anchor) for label in labels]
    boxes = [_places(a, s, unit) for a, s in zip(anchors, sizes, strict=True)]
    inside = np.array(axes.get_window_extent().extents)
    markers = np.array(anchors)
    own_costs = [
        _placement_cost(box, ink, markers, inside, unit) + 150.0 * _nearer(box, markers, i, unit)
        for i, box in enumerate(boxes)
    ]
    chosen = _settle(boxes, own_costs, unit)
    for text, anchor, box in zip(texts, anchors, chosen, strict=True):
        centre = (box[:2] + box[2:]) / 2
        x, y = (centre - anchor) / unit
        text.set_position((float(x), float(y)))
        start = np.clip(anchor, box[:2], box[2:])
        if math.hypot(*(start - anchor)) > _LEADER_FROM * unit:
            ends = axes.transData.inverted().transform([start, anchor])
            axes.plot(*ends.T, color=FAINT, linewidth=0.7, zorder=2, scalex=False, scaley=False)


def _write(axes: Axes, label: Label) -> Annotation:
    text = axes.annotate(
        label.text,
        label.anchor,
        xytext=(0, 0),
        textcoords="offset points",
        ha="center",
        va="center",
        color=INK,
        fontweight="bold",
        bbox={"facecolor": CARD, "alpha": 0.7, "pad": 0.6, "linewidth": 0},
        zorder=9,
    )
    text.set_in_layout(False)
    return text


def _dense(points: Array, unit: float) -> Array:
    """The broken line through `points` (pixels), sampled every 2 points of length."""
    parts = [points[:1]]
    for a, b in pairwise(points):
        steps = max(2, min(2000, math.ceil(float(np.hypot(*(b - a))) / (2 * unit))))
        parts.append(a + (b - a) * np.linspace(0, 1, steps)[1:, None])
    return np.concatenate(parts)


def _places(anchor: Array, size: Array, unit: float) -> Array:
    """Boxes (x0, y0, x1, y1) around `anchor`: nearest first, all directions at each radius."""
    angles = np.arange(_ANGLES) * (2 * math.pi / _ANGLES)
    rays = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    rim = rays / np.abs(rays).max(axis=1, keepdims=True) * size / 2
    centres = np.concatenate([anchor + rim + radius * unit * rays for radius in _RADII])
    return np.concatenate([centres - size / 2, centres + size / 2], axis=1)


def _placement_cost(boxes: Array, ink: Array, markers: Array, inside: Array, unit: float) -> Array:
    """What each box costs by itself: distance, ink and markers under it, leaving the axes."""
    distance = np.repeat(np.array(_RADII), _ANGLES)

    def under(points: Array, margin: float) -> Array:
        low, high = boxes[:, None, :2] - margin * unit, boxes[:, None, 2:] + margin * unit
        return ((points > low) & (points < high)).all(axis=2).sum(axis=1)

    out = (boxes[:, :2] < inside[:2]).any(axis=1)
    out |= (boxes[:, 2:] > inside[2:] + 4 * unit).any(axis=1)
    cost = 1.5 * distance + 3.5 * under(ink, 1.5) + 400.0 * under(markers, 6.0)
    return cost + 5000.0 * out


def _nearer(boxes: Array, markers: Array, own: int, unit: float) -> Array:
    """Whether a box lies about as near to another's marker as to its own."""
    nearest = np.clip(markers, boxes[:, None, :2], boxes[:, None, 2:])
    away = np.hypot(*np.moveaxis(nearest - markers, -1, 0))
    others = np.delete(away, own, axis=1)
    if not others.shape[1]:
        return np.zeros(len(boxes), dtype=bool)
    return others.min(axis=1) < away[:, own] + 3 * unit


def _settle(boxes: Sequence[Array], own_costs: Sequence[Array], unit: float) -> list[Array]:
    """One box per label: greedy descent on the boxes' own costs and their overlaps."""
    chosen: list[Array | None] = [None] * len(boxes)
    for _ in range(_ROUNDS):
        for i, places in enumerate(boxes):
            cost = own_costs[i].copy()
            for other in (box for j, box in enumerate(chosen) if j != i and box is not None):
                low = np.maximum(places[:, :2] - 2.5 * unit, other[:2])
                high = np.minimum(places[:, 2:] + 2.5 * unit, other[2:])
                overlap = np.clip(high - low, 0, None).prod(axis=1)
                cost += np.where(overlap > 0, 300 + overlap, 0)
            chosen[i] = places[int(np.argmin(cost))]
    return [box for box in chosen if box is not None]
