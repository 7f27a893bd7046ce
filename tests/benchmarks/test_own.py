"""One's own pairs, model and judge through the whole pipeline, and what reruns after a change."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_models import chat_tokenizer, write_policy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
)

from benchmarks.pipeline.loading import load_experiment
from benchmarks.pipeline.single import put_model, train_one
from benchmarks.results.schema import Results
from benchmarks.run import plan_experiment, run_experiment
from shared.config import InputError
from shared.data.cleaning import Report
from shared.data.examples import Example, Room, read_examples
from shared.data.rows import DataConfig
from shared.data.splits import split_of
from shared.models.folders import places_known
from shared.stages import read_json, read_jsonl

JUDGE = """
def vowels(prompts, completions):
    assert all(isinstance(p, list) and p[-1]["role"] == "user" for p in prompts)
    return [sum(c in "aeiou" for c in t) + 1e-6 * sum(map(ord, t)) for t in completions]

def nothing(prompts, completions):
    return [0.0] * len(completions)

def broken(prompts, completions):
    return [float("nan")] * len(completions)
"""
EXPERIMENT = """
name = "mine"
seeds = [0]
[model]
pretrained = "model"
[task]
name = "own"
pairs = "pairs.jsonl"
[sampling]
max_new_tokens = 6
[sft]
examples = 32
[ppo]
episodes = 16
rollout_size = 8
minibatch_size = 8
[evaluation]
prompts = 6
validation_prompts = 2
scale_prompts = 4
[arms.dpo]
kind = "direct"
settings = [{ beta = 0.1 }]
[arms.ppo]
kind = "ppo"
settings = [{ kl_coef = 0.1 }]
[arms.best-of-n]
kind = "best-of-n"
settings = [{ n = 2 }]
"""
ROWS = 150


def chat(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def rows() -> list[dict[str, Any]]:
    """Chosen answers hold more vowels, but for every tenth."""
    found = []
    for i in range(ROWS):
        sides = [f"aeiou {i}", f"xyz {i}"]
        chosen, rejected = sides if i % 10 else sides[::-1]
        found.append(
            {
                "prompt": chat("user", f"Say {i}."),
                "chosen": chat("assistant", chosen),
                "rejected": chat("assistant", rejected),
            }
        )
    return found


def write(folder: Path, extra: str = "") -> Path:
    """A model, pairs, judges and an experiment."""
    folder.mkdir(exist_ok=True)
    write_policy(folder / "model", chat_tokenizer())
    lines = [json.dumps(row) + "\n" for row in rows()]
    (folder / "pairs.jsonl").write_text("".join(lines))
    (folder / "judges.py").write_text(JUDGE)
    (folder / "mine.toml").write_text(EXPERIMENT + extra)
    return folder / "mine.toml"


def results_of(run: Path) -> Results:
    return Results.model_validate(read_json(run / "results.json"))


def folders(runs: Path, name: str) -> dict[Path, Any]:
    """Finished stages of one kind with their manifests."""
    found = {f: read_json(f / "manifest.json") for f in (runs / ".stages").glob(f"{name}-*")}
    return {folder: manifest for folder, manifest in found.items() if manifest["stage"] == name}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def judged(own: Path) -> Path:
    """A finished run with a judge's function."""
    overrides = ["--judge.function", "judges.py:vowels", "--name", "judged"]
    return run_experiment(load_experiment(str(own), overrides, False), own.parent / "runs")


@pytest.fixture(scope="module")
def unjudged(own: Path, judged: Path) -> Path:
    """The same without a judge."""
    return run_experiment(load_experiment(str(own), [], False), own.parent / "runs")


def test_gold_is_what_the_function_says_of_the_sampled_answers(judged: Path):
    runs, found = judged.parent, results_of(judged)
    (evaluation,) = folders(runs, "best-of-n")
    golds = []
    for row in read_jsonl(evaluation / "rows.jsonl"):
        expected = [
            sum(c in "aeiou" for c in text) + 1e-6 * sum(map(ord, text))
            for text in row["completions"]
        ]
        assert row["gold"] == pytest.approx(expected, abs=1e-12)
        golds += row["gold"]
    assert found.methods["best-of-n"].gold.mean == pytest.approx(np.mean(golds))


