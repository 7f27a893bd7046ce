"""Broken model folders: each is one line that names the folder or file and the way out.

One fault a test, in a folder that was sound, through every door that a user's folder comes in by.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import CHAT, EOS, byte_tokenizer, chat_tokenizer, write_policy, write_reward
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.cli import main
from shared.config import InputError
from shared.data.chat import Encoder
from shared.data.rows import Row, Unusable
from shared.models.load import ModelConfig, load_policy, special_ids
from shared.models.opening import open_model, open_tokenizer, require_embeddings
from shared.models.pretrained import take_pretrained
from shared.models.scorer import Answered, Scorer

Fault = Callable[[Path], None]


def edit(file: str, **changes: Any) -> Fault:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without(*files: str) -> Fault:
    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return change


def holding(file: str, text: str | bytes) -> Fault:
    def change(folder: Path) -> None:
        data = text.encode() if isinstance(text, str) else text
        (folder / file).write_bytes(data)

    return change


def weights(change: Callable[[dict[str, Any]], object]) -> Fault:
    def apply(folder: Path) -> None:
        values = load_file(folder / "model.safetensors")
        change(values)
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def sharded(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")


def sharded_without(pattern: str) -> Fault:
    def change(folder: Path) -> None:
        sharded(folder)
        sorted(folder.glob(pattern))[-1].unlink()

    return change


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_adapter(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    for path in folder.iterdir():
        path.unlink()
    adapted.save_pretrained(folder)


def as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("weights")


def as_reward_model(folder: Path) -> None:
    shutil.rmtree(folder)
    write_reward(folder, chat_tokenizer())


def larger_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    tokenizer.save_pretrained(folder)


def unmerged(values: dict[str, Any]) -> None:
    for layer in range(2):
        for side in "AB":
            values[f"model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"] = torch.zeros(2, 2)


def broken(values: dict[str, Any]) -> None:
    values["model.norm.weight"][0] = float("nan")


INDEX = "model.safetensors.index.json"
QUANTISED = {"quant_method": "gptq", "bits": 4}
FAULTS: dict[str, tuple[Fault, str]] = {
    "no folder": (
        shutil.rmtree,
        r"no such folder or file|no model here \(config.json is missing\)",
    ),
    "no config": (without("config.json"), r"no model here \(config.json is missing\)"),
    "config not JSON": (holding("config.json", "{'a': 1}"), r"config\.json: not JSON"),
    "config not text": (holding("config.json", b"\xff\xfe\x00"), r"config\.json: not JSON"),
    "config a list": (holding("config.json", "[]"), r"config\.json: not a JSON object"),
    "config without type": (edit("config.json", model_type=None), r"model_type None is none"),
    "unknown type": (edit("config.json", model_type="lama"), r"model_type 'lama' is none"),
    "code of its own": (
        edit("config.json", model_type="mine", auto_map={"AutoModel": "m.M"}),
        "code of its own is never run",
    ),
    "a field of a wrong kind": (edit("config.json", hidden_size="wide"), "cannot load it.*hidden"),
    "heads that do not divide": (
        edit("config.json", num_attention_heads=5, head_dim=None),
        "cannot load it|is .* in the file",
    ),
    "heads of none": (edit("config.json", num_attention_heads=0), "cannot load it"),
    "a pad token that is none": (edit("config.json", pad_token_id=9999), "cannot load it"),
    "a part that is no object": (
        edit("config.json", text_config=[1]),
        "cannot load it|text_config",
    ),
    "architectures no list": (
        edit("config.json", architectures="LlamaForCausalLM"),
        "`architectures` is a list",
    ),
    "architectures no names": (edit("config.json", architectures=[1]), "`architectures` is a list"),
    "a config that was not fetched": (
        holding("config.json", "version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "another size": (
        edit("config.json", intermediate_size=64),
        r"is \(32, 48\) in the file and \(32, 64\)",
    ),
    "another architecture": (
        edit("config.json", architectures=["BertForMaskedLM"]),
        "not a policy",
    ),
    "a trunk without a head": (edit("config.json", architectures=["LlamaModel"]), "not a policy"),
    "a reward model": (as_reward_model, "not a policy but a reward model or classifier"),
    "quantised": (edit("config.json", quantization_config=QUANTISED), r"quantised \(gptq\)"),
    "no weights": (without("model.safetensors"), "no weights here"),
    "weights cut": (cut_weights, r"model\.safetensors: cut or damaged"),
    "weights empty": (holding("model.safetensors", b""), r"model\.safetensors: cut or damaged"),
    "weights that are a page": (
        holding("model.safetensors", b"<!DOCTYPE html>" * 100),
        r"model\.safetensors: cut or damaged",
    ),
    "a Git LFS pointer": (
        holding("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git lfs pull",
    ),
    "pickled weights": (pickled, r"only pickled weights \(pytorch_model\.bin\)"),
    "a shard missing": (sharded_without("model-*.safetensors"), f"{INDEX} names model-0.*missing"),
    "the index missing": (sharded_without(INDEX), f"{INDEX} is missing"),
    "an index not JSON": (
        lambda folder: (sharded(folder), (folder / INDEX).write_text("{"))[0],
        r"index\.json: not JSON",
    ),
    "an index of no files": (
        lambda folder: (sharded(folder), edit(INDEX, weight_map=["a"])(folder))[0],
        "`weight_map` names a file",
    ),
    "weights of whole numbers": (
        weights(lambda v: v.update({n: (t * 9).to(torch.int8) for n, t in v.items()})),
        r"holds whole numbers \(I8\): quantised",
    ),
    "weights of zeros": (
        weights(lambda v: v.update({n: t * 0 for n, t in v.items()})),
        "all embeddings are 0",
    ),
    "weights missing": (
        weights(lambda v: v.pop("model.layers.1.mlp.up_proj.weight")),
        r"model\.layers\.1\.mlp\.up_proj\.weight is not in the file",
    ),
    "weights left over": (
        weights(unmerged),
        r"4 tensors of the file are not loaded \(model\.layers\.0\.self_attn\.q_proj\.lora_A\."
        r"weight\): merge the adapter and save again",
    ),
    "a layer left over": (
        edit("config.json", num_hidden_layers=1),
        r"9 tensors of the file are not loaded \(model",
    ),
    "weights not finite": (weights(broken), "not finite"),
    "head not tied": (
        weights(lambda v: v.update({"lm_head.weight": v["model.embed_tokens.weight"] * 2})),
        "tie_word_embeddings = false",
    ),
    "an adapter": (as_adapter, "this is an adapter: set `model` to its base .* and `adapter`"),
    "a file": (as_file, "a file, where a model's folder is expected"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "no tokenizer here"),
    "tokenizer not JSON": (holding("tokenizer.json", "{"), "cannot load it"),
    "tokenizer too large": (larger_tokenizer, r"largest id is 261, the model has 260 embeddings"),
    "a tokenizer that was not fetched": (
        holding("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "a length that is no number": (
        edit("tokenizer_config.json", model_max_length="long"),
        "`model_max_length` is a number",
    ),
    "template a number": (
        lambda folder: (
            without("chat_template.jinja")(folder),
            edit("tokenizer_config.json", chat_template=3)(folder),
        )[1],
        "template is no text",
    ),
    "template empty": (holding("chat_template.jinja", " \n"), "chat template is empty"),
    "template no template": (holding("chat_template.jinja", "{% for %}"), "template is not valid"),
    "EOS out of range": (
        edit("generation_config.json", eos_token_id=[EOS, 999]),
        "eos_token_id 999 is no token of",
    ),
    **{
        f"EOS {value!r}": (edit("generation_config.json", eos_token_id=value), "eos_token_id is a")
        for value in ("</s>", ["1"], [[1]], {"a": 1}, 1.5, True)
    },
    "generation config a list": (holding("generation_config.json", "[1]"), "not a JSON object"),
    "generation config not JSON": (holding("generation_config.json", "eos: 1"), "not JSON"),
    "generation config not text": (holding("generation_config.json", b"\xff\xfe"), "not JSON"),
    "no EOS anywhere": (
        lambda folder: (
            byte_tokenizer(pad_token="<pad>").save_pretrained(folder),
            edit("generation_config.json", eos_token_id=None)(folder),
            edit("config.json", eos_token_id=None)(folder),
            (folder / "chat_template.jinja").unlink(),
        )[1],
        "no EOS|no chat template",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write here."""
    folder = tmp_path_factory.mktemp("sound")
    write_policy(folder / "model", chat_tokenizer())
    return folder / "model"


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_folder_is_one_line_and_nothing_is_written(sound: Path, tmp_path: Path, name: str):
    fault, said = FAULTS[name]
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(sound, folder)
    fault(folder)
    out.mkdir()
    place = str(folder)
    with pytest.raises(InputError) as error:
        take_pretrained(out, ModelConfig(pretrained=place))
    text = str(error.value)
    assert re.search(said, text), text
    assert place in text and "\n" not in text
    assert not any(out.iterdir())


