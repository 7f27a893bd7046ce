"""`klash score` and `klash filter`: scores against plain transformers, the rule by hand, stops."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import (
    END,
    EOS,
    byte_tokenizer,
    chat_tokenizer,
    write_encoder,
    write_policy,
    write_reward,
)
from checks import Klash
from datasets import Dataset, load_dataset
from preference_rows import chat_rows, text_rows, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from benchmarks.evaluation.judges import Judges
from benchmarks.evaluation.policies import Asked as EvaluateAsked
from benchmarks.evaluation.policies import Evaluating, evaluate_policies
from benchmarks.scoring import filtering
from benchmarks.scoring.filtering import Filtering, filter_rows
from benchmarks.scoring.models import as_folder
from benchmarks.scoring.rows import RowOptions
from benchmarks.scoring.rule import Rule
from benchmarks.scoring.sampling import Policy, Sampled
from benchmarks.scoring.score import accuracy_text, score
from shared.config import InputError
from shared.models.reward_files import save_normalisation
from shared.stages import read_json, read_jsonl, write_json

ROWS = 12
MARGIN = 0.7  # about half of the rows of these models pass it


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    write_policy(folder, chat_tokenizer())
    return folder


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As anybody saves one: without a normalisation. It likes words more than random bytes."""
    folder = tmp_path_factory.mktemp("reward")
    write_reward(folder, chat_tokenizer())
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] *= -1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "chats.jsonl", chat_rows(ROWS))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "texts.jsonl", text_rows(ROWS))


