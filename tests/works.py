"""Every stage that computes with a model, by name, in its smallest form: what fills its folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evaluation.evaluate import (
    HeldOut,
    Prompts,
    evaluate,
    evaluate_best_of_n,
    score_samples,
)
from dpo.filtered import Filter, FilterConfig, train_filtered
from dpo.reference import score_mismatched, score_reference
from dpo.train import DirectConfig, DirectData, train_direct
from rlhf.ppo import PPOConfig, train_ppo
from rlhf.reward import RewardConfig, train_reward
from shared.data.batches import HELD_OUT
from shared.data.samples import sample_reference
from shared.generation.engine import Sampling
from shared.generation.start import Drawing
from shared.models.load import Start
from shared.models.lora import LoRAConfig
from shared.tasks.registry import TaskConfig
from shared.training.fit import OptimizerConfig
from shared.training.sft import SftConfig, fine_tune

Work = Callable[[Path], None]
DRAWING = Drawing(Sampling(max_new_tokens=8))
# with AdamW's usual epsilon the sign of a gradient of 1e-9 would move a weight by the whole rate
STEADY = OptimizerConfig(
    learning_rate=1e-3, schedule="constant", warmup_share=0.0, adam_epsilon=1e-2
)
CHECKPOINTED = STEADY.model_copy(update={"gradient_checkpointing": True})
# passes of two rows or pairs: of several ranks some make more of them than others
DIRECT = DirectConfig(batch_size=7, micro_batch_size=2, epochs=1, optimizer=STEADY)
REWARD = RewardConfig(batch_size=7, micro_batch_size=2, epochs=3, optimizer=STEADY)
PPO = PPOConfig(
    episodes=16, rollout_size=8, epochs=1, minibatch_size=5, micro_batch_size=2,
    optimizer=STEADY, value_learning_rate=1e-3,
)  # fmt: skip
SFT = SftConfig(examples=20, epochs=2, batch_size=4)


@dataclass(frozen=True)
class Inputs:
    """The folders that they read."""

    policy: Path
    reward: Path
    preferences: Path
    reference: Path
    samples: Path


def works(given: Inputs) -> dict[str, Work]:
    """All of them."""
    task = TaskConfig()
    start, adapted = Start(given.policy), Start(given.policy, LoRAConfig(rank=2))
    data = DirectData(given.preferences, given.reference, given.reference)
    prompts = Prompts(task, "test", 3, 2, 0)
    filtering = Filter(given.reward, FilterConfig(epochs=2), DRAWING)

    def direct(loss: str, start: Start = start, **setting: float) -> Work:
        return lambda f: train_direct(f, start, data, loss, setting, DIRECT, (0.5,))

    def ppo(start: Start = start, **changes: object) -> Work:
        config = PPO.model_copy(update=changes)
        inputs = given.reward, task, config, 0.1, DRAWING, (0.5,)
        return lambda f: train_ppo(f, start, *inputs)

    def evaluated(folder: Path) -> None:
        held = HeldOut(given.preferences, folder / "held-out")
        held.reference.mkdir()
        score_reference(held.reference, given.policy, given.preferences, file=HELD_OUT)
        evaluate(folder, given.policy, ".", given.policy, given.reward, held, prompts, DRAWING)

    return {
        "sft": lambda f: fine_tune(f, given.policy, task, SFT, 0),
        "samples": lambda f: sample_reference(
            f, task, given.policy, "validation", 4, 3, DRAWING, 0
        ),
        "reference": lambda f: score_reference(f, given.policy, given.preferences),
        "mismatched": lambda f: score_mismatched(f, given.policy, given.preferences, 0),
        "reward": lambda f: train_reward(
            f, given.policy, given.preferences, given.samples,
            REWARD, 0,
        ),
        "reward by LoRA": lambda f: train_reward(
            f, given.policy, given.preferences, given.samples,
            REWARD.model_copy(update={"lora": LoRAConfig(rank=2)}), 0,
        ),
        "scores": lambda f: score_samples(f, given.reward, given.samples, None),
        "dpo": direct("dpo", beta=0.1),
        "dpo by LoRA": direct("dpo", adapted, beta=0.1),
        "ipo": direct("ipo", tau=0.1),
        "kto": direct("kto", beta=0.1),
        "fdpo": lambda f: train_filtered(
            f, start, data, filtering, {"beta": 0.1}, DIRECT, ()
        ),
        "ppo": ppo(),
        "ppo by LoRA": ppo(adapted),
        "ppo with one trunk": ppo(shared_trunk=True),
        "ppo, checkpointed": ppo(optimizer=CHECKPOINTED),
        "ppo, all by LoRA": ppo(adapted, value_lora=LoRAConfig(rank=2)),
        "best-of-n": lambda f: evaluate_best_of_n(
            f, given.policy, given.reward, 2, prompts, DRAWING
        ),
        "evaluation": evaluated,
    }  # fmt: skip


TRAINERS = (
    "sft", "reward", "reward by LoRA", "dpo", "dpo by LoRA", "ipo", "kto", "fdpo",
    "ppo", "ppo by LoRA", "ppo with one trunk", "ppo, all by LoRA",
)  # fmt: skip
OTHERS = ("samples", "reference", "mismatched", "scores", "best-of-n", "evaluation")


def fill(folder: Path, trainer: str, given: Inputs) -> None:
    """Stage: one of them."""
    works(given)[trainer](folder)
