"""A user's rows -> comparisons: every format, every kind of broken row, and what is dropped why."""

import csv
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from shared.config import InputError
from shared.data.cleaning import Dropped
from shared.data.examples import Numbered, Reading
from shared.data.files import ALIASES, FORMATS
from shared.data.formats import find_format
from shared.data.rows import DataConfig, Row

Rows = list[dict[str, Any]]


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASK, YES, NO = say("user", "Why?"), say("assistant", "So."), say("assistant", "No.")
PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
CHAT = {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Read:
    """Everything that came of a reading."""

    def __init__(self, *sources: str, beside: Path = Path(), finish: bool = True, **config: Any):
        self.dropped: list[Dropped] = []
        reading = Reading(DataConfig(**config), finish=finish, on_drop=self.dropped.append)
        passed = list(reading.rows(sources, beside))
        self.kept: list[Numbered] = [one for one in passed if one.number not in reading.gone]
        self.report = reading.report
        assert self.report.read == self.report.kept + sum(self.report.dropped.values())
        assert self.report.kept == len(self.kept)
        assert self.report.dropped == Counter(drop.reason for drop in self.dropped)

    @property
    def rows(self) -> list[Row]:
        return [one.row for one in self.kept]


def read(tmp_path: Path, *rows: dict[str, Any], **config: Any) -> Read:
    return Read(write(tmp_path / "rows.jsonl", list(rows)).name, beside=tmp_path, **config)


# --- formats -----------------------------------------------------------------------------------

TEXTS, CHATS = Row("Why?", "So.", "No."), Row([ASK], YES, NO)
ABOUT: dict[str, tuple[dict[str, Any], list[Row]]] = {
    "pairs": (PAIR, [TEXTS]),
    "pairs of chats": (CHAT, [CHATS]),
    "pairs whose answers repeat the prompt": (
        {"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]}, [CHATS]),
    "a text and whole chats": (
        {"prompt": "Why?", "chosen": [ASK, YES], "rejected": [ASK, NO]}, [CHATS]),
    "a text and answers as messages": (
        {"prompt": "Why?", "chosen": [YES], "rejected": [NO]}, [CHATS]),
    "messages and answers as texts": (
        {"prompt": [ASK], "chosen": "So.", "rejected": "No."}, [CHATS]),
    "ultrafeedback": (
        {"prompt": "Why?", "prompt_id": "x", "chosen": [ASK, YES], "rejected": [ASK, NO],
         "messages": [ASK, YES], "score_chosen": 8.0, "score_rejected": 2.0}, [CHATS]),
    "implicit-pairs": (
        {"chosen": "Why? So.", "rejected": "Why? No."}, [Row("Why?", " So.", " No.")]),
    "skywork": (
        {"chosen": [ASK, YES], "rejected": [ASK, NO], "source": "somewhere"}, [CHATS]),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: Why?\n\nAssistant: So.",
         "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
        [Row("\n\nHuman: Why?\n\nAssistant:", " So.", " No.")]),
    "argilla": (
        {"instruction": "Why?", "chosen_response": "So.", "rejected_response": "No.",
         "chosen_avg_rating": 4.5, "rejected_avg_rating": 2.0}, [TEXTS]),
    "shp": (
        {"history": "Why?", "human_ref_A": "No.", "human_ref_B": "So.", "labels": 0,
         "score_A": 1, "score_B": 9}, [TEXTS]),
    "helpsteer3": (
        {"context": [ASK], "response1": "So.", "response2": "No.", "overall_preference": -2,
         "domain": "general"}, [CHATS]),
    "helpsteer3, the second": (
        {"context": [ASK], "response1": "No.", "response2": "So.", "overall_preference": 1},
        [CHATS]),
    "helpsteer2": (
        {"prompt": "Why?", "response_1": "No.", "response_2": "So.", "preference_strength": 3},
        [CHATS]),
    "summarize-from-feedback": (
        {"info": {"id": "1", "subreddit": "ask", "title": "T", "post": "Long."},
         "summaries": [{"text": " no"}, {"text": "yes "}], "choice": 1},
        [Row("SUBREDDIT: r/ask\n\nTITLE: T\n\nPOST: Long.\n\nTL;DR:", " yes", " no")]),
    "sharegpt": (
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Why?"}],
         "chosen": {"from": "gpt", "value": "So."}, "rejected": {"from": "gpt", "value": "No."}},
        [Row([say("system", "S"), ASK], YES, NO)]),
    "sharegpt with a label": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}],
         "kto_tag": True}, [Row([ASK], YES, label=True)]),
    "alpaca": (
        {"instruction": "Why", "input": "now?", "chosen": "So.", "rejected": "No.",
         "history": [["Hi", "Ho"]]},
        [Row([say("user", "Hi"), say("assistant", "Ho"), say("user", "Why\nnow?")], YES, NO)]),
    "alpaca, an answer": (
        {"instruction": "Why?", "input": "", "output": "So.", "system": "S"},
        [Row([say("system", "S"), ASK], YES)]),
    "labels": ({"prompt": "Why?", "completion": "So.", "label": False},
               [Row("Why?", "So.", label=False)]),
    "labels of chats": ({"prompt": [ASK], "completion": [YES], "label": True},
                        [Row([ASK], YES, label=True)]),
    "chat-labels": ({"messages": [ASK, YES], "label": True}, [Row([ASK], YES, label=True)]),
    "answers": ({"prompt": "Why?", "completion": "So."}, [Row("Why?", "So.")]),
    "chats": ({"messages": [ASK, YES]}, [Row([ASK], YES)]),
    "prompts": ({"prompt": "Why?"}, [Row("Why?", None)]),
    "prompts as chats": ({"prompt": [ASK]}, [Row([ASK], None)]),
    "rated": ({"prompt": "Why?", "completions": ["No.", "So.", "Hm."], "scores": [1, 3, 2]},
              [TEXTS]),
    "rated, ultrafeedback's": (
        {"instruction": "Why?", "completions": [
            {"response": "So.", "overall_score": 8.0}, {"response": "No.", "overall_score": 2.0}]},
        [TEXTS]),
    "content in parts": (
        {"prompt": [say("user", [{"type": "text", "text": "Why?"}])], "chosen": [YES],  # pyright: ignore
         "rejected": [NO]}, [CHATS]),
    "tools and words for the template": (
        {**CHAT, "tools": json.dumps([{"name": "f"}]), "chat_template_kwargs": {"thinking": False}},
        [Row([ASK], YES, NO, tools=[{"name": "f"}], template={"thinking": False})]),
    "columns that hold nothing": (
        {"prompt": [{**ASK, "tool_calls": None}], "chosen": [YES], "rejected": [NO], "tools": None},
        [CHATS]),
}  # fmt: skip


