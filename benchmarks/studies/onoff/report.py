"""What the on/off study finds: first steps, ends, and whether they are alike on and off."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.evaluation.metrics import accuracy_from_gold
from benchmarks.evaluation.statistics import Estimate, paired_difference, seed_interval
from benchmarks.pipeline.experiment import Experiment
from benchmarks.results.folders import EvaluationRows
from benchmarks.studies.onoff.switches import Comparison, largest_differences
from shared.stages import read_json
from shared.training.finished import read_log

CLOSE, GOLD, KL = 1e-4, 0.03, 0.10  # what counts as the same
LOGPROBS = ("pairs", "reference", "samples")  # of a probe
FIRST_LOSSES = ("ppo/first_policy_loss", "ppo/first_value_loss")  # else each step's own `loss`
REWARD = "reward"  # the reward model's training is an arm here


class Job(NamedTuple):
    """One arm under one variant."""

    variant: str
    arm: str


class JobStages(NamedTuple):
    """The stage that trained, and the one that read its end."""

    trained: Path
    end: Path


class StudiedSeed(NamedTuple):
    """All jobs of one seed."""

    sft_rows: Path
    done: dict[Job, JobStages]
    probes: dict[str, list[Path]]  # of a variant: at SFT's weights and at a trained policy's


def arms_of(experiment: Experiment, comparison: Comparison) -> list[str]:
    """The arms that the comparison touches, the reward model last."""
    arms = [name for name, arm in experiment.arms.items() if arm.kind in comparison.kinds]
    return [*arms, REWARD] if REWARD in comparison.kinds else arms


def compare_sides(
    experiment: Experiment, comparisons: Sequence[Comparison], seeds: list[StudiedSeed]
) -> dict[str, Any]:
    """What onoff.json holds: first steps, ends, and whether they are the same."""
    sft = EvaluationRows([seed.sft_rows for seed in seeds])
    found = []
    for c in comparisons:
        arms = arms_of(experiment, c)
        sides = {arm: (Job(c.on, arm), Job(c.off, arm)) for arm in arms}
        first = {
            arm: max(loss_difference(*(seed.done[job].trained for job in jobs)) for seed in seeds)
            for arm, jobs in sides.items()
        }
        pairs = [
            p for seed in seeds for p in zip(seed.probes[c.on], seed.probes[c.off], strict=True)
        ]
        gaps = [largest_differences(*pair) for pair in pairs]
        probes = {name: max(gap[name] for gap in gaps) for name in gaps[0]}
        ends = {
            arm: end([[seed.done[job].end for seed in seeds] for job in jobs])
            for arm, jobs in sides.items()
            if arm != REWARD
        }
        row = {"name": c.name, "off": c.off_means, "yardstick": c.yardstick, "first_loss": first}
        row |= {"logprobs": probes, "ends": ends, "reward": None}
        if REWARD in arms:
            right = [[accuracy(seed.done[job].end) for seed in seeds] for job in sides[REWARD]]
            row["reward"] = seed_interval(np.subtract(*right).tolist()).model_dump()
        found.append({**row, **verdict(first, probes, ends)})
    judged = [row for row in found if not row["yardstick"]]
    return {
        "seeds": list(experiment.seeds),
        "sft_gold": float(sft.mean("gold").mean()),
        "comparisons": found,
        "holds": all(row["starts_alike"] and row["ends_alike"] for row in judged),
    }


def loss_difference(on: Path, off: Path) -> float:
    """Of the first step's losses."""
    first, other = (read_log(folder)[0] for folder in (on, off))
    names = [name for name in FIRST_LOSSES if name in first] or ["loss"]
    return max(abs(first[name] - other[name]) for name in names)


def accuracy(folder: Path) -> float:
    """How often a reward model is right, of what `examine_reward` wrote."""
    scores = read_json(folder / "scores.json")
    return accuracy_from_gold(scores["score_a"], scores["score_b"], scores["p_a_wins"])