@torch.no_grad()
def plain_scores(folder: Path, rows: list[dict[str, Any]], side: str) -> list[float]:
    """As a reward model's card shows it: the template, or the text and EOS, one row at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        if isinstance(row["prompt"], str):
            ids = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token).input_ids
        else:
            ids = tokenizer.apply_chat_template([*row["prompt"], *row[side]], return_dict=False)
        found.append(model(torch.tensor([ids])).logits.item())
    return found


# --- scores ------------------------------------------------------------------------------------


def trained_by_trl(folder: Path, rows: list[dict[str, Any]], *, pad: bool) -> Path:
    from trl import RewardConfig, RewardTrainer

    tokenizer = chat_tokenizer() if pad else chat_tokenizer(pad_token=None)
    write_reward(start := folder / "start", tokenizer)
    arguments = RewardConfig(
        output_dir=str(folder / "out"), max_steps=2, per_device_train_batch_size=4,
        learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no", bf16=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder / "trained"))
    return folder / "trained"


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("rows", [chat_rows(ROWS), text_rows(ROWS)], ids=["chats", "texts"])
def test_a_reward_model_of_trls_scores_as_in_plain_transformers(
    tmp_path: Path, rows: list[dict[str, Any]], pad: bool
):
    """Without a pad token TRL takes EOS for it, and transformers reads the score before it."""
    folder = trained_by_trl(tmp_path, rows, pad=pad)
    data, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "scored.jsonl"
    score([str(data)], str(folder), out, RowOptions())
    found = read_jsonl(out)
    for side in ("chosen", "rejected"):
        expected = plain_scores(folder, rows, side)
        assert [row[f"score_{side}"] for row in found] == pytest.approx(expected, abs=1e-5)
        assert max(expected) - min(expected) > 1e-3
        assert [row[side] for row in found] == [row[side] for row in rows]


def test_answers_alone_get_one_score_and_keep_their_label(
    tmp_path: Path, reward: Path, texts: Path
):
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0}
        for n, row in enumerate(read_jsonl(texts))
    ]
    data, out = write_rows(tmp_path / "labels.jsonl", rows), tmp_path / "scored.jsonl"
    score([str(data)], str(reward), out, RowOptions())
    found = read_jsonl(out)
    expected = plain_scores(reward, read_jsonl(texts), "chosen")
    assert [row["score"] for row in found] == pytest.approx(expected, abs=1e-5)
    assert [row["label"] for row in found] == [row["label"] for row in rows]


def test_a_normalisation_beside_the_reward_model_is_applied(
    tmp_path: Path, reward: Path, texts: Path
):
    """Ours end at EOS, which of texts is the end in both."""
    shutil.copytree(reward, folder := tmp_path / "ours")
    save_normalisation(folder, offset=0.5, scale=2.0)
    score([str(texts)], str(folder), tmp_path / "scored.jsonl", RowOptions())
    raw = plain_scores(reward, read_jsonl(texts), "chosen")
    found = [row["score_chosen"] for row in read_jsonl(tmp_path / "scored.jsonl")]
    assert found == pytest.approx([(value - 0.5) / 2.0 for value in raw], abs=1e-5)


def test_what_a_reward_model_cannot_read_is_counted_and_the_rest_is_scored(
    tmp_path: Path, reward: Path, capsys: pytest.CaptureFixture[str]
):
    rows = text_rows(4)
    rows[1]["chosen"] = " good" * 100
    rows[2]["chosen"] = " "
    data = write_rows(tmp_path / "rows.jsonl", rows)
    score([str(data)], str(reward), tmp_path / "scored.jsonl", RowOptions())
    out = capsys.readouterr().out
    assert [row["prompt"] for row in read_jsonl(tmp_path / "scored.jsonl")] == [
        rows[n]["prompt"] for n in (0, 3)
    ]
    assert "1 over-long" in out
    assert "rows.jsonl, line 2" in out
    assert "1 empty" in out
    assert "2 of 4 rows" in out


@pytest.mark.parametrize("write", [write_reward, write_encoder])
def test_a_reward_model_of_one_score_decides_nothing(
    tmp_path: Path, chats: Path, policy: Path, write: Any
):
    """Among equals `--best-share` would keep whichever rows stand first."""
    write(tmp_path / "reward", chat_tokenizer())
    weights = load_file(tmp_path / "reward" / "model.safetensors")
    for name in weights:
        if name.startswith(("score", "classifier")):
            weights[name].zero_()
    save_file(weights, tmp_path / "reward" / "model.safetensors", metadata={"format": "pt"})
    out, flat = tmp_path / "out.jsonl", r"gives all \d+ answers the score 0: train it"
    with pytest.raises(InputError, match=flat):
        score([str(chats)], str(tmp_path / "reward"), out, RowOptions())
    for rule in (Rule(best_share=0.5), Rule(best_share=0.5, by="margin")):
        with pytest.raises(InputError, match=flat):
            filter_rows(Filtering((str(chats),), str(tmp_path / "reward"), out, rule))
    with pytest.raises(InputError, match=flat):
        evaluate_policies(
            Evaluating(
                (str(policy),),
                (str(chats),),
                EvaluateAsked(prompts=4),
                None,
                Judges(str(tmp_path / "reward")),
                Sampled(max_new_tokens=4),
            )
        )
    assert not out.exists()


def test_accuracy_is_told_with_wilsons_interval():
    """8 of 10: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96."""
    import numpy as np

    said = accuracy_text(np.array([1.0] * 7 + [0.0, 0.0] + [-1.0]))
    z, p, n = 1.959964, 0.8, 10
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((p + z**2 / (2 * n) + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    assert f"0.800 [{low:.3f}, {high:.3f}]" in said


# --- the rule ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "others", "stays"),
    [
        (Rule(), [0.5, 2.0, 4.0, -1.0], [True, False, False, True]),  # the second is a tie
        (Rule(margin=0.75), [0.5, 2.0, 4.0, -1.0], [False, False, False, True]),
        (Rule(floor=0.75), [0.5, 2.0, 4.0, -1.0], [True, True, False, True]),
        (Rule(threshold=1.0), None, [False, True, True, False]),
        (Rule(best_share=0.25), None, [False, False, True, False]),
        (Rule(best_share=0.5, by="margin"), [0.5, 2.0, 4.0, -1.0], [True, False, False, True]),
        (Rule(threshold=0.75, by="margin"), [0.5, 2.0, 4.0, -1.0], [False, False, False, True]),
    ],
)
def test_the_rule_against_a_table_by_hand(
    rule: Rule, others: list[float] | None, stays: list[bool]
):
    scores = torch.tensor([1.0, 2.0, 3.0, 0.0])
    against = None if others is None else torch.tensor(others)
    assert rule.stays(scores, against).tolist() == stays


# --- filtering ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filtered(
    tmp_path_factory: pytest.TempPathFactory, policy: Path, reward: Path, chats: Path
) -> Path:
    """Three samples a prompt, all in one go."""
    out = tmp_path_factory.mktemp("filtered") / "kept.jsonl"
    filter_rows(asked(out, policy, reward, chats))
    return out


def asked(out: Path, policy: Path, reward: Path, data: Path, **rule: Any) -> Filtering:
    sampled, rule = Sampled(max_new_tokens=6, samples=3), {"margin": MARGIN} | rule
    return Filtering((str(data),), str(reward), out, Rule(**rule), str(policy), sampled)


def test_a_row_stays_where_its_answer_beats_the_mean_of_the_samples(
    filtered: Path, reward: Path, chats: Path
):
    audit, rows = read_jsonl(filtered.with_suffix(".audit.jsonl")), read_jsonl(chats)
    assert [row["line"] for row in audit] == [*range(1, ROWS + 1)]
    expected = plain_scores(reward, rows, "chosen")
    assert [row["chosen"] for row in audit] == pytest.approx(expected, abs=1e-5)
    for row in audit:
        assert row["sample"] == pytest.approx(sum(row["samples"]) / 3, abs=1e-5)
        assert row["kept"] == (row["chosen"] - row["sample"] > MARGIN)
        assert len(row["texts"]) == 3
    assert 0 < sum(row["kept"] for row in audit) < ROWS
    kept = [row for row, said in zip(rows, audit, strict=True) if said["kept"]]
    assert read_jsonl(filtered) == kept


def test_the_samples_scores_are_those_of_their_texts(filtered: Path, reward: Path, chats: Path):
    """Of samples that were cut the turn stays open, of others it ends."""
    audit, rows = read_jsonl(filtered.with_suffix(".audit.jsonl")), read_jsonl(chats)
    tokenizer = AutoTokenizer.from_pretrained(reward)
    model = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32).eval()
    seen = 0
    for row, said in zip(rows, audit, strict=True):
        for text, found in zip(said["texts"], said["samples"], strict=True):
            if "\ufffd" in text:  # bytes that are no text are not read back
                continue
            opened = tokenizer.apply_chat_template(
                row["prompt"], tokenize=False, add_generation_prompt=True
            )
            ends = [opened + text, opened + text + "<|im_end|>\n"]
            with torch.no_grad():
                values = [
                    model(torch.tensor([tokenizer(end).input_ids])).logits.item() for end in ends
                ]
            assert min(abs(found - value) for value in values) < 1e-5
            seen += 1
    assert seen > 0


def test_the_control_is_as_large_and_of_the_same_rows(filtered: Path, chats: Path):
    kept, control = read_jsonl(filtered), read_jsonl(filtered.with_suffix(".random.jsonl"))
    rows = read_jsonl(chats)
    assert len(control) == len(kept)
    assert all(row in rows for row in control)
    assert len({json.dumps(row) for row in control}) == len(control)


def test_the_summary_says_by_which_models_and_what_came_of_it(filtered: Path):
    summary = read_json(filtered.with_suffix(".summary.json"))
    assert summary["kept"] == len(read_jsonl(filtered))
    assert summary["rows"] == summary["scored"] == ROWS
    assert "model.safetensors" in summary["of"]["reward model"]["files"]
    assert [path.name for path in filtered.parent.iterdir() if path.name.startswith(".")] == []


def test_the_best_sample_is_harder_to_beat_than_the_mean(
    tmp_path: Path, filtered: Path, policy: Path, reward: Path, chats: Path
):
    out = tmp_path / "kept.jsonl"
    filter_rows(asked(out, policy, reward, chats, against="best", margin=0.0))
    best, mean = (read_jsonl(f.with_suffix(".audit.jsonl")) for f in (out, filtered))
    for row, other in zip(best, mean, strict=True):
        assert row["samples"] == other["samples"]
        assert row["sample"] == max(row["samples"]) >= other["sample"]
        assert row["kept"] == (row["chosen"] > row["sample"])


def stop_at(monkeypatch: pytest.MonkeyPatch, chunk: int) -> list[int]:
    """Ctrl-C at the start of a chunk, counted from 1; the rows that were scored before."""
    real, scored = filtering.score_chunk, []

    def score_chunk(scorer: Any, rows: Any, **options: Any) -> Any:
        if len(scored) + 1 == chunk:
            raise KeyboardInterrupt
        scored.append(len(rows))
        return real(scorer, rows, **options)

    monkeypatch.setattr(filtering, "score_chunk", score_chunk)
    return scored


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filtering, "CHUNK", 4)


def whole(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in out.parent.iterdir() if path.is_file()}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("torn", [b"", b'{"chunk": "12'])
def test_a_stopped_filtering_goes_on_and_ends_as_in_one_go(
    tmp_path: Path, policy: Path, reward: Path, chats: Path,
    monkeypatch: pytest.MonkeyPatch, torn: bytes,
):  # fmt: skip
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    one, two = (folder / "kept.jsonl" for folder in folders)
    filter_rows(asked(one, policy, reward, chats))
    with monkeypatch.context() as patch:
        assert_scored = stop_at(patch, chunk=3)
        with pytest.raises(KeyboardInterrupt):
            filter_rows(asked(two, policy, reward, chats))
        assert assert_scored == [4, 4]
    assert [path.name for path in two.parent.iterdir()] == [".kept.jsonl.part"]
    with (two.parent / ".kept.jsonl.part" / "scores.jsonl").open("ab") as file:
        file.write(torn)  # what a kill leaves
    with monkeypatch.context() as patch:
        scored = stop_at(patch, chunk=9)
        filter_rows(asked(two, policy, reward, chats))
        assert scored == [4]
    assert whole(one) == whole(two)
    assert len(whole(two)) == 4


@pytest.mark.usefixtures("small_chunks")
def test_other_weights_start_over_and_other_rows_from_where_they_differ(
    tmp_path: Path, policy: Path, reward: Path, chats: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    out, folder = tmp_path / "kept.jsonl", tmp_path / "reward"
    write_reward(folder, chat_tokenizer())
    rows = read_jsonl(chats)
    data = write_rows(tmp_path / "rows.jsonl", rows)

    def attempt(chunk: int) -> list[int]:
        with monkeypatch.context() as patch:
            scored = stop_at(patch, chunk)
            with pytest.raises(KeyboardInterrupt):
                filter_rows(asked(out, policy, folder, data))
        return scored

    attempt(chunk=3)
    rows[5]["chosen"][0]["content"] = "something else"
    write_rows(data, rows)
    assert attempt(chunk=2) == [4]  # the first chunk was there; the second is done, the third not
    assert "others than before" in capsys.readouterr().out
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] += 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert attempt(chunk=3) == [4, 4]
    assert "another reward model: starting over" in capsys.readouterr().out


def test_a_second_filtering_with_another_margin_scores_nothing_again_after_an_empty_one(
    tmp_path: Path, policy: Path, reward: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
):
    """A rule that no row meets leaves no file, but the scores."""
    out = tmp_path / "kept.jsonl"
    with pytest.raises(InputError, match="no row stays"):
        filter_rows(asked(out, policy, reward, chats, margin=1e6))
    assert [path.name for path in tmp_path.iterdir()] == [".kept.jsonl.part"]
    with monkeypatch.context() as patch:
        assert stop_at(patch, chunk=1) == []
        filter_rows(asked(out, policy, reward, chats))
    assert out.is_file()


def test_scores_that_are_no_numbers_are_dropped_and_all_of_them_are_an_error(
    tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder, out = tmp_path / "reward", tmp_path / "kept.jsonl"
    write_reward(folder, chat_tokenizer())
    whole_thing = Filtering((str(chats),), str(folder), out, Rule(best_share=0.5))
    from shared.models.scorer import Scorer

    real = Scorer.score_inputs

    def broken(self: Scorer, encoded: Any) -> torch.Tensor:
        scores = real(self, encoded)
        scores[1] = math.nan
        return scores

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score_inputs", broken)
        filter_rows(whole_thing)
    audit = read_jsonl(out.with_suffix(".audit.jsonl"))
    assert [row.get("reason") for row in audit] == [None, "not-finite", *[None] * (ROWS - 2)]
    assert not audit[1]["kept"]
    assert sum(row["kept"] for row in audit) == round((ROWS - 1) / 2)
    assert "1 not-finite" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score_inputs", lambda self, e: torch.full((len(e),), math.nan))
        with pytest.raises(InputError, match="no row has a score"):
            filter_rows(
                Filtering((str(chats),), str(folder), tmp_path / "x.jsonl", Rule(threshold=0))
            )
    assert not (tmp_path / "x.jsonl").exists()


def test_trls_trainer_reads_what_stays(tmp_path: Path, filtered: Path, policy: Path):
    from trl import DPOConfig, DPOTrainer

    data = load_dataset("json", data_files=str(filtered), split="train", cache_dir=str(tmp_path))
    arguments = DPOConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2,
        report_to="none", use_cpu=True, save_strategy="no", bf16=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=str(policy),
        args=arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    assert math.isfinite(trainer.train().training_loss)


# --- wrong input: exit code 2, one line, no file ------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["score", "{chats}", "--reward-model", "nosuch/a/b"], ["nosuch/a/b", "no such folder"]),
        (["score", "{chats}", "--reward-model", "{policy}"], ["not a reward model"]),
        (["score", "nosuch.jsonl", "--reward-model", "{reward}"], ["nosuch.jsonl"]),
        (["score", "{prompts}", "--reward-model", "{reward}"], ["a prompt without an answer"]),
        (["score", "{chats}", "--reward-model", "{reward}", "--fromat", "x"], ["--fromat"]),
        (["score", "{chats}", "--reward-model", "{reward}", "--format", "shp"], ["history"]),
        (["filter", "{chats}", "--reward-model", "{reward}"], ["--policy, --threshold"]),
        (
            ["filter", "{chats}", "--reward-model", "{reward}", "--policy", "{reward}"],
            ["not a policy"],
        ),
        (
            ["filter", "{chats}", "--reward-model", "{reward}", "--best-share", "1.5"],
            ["--best-share"],
        ),
        (
            ["filter", "{chats}", "--reward-model", "{reward}", "--threshold", "1", "--floor", "1"],
            ["--floor goes with --policy"],
        ),
        (
            ["filter", "{chats}", "--reward-model", "{reward}", "--policy", "{policy}",
             "--samples", "0"],
            ["--samples"],
        ),
        (
            ["filter", "{roles}", "--reward-model", "{reward}", "--threshold", "0"],
            ["wrong-role", "roles.jsonl, lines 1, 2"],
        ),
        (["filter", "{labels}", "--reward-model", "{reward}", "--threshold", "0"], ["a label"]),
    ],
)  # fmt: skip
def test_wrong_input_is_one_clear_line_and_leaves_no_file(
    klash: Klash, tmp_path: Path, policy: Path, reward: Path, chats: Path,
    words: list[str], said: list[str],
):  # fmt: skip
    places = {
        "chats": chats,
        "policy": policy,
        "reward": reward,
        "prompts": write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}]),
        "labels": write_rows(
            tmp_path / "labels.jsonl", [{"prompt": "a", "completion": " b", "label": True}]
        ),
    }
    rows = chat_rows(2)
    for row in rows:
        row["rejected"][0]["role"] = "user"
    places["roles"] = write_rows(tmp_path / "roles.jsonl", rows)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = klash(*(word.format(**places) for word in words), "--out", "kept.jsonl")
    assert code == 2
    assert "Traceback" not in err + out
    for text in said:
        assert text in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_output_that_cannot_be_written_is_told_before_any_work(
    klash: Klash, reward: Path, chats: Path
):
    for out, said in (
        ("no/such/file.jsonl", "no such folder"),
        ("kept.parquet", "name it .jsonl"),
        (str(chats), "is what is read"),
    ):
        for words in (["score"], ["filter", "--best-share", "0.5"]):
            options = ["--reward-model", reward, "--out", out]
            code, _, err = klash(words[0], chats, *words[1:], *options)
            assert code == 2
            assert said in err
    assert len(read_jsonl(chats)) == ROWS


def test_a_tokenizer_without_a_chat_template_refuses_chats_of_a_policy(
    klash: Klash, tmp_path: Path, reward: Path, chats: Path
):
    write_policy(folder := tmp_path / "plain", chat_tokenizer(chat_template=None))
    words = ["filter", chats, "--reward-model", reward, "--policy", folder, "--out", "kept.jsonl"]
    code, _, err = klash(*words)
    assert code == 2
    assert "no chat template" in err
    assert not list(tmp_path.glob("*kept*"))


def test_the_commands_run_from_the_command_line(klash: Klash, reward: Path, chats: Path):
    assert klash("score", chats, "--reward-model", reward, "--out", "scored.jsonl")[0] == 0
    words = ["--best-share", "0.25", "--by", "margin", "--out", "kept.jsonl"]
    code, out, _ = klash("filter", "scored.jsonl", "--reward-model", reward, *words)
    assert code == 0
    assert "3 of 12 scored rows stay" in out
    scored = read_jsonl(Path("scored.jsonl"))
    margins = sorted((r["score_chosen"] - r["score_rejected"] for r in scored), reverse=True)
    kept = {json.dumps(row["prompt"]) for row in read_jsonl(Path("kept.jsonl"))}
    for row in scored:
        best = row["score_chosen"] - row["score_rejected"] >= margins[2]
        assert (json.dumps(row["prompt"]) in kept) == best


@torch.no_grad()
def test_an_encoder_with_tokens_of_its_own_filters_a_policys_answers(
    tmp_path: Path, policy: Path, texts: Path
):
    """It reads prompt and answer as its tokenizer's pair, through its own class."""
    write_encoder(folder := tmp_path / "encoder", byte_tokenizer(turned=True, pad_token="<pad>"))
    out = tmp_path / "kept.jsonl"
    sampled = Sampled(max_new_tokens=6)
    filter_rows(Filtering((str(texts),), str(folder), out, Rule(floor=0.5), str(policy), sampled))
    audit = read_jsonl(out.with_suffix(".audit.jsonl"))
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row, said in zip(read_jsonl(texts), audit, strict=True):
        for answer, found in ((row["chosen"], said["chosen"]), (said["texts"][0], said["sample"])):
            inputs = tokenizer(row["prompt"], answer, return_tensors="pt")
            inputs = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
            assert model(**inputs).logits.item() == pytest.approx(found, abs=1e-5)
    assert len(read_jsonl(out)) >= ROWS / 2


