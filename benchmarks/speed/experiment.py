"""`klash speed experiment`: all trainings of `reviews`, by Klash and by TRL's trainers.

Both sides start from one SFT model and the same preferences, and train as many reward models and
policies: each arm at all its settings on the first seeds, then at its best one on every seed. Arms
that TRL has no trainer for (best-of-n, filtered DPO) are left out on both sides.

Ours are stages, as `klash compare` runs them: in parallel, with the experiment's workers and
threads, references scored once a seed. (`klash compare` trains its last seed on an idle machine,
for the seconds in its report; not so here.) TRL's, see `trl/trainings.py`, run one after another
with as many threads as our workers have together. Both sides' processes start before the clock.

The clock stands still while policies are evaluated: validation prompts choose each side's best
setting, test prompts show that the trained policies are of equal quality. The sides take turns:
reward models and references, first seeds, other seeds. Different numbers of optimiser steps are
refused. PPO's guards are off, since TRL has none and they would stop training early.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.pipeline.arms import CommonStages, Pipeline, Policy, setting_text
from benchmarks.pipeline.compare import tuning_seeds
from benchmarks.pipeline.experiment import Arm, Experiment
from benchmarks.pipeline.loading import load_experiment
from benchmarks.pipeline.places import side_by_side, stage_context
from benchmarks.speed.sides import Choice, machine
from benchmarks.speed.trainings import (
    PHASES,
    KlashSide,
    PolicyTraining,
    Sides,
    TrlSide,
    print_progress,
)
from benchmarks.speed.trl.ppo import TRL, install_trl
from benchmarks.speed.trl.trainings import (
    PAIR_LOSSES,
    FinishedTraining,
    import_ppo,
    import_trl,
    trl_process,
)
from dpo.losses import UNPAIRED
from shared.config import Config
from shared.data.splits import Split
from shared.stages import Stages, output_folder, write_json

NO_GUARD = 1e9


class ExperimentSpeed(Config):
    """`ratio`: peer's wall seconds / ours. `shares`: of a side's seconds, by phase.

    `settings` and `gold` (on test prompts, one a seed) by side and arm.
    """

    experiment: str
    seeds: tuple[int, ...]
    peer_name: str
    threads: int
    ratio: float
    trainings: int
    steps: int
    shares: dict[str, dict[str, float]]
    settings: dict[str, dict[str, dict[str, float]]]
    gold: dict[str, dict[str, list[float]]]


def speed_experiment(choice: Choice) -> str:
    """Compare on `reviews`; writes `runs/speed/experiment.json` and `experiment.md`, its text."""
    out = output_folder(choice.runs / "speed")
    experiment = comparable(load_experiment("reviews", [], choice.quick))
    library = install_trl(out / f"trl-{TRL}")
    with TemporaryDirectory(dir=out) as scratch:
        found = compare_trainings(experiment, library, Path(scratch))
    text = experiment_table(found)
    write_json(out / "experiment.json", found.model_dump(mode="json"))
    (out / "experiment.md").write_text(text, encoding="utf-8")
    return text


def comparable(experiment: Experiment) -> Experiment:
    """`experiment` with what both sides do: trainings, all to their end, and an evaluation."""
    arms = {name: arm for name, arm in experiment.arms.items() if trl_trains(arm)}
    off = {"max_approx_kl": NO_GUARD, "max_kl": NO_GUARD}
    unread = dict.fromkeys(
        ("frontier_prompts", "frontier_samples", "reward_limit_samples", "reward_pairs"), 2
    )
    evaluation = experiment.evaluation.model_copy(update={**unread, "checkpoints": ()})
    ppo = experiment.ppo.model_copy(update=off)
    return experiment.model_copy(update={"arms": arms, "ppo": ppo, "evaluation": evaluation})


def trl_trains(arm: Arm) -> bool:
    """Whether TRL has a trainer for `arm`."""
    if arm.kind == "ppo":
        return not arm.gold
    return arm.kind == "direct" and arm.loss in (*PAIR_LOSSES, *UNPAIRED)


def compare_trainings(
    experiment: Experiment, library: Path | None, folder: Path
) -> ExperimentSpeed:
    """All trainings of both sides, in `folder`; `library`: TRL 1.12.0, if there is PPO."""
    threads = experiment.workers * experiment.threads
    stages = Stages(folder / "stages", print_progress, stage_context(experiment.generation))
    with ExitStack() as open_:
        # TRL's first: their threads do not sleep while they wait, as ours do
        trl = open_.enter_context(trl_process(threads, import_trl))
        ppo = library and open_.enter_context(trl_process(threads, import_ppo, library))
        parallel = open_.enter_context(side_by_side(stages, experiment.workers, experiment.threads))
        pipeline = Pipeline(experiment, parallel)
        common, preferences = prepare_inputs(pipeline)
        sides = {
            "klash": KlashSide(pipeline, common),
            "trl": TrlSide(experiment, common, preferences, folder / "trl", trl, ppo or trl),
        }
        return run_both_sides(pipeline, common, sides)


def prepare_inputs(pipeline: Pipeline) -> tuple[CommonStages, dict[int, Path]]:
    """(the SFT model with samples of it, preferences of each seed): before the clock starts."""
    common, seeds = pipeline.prepare_common(), pipeline.experiment.seeds
    make = partial(pipeline.prepare_preferences, common)
    return common, dict(zip(seeds, pipeline.stages.each(make, seeds), strict=True))


def run_both_sides(pipeline: Pipeline, common: CommonStages, sides: Sides) -> ExperimentSpeed:
    """Reward models, first seeds, other seeds: each ours and then TRL's; and what came of them."""
    experiment = pipeline.experiment
    models = [f"reward model, seed {seed}" for seed in experiment.seeds]
    check_steps(models, *(side.prepare() for side in sides.values()))
    tuning = [
        PolicyTraining(name, setting, seed)
        for name, arm in experiment.arms.items()
        for setting in arm.settings
        for seed in tuning_seeds(experiment, arm)
    ]
    check_steps(tuning, *(side.train(tuning) for side in sides.values()))
    gold = partial(mean_golds, pipeline, common)
    best = {
        name: best_settings(
            experiment, tuning, gold(f"{name}: ", side.tally.policies, "validation")
        )
        for name, side in sides.items()
    }
    others = {name: other_seeds(experiment, chosen) for name, chosen in best.items()}
    trained = [side.train(others[name]) for name, side in sides.items()]
    check_steps(others["klash"], *trained)
    found = {}
    for name, side in sides.items():
        finals = [(t, p) for t, p in side.tally.policies if t.setting == best[name][t.arm]]
        values = gold(f"{name}: ", finals, "test")
        at = {(t.arm, t.seed): value for (t, _), value in zip(finals, values, strict=True)}
        found[name] = {a: [at[a, seed] for seed in experiment.seeds] for a in experiment.arms}
    ours, theirs = (side.tally for side in sides.values())
    return ExperimentSpeed(
        experiment=experiment.name,
        seeds=experiment.seeds,
        peer_name=f"trl {version('trl')}, PPO {TRL}",
        threads=experiment.workers * experiment.threads,
        ratio=theirs.seconds / ours.seconds,
        trainings=ours.trainings,
        steps=ours.steps,
        shares={name: side.tally.shares() for name, side in sides.items()},
        settings=best,
        gold=found,
    )


