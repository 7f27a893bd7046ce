"""Tiny models that chat, and rows of chats and texts, for the commands that take a user's own."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

TEMPLATE = (  # as Qwen's: a line break stands behind the token that ends a turn
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["good", "bad", "film", "hello", "the", "you", "are", "yes", "no"]


def byte_tokenizer(*, pad: bool = True, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerBase:
    """A token a byte, with a chat template; without `pad` as many base models ship."""
    special = [*(["<pad>"] if pad else []), "<|im_start|>", "<|im_end|>", *extra]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: n for n, t in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", *extra],
        chat_template=TEMPLATE,
    )
    if pad:
        found.pad_token = "<pad>"
    return found


def config(tokenizer: PreTrainedTokenizerBase, **options: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=192,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def save_policy(
    folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0, scale: float = 1.0
) -> Path:
    """A policy with random weights, those of the output layer times `scale`."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config(tokenizer))
    with torch.no_grad():
        model.lm_head.weight *= scale
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_reward(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 1) -> Path:
    """A reward model with random weights, as anybody saves one: without a normalisation."""
    torch.manual_seed(seed)
    LlamaForSequenceClassification(config(tokenizer, num_labels=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def say(dice: random.Random, words: int) -> str:
    return " ".join(dice.choice(WORDS) for _ in range(words))


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    dice = random.Random(seed)

    def answer() -> list[dict[str, str]]:
        return [{"role": "assistant", "content": say(dice, dice.randint(1, 6))}]

    return [
        {
            "prompt": [{"role": "user", "content": f"{n} {say(dice, 3)}"}],
            "chosen": answer(),
            "rejected": [{"role": "assistant", "content": f"{say(dice, 4)} {n}"}],
        }
        for n in range(count)
    ]


def text_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    dice = random.Random(seed)
    return [
        {
            "prompt": f"{n} {say(dice, 3)}",
            "chosen": f" {say(dice, dice.randint(1, 6))}",
            "rejected": f" {say(dice, 4)} {n}",
        }
        for n in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