@pytest.mark.slow  # three processes import everything
def test_a_filtering_that_is_killed_goes_on_to_the_same_files(
    tmp_path: Path, policy: Path, reward: Path
):
    data = write_rows(tmp_path / "rows.jsonl", chat_rows(1500))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def start(folder: str) -> subprocess.Popen[bytes]:
        (tmp_path / folder).mkdir(exist_ok=True)
        words = ["filter", data, "--reward-model", reward, "--policy", policy, "--out"]
        words += [f"{folder}/kept.jsonl", "--max-new-tokens", "24", "--margin", "0.5"]
        program = [sys.executable, "-c", "from benchmarks.cli import main; main()"]
        return subprocess.Popen([*program, *map(str, words)], cwd=tmp_path, env=environment)

    assert start("whole").wait() == 0
    killed, log = start("killed"), tmp_path / "killed" / ".kept.jsonl.part" / "scores.jsonl"
    while not (log.is_file() and log.read_bytes().count(b"\n") >= 2):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [".kept.jsonl.part"]
    assert start("killed").wait() == 0
    assert whole(tmp_path / "killed" / "kept.jsonl") == whole(tmp_path / "whole" / "kept.jsonl")


# --- the models that are named ------------------------------------------------------------------


def listing(folder: Path, *ends: int, **tokenizer: Any) -> Path:
    """A policy whose generation_config.json lists these ends."""
    write_policy(folder, chat_tokenizer(**tokenizer))
    config = read_json(folder / "generation_config.json")
    write_json(folder / "generation_config.json", config | {"eos_token_id": list(ends)})
    return folder


