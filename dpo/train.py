"""Direct methods: pairs -> log-ratios -> loss -> step, in one way and with one set of metrics."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from dpo.losses import LOSSES, UNPAIRED, LogRatios, expected_loss
from dpo.reference import read_mismatched, read_reference, unpaired_rows
from shared.config import Config, InputError, suggest
from shared.data.pairs import Pair, read_pairs
from shared.models.cost import Meter
from shared.models.load import load_policy, load_tokenizer, save, special_ids
from shared.models.logprobs import sequence_logps
from shared.models.lora import LoRAConfig, with_lora
from shared.models.sequences import SCORING, Limit, Sequences, by_length, collate
from shared.stages import write_json
from shared.training.fit import (
    Diverged,
    OptimizerConfig,
    Trainee,
    arithmetic,
    batches,
    checkpoint_steps,
    prepare,
    step,
    steps_of,
)


class DirectConfig(Config):
    """What all direct methods share, so that they differ in the loss alone."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4)
    """The optimiser; an arm's setting may hold a `learning_rate` of its own."""
    epochs: int = Field(default=2, gt=0)
    """Passes over the pairs."""
    batch_size: int = Field(default=64, gt=0)
    """Pairs in an optimiser step, two completions each."""
    micro_batch_size: int = Field(default=64, gt=0)
    """Most pairs in one forward pass: changes memory and speed, never the step."""
    micro_batch_tokens: int = Field(default=2**14, gt=0)
    """Most tokens in one forward pass, padding included; a longer pair goes alone."""

    @property
    def limit(self) -> Limit:
        """What one pass holds: `micro_batch_size` pairs, or twice as many completions."""
        return Limit(2 * self.micro_batch_size, self.micro_batch_tokens)


LEARNING_RATE = "learning_rate"


class Micro(NamedTuple):
    """Rows of one forward pass: `chosen` rows first, the rejected ones after them."""

    sequences: Sequences
    ref_logps: Tensor  # (B,)
    chosen: int
    p: Tensor | None  # (chosen,) the labels, where they are not all 1
    mismatched: Tensor | None  # of the whole optimiser step


