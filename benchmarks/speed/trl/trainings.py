"""An experiment's trainings as a user assembles them from TRL's trainers, at their best settings.

They run one after another in a process with all threads; PPO's are in another one, since it takes
another TRL. Each gets what ours gets too: models, token ids, batches, epochs, AdamW (fused),
rates, schedules. No gradient checkpointing; nothing is logged, evaluated or saved on the way. The
pairs lie on disk, so that TRL scores the reference once for all trainings on one set of pairs.

Seconds run from the start of a training to its saved policy. Not in them, to TRL's advantage: its
imports, and making token ids and data sets.

What TRL does in its own way: IPO is the form per token (ours summed over tokens is trained with a
tau that asks for a like margin); KTO keeps the order of its first epoch; batches are padded and not
sorted by length, since batches of equal length would be another training; PPO does not clip the
gradient and steps its schedule once an update, so that a warm-up would be updates at rate 0 and is
left out; its value model is one of its own even where ours shares the policy's trunk.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    get_scheduler,
)

from benchmarks.pipeline.places import end_with, quiet_libraries
from benchmarks.speed.sides import seconds_since
from benchmarks.speed.trl.ppo import import_trl_ppo, loaded, trl_settings
from benchmarks.speed.trl.steps import common_settings, joined_rows, labelled_rows, of_token_ids
from dpo.losses import UNPAIRED
from dpo.reference import mismatch
from dpo.train import DirectConfig, split_setting
from rlhf.ppo import PPOConfig, prompt_stream
from rlhf.reward import RewardConfig, normalise
from rlhf.rollout import value_model
from shared.data.pairs import Pair, read_pairs
from shared.generation.engine import Sampling
from shared.models.load import load_tokenizer, new_scalar_model, save
from shared.models.scorer import Scorer
from shared.seeds import seed_of
from shared.tasks.registry import TaskConfig
from shared.training.fit import OptimizerConfig, batches

PAIR_LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "ipo-token": "ipo"}  # ours: TRL's


class FinishedTraining(NamedTuple):
    """What came of a training: its policy (or reward model), optimiser steps, and seconds."""

    folder: Path
    steps: int
    seconds: float


@contextmanager
def trl_process(threads: int, start: Callable[..., Any], *inputs: Any) -> Iterator[Executor]:
    """A process that has imported TRL by `start(*inputs)`, and waits."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, start_process, (os.getpid(), threads)) as pool:
        pool.submit(start, *inputs).result()
        yield pool


def start_process(parent: int, threads: int) -> None:
    end_with(parent)
    torch.set_num_threads(threads)
    quiet_libraries()
    os.environ["TQDM_DISABLE"] = "1"


def import_trl() -> None:
    """The trainers that the installed TRL has."""
    import trl.trainer.dpo_trainer
    import trl.trainer.kto_trainer
    import trl.trainer.reward_trainer  # noqa: F401


def import_ppo(library: Path) -> None:
    import_trl_ppo(library)


# The trainings


def make_data(folder: Path, preferences: Path, seed: int) -> None:
    """Token ids on disk: for reward models, for pair losses, and (`kto`) completions on their own.

    KTO's are shuffled, since its trainer takes them in their order, and hold our mismatched ones.
    """
    from datasets import Dataset

    pairs = read_pairs(preferences / "train.jsonl")
    partner = mismatch([tuple(pair.prompt_ids) for pair in pairs] * 2, seed_of(seed, "mismatched"))
    unpaired = labelled_rows(pairs, partner)
    (order,) = batches(len(unpaired), len(unpaired), 1, seed_of(seed, "batches"))
    rows = {
        "reward": joined_rows(pairs),
        "pairs": [pair._asdict() for pair in pairs],
        "kto": [unpaired[i] for i in order],
    }
    for name, some in rows.items():
        Dataset.from_list(some).save_to_disk(folder / name)


def trl_train_reward(
    folder: Path, policy: Path, data: Path, references: Path, reward: RewardConfig, seed: int
) -> FinishedTraining:
    """`RewardTrainer` from the same head; normalised as ours is, for PPO's coefficient."""
    from trl.trainer.reward_config import RewardConfig as TrlConfig
    from trl.trainer.reward_trainer import RewardTrainer

    start = perf_counter()
    model = new_scalar_model(policy, seed_of(seed, "reward head"))
    save(model, load_tokenizer(policy), folder / "start")
    settings = common_settings(folder, reward.optimizer, reward.batch_size, reward.epochs)
    config = TrlConfig(
        **settings,
        seed=seed,
        logging_strategy="no",
        center_rewards_coefficient=reward.center or None,
    )
    trainer = trained_by(RewardTrainer, folder / "start", config, data / "reward")
    trainer.save_model(str(folder))
    normalise(folder, references, scaled=reward.normalise)
    return FinishedTraining(folder, trainer.state.global_step, seconds_since(start))


