"""LoRA adapters from a folder: whether they fit a policy, and merged into it."""

import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shared.config import InputError
from shared.models.folders import embedding_count, read_object, readable, require_whole
from shared.models.opening import require_embeddings, require_template

ADAPTER = "adapter_model.safetensors"
EMBEDDINGS = re.compile(r"(embed_tokens|wte|embed_in|lm_head|embed_out)(\.base_layer)?\.weight$")


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
