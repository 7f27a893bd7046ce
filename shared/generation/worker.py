"""What runs inside vLLM's workers: taking over the policy's weights.

vLLM mixes this class into its own worker (`--worker-extension-cls`), here and in `klash serve`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class SyncWorker:
    """Methods that `collective_rpc` calls by name; `self` is vLLM's worker."""

    model_runner: Any

    def klash_load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over `weights`, named as in the policy's transformers folder."""
        self.model_runner.reload_weights(weights_iterator=iter(weights))
        repack_head(self.model_runner.get_model())

    def klash_load_file(self, path: str) -> None:
        """The same from a safetensors file, for a trainer in another process."""
        self.klash_load(load_file(path).items())

    def klash_architecture(self) -> dict[str, Any]:
        """The configuration of the model that is being served, as JSON."""
        return self.model_runner.model_config.hf_config.to_dict()


def repack_head(model: nn.Module) -> None:
    """Pack an output head that shares the embeddings' weights anew, on the CPU.

    There vLLM multiplies by a packed copy of each weight. Reloading packs the copies of linear
    layers again, but a tied head is reloaded as the embedding, and its copy keeps the old values.
    """
    head = getattr(model, "lm_head", None)
    if head is None or not hasattr(head, "cpu_linear"):
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    with torch.no_grad():
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
