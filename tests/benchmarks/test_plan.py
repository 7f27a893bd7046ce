"""`klash plan`: what a run will do, told before it, is what it does; and why is the truth."""

import contextlib
import importlib.metadata
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checks import SMALL_WORLD, TINY

from benchmarks.pipeline import places
from benchmarks.pipeline.experiment import Experiment
from benchmarks.pipeline.loading import load_experiment
from benchmarks.pipeline.plan import Plan
from benchmarks.pipeline.reasons import Finished, in_words, plan_text, reasons
from benchmarks.pipeline.work import work_text
from benchmarks.report.build import draw_report
from benchmarks.run import plan_experiment, run_experiment
from dpo.train import train_direct
from shared import code, stages
from shared.code import code_of

ARMS = """
[arms.best-of-n]
kind = "best-of-n"
settings = [{ n = 2 }, { n = 4 }]
[arms.ppo]
kind = "ppo"
settings = [{ kl_coef = 0.1 }]
[arms.dpo]
kind = "direct"
settings = [{ beta = 0.2 }, { beta = 0.5 }]
[arms.kto]
kind = "direct"
loss = "kto"
settings = [{ beta = 0.2 }]
[arms.fdpo]
kind = "filtered"
settings = [{ beta = 0.2 }]
"""
LINE = re.compile(r"\[(\d+)/(\d+)\] (.*): (done|cached)")
SETTING = re.compile(r" (beta|kl_coef)=[\d.]+|best of \d+")


def tiny(folder: Path, *overrides: str) -> Experiment:
    file = folder / "tiny.toml"
    file.write_text(TINY + ARMS, encoding="utf-8")
    return load_experiment(str(file), list(overrides), quick=False)


def small(folder: Path, *overrides: str) -> Experiment:
    """An exact task."""
    sizes = {**SMALL_WORLD, "seeds": "[0]", "sft.examples": 1000, "preferences.pairs": 300}
    sizes |= {"direct.epochs": 1, "ppo.episodes": 1024, "evaluation.reward_pairs": 100}
    words = [f"--{key}={value}" for key, value in sizes.items()]
    return load_experiment("exact", [*words, *overrides], quick=False)


@pytest.fixture(scope="module", autouse=True)
def deterministic_here_alone() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def other_code(monkeypatch: pytest.MonkeyPatch, file: str) -> Iterator[None]:
    """As if a line of one file of the project had been changed."""

    def changed(module: str) -> dict[str, str]:
        found = code_of(module)
        return {**found, file: "changed"} if file in found else found

    with monkeypatch.context() as patch:
        patch.setattr(stages, "code_of", changed)
        yield


class Done:
    """A finished run, with the plan made before it."""

    def __init__(self, experiment: Experiment, runs: Path):
        self.experiment, self.runs = experiment, runs
        self.before = plan_experiment(experiment, runs)
        self.untouched = not runs.exists()
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            run_experiment(experiment, runs)
        self.lines = [m.groups() for m in map(LINE.match, said.getvalue().splitlines()) if m]


@pytest.fixture(scope="module", params=[tiny, small])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("plan")
    return Done(request.param(folder), folder / "runs")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("plan")
    return Done(tiny(folder, "--evaluation.checkpoints", "[0.5]"), folder / "runs")


def why(plan: Plan) -> dict[str, list[str]]:
    """Reasons of all stages that will run, by label."""
    store = Finished(plan.root)
    return {stage.label: reasons(stage, store) for stage in plan.to_run}


def kinds(plan: Plan) -> Counter[str]:
    return Counter(stage.stage.name for stage in plan.to_run)


def test_a_plan_lists_what_the_run_then_does(done: Done):
    """But for which setting is chosen: that is not known before."""
    planned = [stage.label for stage in done.before.stages.values()]
    ran = [line[2] for line in done.lines]
    assert Counter(SETTING.sub("", p) for p in planned) == Counter(SETTING.sub("", r) for r in ran)
    assert {line[1] for line in done.lines} == {str(len(planned))}
    assert len(done.before.to_run) == len(planned)
    assert done.untouched  # a plan writes nothing


def test_before_the_first_run_there_is_no_such_stage(done: Done, tmp_path: Path):
    plan = plan_experiment(done.experiment, tmp_path / "none")
    assert set(map(tuple, why(plan).values())) == {("no such stage yet",)}
    assert "no such stage" not in plan_text(plan)  # said of every line it would tell nothing


