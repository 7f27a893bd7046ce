"""Where an experiment begins: the model, one's own data, SFT, and who judges."""

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.pipeline.experiment import Experiment
from benchmarks.pipeline.given import (
    given_function,
    given_model,
    given_sources,
    given_start,
    take_given,
)
from rlhf.reward import train_reward
from shared.data.own import prepare_data, take_preferences
from shared.seeds import seed_of
from shared.stages import Runner
from shared.tasks.judge import Judge
from shared.tasks.own import OwnData
from shared.tasks.registry import TaskInput
from shared.training.sft import fine_tune, train_sft

ALL = 10**9  # pairs


@dataclass(frozen=True)
class StartStages:
    """The SFT model, which is also the reference, and the task that it was trained on."""

    task: TaskInput  # of one's own: with its judge, where gold is needed
    sft: Path


def prepare_start(experiment: Experiment, stages: Runner) -> StartStages:
    """The SFT model, of a policy from scratch or of a pretrained one.

    One's own data are encoded with the pretrained model's tokenizer and template.
    """
    e, seed = experiment, experiment.task_seed
    if e.model.pretrained is None:
        sft = stages.run("sft", train_sft, task=e.task, model=e.model, sft=e.sft, seed=seed)
        return StartStages(e.task, sft)
    policy = stages.run("start", take_given, label="the model", **given_start(e.model))
    task = read_data(experiment, stages, policy) if e.task.name == "own" else e.task
    if not e.model.sft:
        return StartStages(task, policy)
    return StartStages(
        task, stages.run("sft", fine_tune, policy=policy, task=task, sft=e.sft, seed=seed)
    )


def read_data(experiment: Experiment, stages: Runner, policy: Path) -> OwnData:
    """One's own pairs, encoded for `policy`."""
    data = stages.run(
        "data",
        prepare_data,
        label="your data",
        sources=given_sources(experiment.task),
        data=experiment.task.data,
        policy=policy,
        judge_share=experiment.judge.share or 0.0,
        wanted="labels" if experiment.task.rows == "labels" else "pairs",
        most_sampled=experiment.sampling.max_new_tokens,
    )
    return OwnData(data, policy)


def judged_task(
    experiment: Experiment, stages: Runner, start: StartStages, scale_samples: Path
) -> TaskInput:
    """The task with whoever gives gold; a judge by `share` is a reward model that is trained."""
    judge, task = experiment.judge, start.task
    if not isinstance(task, OwnData):
        return task
    if judge.function is not None:
        name = judge.function.rpartition(":")[2]
        found = Judge(function=name, file=given_function(judge.function))
    elif judge.model is not None:
        found = Judge(model=given_model(judge.model, judge.revision))
    elif judge.share is not None:
        found = Judge(model=train_judge(experiment, stages, start.sft, task, scale_samples))
    else:
        return task
    return replace(task, judge=replace(found, log_odds=judge.log_odds))


def train_judge(
    experiment: Experiment, stages: Runner, sft: Path, task: OwnData, scale_samples: Path
) -> Path:
    """A reward model on the pairs that nothing else sees."""
    seed = seed_of(experiment.task_seed, "judge")
    pairs = stages.run(
        "preferences",
        take_preferences,
        label="the judge's pairs",
        data=task.data,
        pairs=ALL,
        held_out_pairs=1,
        seed=seed,
        side="judge",
    )
    return stages.run(
        "judge",
        train_reward,
        policy=sft,
        preferences=pairs,
        references=scale_samples,
        reward=experiment.reward,
        seed=seed,
    )
