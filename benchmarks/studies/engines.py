"""PPO with either sampling engine: do they end in the same place?

    klash study engines --out reports

Same policy, reward model and prompts; transformers or vLLM draws the rollouts. Both ends are read
with the same meter on the same test prompts, and compared in pairs of seeds. Writes engines.json
and engines.md. Exit code 1 if gold differs by more than 0.03 or KL by more than 10 % on average.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.entry import Argument
from benchmarks.evaluation.statistics import Estimate, paired_difference
from benchmarks.pipeline.arms import Pipeline, Policy, Trial, setting_text
from benchmarks.pipeline.experiment import Experiment
from benchmarks.pipeline.loading import load_experiment
from benchmarks.pipeline.places import set_up_process, stage_context
from benchmarks.pipeline.plan import plan_of
from benchmarks.pipeline.progress import progress
from benchmarks.results.folders import EvaluationRows
from shared.config import InputError
from shared.generation.start import TRANSFORMERS, GenerationConfig
from shared.stages import Runner, Stages, output_folder, write_json
from shared.training.finished import read_log

GOLD, KL = 0.03, 0.10  # what counts as the same
ENGINES = {"transformers": TRANSFORMERS, "vllm": GenerationConfig(engine="vllm")}


def engines(
    file: Argument[str] = "reviews",
    /,
    arm: str = "ppo",
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    runs: Path = Path("runs"),
    out: Path = Path("reports"),
) -> bool:
    """Train `arm` at its first setting with both engines; True if they agree.

    Args:
        file: an experiment's TOML file, or the name of one that comes with Klash.
        arm: the arm of kind ppo to train.
        seeds: each trains once with either engine.
        runs: the folder of all runs.
        out: where the two files go.
    """
    experiment = load_experiment(file, [], quick=False)
    if arm not in experiment.arms:
        raise InputError(f"no arm {arm!r} in {file}: {sorted(experiment.arms)}")
    output_folder(out)
    set_up_process(experiment.threads, experiment.save_minutes)
    work = partial(train_all, experiment, arm, seeds)
    plan = plan_of(runs / ".stages", stage_context(ENGINES["vllm"]), work)
    with progress(plan.root, plan.labels) as say:
        ends = work(Stages(plan.root, say, plan.context))
    rows = {name: EvaluationRows([end.rows for end in found]) for name, found in ends.items()}
    logs = [read_log(end.model) for end in ends["vllm"]]
    mismatch = max(row["generation/logprob_difference_max"] for log in logs for row in log)
    return compare_ends(rows, seeds, mismatch, out)


class End(NamedTuple):
    """A trained policy, and what it was read with."""

    model: Path
    rows: Path


def train_all(
    experiment: Experiment, arm: str, seeds: tuple[int, ...], runner: Runner
) -> dict[str, list[End]]:
    """`arm` at its first setting with each engine, an end a seed."""
    plain, setting = Pipeline(experiment, runner), experiment.arms[arm].settings[0]
    ends: dict[str, list[End]] = {name: [] for name in ENGINES}
    common = plain.prepare_common()
    for number in seeds:
        seed = plain.prepare_seed(common, number)
        for name, generation in ENGINES.items():
            drawn = experiment.model_copy(update={"generation": generation})
            pipeline, trial = Pipeline(drawn, runner), Trial(arm, setting, seed)
            label = f"{arm}, {name} {setting_text(setting)}, seed {number}"
            model = pipeline.train(common, trial, label)
            policy = Policy(f"{arm}, {name}, seed {number}", model, number)
            ends[name].append(End(model, plain.evaluate(common, policy, seed.reward)))
    return ends


def compare_ends(
    rows: dict[str, EvaluationRows], seeds: tuple[int, ...], mismatch: float, out: Path
) -> bool:
    """Write both ends and their differences; whether they agree."""
    gold = paired_difference(rows["vllm"].mean("gold"), rows["transformers"].mean("gold"))
    kls = {name: r.mean("kl") for name, r in rows.items()}
    kl = paired_difference(kls["vllm"], kls["transformers"])
    share = (kl.mean or 0.0) / float(kls["transformers"].mean())
    agree = abs(gold.mean or 0.0) <= GOLD and abs(share) <= KL
    write_json(
        out / "engines.json",
        {
            "seeds": list(seeds),
            "gold": {name: r.mean("gold").mean(1).tolist() for name, r in rows.items()},
            "kl": {name: values.mean(1).tolist() for name, values in kls.items()},
            "gold_difference": gold.model_dump(),
            "kl_difference": kl.model_dump(),
            "kl_share": share,
            "logprob_difference_max": mismatch,
            "holds": agree,
        },
    )
    text = markdown(rows, gold, kl, share, mismatch, agree)
    (out / "engines.md").write_text(text, encoding="utf-8")
    print(text)
    return agree


def markdown(
    rows: dict[str, EvaluationRows],
    gold: Estimate,
    kl: Estimate,
    share: float,
    mismatch: float,
    agree: bool,
) -> str:
    """The two ends and their difference, seed by seed."""
    lines = ["# PPO with either sampling engine", "", "`klash study engines`", ""]
    names = list(rows)
    lines.append("| seed | " + " | ".join(f"gold, {n} | KL, {n}" for n in names) + " |")
    lines.append("|---" * (1 + 2 * len(names)) + "|")
    columns = [r.mean(column).mean(1) for r in rows.values() for column in ("gold", "kl")]
    for number, values in enumerate(np.array(columns).T):
        lines.append(f"| {number} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    difference = f"gold {gold.text('+.3f')}, KL {kl.text('+.3f')} nats ({share:+.1%})"
    lines += [
        "",
        f"vLLM - transformers: {difference}. Largest "
        f"difference of a sampled token's log-probability, trainer to engine: {mismatch:.1e} nats.",
        f"Within {GOLD} in gold and {KL:.0%} in KL on average: {'yes' if agree else 'no'}.",
    ]
    return "\n".join(lines) + "\n"