def check_steps(
    names: Sequence[object], ours: Sequence[FinishedTraining], theirs: Sequence[FinishedTraining]
) -> None:
    """RuntimeError unless both sides took the same optimiser steps in each of these trainings."""
    for name, mine, other in zip(names, ours, theirs, strict=True):
        if mine.steps != other.steps:
            raise RuntimeError(
                f"klash speed experiment: {name}: {mine.steps} optimiser steps, but TRL's trainer "
                f"took {other.steps}"
            )


def mean_golds(
    pipeline: Pipeline,
    common: CommonStages,
    name: str,
    policies: Sequence[tuple[PolicyTraining, Path]],
    split: Split,
) -> list[float]:
    """Mean gold of each policy on prompts of `split`, read with `klash compare`'s meter."""

    def gold(at: tuple[PolicyTraining, Path]) -> float:
        training, folder = at
        policy = Policy(f"{name}{training}, {split}", folder, training.seed)
        return pipeline.mean_gold(pipeline.evaluate(common, policy, split=split))

    return pipeline.stages.each(gold, policies)


def best_settings(
    experiment: Experiment, tried: Sequence[PolicyTraining], gold: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Each arm's setting with the highest mean gold, or its only one."""

    def mean_gold(name: str, setting: dict[str, float]) -> float:
        both = zip(tried, gold, strict=True)
        return float(np.mean([g for t, g in both if (t.arm, t.setting) == (name, setting)] or 0.0))

    return {
        name: max(arm.settings, key=partial(mean_gold, name))
        for name, arm in experiment.arms.items()
    }


def other_seeds(
    experiment: Experiment, chosen: dict[str, dict[str, float]]
) -> list[PolicyTraining]:
    """Each arm at its setting, on the seeds that were not tuned on."""
    return [
        PolicyTraining(name, setting, seed)
        for name, setting in chosen.items()
        for seed in experiment.seeds
        if seed not in tuning_seeds(experiment, experiment.arms[name])
    ]


def experiment_table(found: ExperimentSpeed) -> str:
    """Markdown: the ratio, the phases' shares, and the golds of both sides."""
    size = f"{len(found.seeds)} seeds, {found.trainings} trainings, {found.steps} optimiser steps"
    lines = [
        f"All trainings of `{found.experiment}` ({size}) on either side, "
        f"{machine(found.threads)}: Klash ends {found.ratio:.2f} times as fast as TRL's trainers "
        f"({found.peer_name}).",
        "",
        "| | klash | trl |",
        "|---|---|---|",
    ]
    for name, text in PHASES.items():
        cells = (f"{found.shares[side][name]:.0%}" for side in found.shares)
        lines.append(f"| share of {text} | {' | '.join(cells)} |")
    for arm in found.gold["klash"]:
        cells = (
            f"{np.mean(found.gold[side][arm]):.3f} ({setting_text(found.settings[side][arm])})"
            for side in found.gold
        )
        lines.append(f"| gold of {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
