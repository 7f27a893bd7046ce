"""Supervised fine-tuning, by TRL: the common start of all methods."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from shared.config import Config
from shared.models.device import on_gpu
from shared.models.load import ModelConfig, load_policy, load_tokenizer, new_policy, save
from shared.models.packing import with_ops
from shared.seeds import seed_of
from shared.tasks.registry import TaskInput, make_task
from shared.tasks.task import Demonstration
from shared.training.finished import TrainingLog
from shared.training.fit import Precision, steps_of


class SftConfig(Config):
    """Completion-only cross-entropy on the task's corpus."""

    examples: int = Field(default=20000, gt=0)
    """Prompts with their completions that are drawn from the task's corpus."""
    epochs: int = Field(default=2, gt=0)
    """Passes over the examples."""
    batch_size: int = Field(default=64, gt=0)
    """Examples in an optimiser step."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Highest learning rate, after 50 steps of warm-up (at most half of all); from there a cosine
    to 0."""
    precision: Precision = "float32"
    """Precision of matrix products on a CPU; a GPU has bfloat16."""
    gradient_checkpointing: bool = False
    """As of the other optimisers: less memory, more time."""


def train_sft(folder: Path, task: TaskInput, model: ModelConfig, sft: SftConfig, seed: int) -> None:
    """Stage: a new policy trained on `sft.examples` prompts with completions; saved to `folder`."""
    source = make_task(task)
    tokenizer = source.tokenizer()
    policy = new_policy(model, tokenizer, seed_of(seed, "initial weights"))
    rows = source.demonstrations(tokenizer, sft.examples, seed)
    train_on(folder, policy, tokenizer, rows, sft, seed)


def fine_tune(folder: Path, policy: Path, task: TaskInput, sft: SftConfig, seed: int) -> None:
    """Stage: the pretrained `policy` trained on at most `sft.examples` demonstrations."""
    tokenizer = load_tokenizer(policy)
    rows = make_task(task).demonstrations(tokenizer, sft.examples, seed)
    train_on(folder, load_policy(policy), tokenizer, rows, sft, seed)


def train_on(
    folder: Path,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    sft: SftConfig,
    seed: int,
) -> None:
    """SFT of `policy` by TRL; saved to `folder`."""
    # Here and not above: they take seconds to import, and a run with SFT cached needs neither.
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    rows = [masked(demonstration) for demonstration in demonstrations]
    steps = steps_of(len(rows), sft.batch_size, sft.epochs)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=with_ops(policy),
            args=SFTConfig(
                output_dir=scratch,
                num_train_epochs=sft.epochs,
                per_device_train_batch_size=sft.batch_size,
                learning_rate=sft.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=min(50, steps // 2),
                completion_only_loss=True,
                gradient_checkpointing=sft.gradient_checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                bf16=on_gpu() or sft.precision == "bfloat16",
                use_cpu=not on_gpu(),
                optim="adamw_torch_fused",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=max(1, min(50, steps // 10)),
                train_sampling_strategy="group_by_length",  # a third less time: less padding
                seed=seed_of(seed, "SFT"),
                data_seed=seed_of(seed, "SFT batches"),
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)  # the log goes to a file
        trainer.add_callback(LogLines(TrainingLog(folder, 0)))
        trainer.train()
    save(trainer.model, tokenizer, folder)  # pyright: ignore[reportArgumentType]


class LogLines(TrainerCallback):
    """TRL's log as ours, a line as soon as it is made."""

    def __init__(self, log: TrainingLog):
        self.log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            steps = {"step": state.global_step, "of": state.max_steps}
            self.log.add({**steps, "loss": float(logs["loss"])})


def masked(demonstration: Demonstration) -> dict[str, list[int]]:
    """TRL's pre-tokenised form: ids with the EOS, and 1 where the loss looks."""
    before, after = demonstration
    return {
        "input_ids": [*before, *after],
        "completion_mask": [0] * len(before) + [1] * len(after),
    }
