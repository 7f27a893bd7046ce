"""TRL 1.12.0, the last release with `PPOTrainer`: its installation and settings."""

import os
import shlex
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.ppo import PPOConfig
from shared.config import InputError
from shared.generation.engine import Sampling
from shared.models.device import on_gpu

TRL = "1.12.0"


def install_trl(folder: Path) -> Path:
    """TRL 1.12.0 in a folder of its own, since the TRL that is installed has no PPO."""
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            target = Path(scratch) / "trl"
            words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            command = [*words, "--target", str(target), f"trl=={TRL}"]
            if subprocess.run(command).returncode != 0:
                again = shlex.join([*words, "--target", str(folder), f"trl=={TRL}"])
                raise InputError(f"`klash speed` needs TRL {TRL} for PPO; this failed: {again}")
            target.rename(folder)
    return folder


def import_trl_ppo(library: Path) -> Any:
    """The module of `PPOTrainer`, in a process that has not imported another TRL."""
    sys.path.insert(0, str(library))
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    trl = import_module("trl")
    assert trl.__version__ == TRL, trl.__version__
    return import_module("trl.experimental.ppo.ppo_trainer")


def trl_settings(ppo: PPOConfig, sampling: Sampling) -> dict[str, Any]:
    """`PPOTrainer`'s settings for one update.

    The rollout is its one batch a device, of which it takes minibatches: with gradient accumulation
    instead, it would step once an epoch.
    """
    return {
        "use_cpu": not on_gpu(),
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "num_sample_generations": 0,
        "per_device_train_batch_size": ppo.rollout_size,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": ppo.rollout_size // ppo.minibatch_size,
        "local_rollout_forward_batch_size": ppo.rollout_size,
        "num_ppo_epochs": ppo.epochs,
        "response_length": sampling.max_new_tokens,
        "stop_token": "eos",
        "temperature": sampling.temperature,
        "missing_eos_penalty": ppo.missing_eos_penalty,
        "gamma": ppo.gamma,
        "lam": ppo.lam,
        "cliprange": ppo.clip,
        "cliprange_value": ppo.value_clip,
        "vf_coef": 1.0,
    }


def loaded(kind: Any, folder: Path) -> PreTrainedModel:
    return kind.from_pretrained(folder, dtype=torch.float32)