def end(folders: list[list[Path]]) -> dict[str, Any]:
    """Gold and KL of one arm, `folders` on and off: on - off, paired, KL as a share of off's."""
    on, off = map(EvaluationRows, folders)
    kl, kl_off = on.mean("kl").mean(1), off.mean("kl").mean(1)
    return {
        "gold": float(on.mean("gold").mean()),
        "gold_difference": paired_difference(on.mean("gold"), off.mean("gold")).model_dump(),
        "kl": float(kl.mean()),
        "kl_share": seed_interval(((kl - kl_off) / kl_off).tolist()).model_dump(),
    }


def verdict(
    first: dict[str, float], probes: dict[str, float], ends: dict[str, dict[str, Any]]
) -> dict[str, bool]:
    """Whether first steps and log-probabilities are the same, and ends on average."""
    largest = max(*first.values(), *(probes[name] for name in LOGPROBS))
    return {"starts_alike": largest <= CLOSE, "ends_alike": all(map(alike, ends.values()))}


def alike(end: dict[str, Any]) -> bool:
    """Whether gold and KL are the same on average over the seeds."""
    return abs(end["gold_difference"]["mean"]) <= GOLD and abs(end["kl_share"]["mean"]) <= KL


def markdown(found: dict[str, Any]) -> str:
    """The tables of onoff.md."""
    rows = found["comparisons"]
    arms = list(dict.fromkeys(arm for row in rows for arm in row["first_loss"]))
    lines = [
        "# Each optimisation on against off",
        "",
        f"`{found['command']}`, {len(found['seeds'])} seeds.",
        "",
        "First steps: the largest difference over seeds, of the first step's loss (PPO: of its",
        "policy's and its value model's) and of log-probabilities in nats, at SFT's weights and at",
        "a trained policy's: of tokens of pairs, of whole completions under the reference, of",
        "sampled tokens.",
        "",
        "| optimisation | off | "
        + " | ".join(f"loss, {arm}" for arm in arms)
        + " | pairs | reference | samples | within 1e-4 |",
        "|---" * (len(arms) + 6) + "|",
    ]
    for row in rows:
        losses = [_small(row["first_loss"].get(arm)) for arm in arms]
        gaps = [_small(row["logprobs"][name]) for name in LOGPROBS]
        cells = [_name(row), row["off"], *losses, *gaps, _yes(row["starts_alike"])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Ends: on test prompts, mean [95 % interval] over paired seeds; KL to the reference, its",
        f"difference as a share of KL with the optimisation off. SFT's gold is "
        f"{found['sft_gold']:.3f}.",
        "",
        "| optimisation | arm | gold, on | on - off | KL, on | on - off | within 0.03 and 10 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for arm, e in row["ends"].items():
            gold, kl = _text(e["gold_difference"], "+.3f"), _text(e["kl_share"], "+.1%")
            cells = [_name(row), arm, f"{e['gold']:.3f}", gold, f"{e['kl']:.2f}", kl]
            lines.append(f"| {' | '.join([*cells, _yes(alike(e))])} |")
    lines += [
        "",
        "Reward models: how often they are right on pairs of other prompts, on - off. Those with",
        "it on are the same in every row, and so is what chance did to them.",
        "",
        "| optimisation | on - off |",
        "|---|---|",
        *(f"| {_name(r)} | {_text(r['reward'], '+.4f')} |" for r in rows if r["reward"]),
        "",
        "\\* No optimisation but the yardstick: what rounding alone does.",
        f"All optimisations within the limits: {_yes(found['holds'])}.",
    ]
    return "\n".join(lines) + "\n"


def _name(row: dict[str, Any]) -> str:
    return row["name"] + (" \\*" if row["yardstick"] else "")


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def _yes(holds: bool) -> str:
    return "yes" if holds else "NO"


def _text(estimate: dict[str, Any], form: str) -> str:
    return Estimate(**estimate).text(form)
