"""Where each method ends when the truth is known: regret against pairs, and against beta.

    klash study regret exact --out reports

repeats a finite task's head-to-head, with its `seeds`, for each number of preference pairs and for
each beta, and writes regret.json, regret.md, regret.svg and regret.png.

Regret is J(pi*) - J(pi) with J = gold - beta KL. DPO and KTO get this beta, PPO as its `kl_coef`
(scores are in log-odds), and IPO tau = beta / 4, which has the same optimum to first order in gold.
"""

import shlex
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.entry import Argument, Overrides
from benchmarks.evaluation.exact import World
from benchmarks.evaluation.statistics import Estimate, seed_interval
from benchmarks.pipeline.arms import Pipeline
from benchmarks.pipeline.experiment import Arm, Experiment
from benchmarks.pipeline.loading import load_experiment
from benchmarks.pipeline.places import stage_context
from benchmarks.report.style import MUTED, draw, look
from benchmarks.results.schema import Method, Results
from benchmarks.run import run_experiment
from shared.config import InputError
from shared.stages import Stages, output_folder, read_json, silent, write_json

PAIRS = (100, 1_000, 10_000, 100_000)
BETAS = (0.2, 0.5, 1.0)
STEPS = 240  # optimiser steps that every training takes at least
CHECKPOINTS = (0.1, 0.25, 0.5)


class Point(NamedTuple):
    """One method at one number of pairs and one beta, over seeds."""

    pairs: int
    beta: float
    method: str
    regret: Estimate  # at the end of training
    best: Estimate  # at the best of the evaluated checkpoints, by the truth


def regret_points(base: Experiment, pairs: int, beta: float, runs: Path) -> list[Point]:
    """Run `base` with so many pairs, its arms at `beta`; SFT's regret comes first."""
    experiment = at(base, pairs, beta)
    folder = run_experiment(experiment, runs)
    results = Results.model_validate(read_json(folder / "results.json"))
    world = listed_world(experiment, runs)
    found = []
    for name, method in results.methods.items():
        curves = [regrets(world, beta, gold, kl) for gold, kl in curve(method)]
        best = [min(values) for values in zip(*curves, strict=True)]
        found.append(Point(pairs, beta, name, seed_interval(curves[-1]), seed_interval(best)))
    return found


def curve(method: Method) -> list[tuple[Estimate, Estimate]]:
    """(gold, kl) of a method's checkpoints, the last one at the end of training."""
    tuned = [setting for setting in method.sweep if setting.tuned]
    points = [(p.gold, p.kl) for setting in tuned for p in setting.checkpoints]
    return points or [(method.gold, method.kl)]


def regrets(world: World, beta: float, gold: Estimate, kl: Estimate) -> list[float]:
    """Each seed's."""
    values = zip(gold.per_seed, kl.per_seed, strict=True)
    return [world.regret(beta, g, k) for g, k in values if g is not None and k is not None]


