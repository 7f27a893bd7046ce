"""From a TOML file and changed keys to an experiment: paths, quick form, what labels leave out."""

import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.pipeline.defaults import with_defaults
from benchmarks.pipeline.experiment import Experiment
from benchmarks.pipeline.labels import (
    holds_labels,
    is_named,
    lacks_pairs,
    left_out_text,
    refused_text,
)
from shared.config import Config, InputError, load, read_toml, suggest
from shared.tasks.judge import JudgeConfig

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
C = TypeVar("C", bound=Config)


def load_experiment(file: str, overrides: Sequence[str], quick: bool) -> Experiment:
    """Read a TOML file, or an experiment that comes with Klash by its name, with `overrides`."""
    path = experiment_file(file)
    experiment = found_beside(load(Experiment, path, overrides, with_defaults), path.parent)
    if holds_labels(experiment.task):
        said = {} if path.parent == EXPERIMENTS else read_toml(path)
        named = {key for key in NEED_PAIRS if is_named(key, said, list(overrides))}
        experiment = for_labels(experiment, named)
    return smaller(experiment) if quick else experiment


NEED_PAIRS = ("arms", "judge.share")


def for_labels(experiment: Experiment, named: Collection[str]) -> Experiment:
    """The experiment on single answers with a label, told on standard error where that leaves
    something out. InputError for what needs pairs and is `named`, of NEED_PAIRS, by the user.
    """
    e = _changed(experiment, task=_changed(experiment.task, rows="labels"))
    source = e.task.pairs if isinstance(e.task.pairs, str) else ", ".join(e.task.pairs)
    reasons = {} if e.has_pairs else {
        name: reason
        for name, arm in e.arms.items()
        if (reason := lacks_pairs(arm.kind, arm.loss, e.has_reward_model))
    }  # fmt: skip
    refused = {f"arms.{name}": why for name, why in reasons.items()} if "arms" in named else {}
    by_share = "it is trained on pairs; name a `model` or a `function`, or none"
    if e.judge.share is not None and "judge.share" in named:
        refused["judge.share"] = by_share
    if refused:
        raise InputError(refused_text(source, refused))
    arms = {name: arm for name, arm in e.arms.items() if name not in reasons}
    judge = e.judge
    if judge.share is not None:
        reasons["the judge by share"], judge = by_share, JudgeConfig()
    if reasons:
        print(f"klash: {left_out_text(source, reasons)}", file=sys.stderr)
    return _changed(e, arms=arms, judge=judge)


def found_beside(experiment: Experiment, folder: Path) -> Experiment:
    """The user's files and folders by their whole paths: beside the TOML file, or else here."""

    def found(name: str) -> str:
        for path in (folder / Path(name).expanduser(), Path(name).expanduser()):
            if name and os.path.exists(path):  # False for what can be no path
                return str(path.resolve())
        return name

    def changed(config: C, *names: str) -> C:
        values = {name: getattr(config, name) for name in names}
        return _changed(config, **{n: v if v is None else found(v) for n, v in values.items()})

    judge, pairs = changed(experiment.judge, "model"), experiment.task.pairs
    if judge.function and judge.function.partition(":")[0].endswith(".py"):
        file, _, function = judge.function.partition(":")
        judge = _changed(judge, function=f"{found(file)}:{function}")
    pairs = found(pairs) if isinstance(pairs, str) else tuple(map(found, pairs))
    return _changed(
        experiment,
        model=changed(experiment.model, "pretrained", "adapter"),
        judge=judge,
        reward=changed(experiment.reward, "pretrained"),
        task=_changed(experiment.task, pairs=pairs),
    )


def experiment_file(file: str) -> Path:
    """The path of a TOML file, or of an experiment that comes with Klash by its name."""
    path, shipped = Path(file), EXPERIMENTS / f"{file}.toml"
    if path.exists():
        return path
    if shipped.exists():
        return shipped
    known = suggest(path.stem, [found.stem for found in EXPERIMENTS.glob("*.toml")])
    raise InputError(f"{file}: no such file, and no experiment that comes with Klash{known}")


def smaller(experiment: Experiment) -> Experiment:
    """The `--quick` form: one seed, one setting an arm, the sizes of `[quick]`."""
    quick, whole = experiment.quick, experiment.evaluation
    arms = {n: _changed(arm, settings=arm.settings[:1]) for n, arm in experiment.arms.items()}
    episodes = min(quick.episodes, experiment.ppo.episodes)
    rollout_size = min(experiment.ppo.rollout_size, episodes)
    prompts = whole.prompts if experiment.task.finite else min(quick.prompts, whole.prompts)
    return _changed(
        experiment,
        name=f"{experiment.name}-quick",
        seeds=experiment.seeds[:1],
        arms=arms,
        sft=_changed(experiment.sft, examples=min(quick.sft_examples, experiment.sft.examples)),
        preferences=_changed(
            experiment.preferences, pairs=min(quick.pairs, experiment.preferences.pairs)
        ),
        ppo=_changed(experiment.ppo, episodes=episodes, rollout_size=rollout_size),
        evaluation=_changed(
            whole,
            prompts=prompts,
            reward_pairs=min(quick.reward_pairs, whole.reward_pairs),
            frontier_samples=min(quick.frontier_samples, whole.frontier_samples),
            checkpoints=(),
        ),
    )


def _changed(config: C, **changes: Any) -> C:
    return config.model_copy(update=changes)
