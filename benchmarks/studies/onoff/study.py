"""Each optimisation on against off: speed must not change what is learned.

    klash study onoff --out reports

Trains every arm that an optimisation touches with it and without it, from the same SFT model, pairs
and reward models, at the same seeds, and reads all ends with one meter on the same test prompts.
`switches.py` says how each is switched off. Writes onoff.json and onoff.md. Exit code 1
if losses of the first step or log-probabilities differ by more than 1e-4, gold by more than 0.03 on
average, or KL by more than 10 %.

Not here: stages side by side, which are the same to the bit as one after the other (a test).
"""

import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.entry import Argument, Overrides
from benchmarks.pipeline.arms import (
    Common,
    evaluate_model,
    prepare_common,
    prepare_reward,
    prepare_seed,
    unpaired,
)
from benchmarks.pipeline.arms import train as train_arm
from benchmarks.pipeline.experiment import Experiment, load_experiment
from benchmarks.pipeline.places import set_up_process, side_by_side, stage_context
from benchmarks.run import progress
from benchmarks.studies.onoff.report import REWARD, Done, Job, Seed, arms_of, compare, markdown
from benchmarks.studies.onoff.switches import (
    COMPARISONS,
    DEFAULT,
    VARIANTS,
    WORKS,
    Comparison,
    probe,
    switched,
)
from rlhf.reward import examine_reward
from shared.config import InputError
from shared.stages import Stages, output_folder, write_json

Run = Callable[..., Path]
Experiments = dict[str, Experiment]  # one a variant: some are configuration keys


def onoff(
    file: Argument[str] = "onoff",
    /,
    only: tuple[str, ...] = tuple(c.name for c in COMPARISONS),
    runs: Path = Path("runs"),
    out: Path = Path("reports"),
    overrides: Overrides = (),
) -> bool:
    """Train with each optimisation on and off; True if they end alike.

    Any key of the experiment can be changed: --seeds "[0]" --preferences.pairs 500.

    Args:
        file: an experiment's TOML file, or the name of one that comes with Klash.
        only: the optimisations to switch, by name.
        runs: the folder of all runs.
        out: where the two files go.
    """
    known = {c.name: c for c in COMPARISONS}
    if unknown := set(only) - set(known):
        raise InputError(f"no optimisation {min(unknown)!r}: {list(known)}")
    chosen = [known[name] for name in only]
    sides = dict.fromkeys([DEFAULT, *(side for c in chosen for side in (c.on, c.off))])
    experiments = {
        side: load_experiment(file, [*overrides, *VARIANTS[side].keys], quick=False)
        for side in sides
    }
    output_folder(out)
    seeds = run_all(experiments, chosen, runs)
    command = shlex.join(["klash", "study", "onoff", file, *overrides])
    found = {"command": command, **compare(experiments[DEFAULT], chosen, seeds)}
    write_json(out / "onoff.json", found)
    text = markdown(found)
    (out / "onoff.md").write_text(text, encoding="utf-8")
    print(text)
    return found["holds"]


def jobs_of(experiment: Experiment, comparisons: Sequence[Comparison]) -> list[Job]:
    """Every training that is needed, once; those as it comes first."""
    sides = [(side, c) for c in comparisons for side in (c.on, c.off)]
    jobs = [Job(side, arm) for side, c in sides for arm in arms_of(experiment, c)]
    return sorted(dict.fromkeys(jobs), key=lambda job: job.variant != DEFAULT)


def run_all(experiments: Experiments, comparisons: Sequence[Comparison], runs: Path) -> list[Seed]:
    """Run whatever is not there yet, the stages side by side."""
    experiment = experiments[DEFAULT]
    jobs = jobs_of(experiment, comparisons)
    set_up_process(experiment.threads)
    with progress(stage_count(experiments, jobs)) as say:
        stages = Stages(runs / ".stages", say, stage_context())
        workers = experiment.workers, experiment.threads
        beside = side_by_side(stages, *workers) if experiment.workers > 1 else nullcontext(stages)
        with beside as stages:
            common = prepare_common(experiment, stages.run)
            one = partial(run_seed, experiments, stages, common, jobs)
            return stages.each(one, experiment.seeds)


def stage_count(experiments: Experiments, jobs: list[Job]) -> int:
    """How many stages the study goes through, cached ones included."""
    experiment = experiments[DEFAULT]
    prepared = {side for side in experiments if side == DEFAULT or VARIANTS[side].resampled}
    further = [job for job in jobs if job.arm != REWARD or job.variant not in prepared]
    each = len(prepared) * (6 + unpaired(experiment)) + 2 * len(further) + 2 * len(experiments)
    return 4 + len(experiment.seeds) * each


def run_seed(
    experiments: Experiments, stages: Stages, common: Common, jobs: list[Job], number: int
) -> Seed:
    """All jobs of one seed, and the probes of their variants."""
    run, plain = stages.run, experiments[DEFAULT]
    shared = prepare_seed(plain, under(DEFAULT, run), common, number)

    def finish(job: Job) -> Done:
        experiment, switch = experiments[job.variant], under(job.variant, run)
        if job.arm == REWARD:
            made = prepare_reward(experiment, switch, common.sft, common.scale_samples, number)[1]
            about = {"pairs": common.reward_test, "task": plain.task}
            label = f"reward model examined, seed {number}"
            about |= {"reward_model": made, "label": label}
            return Done(made, switch("reward-scores", examine_reward, **about))
        arm = experiment.arms[job.arm]
        own = VARIANTS[job.variant].resampled and arm.kind == "direct"
        seed = prepare_seed(experiment, switch, common, number) if own else shared
        made = train_arm(experiment, switch, common, seed, job.arm, arm, arm.settings[0])[0]
        label = f"{job.arm}, seed {number}, {job.variant}"
        inputs = common, None, None, number, made, "final", label
        return Done(made, evaluate_model(plain, run, *inputs))

    done = dict(zip(jobs, stages.each(finish, jobs), strict=True))
    trained = next(d.trained for job, d in done.items() if job.arm != REWARD)
    places = (common.sft, ".", "SFT"), (trained, "final", "a trained policy")

    def probed(variant: str) -> list[Path]:
        about = experiments[variant]
        return [
            run(
                "probe", probe, label=f"log-probabilities of {name}, seed {number}, {variant}",
                variant=variant, policy=policy, checkpoint=checkpoint, start=common.sft,
                preferences=shared.preferences, reference=shared.reference,
                direct=about.direct, ppo=about.ppo, sampling=about.sampling,
            )
            for policy, checkpoint, name in places
        ]  # fmt: skip

    probes = dict(zip(experiments, stages.each(probed, experiments), strict=True))
    return Seed(shared.sft_rows, done, probes)


def under(variant: str, run: Run) -> Run:
    """`run` with all trainings, and the pairs of a variant that is resampled, under `variant`."""
    works = {name for name in WORKS if name != "preferences" or VARIANTS[variant].resampled}

    def switch(name: str, work: Callable[..., None], *, label: str = "", **inputs: Any) -> Path:
        label = f"{label}, {variant}"
        if name not in works:
            return run(name, work, label=label, **inputs)
        return run(name, switched, label=label, variant=variant, stage=name, **inputs)

    return switch
