"""How every figure looks and is saved: colours and markers by method, SVG for page and file.

A figure is painted twice, wide and narrow, so that its text stays legible on a phone. In the page
its colours become CSS variables, so that it follows light and dark.
"""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path
from matplotlib.typing import RcKeyType

INK, MUTED, FAINT, GRID, CARD = "#1b2330", "#5f6b7a", "#9aa4b1", "#e6e9ee", "#ffffff"

# name: light, dark. Families have Okabe and Ito's colours, which colour-blind readers can tell.
PALETTE = {
    "ink": (INK, "#e6eaf0"),
    "muted": (MUTED, "#9aa7b7"),
    "faint": (FAINT, "#6c7888"),
    "grid": (GRID, "#2b3340"),
    "card": (CARD, "#161c26"),
    "sft": ("#7b8592", "#94a0af"),
    "best-of-n": ("#3c4450", "#cdd5df"),
    "ppo": ("#d55e00", "#f5894a"),
    "dpo": ("#0072b2", "#54aee8"),
    "ipo": ("#c065a0", "#e39bcb"),
    "kto": ("#009e73", "#35c49a"),
    "fdpo": ("#e09a00", "#f2b93d"),
    "other": ("#56b4e9", "#8fd0f5"),
    "phase-0": ("#39465a", "#c3cddb"),
    "phase-1": ("#6d8bb3", "#7c9cc8"),
    "phase-2": ("#a9c1dc", "#4d6a92"),
    "phase-3": ("#c9b48c", "#a58b58"),
    "phase-4": ("#9a8f80", "#7d7263"),
    "phase-5": ("#d9dde3", "#475262"),
}
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}

_FAMILIES = {
    "reward": "muted",
    "sft": "sft",
    "best-of-n": "best-of-n",
    "ppo": "ppo",
    "ppo-gold": "ppo",
    "dpo": "dpo",
    "cdpo": "dpo",
    "rdpo": "dpo",
    "ipo": "ipo",
    "ipo-token": "ipo",
    "kto": "kto",
    "fdpo": "fdpo",
    "fdpo-random": "fdpo",
}
_LABELS = {
    "reward": "Reward model",
    "sft": "SFT",
    "ppo": "PPO",
    "ppo-gold": "PPO on gold",
    "dpo": "DPO",
    "cdpo": "cDPO",
    "rdpo": "rDPO",
    "ipo": "IPO",
    "ipo-token": "IPO per token",
    "kto": "KTO",
    "fdpo": "fDPO",
    "fdpo-random": "fDPO at random",
}
_MARKERS = {
    "sft": "o",
    "best-of-n": "h",
    "ppo": "s",
    "ppo-gold": "8",
    "dpo": "o",
    "cdpo": "^",
    "rdpo": "v",
    "ipo": "D",
    "ipo-token": "d",
    "kto": "P",
    "fdpo": "X",
    "fdpo-random": "*",
}
_OTHERS = ("p", ">", "8", "H")  # methods this file does not know, by their name
Dash = str | tuple[float, tuple[float, ...]]
_DASHES: dict[str, Dash] = {
    "ppo-gold": (0, (5, 1.6)),
    "cdpo": (0, (5, 1.6)),
    "rdpo": (0, (2.5, 1.2)),
    "ipo-token": (0, (5, 1.6)),
    "fdpo-random": (0, (5, 1.6)),
}


@dataclass(frozen=True)
class Look:
    """A method's fixed look: the colour of its family, a marker and a line of its own."""

    label: str
    family: str
    marker: str
    dash: Dash

    @property
    def colour(self) -> str:
        return PALETTE[self.family][0]


def look(method: str) -> Look:
    """The look of the method called `method`; peers (`trl-dpo`) share their family's colour."""
    own_name = method.removeprefix("trl-")
    peer = own_name != method
    words = own_name.split("-")
    starts = ["-".join(words[:n]) for n in range(len(words), 0, -1)]
    base = next((start for start in starts if start in _FAMILIES), own_name)  # `dpo-0.2` is a DPO
    rest = own_name[len(base) :].replace("-", " ")
    label = _LABELS.get(base, base) + rest
    return Look(
        label=f"TRL {label}" if peer else label,
        family=_FAMILIES.get(base, "other"),
        marker="<" if peer else _MARKERS.get(base, _OTHERS[crc32(base.encode()) % len(_OTHERS)]),
        dash=(0, (1, 1.3)) if peer else _DASHES.get(base, "solid"),
    )