def test_the_judges_accuracy_is_that_on_pairs_of_prompts_held_out(judged: Path):
    held_out = [i for i in range(ROWS) if split_of(f"Say {i}.") in ("test", "reward-test")]
    right = [i % 10 != 0 for i in held_out]
    judge = results_of(judged).judge
    assert judge is not None and judge.kind == "function"
    assert judge.pairs == len(held_out)
    assert judge.accuracy.mean == pytest.approx(np.mean(right))
    assert judge.knows


def test_no_prompt_that_is_measured_on_was_trained_on(judged: Path):
    runs = judged.parent
    (preferences,) = folders(runs, "preferences")
    trained = {row["prompt"] for row in read_jsonl(preferences / "train.jsonl")}
    held_out = {row["prompt"] for row in read_jsonl(preferences / "held_out.jsonl")}
    (evaluation,) = folders(runs, "best-of-n")
    asked = {row["prompt"] for row in read_jsonl(evaluation / "rows.jsonl")}
    assert len(trained) > 90
    assert not trained & (held_out | asked)
    numbers = {int(re.findall(r"Say (\d+)", prompt)[0]) for prompt in trained}
    sides = {split_of(f"Say {i}.") for i in numbers}
    assert sides <= {"sft", "preference", "ppo"}


def test_without_a_judge_gold_is_null_and_nobody_wins(unjudged: Path):
    found = results_of(unjudged)
    assert not found.judged and found.judge is None and found.comparisons == []
    for method in found.methods.values():
        assert method.gold.mean is None and method.win_rate.mean is None
        assert method.kl.mean is not None and method.length.mean is not None
    assert found.methods["dpo"].pair_accuracy.mean is not None
    page = (unjudged / "report" / "index.html").read_text()
    assert "No winner can be named: nobody judged the answers." in page


def test_a_judge_changes_nothing_that_trains(judged: Path, unjudged: Path):
    for name in ("direct", "ppo", "reward", "sft", "start", "data"):
        assert len(folders(judged.parent, name)) == 1


# --- what reruns ------------------------------------------------------------------------------


@pytest.fixture
def planned(tmp_path: Path) -> Iterator[tuple[Path, Callable[..., set[str]]]]:
    """(the folder with everything, the planned stages' keys)."""
    file = write(tmp_path / "mine")

    def keys(*overrides: str) -> set[str]:
        judge = ["--judge.function", "judges.py:vowels", *overrides]
        plan = plan_experiment(load_experiment(str(file), judge, False), tmp_path / "runs")
        return {folder.name for folder in plan.stages}

    yield file.parent, keys


def kinds(keys: set[str]) -> set[str]:
    return {key.rpartition("-")[0] for key in keys}


def test_a_changed_row_reads_the_data_again_and_leaves_the_model(planned):
    folder, keys = planned
    before = keys()
    lines = (folder / "pairs.jsonl").read_text().replace("xyz 7", "xyz seven")
    (folder / "pairs.jsonl").write_text(lines)
    after = keys()
    assert "start" not in kinds(after - before)
    assert {"data", "sft", "preferences", "direct", "ppo"} <= kinds(after - before)


def test_a_model_folder_of_the_same_name_with_other_weights_is_another_model(planned):
    folder, keys = planned
    before = keys()
    shutil.rmtree(folder / "model")
    write_policy(folder / "model", chat_tokenizer(), num_hidden_layers=1)
    assert {"start", "data", "sft", "direct"} <= kinds(keys() - before)


def test_an_edited_judge_reruns_what_it_judges_and_no_training(planned):
    folder, keys = planned
    before = keys()
    (folder / "judges.py").write_text(JUDGE.replace("aeiou", "aeiouy"))
    changed = kinds(keys() - before)
    assert changed == {
        "reward-test",
        "judge-scores",
        "reward-scores",
        "evaluation",
        "best-of-n",
    } | {
        "summary",
        "report",
    }


def test_where_the_files_are_changes_no_training(planned, tmp_path: Path):
    folder, keys = planned
    before = keys()
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    judge = ["--judge.function", "judges.py:vowels"]
    experiment = load_experiment(str(moved / "mine.toml"), judge, False)
    plan = plan_experiment(experiment, tmp_path / "runs")
    assert kinds({f.name for f in plan.stages} - before) <= {"summary", "report"}


