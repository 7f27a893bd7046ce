"""What will run: the pipeline on stages that are noted down and not done.

A stage's address is a hash of what goes into it, and earlier stages go into it by their folders'
names: so the addresses of a whole run are known before it. Two things are read from finished
stages, validation gold and checkpoints; what is not there yet is stood in for by what the
configuration says, each arm's first setting in place of its best.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.pipeline.arms import Pipeline, Trial
from benchmarks.pipeline.compare import Pipelines, timed_seeds
from benchmarks.pipeline.experiment import Arm, Experiment
from benchmarks.pipeline.places import with_threads
from shared.stages import Runner, Stage, Work, intact, read_manifest, stage_of
from shared.training.fit import checkpoint_steps, steps_of

A = TypeVar("A")
B = TypeVar("B")
UNKNOWN = float("-inf")  # validation gold, where nothing is there to read it from


@dataclass(frozen=True)
class PlannedStage:
    """A stage that a run will come to; `there`: it is finished already."""

    label: str
    stage: Stage
    folder: Path
    there: bool


@dataclass
class Plan:
    """The stages below `root` that were asked for, in order and each once; none is run."""

    root: Path
    context: dict[str, Any]
    stages: dict[Path, PlannedStage] = field(default_factory=dict)

    @property
    def to_run(self) -> list[PlannedStage]:
        """Those that are not there yet."""
        return [stage for stage in self.stages.values() if not stage.there]

    @property
    def labels(self) -> dict[str, str]:
        """What each stage is called on screen, by its key."""
        return {folder.name: stage.label for folder, stage in self.stages.items()}

    def run(self, name: str, work: Work, *, label: str = "", **inputs: Any) -> Path:
        """The folder that the stage has or will have."""
        stage = stage_of(name, work, inputs, self.context)
        folder = self.root / stage.key
        if folder not in self.stages:
            self.stages[folder] = PlannedStage(label or name, stage, folder, is_finished(folder))
        return folder

    def each(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """`function` of each item, in order."""
        return [function(item) for item in items]

    def on_threads(self, threads: int) -> "Plan":
        """The same plan, for stages that run with another number of threads."""
        return Plan(self.root, with_threads(self.context, threads), self.stages)


def is_finished(folder: Path) -> bool:
    """Whether a stage's manifest is sound and its files are there; a run also reads what is in."""
    manifest = read_manifest(folder)
    return manifest is not None and all((folder / file).is_file() for file in manifest["files"])


@dataclass(frozen=True)
class PlannedPipeline(Pipeline):
    """A pipeline that stands in for what it cannot read yet."""

    def checkpoints(self, trial: Trial, model: Path) -> dict[str, float]:
        """Those that were written, or else those that a training which ends well will write."""
        if intact(model, ["checkpoints.json"]):
            return super().checkpoints(trial, model)
        return expected_checkpoints(self.experiment, self.experiment.arms[trial.arm])

    def mean_gold(self, rows: Path) -> float:
        """That of finished rows, or UNKNOWN: less than any other."""
        return super().mean_gold(rows) if intact(rows, ["rows.jsonl"]) else UNKNOWN


def expected_checkpoints(experiment: Experiment, arm: Arm) -> dict[str, float]:
    """{name: share of training done} of what an arm's training will save.

    Filtering decides how many steps an epoch has, so that its names are known only afterwards.
    """
    shares, direct = experiment.evaluation.checkpoints, experiment.direct
    if arm.kind == "filtered":
        epochs = experiment.filtering.epochs if shares else 1
        early = {f"checkpoint-of-epoch-{n}": n / epochs for n in range(1, epochs)}
        return {**early, "final": 1.0}
    if arm.kind == "ppo":
        steps = max(1, experiment.ppo.episodes // experiment.ppo.rollout_size)
    else:
        steps = steps_of(experiment.preferences.pairs, direct.batch_size, direct.epochs)
    early = {f"checkpoint-{n}": share for n, share in checkpoint_steps(steps, shares).items()}
    return {**early, "final": 1.0}


def planned_pipelines(experiment: Experiment, plan: Plan) -> Pipelines:
    """An experiment's pipelines as `benchmarks.run` sets them up, on paper."""
    timed = plan.on_threads(experiment.timed_threads or experiment.threads)
    return Pipelines(
        PlannedPipeline(experiment, plan),
        PlannedPipeline(experiment, timed),
        timed_seeds(experiment),
    )


def sizes_text(experiment: Experiment) -> str:
    """How much is trained and sampled, in one line: what a run's time follows."""
    e = experiment
    parts = [
        f"{len(e.seeds)} seed{'s' if len(e.seeds) > 1 else ''}",
        f"at most {e.preferences.pairs:,} pairs"
        if e.task.name == "own"
        else f"{e.preferences.pairs:,} pairs",
    ]
    if any(arm.kind == "ppo" for arm in e.arms.values()):
        parts.append(f"{e.ppo.episodes:,} answers that PPO samples in each training")
    test = f"{e.evaluation.prompts:,} test prompts with {e.evaluation.samples} answers each"
    cap = f"answers of at most {e.sampling.max_new_tokens} tokens"
    return f"{'; '.join([*parts, test, cap])}"


def plan_of(root: Path, context: dict[str, Any], work: Callable[[Runner], Any]) -> Plan:
    """The stages below `root` that `work(runner)` asks for; it may read none of their files."""
    plan = Plan(root, context)
    work(plan)
    return plan
