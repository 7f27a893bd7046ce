"""KTO on single answers with a label: the same as on pairs that hold them, and balanced."""

from pathlib import Path

import pytest
import torch
from checks import weights
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from dpo.losses import WEIGHTS, balancing_weights
from dpo.reference import score_mismatched, score_reference
from dpo.train import DirectConfig, DirectData, Objective, train_direct
from rlhf.reward import RewardConfig, train_reward
from shared.config import InputError
from shared.data.pairs import Labelled, Pair, read_pairs
from shared.models.load import Start
from shared.models.sequences import SCORING
from shared.stages import read_json, write_jsonl
from shared.training.finished import read_log
from shared.training.fit import OptimizerConfig

PAD = 0
DIRECT = DirectConfig(
    optimizer=OptimizerConfig(learning_rate=1e-3), epochs=2, batch_size=8, micro_batch_size=3
)


def split(pairs: list[Pair]) -> list[Labelled]:
    """Each pair's two answers, one after the other."""
    return [
        Labelled(f"{pair.id} {label}", pair.prompt, pair.prompt_ids, ids, label)
        for pair in pairs
        for label, ids in ((True, pair.chosen_ids), (False, pair.rejected_ids))
    ]


def prepared(folder: Path, policy: Path, answers: list[Labelled]) -> DirectData:
    """What KTO reads: answers, and what the reference says of them."""
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "train.jsonl", [answer._asdict() for answer in answers])
    score_reference(folder, policy, folder)
    score_mismatched(folder, policy, folder, seed=0)
    return DirectData(folder, folder, folder)


@pytest.fixture(scope="module")
def pairs(preferences_folder: Path) -> list[Pair]:
    return read_pairs(preferences_folder / "train.jsonl")


def test_labels_split_from_pairs_train_the_policy_that_the_pairs_train(
    tmp_path: Path,
    policy_folder: Path,
    preferences_folder: Path,
    reference_folder: Path,
    pairs: list[Pair],
):
    """The batches hold the same answers, so that policy and log are the same to the last bit."""
    of_pairs = DirectData(preferences_folder, reference_folder, reference_folder)
    of_labels = prepared(tmp_path / "labels", policy_folder, split(pairs))
    ends = []
    for name, data in (("by pairs", of_pairs), ("by labels", of_labels)):
        (tmp_path / name).mkdir()
        start, setting = Start(policy_folder, None, 3), {"beta": 0.5}
        train_direct(tmp_path / name, start, data, "kto", setting, DIRECT, ())
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name / "final")
        ends.append((weights(model), [row["loss"] for row in read_log(tmp_path / name)]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1] and len(ends[0][1]) == 6  # 22 pairs in batches of 8, twice
    told = read_json(tmp_path / "by labels" / "labels.json")
    assert told == {"desirable": 22, "undesirable": 22, **dict.fromkeys(WEIGHTS, 1.0)}
    assert not (tmp_path / "by pairs" / "labels.json").exists()


@given(desirable=st.integers(1, 10**6), undesirable=st.integers(1, 10**6))
def test_the_papers_rule_holds_for_any_counts_and_the_rarer_kind_is_raised(
    desirable: int, undesirable: int
):
    found = balancing_weights(desirable, undesirable)
    good, bad = (found.get(name, 1.0) for name in WEIGHTS)
    assert 1 - 1e-9 <= good * desirable / (bad * undesirable) <= 4 / 3 + 1e-9
    assert min(good, bad) == 1
    assert good == 1 or desirable < undesirable
    assert bad == 1 or undesirable < desirable


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({}, (1.0, 3.0)),
        ({"undesirable_weight": 2.0}, (1.0, 2.0)),
        ({"desirable_weight": 0.5}, (0.5, 1.0)),
    ],
)
def test_an_arms_own_weights_win_over_those_that_balance(
    tmp_path: Path, policy_folder: Path, pairs: list[Pair], setting: dict[str, float], expected
):
    both = split(pairs)
    answers = [a for a in both if a.desirable][:21] + [a for a in both if not a.desirable][:7]
    data = prepared(tmp_path, policy_folder, answers)
    objective = Objective(data, PAD, "kto", {"beta": 0.1, **setting}, SCORING)
    assert tuple(objective.labels()[name] for name in WEIGHTS) == expected


def test_every_answer_is_seen_once_an_epoch_in_batches_of_twice_as_many(
    tmp_path: Path, policy_folder: Path, pairs: list[Pair]
):
    answers = split(pairs)[:31]
    objective = Objective(
        prepared(tmp_path, policy_folder, answers), PAD, "kto", {"beta": 0.1}, SCORING
    )
    batches = list(objective.batches(objective.items, 4, 1, seed=0))
    assert [len(batch) for batch in batches] == [8, 8, 8, 7]
    seen = [
        row for batch in batches for part in objective.micro_batches(batch) for row in part.rows
    ]
    assert sorted(map(int, seen)) == list(range(31))


def test_what_compares_two_answers_refuses_labels(
    tmp_path: Path, policy_folder: Path, pairs: list[Pair]
):
    data = prepared(tmp_path, policy_folder, split(pairs)[:8])
    with pytest.raises(InputError, match="`dpo` needs pairs"):
        Objective(data, PAD, "dpo", {"beta": 0.1}, SCORING)
    with pytest.raises(InputError, match="pairs are needed"):
        train_reward(tmp_path, policy_folder, tmp_path, tmp_path, RewardConfig(), 0)
