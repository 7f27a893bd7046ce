"""Optimisations and how each is switched off, for `benchmarks.studies.onoff.study`.

The library has no switch for most of them. A stage that runs here runs under a *variant*: names in
the library that stand for something else in this stage's process while it works, configuration
keys, threads. The variant's name is an input of the stage, so that its folder is its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dpo.train
from dpo.train import DirectConfig, train_direct
from rlhf.ppo import PPOConfig, train_ppo
from rlhf.reward import train_reward
from rlhf.rollout import as_rows
from shared.data.preferences import make_preferences
from shared.generation.engine import Sampling
from shared.generation.hf import HFEngine
from shared.models.load import load_policy, special_ids
from shared.models.logprobs import score_logps, token_logprobs
from shared.models.sequences import collate
from shared.stages import write_json
from shared.training.fit import step

PAIRS, PROMPTS, SAMPLES = 256, 64, 4  # that `probe` reads; prompts are those of the first pairs
WORKS: dict[str, Callable[..., None]] = {
    "preferences": make_preferences,
    "reward": train_reward,
    "direct": train_direct,
    "ppo": train_ppo,
}
generate_batch = HFEngine._generate_batch


class ScoredAgain(dpo.train.Dataset):
    """The reference beside the policy: it goes over the rows of every step, as they come."""

    def __init__(self, policy: Path, *others: Any):
        super().__init__(policy, *others)
        self.ref = load_policy(policy).eval()

    def micro(self, rows: list[int], chosen: int, mismatched: Tensor | None) -> dpo.train.Micro:
        self.ref_logps[torch.tensor(rows)] = self.scored(rows, rows)
        return super().micro(rows, chosen, mismatched)

    def mismatched_ratios(self, model: Any, rows: list[int]) -> Tensor:
        partner = self.mismatched.partner[torch.tensor(rows)].tolist()
        self.mismatched.logps[torch.tensor(rows)] = self.scored(rows, partner)
        return super().mismatched_ratios(model, rows)

    def scored(self, rows: list[int], partner: list[int]) -> Tensor:
        """log ref of the completions of `partner` after the prompts of `rows`."""
        prompts = [self.prompts[i] for i in rows]
        completions = [self.completions[i] for i in partner]
        return score_logps(self.ref, prompts, completions, self.pad_id)


class Apart(int):
    """A token id that equals itself only: a prompt of such is the same as no other."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def each_prompt_read(
    engine: HFEngine, prompts: Sequence[Sequence[int]], *drawing: Any
) -> tuple[Tensor, Tensor]:
    """`HFEngine._generate_batch` where no two prompts are equal."""
    return generate_batch(engine, [[Apart(token) for token in p] for p in prompts], *drawing)


def every_row_computed(ids: Tensor) -> tuple[Tensor, Tensor]:
    """`shared.models.packing.number_distinct` where rows have nothing in common."""
    new = ids >= 0
    number = new.flatten().cumsum(0).view(new.shape) - 1
    return new, number.masked_fill(~new, 0)


def plainly_picked(logits: Tensor, tokens: Tensor) -> Tensor:
    """`shared.cpu.kernels.picked`, left to autograd."""
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Variant:
    """What stands in place of a name in the library, keys of the experiment, threads.

    `resampled`: its preferences are drawn under it too, else all variants share them.
    """

    patches: dict[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    threads: int | None = None
    resampled: bool = False


PADDED = {"shared.models.packing.FAMILIES": ()}  # no model packs: transformers' own forward pass
PYTORCH = {  # norms, rotary positions, MLPs and attention as transformers has them
    "shared.cpu.native.library": lambda: None,
    "shared.models.logprobs.picked": plainly_picked,
}
MKL = {"shared.cpu.kernels.products_by": lambda: None}  # PyTorch's products of many rows, not C's
CACHE = {"shared.generation.hf.packs": lambda model: False}
UNREAD = {  # nor does the last layer know what is read
    "shared.models.packing.seen_from": lambda batch, at: batch.attention.bool(),
    "shared.models.packing._tell_mlp": lambda *_: None,
}
BLOCKS = {"shared.models.logprobs.BLOCK": 2**12}  # logits: 38 tokens of the vocabulary of `reviews`
APART = {
    "shared.generation.hf.HFEngine._generate_batch": each_prompt_read,
    "shared.models.packing.number_distinct": every_row_computed,
}
SCORED_AGAIN = {"dpo.train.Dataset": ScoredAgain}
NO_REUSE = ("--ppo.reuse_logprobs=false",)
HALVES = (
    "--direct.micro_batch_size=32",
    "--ppo.micro_batch_size=32",
    "--reward.micro_batch_size=16",
)
VARIANTS = {
    "as it comes": Variant(),
    "padded": Variant(PADDED),
    "PyTorch": Variant(PYTORCH),
    "PyTorch's products": Variant(MKL),
    "transformers' cache": Variant(CACHE),
    "unread too": Variant(UNREAD),
    "blocks": Variant(BLOCKS),
    "rows apart": Variant(APART, resampled=True),
    "scored again": Variant(SCORED_AGAIN),
    "no reuse": Variant(keys=NO_REUSE),
    "two threads": Variant(threads=2),
    "halves": Variant(keys=HALVES),
    "all off": Variant({**PADDED, **PYTORCH, **APART, **SCORED_AGAIN}, NO_REUSE, 2, resampled=True),
}
DEFAULT = "as it comes"


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
        "tokens that are read only", "every token", DEFAULT, "unread too", EVERY
    ),
    Comparison("logits in blocks", "all at once", "blocks", DEFAULT, ("direct", "ppo")),
    Comparison(
        "shared beginnings once", "in every row, from the pairs on", DEFAULT, "rows apart", EVERY
    ),
    Comparison("reused log-probabilities", "one more pass", DEFAULT, "no reuse", ("ppo",)),
    Comparison("reference scored once", "in every step", DEFAULT, "scored again", ("direct",)),
    Comparison("one thread a process", "two", DEFAULT, "two threads", EVERY),
    Comparison("all together", "all off, from the pairs on", "blocks", "all off", EVERY),
    Comparison(
        "order of sums", "micro-batches of half the size", DEFAULT, "halves", EVERY, yardstick=True
    ),
)  # fmt: skip


