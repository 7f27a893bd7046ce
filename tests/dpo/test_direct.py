"""The direct methods' data path: baseline pairs, reference, batches, steps and whole runs."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from checks import beginnings, close, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpo.losses import LOSSES, UNPAIRED, LogRatios, expected_loss
from dpo.reference import (
    mismatch,
    read_mismatched,
    read_reference,
    score_mismatched,
    score_reference,
)
from dpo.train import (
    DirectConfig,
    DirectData,
    Objective,
    check_setting,
    split_setting,
    train_direct,
)
from shared.config import InputError
from shared.data.batches import PairRows
from shared.data.pairs import read_pairs
from shared.models.cost import At, forward_flops
from shared.models.load import Start, frozen, load_policy
from shared.models.logprobs import sequence_logps
from shared.models.sequences import SCORING, Limit, collate
from shared.stages import read_json, write_jsonl
from shared.training.finished import read_log
from shared.training.fit import OptimizerConfig, Trainee, prepare

PAD = 0
N = 22  # pairs in `preferences_folder`
SETTINGS = {
    "dpo": {"beta": 0.1},
    "cdpo": {"beta": 0.1, "label_smoothing": 0.1},
    "rdpo": {"beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"tau": 0.5},
    "ipo-token": {"tau": 0.5},
    "kto": {"beta": 0.1},
}
STEADY = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_share=0.0)


def moved(policy_folder: Path) -> PreTrainedModel:
    """The policy after it has left the reference."""
    model = load_policy(policy_folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def descent(model: PreTrainedModel) -> Trainee:
    """Gradient descent: a step moves the weights by the gradient, cut to norm 1."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return Trainee(model, optimizer, scheduler, max_grad_norm=1.0)


@pytest.fixture
def objective(preferences_folder: Path, reference_folder: Path):
    data = DirectData(preferences_folder, reference_folder, reference_folder)

    def make(loss: str, micro_batch_size: int = 32, tokens: int = 10**6) -> Objective:
        limit = Limit(2 * micro_batch_size, tokens)
        return Objective(data, PAD, loss, SETTINGS[loss], limit)

    return make


def rows_of(objective: Objective, numbers: list[int]) -> list[int]:
    """The rows that one of its batches names: a pair's are two."""
    if objective.single_rows:
        return numbers
    assert all(0 <= number < N for number in numbers)
    return [row for number in numbers for row in (number, N + number)]


def everything(loss: str) -> list[int]:
    """All pairs in one batch, or all rows."""
    return list(range(2 * N if loss == "kto" else N))


