"""Supervised fine-tuning, by TRL: the common start of all methods.

Like every other training it goes on from its last save, which are TRL's own checkpoints with a
manifest beside them: one without has not been written to its end.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from shared.config import Config, InputError
from shared.models import ranks
from shared.models.device import on_gpu
from shared.models.load import ModelConfig, load_policy, load_tokenizer, new_policy, save
from shared.models.packing import with_ops
from shared.seeds import seed_of
from shared.stages import SAVES, flush_to_disk, intact, write_manifest
from shared.tasks.registry import TaskInput, make_task
from shared.tasks.task import Demonstration
from shared.training.finished import TrainingLog
from shared.training.fit import Precision, steps_of
from shared.training.saves import KEPT, minutes_between


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

    if sft.batch_size % ranks.count():
        raise InputError(
            f"`sft.batch_size` is {sft.batch_size}, which {ranks.count()} ranks cannot share "
            "evenly: make it a multiple"
        )
    rows = [masked(demonstration) for demonstration in demonstrations]
    steps = steps_of(len(rows), sft.batch_size, sft.epochs)
    saves = ranks.from_first(folder / SAVES)  # rank 0's, where the others leave their part
    newest = max((c for c in saves.glob("checkpoint-*") if intact(c)), key=step_of, default=None)
    done = 0 if newest is None else step_of(newest)
    lengths = [len(row["input_ids"]) for row in rows]
    order = ByLength(sft.batch_size, lengths=lengths, seed=seed)

    class Trainer(SFTTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> ByLength:
            return order

    trainer = Trainer(
        model=with_ops(policy),
        args=SFTConfig(
            output_dir=str(saves),
            num_train_epochs=sft.epochs,
            per_device_train_batch_size=sft.batch_size // ranks.count(),
            learning_rate=sft.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(50, steps // 2),
            completion_only_loss=True,
            gradient_checkpointing=sft.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=on_gpu() or sft.precision == "bfloat16",
            use_cpu=not on_gpu(),
            optim="adamw_torch_fused",
            save_strategy="no",  # `Saving` says when
            save_total_limit=KEPT,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            ddp_find_unused_parameters=False,
            seed=seed_of(seed, "SFT"),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # the log goes to a file
    trainer.add_callback(LogLines(TrainingLog(folder, steps, kept=done)))
    trainer.add_callback(Saving(saves))
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    save(trainer.model, tokenizer, folder)  # pyright: ignore[reportArgumentType]


def step_of(checkpoint: Path) -> int:
    """Steps that were done when TRL wrote it."""
    return int(checkpoint.name.rpartition("-")[2])


class ByLength(LengthGroupedSampler):
    """Rows of similar length together, which takes a third off the time: less padding.

    Each epoch's order is its own, whatever came before: a training that goes on finds its place.
    """

    def __init__(self, batch_size: int, *, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        number = seed_of(self.seed, "SFT batches", epoch)
        self.generator = torch.Generator().manual_seed(number)


class LogLines(TrainerCallback):
    """TRL's log as ours, a line as soon as it is made."""

    def __init__(self, log: TrainingLog):
        self.log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.log.add({"loss": float(logs["loss"])})


class Saving(TrainerCallback):
    """TRL's checkpoints every so many minutes, each with a manifest once it is whole."""

    def __init__(self, folder: Path):
        self.folder, self.last = folder, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        due = time.monotonic() - self.last >= 60 * minutes_between()
        control.should_save = ranks.from_first(due and state.global_step < state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        ranks.wait()  # each rank writes its part
        if ranks.is_first():
            flush_to_disk(self.folder.parent)  # the log up to here
            write_manifest(self.folder / f"checkpoint-{state.global_step}", {})
        self.last = time.monotonic()


def masked(demonstration: Demonstration) -> dict[str, list[int]]:
    """TRL's pre-tokenised form: ids with the EOS, and 1 where the loss looks."""
    before, after = demonstration
    return {
        "input_ids": [*before, *after],
        "completion_mask": [0] * len(before) + [1] * len(after),
    }