def test_a_sound_policy_is_read_where_it_lies(tmp_path: Path):
    folder = listing(tmp_path / "sound", EOS, END)
    with as_folder(str(folder)) as found:
        assert found == folder


@pytest.mark.parametrize(
    ("ends", "tokens"),
    [
        # as Qwen2.5-Instruct ships: what pads is no EOS of the tokenizer, but a listed end
        ((END, EOS), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
        ((EOS,), {}),  # the template ends turns with a token that no file lists
        ((EOS, END), {"pad_token": "<|endoftext|>"}),
        ((EOS, END), {"pad_token": None}),
    ],
    ids=["pad is a listed end", "unlisted turn end", "pad is EOS", "no pad"],
)
def test_a_policy_that_is_not_sound_is_set_right_in_a_copy(
    tmp_path: Path, ends: tuple[int, ...], tokens: dict[str, Any]
):
    """transformers reads of the copy that <|im_end|> ends an answer, and that padding ends none."""
    folder = listing(tmp_path / "theirs", *ends, **tokens)
    with as_folder(str(folder)) as found:
        assert found != folder
        listed = GenerationConfig.from_pretrained(found).eos_token_id
        tokenizer = AutoTokenizer.from_pretrained(found)
        assert END in listed
        assert tokenizer.pad_token_id not in {*listed, tokenizer.eos_token_id, None}
        Policy(found, Sampled(max_new_tokens=4))
    assert not found.exists()


@pytest.mark.usefixtures("small_chunks")
def test_rows_that_went_at_a_chunks_end_go_from_the_log_too(
    tmp_path: Path, policy: Path, reward: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is written is what eight rows give on their own."""
    data, (one, two) = tmp_path / "rows.jsonl", (tmp_path / n / "kept.jsonl" for n in "ab")
    for out in (one, two):
        out.parent.mkdir()
    shutil.copy(chats, data)
    with pytest.raises(InputError, match="no row stays"):  # all twelve are in the log
        filter_rows(asked(one, policy, reward, data, margin=1e6))
    write_rows(data, read_jsonl(chats)[:8])
    with monkeypatch.context() as patch:
        assert stop_at(patch, chunk=1) == []
        filter_rows(asked(one, policy, reward, data))
    filter_rows(asked(two, policy, reward, data))
    assert whole(one) == whole(two)
    assert len(read_jsonl(one.with_suffix(".audit.jsonl"))) == 8


def test_another_version_of_a_library_or_of_the_code_starts_over(
    tmp_path: Path, policy: Path, reward: Path, chats: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    out = tmp_path / "kept.jsonl"
    for name, said in (("versions", "library versions"), ("code_of", "code")):
        with pytest.raises(InputError, match="no row stays"):
            filter_rows(asked(out, policy, reward, chats, margin=1e6))
        monkeypatch.setattr(filtering, name, lambda *_: {"torch": "0"})
        with pytest.raises(InputError, match="no row stays"):
            filter_rows(asked(out, policy, reward, chats, margin=1e6))
        assert f"another {said}: starting over" in capsys.readouterr().out


def test_an_output_inside_a_folder_that_is_read_is_refused(
    klash: Klash, tmp_path: Path, reward: Path, chats: Path
):
    (tmp_path / "rows").mkdir()
    shutil.copy(chats, tmp_path / "rows" / "train.jsonl")
    code, _, err = klash("score", "rows", "--reward-model", reward, "--out", "rows/scored.jsonl")
    assert code == 2
    assert "rows/scored.jsonl: lies in rows, which is read" in err
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["train.jsonl"]