def plain(text: str, limit: int = 26) -> str:
    """`text` as a figure can carry it: one short line of printable characters."""
    clean = "".join(c if c.isprintable() else " " for c in text).strip()
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def columns_for(figure: Figure, labels: Sequence[str]) -> int:
    """How many columns of a legend with `labels` fit the figure's width."""
    width = 72 * figure.get_size_inches()[0]
    entries = [46 + 5.6 * len(label) for label in labels] or [width]  # points
    return len(entries) if sum(entries) <= width else max(1, int(width / max(entries)))


def marker_path(marker: str) -> str:
    """SVG path data of a marker, 10 units wide around 0: the keys beside names in tables."""
    style = MarkerStyle(marker)
    path = style.get_path().transformed(style.get_transform())
    low, high = path.get_extents().get_points()
    scale = 10 / max(high - low)
    parts = []
    for points, code in path.iter_segments(simplify=False):
        pairs = (points.reshape(-1, 2) * (scale, -scale)).round(2).tolist()
        letter = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}.get(code)
        parts.append(f"{letter}{' '.join(f'{x},{y}' for x, y in pairs)}" if letter else "Z")
    return "".join(parts)


Paint = Callable[[Figure, bool], None]


@dataclass(frozen=True)
class Picture:
    """One figure: files (wide), and markup for the page, wide and narrow."""

    name: str
    svg: bytes = field(repr=False)
    png: bytes = field(repr=False)
    wide: Markup = field(repr=False)
    narrow: Markup = field(repr=False)


def draw(
    name: str,
    alt: str,
    paint: Paint,
    wide: tuple[float, float],
    narrow: tuple[float, float] | None = None,
) -> Picture:
    """Paint in both sizes (inches; 96 pixels each). The same input gives the same bytes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_rc())
        figure = _painted(paint, wide, is_narrow=False)
        svg, png = _save(figure, "svg", name), _save(figure, "png", name)
        page = inline(svg, f"{name}-w", alt, wide[0])
        phone = page
        if narrow is not None:
            small = _save(_painted(paint, narrow, is_narrow=True), "svg", name)
            phone = inline(small, f"{name}-n", alt, narrow[0])
    return Picture(name, svg, png, page, phone)


def _painted(paint: Paint, size: tuple[float, float], is_narrow: bool) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    paint(figure, is_narrow)
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # laid out once, for all formats
    return figure


def _save(figure: Figure, kind: str, name: str) -> bytes:
    metadata = {"Date": None, "Creator": None, "Title": name} if kind == "svg" else {}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata, dpi=200 if kind == "png" else 72)
    return buffer.getvalue()


def _rc() -> dict[RcKeyType, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "klash",
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.titlecolor": INK,
        "axes.titlepad": 7,
        "axes.labelsize": 9,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": FAINT,
        "axes.facecolor": CARD,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "figure.facecolor": CARD,
        "savefig.facecolor": CARD,
        "text.color": INK,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.frameon": False,
        "legend.fontsize": 8.8,
        "legend.handlelength": 1.6,
        "legend.columnspacing": 1.4,
        "lines.linewidth": 1.6,
        "lines.solid_capstyle": "round",
    }


def inline(svg: bytes, prefix: str, alt: str, inches: float) -> Markup:
    """The SVG as an element of an HTML page: no prolog, own ids, page's fonts and colours."""
    root = ET.fromstring(svg)
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', svg.decode()))
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag.rpartition("}")[2] in ("metadata", "style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            key.rpartition("}")[2]: _restyle(key, value, prefix)
            for key, value in element.attrib.items()
            if key != "id" or value in used
        }
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": alt, "style": f"max-width: {inches * 96:.0f}px"}
    text = ET.tostring(root, encoding="unicode")
    return Markup(re.sub(r"\s*\n\s*(?=[<LQCMHVz\"])", " ", text))


def _restyle(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{value}"
    if key.endswith("href"):
        return value.replace("#", f"#{prefix}-", 1)
    if key == "clip-path":
        return value.replace("url(#", f"url(#{prefix}-")
    if key == "style":
        value = re.sub(r"font-family:[^;]*;?\s*", "", value)
        return re.sub(r"#[0-9a-f]{6}\b", lambda m: _VARIABLES.get(m[0], m[0]), value)
    return value