def test_a_judge_by_share_trains_on_pairs_that_nothing_else_sees(own: Path):
    file = own.parent / "mine.toml"
    overrides = ["--judge.share", "0.3", "--name", "shared-judge"]
    run = run_experiment(load_experiment(str(file), overrides, False), own.parent / "share-runs")
    judge = results_of(run).judge
    assert judge is not None and judge.kind == "share"
    made = {
        manifest["inputs"].get("side", "train"): folder
        for folder, manifest in folders(run.parent, "preferences").items()
    }
    prompts = {
        side: {row["prompt"] for row in read_jsonl(folder / "train.jsonl")}
        for side, folder in made.items()
    }
    assert prompts["judge"] and not prompts["judge"] & prompts["train"]


# --- what is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--task.pairs", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--task.pairs", ""], "task.pairs"),
        (["--model.pretrained", "./nowhere"], "./nowhere: no such folder"),
        (["--judge.function", "judges.py:nobody"], "has no function `nobody`"),
        (["--judge.function", "nowhere.py:score"], "no file"),
        (["--judge.function", "judges"], "file.py:function"),
        (["--judge.function", "judges.py:broken"], "nan for the completion"),
        (["--judge.share", "0.3", "--judge.model", "model"], "a judge is one of them"),
        (["--judge.model", "model"], "not a reward model"),
        (["--preferences.source", "policy"], "labelled only by a judge"),
        (["--arms.ppo.gold", "true"], "no true score to train on"),
        (["--task.name", "reviews", "--judge.share", "0.3"], "its own true score"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    own: Path, judged: Path, overrides: list[str], said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(own.parent)
    with pytest.raises(InputError, match=re.escape(said)):
        run_experiment(load_experiment(str(own), overrides, False), own.parent / "runs")


def test_a_judge_that_is_no_better_than_a_coin_names_no_winner(own: Path, judged: Path):
    overrides = ["--judge.function", "judges.py:nothing", "--name", "coin", "--seeds", "[0]"]
    found = results_of(
        run_experiment(load_experiment(str(own), overrides, False), own.parent / "runs")
    )
    assert found.judge is not None
    assert found.judge.accuracy.mean == 0.5 and not found.judge.knows
    assert all(c.verdict.startswith("undecided") for c in found.comparisons)


# --- one model --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "reward", "dpo", "kto"])
def test_one_method_alone_is_a_plain_folder_with_a_card(
    own: Path, judged: Path, tmp_path: Path, method: str
):
    trained = train_one(load_experiment(str(own), [], False), method, own.parent / "runs")
    put_model(trained, tmp_path / "out")
    loader = AutoModelForSequenceClassification if method == "reward" else AutoModelForCausalLM
    assert loader.from_pretrained(tmp_path / "out").config.vocab_size > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert method in card and "pairs.jsonl" in card
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("method", ["sft", "reward", "dpo"])
def test_one_method_alone_trains_no_judge(own: Path, tmp_path: Path, method: str):
    runs = tmp_path / "runs"
    train_one(load_experiment(str(own), ["--judge.share", "0.3"], False), method, runs)
    assert folders(runs, "sft") and not folders(runs, "judge")


def test_an_unknown_method_is_answered_with_the_nearest(own: Path):
    with pytest.raises(InputError, match="did you mean `dpo`"):
        train_one(load_experiment(str(own), [], False), "dpoo", own.parent / "runs")


def test_rows_that_end_behind_the_models_last_place_are_over_long(own: Path, tmp_path: Path):
    """Beyond it GPT-2 has no place, and rotary models none that they have seen."""
    tokenizer, path = chat_tokenizer(), tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))

    def read(room: Room | None) -> tuple[list[Example], Report]:
        ends = frozenset({int(tokenizer.eos_token_id)})  # pyright: ignore[reportArgumentType]
        return read_examples([str(path)], Path(), DataConfig(), tokenizer, ends, room=room)

    everything, _ = read(None)
    lengths = [
        len(e.prompt_ids) + max(len(e.chosen_ids), len(e.rejected_ids or ())) for e in everything
    ]
    places = sorted(lengths)[ROWS // 2]
    kept, report = read(Room(places, 0))
    assert len(kept) == sum(length <= places for length in lengths) < ROWS
    assert report.dropped == {"over-long": ROWS - len(kept)}
    prompts = [len(e.prompt_ids) for e in everything]
    assert len(read(Room(max(prompts) + 100, 101))[0]) == sum(n < max(prompts) for n in prompts)


def test_places_are_those_of_any_family(tmp_path: Path):
    for config, places in (
        (GPT2Config(n_positions=64), 64),
        (LlamaConfig(max_position_embeddings=96), 96),
    ):
        config.save_pretrained(tmp_path)
        assert places_known(tmp_path) == places
