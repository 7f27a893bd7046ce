"""Rows -> token ids: as TRL's own preparation for its DPOTrainer, on the templates that TRL ships.

TRL keeps what a template puts behind an answer's end; ours stops at the end. Where a token spans
the end of the prompt TRL (as it warns) trains on another prompt than the policy reads; ours does
not.
"""

import re
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.data_utils import extract_prompt

from shared.config import InputError
from shared.data.chat import Encoded, Encoder
from shared.data.examples import fit
from shared.data.formats import read_row
from shared.data.rows import DataConfig, Unusable

SHIPPED = files("trl") / "chat_templates"
ENDS = {  # the token that ends an answer, by TRL's name of the template
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "<\uff5cend▁of▁sentence\uff5c>",
    "deepseekv3": "<\uff5cend▁of▁sentence\uff5c>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "phi3": "<|end|>",
    "phi3_5": "<|end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
}
SPECIAL = re.compile(r"<[|\uff5c][\w▁]+[|\uff5c]>|</?(?:start|end)_of_turn>")
USER = {"role": "user", "content": "Where is Oslo?"}
TURNS = [USER, {"role": "assistant", "content": "In Norway."}, {"role": "user", "content": "And?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Finds a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
PROMPTS: dict[str, dict[str, Any]] = {
    "one turn": {"prompt": [USER]},
    "several turns": {"prompt": TURNS},
    "system": {"prompt": [{"role": "system", "content": "Be short."}, USER]},
    "system and turns": {"prompt": [{"role": "system", "content": "Be short."}, *TURNS]},
    "tools": {"prompt": [USER], "tools": [TOOL]},
    "tools and turns": {"prompt": TURNS, "tools": [TOOL]},
}


def tokenizer_of(template: str, special: set[str], eos: str) -> PreTrainedTokenizerFast:
    """Bytes and two merges, with the special tokens of a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<bos>", *sorted(special | {eos} - {"<pad>", "<bos>"})]
    vocabulary = {token: n for n, token in enumerate([*names, *alphabet, "ĊĊ", "!Ġ"])}
    inner = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ"), ("!", "Ġ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    inner.decoder = decoders.ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token=eos,
        additional_special_tokens=sorted(special),
        chat_template=template,
    )


def shipped(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a template that TRL ships: read from there."""
    template = (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer_of(template, set(SPECIAL.findall(template)) | {ENDS[name]}, "<|endoftext|>")


def of_trl(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What DPOTrainer makes of a row."""
    config = DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, max_length=None)
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    data = Dataset.from_list([row])
    return DPOTrainer._prepare_dataset(trainer, data, tokenizer, config, "train")[0]


def ours(tokenizer: PreTrainedTokenizerFast, raw: dict[str, Any], *ends: str) -> Encoded:
    form = "pairs" if "prompt" in raw else "implicit-pairs"
    (row,) = read_row(form, raw, DataConfig())
    ids = frozenset(tokenizer.convert_tokens_to_ids(list(ends)))
    encoder = Encoder(tokenizer, ids)
    return encoder.encode([row], [encoder.render(row)])[0]


def answered(prompt: dict[str, Any]) -> dict[str, Any]:
    sides = {"chosen": "In the south of Norway.", "rejected": "Who knows?"}
    return prompt | {k: [{"role": "assistant", "content": said}] for k, said in sides.items()}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("name", ENDS)
def test_chats_are_encoded_as_trl_does(name: str, kind: str, tmp_path: Path):
    tokenizer, row = shipped(name), answered(PROMPTS[kind])
    end = tokenizer.convert_tokens_to_ids(ENDS[name])
    try:
        expected = of_trl(tokenizer, row, tmp_path)
    except TemplateError:  # such as Gemma's, of a system message
        with pytest.raises(Unusable, match="refuses"):
            ours(tokenizer, row, ENDS[name])
        return
    found = ours(tokenizer, row, ENDS[name])
    assert found.prompt_ids == expected["prompt_ids"]
    bos = tokenizer.bos_token_id
    assert found.prompt_ids.count(bos) == (found.prompt_ids[:1] == [bos])  # pyright: ignore
    for side in ("chosen", "rejected"):
        ids, theirs = getattr(found, f"{side}_ids"), expected[f"{side}_ids"]
        assert ids == theirs[: len(ids)]
        assert ids[-1] == end and ids.count(end) == 1
        assert tokenizer.decode(theirs[len(ids) :]).strip() in ("", tokenizer.eos_token)


def test_twelve_templates_and_more_take_every_kind_that_they_can():
    """What the test above skips is what a template itself refuses."""
    refused = {
        (name, kind)
        for name in ENDS
        for kind, prompt in PROMPTS.items()
        if not _renders(shipped(name), prompt)
    }
    assert refused <= {("gemma", "system"), ("gemma", "system and turns")}


def _renders(tokenizer: PreTrainedTokenizerFast, prompt: dict[str, Any]) -> bool:
    try:
        tokenizer.apply_chat_template(prompt["prompt"], tools=prompt.get("tools"), tokenize=False)
    except TemplateError:
        return False
    return True


WORDS = st.text(alphabet="ab !.\n", min_size=1, max_size=12)


def adds(tokenizer: PreTrainedTokenizerFast, single: str) -> PreTrainedTokenizerFast:
    """`single` as the frame that the tokenizer puts around texts."""
    names = [word for word in single.split() if word != "$A"]
    special = [(word, tokenizer.convert_tokens_to_ids(word)) for word in names]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single=single, special_tokens=special
    )
    return tokenizer


TEXT_TOKENIZERS = {
    "plain": "$A",
    "adds BOS": "<bos> $A",
    "adds BOS and EOS": "<bos> $A </s>",
    "adds EOS": "$A </s>",
}


@pytest.mark.parametrize("frame", TEXT_TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(prompt=WORDS, chosen=WORDS, rejected=WORDS)
def test_texts_have_one_bos_one_eos_and_their_own_tokens(
    frame: str, prompt: str, chosen: str, rejected: str
):
    """Prompt and answer decode to their texts, whatever the tokenizer puts around a text."""
    tokenizer = adds(tokenizer_of("", set(), "</s>"), TEXT_TOKENIZERS[frame])
    found = ours(tokenizer, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    bos = [tokenizer.bos_token_id] if "BOS" in frame else []
    bare: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids  # pyright: ignore
    assert found.prompt_ids == bos + bare
    for ids, text in ((found.chosen_ids, chosen), (found.rejected_ids, rejected)):
        assert ids is not None
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == text


def test_texts_are_encoded_as_trl_does_where_no_token_spans_the_boundary(tmp_path: Path):
    tokenizer = adds(tokenizer_of("", set(), "</s>"), "<bos> $A")
    row = {"prompt": "Where is Oslo?", "chosen": " In Norway.", "rejected": " No idea.</s>"}
    expected, found = of_trl(tokenizer, row, tmp_path), ours(tokenizer, row)
    assert (
        found._asdict().items() >= {k: expected[k] for k in expected if k.endswith("ids")}.items()
    )
    assert not found.notes


def test_a_token_across_the_boundary_is_told_and_the_prompt_stays_whole():
    tokenizer = tokenizer_of("", set(), "</s>")
    found = ours(tokenizer, {"prompt": "Say so!", "chosen": " Yes.", "rejected": "No."})
    assert found.notes == ("boundary",)
    assert found.prompt_ids == tokenizer("Say so!").input_ids
    assert tokenizer.decode(found.chosen_ids) == " Yes.</s>"


@given(WORDS, WORDS, WORDS)
def test_a_shared_beginning_is_cut_as_trl_cuts_it(start: str, chosen: str, rejected: str):
    raw = {"chosen": start + chosen, "rejected": start + rejected}
    try:
        (row,) = read_row("implicit-pairs", raw, DataConfig())
    except Unusable as fault:
        assert fault.reason in ("identical", "empty", "prompt-mismatch")
        return
    assert row._asdict().items() >= extract_prompt(raw).items()


@pytest.mark.parametrize("behind", ["\n", "", "\n</s>", "</s>"])
def test_what_a_template_puts_behind_the_end_is_left_out(behind: str):
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>BEHIND{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ).replace("BEHIND", behind)
    tokenizer = tokenizer_of(template, {"<|user|>", "<|assistant|>", "<|end|>"}, "</s>")
    found = ours(tokenizer, answered({"prompt": [USER]}), "<|end|>", "</s>")
    assert tokenizer.decode(found.chosen_ids) == "In the south of Norway.<|end|>"


def test_what_is_wrong_with_a_chat_is_noted():
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    tokenizer = adds(tokenizer_of(template, {"<|end|>"}, "</s>"), "<bos> $A")
    odd = {"prompt": [{"role": "user", "content": "What is <|end|>?"}]}
    found = ours(tokenizer, answered(odd))
    assert set(found.notes) == {
        "control-tokens", "no-generation-prompt", "without-bos", "without-end"
    }  # fmt: skip


def test_chats_need_a_template():
    tokenizer = tokenizer_of("", set(), "</s>")
    tokenizer.chat_template = None  # pyright: ignore
    with pytest.raises(InputError, match="has no chat template"):
        ours(tokenizer, answered({"prompt": [USER]}))


LONG = Encoded("p", [1, 2, 3], [4, 5, 6, 0], [4, 5, 0], ())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ""),
        ({"max_prompt_tokens": 2}, "over-long"),
        ({"max_prompt_tokens": 2, "over_long": "cut"}, "over-long"),
        ({"max_completion_tokens": 3}, "over-long"),
        ({"max_completion_tokens": 4}, ""),
        ({"max_completion_tokens": 3, "over_long": "cut"}, ""),
        ({"max_completion_tokens": 2, "over_long": "cut"}, "identical"),
    ],
)
def test_limits_of_length(config: dict[str, Any], expected: str):
    found, reason = fit(LONG, DataConfig(**config), answered=True)
    assert reason == expected
    if reason == "":
        most = config.get("max_completion_tokens", 4)
        assert found.chosen_ids == LONG.chosen_ids[:most]
        assert ("cut" in found.notes) == (most == 3)


@pytest.mark.parametrize(
    ("chosen", "rejected", "answered", "expected"),
    [([], [4], True, "empty"), ([4], [], True, "empty"), ([], None, True, "empty"),
     ([], None, False, "")],
)  # fmt: skip
def test_an_answer_without_tokens_teaches_nothing(
    chosen: list[int], rejected: list[int] | None, answered: bool, expected: str
):
    encoded = Encoded("p", [1], chosen, rejected, ())
    assert fit(encoded, DataConfig(), answered=answered)[1] == expected