def test_what_a_plan_comes_to_is_what_its_configuration_says(tmp_path: Path):
    """Counted by hand for `reviews`, seed 0 tried at every setting and the others at one."""
    experiment = load_experiment("reviews", [], False)
    lines = work_text(experiment, plan_experiment(experiment, tmp_path)).splitlines()[1:]
    found = {line.split()[0]: [int(n.replace(",", "")) for n in line.split()[1:]] for line in lines}
    ppo, filtered = experiment.ppo.episodes, 2 * experiment.preferences.pairs
    assert found["sft"] == [1, 12_000, 0]
    assert found["ppo"] == [4, 4 * ppo, 4 * ppo]
    assert found["reward"] == [3, 3 * 2 * 6000 * 3, 0]
    assert found["filtered"] == [6, 6 * 2 * filtered, 6 * filtered]
    assert found.pop("all") == [sum(column) for column in zip(*found.values(), strict=True)]


def test_what_is_there_by_its_content_is_called_new_gone_or_changed():
    one, other = "0" * 64, json.dumps({"files": {"config.json": "1" * 64}})
    found = [in_words("adapter", *pair) for pair in ((None, other), (one, None), (other, one))]
    assert found == ["adapter is new", "adapter is gone", "adapter changed"]


def test_after_the_run_everything_is_there(done: Done):
    plan = plan_experiment(done.experiment, done.runs)
    assert plan.to_run == []
    assert [stage.label for stage in plan.stages.values()] == [line[2] for line in done.lines]
    assert set(plan.stages) == {
        folder for folder in done.runs.glob(".stages/*-*") if not folder.name.startswith(".")
    }
    assert plan_text(plan).endswith(f"{len(done.lines)} stages: {len(done.lines)} there, 0 to run")


def test_a_changed_key_runs_what_it_touches_and_is_named(finished: Done):
    changed = tiny(finished.runs.parent, "--evaluation.checkpoints", "[0.5]", "--ppo.epochs", "4")
    plan = plan_experiment(changed, finished.runs)
    found = why(plan)
    assert found["ppo kl_coef=0.1, seed 1"] == ["ppo.epochs 2 -> 4"]
    assert found["evaluate ppo kl_coef=0.1 at 50%, seed 1"] == ["input stage `ppo` is new"]
    assert found["report"] == ["input stage `summary` is new"]
    assert "experiment.ppo.epochs 2 -> 4" in found["summary"]
    assert kinds(plan) == {"ppo": 2, "evaluation": 4, "summary": 1, "report": 1}


def test_a_changed_file_runs_what_reaches_it_and_is_named(
    finished: Done, monkeypatch: pytest.MonkeyPatch
):
    with other_code(monkeypatch, "dpo/filtered.py"):
        plan = plan_experiment(finished.experiment, finished.runs)
    found = why(plan)
    assert found["fdpo beta=0.2, seed 0"] == ["dpo/filtered.py changed"]
    assert found["evaluate fdpo beta=0.2 at 100%, seed 0"] == ["input stage `filtered` is new"]
    assert kinds(plan) == {"filtered": 2, "evaluation": 4, "summary": 1, "report": 1}


def test_a_new_version_of_a_library_runs_everything_and_is_named(
    finished: Done, monkeypatch: pytest.MonkeyPatch
):
    version = importlib.metadata.version("torch")
    monkeypatch.setattr(places, "versions", lambda: {**real_versions(), "torch": "9.9"})
    plan = plan_experiment(finished.experiment, finished.runs)
    assert len(plan.to_run) == len(plan.stages) == len(finished.before.stages)
    assert all(reasons[0] == f"torch {version} -> 9.9" for reasons in why(plan).values())
    assert why(plan)["sft"] == [f"torch {version} -> 9.9"]


real_versions = places.versions


def test_a_seed_more_needs_its_own_stages_alone(finished: Done):
    more = ["--seeds", "[0, 1, 2]", "--evaluation.checkpoints", "[0.5]"]
    found = why(plan_experiment(tiny(finished.runs.parent, *more), finished.runs))
    assert all(label.endswith("seed 2") for label in found if label not in ("summary", "report"))
    assert found["preferences, seed 2"] == ["seed 1 -> 2"]


def test_a_missing_or_damaged_stage_is_told_and_does_not_stop_the_plan(
    finished: Done, tmp_path: Path
):
    """Its manifest, or what the plan reads: checkpoints and validation gold."""
    shutil.copytree(finished.runs, tmp_path / "runs")
    plan = plan_experiment(finished.experiment, tmp_path / "runs")
    by_label = {stage.label: stage.folder for stage in plan.stages.values()}
    (by_label["sft"] / "manifest.json").write_text("{")
    (by_label["evaluate dpo beta=0.2, seed 0"] / "rows.jsonl").write_text("{")
    (by_label["ppo kl_coef=0.1, seed 0"] / "checkpoints.json").write_text("{")
    shutil.rmtree(by_label["kto beta=0.2, seed 1"])
    again = plan_experiment(finished.experiment, tmp_path / "runs")
    assert len(again.stages) == len(plan.stages)
    found = why(again)
    assert found.get("sft") == ["damaged"]
    assert "kto beta=0.2, seed 1" in found
    assert "settings are not chosen yet" in found["summary"]


