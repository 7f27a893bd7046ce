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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.entry import Argument, Overrides
from benchmarks.pipeline.arms import CommonStages, Pipeline, Policy, Trial
from benchmarks.pipeline.experiment import Experiment
from benchmarks.pipeline.loading import load_experiment
from benchmarks.pipeline.places import set_up_process, stage_context, with_workers
from benchmarks.pipeline.plan import plan_of
from benchmarks.pipeline.progress import progress
from benchmarks.studies.onoff.report import (
    REWARD,
    Job,
    JobStages,
    StudiedSeed,
    arms_of,
    compare_sides,
    markdown,
)
from benchmarks.studies.onoff.switches import (
    COMPARISONS,
    DEFAULT,
    VARIANTS,
    WORKS,
    Comparison,
    Probed,
    read_logprobs,
    switched,
)
from dpo.train import DirectData
from shared.config import InputError
from shared.stages import Runner, Stages, Work, output_folder, write_json

A = TypeVar("A")
B = TypeVar("B")
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
    found = {"command": command, **compare_sides(experiments[DEFAULT], chosen, seeds)}
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


def run_all(
    experiments: Experiments, comparisons: Sequence[Comparison], runs: Path
) -> list[StudiedSeed]:
    """Run whatever is not there yet, the stages side by side."""
    experiment = experiments[DEFAULT]
    set_up_process(experiment.threads, experiment.save_minutes)
    work = partial(run_seeds, experiments, jobs_of(experiment, comparisons))
    plan = plan_of(runs / ".stages", stage_context(), work)
    with progress(plan.root, plan.labels) as say:
        stages = Stages(plan.root, say, plan.context)
        with with_workers(stages, experiment.workers, experiment.threads) as runner:
            return work(runner)


def run_seeds(experiments: Experiments, jobs: list[Job], runner: Runner) -> list[StudiedSeed]:
    """All jobs of all seeds."""
    common = Pipeline(experiments[DEFAULT], runner).prepare_common()
    one = partial(run_seed, experiments, jobs, common, runner)
    return runner.each(one, experiments[DEFAULT].seeds)


def run_seed(
    experiments: Experiments, jobs: list[Job], common: CommonStages, runner: Runner, number: int
) -> StudiedSeed:
    """All jobs of one seed, and the probes of their variants."""
    plain = Pipeline(experiments[DEFAULT], runner)
    under = {v: Pipeline(e, UnderVariant(v, runner)) for v, e in experiments.items()}
    shared = under[DEFAULT].prepare_seed(common, number)

    def finish(job: Job) -> JobStages:
        pipeline, resampled = under[job.variant], VARIANTS[job.variant].resampled
        if job.arm == REWARD:
            preferences = pipeline.prepare_preferences(common, number)
            made = pipeline.prepare_reward(common, preferences, number)
            return JobStages(made, pipeline.examine_reward(common, made, number))
        arm = pipeline.experiment.arms[job.arm]
        own = resampled and arm.kind == "direct"
        data = pipeline.prepare_seed(common, number) if own else shared
        made = pipeline.train(common, Trial(job.arm, arm.settings[0], data))
        policy = Policy(f"{job.arm}, seed {number}, {job.variant}", made, number)
        return JobStages(made, plain.evaluate(common, policy))

    done = dict(zip(jobs, runner.each(finish, jobs), strict=True))
    trained = next(d.trained for job, d in done.items() if job.arm != REWARD)

    def probed(variant: str) -> list[Path]:
        """At SFT's weights and at a trained policy's."""
        e, data = experiments[variant], DirectData(shared.preferences, shared.reference)
        return [
            runner.run(
                "probe",
                read_logprobs,
                label=f"log-probabilities of {name}, seed {number}, {variant}",
                variant=variant,
                probed=Probed(policy, checkpoint, common.sft, data),
                direct=e.direct,
                ppo=e.ppo,
                sampling=e.sampling,
            )
            for policy, checkpoint, name in (
                (common.sft, ".", "SFT"),
                (trained, "final", "a trained policy"),
            )
        ]

    probes = dict(zip(experiments, runner.each(probed, experiments), strict=True))
    return StudiedSeed(shared.sft_rows, done, probes)


@dataclass(frozen=True)
class UnderVariant:
    """Runs all trainings, and the pairs of a variant that is resampled, under `variant`."""

    variant: str
    runner: Runner

    def run(self, name: str, work: Work, *, label: str = "", **inputs: Any) -> Path:
        """Whether switched or not, a stage's label names the variant."""
        label = f"{label}, {self.variant}"
        if name not in WORKS or (name == "preferences" and not VARIANTS[self.variant].resampled):
            return self.runner.run(name, work, label=label, **inputs)
        switch = {"variant": self.variant, "stage": name}
        return self.runner.run(name, switched, label=label, **switch, **inputs)

    def each(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        return self.runner.each(function, items)
