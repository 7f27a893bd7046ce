"""Filtered DPO: the rule by itself, and small runs whose audit is checked against the work done."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from checks import weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo.filtered import Filter, FilterConfig, keep, random_keep, train_filtered
from dpo.train import DirectConfig, DirectData, train_direct
from shared.data.pairs import Pair, read_pairs
from shared.generation.engine import EngineLost, Sampling
from shared.generation.hf import HFEngine
from shared.generation.start import Drawing
from shared.models.cost import Meter
from shared.models.load import Start, load_policy, load_tokenizer, special_ids
from shared.models.scorer import Scorer
from shared.seeds import seed_of
from shared.stages import Stages, read_json, read_jsonl
from shared.training.finished import read_log
from shared.training.fit import OptimizerConfig

SAMPLING = Sampling(max_new_tokens=10)
FIRST = SAMPLING.model_copy(update={"seed": seed_of(0, "filter", 0)})  # the first epoch's
STEADY = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_share=0.0)
DIRECT = DirectConfig(optimizer=STEADY, epochs=1, batch_size=4, micro_batch_size=3)
scores = st.lists(
    st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=20
)  # few values: many ties


def columns(rows: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    chosen, sampled = torch.tensor(rows, dtype=torch.float32).T
    return chosen, sampled


# The rule


def test_a_pair_stays_if_its_chosen_answer_scores_above_the_sample_and_a_tie_goes():
    chosen, sampled = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.5, 1.0, 1.5])
    assert keep(chosen, sampled).tolist() == [True, False, False]


def test_the_margin_is_how_far_above():
    chosen, sampled = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, 0.0])
    assert keep(chosen, sampled, margin=2.0).tolist() == [False, False, True]
    assert keep(chosen, sampled, margin=-10.0).all()


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["chosen", "sampled"])
@pytest.mark.parametrize("floor", [0, 1, 3, 9])
def test_a_score_that_is_no_number_never_keeps_its_pair(broken: float, side: str, floor: int):
    """Whatever the floor asks for: `topk` would rank NaN first."""
    scores = {"chosen": torch.tensor([5.0, 1.0, 0.5, 0.2]), "sampled": torch.full((4,), 2.0)}
    scores[side][0] = broken
    stays = keep(**scores, floor=floor)
    assert not stays[0]
    assert int(stays.sum()) == min(floor, 3)


def test_below_the_floor_the_pairs_that_come_closest_stay():
    chosen, sampled = torch.zeros(5), torch.tensor([3.0, 1.0, 4.0, 2.0, 5.0])
    assert keep(chosen, sampled, floor=2).tolist() == [False, True, False, True, False]
    assert keep(chosen, sampled, floor=9).all()


@given(rows=scores, margin=st.integers(-2, 2), floor=st.integers(0, 25))
def test_the_rule_by_its_definition(rows, margin: int, floor: int):
    passed = [c - s > margin for c, s in rows]
    found = keep(*columns(rows), margin=float(margin), floor=floor).tolist()
    if sum(passed) >= min(floor, len(rows)):
        assert found == passed
        return
    assert sum(found) == min(floor, len(rows))
    gaps = [c - s for c, s in rows]
    stayed = [gap for gap, stays in zip(gaps, found, strict=True) if stays]
    gone = [gap for gap, stays in zip(gaps, found, strict=True) if not stays]
    assert not gone or min(stayed) >= max(gone)
    assert all(stays for stays, enough in zip(found, passed, strict=True) if enough)


@given(rows=scores, row=st.integers(0, 19), more=st.integers(1, 5))
def test_a_better_chosen_answer_or_a_worse_sample_never_drops_a_pair(rows, row: int, more: int):
    row %= len(rows)
    before = keep(*columns(rows))
    chosen, sampled = rows[row]
    for better in ((chosen + more, sampled), (chosen, sampled - more)):
        after = keep(*columns([*rows[:row], better, *rows[row + 1 :]]))
        assert after[row] >= before[row]


@given(rows=scores, margin=st.integers(0, 3))
def test_a_larger_margin_keeps_a_subset(rows, margin: int):
    loose, strict = (keep(*columns(rows), margin=float(m), floor=0) for m in (margin, margin + 1))
    assert (strict <= loose).all()


@given(stays=st.lists(st.booleans(), min_size=1, max_size=30), seed=st.integers(0, 5))
def test_the_blind_draw_keeps_as_many(stays: list[bool], seed: int):
    found = random_keep(torch.tensor(stays), seed)
    assert found.dtype == torch.bool
    assert len(found) == len(stays)
    assert int(found.sum()) == sum(stays)


def test_the_blind_draw_looks_at_no_pair():
    """Each pair stays equally often, whichever ones the filter would keep."""
    stays = torch.arange(8) < 3
    drawn = torch.stack([random_keep(stays, seed) for seed in range(4000)]).float().mean(0)
    error = math.sqrt(3 / 8 * 5 / 8 / 4000)
    assert (drawn - 3 / 8).abs().max() < 4 * error


# Whole runs


class Run(NamedTuple):
    """A finished stage."""

    folder: Path
    audit: list[dict]
    epochs: list[dict]
    log: list[dict]
    cost: dict

    def kept(self, epoch: int) -> list[str]:
        return [row["id"] for row in self.audit if row["epoch"] == epoch and row["kept"]]

    def judged(self, epoch: int) -> list[str]:
        return [row["id"] for row in self.audit if row["epoch"] == epoch]


@pytest.fixture(scope="module")
def pairs(preferences_folder: Path) -> dict[str, Pair]:
    return {p.id: p for p in read_pairs(preferences_folder / "train.jsonl")}


@pytest.fixture(scope="module")
def start(
    tmp_path_factory: pytest.TempPathFactory,
    policy_folder: Path,
    preferences_folder: Path,
    reference_folder: Path,
    reward_folder: Path,
):
    """A stage on the common folders; `seed` and the filter's own settings may differ."""

    def run(seed: int = 0, direct: DirectConfig = DIRECT, checkpoints=(), **filtering) -> Run:
        folder = tmp_path_factory.mktemp("filtered")
        train_filtered(
            folder,
            Start(policy_folder, seed=seed),
            DirectData(preferences_folder, reference_folder),
            Filter(
                reward_folder,
                FilterConfig(**{"epochs": 3, "floor": 0.1, **filtering}),
                Drawing(SAMPLING),
            ),
            {"beta": 0.1},
            direct,
            checkpoints,
        )
        audit, epochs = read_jsonl(folder / "audit.jsonl"), read_json(folder / "filtering.json")
        return Run(folder, audit, epochs, read_log(folder), read_json(folder / "cost.json"))

    return run


