"""A whole head-to-head, tiny: all arms, two seeds, from an experiment to its report.

The numbers mean nothing at this size; that they are the same numbers each time, complete, and the
ones that the rows hold, is what these tests read.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from benchmarks.pipeline.experiment import Experiment
from benchmarks.pipeline.loading import EXPERIMENTS, load_experiment
from benchmarks.pipeline.places import side_by_side
from benchmarks.pipeline.progress import progress
from benchmarks.report.build import build_report
from benchmarks.results.schema import Results
from benchmarks.run import run_experiment
from shared.seeds import seed_of
from shared.stages import Stages, read_json, read_jsonl

ARMS = ["best-of-n", "ppo", "dpo", "ipo", "ipo-token", "kto", "fdpo", "fdpo-random"]
LINE = re.compile(r"\[(\d+)/(\d+)\] (.*): (done|cached)")

Json = dict[str, Any]


@dataclass
class Run:
    """A finished head-to-head and what it said on the way."""

    experiment: Experiment
    folder: Path
    lines: list[tuple[str, ...]]  # number, of how many, stage, done or cached

    @property
    def results(self) -> Json:
        return read_json(self.folder / "results.json")

    @property
    def states(self) -> list[str]:
        return [line[3] for line in self.lines]

    def stages(self, name: str) -> dict[Path, Json]:
        """Folders of a kind of stage, with their inputs."""
        folders = (self.folder.parent / ".stages").glob(f"{name}-*")
        found = {folder: read_json(folder / "manifest.json") for folder in folders}
        return {f: m["inputs"] for f, m in found.items() if m["stage"] == name}

    def rows(self, policy: Path, seed: int) -> list[Json]:
        """The rows of a policy on test prompts at the end of its training."""
        (folder,) = (
            folder
            for folder, inputs in self.stages("evaluation").items()
            if inputs["policy"] == policy.name
            and inputs["prompts"]["split"] == "test"
            and inputs["drawing"]["sampling"]["seed"] == seed_of(seed, "test evaluation")
            and inputs["checkpoint"] in ("final", ".")
        )
        return read_jsonl(folder / "rows.jsonl")

    def policy(self, arm: str, seed: int) -> Path:
        """The stage that trained `arm` at its tuned setting."""
        setting = self.results["methods"][arm]["setting"]
        if arm == "ppo":
            kind, wanted = "ppo", {"kl_coef": setting["kl_coef"]}
        else:
            kind, wanted = "direct", {"loss": arm, "setting": setting}
        (folder,) = (
            folder
            for folder, inputs in self.stages(kind).items()
            if wanted.items() <= inputs.items() and inputs["start"]["seed"] == seed
        )
        return folder


def tiny(folder: Path, *overrides: str) -> Experiment:
    """TINY with the arms of `reviews`."""
    reviews = (EXPERIMENTS / "reviews.toml").read_text(encoding="utf-8")
    path = folder / "tiny.toml"
    path.write_text(TINY + reviews[reviews.index("[arms.") :], encoding="utf-8")
    return load_experiment(str(path), list(overrides), quick=False)


def some_arms(*names: str) -> list[str]:
    """Overrides that leave these arms, each at its first setting."""
    whole = load_experiment("reviews", [], quick=False).arms
    tables = []
    for name in names:
        arm = whole[name]
        setting = ", ".join(f"{key} = {value}" for key, value in arm.settings[0].items())
        tables.append(
            f'{name} = {{ kind = "{arm.kind}", loss = "{arm.loss}", settings = [{{ {setting} }}] }}'
        )
    return ["--arms", "{" + ", ".join(tables) + "}"]


def run(experiment: Experiment, runs: Path) -> Run:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        folder = run_experiment(experiment, runs)
    lines = [match.groups() for match in map(LINE.match, said.getvalue().splitlines()) if match]
    return Run(experiment, folder, lines)


@pytest.fixture(scope="module", autouse=True)
def deterministic_here_alone() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("first")
    return run(tiny(folder), folder / "runs")


def without_times(value: Any) -> Any:
    """`value` without what may differ between equal runs: seconds, memory and the machine."""
    differ = {"environment", "wall_s", "phases", "peak_memory_bytes", "mfu"}
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in differ}
    return [without_times(v) for v in value] if isinstance(value, list) else value


# --- results.json -----------------------------------------------------------------------------


def test_results_are_whole_and_fit_their_types(first: Run):
    results = Results.model_validate(first.results)
    assert list(results.methods) == ["sft", *ARMS]
    assert results.seeds == [0, 1]
    assert (results.experiment, results.task, results.schema_version) == ("tiny", "reviews", 1)
    kinds = {name: arm.kind for name, arm in first.experiment.arms.items()}
    assert {name: m.kind for name, m in results.methods.items()} == {"sft": "sft", **kinds}
    for name, method in results.methods.items():
        assert len(method.gold.per_seed) == 2, name
        assert name == "sft" or method.setting in first.experiment.arms[name].settings


def missing(schema: Json, value: Any, definitions: Json, where: str = "") -> Iterator[str]:
    """Keys that the schema requires, or does not know, and that `value` lacks, or has."""
    schema = definitions[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
    if "anyOf" in schema:
        problems = [list(missing(s, value, definitions, where)) for s in schema["anyOf"]]
        yield from min(problems, key=len)
        return
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool,
             "number": (int, float), "null": type(None)}  # fmt: skip
    if "type" in schema and not isinstance(value, types[schema["type"]]):
        yield f"{where}: {value!r} is no {schema['type']}"
    elif isinstance(value, dict):
        known = schema.get("properties", {})
        yield from (
            f"{where}.{key} is missing" for key in schema.get("required", ()) if key not in value
        )
        for key, item in value.items():
            further = known.get(key, schema.get("additionalProperties", True))
            if further is False:
                yield f"{where}.{key} is not known"
            elif isinstance(further, dict):
                yield from missing(further, item, definitions, f"{where}.{key}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for number, item in enumerate(value):
            yield from missing(schema["items"], item, definitions, f"{where}[{number}]")


def test_results_follow_the_schema_that_lies_beside_them(first: Run):
    schema = read_json(first.folder / "results.schema.json")
    assert "methods" in schema["required"]
    assert list(missing(schema, first.results, schema["$defs"])) == []
    broken = first.results
    del broken["methods"]["dpo"]["cost"]["flops"]
    broken["methods"]["ppo"]["extra"] = 1
    assert list(missing(schema, broken, schema["$defs"])) == [
        ".methods.ppo.extra is not known",
        ".methods.dpo.cost.flops is missing",
    ]


def test_every_file_of_a_run_is_json_without_nan(first: Run):
    files = sorted(path.name for path in first.folder.glob("*.json"))
    assert files == [
        "curves.json", "experiment.json", "results.json", "results.schema.json", "samples.json",
    ]  # fmt: skip
    for name in files:
        json.loads((first.folder / name).read_text(), parse_constant=lambda c: pytest.fail(c))


def test_the_experiment_can_be_run_again_from_its_folder(first: Run):
    again = Experiment.model_validate(read_json(first.folder / "experiment.json"))
    assert again == first.experiment


def test_sft_is_where_it_starts(first: Run):
    sft = first.results["methods"]["sft"]
    assert sft["kl"]["per_seed"] == [0, 0]
    assert sft["gain"]["per_seed"] == [0, 0]
    assert sft["win_rate"]["per_seed"] == [0.5, 0.5]
    assert sft["cost"]["flops"] == 0


def test_numbers_lie_where_they_can(first: Run):
    for name, method in first.results["methods"].items():
        assert -1 <= method["gold"]["mean"] <= 1
        assert 0 <= method["win_rate"]["mean"] <= 1
        assert 0 <= method["well_formed"]["mean"] <= 1
        assert 1 <= method["length"]["mean"] <= first.experiment.sampling.max_new_tokens
        assert method["kl"]["mean"] >= 0
        assert method["k3"]["mean"] is None or method["k3"]["mean"] >= 0
        if name != "sft":
            assert method["cost"]["flops"] > 0
            assert method["cost"]["wall_s"] > 0
            assert method["cost"]["labels_used"] == 64
    gain, sft = first.results["methods"]["dpo"]["gain"], first.results["methods"]["sft"]
    after = first.results["methods"]["dpo"]["gold"]["mean"]
    assert gain["mean"] == pytest.approx(after - sft["gold"]["mean"])


def test_best_of_n_reports_the_bound_on_its_kl(first: Run):
    method = first.results["methods"]["best-of-n"]
    n = method["setting"]["n"]
    assert method["kl_is_bound"]
    assert method["kl"]["mean"] == pytest.approx(math.log(n) - (n - 1) / n)
    assert method["k1"]["mean"] is None


def test_ppo_holds_four_models_and_the_direct_methods_one(first: Run):
    held = {name: m["cost"]["models_held"] for name, m in first.results["methods"].items()}
    assert held["ppo"] == 4
    assert {held[name] for name in ("dpo", "ipo", "ipo-token", "kto")} == {1}
    trained = {name: m["cost"]["train_tokens"] for name, m in first.results["methods"].items()}
    assert trained["dpo"] == trained["ipo"] == trained["ipo-token"] > 0  # the same pairs, once


def test_every_two_arms_are_compared_at_every_level(first: Run):
    levels = [None, *first.experiment.evaluation.kl_levels]
    found = [(c["a"], c["b"], c["kl"]) for c in first.results["comparisons"]]
    wanted = [(a, b, k) for a, b in itertools.combinations(ARMS, 2) for k in levels]
    assert sorted(map(str, found)) == sorted(map(str, wanted))


def test_the_tuned_setting_has_the_best_validation_gold(first: Run):
    for name in ARMS:
        sweep = first.results["methods"][name]["sweep"]
        assert sum(s["tuned"] for s in sweep) == 1
        if len(sweep) > 1:
            best = max(sweep, key=lambda s: s["validation_gold"])
            assert best["tuned"], name
        (tuned,) = (s for s in sweep if s["tuned"])
        assert tuned["setting"] == first.results["methods"][name]["setting"]
        assert tuned["gold"] == first.results["methods"][name]["gold"]


def test_the_frontier_rises_and_starts_at_the_reference(first: Run):
    points = first.results["frontier"]
    assert [p["kl"] for p in points] == sorted(p["kl"] for p in points)
    golds = [p["gold"] for p in points]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(golds))
    assert max(golds) <= 1


# --- the numbers are those of the rows --------------------------------------------------------


@pytest.mark.parametrize("arm", ["ppo", "dpo", "ipo", "kto"])
def test_gold_is_vaders_mean_over_the_texts_that_were_sampled(first: Run, arm: str):
    vader = SentimentIntensityAnalyzer()
    method = first.results["methods"][arm]
    for index, seed in enumerate((0, 1)):
        rows = first.rows(first.policy(arm, seed), seed)
        assert len(rows) == 16
        gold = [
            vader.polarity_scores(f"{row['prompt']} {text}")["compound"]
            for row in rows
            for text in row["completions"]
        ]
        assert len(gold) == 32
        assert method["gold"]["per_seed"][index] == pytest.approx(np.mean(gold))
        greedy = [vader.polarity_scores(f"{r['prompt']} {r['greedy']}")["compound"] for r in rows]
        assert method["greedy_gold"]["per_seed"][index] == pytest.approx(np.mean(greedy))


@torch.no_grad()
def test_kl_is_that_of_plain_transformers_on_the_same_texts(first: Run):
    """Row by row, no padding, no cache: the sum over positions of KL(policy || ref)."""
    (sft,) = first.stages("sft")
    folder = first.policy("dpo", 0) / "final"
    tokenizer = AutoTokenizer.from_pretrained(sft)
    policy, ref = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (folder, sft)
    )
    reported, expected = [], []
    for row in first.rows(first.policy("dpo", 0), 0):
        prompt = tokenizer(row["prompt"]).input_ids
        for text, length, cut, kl in zip(
            row["completions"], row["length"], row["truncated"], row["kl"], strict=True
        ):
            completion = tokenizer(text).input_ids + [tokenizer.eos_token_id] * (not cut)
            if len(completion) != length:
                continue  # it holds a special token, which its text does not show
            ids = torch.tensor([prompt + completion])
            p, q = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (policy, ref))
            reported.append(kl)
            expected.append((p.exp() * (p - q)).sum().item())
    assert len(expected) > 10
    assert max(expected) > 0.01
    np.testing.assert_allclose(reported, expected, atol=1e-4, rtol=1e-4)


def test_samples_show_every_method_beside_the_others(first: Run):
    prompts = read_json(first.folder / "samples.json")["prompts"]
    assert len(prompts) == 12
    assert all(list(p["answers"]) == ["sft", *ARMS] for p in prompts)
    rows = first.rows(first.policy("kto", 0), 0)
    assert prompts[0]["prompt"] == rows[0]["prompt"]
    assert prompts[0]["answers"]["kto"]["text"] == rows[0]["completions"][0]


def test_curves_hold_every_training_of_every_seed(first: Run):
    curves = read_json(first.folder / "curves.json")
    assert set(curves) == {"reward", *ARMS} - {"best-of-n"}
    assert all(set(seeds) == {"0", "1"} for seeds in curves.values())
    assert {"objective/kl", "objective/scores"} <= set(curves["ppo"]["0"])
    assert [step for step, _ in curves["ppo"]["0"]["objective/kl"]] == [1, 2]


# --- stages -----------------------------------------------------------------------------------


def test_progress_counts_to_its_end(first: Run):
    numbers = [int(line[0]) for line in first.lines]
    assert numbers == list(range(1, len(numbers) + 1))
    assert {int(line[1]) for line in first.lines} == {len(numbers)}
    assert set(first.states) == {"done"}


def test_progress_counts_to_its_end_where_checkpoints_fall_together(first: Run, tmp_path: Path):
    """A quarter and a half of two updates are both the first."""
    changes = ["--name", "both", "--seeds", "[0]", *some_arms("ppo")]
    both = tiny(tmp_path, *changes, "--evaluation.checkpoints", "[0.25, 0.5]")
    second = run(both, first.folder.parent)
    assert {int(line[1]) for line in second.lines} == {len(second.lines)}


def test_stages_are_named_apart_on_screen(first: Run):
    names = [line[2] for line in first.lines]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice


def test_the_second_run_does_no_work_and_writes_the_same(first: Run):
    before = {name: (first.folder / name).read_bytes() for name in ("samples.json", "curves.json")}
    results = first.results
    again = run(first.experiment, first.folder.parent)
    assert set(again.states) == {"cached"}
    assert len(again.states) == len(first.states)
    kept = {key: value for key, value in again.results.items() if key != "environment"}
    for method in (*kept["methods"].values(), *results["methods"].values()):
        method["cost"].pop("mfu")  # a share of the rate that was measured in this run
    assert kept == {key: value for key, value in results.items() if key != "environment"}
    assert {name: (again.folder / name).read_bytes() for name in before} == before


def test_an_interrupted_run_ends_in_the_same_results(first: Run, tmp_path: Path):
    """Fifteen stages gone and one damaged: what is missing is done again, bit by bit the same."""
    shutil.copytree(first.folder.parent, tmp_path / "runs")
    stages = sorted((tmp_path / "runs" / ".stages").iterdir())
    rng = random.Random(0)
    *gone, damaged = rng.sample(stages, 16)
    for folder in gone:
        shutil.rmtree(folder)
    victim = max((p for p in damaged.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    again = run(first.experiment, tmp_path / "runs")
    assert 0 < again.states.count("done") <= 16  # other experiments' stages may be among the gone
    assert without_times(again.results) == without_times(first.results)


def test_a_stage_that_is_done_elsewhere_is_the_same_to_the_bit(first: Run, tmp_path: Path):
    """Weights, samples, scores and rows: all but what it cost."""
    arms = some_arms("best-of-n", "ppo", "kto", "fdpo")
    again = run(tiny(tmp_path, "--name", "some", *arms), tmp_path / "runs")
    assert set(again.states) == {"done"}
    both = {p.name for p in (tmp_path / "runs" / ".stages").iterdir()}
    both &= {p.name for p in (first.folder.parent / ".stages").iterdir()}
    kinds = {name.rsplit("-", 1)[0] for name in both}
    assert kinds >= {"sft", "reward", "ppo", "direct", "filtered", "best-of-n", "evaluation"}
    assert len(both) > 25
    for name in both:
        here, there = (
            read_json(runs / ".stages" / name / "manifest.json")["files"]
            for runs in (tmp_path / "runs", first.folder.parent)
        )
        assert {f: h for f, h in here.items() if f != "cost.json"} == {
            f: h for f, h in there.items() if f != "cost.json"
        }, name


@pytest.mark.slow  # a second whole head-to-head
def test_a_fresh_folder_gives_the_same_results(first: Run, tmp_path: Path):
    again = run(first.experiment, tmp_path / "runs")
    assert set(again.states) == {"done"}
    assert without_times(again.results) == without_times(first.results)
    for name in ("samples.json", "curves.json", "experiment.json"):
        assert read_json(again.folder / name) == read_json(first.folder / name)


def test_other_seeds_differ_and_share_what_does_not_depend_on_them(first: Run, tmp_path: Path):
    arms = some_arms("ppo", "dpo", "best-of-n")
    other = tiny(tmp_path, "--name", "other", "--seeds", "[2]", *arms)
    second = run(other, first.folder.parent)
    cached = [line[2] for line in second.lines if line[3] == "cached"]
    assert len(cached) == 4  # SFT, and what is sampled from it for all seeds
    assert "sft" in cached
    for name in ("sft", "ppo", "dpo", "best-of-n"):
        here, there = (r.results["methods"][name]["gold"]["per_seed"] for r in (second, first))
        assert len(here) == 1
        assert here[0] not in there
    assert second.results["methods"]["ppo"]["gold"]["low"] is None  # one seed, no interval


def test_stages_side_by_side_come_to_the_same_results(
    first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """To the bit, two at a time; the last seed's training, whose seconds are told, is alone.

    It has threads of its own number, which the machine's description tells, and the rest has not.
    """
    changes = ["--name", "side", "--seeds", "[0, 3, 1]", *some_arms("dpo"), "--timed-threads", "2"]
    alone = run(tiny(tmp_path, *changes), first.folder.parent)
    heard: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def hearing(root: Path, labels: dict[str, str]) -> Iterator[Callable[[str, str, float], None]]:
        with progress(root, labels) as say:
            yield lambda *said: (heard.append(said[:2]), say(*said))[1]

    monkeypatch.setattr("benchmarks.run.progress", hearing)
    side = run(tiny(tmp_path, *changes, "--workers", "2"), tmp_path / "runs")
    assert set(side.states) == {"done"}
    assert [line[0] for line in side.lines] == [str(i + 1) for i in range(len(side.lines))]
    assert {int(line[1]) for line in side.lines} == {len(side.lines)}
    found, expected = (without_times(r.results) for r in (side, alone))
    assert found == expected
    assert side.results["methods"]["dpo"]["cost"]["timed_seeds"] == [1]
    assert side.results["environment"]["threads"] == 2
    assert first.results["methods"]["dpo"]["cost"]["timed_seeds"] == [0, 1]
    assert first.results["environment"]["threads"] == 1
    states = {line[2]: line[3] for line in alone.lines}
    made = ("dpo beta=0.2", "reward model", "reference log-probabilities")
    assert {states[f"{name}, seed 0"] for name in made} == {"cached"}  # of the first run
    assert {states[f"{name}, seed 1"] for name in made} == {"done"}  # there with one thread
    together = [running for _, running in beside(heard)]
    assert max(map(len, together)) >= 2
    for label in (f"{name}, seed 1" for name in made):
        assert {tuple(running) for one, running in beside(heard) if one == label} == {(label,)}
    again = run(side.experiment, tmp_path / "runs")
    assert set(again.states) == {"cached"}


def beside(heard: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Each stage that started or ended, with all that were under way at that moment."""
    running: list[str] = []
    moments = []
    for label, state in heard:
        if state == "running":
            running.append(label)
        moments.append((label, sorted(running)))
        if state == "done":
            running.remove(label)
    return moments


