"""Model folders as users have them: what makes one unusable, in one line with the way out.

`require_folder` reads what the files say before any weight is read. `shared.models.opening` loads;
every command goes through both.
"""

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shared.config import InputError

Role = Literal["policy", "reward model"]
LOADERS: dict[Role, Any] = {
    "policy": AutoModelForCausalLM,
    "reward model": AutoModelForSequenceClassification,
}
CLASSIFIER = "ForSequenceClassification"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
NORMALISATION, CHATS = "normalisation.json", "chats.jsonl"  # what a Scorer reads besides
INTEGERS = ("I8", "U8", "I16", "I32", "I64")  # kinds of numbers in a safetensors file
UNREADABLE = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError,
    ArithmeticError, AssertionError, SafetensorError, StrictDataclassError, struct.error,
)  # fmt: skip


def require_folder(folder: Path, role: Role | None = None) -> None:
    """InputError unless the files of `folder` can hold a model, and one of that `role`."""
    with readable(folder):
        _require_place(folder)
        config = read_object(folder / "config.json")
        _require_known(folder, config)
        _require_role(folder, config, role)
        if role == "policy":
            listed_ends(folder)
        _require_weights(folder)


def _require_place(folder: Path) -> None:
    if folder.is_file():
        way = "[model] pretrained takes it" if folder.suffix == ".gguf" else "name its folder"
        raise InputError(f"{folder}: a file, where a model's folder is expected: {way}")
    if not folder.exists():
        raise InputError(f"{folder}: no such folder or file")
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"{folder}: no permission to read this folder")
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        named = f" ({base})" if base else ""
        raise InputError(
            f"{folder}: this is an adapter: set `model` to its base{named} and `adapter` to this "
            "folder, or merge it (merge_and_unload) and save the model"
        )
    raise InputError(f"{folder}: no model here (config.json is missing)")


def _require_known(folder: Path, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        own = "code of its own is never run" if "auto_map" in config else "is a newer one needed?"
        raise InputError(
            f"{folder}/config.json: model_type {kind!r} is none that the installed transformers "
            f"knows; {own}"
        )
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else "?"
        raise InputError(
            f"{folder}: its weights are quantised ({method}), which does not train: name the "
            "folder or hub name that it was made from"
        )


def _require_role(folder: Path, config: dict[str, Any], role: Role | None) -> None:
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{folder}/config.json: `architectures` is a list of names (found {names!r})"
        )
    scores = any(name.endswith(CLASSIFIER) for name in names)
    if role == "reward model" and not scores:
        raise InputError(
            f"{folder}: not a reward model but {names}; it must be an "
            "AutoModelForSequenceClassification with one label"
        )
    if role == "policy" and scores:
        raise InputError(
            f"{folder}: not a policy but a reward model or classifier {names}; name the model that "
            "answers"
        )
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    speaks = any(name in known.values() for name in names) or (
        not names and config["model_type"] in known
    )
    if role == "policy" and not speaks:
        raise InputError(
            f"{folder}: not a policy but {names or config['model_type']}; it must be an "
            "AutoModelForCausalLM"
        )
    if role == "reward model" and (labels := label_count(config)) != 1:
        raise InputError(
            f"{folder}: a reward model has one label; its config.json says {labels}: train it with "
            "num_labels = 1"
        )


def label_count(config: dict[str, Any]) -> int:
    """Labels of a classifier by its config.json; transformers takes two where it is silent."""
    names = config.get("id2label")
    return len(names) if isinstance(names, dict) else int(config.get("num_labels") or 2)