@pytest.fixture(scope="module")
def filtered(start) -> Run:
    return start(checkpoints=(0.5,))


def test_the_audit_holds_every_pair_once_with_the_reward_models_own_scores(
    filtered: Run, pairs: dict[str, Pair], policy_folder: Path, reward_folder: Path
):
    """Before any training the samples are the starting policy's."""
    first = [row for row in filtered.audit if row["epoch"] == 0]
    assert [row["id"] for row in first] == list(pairs)
    prompts, scorer = [p.prompt_ids for p in pairs.values()], Scorer(reward_folder)
    engine = HFEngine(load_policy(policy_folder), special_ids(load_tokenizer(policy_folder)))
    samples = engine.generate(prompts, FIRST).ids
    for name, completions in (
        ("chosen", [p.chosen_ids for p in pairs.values()]),
        ("sample", samples),
    ):
        expected = scorer.score_all(prompts, completions).tolist()
        assert [row[name] for row in first] == pytest.approx(expected, abs=1e-5)


def test_a_pair_is_kept_exactly_where_its_chosen_answer_beats_the_sample(filtered: Run):
    assert not any(epoch["floor_bound"] for epoch in filtered.epochs)
    for row in filtered.audit:
        assert row["kept"] == (row["chosen"] > row["sample"])


def test_a_dropped_pair_never_returns(filtered: Run, pairs: dict[str, Pair]):
    assert filtered.judged(0) == list(pairs)
    for epoch in (1, 2):
        assert filtered.judged(epoch) == filtered.kept(epoch - 1)
    left = [len(pairs), *(len(filtered.kept(epoch)) for epoch in range(3))]
    assert left[0] > left[1] > left[2] >= left[3] > 0


