"""What training steps are compared on: models, shapes, and pairs of tokens drawn at random."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from benchmarks.speed.smollm2 import convert
from dpo.losses import UNPAIRED
from dpo.reference import score_mismatched, score_reference
from shared.data.pairs import Pair
from shared.models.load import (
    ModelConfig,
    load_tokenizer,
    new_policy,
    new_scalar_model,
    save,
    special_ids,
)
from shared.stages import output_folder, write_jsonl
from shared.tasks.registry import TaskConfig, make_task
from shared.training.fit import OptimizerConfig, Precision

LOSS_OF_WORK = {  # work: our loss and its setting
    "dpo": ("dpo", {"beta": 0.1}),
    "ipo": ("ipo-token", {"tau": 0.5}),
    "kto": ("kto", {"beta": 0.1}),
}


class Shape(NamedTuple):
    """A step's pairs: their number, prompt tokens per completion token, and how many of them go
    through the model at a time, on either side."""

    batch: int
    prompt_ratio: float
    micro_batch: int


class Workload(NamedTuple):
    """What one model trains on; the rate is large enough to change the second step's loss."""

    learning_rate: float
    precisions: tuple[Precision, ...]
    completion_tokens: tuple[int, int]  # least and most, EOS included
    shapes: dict[str, Shape]


WORKLOADS = {
    "smollm2-135m": Workload(
        learning_rate=1e-5,
        precisions=("float32", "bfloat16"),
        completion_tokens=(24, 48),
        shapes={
            "prompt-heavy": Shape(4, 2.0, 4),
            "prompt-heavy, batch 16": Shape(16, 2.0, 8),
            "equal": Shape(4, 1.0, 4),
            "equal, batch 16": Shape(16, 1.0, 8),
            "completion-heavy": Shape(4, 0.25, 4),
            "completion-heavy, batch 16": Shape(16, 0.25, 8),
        },
    ),
    "reviews": Workload(
        learning_rate=5e-4,
        precisions=("float32",),
        completion_tokens=(5, 16),
        shapes={"equal": Shape(64, 1.15, 64)},  # prompts of some 12 tokens
    ),
}


class Case(NamedTuple):
    """What one comparison works on, the same for both sides."""

    work: str
    precision: Precision
    batch: int  # pairs a step
    micro_batch: int  # of them at a time
    learning_rate: float
    model: Path  # a policy; for `reward` a reward model with an untrained head
    data: Path  # train.jsonl; where the loss asks for them reference and mismatched.safetensors

    @property
    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(
            learning_rate=self.learning_rate,
            schedule="constant",
            warmup_share=0.0,
            precision=self.precision,
        )


def policy_folder(name: str, runs: Path) -> Path:
    """SmolLM2, or a model of the size that `reviews` trains, with random weights."""
    folder = runs / "speed" / name
    if name == "smollm2-135m":
        convert(folder)
    else:
        tokenizer = make_task(TaskConfig()).tokenizer()
        save(new_policy(ModelConfig(), tokenizer, seed=0), tokenizer, folder)
    return folder


def make_case(
    work: str,
    precision: Precision,
    workload: Workload,
    shape: str,
    steps: int,
    policy: Path,
    folder: Path,
) -> Case:
    """Lay out in `folder` what `steps` steps of both sides need: pairs, and what the loss reads."""
    tokenizer, model, data = load_tokenizer(policy), policy, output_folder(folder / "data")
    size = workload.shapes[shape]
    pairs = draw_pairs(
        count=steps * size.batch,
        completion_tokens=workload.completion_tokens,
        ratio=size.prompt_ratio,
        tokenizer=tokenizer,
        seed=0,
    )
    write_jsonl(data / "train.jsonl", [pair._asdict() for pair in pairs])
    if work == "reward":
        model = folder / "model"
        save(new_scalar_model(policy, seed=0), tokenizer, model)
    else:
        score_reference(data, policy, data, precision)
        if LOSS_OF_WORK[work][0] in UNPAIRED:
            score_mismatched(data, policy, data, 0, precision)
    return Case(
        work=work,
        precision=precision,
        batch=size.batch,
        # KTO's baseline is its micro-batch's at TRL, and the step's here
        micro_batch=size.batch if work == "kto" else size.micro_batch,
        learning_rate=workload.learning_rate,
        model=model,
        data=data,
    )


def draw_pairs(
    count: int,
    completion_tokens: tuple[int, int],
    ratio: float,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> list[Pair]:
    """Pairs of random ordinary tokens; completions end with EOS, their lengths lie evenly within
    `completion_tokens`; a prompt is `ratio` times as long as its completions are on average."""
    rng = np.random.default_rng(seed)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = [i for i in range(len(tokenizer)) if i not in special]
    eos = special_ids(tokenizer).eos
    low, high = completion_tokens

    def text(tokens: int) -> list[int]:
        return rng.choice(ordinary, tokens).tolist()

    pairs = []
    for number in range(count):
        a, b = rng.integers(low, high + 1, 2)
        prompt = text(max(1, round(ratio * (a + b) / 2)))
        pair = Pair(str(number), "", prompt, [*text(a - 1), eos], [*text(b - 1), eos])
        pairs.append(pair)
    return pairs
