"""`klash doctor` on models as users have them: sound ones pass, and troubles are named as they are.

Each kind is tried on models other than those that first showed it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import (
    CHATML,
    byte_tokenizer,
    chat_tokenizer,
    write_encoder,
    write_policy,
    write_reward,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.doctor.examine import examine
from benchmarks.doctor.finding import Finding
from benchmarks.doctor.patient import admit
from shared.config import InputError

CITIES = ["Oslo", "Lima", "Cairo", "Quito", "Accra", "Delhi", "Tunis", "Minsk"]


def write_pairs(folder: Path) -> None:
    """Short and long answers on both sides: nothing but their words tells them apart."""
    rows = []
    for n, city in enumerate(CITIES):
        sides = [f"Ask for {city} at desk {n}.", f"{city} is far: " + "so " * (n % 3) + "no."]
        chosen, rejected = sides if n % 2 else sides[::-1]
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"Where is {city}?"}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_policy(tmp_path / "model", chat_tokenizer())
    write_pairs(tmp_path)
    return tmp_path


def findings(place: Path, **keys: str) -> dict[str, Finding]:
    named = {"model": "model", "data": "pairs.jsonl"} | keys
    file = place / "my.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in named.items()))
    return {f.check: f for f in examine(admit(str(file), Path("none"), [], quick=False))}


def failed(found: dict[str, Finding]) -> set[str]:
    return {name for name, finding in found.items() if finding.fix}


def test_a_model_whose_turns_end_with_another_token_than_its_texts_passes(place: Path):
    found = findings(place)
    assert not failed(found), [f for f in found.values() if f.fix]
    assert "[1, 3]" in found["stop token"].observed


def test_it_passes_with_three_ends_of_which_pad_is_none(place: Path):
    """As Llama 3.1 ships: end of text, end of message, end of turn."""
    path = place / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [1, 2, 3]}))
    assert not failed(findings(place))


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("template", [None, CHATML])
def test_a_sound_reward_model_with_its_own_tokenizer_passes(
    place: Path, kind: str, template: str | None
):
    tokenizer = byte_tokenizer(
        turned=True, pad_token="<pad>", eos_token="<|im_end|>", chat_template=template
    )
    (write_reward if kind == "decoder" else write_encoder)(place / "reward", tokenizer)
    found = findings(place, reward_model="reward")
    assert not failed(found), [f for f in found.values() if f.fix]
    assert "given texts" in found["reward model's tokens"].observed


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_reward_model_of_one_score_fails_however_it_reads(place: Path, kind: str):
    tokenizer = byte_tokenizer(turned=True, pad_token="<pad>", eos_token="<|im_end|>")
    write: Any = write_reward if kind == "decoder" else write_encoder
    model = write(place / "reward", tokenizer)
    head = model.score if kind == "decoder" else model.classifier
    with torch.no_grad():
        for value in head.parameters():
            value.zero_()
    model.save_pretrained(place / "reward")
    found = findings(place, reward_model="reward")
    assert "score moves" in failed(found)
    assert "head of zeros" in found["score moves"].fix


def test_unmerged_adapter_matrices_in_the_file_fail_with_the_first_name(place: Path):
    """A model saved from under its adapter: transformers reads the base alone, in silence."""
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    lora = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    get_peft_model(base, lora)
    values = {
        name.replace(".base_layer", ""): value.contiguous()
        for name, value in base.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(values, place / "model" / "model.safetensors", metadata={"format": "pt"})
    found = findings(place)
    assert failed(found) == {"weights"}
    assert "4 tensors of the file are not loaded (model.layers.0" in found["weights"].fix
    assert "merge the adapter and save again" in found["weights"].fix


def test_a_head_of_another_kind_in_the_file_fails(place: Path):
    path = place / "model" / "model.safetensors"
    values = load_file(path) | {"v_head.summary.weight": torch.zeros(1, 32)}
    save_file(values, path, metadata={"format": "pt"})
    found = findings(place)
    assert failed(found) == {"weights"}
    assert "v_head.summary.weight" in found["weights"].fix


@pytest.mark.parametrize("saved", ["input", "both"])
def test_an_adapter_of_another_vocabulary_stops_before_the_first_check(place: Path, saved: str):
    """Trained after tokens were added, on a model with or without an output layer of its own."""
    shutil.copytree(place / "model", place / "larger")
    larger = write_policy(place / "larger", chat_tokenizer(), tie_word_embeddings=saved == "input")
    larger.resize_token_embeddings(266, mean_resizing=False)
    adapted = get_peft_model(larger, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(place / "adapter", save_embedding_layers=True)
    with pytest.raises(InputError, match="the adapter has 266 embeddings, the model 260"):
        next(examine(admit(_toml(place, adapter="adapter"), Path("none"), [], quick=False)))


def _toml(place: Path, **keys: str) -> str:
    named = {"model": "model", "data": "pairs.jsonl"} | keys
    file = place / "their.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in named.items()))
    return str(file)


@pytest.mark.parametrize("tokenizer", [True, False])
def test_an_adapter_named_as_model_is_told_apart(place: Path, tokenizer: bool):
    """With the tokenizer that trainers save beside it, and without."""
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(place / "adapter")
    if tokenizer:
        chat_tokenizer().save_pretrained(place / "adapter")
    with pytest.raises(InputError, match=r"this is an adapter: set `model` to its base \(.*model"):
        next(examine(admit(_toml(place, model="adapter"), Path("none"), [], quick=False)))
