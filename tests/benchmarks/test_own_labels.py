"""One's own single answers with a label through the whole pipeline, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_models import chat_tokenizer, write_policy, write_reward
from checks import Klash

from benchmarks.pipeline.loading import load_experiment
from benchmarks.pipeline.single import card, train_one
from benchmarks.results.schema import Results
from benchmarks.run import plan_experiment, run_experiment
from shared.config import InputError
from shared.data.own import couples
from shared.data.splits import split_of
from shared.models.load import load_tokenizer
from shared.stages import read_json, read_jsonl
from shared.tasks.own import OwnData, OwnExample
from shared.tasks.registry import make_task

EXPERIMENT = """
name = "mine"
seeds = [0]
[model]
pretrained = "model"
[task]
name = "own"
pairs = "labels.jsonl"
[sampling]
max_new_tokens = 6
[sft]
examples = 1000
batch_size = 32
[ppo]
episodes = 8
rollout_size = 8
minibatch_size = 8
[evaluation]
prompts = 50
validation_prompts = 2
scale_prompts = 2
"""
ARMS = {
    "kto": 'kind = "direct"\nloss = "kto"\nsettings = [{ beta = 0.1 }]',
    "dpo": 'kind = "direct"\nsettings = [{ beta = 0.1 }]',
    "ppo": 'kind = "ppo"\nsettings = [{ kl_coef = 0.1 }]',
    "best-of-n": 'kind = "best-of-n"\nsettings = [{ n = 2 }]',
    "fdpo": 'kind = "filtered"\nsettings = [{ beta = 0.1 }]',
}
JUDGE = """
def vowels(prompts, completions):
    return [sum(c in "aeiou" for c in text) for text in completions]
"""
ROWS = 120


def is_good(i: int) -> bool:
    return i % 3 != 0


def rows() -> list[dict[str, Any]]:
    """Good answers hold vowels, bad ones none; every tenth prompt has one of each."""

    def row(i: int, good: bool) -> dict[str, Any]:
        said = {"role": "assistant", "content": f"aeiou {i}" if good else f"xyz {i}"}
        return {"messages": [{"role": "user", "content": f"Say {i}."}, said], "label": good}

    both = [row(i, not is_good(i)) for i in range(0, ROWS, 10)]
    return [*(row(i, is_good(i)) for i in range(ROWS)), *both]


def on_side(i: int, *splits: str) -> bool:
    return split_of(f"Say {i}.") in splits


def counts(*splits: str) -> tuple[int, int]:
    """(desirable, undesirable) answers of some splits."""
    found = [(i, is_good(i)) for i in range(ROWS)]
    found += [(i, not is_good(i)) for i in range(0, ROWS, 10)]
    good = [label for i, label in found if on_side(i, *splits)]
    return sum(good), len(good) - sum(good)


TRAIN, TEST = ("sft", "preference", "ppo"), ("test", "reward-test")


def arms(*names: str) -> str:
    return "".join(f"[arms.{name}]\n{ARMS[name]}\n" for name in names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a reward model, answers with a label, a judge and an experiment without arms."""
    made = tmp_path_factory.mktemp("labels")
    write_policy(made / "model", chat_tokenizer())
    write_reward(made / "reward-model", chat_tokenizer())
    write(made / "labels.jsonl", rows())
    write(made / "good.jsonl", [row for row in rows() if row["label"]])
    pairs = [{"prompt": f"Say {i}.", "chosen": f" a{i}", "rejected": f" b{i}"} for i in range(9)]
    write(made / "pairs.jsonl", pairs)
    (made / "judges.py").write_text(JUDGE)
    (made / "mine.toml").write_text(EXPERIMENT)
    (made / "kto.toml").write_text(EXPERIMENT + arms("kto"))
    return made


