"""Sampling from a running vLLM server, on other GPUs or in another process than the trainer.

`klash serve FOLDER` starts one that takes weights over from a safetensors file, which works
wherever trainer and server see one file system. With `--transfer nccl`, or from a plain vLLM server
(VLLM_SERVER_DEV_MODE=1, `--weight-transfer-config '{"backend": "nccl"}'`), weights go from GPU to
GPU instead.
"""

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NoReturn

import requests
from requests.adapters import HTTPAdapter
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from shared.config import InputError
from shared.generation.engine import (
    Completions,
    Dtype,
    EngineLost,
    Sampling,
    in_order,
    require_tokens,
)
from shared.generation.sync import require_fresh, require_same_architecture
from shared.generation.vllm import (
    CPU_BLOCK,
    ENVIRONMENT,
    INSTALL,
    WORKER,
    require_room,
    sampling_params,
)
from shared.models import ranks
from shared.models.cost import count_samples
from shared.models.device import on_gpu
from shared.models.folders import require_folder
from shared.models.load import SpecialIds
from shared.models.lora import plain_weights

AT_ONCE = 256  # requests under way; vLLM batches them


class ServerEngine:
    """Samples from a server's copy of `model`'s weights; `sync()` after every change of them."""

    exact = False  # it may have been started in any precision

    def __init__(
        self,
        model: PreTrainedModel,
        ids: SpecialIds,
        url: str,
        transfer: Literal["file", "nccl"] = "file",
        *,
        tolerance: float = 1e-3,
        temperature: float = 1.0,
        timeout: float = 600.0,
    ):
        """See `VLLMEngine`. `timeout`: seconds without an answer after which the server is lost."""
        self.model, self.ids, self.temperature = model, ids, temperature
        self.url, self.tolerance, self.timeout = url.rstrip("/"), tolerance, timeout
        self.session = requests.Session()
        self.session.mount(self.url, HTTPAdapter(pool_maxsize=AT_ONCE))
        served = self._get("/v1/models")["data"][0]
        self.name, self.length = served["id"], int(served["max_model_len"])
        self.sender: Any = None
        if transfer == "nccl" and not ranks.is_first():
            pass  # rank 0 sends the weights of all
        elif transfer == "nccl":
            self.sender = nccl_sender(model, self.url, self._get("/get_world_size")["world_size"])
        else:
            there = self._post("/collective_rpc", {"method": "klash_architecture"})["results"][0]
            require_same_architecture(model, there, f"the server at {self.url}")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Completions:
        """See `Engine.generate`. The same seed, weights and prompts give the same tokens."""
        require_tokens(prompts)
        require_room(prompts, sampling, self.length)
        own = ranks.mine(range(len(prompts)))
        params = sampling_params(len(prompts), sampling, self.ids.ends)
        common = {"model": self.name, "return_token_ids": True}
        bodies = [{**common, "prompt": list(prompts[i]), **params[i]} for i in own]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(lambda body: self._post("/v1/completions", body), bodies))
        drawn = [answer["choices"][0] for answer in answers]
        count_samples(self.model, [prompts[i] for i in own], [d["token_ids"] for d in drawn])
        found = {
            row: (d["token_ids"], d["finish_reason"] == "length", d["logprobs"]["token_logprobs"])
            for row, d in zip(own, drawn, strict=True)
        }
        return in_order(ranks.gathered(found))

    def sync(self) -> float:
        """See `Engine.sync`. StaleEngine if the server does not come to the model's weights."""
        with ranks.whole(self.model):
            if ranks.is_first():
                self._send()
        ranks.wait()
        return require_fresh(self, self.ids, self.temperature, self.tolerance)

    def _send(self) -> None:
        if self.sender is not None:
            self.sender.send_weights()
        else:
            self._send_file()
        self._post("/reset_prefix_cache", {})

    def _send_file(self) -> None:
        with tempfile.TemporaryDirectory(prefix="klash-weights-") as folder:
            path = Path(folder) / "policy.safetensors"
            save_file({name: w.cpu().contiguous() for name, w in plain_weights(self.model)}, path)
            self._post("/collective_rpc", {"method": "klash_load_file", "args": [str(path)]})

    def _get(self, path: str) -> Any:
        return self._answer("GET", path, None)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._answer("POST", path, body)

    def _answer(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            response = self.session.request(
                method, self.url + path, json=body, timeout=self.timeout
            )
        except (requests.ConnectionError, requests.Timeout) as error:
            raise EngineLost(
                f"the vLLM server at {self.url} does not answer ({type(error).__name__}); start it "
                "again (`klash serve`) and give the same command: it goes on from what is finished"
            ) from error
        if response.status_code == 404:
            raise InputError(
                f"{self.url}{path}: not found; start the server with `klash serve`, or a plain "
                "vLLM server with VLLM_SERVER_DEV_MODE=1 and `generation.transfer` nccl"
            )
        if not response.ok:
            raise InputError(f"{self.url}{path}: {response.status_code}: {response.text[:500]}")
        return response.json() if response.content else None


def nccl_sender(model: PreTrainedModel, url: str, workers: int) -> Any:
    """The trainer's end of vLLM's own NCCL weight transfer: `send_weights()` after each update."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.utils.network_utils import get_ip, get_open_port

    class PolicySource(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(n, w.dtype, tuple(w.shape)) for n, w in plain_weights(model)]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return plain_weights(model)

    return WeightTransferTrainerFactory.trainer_init(
        NCCLTrainerInitInfo(get_ip(), get_open_port(), workers + 1, rank=0),
        client=HTTPVLLMWeightSyncClient(url),
        source=PolicySource(),
    )


def become_server(folder: Path, *, host: str, port: int, dtype: Dtype, transfer: str) -> NoReturn:
    """This process turns into a vLLM server of `folder`, whose weights a trainer may replace.

    Whoever reaches `host` and `port` can replace them.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f"vLLM is not installed; {INSTALL}")
    require_folder(folder, "policy")
    environment = {**ENVIRONMENT, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_SERVER_DEV_MODE": "1"}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # a server's engine has its own process
    os.environ.update({key: os.environ.get(key, value) for key, value in environment.items()})
    words = ["--model", str(folder), "--served-model-name", "policy"]
    words += ["--host", host, "--port", str(port)]
    words += ["--dtype", dtype, "--logprobs-mode", "processed_logprobs"]
    words += ["--generation-config", "vllm", "--worker-extension-cls", WORKER]
    if transfer == "nccl":
        words += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    if not on_gpu():
        words += ["--enforce-eager", "--block-size", str(CPU_BLOCK)]
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]
    os.execv(sys.executable, server)
