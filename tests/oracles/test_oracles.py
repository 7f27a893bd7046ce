"""Losses and their gradients by the weights against TRL 1.16's trainers, on the same batch.

Where TRL's number is another one, the test's name says so and the closed form is checked instead.
(TRL's PPO, which 1.16 has no more: test_trl_ppo.)
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import close
from datasets import Dataset
from scipy import special
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import DataCollatorForPreference as CollatorForRewards
from trl.trainer.reward_trainer import RewardTrainer

from dpo.losses import (
    LOSSES,
    LogRatios,
    cdpo_loss,
    dpo_loss,
    ipo_loss,
    ipo_token_loss,
    kto_loss,
)
from rlhf.losses import bradley_terry_loss
from shared.data.batches import PairRows
from shared.data.pairs import Pair, read_pairs, swapped
from shared.models.load import load_policy, load_scalar_model, sequence_scores
from shared.models.logprobs import sequence_logps
from shared.models.sequences import SCORING, collate

PAD = 0
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}
KTO = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
Models = tuple[PreTrainedModel, PreTrainedModel]
LossAndGradient = tuple[float, Tensor]


@pytest.fixture(scope="module")
def pairs(preferences_folder: Path) -> list[Pair]:
    return read_pairs(preferences_folder / "train.jsonl")[:8]


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """The same model after it has left its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.05 * torch.randn(weights.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def models(policy_folder: Path) -> Models:
    """(policy, reference)"""
    return moved(load_policy(policy_folder)), load_policy(policy_folder)


def with_gradient(model: PreTrainedModel, loss: Callable[[], Tensor]) -> LossAndGradient:
    model.zero_grad()
    value = loss()
    value.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    assert gradient.norm() > 0.01
    return value.item(), gradient


def agree(ours: LossAndGradient, theirs: LossAndGradient) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-4)


# Pair losses


def ratios(models: Models, prompts: Sequence, completions: Sequence) -> Tensor:
    batch = collate(prompts, completions, PAD)
    with torch.no_grad():
        ref = sequence_logps(models[1], batch)
    return sequence_logps(models[0], batch) - ref


def pair_ratios(models: Models, pairs: list[Pair]) -> LogRatios:
    prompts = [p.prompt_ids for p in pairs]
    chosen, rejected = [p.chosen_ids for p in pairs], [p.rejected_ids for p in pairs]
    lengths = [torch.tensor([len(c) for c in side]) for side in (chosen, rejected)]
    return LogRatios(*(ratios(models, prompts, side) for side in (chosen, rejected)), *lengths)


