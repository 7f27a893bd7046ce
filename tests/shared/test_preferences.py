"""Preference pairs: what is dropped is counted, labels are Bradley-Terry, seeds decide all."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from shared.config import InputError
from shared.data.pairs import Pair, clean, read_pairs, swapped
from shared.data.preferences import (
    PreferenceConfig,
    make_preferences,
    make_reward_test,
    read_spoiled,
)
from shared.data.splits import split_of
from shared.generation.engine import Sampling
from shared.generation.start import Drawing
from shared.models.load import special_ids
from shared.stages import read_json, write_jsonl
from shared.tasks.registry import TaskConfig, make_task
from shared.tasks.reviews import ReviewsConfig

DRAWING = Drawing(Sampling(max_new_tokens=10))


def pair(prompt: str, chosen: str, rejected: str) -> Pair:
    """One letter a token; gold is made up from the letters."""
    ids = [[ord(c) for c in text] for text in (prompt, chosen, rejected)]
    return Pair("p", prompt, *ids, float(len(chosen)), float(len(rejected)))


# --- cleaning ---------------------------------------------------------------------------------


def test_good_pairs_stay_as_they_are_and_in_order():
    pairs = [pair("a", "x", "y"), pair("b", "x", "y"), pair("a", "x", "z"), pair("a", "y", "z")]
    assert clean(pairs) == (pairs, Counter())


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (pair("a", "", "y"), "empty"),
        (pair("a", "x", ""), "empty"),
        (pair("", "x", "y"), "empty"),
        (pair("a", "", ""), "empty"),
        (pair("a", "xy", "xy"), "identical"),
    ],
)
def test_a_pair_that_teaches_nothing_goes_and_its_reason_is_counted(bad: Pair, reason: str):
    good = [pair("a", "x", "y"), pair("b", "x", "y")]
    assert clean([good[0], bad, good[1], bad]) == (good, Counter({reason: 2}))


def test_a_pair_seen_before_goes_and_the_first_one_stays():
    first, other = pair("a", "x", "y"), pair("a", "x", "z")
    again = first._replace(id="again", chosen_gold=9.0)
    assert clean([first, other, again, again]) == ([first, other], Counter(duplicate=2))


def test_two_pairs_that_contradict_each_other_both_go():
    good = pair("b", "x", "y")
    found = clean([pair("a", "x", "y"), good, pair("a", "y", "x")])
    assert found == ([good], Counter(contradiction=2))


def test_the_same_answers_to_another_prompt_contradict_nothing():
    pairs = [pair("a", "x", "y"), pair("b", "y", "x")]
    assert clean(pairs) == (pairs, Counter())


def test_tokens_are_compared_one_by_one_and_not_as_joined_text():
    pairs = [pair("a", "bc", "d"), pair("ab", "c", "d"), pair("a", "b", "cd")]
    assert clean(pairs) == (pairs, Counter())


def test_a_contradicted_comparison_stays_out_however_often_it_comes():
    """Two say x, two say y: no one knows, so nothing is taught."""
    x, y = pair("a", "x", "y"), pair("a", "y", "x")
    for pairs in ([x, y, x], [x, y, y], [x, y, x, y], [x, x, y], [x, y, x, x]):
        kept, dropped = clean(pairs)
        assert kept == []
        assert dropped.total() == len(pairs)


SMALL = st.lists(
    st.builds(pair, *(st.sampled_from(["", "x", "y", "xy"]) for _ in range(3))), max_size=12
)


@settings(max_examples=300, deadline=None)
@given(SMALL)
@example([pair("x", "x", "y"), pair("x", "y", "x"), pair("x", "x", "y")])
def test_every_pair_is_kept_or_counted_and_what_is_kept_is_clean(pairs: list[Pair]):
    kept, dropped = clean(pairs)
    assert len(kept) + dropped.total() == len(pairs)
    assert set(dropped) <= {"empty", "identical", "duplicate", "contradiction"}
    assert [p for p in pairs if any(p is k for k in kept)] == kept  # unchanged, in their order
    assert clean(kept) == (kept, Counter())
    seen = {(p.prompt, *sorted((str(p.chosen_ids), str(p.rejected_ids)))) for p in kept}
    assert len(seen) == len(kept)


def test_swapped_turns_answers_and_gold_round_and_keeps_the_rest():
    one = pair("a", "x", "yz")
    assert swapped(one) == one._replace(
        chosen_ids=one.rejected_ids,
        rejected_ids=one.chosen_ids,
        chosen_gold=2.0,
        rejected_gold=1.0,
    )
    assert swapped(swapped(one)) == one


def test_gold_may_be_missing(tmp_path: Path):
    """Labels that people gave have none."""
    bare = Pair("p", "a", [1], [2], [3])
    assert (bare.chosen_gold, bare.rejected_gold, bare.p) == (None, None, 1.0)
    rows = [bare._asdict(), {k: v for k, v in bare._asdict().items() if "gold" not in k}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    assert read_pairs(tmp_path / "train.jsonl") == [bare, bare]
    assert swapped(swapped(bare)) == bare
    assert clean([bare]) == ([bare], Counter())


# --- the stage --------------------------------------------------------------------------------


def make(folder: Path, policy: Path, task: TaskConfig, seed: int = 0, **data: object) -> Path:
    folder.mkdir()
    config = PreferenceConfig.model_validate({"pairs": 1500, "held_out_pairs": 100, **data})
    make_preferences(folder, task, policy, config, DRAWING, seed)
    return folder


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, task_config: TaskConfig
) -> Path:
    return make(tmp_path_factory.mktemp("made") / "0", policy_folder, task_config)


@pytest.fixture(scope="module")
def pairs(made: Path) -> list[Pair]:
    return read_pairs(made / "train.jsonl") + read_pairs(made / "held_out.jsonl")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_there_are_as_many_pairs_as_asked(made: Path):
    assert len(read_pairs(made / "train.jsonl")) == 1500
    assert len(read_pairs(made / "held_out.jsonl")) == 100
    assert read_json(made / "cleaning.json")["kept"] == 1600


def test_prompts_of_training_and_held_out_pairs_do_not_meet(made: Path, pairs: list[Pair]):
    train, held_out = (
        {p.prompt for p in read_pairs(made / name)} for name in ("train.jsonl", "held_out.jsonl")
    )
    assert train.isdisjoint(held_out)
    assert len(train | held_out) == 1600
    assert {split_of(p.prompt) for p in pairs} == {"preference"}
    assert len({p.id for p in pairs}) == 1600


def test_a_pair_is_two_samples_of_its_prompt_with_their_true_gold(
    pairs: list[Pair], task_config: TaskConfig, tokenizer: PreTrainedTokenizerBase
):
    task, eos = make_task(task_config), special_ids(tokenizer).eos
    assert [p.prompt_ids for p in pairs] == [tokenizer(p.prompt).input_ids for p in pairs]
    for side in ("chosen", "rejected"):
        ids = [getattr(p, f"{side}_ids") for p in pairs]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        gold = task.gold([p.prompt for p in pairs], texts)
        np.testing.assert_array_equal(gold, [getattr(p, f"{side}_gold") for p in pairs])
        assert all(c[-1] == eos or len(c) == DRAWING.sampling.max_new_tokens for c in ids)
        assert any(c[-1] == eos for c in ids)
    assert all(p.chosen_ids != p.rejected_ids for p in pairs)


def test_several_pairs_of_a_prompt_cost_no_more_samples(
    tmp_path: Path, policy_folder: Path, task_config: TaskConfig
):
    drawn = []
    for per_prompt in (1, 2, 4):
        data = {"pairs": 20, "held_out_pairs": 4, "per_prompt": per_prompt}
        folder = make(tmp_path / str(per_prompt), policy_folder, task_config, **data)
        drawn.append(read_json(folder / "cleaning.json")["drawn"])
        found = read_pairs(folder / "train.jsonl")
        assert max(Counter(p.prompt for p in found).values()) == per_prompt
    assert drawn[0] == drawn[1] == drawn[2] < 24 + 100


def test_with_several_pairs_a_prompt_each_answer_has_its_own_gold(
    tmp_path: Path, policy_folder: Path, task_config: TaskConfig, tokenizer: PreTrainedTokenizerBase
):
    data = {"pairs": 60, "held_out_pairs": 4, "per_prompt": 3}
    found = read_pairs(make(tmp_path / "3", policy_folder, task_config, **data) / "train.jsonl")
    task = make_task(task_config)
    for side in ("chosen", "rejected"):
        ids = [getattr(p, f"{side}_ids") for p in found]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        gold = task.gold([p.prompt for p in found], texts)
        np.testing.assert_array_equal(gold, [getattr(p, f"{side}_gold") for p in found])
    assert len({p.id for p in found}) == 60


def test_held_out_pairs_are_found_however_many_pairs_a_prompt_gives(
    tmp_path: Path, policy_folder: Path, task_config: TaskConfig
):
    """A first prompt alone would fill the training pairs: held-out ones need another."""
    data = {"pairs": 20, "held_out_pairs": 4, "per_prompt": 150}
    folder = make(tmp_path / "many", policy_folder, task_config, **data)
    train, held_out = (read_pairs(folder / f"{name}.jsonl") for name in ("train", "held_out"))
    assert (len(train), len(held_out)) == (20, 4)
    assert {p.prompt for p in train}.isdisjoint(p.prompt for p in held_out)


def test_held_out_pairs_are_drawn_as_the_others_are(made: Path):
    """Not the left-overs of cleaning: both have about the same gold and length."""
    train, held_out = (
        np.array([[p.chosen_gold, len(p.chosen_ids)] for p in read_pairs(made / name)])
        for name in ("train.jsonl", "held_out.jsonl")
    )
    error = np.sqrt(train.var(0) / len(train) + held_out.var(0) / len(held_out))
    assert (np.abs(train.mean(0) - held_out.mean(0)) < 4 * error).all()


def first_wins(pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """(difference of gold, whether the better one was chosen) of pairs whose gold differs."""
    difference = np.array([p.chosen_gold - p.rejected_gold for p in pairs])
    unequal = difference != 0
    return np.abs(difference[unequal]), difference[unequal] > 0


def test_labels_follow_bradley_terry(pairs: list[Pair]):
    """The better answer wins with probability sigmoid(3 |difference|), within 4 deviations."""
    gap, won = first_wins(pairs)
    p = 1 / (1 + np.exp(-3.0 * gap))
    assert p.std() > 0.05  # easy and hard ones
    for some in (gap >= 0, gap < np.median(gap), gap >= np.median(gap)):
        deviation = np.sqrt((p * (1 - p))[some].sum())
        assert abs((won - p)[some].sum()) < 4 * deviation
    assert abs(((won - p) * gap).sum()) < 4 * np.sqrt((p * (1 - p) * gap**2).sum())


def test_shuffled_labels_are_a_fair_coin(
    tmp_path: Path, policy_folder: Path, task_config: TaskConfig, pairs: list[Pair]
):
    folder = make(tmp_path / "coin", policy_folder, task_config, labels="shuffled")
    tossed = read_pairs(folder / "train.jsonl") + read_pairs(folder / "held_out.jsonl")
    gap, won = first_wins(tossed)
    assert abs((won - 0.5).sum()) < 4 * np.sqrt(len(won)) / 2
    assert abs(((won - 0.5) * gap).sum()) < 4 * np.sqrt((gap**2).sum()) / 2
    assert (1 / (1 + np.exp(-3 * gap))).mean() - 0.5 > 4 / (2 * np.sqrt(len(won)))  # so it can tell

    def sides(pair: Pair) -> tuple[str, frozenset[str]]:
        return pair.prompt, frozenset({str(pair.chosen_ids), str(pair.rejected_ids)})

    assert set(map(sides, tossed)) == set(map(sides, pairs))  # a control: the labels alone differ


def test_without_label_noise_the_better_answer_wins(
    tmp_path: Path, policy_folder: Path, task_config: TaskConfig
):
    sure = task_config.model_copy(update={"reviews": ReviewsConfig(label_scale=300)})
    folder = make(tmp_path / "sure", policy_folder, sure, pairs=300, held_out_pairs=20)
    gap = np.array([p.chosen_gold - p.rejected_gold for p in read_pairs(folder / "train.jsonl")])
    assert (np.abs(gap) > 0.1).sum() > 100
    assert gap.min() > -0.1  # sigmoid(-30) is never drawn


def test_the_same_seed_writes_the_same_bytes(
    made: Path, tmp_path: Path, policy_folder: Path, task_config: TaskConfig
):
    assert contents(make(tmp_path / "again", policy_folder, task_config)) == contents(made)


def test_another_seed_draws_other_prompts_and_answers(
    pairs: list[Pair], tmp_path: Path, policy_folder: Path, task_config: TaskConfig
):
    folder = make(tmp_path / "1", policy_folder, task_config, seed=1, pairs=200, held_out_pairs=20)
    other = read_pairs(folder / "train.jsonl")
    assert [p.prompt for p in other[:50]] != [p.prompt for p in pairs[:50]]
    answers = {tuple(p.chosen_ids) for p in pairs}
    assert np.mean([tuple(p.chosen_ids) in answers for p in other]) < 0.5


def test_a_policy_that_repeats_itself_is_the_users_error(
    tmp_path: Path, policy_folder: Path, task_config: TaskConfig
):
    """Greedy: both answers are the same, so no pair is left."""
    greedy = DRAWING.at(temperature=0.0)
    data = PreferenceConfig(pairs=20, held_out_pairs=4)
    with pytest.raises(InputError, match="'identical': 88") as error:
        make_preferences(tmp_path, task_config, policy_folder, data, greedy, 0)
    assert "0 of 24" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_was_dropped_is_written_and_adds_up(
    tmp_path: Path, policy_folder: Path, task_config: TaskConfig
):
    """One token a completion: many pairs are identical, and every one of them is counted."""
    data = PreferenceConfig(pairs=100, held_out_pairs=10)
    short = DRAWING.at(max_new_tokens=1, temperature=0.7)
    make_preferences(tmp_path, task_config, policy_folder, data, short, 0)
    found = read_json(tmp_path / "cleaning.json")
    assert found["kept"] == 110
    assert found["drawn"] == found["usable"] + sum(found["dropped"].values())
    assert found["usable"] >= found["kept"]
    assert set(found["dropped"]) == {"identical"}
    assert 0 < found["dropped"]["identical"] <= 64


def test_pairs_that_examine_reward_models_come_from_prompts_of_their_own(
    tmp_path: Path, policy_folder: Path, task_config: TaskConfig, pairs: list[Pair]
):
    make_reward_test(tmp_path, task_config, policy_folder, 300, DRAWING, 0)
    rows = read_pairs(tmp_path / "pairs.jsonl")
    assert len(rows) == 300
    assert {split_of(p.prompt) for p in rows} == {"reward-test"}
    assert {p.prompt for p in rows}.isdisjoint(p.prompt for p in pairs)
    gap = [p.chosen_gold - p.rejected_gold for p in rows]
    unequal = np.array([g > 0 for g in gap if g != 0])
    assert abs(unequal.mean() - 0.5) < 4 / (2 * np.sqrt(len(unequal)))  # not labelled


@pytest.mark.parametrize(
    "data",
    [
        {"pairs": 0},
        {"held_out_pairs": 0},
        {"labels": "majority"},
        {"pair": 3},
        {"spoiled": 1.5},
        {"spoiled": 0.3, "labels": "exact"},
    ],
)
def test_settings_that_make_no_sense_are_refused(data: dict[str, object]):
    with pytest.raises(ValueError, match=next(iter(data))):
        PreferenceConfig.model_validate(data)


# --- spoiled pairs ----------------------------------------------------------------------------


def test_a_share_of_the_chosen_answers_is_worse_and_nothing_else_changes(
    tmp_path: Path, policy_folder: Path, task_config: TaskConfig, tokenizer: PreTrainedTokenizerBase
):
    data = {"pairs": 200, "held_out_pairs": 20}
    clean_one = make(tmp_path / "clean", policy_folder, task_config, **data)
    folder = make(tmp_path / "spoiled", policy_folder, task_config, **data, spoiled=0.3)
    before, after = (read_pairs(f / "train.jsonl") for f in (clean_one, folder))
    spoiled, gold = set(read_spoiled(folder)), make_task(task_config).gold
    assert 50 <= len(spoiled) <= 60 and read_spoiled(clean_one) == []
    for old, new in zip(before, after, strict=True):
        if new.id not in spoiled:
            assert new == old
            continue
        assert new._replace(chosen_ids=old.chosen_ids, chosen_gold=old.chosen_gold) == old
        assert old.chosen_gold is not None and new.chosen_gold is not None
        assert new.chosen_gold < old.chosen_gold and new.chosen_ids != new.rejected_ids
        text = tokenizer.decode(new.chosen_ids, skip_special_tokens=True)
        assert gold([new.prompt], [str(text)]).tolist() == [new.chosen_gold]
    assert contents(clean_one)["held_out.jsonl"] == contents(folder)["held_out.jsonl"]