def at(base: Experiment, pairs: int, beta: float) -> Experiment:
    """The experiment with `pairs` labels, every arm at `beta`, and as many steps as it needs."""
    if not base.task.finite:
        raise InputError(f"regret needs a finite task, not {base.task.name}")
    arms = {name: with_beta(arm, beta) for name, arm in base.arms.items() if trained(arm)}

    def epochs(batch_size: int) -> int:
        return max(1, -(-STEPS * min(batch_size, pairs) // pairs))

    return base.model_copy(
        update={
            "name": f"{base.name}-{pairs}-pairs-beta-{beta:g}",
            "arms": arms,
            "preferences": base.preferences.model_copy(update={"pairs": pairs}),
            "reward": base.reward.model_copy(update={"epochs": epochs(base.reward.batch_size)}),
            "direct": base.direct.model_copy(update={"epochs": epochs(base.direct.batch_size)}),
            "evaluation": base.evaluation.model_copy(update={"checkpoints": CHECKPOINTS}),
        }
    )


def trained(arm: Arm) -> bool:
    """Arms that learn from labels."""
    return arm.kind != "best-of-n" and not arm.gold


def with_beta(arm: Arm, beta: float) -> Arm:
    if arm.kind == "ppo":
        setting = {"kl_coef": beta}
    elif arm.loss == "ipo":
        setting = {"tau": beta / 4}
    else:
        setting = {"beta": beta}
    return arm.model_copy(update={"settings": ({**arm.settings[0], **setting},)})


def listed_world(experiment: Experiment, runs: Path) -> World:
    """All completions under the reference, from the finished run's stage."""
    stages = Stages(runs / ".stages", silent, stage_context(), fill=None)
    listing = Pipeline(experiment, stages).prepare_common().frontier_samples
    assert listing is not None
    return World(listing)


def picture(points: list[Point], fixed_beta: float, fixed_pairs: int):
    """Regret against pairs at `fixed_beta`, and against beta at `fixed_pairs`."""

    def paint(figure: Figure, narrow: bool) -> None:
        left, right = figure.subplots(2 if narrow else 1, 1 if narrow else 2)
        panel(left, [p for p in points if p.beta == fixed_beta], "pairs")
        panel(right, [p for p in points if p.pairs == fixed_pairs], "beta")
        left.set_xlabel(f"labelled pairs (beta {fixed_beta:g})")
        right.set_xlabel(f"beta ({fixed_pairs:,} pairs)")
        left.set_ylabel("regret J(pi*) - J(pi)")
        hollow = {"marker": "o", "markerfacecolor": "none", "linestyle": (0, (2, 2))}
        left.plot([], [], color=MUTED, linewidth=0.8, label="best checkpoint", **hollow)
        left.legend(frameon=False, fontsize=8)

    return draw("regret", "Regret of each method.", paint, wide=(9.6, 3.9), narrow=(3.9, 6.4))


def panel(axes: Axes, points: list[Point], x: str) -> None:
    """A line a method with its seeds' interval; hollow: its best checkpoint."""
    for name in dict.fromkeys(p.method for p in points):
        style, mine = (
            look(name),
            sorted((p for p in points if p.method == name), key=lambda p: p[:2]),
        )
        at = [getattr(p, x) for p in mine]
        mean, best = ([_mean(e) for e in es] for es in zip(*(p[3:] for p in mine), strict=True))
        if name == "sft":
            axes.plot(at, mean, color=MUTED, linestyle="dotted", label="SFT")
            continue
        low = [max(p.regret.low or 0.0, 1e-3) for p in mine]
        axes.plot(at, mean, color=style.colour, marker=style.marker, label=style.label)
        axes.fill_between(
            at, low, [p.regret.high or 0.0 for p in mine], color=style.colour, alpha=0.15
        )
        axes.plot(
            at, best, color=style.colour, marker=style.marker,
            markerfacecolor="none", linestyle=(0, (2, 2)), linewidth=0.8,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted({getattr(p, x) for p in points}))
    axes.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
        axis.set_minor_locator(NullLocator())
    ends = [v for p in points for v in (_mean(p.regret), _mean(p.best))]
    axes.set_ylim(0.7 * min(ends), 1.4 * max(ends))


def markdown(points: list[Point], command: str, seeds: int) -> str:
    lines = [
        "# Regret: how far each method ends from the known optimum",
        "",
        f"`{command}`:",
        "J(pi*) - J(pi) with J = gold - beta KL, exact; mean and 95 % interval over",
        f"{seeds} seeds. The best checkpoint is the best by the truth: what early stopping could",
        "give. SFT's row is what there is to gain.",
        "",
        "| pairs | beta | method | regret at the end | best checkpoint |",
        "|---|---|---|---|---|",
    ]
    for p in points:
        cells = (f"{p.pairs:,}", f"{p.beta:g}", p.method, p.regret.text(), p.best.text())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean(e: Estimate) -> float:
    return float("nan") if e.mean is None else e.mean


def regret(
    file: Argument[str] = "exact",
    /,
    pairs: tuple[int, ...] = PAIRS,
    betas: tuple[float, ...] = BETAS,
    runs: Path = Path("runs"),
    out: Path = Path("reports"),
    overrides: Overrides = (),
) -> None:
    """Regret of every arm against the number of pairs and against beta.

    Args:
        file: the experiment of a finite task, or the name of one that comes with Klash.
        pairs: numbers of pairs; the second last is that of the runs over beta.
        betas: the second one is that of the runs over pairs.
        runs: the folder of all runs.
        out: where the four files go.
    """
    base = load_experiment(file, overrides, quick=False)
    output_folder(out)
    beta, many = betas[len(betas) // 2], pairs[max(0, len(pairs) - 2)]
    grid = [(n, beta) for n in pairs] + [(many, b) for b in betas if b != beta]
    points = [point for n, b in grid for point in regret_points(base, n, b, runs)]
    said = shlex.join(["klash", "study", "regret", file, *overrides])
    write_json(
        out / "regret.json",
        {"command": said, "points": [_as_row(point) for point in points]},
    )
    text = markdown(points, said, len(base.seeds))
    (out / "regret.md").write_text(text, encoding="utf-8")
    drawn = picture(points, beta, many)
    (out / "regret.svg").write_bytes(drawn.svg)
    (out / "regret.png").write_bytes(drawn.png)
    print(text)


def _as_row(point: Point) -> dict:
    row = point._asdict()
    return {**row, "regret": point.regret.model_dump(), "best": point.best.model_dump()}
