"""A folder opened: its model with whole weights, its tokenizer with a template that is one.

What the libraries raise becomes an InputError that names the folder and the way out.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateSyntaxError
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shared.config import InputError
from shared.data.chat import TEMPLATE_FAULTS
from shared.models.folders import (
    LOADERS,
    Role,
    _require_place,
    embedding_count,
    read_object,
    readable,
    require_fetched,
    require_folder,
)

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
)  # fmt: skip
BUFFERS = (".attn.bias", ".masked_bias", ".inv_freq", "position_ids")  # computed, not trained


def load_with_info(
    folder: Path, role: Role, dtype: torch.dtype | Literal["auto"] = torch.float32
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """(transformers' own model in eval mode, its loading info: keys missing, unexpected, ...)."""
    options = {"num_labels": 1} if role == "reward model" else {}
    with readable(folder):
        model, info = LOADERS[role].from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `weight_fault` names the first one
            use_safetensors=True,
            **options,
        )
    return model.eval(), info


def open_model(
    folder: Path,
    role: Role,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    *,
    new_head: bool = False,
) -> PreTrainedModel:
    """The model of a folder, every weight of it from the file; InputError otherwise.

    `new_head`: a reward model's trunk may come from a policy; its head is then at random.
    """
    require_folder(folder, None if new_head else role)
    model, info = load_with_info(folder, role, dtype)
    if fault := weight_fault(model, info, new_head=new_head):
        raise InputError(f"{folder}: {fault}")
    return model


def weight_fault(model: PreTrainedModel, info: dict[str, Any], *, new_head: bool = False) -> str:
    """What is wrong with weights that were loaded, and the fix; empty if nothing is."""
    if info["mismatched_keys"]:
        name, there, here = min(info["mismatched_keys"])
        return (
            f"{name} is {tuple(there)} in the file and {tuple(here)} by config.json: fetch both "
            "from one place"
        )
    if absent := missing_weights(model, info, new_head=new_head):
        return f"save the whole model: {absent[0]} is not in the file and would start at random"
    if left := leftover_weights(model, info, new_head=new_head):
        return leftover_text(left)
    if any(not value.isfinite().all() for value in model.parameters()):
        return (
            "some weights are not finite: load a checkpoint from before it broke, and lower the "
            "learning rate"
        )
    head, layer = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(layer, nn.Embedding) and not layer.weight.any():
        return "all embeddings are 0: nothing was trained in this file: save the model again"
    tied = getattr(model.config, "tie_word_embeddings", False) and head is not None
    if tied and head.weight is not layer.weight:  # pyright: ignore[reportOptionalMemberAccess]
        return "the output layer is not tied as config.json says; set tie_word_embeddings = false"
    return ""


def missing_weights(
    model: PreTrainedModel, info: dict[str, Any], *, new_head: bool = False
) -> list[str]:
    """Names that the model has and the file has not, in order."""
    below = f"{model.base_model_prefix}."
    return sorted(n for n in info["missing_keys"] if not new_head or n.startswith(below))


def leftover_weights(
    model: PreTrainedModel, info: dict[str, Any], *, new_head: bool = False
) -> list[str]:
    """Names that the file has and the model has not, in order; buffers of old files apart."""
    below = f"{model.base_model_prefix}."
    return sorted(
        name
        for name in info["unexpected_keys"]
        if not name.endswith(BUFFERS) and (not new_head or name.startswith(below))
    )


def leftover_text(names: list[str]) -> str:
    """The fault of tensors that nobody loads, and the fix."""
    fix = "save the model again with the class that it was trained as"
    if any("lora_" in name for name in names):
        fix = "merge the adapter and save again (merge_and_unload), or name it as `adapter`"
    return f"{len(names)} tensors of the file are not loaded ({names[0]}): {fix}"


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, whatever its special tokens are; InputError if there is none."""
    with readable(folder):
        if (folder / "config.json").is_file():
            read_object(folder / "config.json")  # AutoTokenizer reads it too
        files = [file for file in map(folder.joinpath, TOKENIZER) if file.is_file()]
        if not files:
            _require_place(folder)
            raise InputError(
                f"{folder}: no tokenizer here (tokenizer.json is missing); save it with "
                "tokenizer.save_pretrained"
            )
        for file in files:
            require_fetched(file)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise InputError(
            f"{folder}/tokenizer_config.json: `model_max_length` is a number of tokens "
            f"(found {tokenizer.model_max_length!r})"
        )
    require_template(folder, tokenizer)
    return tokenizer


def require_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """InputError if there is a chat template that is empty or is no template."""
    template = tokenizer.chat_template
    if template is None or isinstance(template, dict):  # of several by name, one is the default
        return
    if not isinstance(template, str):
        raise InputError(f"{folder}: its chat template is no text (found {template!r})")
    if not template.strip():
        raise InputError(
            f"{folder}: its chat template is empty, so that every chat is an empty text: set "
            "tokenizer.chat_template, or to None, and save it"
        )
    with suppress(*TEMPLATE_FAULTS):  # what a template refuses is told where the chat is known
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        except TemplateSyntaxError as error:
            raise InputError(f"{folder}: its chat template is not valid: {error}") from error


def require_embeddings(
    folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """InputError if a token has no embedding. Embeddings without a token are fine: padding."""
    top, rows = max(tokenizer.get_vocab().values()), embedding_count(model)
    if top >= rows:
        raise InputError(
            f"{folder}: the tokenizer's largest id is {top}, the model has {rows} embeddings: "
            "model.resize_token_embeddings(len(tokenizer)) and save both"
        )
