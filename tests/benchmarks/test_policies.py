"""`klash evaluate`: KL, wins and notes of policies that are known to be alike or apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import chat_tokenizer, write_policy, write_reward
from preference_rows import chat_rows, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.cli import main
from benchmarks.evaluation.judges import Judges
from benchmarks.evaluation.policies import Asked, Evaluating, evaluate_policies, interval
from benchmarks.pipeline.given import given_function
from benchmarks.scoring.sampling import Sampled
from shared.config import InputError
from shared.data.splits import split_of
from shared.models.scorer import Scorer
from shared.stages import read_json
from shared.tasks.judge import Judge, judged_by_function

SAMPLED = Sampled(max_new_tokens=6, samples=2)
JUDGE = """
def vowels(prompts, completions):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [sum(letter in "aeiou" for letter in text) for text in completions]

def constant(prompts, completions):
    return [1.0 for _ in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`start`, its copy `same`, `other` with one changed layer, `foreign` with other tokens."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("start", "same", "other"):
        write_policy(folder / name, chat_tokenizer())
    weights = load_file(folder / "other" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= -1
    save_file(weights, folder / "other" / "model.safetensors", metadata={"format": "pt"})
    write_policy(folder / "foreign", chat_tokenizer(turned=True))
    write_reward(folder / "reward", chat_tokenizer())
    (folder / "judge.py").write_text(JUDGE)
    write_rows(folder / "rows.jsonl", chat_rows(60))
    return folder


def is_test(row: dict[str, Any]) -> bool:
    return split_of(row["prompt"][0]["content"]) in ("test", "reward-test")


def evaluated(folder: Path, *models: str, judges: Judges | None = None, **asked: Any) -> Any:
    ref = asked.pop("ref", "start")
    return evaluate_policies(
        Evaluating(
            tuple(str(folder / name) for name in models),
            (str(folder / "rows.jsonl"),),
            Asked(ref=None if ref is None else str(folder / ref), **asked),
            folder / "found.json",
            Judges() if judges is None else judges,
            SAMPLED,
        )
    )


@pytest.fixture(scope="module")
def found(folder: Path) -> Any:
    judges = Judges(str(folder / "reward"), judge_function=f"{folder / 'judge.py'}:vowels")
    return evaluated(folder, "same", "other", "foreign", judges=judges)


def test_only_prompts_of_the_test_side_are_asked(folder: Path, found: Any):
    test = [row for row in chat_rows(60) if is_test(row)]
    assert found["side"] == "test"
    assert found["prompts"] == len(test) > 3
    asked = found["models"][str(folder / "same")]["examples"]
    assert all(example["prompt"] in [row["prompt"] for row in test] for example in asked)


def test_the_same_weights_have_no_kl_and_win_as_often_as_they_lose(folder: Path, found: Any):
    same, start = (found["models"][str(folder / name)] for name in ("same", "start"))
    assert same["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert start["kl"]["mean"] == 0
    assert same["win_rate"]["mean"] == 0.5
    for name in ("score", "gold", "length", "truncated", "repetition", "distinct_2"):
        assert same[name] == start[name]
    assert same["alarms"] == []
    assert start["win_rate"] is None


@torch.no_grad()
def test_the_kl_of_other_weights_is_that_of_their_distributions(folder: Path, found: Any):
    """Of the first token of each sample exact; the whole is a sum of such, so no less."""
    other = found["models"][str(folder / "other")]
    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    models = [
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        for name in ("other", "start")
    ]
    rows = [
        r for r in chat_rows(60) if split_of(r["prompt"][0]["content"]) in ("test", "reward-test")
    ]
    first = []
    for row in rows:
        ids = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        policy, ref = (model(ids).logits[0, -1].log_softmax(-1) for model in models)
        first.append((policy.exp() * (policy - ref)).sum().item())
    assert other["kl"]["mean"] > sum(first) / len(first) > 0.01
    assert other["kl"]["low"] < other["kl"]["mean"] < other["kl"]["high"]


def test_other_tokens_have_no_kl_and_are_judged_all_the_same(folder: Path, found: Any):
    foreign = found["models"][str(folder / "foreign")]
    assert foreign["kl"] is None
    assert any("tokenizer" in note for note in foreign["notes"])
    assert foreign["gold"]["mean"] is not None
    assert 0 <= foreign["win_rate"]["mean"] <= 1


def test_the_judge_decides_and_ties_count_half(folder: Path):
    judges = Judges(judge_function=f"{folder / 'judge.py'}:constant")
    found = evaluated(folder, "other", judges=judges, prompts=4)
    other = found["models"][str(folder / "other")]
    assert found["win_rate_by"] == "gold"
    assert found["prompts"] == 4
    assert other["gold"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert other["win_rate"]["mean"] == other["win_rate_chosen"]["mean"] == 0.5


def test_without_a_judge_the_reward_model_decides_and_without_both_nobody(folder: Path):
    by_reward = evaluated(folder, "other", judges=Judges(str(folder / "reward")), prompts=4)
    assert by_reward["win_rate_by"] == "score"
    assert by_reward["models"][str(folder / "other")]["win_rate"] is not None
    alone = evaluated(folder, "other", ref=None, prompts=4)
    assert alone["win_rate_by"] is None
    row = alone["models"][str(folder / "other")]
    assert (row["kl"], row["win_rate"], row["win_rate_chosen"]) == (None, None, None)
    assert row["length"]["mean"] > 0


def test_a_judge_that_is_the_reward_model_is_told(folder: Path):
    judges = Judges(str(folder / "reward"), judge=f"{folder / 'start'}/../reward")
    found = evaluated(folder, "other", judges=judges, prompts=4)
    assert any("no second opinion" in note for note in found["notes"])
    row = found["models"][str(folder / "other")]
    assert row["gold"] == row["score"]


def test_all_sides_on_request_and_the_same_prompts_each_time(folder: Path):
    first, second = (evaluated(folder, "start", ref=None, prompts=40, all=True) for _ in range(2))
    assert first["prompts"] == 40
    assert first == second == read_json(folder / "found.json")


def test_an_interval_is_students_over_prompts_and_a_share_stays_one():
    import numpy as np

    values = np.array([0.0, 0.5, 1.0, 1.0])
    half = 3.182446 * values.std(ddof=1) / 2
    found = interval(values)
    assert (found["low"], found["high"]) == pytest.approx((0.625 - half, 0.625 + half), abs=1e-5)
    assert interval(values, share=True)["high"] == 1.0


def test_a_planted_policy_that_says_nothing_sets_off_an_alarm(folder: Path):
    """Its output layer says <|im_end|> whatever came before."""
    silent = folder / "silent"
    write_policy(silent, chat_tokenizer(), tie_word_embeddings=False)
    weights = load_file(silent / "model.safetensors")
    weights["lm_head.weight"] *= 0
    weights["model.norm.weight"] *= 0
    save_file(weights, silent / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((silent / "generation_config.json").read_text())
    config["eos_token_id"] = list(range(1, 200))  # nearly every token ends it
    (silent / "generation_config.json").write_text(json.dumps(config))
    found = evaluated(folder, "silent", prompts=6)
    assert found["models"][str(silent)]["alarms"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "--data", "{rows}"], "MODEL"),
        (["evaluate", "{start}", "{start}", "--data", "{rows}"], "named twice"),
        (["evaluate", "{reward}", "--data", "{rows}"], "not a policy"),
        (["evaluate", "nosuch/x/y", "--data", "{rows}"], "nosuch/x/y"),
        (["evaluate", "{start}", "--data", "nosuch.jsonl"], "nosuch.jsonl"),
        (["evaluate", "{start}", "--data", "{rows}", "--judge", "{start}"], "not a reward model"),
        (["evaluate", "{start}", "--data", "{rows}", "--judge-function", "{judge}:no"], "`no`"),
        (["evaluate", "{start}", "--data", "{rows}", "--prompts", "0"], "--prompts"),
        (["evaluate", "{start}", "--data", "{rows}", "--sampels", "2"], "--sampels"),
        (["evaluate", "{start}", "--data", "{one}"], "test side"),
    ],
)
def test_wrong_input_is_one_clear_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], words: list[str], said: str,
):  # fmt: skip
    one = next(r for r in chat_rows(60) if split_of(r["prompt"][0]["content"]) == "sft")
    places = {name: folder / name for name in ("start", "reward")} | {
        "rows": folder / "rows.jsonl",
        "judge": folder / "judge.py",
        "one": write_rows(tmp_path / "one.jsonl", [one]),
    }
    filled = [word.format(**places) for word in words]
    monkeypatch.setattr("sys.argv", ["klash", *filled, "--json", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert said in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "found.json").exists()


def test_two_judges_are_one_too_many(folder: Path):
    with pytest.raises(InputError, match="one of them"):
        evaluated(folder, "start", judges=Judges(judge="a", judge_function="b:c"))


@pytest.mark.parametrize("name", ["os.path.x", "os.path.x.y", ".x", "nosuch.mine", "sys"])
def test_a_judges_module_that_is_none_is_an_input_error(name: str):
    with pytest.raises(InputError, match=r"judge\.function: there is no"):
        given_function(f"{name}:f")


def test_a_judges_file_runs_once(tmp_path: Path):
    counter, file = tmp_path / "count", tmp_path / "counting.py"
    file.write_text(
        f"open({str(counter)!r}, 'a').write('x')\n"
        "def score(prompts, completions):\n    return [1.0] * len(completions)\n"
    )
    for _ in range(3):
        judge = Judge(function="score", file=given_function(f"{file}:score"))
        assert judged_by_function(judge, ["a"], ["b"]).tolist() == [1.0]
    assert counter.read_text() == "x"


def test_one_score_that_is_no_number_costs_its_prompt_and_all_of_them_the_evaluation(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    real, judges = Scorer.score_inputs, Judges(str(folder / "reward"))

    def broken(self: Scorer, encoded: Any) -> torch.Tensor:
        scores = real(self, encoded)
        scores[0] = float("nan")
        return scores

    monkeypatch.setattr(Scorer, "score_inputs", broken)
    found = evaluated(folder, "other", judges=judges, prompts=4)
    assert found["prompts"] == 3
    assert found["prompts_left_out"] == {"not-finite": 1}
    monkeypatch.setattr(Scorer, "score_inputs", lambda _, e: torch.full((len(e),), float("nan")))
    with pytest.raises(InputError, match="a score is not a number"):
        evaluated(folder, "other", judges=judges, prompts=4)