@pytest.fixture
def trl_dpo(models: Models, tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    """(loss, gradient) of TRL's DPOTrainer on some pairs."""

    def of(pairs: list[Pair], **arguments: Any) -> LossAndGradient:
        row = {"prompt": "the plot was dull and", "chosen": " it", "rejected": " was"}
        trainer = DPOTrainer(
            model=models[0],
            ref_model=models[1],
            args=DPOConfig(output_dir=str(tmp_path), **PLAIN, **arguments),
            train_dataset=Dataset.from_list([row]),
            processing_class=tokenizer,
        )
        batch = DataCollatorForPreference(pad_token_id=PAD)([p._asdict() for p in pairs])
        return with_gradient(models[0], lambda: trainer.compute_loss(models[0], batch))

    return of


@pytest.mark.parametrize(
    ("name", "setting", "arguments"),
    [
        ("dpo", {"beta": 0.3}, {"loss_type": "sigmoid", "beta": 0.3}),
        ("ipo-token", {"tau": 0.4}, {"loss_type": "ipo", "beta": 0.4}),
        (
            "rdpo",
            {"beta": 0.3, "label_smoothing": 0.2},
            {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.2},
        ),
    ],
)
def test_dpo_rdpo_and_ipo_per_token_equal_trls(
    name: str, setting: dict, arguments: dict, models: Models, pairs: list[Pair], trl_dpo
):
    ours = with_gradient(
        models[0], lambda: LOSSES[name](pair_ratios(models, pairs), **setting).mean()
    )
    agree(ours, trl_dpo(pairs, **arguments))


def test_cdpo_equals_trls_dpo_on_right_and_on_swapped_labels_weighted(
    models: Models, pairs: list[Pair], trl_dpo
):
    """Cross-entropy to labels that are wrong one time in five."""
    arguments = {"loss_type": "sigmoid", "beta": 0.3}
    right, wrong = trl_dpo(pairs, **arguments), trl_dpo([swapped(p) for p in pairs], **arguments)
    theirs = tuple(0.8 * x + 0.2 * y for x, y in zip(right, wrong, strict=True))
    smooth = {"beta": 0.3, "label_smoothing": 0.2}
    ours = with_gradient(models[0], lambda: cdpo_loss(pair_ratios(models, pairs), **smooth).mean())
    agree(ours, theirs)


def test_trl_ignores_label_smoothing_with_its_sigmoid_loss_and_cdpo_does_not(
    models: Models, pairs: list[Pair], trl_dpo
):
    theirs, _ = trl_dpo(pairs, loss_type="sigmoid", beta=0.3, label_smoothing=0.2)
    r = pair_ratios(models, pairs)
    assert dpo_loss(r, beta=0.3).mean().item() == pytest.approx(theirs, rel=1e-5)
    h = (r.chosen - r.rejected).detach().double().numpy()
    closed = -0.8 * special.log_expit(0.3 * h) - 0.2 * special.log_expit(-0.3 * h)
    ours = cdpo_loss(r, beta=0.3, label_smoothing=0.2).mean().item()
    assert ours == pytest.approx(closed.mean(), rel=1e-5)
    assert abs(ours - theirs) > 1e-3


@pytest.mark.parametrize("number", range(3))
def test_trl_has_no_summed_ipo_but_its_dpo_gives_h_and_the_gradient_of_h(
    number: int, models: Models, pairs: list[Pair], trl_dpo
):
    """Of one pair, by the chain rule: h from -log sigmoid(h), d h from its gradient."""
    pair, tau = [pairs[number]], 0.4
    loss, gradient = trl_dpo(pair, loss_type="sigmoid", beta=1.0)
    h = -torch.tensor(loss, dtype=torch.float64).expm1().log()
    slope = gradient / -torch.sigmoid(-h)
    theirs = (h.item() - 1 / (2 * tau)) ** 2, (2 * (h - 1 / (2 * tau)) * slope).float()
    ours = with_gradient(models[0], lambda: ipo_loss(pair_ratios(models, pair), tau=tau).sum())
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    close(ours[1] / theirs[1].norm(), theirs[1] / theirs[1].norm(), 1e-4)


def test_without_a_prompt_trls_ipo_divides_by_one_token_too_many(
    models: Models, pairs: list[Pair], trl_dpo
):
    """No log-probability is there of a row's first token, and TRL counts it as one.

    Here the first token is what it is, the prompt; the divisor is of tokens that have been read.
    """
    bare = [
        p._replace(
            prompt_ids=[],
            chosen_ids=[p.prompt_ids[-1], *p.chosen_ids],
            rejected_ids=[p.prompt_ids[-1], *p.rejected_ids],
        )
        for p in pairs
    ]
    theirs, _ = trl_dpo(bare, loss_type="ipo", beta=0.4)
    r = pair_ratios(models, [p._replace(prompt_ids=p.prompt_ids[-1:]) for p in pairs])
    one_more = r.chosen / (r.chosen_tokens + 1) - r.rejected / (r.rejected_tokens + 1)
    assert theirs == pytest.approx(((one_more - 1.25) ** 2).mean().item(), rel=1e-5)
    closed = r.chosen / r.chosen_tokens - r.rejected / r.rejected_tokens
    ours = ipo_token_loss(r, tau=0.4).mean().item()
    assert ours == pytest.approx(((closed - 1.25) ** 2).mean().item(), rel=1e-6)
    assert abs(ours - theirs) > 1e-3


# KTO


Labelled = tuple[list[int], list[int], bool]  # prompt, completion, desirable


def labelled_rows(pairs: list[Pair], desirable: int) -> list[Labelled]:
    rows = [(p.prompt_ids, p.chosen_ids, True) for p in pairs[:desirable]]
    return rows + [(p.prompt_ids, p.rejected_ids, False) for p in pairs]


def kto_trainer(
    models: Models, tokenizer: PreTrainedTokenizerBase, scratch: Path, words: Sequence[str]
) -> KTOTrainer:
    """TRL's KTOTrainer, batches of 2, on one row for each of `words`."""
    rows = [
        {"prompt": "the plot was dull and", "completion": f" {word}", "label": i % 2 == 0}
        for i, word in enumerate(words)
    ]
    config = KTOConfig(output_dir=str(scratch), per_device_train_batch_size=2, **KTO, **PLAIN)
    return KTOTrainer(
        model=models[0],
        ref_model=models[1],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def trl_kto(
    trainer: KTOTrainer, model: PreTrainedModel, rows: list[Labelled], others: list[list[int]]
) -> LossAndGradient:
    batch = DataCollatorForUnpairedPreference(pad_token_id=PAD)(
        [
            {"prompt_ids": p, "completion_ids": c, "KL_completion_ids": other, "label": label}
            for (p, c, label), other in zip(rows, others, strict=True)
        ]
    )
    return with_gradient(model, lambda: trainer.compute_loss(model, batch))


def our_kto(models: Models, rows: list[Labelled], mismatched: Tensor) -> Tensor:
    prompts, completions, labels = zip(*rows, strict=True)
    r, good = ratios(models, prompts, completions), torch.tensor(labels)
    tokens = torch.ones_like(r)
    sides = r[good], r[~good], tokens[good], tokens[~good]
    return kto_loss(LogRatios(*sides, mismatched), **KTO).mean()


@pytest.mark.parametrize(("desirable", "above"), [(8, False), (5, False), (5, True)])
def test_kto_equals_trls_on_the_same_mismatched_completions(
    desirable: int,
    above: bool,
    models: Models,
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
):
    if above:  # the completions are likelier under the policy that they came from: z > 0
        models = models[1], models[0]
    rows = labelled_rows(pairs, desirable)
    others = [rows[i - 1][1] for i in range(len(rows))]
    mismatched = ratios(models, [row[0] for row in rows], others)
    assert (mismatched.mean() > 0.01) == above
    trainer = kto_trainer(models, tokenizer, tmp_path, ["it", "was"])
    theirs = trl_kto(trainer, models[0], rows, others)
    agree(with_gradient(models[0], lambda: our_kto(models, rows, mismatched)), theirs)


def test_trls_kto_cut_into_micro_batches_is_another_loss_and_ours_is_not(
    models: Models, pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    """TRL's baseline is each micro-batch's own; here it is that of the whole step."""
    models = models[1], models[0]  # so that the baseline lies above 0
    rows = labelled_rows(pairs, 8)
    others = [rows[i - 1][1] for i in range(len(rows))]
    mismatched = ratios(models, [row[0] for row in rows], others).detach()
    trainer = kto_trainer(models, tokenizer, tmp_path, ["it", "was"])
    parts = [slice(i, i + 2) for i in range(0, len(rows), 2)]
    whole, _ = trl_kto(trainer, models[0], rows, others)
    cut = [trl_kto(trainer, models[0], rows[part], others[part])[0] for part in parts]
    assert abs(sum(cut) / len(cut) - whole) > 1e-3
    for part, theirs in zip(parts, cut, strict=True):
        own = our_kto(models, rows[part], mismatched[part]).item()
        assert own == pytest.approx(theirs, rel=1e-5)
    ours = [our_kto(models, rows[part], mismatched).item() for part in parts]
    assert sum(ours) / len(ours) == pytest.approx(whole, rel=1e-5)


def test_trls_kto_keeps_one_order_and_pairs_a_last_lone_row_with_itself(
    models: Models, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    """Ours shuffles each epoch and takes the mismatch from another prompt: test_direct."""
    words = ["it", "was", "not", "very", "good"]
    trainer = kto_trainer(models, tokenizer, tmp_path, words)
    completions = trainer.train_dataset["completion_ids"]
    others = trainer.train_dataset["KL_completion_ids"]
    assert [other == own for own, other in zip(completions, others, strict=True)] == 4 * [False] + [
        True
    ]
    epochs = [
        [row for batch in trainer.get_train_dataloader() for row in batch["input_ids"][:, -2]]
        for _ in range(2)
    ]
    assert epochs[0] == epochs[1] == [ids[0] for ids in completions]


# The reward model


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.05])
def test_the_reward_models_loss_equals_trls(
    margin: bool,
    center: float | None,
    reward_folder: Path,
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
):
    """On raw scores. TRL pads on the right and looks for the last token that is not padding."""
    model = moved(load_scalar_model(reward_folder))
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(output_dir=str(tmp_path), center_rewards_coefficient=center, **PLAIN),
        train_dataset=Dataset.from_list([{"chosen": "it was", "rejected": "it"}]),
        processing_class=tokenizer,
    )
    ahead = torch.linspace(0, 1.4, len(pairs))
    rows = [
        {"chosen_ids": p.prompt_ids + p.chosen_ids, "rejected_ids": p.prompt_ids + p.rejected_ids}
        for p in pairs
    ]
    if margin:
        rows = [{**row, "margin": m} for row, m in zip(rows, ahead.tolist(), strict=True)]
    batch = CollatorForRewards(pad_token_id=PAD)(rows)
    theirs = with_gradient(model, lambda: trainer.compute_loss(model, batch))

    (ours,) = PairRows(pairs, PAD, SCORING).of_pairs(range(len(pairs)))
    ahead = ahead[ours.rows[: ours.chosen]]  # in the order of their lengths

    def loss() -> Tensor:
        chosen, rejected = sequence_scores(model, ours.sequences).chunk(2)
        options = {"margin": ahead if margin else None, "center": center or 0.0}
        return bradley_terry_loss(chosen, rejected, **options).mean()

    agree(with_gradient(model, loss), theirs)