def test_at_least_twenty_kinds_are_tried():
    assert len(FAULTS) >= 20


@pytest.mark.parametrize("name", FAULTS)
def test_the_doctor_ends_with_exit_code_2_or_a_finding(
    sound: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Where no model can be examined, one line on standard error; else a check that fails."""
    fault, said = FAULTS[name]
    shutil.copytree(sound, tmp_path / "model")
    fault(tmp_path / "model")
    row = {"chosen": [{"role": "assistant", "content": "In Norway."}], "prompt": CHAT}
    row["rejected"] = [{"role": "assistant", "content": "No idea."}]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "my.toml").write_text('model = "model"\ndata = "pairs.jsonl"\n')
    monkeypatch.setattr(sys, "argv", ["klash", "doctor", str(tmp_path / "my.toml")])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert stop.value.code in (1, 2)
    if stop.value.code == 2:
        assert re.search(said, printed.err), printed.err
        assert len(printed.err.splitlines()) == 1
    else:
        assert "FAIL" in printed.out


TEMPLATES = {  # chat templates that are programs, and what is said where they are used
    "divides by 0": ("{{ 1 / 0 }}", "division by zero"),
    "includes a file": ("{% include 'a' %}", "no loader"),
    "adds a number to a list": ("{{ messages + 1 }}", "concatenate"),
    "asks for what is not there": ("{{ a.b.c }}", "'a' is undefined"),
    "is one text": ("hello", "leaves out what a message of the user says"),
    "knows no assistant": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "leaves out what a message of the assistant says"),
    "wants content in parts": (
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
        "leaves out what a message of the user says"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_fails_is_told_in_the_words_of_a_row(
    sound: Path, tmp_path: Path, name: str
):
    """By whatever encodes a chat: a policy's reader, and a reward model's."""
    template, said = TEMPLATES[name]
    for source in ("model", "reward"):
        folder = tmp_path / source
        if source == "model":
            shutil.copytree(sound, folder)
        else:
            write_reward(folder, chat_tokenizer())
        (folder / "chat_template.jinja").write_text(template)
        row = Row(CHAT, {"role": "assistant", "content": "In Norway."})
        with pytest.raises((InputError, Unusable), match=said):
            if source == "model":
                Encoder(open_tokenizer(folder), frozenset({EOS})).render(row)
            else:
                Scorer(folder).score_said([Answered(CHAT, "In Norway.")])


def test_a_sharded_folder_is_sound(sound: Path, tmp_path: Path):
    shutil.copytree(sound, tmp_path / "model")
    sharded(tmp_path / "model")
    ours, theirs = load_policy(tmp_path / "model"), load_policy(sound)
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_a_folder_that_may_not_be_read(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Tests may run as root, who may read everything: the question is answered with no."""
    shutil.copytree(sound, tmp_path / "model")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "model")
    with pytest.raises(InputError, match="no permission"):
        load_policy(tmp_path / "model")


