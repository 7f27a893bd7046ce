"""What the stages of a plan come to: trainings, answers trained on, answers sampled."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks.pipeline.experiment import Experiment
from benchmarks.pipeline.plan import Plan
from benchmarks.pipeline.reasons import flat
from shared.data.preferences import SPOILERS

Answers = tuple[float, float]  # trained on, sampled; of a pair both count


def answers_of(name: str, inputs: dict[str, Any], experiment: Experiment) -> Answers:
    """At most, of one stage: a file may hold fewer pairs than the experiment asks for.

    `inputs` are the stage's, by dotted key.
    """
    e, pairs = experiment, experiment.preferences.pairs
    drawn = 2 * (pairs + e.preferences.held_out_pairs) + SPOILERS * e.preferences.spoiled * pairs
    samples = any(key.startswith("drawing.") for key in inputs)  # else they are taken from a file
    by_stage: dict[str, Callable[[], Answers]] = {
        "sft": lambda: (inputs["sft.examples"] * inputs["sft.epochs"], 0),
        "preferences": lambda: (0, drawn * samples),
        "reward-test": lambda: (0, 2 * inputs["pairs"] * samples),
        "reference-samples": lambda: (0, inputs["prompts"] * inputs["per_prompt"]),
        "reward": lambda: (2 * pairs * e.reward.epochs * (e.reward.pretrained is None), 0),
        "direct": lambda: (2 * pairs * inputs["direct.epochs"], 0),
        "filtered": lambda: (
            2 * pairs * inputs["filtering.config.epochs"],
            pairs * inputs["filtering.config.epochs"],
        ),
        "ppo": lambda: (inputs["ppo.episodes"] * inputs["ppo.epochs"], inputs["ppo.episodes"]),
        "evaluation": lambda: (0, inputs["prompts.count"] * (inputs["prompts.samples"] + 1)),
        "best-of-n": lambda: (0, inputs["prompts.count"] * inputs["prompts.samples"] * inputs["n"]),
    }
    return by_stage[name]() if name in by_stage else (0, 0)


def work_text(experiment: Experiment, plan: Plan) -> str:
    """A line for each kind of stage that will run and trains or samples."""
    stages, trained, sampled = Counter[str](), Counter[str](), Counter[str]()
    for planned in plan.to_run:
        name = planned.stage.name
        a, b = answers_of(name, flat(planned.stage.origin["inputs"]), experiment)
        stages[name] += 1
        trained[name] += round(a)
        sampled[name] += round(b)
    shown = [name for name in stages if trained[name] or sampled[name]]
    if not shown:
        return ""
    rows = [(name, stages[name], trained[name], sampled[name]) for name in shown]
    rows.append(("all", sum(stages[n] for n in shown), trained.total(), sampled.total()))
    lines = [f"{'at most':20}{'stages':>8}{'answers trained on':>20}{'answers sampled':>17}"]
    lines += [f"{name:20}{count:8,}{a:20,}{b:17,}" for name, count, a, b in rows]
    if any(planned.stage.name == "judge" for planned in plan.to_run):
        lines.append("On top of this the judge trains, on all pairs of its share.")
    return "\n".join(lines)