@contextmanager
def in_force(variant: str) -> Iterator[None]:
    """The variant's patches and threads, in this process, until the end of the block."""
    about = VARIANTS[variant]
    with ExitStack() as stack:
        for place, instead in about.patches.items():
            stack.enter_context(patch(place, instead))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        if about.threads is not None:
            torch.set_num_threads(about.threads)
        yield


def switched(folder: Path, variant: str, stage: str, **inputs: Any) -> None:
    """Stage: what `stage` does, under `variant`.

    `losses.json` holds the loss of the first step: PPO's policy and then its value model, if it has
    one.
    """
    work, losses = WORKS[stage], []

    def recording(*about: Any) -> dict[str, float]:
        numbers = step(*about)
        losses.append(numbers["loss"])
        return numbers

    with in_force(variant), ExitStack() as stack:
        if stage != "preferences":
            stack.enter_context(patch(f"{work.__module__}.step", recording))
        work(folder, **inputs)
    both = stage == "ppo" and not inputs["ppo"].shared_trunk
    write_json(folder / "losses.json", losses[: 1 + both])


@torch.no_grad()
def probe(
    folder: Path,
    variant: str,
    policy: Path,
    checkpoint: str,
    start: Path,
    preferences: Path,
    reference: Path,
    direct: DirectConfig,
    ppo: PPOConfig,
    sampling: Sampling,
) -> None:
    """Stage: the log-probabilities that training reads off fixed weights, in nats.

    Of each token of the first pairs' completions (`pairs`), of those completions under the
    reference (`reference`), and of each token of samples, as PPO takes them (`samples`).
    """
    with in_force(variant):
        about = start, preferences, reference, None, "dpo", {"beta": 1.0}, direct.limit
        data = dpo.train.Dataset(*about)
        model, ids = load_policy(policy / checkpoint).eval(), special_ids(data.tokenizer)
        count, half = min(PAIRS, len(data.pairs)), len(data.pairs)
        width = max(map(len, data.completions))
        pairs, refs = torch.zeros(2 * half, width), torch.zeros(2 * half)
        for group in data.groups([*range(count), *range(half, half + count)]):
            micro = data.micro(group, len(group) // 2, None)
            found = token_logprobs(model, micro.sequences)
            pairs[group, : found.shape[1]], refs[group] = found, micro.ref_logps
        prompts = [p for p in data.prompts[:PROMPTS] for _ in range(SAMPLES)]
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


def apart(on: Path, off: Path) -> dict[str, float]:
    """The largest difference of two probes, by table; of samples, where the tokens are the same.

    `other_samples` is the share of rows where they are not.
    """
    a, b = (load_file(folder / "probe.safetensors") for folder in (on, off))
    same = (a["tokens"] == b["tokens"]).all(1)
    gaps = {name: (a[name] - b[name]).abs() for name in ("pairs", "reference", "samples")}
    gaps["samples"] = gaps["samples"][same]
    largest = {name: gap.max().item() if gap.numel() else 0.0 for name, gap in gaps.items()}
    return {**largest, "other_samples": 1 - same.float().mean().item()}