def _require_weights(folder: Path) -> None:
    """Safetensors that are all there and whole; their headers are read, their tensors not."""
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    if (folder / WHOLE).is_file():
        files = [WHOLE]
    elif (folder / INDEX).is_file():
        places = read_object(folder / INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise InputError(f"{folder}/{INDEX}: `weight_map` names a file for each tensor")
        files = sorted(set(map(str, places.values())))
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise InputError(f"{folder}: {INDEX} names {missing[0]}, which is missing: fetch it")
    elif shards:
        raise InputError(f"{folder}: {shards[0]} is there, {INDEX} is missing: fetch it")
    else:
        files = []
    if not files:
        pickled = [path.name for kind in PICKLED for path in sorted(folder.glob(kind))]
        if pickled and pickled != ["training_args.bin"]:
            raise InputError(
                f"{folder}: only pickled weights ({pickled[0]}), which can run code when they are "
                "read: load them where you trust them and save_pretrained again, as safetensors"
            )
        raise InputError(f"{folder}: no weights here ({WHOLE} is missing)")
    for file in files:
        require_whole(folder / file)


def require_whole(file: Path) -> None:
    """InputError unless `file` is a safetensors file of the length that its header says."""
    require_fetched(file)
    try:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dict
                kind = weights.get_slice(name).get_dtype()
                if name.endswith(".weight") and kind in INTEGERS:
                    raise InputError(
                        f"{file}: {name} holds whole numbers ({kind}): quantised weights do not "
                        "train; name the folder or hub name that they were made from"
                    )
    except SafetensorError as error:
        raise InputError(f"{file}: cut or damaged ({error}): fetch it again") from error


def require_fetched(file: Path) -> None:
    """InputError for the pointer that Git LFS leaves where a file was not fetched."""
    if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
        raise InputError(f"{file}: a Git LFS pointer in the file's place: run `git lfs pull`")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; InputError names the file that is not one."""
    require_fetched(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object")
    return found


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """What the libraries cannot load is the user's folder, not our fault."""
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        text = " ".join(str(error).split())
        raise InputError(f"{folder}: transformers cannot load it: {text}") from error


def embedding_count(model: PreTrainedModel) -> int:
    """How many tokens have an embedding."""
    layer = model.get_input_embeddings()
    return layer.weight.shape[0] if isinstance(layer, nn.Embedding) else model.config.vocab_size


def places_known(folder: Path) -> int:
    """How many tokens the model has places for; dynamic rotary ones as far as they scale."""
    with readable(folder):
        config = AutoConfig.from_pretrained(folder)
    return places_of(config) or 10**9


def places_of(config: PreTrainedConfig) -> int | None:
    """The same of a configuration; None where it says nothing."""
    text = config.get_text_config()
    places = getattr(text, "max_position_embeddings", None)
    if not places:
        return None
    if text.model_type in ("roberta", "xlm-roberta", "camembert"):
        places -= 2  # their positions begin behind the pad token's
    scaling = getattr(text, "rope_parameters", None) or {}
    dynamic = scaling.get("rope_type") == "dynamic"
    return int(places * scaling.get("factor", 1)) if dynamic else places


def listed_ends(folder: Path) -> frozenset[int]:
    """Tokens that generation_config.json, or where it says nothing config.json, ends a text with.

    InputError for an id that has no embedding.
    """
    path, text = folder / "generation_config.json", text_config(folder)
    found = read_object(path).get("eos_token_id") if path.is_file() else None
    named = text.get("eos_token_id") if found in (None, []) else found
    each = named if isinstance(named, list) else [] if named is None else [named]
    if any(type(one) is not int for one in each):
        raise InputError(
            f"{folder if found in (None, []) else path}: eos_token_id is a token's id or a list "
            f"of ids (found {named!r})"
        )
    ends = as_ids(named)
    size = text.get("vocab_size")
    if isinstance(size, int) and (wrong := sorted(end for end in ends if not 0 <= end < size)):
        raise InputError(
            f"{folder}: eos_token_id {wrong[0]} is no token of its {size}: set it in "
            "generation_config.json and config.json to what ends an answer"
        )
    return ends


def text_config(folder: Path) -> dict[str, Any]:
    """What config.json says of the part of a model that reads text."""
    _require_place(folder)
    config = read_object(folder / "config.json")
    inner = config.get("text_config") or config
    if not isinstance(inner, dict):
        raise InputError(f"{folder}/config.json: `text_config` is an object (found {inner!r})")
    return inner


def as_ids(value: int | list[int] | None) -> frozenset[int]:
    """A configuration's one id, list of ids or nothing, as a set."""
    if value is None:
        return frozenset()
    return frozenset(value if isinstance(value, list) else [value])