@pytest.mark.parametrize("name", ABOUT)
def test_a_row_of_each_format(name: str, tmp_path: Path):
    raw, expected = ABOUT[name]
    found = read(tmp_path, raw)
    assert found.rows == expected
    assert not [note for note in found.report.notes if note.startswith("column")]
    named = name if name in FORMATS or name in ALIASES else find_format(raw)
    assert read(tmp_path, raw, format=named).rows == expected


def test_every_format_has_a_row_here():
    assert {find_format(raw) for raw, _ in ABOUT.values()} == set(FORMATS)


def test_the_page_that_the_setting_names_has_every_format():
    assert "docs/own-data.md" in (DataConfig.model_fields["format"].description or "")
    page = (Path(__file__).parents[2] / "docs" / "own-data.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in FORMATS)


def test_what_nobody_reads_is_told(tmp_path: Path):
    found = read(tmp_path, {**PAIR, "id": 3, "persona": "a pirate"})
    assert found.report.notes["column not read: persona"] == 1
    assert found.report.notes["column not read: id"] == 0


def test_rated_answers_become_pairs_by_the_rule(tmp_path: Path):
    """best-worst: one pair; all: every two that differ; margin: those far enough apart."""
    raw = {"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [4, 1, 1, 2]}
    pairs = lambda **config: {(r.chosen, r.rejected) for r in read(tmp_path, raw, **config).rows}  # noqa: E731
    assert pairs() == {("a", "b")} or pairs() == {("a", "c")}
    assert pairs(rated="all") == {("a", "b"), ("a", "c"), ("a", "d"), ("d", "b"), ("d", "c")}
    assert pairs(rated="margin", margin=2.5) == {("a", "b"), ("a", "c")}
    with pytest.raises(ValueError, match="needs a margin above 0"):
        DataConfig(rated="margin")


def test_texts_as_chats(tmp_path: Path):
    assert read(tmp_path, PAIR, chat="messages").rows == [CHATS]
    raw = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Why?\n\nAssistant: So.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Why?\n\nAssistant: No.",
    }
    turns = [say("user", "Hi"), say("assistant", "Ho"), ASK]
    assert read(tmp_path, raw, chat="messages").rows == [Row(turns, YES, NO)]


# --- sources -----------------------------------------------------------------------------------

TWO = [PAIR, {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}]
LINES = "".join(json.dumps(row) + "\n" for row in TWO).encode()


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(PAIR), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(TWO)


def write_arrow(path: Path) -> None:
    table = pyarrow.Table.from_pylist(TWO)
    with pyarrow.ipc.new_stream(str(path), table.schema) as file:
        file.write_table(table)


def write_feather(path: Path) -> None:
    table = pyarrow.Table.from_pylist(TWO)
    with pyarrow.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)