def unpaired_rows(preferences: Path) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, completions) of all rows: all chosen, then all rejected."""
    pairs = read_pairs(preferences / "train.jsonl")
    return [p.prompt_ids for p in pairs] * 2, [
        *(p.chosen_ids for p in pairs),
        *(p.rejected_ids for p in pairs),
    ]


# KTO's baseline


@pytest.mark.parametrize("size", range(2, 10))
def test_rows_of_different_prompts_are_dealt_out_as_a_derangement(size: int):
    prompts = [(i,) for i in range(size)]
    for seed in range(5):
        partner = mismatch(prompts, seed)
        assert sorted(partner) == list(range(size))
        assert all(j != i for i, j in enumerate(partner))


@settings(deadline=None)
@given(rows=st.lists(st.integers(0, 6), min_size=2, max_size=40), seed=st.integers(0, 3))
def test_every_row_gets_another_prompts_completion_and_each_is_used_once(rows, seed: int):
    prompts = [(5, row) for row in rows]
    if max(Counter(prompts).values()) * 2 > len(prompts):
        with pytest.raises(InputError, match="half"):
            mismatch(prompts, seed)
        return
    partner = mismatch(prompts, seed)
    assert sorted(partner) == list(range(len(rows)))
    assert all(prompts[i] != prompts[j] for i, j in enumerate(partner))


def test_the_seed_deals_differently():
    prompts = [(i,) for i in range(20)]
    assert mismatch(prompts, 0) == mismatch(prompts, 0)
    assert mismatch(prompts, 0) != mismatch(prompts, 1)


def test_one_prompt_with_more_than_half_of_the_rows_is_refused():
    assert sorted(mismatch([(1,), (1,), (2,), (3,)], 0)) == [0, 1, 2, 3]
    with pytest.raises(InputError, match="3 of 5 rows"):
        mismatch([(1,), (1,), (1,), (2,), (3,)], 0)


# The reference


def test_the_cached_reference_equals_one_computed_row_by_row(
    policy_folder: Path, preferences_folder: Path, reference_folder: Path
):
    cached, mismatched = read_reference(reference_folder), read_mismatched(reference_folder)
    model, pairs = load_policy(policy_folder), read_pairs(preferences_folder / "train.jsonl")
    prompts, completions = unpaired_rows(preferences_folder)
    rows = PairRows(pairs, PAD, SCORING)
    assert len(pairs) == rows.count == N
    assert (rows.prompts, rows.completions) == (prompts, completions)
    with torch.no_grad():
        alone = [
            [
                sequence_logps(model, collate([p], [c], PAD))
                for p, c in zip(prompts, of, strict=True)
            ]
            for of in (completions, [completions[j] for j in mismatched.partner])
        ]
    close(cached, torch.cat(alone[0]), 2e-5)
    close(mismatched.logps, torch.cat(alone[1]), 2e-5)
    assert all(prompts[i] != prompts[j] for i, j in enumerate(mismatched.partner))


def test_scoring_the_reference_is_paid_for(
    tmp_path: Path, policy_folder: Path, preferences_folder: Path
):
    """A pass over all completions, what they begin with in common once; none of it is training."""
    model, (prompts, completions) = load_policy(policy_folder), unpaired_rows(preferences_folder)
    folders = tmp_path / "reference", tmp_path / "mismatched"
    for folder in folders:
        folder.mkdir()
    score_reference(folders[0], policy_folder, preferences_folder)
    score_mismatched(folders[1], policy_folder, preferences_folder, seed=0)
    dealt = [completions[j] for j in read_mismatched(folders[1]).partner]
    for folder, of in zip(folders, (completions, dealt), strict=True):
        cost = json.loads((folder / "cost.json").read_text())
        rows = [*zip(prompts, of, strict=True)]
        lengths = [len(p) + len(c) - 1 for p, c in rows]  # a last token predicts nothing
        read = {(*p, *c[:end]) for p, c in rows for end in range(len(c))}
        at = At(len(beginnings(p + c[:-1] for p, c in rows)), len(read), sum(map(len, of)))
        assert cost["flops"] == pytest.approx(forward_flops(model, lengths, at))
        assert cost["train_tokens"] == 0


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_in_bfloat16_policy_and_reference_round_alike(
    policy_folder: Path, preferences_folder: Path, tmp_path: Path, loss: str
):
    """So a log-ratio at the start is 0, and not the rounding error of 20 tokens."""
    folders = tmp_path / "reference", tmp_path / "mismatched"
    for folder in folders:
        folder.mkdir()
    score_reference(folders[0], policy_folder, preferences_folder, "bfloat16")
    score_mismatched(folders[1], policy_folder, preferences_folder, 0, "bfloat16")
    folders_read = DirectData(preferences_folder, *folders)
    data = Objective(folders_read, PAD, loss, {"beta": 50.0}, DirectConfig().limit)
    half = OptimizerConfig(learning_rate=1e-3, precision="bfloat16", warmup_share=0.0)
    trainee = prepare(load_policy(policy_folder), half, 1)
    exact = tmp_path / "exact"
    exact.mkdir()
    score_reference(exact, policy_folder, preferences_folder)
    assert (read_reference(exact) - read_reference(folders[0])).abs().max() > 1e-3
    log = data.step(trainee, next(data.batches(range(N), 32, 1, 0)))
    assert log["loss"] == pytest.approx({"dpo": math.log(2), "kto": 0.5}[loss], abs=1e-4)
    assert {p.dtype for p in trainee.model.parameters()} == {torch.float32}
    assert log["grad_norm"] > 0


def test_the_frozen_copy_neither_trains_nor_follows_the_policy(policy_folder: Path):
    policy = load_policy(policy_folder).train()
    ref = frozen(policy)
    before = weights(ref).clone()
    assert not any(p.requires_grad for p in ref.parameters())
    assert not ref.training
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 1
    assert torch.equal(weights(ref), before)


# Settings


@pytest.mark.parametrize("loss", SETTINGS)
def test_every_loss_takes_its_own_settings(loss: str):
    check_setting(loss, SETTINGS[loss])


@pytest.mark.parametrize(
    ("loss", "setting", "message"),
    [
        ("dpoo", {"beta": 0.1}, "unknown loss `dpoo` (did you mean `dpo`?)"),
        ("dpo", {"bta": 0.1}, "loss `dpo` has no `bta` (did you mean `beta`?)"),
        ("ipo", {"beta": 0.1}, "loss `ipo` has no `beta` (did you mean `tau`?)"),
        ("dpo", {}, "loss `dpo` needs a value for `beta`"),
        ("cdpo", {"beta": 0.1}, "loss `cdpo` needs a value for `label_smoothing`"),
        (
            "kto",
            {"beta": 0.1, "desirable_weigth": 2.0},
            "loss `kto` has no `desirable_weigth` (did you mean `desirable_weight`?)",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_probably_meant(loss, setting, message: str):
    with pytest.raises(InputError) as error:
        check_setting(loss, setting)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("loss", "setting"),
    [
        ("dpo", {"beta": 0.0}),
        ("ipo", {"tau": -0.1}),
        ("kto", {"beta": 0.1, "desirable_weight": 0.0}),
        ("cdpo", {"beta": 0.1, "label_smoothing": -0.1}),
        ("rdpo", {"beta": 0.1, "label_smoothing": 0.5}),  # would divide by zero
    ],
)
def test_a_value_that_makes_no_loss_is_refused(loss: str, setting: dict[str, float]):
    name, value = list(setting.items())[-1]
    with pytest.raises(InputError, match=f"`{name}` must .*{value}"):
        check_setting(loss, setting)


def test_a_training_refuses_a_wrong_setting_before_it_reads_anything(tmp_path: Path):
    nothing = tmp_path / "nothing"
    with pytest.raises(InputError, match="did you mean `beta`"):
        train_direct(
            tmp_path, Start(nothing), DirectData(nothing, nothing), "dpo", {"betta": 0.1},
            DirectConfig(), (),
        )  # fmt: skip


def test_a_loss_over_single_completions_refuses_to_go_without_a_baseline(
    preferences_folder: Path, reference_folder: Path
):
    data = DirectData(preferences_folder, reference_folder)
    with pytest.raises(ValueError, match="mismatched"):
        Objective(data, PAD, "kto", {"beta": 0.1}, SCORING)


def test_a_setting_is_split_into_hyperparameters_and_a_rate():
    direct = DirectConfig(optimizer=STEADY)
    assert split_setting({"beta": 0.1}, direct) == ({"beta": 0.1}, direct)
    rest, changed = split_setting({"beta": 0.1, "learning_rate": 0.5}, direct)
    assert rest == {"beta": 0.1}
    steeper = STEADY.model_copy(update={"learning_rate": 0.5})
    assert changed == DirectConfig(optimizer=steeper)
    assert direct.optimizer.learning_rate == STEADY.learning_rate


# Batches


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_an_epoch_deals_out_every_completion_once(objective, loss: str):
    data = objective(loss)
    found = [rows_of(data, numbers) for numbers in data.batches(range(N), 5, 2, seed=0)]
    assert len(found) == 2 * 5
    for epoch in (found[:5], found[5:]):
        assert [len(rows) for rows in epoch] == [10, 10, 10, 10, 4]
        assert sorted(row for rows in epoch for row in rows) == list(range(2 * N))


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_batches_are_shuffled_each_epoch_and_by_seed(objective, loss: str):
    data = objective(loss)
    found = list(data.batches(range(N), 5, 2, seed=0))
    assert found == list(data.batches(range(N), 5, 2, seed=0))
    assert found[:5] != found[5:]
    assert found != list(data.batches(range(N), 5, 2, seed=1))
    assert sorted(found[0]) != list(range(len(found[0])))


def test_both_sides_of_a_pair_stay_together(objective):
    data = objective("dpo", micro_batch_size=2)
    for numbers in data.batches(range(N), 5, 1, seed=0):
        for batch in data.micro_batches(numbers):
            chosen, rejected = batch.rows.chunk(2)
            assert batch.chosen == len(chosen)
            assert (rejected - N).tolist() == chosen.tolist()


def test_kto_mixes_labels_and_parts_pairs(objective):
    found = list(objective("kto").batches(range(N), 5, 1, seed=0))
    assert all(0 < sum(row < N for row in rows) < len(rows) for rows in found[:-1])
    assert any(
        {row % N for row in rows if row < N} != {row % N for row in rows if row >= N}
        for rows in found
    )


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_batches_of_some_pairs_hold_no_others(objective, loss: str):
    some, data = [3, 7, 8, 20], objective(loss)
    dealt = data.batches(some, 3, 1, seed=0)
    found = [row for numbers in dealt for row in rows_of(data, numbers)]
    assert sorted(found) == [*some, *(N + i for i in some)]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_micro_batches_hold_each_row_once_chosen_sides_first(
    objective, preferences_folder: Path, loss: str
):
    every_row = unpaired_rows(preferences_folder)
    data = objective(loss, micro_batch_size=4)
    numbers = [2, 9, 5, 11, 20] if loss == "dpo" else [2, 30, 9, 31, 40, 5, 6, 7, 8, 43]
    found = data.micro_batches(numbers)
    assert len(found) > 1
    assert sorted(row for batch in found for row in batch.rows.tolist()) == sorted(
        rows_of(data, numbers)
    )
    for batch in found:
        rows = batch.rows.tolist()
        assert len(rows) <= 8
        assert [row < N for row in rows] == sorted((row < N for row in rows), reverse=True)
        assert batch.chosen == sum(row < N for row in rows)
        assert (batch.p == 1).all()
        assert len(batch.p) == batch.chosen
        prompts, completions = ([of[row] for row in rows] for of in every_row)
        expected = collate(prompts, completions, PAD)
        assert all(map(torch.equal, batch.sequences, expected))
        if loss == "dpo":
            half = len(rows) // 2
            assert [row + N for row in rows[:half]] == rows[half:]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_micro_batch_holds_no_more_tokens_than_it_may_but_for_a_row_or_pair_alone(
    objective, loss: str
):
    for tokens in (1, 60, 90, 300):
        found = objective(loss, tokens=tokens).micro_batches(everything(loss))
        assert sorted(row for batch in found for row in batch.rows.tolist()) == list(range(2 * N))
        for batch in found:
            alone = len(batch.rows) == (2 if loss == "dpo" else 1)
            assert alone or batch.sequences.ids.numel() <= tokens
    assert len(found) < N


# The step


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("dpo", math.log(2)),
        ("cdpo", math.log(2)),
        ("rdpo", math.log(2)),
        ("ipo", 1 / (4 * 0.5**2)),
        ("ipo-token", 1 / (4 * 0.5**2)),
        ("kto", 0.5),
    ],
)
def test_the_first_step_starts_from_the_loss_of_the_reference(
    objective, policy_folder: Path, loss: str, expected: float
):
    """The policy is the reference: what the cache holds is what the step computes."""
    log = objective(loss).step(descent(load_policy(policy_folder)), everything(loss))
    assert log["loss"] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("loss", SETTINGS)
def test_a_step_equals_the_loss_written_out(
    objective, policy_folder: Path, preferences_folder: Path, loss: str
):
    """Log-ratios of plain rows, one by one, against the step's own batches and cache."""
    data, model, ref = objective(loss, 4), moved(policy_folder), load_policy(policy_folder)
    numbers = [0, 4, 9, 17, 3]
    rows = [row for number in numbers for row in (number, N + number)]
    pairs = read_pairs(preferences_folder / "train.jsonl")

    @torch.no_grad()
    def ratio(prompt: list[int], completion: list[int]) -> float:
        alone = collate([prompt], [completion], PAD)
        return (sequence_logps(model, alone) - sequence_logps(ref, alone)).item()

    kept = [pairs[i] for i in rows if i < N]
    chosen = [ratio(p.prompt_ids, p.chosen_ids) for p in kept]
    rejected = [ratio(p.prompt_ids, p.rejected_ids) for p in kept]
    s = SETTINGS[loss]
    if loss == "kto":
        prompts, completions = unpaired_rows(preferences_folder)
        partner = data.mismatched.partner.tolist()
        baseline = [ratio(prompts[i], completions[partner[i]]) for i in rows]
        z = max(0.0, sum(baseline) / len(baseline))
        losses = [1 / (1 + math.exp(-s["beta"] * (z - r))) for r in chosen]
        losses += [1 / (1 + math.exp(-s["beta"] * (r - z))) for r in rejected]
    elif loss.startswith("ipo"):
        per_token = loss == "ipo-token"
        losses = [
            (
                c / (len(p.chosen_ids) if per_token else 1)
                - r / (len(p.rejected_ids) if per_token else 1)
                - 1
            )
            ** 2
            for c, r, p in zip(chosen, rejected, kept, strict=True)
        ]
    else:
        wrong = s.get("label_smoothing", 0.0)
        sign, scale = (-1, 1 - 2 * wrong) if loss == "rdpo" else (1, 1)
        losses = [
            ((1 - wrong) * math.log1p(math.exp(-h)) + sign * wrong * math.log1p(math.exp(h)))
            / scale
            for h in (s["beta"] * (c - r) for c, r in zip(chosen, rejected, strict=True))
        ]
    log = data.step(descent(model), rows if loss == "kto" else numbers)
    assert log["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    if loss not in UNPAIRED:
        margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
        accuracy = sum(m > 0 for m in margins) / len(margins)
        assert log["rewards/accuracies"] == pytest.approx(accuracy)
        scale = s.get("beta", s.get("tau"))
        assert log["rewards/margins"] == pytest.approx(
            scale * sum(margins) / len(margins), rel=1e-4
        )


@pytest.mark.parametrize("loss", SETTINGS)
def test_the_micro_batch_size_changes_neither_loss_nor_gradient(
    objective, policy_folder: Path, loss: str
):
    numbers = everything(loss) if loss != "kto" else [*range(15), *range(N, N + 6), N + 18]
    found = []
    for size in ((32,), (5,), (1,), (32, 90), (32, 1)):  # pairs, tokens
        model = moved(policy_folder)
        log = objective(loss, *size).step(descent(model), numbers)
        found.append((log, weights(model)))
    assert (found[0][1] - weights(moved(policy_folder))).norm() > 0.1
    for log, after in found[1:]:
        assert log == pytest.approx(found[0][0], rel=1e-5, abs=1e-6)
        close(after, found[0][1], 5e-6)  # gradients of products are exact to 4e-6


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_each_pair_keeps_its_own_probability_in_any_micro_batch(
    tmp_path: Path, policy_folder: Path, preferences_folder: Path, reference_folder: Path, loss: str
):
    """Labels of 0 to 1 by pair: the expected loss of a whole batch in the pairs' own order."""
    pairs = read_pairs(preferences_folder / "train.jsonl")
    p = [i / (N - 1) for i in range(N)]
    write_jsonl(
        tmp_path / "train.jsonl",
        [pair._replace(p=q)._asdict() for pair, q in zip(pairs, p, strict=True)],
    )
    data, model = DirectData(tmp_path, reference_folder, reference_folder), moved(policy_folder)
    prompts, completions = unpaired_rows(tmp_path)
    with torch.no_grad():
        logps = sequence_logps(model, collate(prompts, completions, PAD))
    ratios = logps - read_reference(reference_folder)
    numbers = [7, 0, 21, 3, 12]
    for size in (32, 2, 1):
        objective = Objective(data, PAD, loss, SETTINGS[loss], Limit(2 * size, 10**6))
        assert not objective.single_rows
        mismatched = None
        if loss == "kto":
            mismatched = objective.mismatched_ratios(model, rows_of(objective, numbers))
        chosen, rejected = ratios[numbers], ratios[[N + i for i in numbers]]
        ones = torch.ones(len(numbers))
        r = LogRatios(chosen, rejected, ones, ones, mismatched)
        labels = torch.tensor([p[i] for i in numbers])
        expected = expected_loss(LOSSES[loss], r, labels, **SETTINGS[loss]).mean()
        log = objective.step(descent(moved(policy_folder)), numbers)
        assert log["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_ktos_baseline_is_that_of_the_whole_step_and_is_logged(
    objective, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Mismatched log-ratios of 0 to 4.3 by row: a baseline that differs between micro-batches."""
    data = objective("kto", 1)
    known = torch.arange(2 * N) / 10
    data.mismatched = data.mismatched._replace(logps=data.mismatched.logps - known)
    rows = [1, 3, N + 5, N + 8, 20]
    close(data.mismatched_ratios(load_policy(policy_folder), rows), known[rows], 2e-5)
    monkeypatch.setattr("dpo.train.SCORING", Limit(256, 40))
    close(data.mismatched_ratios(load_policy(policy_folder), rows), known[rows], 2e-5)
    log = data.step(descent(load_policy(policy_folder)), rows)
    z = (0.1 + 0.3 + 2.7 + 3.0 + 2.0) / 5
    assert log["kl"] == pytest.approx(z, abs=1e-5)
    desirable, undesirable = (1 / (1 + math.exp(-0.1 * x)) for x in (z, -z))
    assert log["loss"] == pytest.approx((3 * desirable + 2 * undesirable) / 5, abs=1e-6)


# The whole stage


def run(
    folder: Path, policy: Path, preferences: Path, reference: Path, loss: str, **changes
) -> tuple[list[dict[str, float]], dict]:
    """(log, how it ended) of a direct stage."""
    folder.mkdir()
    options = {"epochs": 4, "batch_size": 8, "optimizer": STEADY, **changes}
    seed, checkpoints = options.pop("seed", 0), options.pop("checkpoints", ())
    direct, data = DirectConfig(**options), DirectData(preferences, reference, reference)
    start = Start(policy, seed=seed)
    train_direct(folder, start, data, loss, SETTINGS[loss], direct, checkpoints)
    return read_log(folder), read_json(folder / "stopped.json")


@torch.no_grad()
def margins(model_folder: Path, preferences: Path, reference: Path) -> Tensor:
    """Log-ratio of chosen less that of rejected, each training pair."""
    model, ref = load_policy(model_folder), read_reference(reference)
    prompts, completions = unpaired_rows(preferences)
    chosen, rejected = sequence_logps(model, collate(prompts, completions, PAD)).chunk(2)
    ref_chosen, ref_rejected = ref.chunk(2)
    return (chosen - ref_chosen) - (rejected - ref_rejected)


@pytest.mark.parametrize("loss", SETTINGS)
def test_a_short_training_prefers_the_chosen_completions(
    tmp_path: Path, policy_folder: Path, preferences_folder: Path, reference_folder: Path, loss: str
):
    data = policy_folder, preferences_folder, reference_folder
    log, stopped = run(tmp_path / "run", *data, loss)
    assert stopped == {"failed": "", "stopped_early": False}
    assert len(log) == 4 * 3
    assert log[-1]["loss"] < log[0]["loss"]
    found = margins(tmp_path / "run" / "final", preferences_folder, reference_folder)
    assert found.mean() > 0.5
    assert (found > 0).float().mean() > 0.6
    if loss not in UNPAIRED:
        assert log[-1]["rewards/margins"] > log[0]["rewards/margins"] + 0.05


def test_a_run_writes_plain_folders_and_counts_its_work(
    tmp_path: Path, policy_folder: Path, preferences_folder: Path, reference_folder: Path
):
    data = policy_folder, preferences_folder, reference_folder
    run(tmp_path / "run", *data, "dpo", checkpoints=(0.25, 0.5))
    points = json.loads((tmp_path / "run" / "checkpoints.json").read_text())
    assert points == {"checkpoint-3": 0.25, "checkpoint-6": 0.5, "final": 1.0}
    found = [AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name) for name in points]
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "final").pad_token_id == PAD
    distances = [(weights(m) - weights(load_policy(policy_folder))).norm() for m in found]
    assert 0 < distances[0] < distances[1] < distances[2]
    cost = json.loads((tmp_path / "run" / "cost.json").read_text())
    pairs = read_pairs(preferences_folder / "train.jsonl")
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    assert cost["train_tokens"] == 4 * tokens
    assert cost["generated_tokens"] == 0
    assert cost["labels_used"] == N


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_equal_seeds_give_equal_runs_and_others_another_order(
    tmp_path: Path, policy_folder: Path, preferences_folder: Path, reference_folder: Path, loss: str
):
    data = policy_folder, preferences_folder, reference_folder
    logs = [
        run(tmp_path / str(i), *data, loss, epochs=1, seed=s)[0] for i, s in enumerate([0, 0, 1])
    ]
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_a_run_that_diverges_keeps_its_last_finite_weights_and_says_so(
    tmp_path: Path, policy_folder: Path, preferences_folder: Path, reference_folder: Path
):
    wild = STEADY.model_copy(update={"learning_rate": 1e30})
    data = policy_folder, preferences_folder, reference_folder
    log, stopped = run(tmp_path / "run", *data, "dpo", optimizer=wild, checkpoints=(0.5,))
    assert "not finite" in stopped["failed"]
    assert len(log) < 12
    final = load_policy(tmp_path / "run" / "final")
    assert torch.isfinite(weights(final)).all()
    assert json.loads((tmp_path / "run" / "checkpoints.json").read_text()) == {"final": 1.0}


def test_a_setting_may_hold_its_own_learning_rate(
    tmp_path: Path, policy_folder: Path, preferences_folder: Path, reference_folder: Path
):
    """The same weights as with that rate for all, and other ones than without it."""
    found = []
    for number, (setting, rate) in enumerate(
        [({"beta": 0.1, "learning_rate": 3e-3}, 1e-2), ({"beta": 0.1}, 3e-3), ({"beta": 0.1}, 1e-2)]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        direct = DirectConfig(
            optimizer=STEADY.model_copy(update={"learning_rate": rate}), epochs=1, batch_size=8
        )
        data = DirectData(preferences_folder, reference_folder)
        train_direct(folder, Start(policy_folder), data, "dpo", setting, direct, ())
        found.append(weights(load_policy(folder / "final")))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
