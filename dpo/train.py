"""Direct methods: pairs, or answers with a label -> log-ratios -> loss -> step, in one way and with
one set of metrics.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from dpo.losses import LOSSES, UNPAIRED, WEIGHTS, LogRatios, balancing_weights, expected_loss
from dpo.reference import read_mismatched, read_reference
from shared.config import Config, InputError, suggest
from shared.data.batches import Batch, PairRows, read_rows
from shared.models import ranks
from shared.models.cost import Meter
from shared.models.load import Start, load_tokenizer, special_ids
from shared.models.logprobs import sequence_logps
from shared.models.sequences import SCORING, Limit, by_length, collate
from shared.seeds import seed_of
from shared.stages import write_json
from shared.training.finished import Training, TrainingLog
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
from shared.training.saves import Saves


class DirectConfig(Config):
    """What all direct methods share, so that they differ in the loss alone."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4)
    """The optimiser; an arm's setting may hold a `learning_rate` of its own."""
    epochs: int = Field(default=2, gt=0)
    """Passes over the pairs, or over the answers with a label."""
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


def split_setting(
    setting: dict[str, float], direct: DirectConfig
) -> tuple[dict[str, float], DirectConfig]:
    """(the loss's hyperparameters, `direct` at the learning rate that the setting may hold)."""
    hyperparameters = {k: v for k, v in setting.items() if k != LEARNING_RATE}
    if LEARNING_RATE not in setting:
        return hyperparameters, direct
    rate = {LEARNING_RATE: setting[LEARNING_RATE]}
    optimizer = direct.optimizer.model_copy(update=rate)
    return hyperparameters, direct.model_copy(update={"optimizer": optimizer})


@dataclass(frozen=True)
class DirectData:
    """The stages that a direct method reads: pairs, or answers with a label, and what the
    reference says of them.

    `mismatched` is for losses over single completions, which need a baseline.
    """

    preferences: Path
    reference: Path
    mismatched: Path | None = None


def train_direct(
    folder: Path,
    start: Start,
    data: DirectData,
    loss: str,
    setting: dict[str, float],
    direct: DirectConfig,
    checkpoints: Sequence[float],
) -> None:
    """Stage: the policy after DPO, IPO or KTO, in `final` and in `checkpoint-<step>` on the way."""
    check_setting(loss, setting)
    hyperparameters, direct = split_setting(setting, direct)
    meter, tokenizer = Meter(), load_tokenizer(start.policy)
    objective = Objective(data, special_ids(tokenizer).pad, loss, hyperparameters, direct.limit)
    steps = steps_of(len(objective.items), objective.items_in(direct.batch_size), direct.epochs)
    trainee, saves = prepare(start.load(), direct.optimizer, steps), Saves(folder, meter)
    saves.follow(policy=trainee)
    log = TrainingLog(folder, steps, kept=saves.steps)
    save_after = checkpoint_steps(steps, checkpoints)
    training, failure = Training(folder, trainee, tokenizer, log, save_after), ""
    with meter.phase("train"):
        order = seed_of(start.seed, "batches")
        drawn = objective.batches(objective.items, direct.batch_size, direct.epochs, order)
        for rows in islice(drawn, saves.steps, None):
            try:
                training.step_done(objective.step(trainee, rows))
            except Diverged as error:  # a result, not a crash: the last good weights are evaluated
                failure = str(error)
                break
            saves.step_done(len(log))
    if objective.pairs is None:
        write_json(folder / "labels.json", objective.labels())
    training.finish(meter, labels_used=len(objective.items), failure=failure)