def test_old_buffers_in_the_file_are_no_fault(sound: Path, tmp_path: Path):
    """As files of years ago hold them: computed, never trained."""
    shutil.copytree(sound, tmp_path / "model")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    weights(lambda values: values.update({name: torch.ones(4)}))(tmp_path / "model")
    loaded, plain = load_policy(tmp_path / "model"), load_policy(sound)
    ids = torch.arange(8, 20)[None]
    assert torch.equal(loaded(ids).logits, plain(ids).logits)  # computed, not read from the file


# --- reward models -----------------------------------------------------------------------------


def one_score(folder: Path) -> None:
    (folder / "normalisation.json").write_text('{"offset": 0.0, "scale": 0.0}')


REWARD_FAULTS: dict[str, tuple[Fault, str]] = {
    "a policy": (
        lambda folder: (shutil.rmtree(folder), write_policy(folder, chat_tokenizer()))[0],
        "not a reward model",
    ),
    "two labels": (edit("config.json", id2label={"0": "bad", "1": "good"}), "one label; .* says 2"),
    "no head": (
        weights(lambda values: values.pop("score.weight")),
        r"score\.weight is not in the file",
    ),
    "a head of another size": (
        weights(lambda values: values.update({"score.weight": torch.zeros(2, 32)})),
        r"score\.weight is \(2, 32\) in the file and \(1, 32\)",
    ),
    "scale 0": (one_score, "do not differ between samples"),
    "scale not a number": (
        holding("normalisation.json", '{"offset": 0.0, "scale": NaN}'),
        "do not differ",
    ),
    "a tokenizer too large": (larger_tokenizer, r"largest id is 261, the model has 260"),
    "chats of other keys": (holding("chats.jsonl", '{"a": 1}\n'), "not the messages of prompts"),
    "chats no objects": (holding("chats.jsonl", "[1]\n"), "not the messages of prompts"),
    "chats not JSON": (holding("chats.jsonl", "hello\n"), "not the messages of prompts"),
    "normalisation not JSON": (holding("normalisation.json", "{"), "not JSON"),
    "normalisation of other keys": (holding("normalisation.json", "{}"), "not {offset, scale}"),
    "weights left over": (
        weights(lambda values: values.update({"v_head.weight": torch.zeros(1, 32)})),
        r"1 tensors of the file are not loaded \(v_head\.weight",
    ),
    "weights not finite": (weights(broken), "not finite"),
}


@pytest.mark.parametrize("name", REWARD_FAULTS)
def test_a_broken_reward_model_is_one_line(tmp_path: Path, name: str):
    fault, said = REWARD_FAULTS[name]
    folder = tmp_path / "reward"
    write_reward(folder, chat_tokenizer())
    Scorer(folder)
    fault(folder)
    with pytest.raises(InputError, match=said) as error:
        Scorer(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_sizes_that_do_not_fit_are_named_together(sound: Path):
    tokenizer = AutoTokenizer.from_pretrained(sound)
    model = open_model(sound, "policy")
    require_embeddings(sound, tokenizer, model)
    assert special_ids(open_tokenizer(sound)).eos == EOS