def write_zst(path: Path) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(LINES)


def write_folder(path: Path) -> None:
    path.mkdir()
    (path / "a.jsonl").write_text(json.dumps(TWO[0]))
    (path / "b.json").write_text(json.dumps(TWO[1:], indent=2))
    (path / "README.md").write_text("words")


def write_hub_layout(path: Path) -> None:
    (path / "data").mkdir(parents=True)
    Dataset.from_list(TWO).to_parquet(str(path / "data" / "train-00000-of-00001.parquet"))
    Dataset.from_list(TWO[:1]).to_parquet(str(path / "data" / "test-00000-of-00001.parquet"))


WRITTEN: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "mark.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "windows.jsonl": lambda path: path.write_bytes(LINES.replace(b"\n", b"\r\n")),
    "lines.json": lambda path: path.write_bytes(LINES),
    "a.json": lambda path: path.write_text(json.dumps(TWO, indent=1)),
    "array.jsonl": lambda path: path.write_text(json.dumps(TWO)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(TWO).encode())),
    "a.jsonl.zst": write_zst,
    "a.csv": write_csv,
    "a.tsv": lambda path: write_csv(path, "\t"),
    "a.parquet": lambda path: Dataset.from_list(TWO).to_parquet(str(path)),
    "a.arrow": write_arrow,
    "file.arrow": write_feather,
    "saved": lambda path: Dataset.from_list(TWO).save_to_disk(str(path)),
    "folder": write_folder,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_source_of_each_kind(name: str, tmp_path: Path):
    WRITTEN[name](tmp_path / name)
    found = Read(name, beside=tmp_path)
    assert [row._asdict() for row in found.rows] == [Row(*row.values())._asdict() for row in TWO]
    numbers = [1, 1] if name == "folder" else [1, 2]
    assert [one.where.number for one in found.kept] == numbers