def write(path: Path, found: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def stages(runs: Path, name: str) -> list[Path]:
    return [f.parent for f in (runs / ".stages").glob(f"{name}-*/manifest.json")]


def results_of(run: Path) -> Results:
    return Results.model_validate(read_json(run / "results.json"))


@pytest.fixture(scope="module")
def unjudged(folder: Path) -> Path:
    """A finished run without a judge, a reward model or arms that are named."""
    words = ["--arms.kto.kind", "direct", "--arms.kto.loss", "kto"]
    words += ["--arms.kto.settings", "[{ beta = 0.1 }]"]
    return run_experiment(load_experiment(str(folder / "mine.toml"), words, False), folder / "runs")


@pytest.fixture(scope="module")
def judged(folder: Path, unjudged: Path) -> Path:
    """The same with a judge and a reward model of one's own, for PPO and best-of-n."""
    file = folder / "judged.toml"
    file.write_text(EXPERIMENT + arms("kto", "ppo", "best-of-n"))
    words = ["--judge.function", "judges.py:vowels", "--reward.pretrained", "reward-model"]
    experiment = load_experiment(str(file), [*words, "--name", "judged"], False)
    return run_experiment(experiment, folder / "runs")


def test_without_judge_and_reward_model_kto_trains_and_what_is_unknown_is_null(unjudged: Path):
    found = results_of(unjudged)
    assert list(found.methods) == ["sft", "kto"]
    assert found.reward_model is None and not found.scored and not found.judged
    assert found.rm_frontier == [] and found.comparisons == []
    for method in found.methods.values():
        assert method.proxy.mean is None and method.gold.mean is None
        assert method.kl.mean is not None and method.length.mean is not None
    assert found.methods["kto"].displacement.mean is not None
    assert found.methods["kto"].pair_accuracy.mean is None  # no two answers are compared
    assert stages(unjudged.parent, "reward") == []
    page = (unjudged / "report" / "index.html").read_text()
    assert "No winner can be named: nobody judged the answers." in page
    assert "nan" not in re.sub(r"<svg.*?</svg>|<style.*?</style>", "", page, flags=re.DOTALL)


def test_both_kinds_train_kto_with_the_rarer_one_raised(unjudged: Path):
    good, bad = counts(*TRAIN)
    labels = results_of(unjudged).labels
    assert labels is not None
    assert (labels.desirable, labels.undesirable) == (good, bad)
    assert labels.desirable_weight * good == pytest.approx(labels.undesirable_weight * bad)
    assert labels.desirable_weight == 1
    (trained,) = stages(unjudged.parent, "direct")
    assert read_json(trained / "labels.json") == labels.model_dump()
    page = (unjudged / "report" / "index.html").read_text()
    assert f"Single answers, {good} desirable and {bad} undesirable." in page


def test_sft_is_shown_the_desirable_answers_of_what_trains_and_no_others(
    folder: Path, unjudged: Path
):
    (data,) = stages(unjudged.parent, "data")
    tokenizer = load_tokenizer(folder / "model")
    task = make_task(OwnData(data, folder / "model"))
    shown = [tokenizer.decode(d.completion) for d in task.demonstrations(tokenizer, 10**6, 0)]
    assert len(shown) == counts(*TRAIN)[0]
    assert all(text.startswith("aeiou") for text in shown)


def test_a_reward_model_of_ones_own_brings_ppo_and_best_of_n(judged: Path):
    found = results_of(judged)
    assert list(found.methods) == ["sft", "kto", "ppo", "best-of-n"]
    assert found.scored and found.judged
    assert found.methods["best-of-n"].proxy.mean is not None
    assert found.reward_model is None  # no pairs to examine it on
    assert len(stages(judged.parent, "sft")) == 1  # that of the other run


def test_the_judge_is_measured_on_couples_of_both_kinds(judged: Path):
    judge = results_of(judged).judge
    assert judge is not None and judge.knows
    assert judge.pairs == min(counts(*TEST))
    assert judge.accuracy.mean == 1.0


def test_the_chosen_answers_are_the_desirable_ones_of_prompts_that_have_some(judged: Path):
    (answered,) = stages(judged.parent, "best-of-n")
    gold = {}
    for row in read_jsonl(answered / "rows.jsonl"):
        (number,) = map(int, re.findall(r"Say (\d+)", row["prompt"]))
        gold[number] = row
        has_good = is_good(number) or number % 10 == 0
        assert row["chosen_gold"] == (5.0 if has_good else None)
    assert {row["chosen_gold"] for row in gold.values()} == {5.0, None}
    known = [row["gold"] for row in gold.values() if row["chosen_gold"] is not None]
    wins = [np.mean([0.5 + 0.5 * np.sign(g - 5.0) for g in golds]) for golds in known]
    found = results_of(judged).methods["best-of-n"].win_rate_against_chosen
    assert found.mean == pytest.approx(np.mean(wins))


def example(prompt: str, label: bool, where: str = "") -> OwnExample:
    return OwnExample(where, "test", prompt, None, [1], "a", [2], label=label)


def test_couples_are_of_one_prompt_where_there_are_two_and_use_no_answer_twice():
    found = [example(*one) for one in (("x", True), ("y", False), ("y", True), ("z", False))]
    told = [(good.prompt, bad.prompt) for good, bad in couples(found)]
    assert told == [("y", "y"), ("x", "z")]
    assert couples([example("x", True), example("y", True)]) == []


# --- which arms -------------------------------------------------------------------------------


def test_the_defaults_leave_out_what_needs_pairs_and_say_so_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--task.pairs", str(folder / "labels.jsonl")]
    experiment = load_experiment("own", words, False)
    assert list(experiment.arms) == ["kto"] and not experiment.judge.named
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert all(name in told for name in ("labels.jsonl", "dpo", "ipo", "fdpo", "ppo", "by share"))
    words += ["--reward.pretrained", str(folder / "reward-model")]
    assert list(load_experiment("own", words, False).arms) == ["best-of-n", "ppo", "kto"]


def test_samples_that_a_judge_labels_are_pairs_for_every_method(folder: Path, tmp_path: Path):
    words = ["--preferences.source", "policy", "--judge.function", "judges.py:vowels"]
    experiment = load_experiment(str(folder / "mine.toml"), words, False)
    assert {"dpo", "ppo", "fdpo"} <= set(experiment.arms)
    plan = plan_experiment(experiment, tmp_path)
    planned = {stage.stage.name for stage in plan.stages.values()}
    assert {"reward", "reward-test", "reward-scores", "filtered", "judge-scores"} <= planned


@pytest.mark.parametrize(
    ("file", "overrides", "said"),
    [
        ("dpo", [], "`arms.dpo`"),
        ("fdpo", [], "`arms.fdpo`"),
        ("fdpo", ["--reward.pretrained", "reward-model"], "`arms.fdpo`"),
        ("ppo", [], "name your own in `reward.pretrained`"),
        ("best-of-n", [], "name your own in `reward.pretrained`"),
        ("kto", ["--judge.share", "0.3"], "`judge.share`"),
        ("kto", ["--task.pairs", "good.jsonl"], "no answer is labelled undesirable"),
        ("kto", ["--task.rows", "pairs"], "single answers with a label (chat-labels), and comp"),
        ("kto", ["--task.rows", "labels", "--task.pairs", "pairs.jsonl"], "and single answers"),
    ],
)
def test_what_needs_pairs_is_refused_with_its_name_and_why(
    folder: Path,
    unjudged: Path,
    file: str,
    overrides: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(folder)
    path = folder / f"only-{file}.toml"
    path.write_text(EXPERIMENT + arms(file))
    with pytest.raises(InputError, match=re.escape(said)):
        run_experiment(load_experiment(str(path), overrides, False), folder / "runs")


# --- one model, and the doctor ----------------------------------------------------------------


@pytest.mark.parametrize(("method", "held"), [("sft", "desirable answers alone"), ("kto", "")])
def test_one_method_alone_says_in_its_card_what_it_trained_on(
    folder: Path, unjudged: Path, method: str, held: str
):
    experiment = load_experiment(str(folder / "kto.toml"), [], False)
    told = card(train_one(experiment, method, folder / "runs"))
    assert "labelled answers" in told
    assert (held or f"labelled answers: {sum(counts(*TRAIN))}") in told


@pytest.mark.parametrize("method", ["reward", "dpo", "ppo", "fdpo"])
def test_a_method_that_needs_pairs_is_not_trained_alone(folder: Path, method: str):
    with pytest.raises(InputError, match=f"{method}: the data are single answers with a label"):
        train_one(load_experiment(str(folder / "kto.toml"), [], False), method, folder / "runs")


def test_the_doctor_examines_an_experiment_on_labels(folder: Path, unjudged: Path, klash: Klash):
    code, out, err = klash("doctor", folder / "kto.toml", "--runs", folder / "runs")
    good, bad = counts(*TRAIN)
    assert code in (0, 1), err
    assert f"labels: {good} desirable, {bad} undesirable" in out
    assert "pairs: of" not in out and "reward accuracy" not in out
    assert "checks pass" in out
