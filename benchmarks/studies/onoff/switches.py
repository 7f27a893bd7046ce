"""Optimisations and how each is switched off, for `klash study onoff`.

A stage that runs here runs under a *variant*: other shortcuts than usual in its process
(`shared.models.ops.Shortcuts`), keys of the configuration, threads. The variant's name is an input
of the stage, so that its folder is its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from dpo.train import DirectConfig, DirectData, Objective, train_direct
from rlhf.ppo import PPOConfig, train_ppo
from rlhf.reward import train_reward
from rlhf.rollout import as_rows
from shared.data.preferences import make_preferences
from shared.generation.engine import Sampling
from shared.generation.hf import HFEngine
from shared.models.load import load_policy, load_tokenizer, special_ids
from shared.models.logprobs import token_logprobs
from shared.models.ops import ALL, Shortcuts, using
from shared.models.sequences import collate

PAIRS, PROMPTS, SAMPLES = 256, 64, 4  # of `read_logprobs`; prompts are the first pairs'
WORKS: dict[str, Callable[..., None]] = {
    "preferences": make_preferences,
    "reward": train_reward,
    "direct": train_direct,
    "ppo": train_ppo,
}


@dataclass(frozen=True)
class Variant:
    """Shortcuts in force, keys of the experiment, threads.

    `resampled`: its preferences are drawn under it too, else all variants share them.
    """

    shortcuts: Shortcuts = ALL
    keys: tuple[str, ...] = ()
    threads: int | None = None
    resampled: bool = False


BLOCK = 2**12  # logits: 38 tokens of the vocabulary of `reviews`
NO_REUSE = ("--ppo.reuse_logprobs=false",)
HALVES = (
    "--direct.micro_batch_size=32",
    "--ppo.micro_batch_size=32",
    "--reward.micro_batch_size=16",
)
VARIANTS = {
    "default": Variant(),
    "padded": Variant(Shortcuts(packed=False)),
    "PyTorch": Variant(Shortcuts(c=False)),
    "PyTorch's products": Variant(Shortcuts(c_products=False)),
    "transformers' cache": Variant(Shortcuts(packed_sampling=False)),
    "every token": Variant(Shortcuts(read_only=False)),
    "blocks": Variant(Shortcuts(block=BLOCK)),
    "each row": Variant(Shortcuts(beginnings_once=False), resampled=True),
    "no reuse": Variant(keys=NO_REUSE),
    "two threads": Variant(threads=2),
    "halves": Variant(keys=HALVES),
    "all off": Variant(
        Shortcuts(c=False, packed=False, beginnings_once=False), NO_REUSE, 2, resampled=True
    ),
}
DEFAULT = "default"


class Comparison(NamedTuple):
    """An optimisation, what the other side does in its place, and the kinds of arms it touches."""

    name: str
    off_means: str
    on: str
    off: str
    kinds: tuple[str, ...]
    yardstick: bool = False  # no optimisation: the same sums in another order


EVERY = ("direct", "ppo", "reward")
COMPARISONS = (
    Comparison("packed passes", "padded rows, transformers' own pass", DEFAULT, "padded", EVERY),
    Comparison("kernels in C", "PyTorch's operations, SDPA", DEFAULT, "PyTorch", EVERY),
    Comparison("products in C", "PyTorch's", DEFAULT, "PyTorch's products", EVERY),
    Comparison(
        "sampling without padding", "transformers' cache, padded", DEFAULT,
        "transformers' cache", ("ppo",),
    ),
    Comparison(
        "tokens that are read only", "every token", DEFAULT, "every token", EVERY
    ),
    Comparison("logits in blocks", "all at once", "blocks", DEFAULT, ("direct", "ppo")),
    Comparison(
        "shared beginnings once", "in every row, from the pairs on", DEFAULT, "each row", EVERY
    ),
    Comparison("reused log-probabilities", "one more pass", DEFAULT, "no reuse", ("ppo",)),
    Comparison("one thread a process", "two", DEFAULT, "two threads", EVERY),
    Comparison("all together", "all off, from the pairs on", "blocks", "all off", EVERY),
    Comparison(
        "order of sums", "micro-batches of half the size", DEFAULT, "halves", EVERY, yardstick=True
    ),
)  # fmt: skip


@contextmanager
def in_force(variant: str) -> Iterator[None]:
    """The variant's shortcuts and threads, in this process, until the end of the block."""
    chosen, threads = VARIANTS[variant], torch.get_num_threads()
    torch.set_num_threads(chosen.threads or threads)
    try:
        with using(chosen.shortcuts):
            yield
    finally:
        torch.set_num_threads(threads)


def switched(folder: Path, variant: str, stage: str, **inputs: Any) -> None:
    """Stage: what `stage` does, under `variant`."""
    with in_force(variant):
        WORKS[stage](folder, **inputs)


@dataclass(frozen=True)
class Probed:
    """A policy and the pairs that it is read on; `start`: where it began, the reference."""

    policy: Path
    checkpoint: str
    start: Path
    data: DirectData


@torch.no_grad()
def read_logprobs(
    folder: Path,
    variant: str,
    probed: Probed,
    direct: DirectConfig,
    ppo: PPOConfig,
    sampling: Sampling,
) -> None:
    """Stage: the log-probabilities that training reads off fixed weights, in nats.

    Of each token of the first pairs' completions (`pairs`), of those completions under the
    reference (`reference`), and of each token of samples, as PPO takes them (`samples`).
    """
    with in_force(variant):
        ids = special_ids(load_tokenizer(probed.start))
        objective = Objective(probed.data, ids.pad, "dpo", {"beta": 1.0}, direct.limit)
        model = load_policy(probed.policy / probed.checkpoint).eval()
        rows, width = objective.rows, max(map(len, objective.rows.completions))
        pairs, refs = torch.zeros(2 * rows.count, width), torch.zeros(2 * rows.count)
        for part in objective.micro_batches(range(min(PAIRS, rows.count))):
            found = token_logprobs(model, part.sequences)
            pairs[part.rows, : found.shape[1]] = found
            refs[part.rows] = objective.ref_logps[part.rows]
        prompts = [p for p in rows.prompts[:PROMPTS] for _ in range(SAMPLES)]
        drawn = HFEngine(model, ids).generate(prompts, sampling)
        batch = collate(prompts, drawn.ids, ids.pad)
        taken = token_logprobs(model, batch, sampling.temperature)
        if ppo.reuse_logprobs:
            taken = as_rows(drawn.logprobs, batch)
    room = (0, sampling.max_new_tokens - taken.shape[1])
    tokens = batch.completion_ids.masked_fill(~batch.mask, ids.pad)
    samples = {"samples": taken, "tokens": tokens}
    samples = {name: torch.nn.functional.pad(t, room) for name, t in samples.items()}
    tables = {"pairs": pairs, "reference": refs, **samples}
    save_file({k: v.contiguous() for k, v in tables.items()}, folder / "probe.safetensors")


def largest_differences(on: Path, off: Path) -> dict[str, float]:
    """The largest difference of two probes, by table; of samples, where the tokens are the same.

    `other_samples` is the share of rows where they are not.
    """
    a, b = (load_file(folder / "probe.safetensors") for folder in (on, off))
    same = (a["tokens"] == b["tokens"]).all(1)
    gaps = {name: (a[name] - b[name]).abs() for name in ("pairs", "reference", "samples")}
    gaps["samples"] = gaps["samples"][same]
    largest = {name: gap.max().item() if gap.numel() else 0.0 for name, gap in gaps.items()}
    return {**largest, "other_samples": 1 - same.float().mean().item()}