class Objective:
    """One loss on one set of pairs, or of answers with a label, with their reference
    log-probabilities: batches and the step.
    """

    def __init__(
        self, data: DirectData, pad_id: int, loss: str, setting: dict[str, float], limit: Limit
    ):
        """`setting`: the loss's hyperparameters; where it names no weights, answers with a label
        get those that balance them. `limit`: what one pass holds.
        """
        self.loss, self.setting, self.unpaired = LOSSES[loss], setting, loss in UNPAIRED
        self.rows = read_rows(data.preferences, pad_id, limit)
        self.pairs = self.rows if isinstance(self.rows, PairRows) else None
        if self.pairs is None:
            if not self.unpaired:
                raise InputError(f"loss `{loss}` needs pairs, and these are answers with a label")
            if not set(WEIGHTS) & set(setting):
                self.setting = setting | balancing_weights(self.rows.count, self.rows.undesirable)
        self.ref_logps = read_reference(data.reference)
        self.labelled = bool((self.rows.p == 1).all())
        if self.unpaired:
            if data.mismatched is None:
                raise ValueError(f"loss `{loss}` needs mismatched completions")
            self.mismatched = read_mismatched(data.mismatched)

    @property
    def single_rows(self) -> bool:
        """Whether chosen and rejected sides go on their own: not where pairs share a label."""
        return self.unpaired and self.labelled

    @property
    def items(self) -> range:
        """Numbers of what is trained on: of the pairs, or of the answers with a label."""
        return range(self.rows.count if self.pairs else len(self.rows.prompts))

    def items_in(self, batch_size: int) -> int:
        """How many of `items` a step sees: an answer with a label is half as much as a pair."""
        return batch_size if self.pairs else 2 * batch_size

    def labels(self) -> dict[str, float]:
        """Of answers with a label how many are of each kind, and how much each of them weighs."""
        weights = {name: self.setting.get(name, 1.0) for name in WEIGHTS}
        return {"desirable": self.rows.count, "undesirable": self.rows.undesirable, **weights}

    def batches(
        self, items: Sequence[int], batch_size: int, epochs: int, seed: int
    ) -> Iterator[list[int]]:
        """What each optimiser step sees, of `items`: numbers of pairs, or of rows (`single_rows`).

        Pair losses get both sides of `batch_size` pairs; KTO gets 2 x `batch_size` completions
        shuffled on their own, so that both see as many tokens a step. Pairs with a probability for
        a label stay together in any case.
        """
        if not self.single_rows:
            for chosen in batches(len(items), batch_size, epochs, seed):
                yield [items[i] for i in chosen]
            return
        rows = [*items, *(self.rows.count + i for i in items)] if self.pairs else items
        for chosen in batches(len(rows), 2 * batch_size, epochs, seed):
            yield [rows[i] for i in chosen]

    def step(self, trainee: Trainee, numbers: list[int]) -> dict[str, float]:
        """One optimiser step on one of `batches`; each rank takes its part of it."""
        mismatched = None
        if self.unpaired:
            n = self.rows.count
            rows = numbers if self.single_rows else [r for i in numbers for r in (i, n + i)]
            with arithmetic(trainee.precision):
                mismatched = self.mismatched_ratios(trainee.model, rows)
        own, counts = ranks.part(numbers)
        micro = self.micro_batches(own)

        def loss(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            return self._loss(model, batch, mismatched)

        items = [counts * (len(b.rows) if self.unpaired else b.chosen) for b in micro]
        return step(trainee, list(zip(micro, items, strict=True)), loss)

    def micro_batches(self, numbers: Sequence[int]) -> list[Batch]:
        """One of `batches` in passes of similar length."""
        if self.single_rows or self.pairs is None:
            return list(self.rows.of_rows(numbers))
        return list(self.pairs.of_pairs(numbers))

    @torch.no_grad()
    def mismatched_ratios(self, model: PreTrainedModel, rows: list[int]) -> Tensor:
        """Log-ratios of the step's prompts with other prompts' completions, (len(rows),)."""
        places, weight = ranks.part(range(len(rows)))
        own = [rows[place] for place in places]
        partner = self.mismatched.partner[torch.tensor(own)].tolist()
        prompts = [self.rows.prompts[i] for i in own]
        completions = [self.rows.completions[j] for j in partner]
        ratios = torch.zeros(len(rows))
        groups = by_length([*map(len, completions)], [*map(len, prompts)], SCORING)
        for group, counts in ranks.evenly(list(groups)):
            batch = collate(
                [prompts[i] for i in group], [completions[i] for i in group], self.rows.pad_id
            ).to(model.device)
            ref = self.mismatched.logps[torch.tensor([own[i] for i in group])]
            found = ranks.run(sequence_logps, model, batch).cpu() - ref
            if counts and weight:
                ratios[torch.tensor([places[i] for i in group])] = found
        return ranks.total(ratios)

    def _loss(
        self, model: PreTrainedModel, batch: Batch, mismatched: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sequences, n = batch.sequences.to(model.device), batch.chosen
        logps = sequence_logps(model, sequences)
        ratios = logps - self.ref_logps[batch.rows].to(logps.device)
        r = LogRatios(
            chosen=ratios[:n],
            rejected=ratios[n:],
            chosen_tokens=sequences.lengths[:n],
            rejected_tokens=sequences.lengths[n:],
            mismatched=mismatched,
            chosen_logps=logps[:n],
            rejected_logps=logps[n:],
        )
        if self.labelled:
            losses = self.loss(r, **self.setting)
        else:
            losses = expected_loss(self.loss, r, batch.p.to(logps.device), **self.setting)
        return losses.mean(), self._metrics(r, logps.detach())

    def _metrics(self, r: LogRatios, logps: Tensor) -> dict[str, Tensor]:
        """TRL's names; rewards are beta (or tau) times the summed log-ratio."""
        if self.unpaired:
            assert r.mismatched is not None
            return {"kl": r.mismatched.mean().clamp(min=0)}
        scale = self.setting.get("beta", self.setting.get("tau", 1.0))
        margins = (r.chosen - r.rejected).detach()
        chosen, rejected = logps.chunk(2)
        return {
            "rewards/accuracies": (margins > 0).float().mean(),
            "rewards/margins": scale * margins.double().mean(),
            "logps/chosen": chosen.mean(),
            "logps/rejected": rejected.mean(),
        }
