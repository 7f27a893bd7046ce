"""One model of an experiment, with just the stages that it needs."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pipeline.arms import Pipeline, Trial, setting_text
from benchmarks.pipeline.defaults import RATES, default_arms
from benchmarks.pipeline.experiment import Arm, Experiment
from benchmarks.pipeline.labels import OWN_REWARD_MODEL, lacks_pairs
from benchmarks.pipeline.places import on_ranks, set_up_process, stage_context
from benchmarks.pipeline.plan import plan_of
from benchmarks.pipeline.progress import progress
from benchmarks.pipeline.start import prepare_start
from shared.config import InputError, suggest
from shared.models.cost import versions
from shared.models.names import is_model_file
from shared.stages import Runner, Stages, read_json


@dataclass(frozen=True)
class TrainedModel:
    """A model that a method made, and how: for its card."""

    method: str
    model: Path
    setting: dict[str, float]
    experiment: Experiment
    pairs: int


def train_one(experiment: Experiment, method: str, runs: Path) -> TrainedModel:
    """The folder of `method`'s model, of the experiment's first seed."""
    arm = None if method in ("sft", "reward") else arm_of(experiment, method)
    require_pairs(experiment, method, arm)
    setting = dict(arm.settings[0]) if arm else {}
    seed = experiment.seeds[0]
    if arm is not None:
        experiment = experiment.model_copy(update={"arms": {method: arm}})

    def work(runner: Runner) -> tuple[Path, Path | None]:
        if method == "sft":
            return prepare_start(experiment, runner).sft, None
        pipeline = Pipeline(experiment, runner)
        # Who judges changes no training, but where the judge labels the pairs.
        start = pipeline.prepare_sft(judged=experiment.preferences.source == "policy")
        if arm is None:
            preferences = pipeline.prepare_preferences(start, seed)
            return pipeline.prepare_reward(start, preferences, seed), preferences
        data = pipeline.prepare_arm(start, arm, seed)
        return pipeline.train(start, Trial(method, setting, data)) / "final", data.preferences

    set_up_process(experiment.threads, experiment.save_minutes)
    plan = plan_of(runs / ".stages", stage_context(experiment.generation), work)
    with progress(plan.root, plan.labels) as say:
        model, preferences = work(on_ranks(Stages(plan.root, say, plan.context)))
    pairs = 0 if preferences is None else _lines(preferences / "train.jsonl")
    return TrainedModel(method, model, setting, experiment, pairs)


def require_pairs(experiment: Experiment, method: str, arm: Arm | None) -> None:
    """InputError for a method that needs pairs, where single answers with a label are all."""
    if experiment.has_pairs or method == "sft":
        return
    given = experiment.has_reward_model
    if arm is None:
        lacks = "" if given else OWN_REWARD_MODEL
    else:
        lacks = lacks_pairs(arm.kind, arm.loss, given)
    if lacks:
        raise InputError(f"{method}: the data are single answers with a label: {lacks}")


def arm_of(experiment: Experiment, method: str) -> Arm:
    """The experiment's arm of that name, or the method at a common setting."""
    if method in experiment.arms:
        arm = experiment.arms[method]
    else:
        rates = RATES["lora" if experiment.lora else "whole"]["direct"]
        common = default_arms(rates)
        if method not in common:
            known = ["sft", "reward", *experiment.arms, *common]
            raise InputError(f"no method `{method}`{suggest(method, known)}")
        arm = Arm.model_validate(common[method])
    if arm.kind == "best-of-n":
        raise InputError(
            f"{method}: best-of-n trains nothing; `klash train reward` makes its judge"
        )
    return arm


def put_model(trained: TrainedModel, out: Path) -> None:
    """The model's files in `out`, with its card: they appear in one rename."""
    unfinished = out.with_name(f".unfinished-{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for file in sorted(trained.model.iterdir()):
        if is_model_file(file):
            shutil.copyfile(file, unfinished / file.name)
    (unfinished / "README.md").write_text(card(trained), encoding="utf-8")
    if out.is_dir():
        out.rmdir()  # it is empty
    unfinished.rename(out)


def card(trained: TrainedModel) -> str:
    """The model card: what it started from, on what and how it was trained."""
    e = trained.experiment
    examples, good = ("pairs", "chosen") if e.has_pairs else ("labelled answers", "desirable")
    facts: dict[str, Any] = {
        "method": " ".join([trained.method, setting_text(trained.setting)]).strip(),
        "start": e.model.pretrained or "a small Llama from scratch",
        "data": e.task.name if e.task.name != "own" else e.task.pairs,
        examples: trained.pairs or f"none: the {good} answers alone",
        "seed": e.seeds[0],
        "lora": e.lora.model_dump() if e.lora else "no: all weights",
        "experiment": e.name,
    }
    config = read_json(trained.model / "config.json")
    reward = str(config.get("architectures", [""])[0]).endswith("ForSequenceClassification")
    head = {
        "library_name": "transformers",
        "tags": ["klash", trained.method],
        **({"base_model": e.model.pretrained} if e.model.pretrained else {}),
        **({"pipeline_tag": "text-classification" if reward else "text-generation"}),
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += [f"# {e.name}, {trained.method}", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    if reward:
        lines += [
            "",
            "A reward model: one label, read at the last token. normalisation.json holds the mean "
            "and the within-prompt deviation of its scores on samples of the start; Klash divides "
            "them out, other programs read the raw score.",
        ]
    lines += ["", "Trained with " + ", ".join(f"{k} {v}" for k, v in versions().items()) + "."]
    return "\n".join(lines) + "\n"


def _lines(path: Path) -> int:
    with path.open(encoding="utf-8") as file:
        return sum(1 for _ in file)