def test_labels_of_a_column_with_gaps_are_read(tmp_path: Path):
    """pandas holds them as 1.0 and 0.0, in Parquet and in CSV."""
    rows = [{"prompt": f"{n}?", "completion": "So.", "label": float(n % 2)} for n in range(4)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    Dataset.from_list(rows).to_csv(str(tmp_path / "a.csv"))
    for name in ("a.parquet", "a.csv"):
        found = Read(name, beside=tmp_path)
        assert [row.label for row in found.rows] == [False, True] * 2


def test_an_answer_that_is_json_of_its_own_stays_a_text(tmp_path: Path):
    answers = {"chosen": '{"value": "user"}', "rejected": '[{"role": "admin"}]'}
    assert read(tmp_path, {"prompt": "?", **answers}).rows == [Row("?", *answers.values())]


def test_a_name_that_no_file_can_have(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        Read("x" * 300 + ".jsonl", beside=tmp_path)


def test_several_sources_are_read_in_order(tmp_path: Path):
    write(tmp_path / "a.jsonl", TWO[:1])
    write(tmp_path / "b.jsonl", TWO[1:])
    assert [row.prompt for row in Read("b.jsonl", "a.jsonl", beside=tmp_path).rows] == [
        "Who?", "Why?"
    ]  # fmt: skip


def test_splits_of_a_folder_laid_out_like_a_dataset_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_hub_layout(tmp_path / "set")
    assert len(Read("set", beside=tmp_path, split="train").rows) == 2
    found = Read("set", beside=tmp_path, split="test")
    assert str(found.kept[0].where) == "set:test, row 1"
    with pytest.raises(InputError, match=r"no split `dev` \(there are"):
        Read("set", beside=tmp_path, split="dev")


def test_a_saved_dict_of_datasets_needs_a_split(tmp_path: Path):
    sets = {"train": Dataset.from_list(TWO), "test": Dataset.from_list(TWO[:1])}
    DatasetDict(sets).save_to_disk(str(tmp_path / "set"))  # pyright: ignore
    assert len(Read("set", beside=tmp_path, split="test").rows) == 1
    with pytest.raises(InputError, match="several splits; set `split`"):
        Read("set", beside=tmp_path)


def test_messages_survive_columns(tmp_path: Path):
    """Parquet gives every message every key, most of them empty."""
    rows = [CHAT, {**CHAT, "prompt": [say("system", "S"), {**ASK, "name": "n"}]}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    first, second = Read("a.parquet", beside=tmp_path).rows
    assert first == CHATS
    assert second.prompt == [say("system", "S"), {**ASK, "name": "n"}]


# --- what is dropped ---------------------------------------------------------------------------

GOOD = {"prompt": "Where?", "chosen": "Here.", "rejected": "There."}
GOOD_CHAT = {"prompt": [say("user", "Where?")], "chosen": [YES], "rejected": [NO]}
REVERSED = {**PAIR, "chosen": "No.", "rejected": "So."}
DROPS: dict[str, tuple[Rows, dict[str, int]]] = {
    "an empty answer": ([GOOD, {**PAIR, "chosen": ""}], {"empty": 1}),
    "a blank answer": ([GOOD, {**PAIR, "rejected": " \n\t"}], {"empty": 1}),
    "a blank prompt": ([GOOD, {**PAIR, "prompt": "  "}], {"empty": 1}),
    "a blank message": ([GOOD_CHAT, {**CHAT, "chosen": [say("assistant", "   ")]}], {"empty": 1}),
    "no break space alone": ([GOOD, {**PAIR, "chosen": "\u00a0"}], {"empty": 1}),
    "characters that no one sees": (
        [GOOD, {**PAIR, "chosen": "\u200b\ufeff"}, {**PAIR, "rejected": "\u00ad \u2060"}],
        {"empty": 2}),
    "a user who says nothing behind a system message": (
        [GOOD_CHAT, {**CHAT, "prompt": [say("system", "S"), say("user", " ")]}], {"empty": 1}),
    "an answer that is the prompt alone": ([GOOD_CHAT, {**CHAT, "chosen": [ASK]}], {"empty": 1}),
    "identical": ([GOOD, {**PAIR, "rejected": "So."}], {"identical": 1}),
    "duplicate": ([PAIR, PAIR, PAIR], {"duplicate": 2}),
    "duplicate, other ids": ([{**PAIR, "id": 1}, {**PAIR, "id": 2}], {"duplicate": 1}),
    "contradiction": ([GOOD, PAIR, REVERSED], {"contradiction": 2}),
    "contradiction, and again": ([GOOD, PAIR, REVERSED, PAIR], {"contradiction": 3}),
    "duplicate, then contradiction": (
        [GOOD, PAIR, PAIR, REVERSED], {"duplicate": 1, "contradiction": 2}),
    "a repeated prompt": ([PAIR, {**PAIR, "chosen": "Else."}], {}),
    "labels both ways": (
        [{"prompt": "p", "completion": c, "label": label}
         for c, label in (("a", True), ("b", False), ("a", False))], {"contradiction": 2}),
    "a role that is wrong": (
        [GOOD_CHAT, {**CHAT, "rejected": [say("user", "No.")]}], {"wrong-role": 1}),
    "a role that nobody knows": (
        [GOOD_CHAT, {**CHAT, "rejected": [say("bot7", "No.")]}], {"wrong-role": 1}),
    "a prompt that ends with an answer": (
        [GOOD_CHAT, {**CHAT, "prompt": [ASK, YES]}], {"wrong-role": 1}),
    "a chat that ends with the user": (
        [{"messages": [ASK, YES], "label": True}, {"messages": [ASK], "label": True}],
        {"wrong-role": 1}),
    "several turns": (
        [GOOD_CHAT, {**CHAT, "chosen": [YES, ASK, YES]}], {"several-turns": 1}),
    "two answers in a row": ([GOOD_CHAT, {**CHAT, "chosen": [YES, YES]}], {"several-turns": 1}),
    "a chat said twice": (
        [GOOD_CHAT, {**CHAT, "chosen": [say("system", "S"), ASK, YES],
                     "rejected": [say("system", "S"), ASK, NO]}], {"prompt-mismatch": 1}),
    "prompts that differ": (
        [{"chosen": [ASK, YES], "rejected": [ASK, NO]},
         {"chosen": [ASK, YES], "rejected": [say("user", "Who?"), NO]}], {"prompt-mismatch": 1}),
    "a text that is another prompt": (
        [{"prompt": "Why?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
         {"prompt": "Who?", "chosen": [ASK, YES], "rejected": [ASK, NO]}], {"prompt-mismatch": 1}),
    "dialogues that differ": (
        [{"chosen": f"\n\nHuman: {q}\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
         for q in ("q", "r")], {"prompt-mismatch": 1}),
    "a dialogue without an answer": (
        [{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
         {"chosen": "\n\nHuman: q\n\nAssistant: c", "rejected": "\n\nHuman: q"},
         {"chosen": "\n\nHuman: q\n\nAssistant: c\n\nHuman: r",
          "rejected": "\n\nHuman: q\n\nAssistant: d"}],
        {"wrong-role": 2}),
    "texts that share nothing": (
        [{"chosen": "a b", "rejected": "a c"}, {"chosen": "x", "rejected": "y"}],
        {"prompt-mismatch": 1}),
    "a preference of 0": (
        [{"context": [ASK], "response1": "a", "response2": "b", "overall_preference": p}
         for p in (0, 1)], {"tie": 1}),
    "equal scores": ([GOOD, {**PAIR, "score_chosen": 5, "score_rejected": 5.0}], {"tie": 1}),
    "equal ratings": (
        [{"prompt": "p", "answers": ["a", "b"], "ratings": r} for r in ([1, 2], [3, 3])],
        {"tie": 1}),
    "one rated answer": (
        [{"prompt": "p", "answers": a, "ratings": [*range(len(a))]} for a in (["a", "b"], ["a"])],
        {"single-answer": 1}),
    "a score that is not a number": (
        [GOOD, {**PAIR, "score_chosen": float("nan"), "score_rejected": 1}], {"not-finite": 1}),
    "a score of 400 digits": (
        [GOOD, {**PAIR, "score_chosen": 10**400, "score_rejected": 1}], {"not-finite": 1}),
    "the same said through other template options": (
        [CHAT, {**CHAT, "chat_template_kwargs": {"enable_thinking": True}}], {}),
    "an infinite rating": (
        [{"prompt": "p", "answers": ["a", "b"], "ratings": r} for r in ([1, 2], [1, float("inf")])],
        {"not-finite": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPS)
def test_what_is_dropped_and_why(name: str, tmp_path: Path):
    rows, expected = DROPS[name]
    found = read(tmp_path, *rows)
    assert dict(found.report.dropped) == expected
    for drop in found.dropped:
        line = json.loads(drop.as_json())
        assert line["file"].endswith("rows.jsonl") and 1 <= line["line"] <= len(rows)


def test_a_repeated_prompt_is_counted_and_stays(tmp_path: Path):
    found = read(tmp_path, PAIR, {**PAIR, "chosen": "Else."}, GOOD)
    assert found.report.kept == 3
    assert found.report.notes["repeated prompts"] == 1


# --- what cannot be read -----------------------------------------------------------------------


def lines(*more: bytes) -> bytes:
    return b"\n".join([json.dumps(GOOD).encode(), *more, b""])


def line(row: Any) -> bytes:
    return lines(json.dumps(row).encode())


UNREADABLE: dict[str, tuple[bytes, str]] = {  # the second line, and what is said of it
    "half an object": (lines(b'{"prompt": "a", "chosen"'), "not JSON"),
    "words": (lines(b"once upon a time"), "not JSON"),
    "python's quotes": (lines(b"{'prompt': 'a'}"), "not JSON"),
    "a comma too many": (lines(b'{"prompt": "a",}'), "not JSON"),
    "two objects a line": (lines(LINES.replace(b"\n", b" ")), "not JSON"),
    "bytes that are no text": (lines(b'{"prompt": "\xff\xfe"}'), "not UTF-8"),
    "latin-1": (lines('{"prompt": "für"}'.encode("latin-1")), "not UTF-8"),
    "a zero byte": (lines(b'{"prompt": "a\x00"}'), "not JSON"),
    "half a surrogate": (lines(b'{"prompt": "a", "chosen": "\\ud800", "rejected": "b"}'),
                         "surrogate"),
    "a key twice": (lines(b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}'),
                    "`chosen` is there twice"),
    "brackets without end": (lines(b"[" * 20000), "nested too deeply"),
    "a number of many digits": (lines(b'{"prompt": ' + b"9" * 5000 + b"}"), "not JSON"),
    "a list": (line([1, 2]), "not an object"),
    "a text": (line("a"), "not an object"),
    "nothing": (line(None), "not an object"),
    "no keys": (line({}), "`prompt` is missing"),
    "a side that is missing": (line({"prompt": "a", "chosen": "b"}), "`rejected` is missing"),
    "a prompt that is missing": (line({"Prompt": "a", "chosen": "b", "rejected": "c"}),
                                 "implicit-pairs"),
    "a side that is a number": (line({**PAIR, "chosen": 3}), "three texts"),
    "a side that is nothing": (line({**PAIR, "rejected": None}), "three texts"),
    "a prompt that is nothing": (line({**PAIR, "prompt": None}), "three texts"),
    "a prompt that is an object": (line({**PAIR, "prompt": {"text": "a"}}), "three texts"),
    "a text beside messages": (line({**CHAT, "chosen": "So."}), "three texts"),
    "a chat among texts": (
        line(CHAT), "pairs of chats, where the rows before it are pairs of texts"),
    "another format": (line({"prompt": "a", "completion": "b", "label": True}),
                       "in the format labels, where the rows before it are pairs"),
    "no messages": (line({**CHAT, "chosen": []}), "`chosen` must be a list of messages"),
    "messages that are texts": (line({**CHAT, "prompt": ["a"]}), "`prompt[0]` must be a message"),
    "a message without content": (line({**CHAT, "prompt": [{"role": "user"}]}),
                                  "`prompt[0]` must be a message"),
    "a message without role": (line({**CHAT, "chosen": [{"content": "a"}]}),
                               "`chosen[0]` must be a message"),
    "content that is a number": (line({**CHAT, "chosen": [say("assistant", 3)]}),  # pyright: ignore
                                 "content` must be a text"),
    "content that is nothing": (line({**CHAT, "chosen": [say("assistant", None)]}),  # pyright: ignore
                                "content` must be a text"),
    "a picture": (line({**CHAT, "prompt": [say("user", [{"type": "image"}])]}),  # pyright: ignore
                  "not text"),
    "a column of pictures": (line({**PAIR, "images": ["a.png"]}), "only text is read"),
    "a system text beside texts": (line({**PAIR, "system": "S"}), "set chat = messages"),
    "two system messages": (
        line({**CHAT, "prompt": [say("system", "S"), ASK], "system": "T"}), "have their own"),
    "tools that are no JSON": (line({**CHAT, "tools": "{"}), "`tools` is not JSON"),
    "tools nested without end": (line({**CHAT, "tools": "[" * 20000}), "nested too deeply"),
    "half a surrogate in tools": (line({**CHAT, "tools": '["\\ud800"]'}), "surrogate"),
    "tools that are no list": (line({**CHAT, "tools": {"a": 1}}), "`tools` must be a list"),
    "messages as JSON in a text": (line({k: json.dumps(v) for k, v in CHAT.items()}),
                                   "a text that holds messages"),
    "messages as Python prints them": (line({k: repr(v) for k, v in CHAT.items()}),
                                       "a text that holds messages"),
    "an answer as Python prints it": (line({**PAIR, "rejected": repr(NO)}),
                                      "a text that holds messages"),
    "a role that is nothing": (
        line({**CHAT, "chosen": [{"role": None, "content": "a"}]}), "(found role None)"),
    "a score that is a word": (line({**PAIR, "score_chosen": "good", "score_rejected": 1}),
                               "`score_chosen` must be a number"),
}  # fmt: skip
OTHERS: dict[str, tuple[Rows, str]] = {  # two rows, of which the second is broken
    "a label that is a word": (
        [{"prompt": "p", "completion": "a", "label": label} for label in (True, "good")],
        "`label` must be true or false"),
    "a label that is 2": (
        [{"prompt": "p", "completion": "a", "label": label} for label in (1, 2)],
        "`label` must be true or false"),
    "answers alone, and a question beside them": (
        [{"chosen": "I say: a", "rejected": "I say: b"},
         {"question": "q", "chosen": "I say: a", "rejected": "I say: c"}],
        "`question` is not read: rename it to `prompt`"),
    "one message each, and an instruction beside them": (
        [{"chosen": [ASK, YES], "rejected": [ASK, NO]},
         {"query": "q", "chosen": [YES], "rejected": [NO]}],
        "`query` is not read: rename it to `prompt`"),
    "a label that is missing": (
        [{"prompt": "p", "completion": "a", "label": True}, {"prompt": "p", "completion": "b"}],
        "in the format answers"),
    "a preference that is a word": (
        [{"context": [ASK], "response1": "a", "response2": "b", "overall_preference": p}
         for p in (1, "first")], "must be a number"),
    "more answers than scores": (
        [{"prompt": "p", "answers": ["a", "b"], "scores": s} for s in ([1, 2], [1])],
        "2 answers have 1 scores"),
    "answers that are no texts": (
        [{"prompt": "p", "answers": a, "scores": [1, 2]} for a in (["a", "b"], ["a", 3])],
        "must be a text with a score"),
    "a choice that is 2": (
        [{"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": c}
         for c in (0, 2)], "`choice` must be 0 or 1"),
    "a post without text": (
        [{"info": i, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
         for i in ({"post": "p"}, {"title": "t"})], "text of a `post`"),
    "alpaca's half a pair": (
        [{"instruction": "i", "chosen": "a", "rejected": "b"}, {"instruction": "i", "chosen": "a"}],
        "no `output`, and no `chosen` with `rejected`"),
    "a history that is a text": (
        [{"instruction": "i", "output": "o", "history": h} for h in ([["a", "b"]], "once")],
        "`history` must be a list"),
    "a history that is no pairs": (
        [{"instruction": "i", "output": "o", "history": h} for h in ([["a", "b"]], ["a"])],
        "`history` must be pairs"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*UNREADABLE, *OTHERS])
def test_a_row_that_cannot_be_read_is_named_and_counted(name: str, tmp_path: Path):
    if name in UNREADABLE:
        content, said = UNREADABLE[name]
        if b'"role"' in content and "among" not in name:
            content = json.dumps(GOOD_CHAT).encode() + b"\n" + content.split(b"\n", 1)[1]
        (tmp_path / "rows.jsonl").write_bytes(content)
    else:
        rows, said = OTHERS[name]
        write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: ") as error:
        Read("rows.jsonl", beside=tmp_path, finish=False)
    assert said in str(error.value)
    for found in (
        Read("rows.jsonl", beside=tmp_path),
        Read("rows.jsonl", beside=tmp_path, finish=False, max_bad_rows=1),
    ):
        assert found.report.dropped == {"undecodable": 1}
        assert found.report.kept == 1
        assert found.dropped[0].where.number == 2


FILES: dict[str, tuple[str, bytes, str]] = {  # files of which nothing more can be read
    "no rows": ("a.jsonl", b"", "no rows"),
    "blank lines": ("a.jsonl", b"\n \n\n", "no rows"),
    "an empty array": ("a.json", b"[]", "no rows"),
    "UTF-16": ("a.jsonl", LINES.decode().encode("utf-16"), "UTF-16"),
    "an object over several lines": ("a.json", b'{\n"prompt": "a"\n}', "over several lines"),
    "an array that is cut off": ("a.json", json.dumps(TWO).encode()[:-5], "row 2: not JSON"),
    "an array without a comma": ("a.json", b'[{"prompt": "a"} {"prompt": "b"}]', "no , or ]"),
    "two arrays": ("a.json", b'[{"prompt": "a"}][]', "something follows"),
    "a packed file that is cut off": ("a.jsonl.gz", gzip.compress(LINES)[:-20], "cannot read"),
    "a packed file that is none": ("a.jsonl.gz", LINES, "cannot read"),
    "a zst file that is none": ("a.jsonl.zst", LINES, "cannot read"),
    "a Parquet file that is none": ("a.parquet", LINES, "cannot read"),
    "an Arrow file that is none": ("a.arrow", LINES, "cannot read"),
    "a CSV of another encoding": ("a.csv", "prompt,chosen\nfür,b\n".encode("latin-1"), "UTF-8"),
    "a column twice": ("a.csv", b"prompt,prompt\na,b\n", "`prompt` is there twice"),
    "a quote without end": ("a.csv", b'prompt,chosen,rejected\n"a,b,c\n', "cannot read"),
    "another kind of file": ("a.pdf", b"%PDF", "unknown kind of file"),
    "rows inside of an object": (
        "a.json",
        json.dumps({"data": TWO}).encode(),
        "if the rows are in `data`, write that list",
    ),
    "no known keys": ("a.jsonl", b'{"question": "a", "answer": "b"}\n', "in no known format"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path):
    file, content, said = FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        Read(file, beside=tmp_path)
    assert file in str(error.value)


def test_a_line_of_csv_with_too_few_cells(tmp_path: Path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\na,b,c\nd,e\n")
    found = Read("a.csv", beside=tmp_path)
    assert found.report.kept == 1
    assert str(found.dropped[0].where).endswith("a.csv, row 2")


def test_an_answer_of_csv_that_is_json_stays_a_text(tmp_path: Path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([PAIR, ["Why?", '{"a": 1}', '[{"a": 2}]']])
    (found,) = Read("a.csv", beside=tmp_path).rows
    assert found == Row("Why?", '{"a": 1}', '[{"a": 2}]')


def test_a_second_file_that_begins_with_a_broken_row(tmp_path: Path):
    write(tmp_path / "a.jsonl", [PAIR])
    write(tmp_path / "b.jsonl", [{"question": "a"}, GOOD])
    with pytest.raises(InputError, match=r"b\.jsonl, line 1: .*in no known format"):
        Read("a.jsonl", "b.jsonl", beside=tmp_path, finish=False)
    found = Read("a.jsonl", "b.jsonl", beside=tmp_path)
    assert found.report.dropped == {"undecodable": 1} and found.report.kept == 2


def test_a_file_that_is_not_there_and_a_folder_of_nothing(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        Read("none.jsonl", beside=tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="no data files"):
        Read("folder", beside=tmp_path)
    with pytest.raises(InputError, match="no format `pear`"):
        read(tmp_path, PAIR, format="pear")


def test_a_format_that_is_named_and_wrong_says_what_is_missing(tmp_path: Path):
    with pytest.raises(InputError, match=r"line 1: `history` is missing \(format shp"):
        read(tmp_path, PAIR, format="shp", finish=False)


# --- any rows ----------------------------------------------------------------------------------

WORDS = st.sampled_from(["", " ", "a", "b", "ab"])
ROWS = st.fixed_dictionaries({"prompt": WORDS, "chosen": WORDS, "rejected": WORDS})


@given(st.lists(ROWS, max_size=12))
def test_what_stays_is_clean_and_every_row_is_counted(rows: Rows):
    """No blank, no row twice, none both ways round; `Read` holds the sums."""
    with TemporaryDirectory() as folder:
        found = Read(str(write(Path(folder) / "rows.jsonl", [GOOD, *rows])))
    kept = {(row.prompt, row.chosen, row.rejected) for row in found.rows}
    assert len(kept) == len(found.rows)
    assert not {(p, r, c) for p, c, r in kept} & kept
    assert all(part.strip() for row in kept for part in row)  # pyright: ignore
    usable = {tuple(row[k] for k in PAIR) for row in rows if all(map(str.strip, row.values()))}
    alone = {r for r in usable if r[1] != r[2] and (r[0], r[2], r[1]) not in usable}
    assert kept == alone | {tuple(GOOD.values())}


# --- real files --------------------------------------------------------------------------------


@pytest.mark.skipif("KLASH_REAL_DATA" not in os.environ, reason="KLASH_REAL_DATA names no folder")
@pytest.mark.parametrize(
    ("file", "format", "rows", "dropped"),
    [
        ("hh-harmless-test.jsonl.gz", "hh-rlhf", 2312, {"prompt-mismatch": 5, "empty": 4}),
        ("dpo-en-demo.json", "sharegpt", 300, {"duplicate": 5}),
        ("kto-en-demo.json", "chat-labels", 300, {}),
    ],
)
def test_real_files(file: str, format: str, rows: int, dropped: dict[str, int]):
    found = Read(file, beside=Path(os.environ["KLASH_REAL_DATA"]))
    assert (found.report.format, found.report.read) == (format, rows)
    assert dict(found.report.dropped) == dropped
    if format == "chat-labels":
        assert found.report.desirable == found.report.undesirable == 150
