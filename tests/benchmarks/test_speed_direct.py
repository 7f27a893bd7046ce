"""Training steps beside TRL's trainers: the same pairs, tokens and losses, and what is drawn."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import pytest
from transformers import PreTrainedTokenizerBase

from benchmarks.speed.cases import WORKLOADS, Case, Shape, Workload, draw_pairs, make_case
from benchmarks.speed.direct import case_setting, compare_steps, our_steps
from benchmarks.speed.sides import Choice, Round
from benchmarks.speed.trl.steps import labelled_rows, train_in_turn
from shared.data.pairs import read_pairs
from shared.models.load import special_ids

WORKS = ("dpo", "ipo", "kto", "reward")
TINY = Workload(
    learning_rate=5e-3,
    precisions=("float32", "bfloat16"),
    completion_tokens=(3, 9),
    shapes={"equal": Shape(3, 1.0, 3), "in parts": Shape(4, 1.0, 2)},
)


@pytest.fixture
def case(policy_folder: Path, tmp_path: Path) -> Callable[..., Case]:
    """Three steps of the tiny policy."""

    def of(work: str, precision: str = "float32", shape: str = "equal") -> Case:
        return make_case(work, precision, TINY, shape, 3, policy_folder, tmp_path)

    return of


# --- the material -----------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [2.0, 1.0, 0.25])
def test_prompts_are_as_long_as_the_shape_says(tokenizer: PreTrainedTokenizerBase, ratio: float):
    pairs = draw_pairs(200, (24, 48), ratio, tokenizer, seed=0)
    for pair in pairs:
        completion = (len(pair.chosen_ids) + len(pair.rejected_ids)) / 2
        assert len(pair.prompt_ids) == pytest.approx(ratio * completion, abs=0.5)
    lengths = {len(side) for pair in pairs for side in (pair.chosen_ids, pair.rejected_ids)}
    assert (min(lengths), max(lengths)) == (24, 48)


def test_drawn_pairs_hold_ordinary_tokens_and_one_eos_and_can_be_drawn_again(
    tokenizer: PreTrainedTokenizerBase,
):
    pairs, eos = draw_pairs(50, (5, 16), 1.0, tokenizer, seed=0), special_ids(tokenizer).eos
    for pair in pairs:
        assert pair.chosen_ids != pair.rejected_ids
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == eos
        drawn = {*pair.prompt_ids, *pair.chosen_ids[:-1], *pair.rejected_ids[:-1]}
        assert not drawn & set(tokenizer.all_special_ids)
        assert max(drawn) < len(tokenizer)
    assert len({tuple(pair.prompt_ids) for pair in pairs}) == 50
    assert pairs == draw_pairs(50, (5, 16), 1.0, tokenizer, seed=0)
    assert pairs != draw_pairs(50, (5, 16), 1.0, tokenizer, seed=1)


def test_the_named_shapes_are_what_their_names_say():
    shapes = WORKLOADS["smollm2-135m"].shapes
    ratios = {"prompt-heavy": 2.0, "equal": 1.0, "completion-heavy": 0.25}
    assert {name: (s.prompt_ratio, s.batch, s.micro_batch) for name, s in shapes.items()} == {
        **{name: (ratio, 4, 4) for name, ratio in ratios.items()},
        **{f"{name}, batch 16": (ratio, 16, 8) for name, ratio in ratios.items()},
    }
    assert WORKLOADS["reviews"].precisions == ("float32",)


def test_a_case_says_its_mean_lengths(case: Callable[..., Case]):
    made = case("dpo")
    pairs, about = read_pairs(made.data / "train.jsonl"), case_setting(made, rounds=2)
    assert len(pairs) == about["steps"] * about["batch"] == 9
    assert about["prompt_tokens"] == mean(len(pair.prompt_ids) for pair in pairs)
    chosen, rejected = (
        mean(len(getattr(p, f"{s}_ids")) for p in pairs) for s in ("chosen", "rejected")
    )
    assert about["completion_tokens"] == pytest.approx((chosen + rejected) / 2)


def test_ktos_rows_are_both_completions_of_a_pair_with_the_mismatched_one_of_each(
    tokenizer: PreTrainedTokenizerBase,
):
    pairs = draw_pairs(3, (5, 16), 1.0, tokenizer, seed=0)
    rows = labelled_rows(pairs, partner=[1, 2, 0, 4, 5, 3])
    assert [row["completion_ids"] for row in rows] == [
        side for pair in pairs for side in (pair.chosen_ids, pair.rejected_ids)
    ]
    assert [row["label"] for row in rows] == 3 * [True, False]
    assert rows[0]["KL_completion_ids"] == pairs[1].chosen_ids
    assert rows[5]["KL_completion_ids"] == pairs[0].rejected_ids


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        ({}, True),
        ({"models": ["m"], "dtypes": ["float32"], "shapes": ["other", "equal"]}, True),
        ({"models": ["other"]}, False),
        ({"models": ["m"], "shapes": ["other"]}, False),
    ],
)
def test_a_choice_of_nothing_is_a_choice_of_all(wanted: dict[str, list[str]], taken: bool):
    assert Choice(Path(), 1, **wanted).takes("m", "float32", "equal") == taken


# --- the sides --------------------------------------------------------------------------------


@dataclass
class Alone:
    """Turns of a side that has nobody to wait for."""

    rounds: int
    results: list[Round] = field(default_factory=list)

    def wait(self) -> bool:
        return len(self.results) < self.rounds

    def send(self, result: Round) -> None:
        self.results.append(result)


@pytest.mark.parametrize("shape", TINY.shapes)
@pytest.mark.parametrize("work", WORKS)
def test_ours_and_trls_steps_have_the_same_losses_on_the_same_tokens(
    work: str, shape: str, case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
):
    """The first loss is at the reference; those after it say that the same steps were taken."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    made, turns = case(work, shape=shape), Alone(3)
    train_in_turn(turns, made)
    side = our_steps(made)
    ours = [side() for _ in range(3)]
    assert len(turns.results) == 3
    for mine, theirs in zip(ours, turns.results, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, abs=2e-5)
        assert (mine.tokens, mine.units) == (theirs.tokens, theirs.units)
        assert min(mine.seconds, theirs.seconds, mine.flops) > 0
    first, second, _ = (done.loss for done in ours)
    assert abs(second - first) > 1e-3


def test_a_trainer_stops_when_its_rounds_are_over(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    turns = Alone(2)
    train_in_turn(turns, case("dpo"))
    assert len(turns.results) == 2


def check(case: Case, tolerance: float) -> None:
    row = compare_steps(case, "tiny", "equal", rounds=1)
    assert (row.work, row.dtype, row.unit) == (case.work, case.precision, "pairs/s")
    assert row.peer_name.startswith("trl 1.")
    assert row.loss_difference <= tolerance
    assert row.ours > 0
    assert row.ratio.per_seed == pytest.approx([row.ours / row.peer])
    assert 0.2 < row.memory_ratio < 5
    assert 0 < row.mfu < 1


def test_a_comparison_end_to_end(case: Callable[..., Case]):
    check(case("dpo"), 1e-4)


@pytest.mark.slow  # two processes each, half a minute in all
@pytest.mark.parametrize("work", WORKS)
def test_all_comparisons_end_to_end_in_bfloat16(work: str, case: Callable[..., Case]):
    check(case(work, "bfloat16"), 0.1)
