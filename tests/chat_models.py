"""Small chat models as users have them: a tokenizer of bytes, ChatML, random weights not small."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD, EOS, START, END = range(4)
CHAT = [{"role": "user", "content": "Where is Oslo?"}]
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def byte_tokenizer(
    special: tuple[str, ...] = SPECIAL, *, turned: bool = False, **names: Any
) -> PreTrainedTokenizerFast:
    """A token a byte behind `special` ones; `turned`: in another order, so with other ids."""
    letters = ALPHABET[::-1] if turned else ALPHABET
    tokenizer = Tokenizer(
        models.BPE({token: n for n, token in enumerate([*special, *letters])}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    return fast


def chat_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """Texts end with <|endoftext|>, turns with <|im_end|>, as several instruct models ship."""
    names = {"pad_token": "<pad>", "eos_token": "<|endoftext|>", "chat_template": CHATML}
    return byte_tokenizer(**names | changes)


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Weights that are not small: what attention and positions do shows."""
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 2:
                value *= 5
    return model.eval()


def llama_config(rows: int, **changes: Any) -> LlamaConfig:
    """A small Llama's, of `rows` embeddings."""
    fields: dict[str, Any] = {
        **SIZE, "vocab_size": rows, "intermediate_size": 48, "max_position_embeddings": 256,
        "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaConfig(**fields | changes)


def write_policy(
    folder: Path, tokenizer: PreTrainedTokenizerFast, rows: int | None = None, **config: Any
) -> PreTrainedModel:
    """A chat policy with `rows` embeddings, by default as many as there are tokens."""
    torch.manual_seed(0)
    model = lively(LlamaForCausalLM(llama_config(rows or len(tokenizer), **config)))
    model.generation_config.eos_token_id = [EOS, END]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def write_reward(folder: Path, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A decoder with one label."""
    torch.manual_seed(1)
    config = llama_config(len(tokenizer), num_labels=1)
    model = lively(LlamaForSequenceClassification(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def write_encoder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A classifier of BERT's kind with one label."""
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(tokenizer), intermediate_size=48, num_labels=1, pad_token_id=PAD,
        max_position_embeddings=128, hidden_dropout_prob=0.1, **SIZE,
    )  # fmt: skip
    model = lively(BertForSequenceClassification(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