def double(folder: Path, number: int, fail: bool = False) -> None:
    if fail:
        raise ValueError(f"{number} cannot be doubled")
    (folder / "process").write_text(str(os.getpid()))
    (folder / "double").write_text(str(2 * number))


def test_a_stage_that_two_arms_need_runs_once_and_a_failure_waits_for_the_others(tmp_path: Path):
    heard: list[tuple[str, str]] = []
    stages = Stages(tmp_path, lambda label, state, _: heard.append((label, state)))
    with side_by_side(stages, workers=1, threads=1) as beside:
        run = partial(beside.run, "double", double)
        folders = beside.each(lambda n: run(number=n % 2), range(6))
        assert len(set(folders)) == 2
        assert sorted(heard) == 2 * [("double", "done")] + 2 * [("double", "running")]
        assert [(f / "double").read_text() for f in folders] == ["0", "2"] * 3
        assert all((f / "process").read_text() != str(os.getpid()) for f in folders)
        with pytest.raises(ValueError, match="5 cannot be doubled"):
            beside.each(lambda n: run(number=n, fail=n == 5), range(5, 9))
    assert sorted(f.read_text() for f in tmp_path.glob("*/double")) == ["0", "12", "14", "16", "2"]


@pytest.mark.parametrize("arm", ["ppo", "dpo", "kto", "fdpo"])
def test_an_arm_that_diverges_is_a_result_and_not_the_end(first: Run, tmp_path: Path, arm: str):
    """A learning rate that leaves the finite numbers: counted, reported, and the rest goes on."""
    key, table = some_arms(arm)
    table = table.replace("learning_rate = 0.0003", "learning_rate = 1e30")
    changes = ["--name", f"wild-{arm}", "--seeds", "[0]", key, table]
    wild = [f"--{part}.optimizer.learning_rate=1e30" for part in ("ppo", "direct")]
    second = run(tiny(tmp_path, *changes, *wild), first.folder.parent)
    assert second.results["methods"][arm]["stability"]["failed"] == 1
    assert build_report(second.folder).is_file()


def test_fewer_test_prompts_than_frontier_prompts_are_enough(first: Run, tmp_path: Path):
    """The user makes a run smaller by one key; what has been trained by then must not be lost."""
    changes = ["--name", "few", "--seeds", "[0]", "--evaluation.prompts", "4"]
    second = run(tiny(tmp_path, *changes, *some_arms("dpo")), first.folder.parent)
    assert set(second.results["methods"]) == {"sft", "dpo"}


# --- the report -------------------------------------------------------------------------------


def test_the_report_of_the_run_stands(first: Run):
    page = build_report(first.folder)
    text = page.read_text(encoding="utf-8")
    assert page == first.folder / "report" / "index.html"
    assert "<script" not in text
    assert text.count("<svg") >= 2
    assert list((page.parent / "figures").glob("*.png"))
    with (page.parent / "tables" / "cost.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"sft", *ARMS}
    for row in rows:
        flops = first.results["methods"][row["method"]]["cost"]["flops"]
        assert float(row["flops"]) == pytest.approx(flops)