def test_the_kept_share_is_of_the_original_pairs(filtered: Run, pairs: dict[str, Pair]):
    for epoch, row in enumerate(filtered.epochs):
        assert row["epoch"] == epoch
        assert row["kept_share"] == len(filtered.kept(epoch)) / len(pairs)


def test_an_epoch_trains_on_what_its_own_filter_kept_and_on_nothing_else(
    filtered: Run, pairs: dict[str, Pair]
):
    """Steps and trained tokens add up to the kept pairs of each epoch, both sides."""
    kept = [[pairs[i] for i in filtered.kept(epoch)] for epoch in range(3)]
    assert len(filtered.log) == sum(math.ceil(len(epoch) / 4) for epoch in kept)
    tokens = [
        2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids)
        for epoch in kept
        for p in epoch
    ]
    assert filtered.cost["train_tokens"] == sum(tokens)


def test_it_holds_the_policy_and_the_reward_model(filtered: Run):
    assert filtered.cost["models_held"] == 2


def test_samples_of_later_epochs_come_from_the_trained_policy(
    filtered: Run, pairs: dict[str, Pair], policy_folder: Path, reward_folder: Path
):
    """The checkpoint of epoch 1 answers what is left, with that epoch's seed."""
    saved = json.loads((filtered.folder / "checkpoints.json").read_text())
    name = next(iter(saved))
    steps = math.ceil(len(filtered.kept(0)) / 4)
    assert name == f"checkpoint-{steps}"
    assert saved[name] == pytest.approx(1 / 3)
    prompts = [pairs[i].prompt_ids for i in filtered.judged(1)]
    scored = {}
    for source in (filtered.folder / name, policy_folder):
        engine = HFEngine(load_policy(source), special_ids(load_tokenizer(policy_folder)))
        samples = engine.generate(
            prompts, SAMPLING.model_copy(update={"seed": seed_of(0, "filter", 1)})
        ).ids
        scored[source] = Scorer(reward_folder).score_all(prompts, samples).tolist()
    found = [row["sample"] for row in filtered.audit if row["epoch"] == 1]
    assert found == pytest.approx(scored[filtered.folder / name], abs=1e-5)
    assert found != pytest.approx(scored[policy_folder], abs=1e-5)


