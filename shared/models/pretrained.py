"""A model that a user names, made the plain transformers folder that every stage reads.

`take_pretrained` sets right what has one right way: an EOS, all tokens that end a turn, a pad token
that is none of them, an adapter merged, .gguf converted.
"""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shared.config import InputError
from shared.data.chat import TEMPLATE_FAULTS
from shared.models.adapters import merge_adapter
from shared.models.folders import as_ids, embedding_count, readable, require_folder
from shared.models.load import ModelConfig
from shared.models.names import local_path
from shared.models.opening import (
    open_model,
    open_tokenizer,
    require_embeddings,
    require_template,
    weight_fault,
)

PADS = (  # special tokens that no text holds, the best first
    re.compile(r"pad", re.IGNORECASE),
    re.compile(r"reserved|unused|placeholder", re.IGNORECASE),
    re.compile(r"endoftext", re.IGNORECASE),
)
NEW_PAD = "<|pad|>"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


def take_pretrained(folder: Path, model: ModelConfig) -> None:
    """Stage: `model.pretrained` as a plain folder (safetensors, tokenizer, generation_config).

    Its weights keep their precision, but for a merged adapter and .gguf, which become float32. An
    InputError names what cannot be set right without the user.
    """
    if model.pretrained is None:
        raise InputError("[model] pretrained: name a model")
    policy, tokenizer = open_named(model.pretrained, model.revision, merges=bool(model.adapter))
    if model.adapter is not None:
        policy, tokenizer = merge_adapter(policy, tokenizer, Path(model.adapter))
    where = Path(model.pretrained)
    require_embeddings(where, tokenizer, policy)
    ends = set_ends(where, policy, tokenizer)
    set_pad(policy, tokenizer, ends)
    policy.generation_config = generation_config(policy, tokenizer, ends)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def open_named(
    name: str, revision: str | None, *, merges: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a hub name, a folder or a .gguf file, examined."""
    path = local_path(name, revision)
    if path.is_file() and path.suffix == ".gguf":
        return open_gguf(path)
    require_folder(path, "policy")
    tokenizer = open_tokenizer(path)
    return open_model(path, "policy", torch.float32 if merges else "auto"), tokenizer


def open_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A .gguf file through transformers' own reader, in float32.

    transformers does not save a model that it loaded so: its weights move into a new one.
    """
    with readable(path):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        options: dict[str, Any] = {"gguf_file": path.name, "output_loading_info": True}
        loaded, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore
            path.parent, dtype=torch.float32, **options
        )
        fields = loaded.config.to_dict()
        fields.pop("quantization_config", None)
        model = type(loaded)(type(loaded.config).from_dict(fields)).eval()
        model.load_state_dict(loaded.state_dict())
    require_template(path, tokenizer)
    if fault := weight_fault(model, info):
        raise InputError(f"{path}: {fault}")
    return model, tokenizer


def set_ends(
    where: Path, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Give the tokenizer an EOS if it has none; every token that ends an answer."""
    listed = as_ids(getattr(policy.generation_config, "eos_token_id", None))
    listed = listed or as_ids(policy.config.get_text_config().eos_token_id)
    turn = turn_end(tokenizer)
    ends = listed if turn is None else listed | {turn}
    if tokenizer.eos_token_id is None:
        if not ends:
            raise InputError(
                f"{where}: no EOS, in the tokenizer nor in generation_config.json: name the token "
                "that ends an answer, tokenizer.eos_token = ..., and save it"
            )
        known = sorted(ends)[0] if turn is None else turn
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(known)
    rows = embedding_count(policy)
    if wrong := sorted(end for end in ends if not 0 <= end < rows):
        raise InputError(
            f"{where}: eos_token_id {wrong[0]} is no token of its {rows}: set it in "
            "generation_config.json and config.json to what ends an answer"
        )
    eos = tokenizer.eos_token_id
    for config in (policy.config, policy.config.get_text_config()):
        if eos not in as_ids(getattr(config, "eos_token_id", None)):
            config.eos_token_id = eos
    return ends | as_ids(eos)  # pyright: ignore[reportArgumentType]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts behind an answer; None without one, or where
    the template refuses the shortest of chats.
    """
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "klash"}]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except TEMPLATE_FAULTS:  # it wants words that only real rows bring
        return None
    _, _, behind = text.rpartition("klash")
    ids: list[int] = tokenizer(behind, add_special_tokens=False).input_ids
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in ids if token in special), None)


def set_pad(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]
) -> None:
    """A pad token that ends nothing: the tokenizer's own, a reserved one, a new one.

    A new one takes an embedding without a token where the vocabulary is padded; else the
    embeddings grow by one, whose weights are the mean of the others: it is never trained.
    """
    rows = embedding_count(policy)
    own = tokenizer.pad_token_id
    if not isinstance(own, int) or own in ends or own >= rows:
        found = reserved_token(tokenizer, ends, rows)
        if found is None:
            tokenizer.pad_token = None  # or it would stay a second name of EOS
            tokenizer.add_special_tokens({"pad_token": NEW_PAD})
        else:
            tokenizer.pad_token = found
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    if pad >= rows:
        grow_embeddings(policy, pad + 1)
    for config in (policy.config, policy.config.get_text_config()):
        config.pad_token_id = pad


def reserved_token(
    tokenizer: PreTrainedTokenizerBase, ends: frozenset[int], rows: int
) -> str | None:
    """A special token that neither texts nor the chat template hold; None if there is none."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    added = sorted(tokenizer.added_tokens_decoder.items())
    free = [
        token.content
        for number, token in added
        if token.special
        and number < rows
        and number not in ends
        and number != tokenizer.bos_token_id
        and token.content not in template
    ]
    for kind in PADS:
        if fitting := [content for content in free if kind.search(content)]:
            return fitting[0]
    unknown = tokenizer.unk_token
    return unknown if unknown in free and reads_bytes(tokenizer) else None


def reads_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a character that is no token becomes its bytes, so that no text holds <unk>."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return bool(getattr(getattr(backend, "model", None), "byte_fallback", False))


@torch.no_grad()
def grow_embeddings(policy: PreTrainedModel, rows: int) -> None:
    """Resize to `rows`; what is new, in and out, is the mean of what was there."""
    before = embedding_count(policy)
    policy.resize_token_embeddings(rows, mean_resizing=False)
    layers = (policy.get_input_embeddings(), policy.get_output_embeddings())
    for weight in {id(layer.weight): layer.weight for layer in layers if layer}.values():  # pyright: ignore
        weight[before:] = weight[:before].float().mean(0).to(weight.dtype)  # pyright: ignore


def generation_config(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]
) -> GenerationConfig:
    """The model's own, with every end and the pad token; one that transformers lets be saved."""
    own = policy.generation_config
    fields: dict[str, Any] = {} if own is None else own.to_diff_dict()
    eos = tokenizer.eos_token_id
    fields["eos_token_id"] = [eos, *sorted(ends - as_ids(eos))]  # pyright: ignore[reportArgumentType]
    fields["pad_token_id"] = tokenizer.pad_token_id
    if any(fields.get(name) is not None for name in SAMPLING):
        fields["do_sample"] = True  # what it says of sampling is meant
    fields.pop("_from_model_config", None)
    return GenerationConfig.from_dict(fields)  # pyright: ignore[reportReturnType]