def trl_train_direct(
    folder: Path,
    policy: Path,
    data: Path,
    loss: str,
    setting: dict[str, float],
    direct: DirectConfig,
    seed: int,
) -> FinishedTraining:
    """`DPOTrainer` or `KTOTrainer`; `setting` is TRL's, see `trl_setting`."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    start, (hyperparameters, direct) = perf_counter(), split_setting(setting, direct)
    settings = common_settings(folder, direct.optimizer, direct.batch_size, direct.epochs)
    settings |= {"seed": seed, "logging_strategy": "no", "precompute_ref_log_probs": True}
    settings |= hyperparameters
    if loss in UNPAIRED:
        settings["per_device_train_batch_size"] = 2 * direct.batch_size  # completions
        config = KTOConfig(**settings, train_sampling_strategy="sequential")
        trainer = trained_by(KTOTrainer, policy, config, data / "kto")
    else:
        config = DPOConfig(**settings, loss_type=[PAIR_LOSSES[loss]])
        trainer = trained_by(DPOTrainer, policy, config, data / "pairs")
    trainer.save_model(str(folder / "final"))
    return FinishedTraining(folder, trainer.state.global_step, seconds_since(start))


def trained_by(trainer: type, model: Path, config: Any, data: Path) -> Any:
    """A trainer of TRL's on token ids, trained."""
    from datasets import Dataset

    made = of_token_ids(trainer)(
        model=str(model),
        args=config,
        train_dataset=Dataset.load_from_disk(data),
        processing_class=load_tokenizer(model),
    )
    made.remove_callback(PrinterCallback)
    made.train()
    return made


def trl_setting(loss: str, setting: dict[str, float], pairs: list[Pair]) -> dict[str, float]:
    """TRL calls IPO's tau beta, and its IPO is per token.

    There a tau that asks for a like margin is the mean length times as large.
    """
    if "tau" not in setting:
        return setting
    lengths = [len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    tau = setting["tau"] * (mean(lengths) if loss == "ipo" else 1.0)
    return {**{k: v for k, v in setting.items() if k != "tau"}, "beta": tau}


def trl_train_ppo(
    folder: Path,
    policy: Path,
    reward_model: Path,
    task: TaskConfig,
    ppo: PPOConfig,
    kl_coef: float,
    sampling: Sampling,
    seed: int,
) -> FinishedTraining:
    """`PPOTrainer` of TRL 1.12.0 on our prompts, with our two learning rates."""
    from datasets import Dataset

    start, module = perf_counter(), sys.modules["trl.experimental.ppo.ppo_trainer"]
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    updates = max(1, ppo.episodes // ppo.rollout_size)
    prompts = chain.from_iterable(islice(prompt_stream(tokenizer, task, ppo, seed), updates))
    rows = Dataset.from_list([{"input_ids": ids} for ids in prompts])
    trained, value = loaded(AutoModelForCausalLM, policy), in_score_units(reward_model)
    rates = {"policy": ppo.optimizer.learning_rate, "value": ppo.value_learning_rate}
    groups = [
        {"params": list(trained.parameters()), "lr": rates["policy"]},
        {"params": list(value.parameters()), "lr": rates["value"]},
    ]
    optimizer, steps = adamw(groups, ppo.optimizer), []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer = module.PPOTrainer(
        args=module.PPOConfig(
            output_dir=str(folder),
            seed=seed,
            logging_strategy="no",
            total_episodes=updates * ppo.rollout_size,
            kl_coef=kl_coef,
            whiten_rewards=ppo.whiten_rewards,
            **trl_settings(ppo, sampling),
        ),
        processing_class=tokenizer,
        model=trained,
        ref_model=loaded(AutoModelForCausalLM, policy),
        reward_model=in_score_units(reward_model),
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows,
        optimizers=(optimizer, get_scheduler(ppo.optimizer.schedule, optimizer, 0, updates)),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.accelerator.print = lambda *_: None
    trainer.train()
    save(trained, tokenizer, folder / "final")
    return FinishedTraining(folder, len(steps), seconds_since(start))


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        groups,
        betas=(0.9, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def in_score_units(reward_model: Path) -> Any:
    """The classifier with the head that our value model starts from: (raw - offset) / scale."""
    model = loaded(AutoModelForSequenceClassification, reward_model)
    model.score = value_model(reward_model, Scorer(reward_model)).score
    return model
