"""A model that a user names, made the plain transformers folder that every stage reads.

`take_pretrained` sets right what has one right way: an EOS, all tokens that end a turn, a pad token
that is none of them, an adapter merged, .gguf converted. `address_of_model` says which model a name
means, by content or by commit, so that two folders of one name are two models.
"""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shared.config import InputError
from shared.data.chat import TEMPLATE_FAULTS
from shared.models.folders import (
    CHATS,
    as_ids,
    embedding_count,
    open_model,
    open_tokenizer,
    read_object,
    readable,
    require_embeddings,
    require_folder,
    require_template,
    require_whole,
    weight_fault,
)
from shared.models.load import ModelConfig

READ = (".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken")
BESIDE = (  # what stages and trainers leave there, which no loader reads
    "manifest.json", "cost.json", "checkpoints.json", "stopped.json", "scores.json",
    "filtering.json", "trainer_state.json", "all_results.json", "train_results.json",
    "eval_results.json", "log.txt", "training_args.bin",
)  # fmt: skip
PADS = (  # special tokens that no text holds, the best first
    re.compile(r"pad", re.IGNORECASE),
    re.compile(r"reserved|unused|placeholder", re.IGNORECASE),
    re.compile(r"endoftext", re.IGNORECASE),
)
HUB_ERRORS = (OSError, ValueError, HTTPError)  # no network, no such name, a name that is none
ADAPTER = "adapter_model.safetensors"
EMBEDDINGS = re.compile(r"(embed_tokens|wte|embed_in|lm_head|embed_out)(\.base_layer)?\.weight$")
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


def merge_adapter(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy with a LoRA adapter in its weights, and the tokenizer that the adapter knows."""
    merged = with_saved_adapter(policy, adapter).merge_and_unload()
    if (adapter / "tokenizer.json").is_file():  # an SFT adapter's: it may hold the chat template
        tokenizer = AutoTokenizer.from_pretrained(adapter)
        require_template(adapter, tokenizer)
        require_embeddings(adapter, tokenizer, merged)
    return merged, tokenizer


def with_saved_adapter(policy: PreTrainedModel, adapter: Path) -> Any:
    """`policy` under a LoRA adapter from a folder; InputError if it was trained on another."""
    from peft import PeftModel, get_peft_model_state_dict  # takes seconds to import

    require_adapter(adapter, embedding_count(policy))
    with readable(adapter):
        adapted = PeftModel.from_pretrained(policy, str(adapter)).eval()
        own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    with safe_open(adapter / ADAPTER, framework="pt") as file:
        there = {name for name in file.keys() if not EMBEDDINGS.search(name)}  # noqa: SIM118
    here = {name for name in own if not EMBEDDINGS.search(name)}
    if left := sorted(there - here):
        raise InputError(
            f"{adapter}: {len(left)} tensors of the adapter are not loaded ({left[0]}): use the "
            "model that it was trained on"
        )
    if absent := sorted(here - there):
        raise InputError(
            f"{adapter}: save the whole adapter: {absent[0]} is not in its file and would do "
            "nothing"
        )
    if broken := sorted(name for name, value in own.items() if not value.isfinite().all()):
        raise InputError(
            f"{adapter}: {broken[0]} is not finite: load a checkpoint from before it broke, and "
            "lower the learning rate"
        )
    return adapted


def require_adapter(adapter: Path, rows: int) -> None:
    """InputError unless `adapter` holds a LoRA adapter for a model of `rows` embeddings."""
    with readable(adapter):
        if not (adapter / "adapter_config.json").is_file():
            raise InputError(f"{adapter}: no adapter here (adapter_config.json is missing)")
    config = read_object(adapter / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{adapter}: an adapter of type {config.get('peft_type')!r}; only LORA is merged"
        )
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM"):
        raise InputError(
            f"{adapter}: an adapter of a model for {task}, not of one that answers (CAUSAL_LM)"
        )
    if not (adapter / ADAPTER).is_file():
        raise InputError(
            f"{adapter}: {ADAPTER} is missing; save the adapter as safetensors (save_pretrained)"
        )
    require_whole(adapter / ADAPTER)
    with safe_open(adapter / ADAPTER, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            if not EMBEDDINGS.search(name):
                continue
            if (count := file.get_slice(name).get_shape()[0]) != rows:
                base = config.get("base_model_name_or_path")
                raise InputError(
                    f"{adapter}: the adapter has {count} embeddings, the model {rows}: resize the "
                    "model as it was before the adapter was trained, or use the adapter's own base"
                    + (f" ({base})" if base else "")
                )


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


def local_path(name: str, revision: str | None) -> Path:
    """The folder or .gguf file that `name` means, fetched from the hub if it is a hub name."""
    if is_local(name):
        return Path(name)
    try:
        patterns = [*(f"*{suffix}" for suffix in READ), CHATS]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HUB_ERRORS as error:
        raise hub_error(name, error) from error


def is_local(name: str) -> bool:
    """Whether `name` is a path, which must be there; else it is a hub name."""
    path = Path(name)
    if os.path.exists(name):  # which is False for what can be no path; Path.exists raises
        return True
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix in (
        ".gguf", ".safetensors",
    ):  # fmt: skip
        raise InputError(f"{name}: no such folder or file; a hub name is owner/name")
    return False


def hub_error(name: str, error: Exception) -> InputError:
    """What went wrong with a hub name, for the user."""
    return InputError(
        f"{name}: no such file or folder here, and the hub does not give it "
        f"({type(error).__name__}): check the name and revision, log in with `hf auth login` if it "
        "is gated, or fetch it where there is a network and name the folder"
    )


def address_of_model(name: str, revision: str | None = None) -> dict[str, Any]:
    """What `name` stands for, as plain values for a stage's address.

    Of a folder or file the SHA-256 of what a loader reads in it, of a hub name the commit: from the
    hub, or offline from its cache on this machine.
    """
    if is_local(name):
        path = Path(name)
        files = [path] if path.is_file() else sorted(filter(_counts, path.iterdir()))
        return {"files": {file.name: content_hash(file) for file in files}}
    return {"hub": name, "commit": commit_of(name, revision)}


def is_model_file(path: Path) -> bool:
    """Whether transformers or a Scorer reads this file of a whole model's folder.

    What runs when it is read (pickles), logs and adapters are none of it.
    """
    read = path.suffix in READ and path.name not in BESIDE and not path.name.startswith("adapter_")
    return path.is_file() and (read or path.name == CHATS)


def _counts(path: Path) -> bool:
    """Whether a file is part of what a name stands for: adapters and whatever is refused too."""
    read = path.suffix in (*READ, ".gguf", ".bin") and path.name not in BESIDE
    return path.is_file() and (read or path.name == CHATS)


def commit_of(name: str, revision: str | None) -> str:
    """The commit that a hub name's revision is at."""
    try:
        found = HfApi().model_info(name, revision=revision).sha
    except HUB_ERRORS as error:
        cached = None
        with suppress(ValueError):  # of a name that can be none
            cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise hub_error(name, error) from error
        found = Path(cached).parent.name  # .../snapshots/COMMIT/config.json
    return str(found)


_hashes: dict[tuple[str, int, int], str] = {}  # by path, size and time of the last change


def content_hash(path: Path) -> str:
    """SHA-256 of a file; read once a process while its size and time stay."""
    about = os.stat(path)
    key = str(path.resolve()), about.st_size, about.st_mtime_ns
    if key not in _hashes:
        with path.open("rb") as file:
            _hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[key]