def test_checkpoints_that_fall_together_are_one(tmp_path: Path):
    """A quarter and a half of two updates are both the first."""
    keys = ["--evaluation.checkpoints", "[0.25, 0.5]", "--seeds", "[0]"]
    plan = plan_experiment(tiny(tmp_path, *keys), tmp_path / "runs")
    shares = [s.label for s in plan.stages.values() if s.label.startswith("evaluate ppo")]
    assert shares == [f"evaluate ppo kl_coef=0.1 at {at}, seed 0" for at in ("50%", "100%")]


def test_two_arms_that_are_the_same_are_planned_once(tmp_path: Path):
    arms = '{ kind = "direct", settings = [{ beta = 0.2 }] }'
    keys = ["--arms", f"{{ one = {arms}, two = {arms} }}", "--seeds", "[0]"]
    done = Done(tiny(tmp_path, *keys), tmp_path / "runs")
    assert {int(line[1]) for line in done.lines} == {len(done.lines)} == {len(done.before.stages)}


# --- which inputs stages get ------------------------------------------------------------------


def test_settings_are_chosen_on_validation_prompts_and_shown_on_test_prompts(tmp_path: Path):
    experiment = tiny(tmp_path)
    stages = plan_experiment(experiment, tmp_path / "runs").stages.values()
    dpo = {
        planned.folder: planned.stage.inputs["start"].seed
        for planned in stages
        if planned.stage.name == "direct" and planned.stage.inputs["loss"] == "dpo"
    }
    evaluated = [planned.stage.inputs for planned in stages if planned.stage.name == "evaluation"]
    split = {(inputs["policy"], inputs["prompts"].split) for inputs in evaluated}
    first = {policy for policy, seed in dpo.items() if seed == experiment.seeds[0]}
    assert len(first) == len(experiment.arms["dpo"].settings) == 2
    assert {policy for policy, name in split if name == "validation"} == first
    assert {policy for policy, name in split if name == "test"} >= dpo.keys()


@pytest.mark.parametrize(("kind", "trainings"), [("direct", 5), ("ppo", 2), ("filtered", 2)])
def test_each_seed_trains_with_its_own_numbers(tmp_path: Path, kind: str, trainings: int):
    """The pairs' seed is the training's; DPO's two settings are tried with the first seed."""
    plan = plan_experiment(tiny(tmp_path), tmp_path / "runs")
    labels = [s.label for s in plan.stages.values() if s.stage.name == kind]
    seeds = [s.stage.inputs["start"].seed for s in plan.stages.values() if s.stage.name == kind]
    assert [int(label[-1]) for label in labels] == seeds
    assert len(seeds) == trainings
    assert set(seeds) == {0, 1}


# --- what a stage's address holds -------------------------------------------------------------


def test_the_report_knows_nothing_of_c_and_a_training_does():
    assert not any(file.startswith("shared/cpu") for file in code_of(draw_report.__module__))
    assert "shared/cpu/kernels.c" in code_of(train_direct.__module__)
    context = places.stage_context()
    report, training = (
        stages.stage_of("stage", work, {}, context).origin["context"]
        for work in (draw_report, train_direct)
    )
    assert training.keys() - report.keys() == {"operations", "device"}


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("int a; // one\n", "int a;\n", True),
        ("int a;\n\n\n/* two\n lines */\nint b;\n", "int a;\nint b; // b\n", True),
        ('char *s = "/* no comment */";\n', 'char *s = "";\n', False),
        ('char *s = "// \\" no";\nint a;\n', 'char *s = "// \\" no";\nint b;\n', False),
        ("int a;\n", "int b;\n", False),
        ("a = '\"'; // \"\n", "a = '\"';\n", True),
        ("a / b / c\n", "a /b\n", False),
    ],
)
def test_c_counts_without_its_comments(before: str, after: str, same: bool):
    assert (code.without_comments(before) == code.without_comments(after)) == same


def test_a_plan_on_other_threads_is_one_plan_with_other_addresses(tmp_path: Path):
    plan = Plan(tmp_path, {"threads": 1})
    here = plan.run("report", draw_report, run=tmp_path)
    there = plan.on_threads(2).run("report", draw_report, run=tmp_path)
    assert list(plan.stages) == [here, there]
    assert here != there
    assert replace(plan, stages={}).on_threads(1).run("report", draw_report, run=tmp_path) == here