def test_the_rejected_answer_does_not_matter_to_the_filter(
    filtered: Run,
    pairs: dict[str, Pair],
    tmp_path: Path,
    policy_folder: Path,
    reference_folder: Path,
    reward_folder: Path,
):
    rows = [p._replace(rejected_ids=[5, 6, 7])._asdict() for p in pairs.values()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    out.mkdir()
    data = DirectData(tmp_path, reference_folder)
    filtering = Filter(reward_folder, FilterConfig(epochs=1, floor=0.1), Drawing(SAMPLING))
    train_filtered(out, Start(policy_folder), data, filtering, {"beta": 0.1}, DIRECT, ())
    audit = read_jsonl(out / "audit.jsonl")
    assert audit == [row for row in filtered.audit if row["epoch"] == 0]


def test_with_nothing_to_drop_filtered_dpo_is_dpo(
    start,
    tmp_path: Path,
    policy_folder: Path,
    preferences_folder: Path,
    reference_folder: Path,
    reward_folder: Path,
    pairs: dict[str, Pair],
):
    """To the bit; it pays for its samples and for two passes of the reward model besides."""
    everything = start(epochs=1, margin=-1e9)
    data = DirectData(preferences_folder, reference_folder)
    train_direct(tmp_path, Start(policy_folder), data, "dpo", {"beta": 0.1}, DIRECT, ())
    assert read_log(tmp_path) == everything.log
    final, other = (load_policy(f / "final") for f in (tmp_path, everything.folder))
    assert torch.equal(weights(final), weights(other))
    prompts = [p.prompt_ids for p in pairs.values()]
    engine = HFEngine(load_policy(policy_folder), special_ids(load_tokenizer(policy_folder)))
    scorer, besides = Scorer(reward_folder), Meter()
    samples = engine.generate(prompts, FIRST).ids
    for completions in ([p.chosen_ids for p in pairs.values()], samples):
        scorer.score_all(prompts, completions)
    cost = read_json(tmp_path / "cost.json")
    assert everything.cost["flops"] == pytest.approx(cost["flops"] + besides.flops)
    assert everything.cost["generated_tokens"] == sum(map(len, samples))
    assert everything.cost["train_tokens"] == cost["train_tokens"]


def test_an_attempt_that_lost_its_engine_leaves_nothing_in_the_next_ones_log(
    filtered: Run,
    tmp_path: Path,
    policy_folder: Path,
    preferences_folder: Path,
    reference_folder: Path,
    reward_folder: Path,
):
    """It begins anew in the folder that was put aside, and ends as one that was not."""
    config = FilterConfig(epochs=3, floor=0.1)
    inputs = {
        "start": Start(policy_folder),
        "data": DirectData(preferences_folder, reference_folder),
        "filtering": Filter(reward_folder, config, Drawing(SAMPLING)),
        "setting": {"beta": 0.1},
        "direct": DIRECT,
        "checkpoints": (0.5,),
    }
    sync, calls = HFEngine.sync, []

    def lost_once(self: HFEngine) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise EngineLost("gone")
        return sync(self)

    stages = Stages(tmp_path, lambda *_: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFEngine, "sync", lost_once)
        with pytest.raises(EngineLost):
            stages.run("filtered", train_filtered, **inputs)
        found = stages.run("filtered", train_filtered, **inputs)
    assert len(calls) == 2 + 3
    assert read_log(found) == filtered.log
    for name in ("checkpoints.json", "filtering.json"):
        assert read_json(found / name) == read_json(filtered.folder / name)
    final, other = (load_policy(f / "final") for f in (found, filtered.folder))
    assert torch.equal(weights(final), weights(other))


def test_with_nothing_good_enough_the_floor_stays_and_says_so(start, pairs: dict[str, Pair]):
    nothing = start(epochs=2, margin=1e9, floor=0.25)
    count = round(0.25 * len(pairs))
    for epoch, row in enumerate(nothing.epochs):
        assert row == {
            "epoch": epoch,
            "kept_share": count / len(pairs),
            "floor_bound": True,
            "not_finite": 0,
        }
    first = [row for row in nothing.audit if row["epoch"] == 0]
    gaps = sorted((row["chosen"] - row["sample"] for row in first), reverse=True)
    kept = [row["chosen"] - row["sample"] for row in first if row["kept"]]
    assert sorted(kept, reverse=True) == gaps[:count]
    assert nothing.kept(1) == nothing.kept(0)


@pytest.mark.parametrize("floor", [0.01, 0.25])
def test_the_floor_keeps_the_set_from_emptying_however_small_it_is(start, floor: float):
    assert start(epochs=1, margin=1e9, floor=floor).kept(0)


def test_a_floor_below_one_pair_is_one_pair(start):
    assert len(start(epochs=1, margin=1e9, floor=0.01).kept(0)) == 1


def test_the_control_drops_as_many_pairs_but_others(start, filtered: Run):
    control = start(random=True, epochs=1)
    assert control.judged(0) == filtered.judged(0)
    assert len(control.kept(0)) == len(filtered.kept(0))
    assert set(control.kept(0)) != set(filtered.kept(0))
    columns = ("chosen", "sample")
    first = [row for row in filtered.audit if row["epoch"] == 0]
    assert [[row[c] for c in columns] for row in control.audit] == [
        [row[c] for c in columns] for row in first
    ]


def test_the_control_drops_as_many_each_epoch_as_the_filter_would(start, pairs: dict[str, Pair]):
    control = start(random=True)
    for epoch in range(3):
        passed = [r["chosen"] > r["sample"] for r in control.audit if r["epoch"] == epoch]
        assert len(control.kept(epoch)) == max(round(0.1 * len(pairs)), sum(passed))
        if epoch:
            assert control.judged(epoch) == control.kept(epoch - 1)


def test_equal_seeds_give_equal_runs(start, filtered: Run):
    again, other = start(), start(seed=1)
    assert again.audit == filtered.audit
    assert again.log == filtered.log
    assert other.audit != filtered.audit


def test_a_run_that_diverges_is_a_result_and_not_a_crash(start):
    wild = STEADY.model_copy(update={"learning_rate": 1e30})
    run = start(direct=DIRECT.model_copy(update={"optimizer": wild}))
    stopped = json.loads((run.folder / "stopped.json").read_text())
    assert "not finite" in stopped["failed"]