def check_setting(loss: str, setting: dict[str, float]) -> None:
    """InputError unless `setting` holds the loss's hyperparameters, and maybe a learning rate."""
    if loss not in LOSSES:
        raise InputError(f"unknown loss `{loss}`{suggest(loss, list(LOSSES))}")
    wanted = {
        name: parameter.default
        for name, parameter in inspect.signature(LOSSES[loss]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for name in setting:
        if name not in wanted and name != LEARNING_RATE:
            raise InputError(
                f"loss `{loss}` has no `{name}`{suggest(name, [*wanted, LEARNING_RATE])}"
            )
    for name, value in setting.items():
        if name == "label_smoothing" and not 0 <= value < 0.5:
            raise InputError(f"`label_smoothing` must lie in [0, 0.5), found {value}")
        if name != "label_smoothing" and value <= 0:
            raise InputError(f"`{name}` must be greater than 0, found {value}")
    for name, default in wanted.items():
        if name not in setting and default is inspect.Parameter.empty:
            raise InputError(f"loss `{loss}` needs a value for `{name}`")


def with_setting(direct: DirectConfig, setting: dict[str, float]) -> DirectConfig:
    """`direct` at the learning rate of `setting`, if it holds one."""
    rate = setting.get(LEARNING_RATE, direct.optimizer.learning_rate)
    optimizer = direct.optimizer.model_copy(update={LEARNING_RATE: rate})
    return direct.model_copy(update={"optimizer": optimizer})


def train_direct(
    folder: Path,
    policy: Path,
    preferences: Path,
    reference: Path,
    mismatched: Path | None,
    loss: str,
    setting: dict[str, float],
    direct: DirectConfig,
    checkpoints: Sequence[float],
    seed: int,
    lora: LoRAConfig | None = None,
) -> None:
    """Stage: the policy after DPO, IPO or KTO, in `final` and in `checkpoint-<step>` on the way.

    Unpaired losses need `mismatched`, the stage that `score_mismatched` fills.
    """
    direct = with_setting(direct, setting)
    data = Dataset(policy, preferences, reference, mismatched, loss, setting, direct.limit)
    steps = steps_of(len(data.pairs), direct.batch_size, direct.epochs)
    model = with_lora(load_policy(policy), lora, seed)
    trainee = prepare(model, direct.optimizer, steps)
    save_after = checkpoint_steps(steps, checkpoints)
    log, failure = [], ""
    order = data.batches(range(len(data.pairs)), direct.batch_size, direct.epochs, seed)
    for number, rows in enumerate(order, start=1):
        try:
            log.append(data.step(trainee, rows))
        except Diverged as error:  # a result, not a crash: the last good weights are evaluated
            failure = str(error)
            break
        if number in save_after:
            save(model, data.tokenizer, folder / f"checkpoint-{number}")
    finish(folder, model, data, log, save_after, failure)


class Dataset:
    """Training pairs beside their reference log-probabilities, and the step that one loss takes."""

    def __init__(
        self,
        policy: Path,
        preferences: Path,
        reference: Path,
        mismatched: Path | None,
        loss: str,
        setting: dict[str, float],
        limit: Limit,
    ):
        check_setting(loss, setting)
        self.tokenizer = load_tokenizer(policy)
        self.pad_id = special_ids(self.tokenizer).pad
        self.pairs: list[Pair] = read_pairs(preferences / "train.jsonl")
        self.prompts, self.completions = unpaired_rows(self.pairs)
        self.ref_logps = read_reference(reference)
        self.p = torch.tensor([pair.p for pair in self.pairs])
        self.labelled = bool((self.p == 1).all())
        self.loss, self.unpaired = LOSSES[loss], loss in UNPAIRED
        self.setting = {k: v for k, v in setting.items() if k != LEARNING_RATE}
        if self.unpaired:
            if mismatched is None:
                raise ValueError(f"loss `{loss}` needs mismatched completions")
            self.mismatched = read_mismatched(mismatched)
        self.limit = limit
        self.meter = Meter()

    def batches(
        self, pairs: Sequence[int], batch_size: int, epochs: int, seed: int
    ) -> Iterator[list[int]]:
        """Rows of each optimiser step: row i is pair i's chosen side, row N + i its rejected side.

        Pair losses get both sides of `batch_size` pairs; KTO gets 2 x `batch_size` completions
        shuffled on their own, so that both see as many tokens a step. Pairs with a probability for
        a label stay together in any case.
        """
        count = len(self.pairs)
        if self.unpaired and self.labelled:
            rows = [*pairs, *(count + i for i in pairs)]
            for chosen in batches(len(rows), 2 * batch_size, epochs, seed):
                yield [rows[i] for i in chosen]
        else:
            for chosen in batches(len(pairs), batch_size, epochs, seed):
                yield [row for i in chosen for row in (pairs[i], count + pairs[i])]

    def step(self, trainee: Trainee, rows: list[int]) -> dict[str, float]:
        """One optimiser step on `rows`."""
        mismatched = None
        if self.unpaired:
            with arithmetic(trainee.precision, trainee.model.device):
                mismatched = self.mismatched_ratios(trainee.model, rows)
        micro_batches = []
        for group in self.groups(rows):
            chosen = sum(row < len(self.pairs) for row in group)
            items = len(group) if self.unpaired else chosen
            micro_batches.append((self.micro(group, chosen, mismatched), float(items)))
        return step(trainee, micro_batches, self._loss)

    def groups(self, rows: list[int]) -> Iterator[list[int]]:
        """`rows` in micro-batches of similar length, chosen sides first; pairs stay together."""
        count = len(self.pairs)
        if self.unpaired and self.labelled:
            sizes = [len(self.completions[row]) for row in rows]
            before = [len(self.prompts[row]) for row in rows]
            for group in by_length(sizes, before, self.limit):
                yield sorted(rows[i] for i in group)
            return
        pairs = [row for row in rows if row < count]
        sizes = [max(len(self.completions[i]), len(self.completions[count + i])) for i in pairs]
        before = [len(self.prompts[i]) for i in pairs]
        for group in by_length(sizes, before, self.limit.of_pairs()):
            chosen = [pairs[i] for i in group]
            yield [*chosen, *(count + i for i in chosen)]

    def micro(self, rows: list[int], chosen: int, mismatched: Tensor | None) -> Micro:
        sequences = collate(
            [self.prompts[i] for i in rows],
            [self.completions[i] for i in rows],
            self.pad_id,
        )
        p = None if self.labelled else self.p[torch.tensor(rows[:chosen])]
        return Micro(sequences, self.ref_logps[torch.tensor(rows)], chosen, p, mismatched)

    @torch.no_grad()
    def mismatched_ratios(self, model: PreTrainedModel, rows: list[int]) -> Tensor:
        """Log-ratios of the step's prompts with other prompts' completions, (len(rows),)."""
        partner = self.mismatched.partner[torch.tensor(rows)].tolist()
        ratios = torch.zeros(len(rows))
        sizes = [len(self.completions[j]) for j in partner], [len(self.prompts[i]) for i in rows]
        for group in by_length(*sizes, SCORING):
            batch = collate(
                [self.prompts[rows[i]] for i in group],
                [self.completions[partner[i]] for i in group],
                self.pad_id,
            ).to(model.device)
            self.meter.forward(model, batch)
            ref = self.mismatched.logps[torch.tensor([rows[i] for i in group])]
            ratios[torch.tensor(group)] = sequence_logps(model, batch).cpu() - ref
        return ratios

    def _loss(self, model: PreTrainedModel, micro: Micro) -> tuple[Tensor, dict[str, float]]:
        batch = micro.sequences.to(model.device)
        self.meter.forward(model, batch, backward=True)
        logps = sequence_logps(model, batch)
        ratios = logps - micro.ref_logps.to(logps.device)
        lengths, n = batch.lengths, micro.chosen
        r = LogRatios(
            chosen=ratios[:n],
            rejected=ratios[n:],
            chosen_tokens=lengths[:n],
            rejected_tokens=lengths[n:],
            mismatched=micro.mismatched,
            chosen_logps=logps[:n],
            rejected_logps=logps[n:],
        )
        if micro.p is None:
            losses = self.loss(r, **self.setting)
        else:
            losses = expected_loss(self.loss, r, micro.p.to(logps.device), **self.setting)
        return losses.mean(), self._metrics(r, logps.detach())

    def _metrics(self, r: LogRatios, logps: Tensor) -> dict[str, float]:
        """TRL's names; rewards are beta (or tau) times the summed log-ratio."""
        if self.unpaired:
            z = r.mismatched.mean().clamp(min=0).item() if r.mismatched is not None else 0.0
            return {"kl": z}
        scale = self.setting.get("beta", self.setting.get("tau", 1.0))
        margins = (r.chosen - r.rejected).detach()
        chosen, rejected = logps.chunk(2)
        return {
            "rewards/accuracies": (margins > 0).float().mean().item(),
            "rewards/margins": scale * margins.mean().item(),
            "logps/chosen": chosen.mean().item(),
            "logps/rejected": rejected.mean().item(),
        }


def finish(
    folder: Path,
    model: PreTrainedModel,
    data: Dataset,
    log: list[dict[str, float]],
    saved: dict[int, float],
    failure: str,
) -> None:
    """Write the final policy, the log, the cost, how it ended and which checkpoint is which."""
    save(model, data.tokenizer, folder / "final")
    points = {f"checkpoint-{s}": share for s, share in saved.items() if s <= len(log)}
    write_json(folder / "checkpoints.json", {**points, "final": 1.0})
    write_json(folder / "log.json", log)
    write_json(folder / "stopped.json", {"failed": failure, "stopped_early": False})
    data.meter.phases.setdefault("train", data.meter.summary()["wall_s"])  # pyright: ignore[reportArgumentType]
    write_json(folder / "cost.json", {**data.meter.summary(), "labels_used": len(data.pairs)})
