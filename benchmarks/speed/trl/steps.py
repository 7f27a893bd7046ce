"""TRL's trainers as sides: their own loops, at their best settings, one optimiser step a round.

The reference is scored before training, also KTO's on mismatched completions; no gradient
checkpointing, fused AdamW. A round's seconds are those from one log to the next, in which TRL
collates, passes forward and back, clips, steps and logs, as ours does.
"""

import os
from pathlib import Path
from time import perf_counter
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from benchmarks.speed.cases import LOSS_OF_WORK, Case
from benchmarks.speed.sides import Round, Turns, seconds_since
from dpo.reference import read_mismatched
from shared.data.pairs import Pair, read_pairs
from shared.models.device import on_gpu
from shared.models.load import load_tokenizer
from shared.training.fit import OptimizerConfig


def train_in_turn(turns: Turns, case: Case) -> None:
    """TRL's trainer on all pairs of `case`, a batch a round."""
    os.environ["TQDM_DISABLE"] = "1"
    trainer = make_trainer(case)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(InTurn(turns, case.batch))
    trainer.train()


class InTurn(TrainerCallback):
    """Holds a trainer up between its steps until the next round is due."""

    def __init__(self, turns: Turns, pairs: int):
        self.turns, self.pairs = turns, pairs

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._wait(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:  # the log after the last step has none
            seconds = seconds_since(self.start)
            self.turns.send(Round(self.pairs, seconds, logs["loss"], logs["num_tokens"]))
            self._wait(control)

    def _wait(self, control: Any) -> None:
        control.should_training_stop = not self.turns.wait()
        self.start = perf_counter()


def make_trainer(case: Case) -> Any:
    """The trainer of `case.work`, with the settings that ours has too."""
    # Here and not above: they take seconds to import, and only the peer's process needs them.
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    pairs, settings = read_pairs(case.data / "train.jsonl"), step_settings(case)
    if case.work == "reward":
        trainer, config, rows = RewardTrainer, RewardConfig(**settings), joined_rows(pairs)
    elif case.work == "kto":
        settings["per_device_train_batch_size"] = 2 * case.batch  # completions
        trainer, config = KTOTrainer, KTOConfig(**settings, **reference_settings(case))
        rows = labelled_rows(pairs, read_mismatched(case.data).partner.tolist())
    else:
        kind = "ipo" if case.work == "ipo" else "sigmoid"
        trainer = DPOTrainer
        config = DPOConfig(**settings, **reference_settings(case), loss_type=[kind])
        rows = [pair._asdict() for pair in pairs]
    return of_token_ids(trainer)(
        model=str(case.model),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(case.model),
    )


def of_token_ids(trainer: type) -> type:
    """`trainer` on rows that are token ids already: DPO's and KTO's would ask for texts."""

    def as_it_is(self: Any, dataset: Any, *_: Any) -> Any:
        return dataset

    return type(trainer.__name__, (trainer,), {"_prepare_dataset": as_it_is})


def step_settings(case: Case) -> dict[str, Any]:
    """One epoch in the pairs' own order, each step logged."""
    settings = common_settings(case.data / "trl", case.optimizer, case.micro_batch, epochs=1)
    in_order = {"train_sampling_strategy": "sequential", "logging_steps": 1}
    parts = case.batch // case.micro_batch
    return {**settings, **in_order, "gradient_accumulation_steps": parts}


def common_settings(
    folder: Path, optimizer: OptimizerConfig, batch: int, epochs: int
) -> dict[str, Any]:
    """Settings of every TRL trainer; its warm-up is rounded as ours is."""
    gpu = on_gpu()
    constant = optimizer.schedule == "constant"
    return {
        "output_dir": str(folder),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if constant else optimizer.schedule,
        "warmup_steps": optimizer.warmup_share,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "adam_beta2": optimizer.adam_beta2,
        "adam_epsilon": optimizer.adam_epsilon,
        "optim": "adamw_torch_fused",
        "bf16": optimizer.precision == "bfloat16",
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "gradient_checkpointing": False,
        "max_length": None,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def reference_settings(case: Case) -> dict[str, Any]:
    """DPO's and KTO's own settings; TRL calls IPO's tau beta."""
    (value,) = LOSS_OF_WORK[case.work][1].values()
    return {"beta": value, "precompute_ref_log_probs": True}


def joined_rows(pairs: list[Pair]) -> list[dict[str, Any]]:
    """Prompt and completion as one, for reward models."""
    return [
        {"chosen_ids": p.prompt_ids + p.chosen_ids, "rejected_ids": p.prompt_ids + p.rejected_ids}
        for p in pairs
    ]


def labelled_rows(pairs: list[Pair], partner: list[int]) -> list[dict[str, Any]]:
    """Each pair's chosen completion and then its rejected one, both with ours' mismatched one.

    TRL itself would take the one before in the batch, of the same prompt every other time.
    """
    prompts = [pair.prompt_ids for pair in pairs] * 2
    completions = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    return [
        {
            "prompt_ids": prompts[row],
            "completion_ids": completions[row],
            "KL_completion_ids": completions[partner[row]],
            "label": row < len(pairs),
        }
        for number in range(len(pairs))
        for row in (number, len(pairs) + number)
    ]
