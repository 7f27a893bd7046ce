"""`klash speed experiment`: both sides train the same, step for step, and what is told of it."""

import math
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from checks import TINY, close, weights
from transformers import AutoModelForCausalLM

from benchmarks.pipeline.arms import Pipeline
from benchmarks.pipeline.experiment import Arm, Experiment
from benchmarks.pipeline.loading import load_experiment
from benchmarks.speed import experiment as speed
from benchmarks.speed.experiment import (
    ExperimentSpeed,
    best_settings,
    check_steps,
    comparable,
    compare_trainings,
    experiment_table,
    prepare_inputs,
    run_both_sides,
)
from benchmarks.speed.sides import Choice
from benchmarks.speed.trainings import KlashSide, PolicyTraining, Tally, TrlSide, finished_training
from benchmarks.speed.trl.ppo import TRL, install_trl
from benchmarks.speed.trl.trainings import (
    FinishedTraining,
    in_score_units,
    make_data,
    trl_setting,
    trl_train_direct,
    trl_train_reward,
)
from dpo.train import DirectConfig, DirectData
from dpo.train import train_direct as our_train_direct
from rlhf.reward import RewardConfig
from rlhf.reward import train_reward as our_train_reward
from shared.data.pairs import Pair, read_pairs
from shared.data.samples import sample_reference
from shared.generation.engine import Sampling
from shared.generation.start import Drawing
from shared.models.load import Start
from shared.models.scorer import Scorer
from shared.models.sequences import collate
from shared.stages import Stages, read_json, silent
from shared.tasks.registry import TaskConfig
from shared.training.fit import OptimizerConfig

OPTIMIZER = OptimizerConfig(learning_rate=2e-3, warmup_share=0.25, adam_beta2=0.95)
DIRECT = DirectConfig(optimizer=OPTIMIZER, epochs=6, batch_size=22, micro_batch_size=22)
PPO = '[arms.ppo]\nkind = "ppo"\nsettings = [{ kl_coef = 0.1 }]\n'
DPO = '[arms.dpo]\nkind = "direct"\nsettings = [{ beta = 0.2 }, { beta = 0.5 }]\n'
KTO = '[arms.kto]\nkind = "direct"\nloss = "kto"\nsettings = [{ beta = 0.2 }]\n'


def tiny(folder: Path, arms: str, *overrides: str) -> Experiment:
    """TINY with `arms`; batches of 24, which leave a partial one."""
    (folder / "tiny.toml").write_text(TINY + arms, encoding="utf-8")
    words = ["--direct.batch_size", "24", "--reward.batch_size", "24", *overrides]
    return comparable(load_experiment(str(folder / "tiny.toml"), words, quick=False))


@pytest.fixture(autouse=True)
def no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, preferences_folder: Path) -> Path:
    """22 pairs as TRL's trainers read them."""
    folder = tmp_path_factory.mktemp("data")
    make_data(folder, preferences_folder, seed=0)
    return folder


# --- the trainings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "setting"),
    [
        ("dpo", {"beta": 0.5}),
        ("ipo-token", {"tau": 0.5}),
        ("kto", {"beta": 0.5, "learning_rate": 1e-3}),
    ],
)
def test_trls_trainer_ends_at_our_policy_where_a_batch_holds_all_pairs(
    loss: str,
    setting: dict[str, float],
    policy_folder: Path,
    preferences_folder: Path,
    reference_folder: Path,
    data: Path,
    tmp_path: Path,
):
    """There the order of pairs does not matter: loss, rate, schedule and epochs do."""
    mismatched = reference_folder if loss == "kto" else None
    pairs = DirectData(preferences_folder, reference_folder, mismatched)
    (tmp_path / "ours").mkdir()
    our_train_direct(tmp_path / "ours", Start(policy_folder), pairs, loss, setting, DIRECT, ())
    ours = finished_training(tmp_path / "ours")
    given = trl_setting(loss, setting, read_pairs(preferences_folder / "train.jsonl"))
    theirs = trl_train_direct(tmp_path / "trl", policy_folder, data, loss, given, DIRECT, seed=0)
    assert ours.steps == theirs.steps == 6
    start, end, peer = (
        weights(AutoModelForCausalLM.from_pretrained(path))
        for path in (policy_folder, tmp_path / "ours" / "final", theirs.folder / "final")
    )
    moved = (end - start).norm()
    assert moved > 0.05
    assert (end - peer).norm() / moved < 1e-3
    assert theirs.seconds > 0


def test_trls_reward_model_scores_as_ours_where_a_batch_holds_all_pairs(
    policy_folder: Path,
    preferences_folder: Path,
    task_config: TaskConfig,
    data: Path,
    tmp_path: Path,
):
    for name in ("references", "ours"):
        (tmp_path / name).mkdir()
    references, reward = tmp_path / "references", RewardConfig(optimizer=OPTIMIZER, epochs=4)
    drawing = Drawing(Sampling(max_new_tokens=10))
    sample_reference(references, task_config, policy_folder, "validation", 4, 4, drawing, 0)
    our_train_reward(
        tmp_path / "ours", policy_folder, preferences_folder, references, reward, seed=0
    )
    trained = trl_train_reward(tmp_path / "trl", policy_folder, data, references, reward, seed=0)
    assert finished_training(tmp_path / "ours").steps == trained.steps == 4
    pairs = read_pairs(preferences_folder / "train.jsonl")
    rows = [p.prompt_ids for p in pairs], [p.chosen_ids for p in pairs]
    folders = tmp_path / "ours", trained.folder
    ours, theirs = (Scorer(folder).score_all(*rows) for folder in folders)
    assert ours.std() > 0.2
    close(theirs, ours, 1e-4)


def test_trl_scores_the_reference_once_for_all_settings_of_pair_losses(
    policy_folder: Path, preferences_folder: Path, tmp_path: Path
):
    make_data(tmp_path, preferences_folder, seed=0)
    direct = DIRECT.model_copy(update={"epochs": 1})
    for number, loss in enumerate(("dpo", "ipo", "dpo")):
        given = policy_folder, tmp_path, loss, {"beta": 0.1 * (number + 1)}, direct, number
        trl_train_direct(tmp_path / str(number), *given)
    assert len([*(tmp_path / "pairs").glob("cache-*.arrow")]) == 1


def test_ktos_rows_are_shuffled_and_hold_both_sides_of_every_pair(
    data: Path, preferences_folder: Path
):
    from datasets import Dataset

    pairs, rows = (
        read_pairs(preferences_folder / "train.jsonl"),
        Dataset.load_from_disk(data / "kto"),
    )
    found = [(r["prompt_ids"], r["completion_ids"], r["label"]) for r in rows]
    wanted = [
        (p.prompt_ids, ids, label)
        for p in pairs
        for ids, label in ((p.chosen_ids, True), (p.rejected_ids, False))
    ]
    assert sorted(found) == sorted(wanted)
    assert found != wanted


def pair(*lengths: int) -> Pair:
    chosen, rejected = ([7] * length for length in lengths)
    return Pair("0", "", [5], chosen, rejected, 0.0, 0.0)


def test_summed_ipo_is_trained_per_token_with_a_tau_for_a_like_margin():
    """1 / (2 tau) nats summed are 1 / (2 tau n) a token."""
    pairs = [pair(2, 6), pair(4, 8)]
    assert trl_setting("ipo", {"tau": 0.25}, pairs) == {"beta": 1.25}
    assert trl_setting("ipo-token", {"tau": 0.5, "learning_rate": 1e-3}, pairs) == {
        "beta": 0.5,
        "learning_rate": 1e-3,
    }
    assert trl_setting("dpo", {"beta": 0.3}, pairs) == {"beta": 0.3}


def test_ppo_with_trl_reads_scores_in_our_units(reward_folder: Path, preferences_folder: Path):
    pairs = read_pairs(preferences_folder / "train.jsonl")[:6]
    rows = [p.prompt_ids for p in pairs], [p.chosen_ids for p in pairs]
    model, scorer = in_score_units(reward_folder), Scorer(reward_folder)
    ours = scorer.score_all(*rows)
    for prompt, completion, score in zip(*rows, ours, strict=True):
        batch = collate([prompt], [completion], scorer.pad_id)
        hidden = model.model(input_ids=batch.ids).last_hidden_state
        close(model.score(hidden)[0, -1, 0], score, 1e-5)


# --- the comparison ---------------------------------------------------------------------------


def test_arms_that_trl_has_no_trainer_for_are_left_out():
    reviews = load_experiment("reviews", [], quick=False)
    found = comparable(reviews)
    assert list(found.arms) == ["ppo", "dpo", "ipo", "ipo-token", "kto"]
    assert found.arms["dpo"] == reviews.arms["dpo"]
    assert not speed.trl_trains(Arm(kind="ppo", gold=True, settings=({"kl_coef": 0.1},)))
    cdpo = {"beta": 0.1, "label_smoothing": 0.1}
    assert not speed.trl_trains(Arm(kind="direct", loss="cdpo", settings=(cdpo,)))


def test_both_sides_train_all_the_way_and_save_the_end_only():
    found = comparable(load_experiment("reviews", [], quick=True))
    assert found.evaluation.checkpoints == ()
    assert min(found.ppo.max_approx_kl, found.ppo.max_kl) > 1e6
    assert found.preferences.pairs == 1500


class Here(Executor):
    """This process in the place of one that has imported TRL."""

    def submit(self, function, /, *inputs, **named) -> Future:
        done = Future()
        done.set_result(function(*inputs, **named))
        return done


def test_the_optimiser_steps_of_both_sides_are_those_counted_by_hand(tmp_path: Path):
    """64 pairs in batches of 24 are 3 steps an epoch: reward models 1 epoch, the others 2."""
    experiment, stages = tiny(tmp_path, DPO + KTO), Stages(tmp_path / "stages", silent)
    pipeline = Pipeline(experiment, stages)
    common, preferences = prepare_inputs(pipeline)
    sides = {
        "klash": KlashSide(pipeline, common),
        "trl": TrlSide(experiment, common, preferences, tmp_path / "trl", Here(), Here()),
    }
    found = run_both_sides(pipeline, common, sides)
    rewards, dpo, kto = 2, 2 + 1, 2  # of two seeds; DPO's two settings on the first one
    for side in sides.values():
        assert side.tally.trainings == rewards + dpo + kto
        assert side.tally.steps == 3 * rewards + 6 * dpo + 6 * kto == 36
    assert (found.trainings, found.steps) == (7, 36)
    assert found.ratio > 0
    for side in ("klash", "trl"):
        assert sum(found.shares[side].values()) == pytest.approx(1)
        assert found.shares[side]["ppo"] == 0 < found.shares[side]["reward"]
        assert found.settings[side]["dpo"]["beta"] in (0.2, 0.5)
        assert {arm: len(gold) for arm, gold in found.gold[side].items()} == {"dpo": 2, "kto": 2}
        assert all(-1 <= value <= 1 for gold in found.gold[side].values() for value in gold)


@dataclass
class Told:
    """A side that has done its work before: `steps` a training, seconds as they are told."""

    tally: Tally
    steps: int
    asked: list[PolicyTraining] = field(default_factory=list)

    def prepare(self) -> list[FinishedTraining]:
        self.tally.steps += 2 * self.steps
        return [FinishedTraining(Path(), self.steps, 1.0)] * 2

    def train(self, trainings: list[PolicyTraining]) -> list[FinishedTraining]:
        self.asked += trainings
        self.tally.policies += [(training, Path()) for training in trainings]
        return [FinishedTraining(Path(), self.steps, 1.0) for _ in trainings]


def told(experiment: Experiment, ours: int, theirs: int, monkeypatch: pytest.MonkeyPatch):
    """What is said of sides that took 2 and 6 seconds; on TRL's, the higher beta is better."""

    def mean_golds(_pipeline, _common, name, policies, _split) -> list[float]:
        sign = 1 if name.startswith("trl") else -1
        return [sign * training.setting["beta"] + training.seed for training, _ in policies]

    monkeypatch.setattr(speed, "mean_golds", mean_golds)
    phases = {"reward": 1.0, "direct": 2.0, "ppo": 1.0}
    sides = {
        "klash": Told(Tally(seconds=2.0, phases=dict(phases)), ours),
        "trl": Told(Tally(seconds=6.0, phases=dict(phases)), theirs),
    }
    pipeline = Pipeline(experiment, Stages(Path("none"), silent))
    return run_both_sides(pipeline, None, sides), sides  # pyright: ignore[reportArgumentType]


def test_each_side_goes_on_with_its_own_best_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    experiment = tiny(tmp_path, DPO + KTO)
    found, sides = told(experiment, 3, 3, monkeypatch)
    low, high, kto = {"beta": 0.2}, {"beta": 0.5}, {"beta": 0.2}
    first = [PolicyTraining("dpo", low, 0), PolicyTraining("dpo", high, 0)]
    rest = [PolicyTraining("kto", kto, 0), PolicyTraining("kto", kto, 1)]
    assert sides["klash"].asked == [*first, PolicyTraining("dpo", low, 1), *rest]
    assert sides["trl"].asked == [*first, PolicyTraining("dpo", high, 1), *rest]
    assert found.settings["trl"] == {"dpo": high, "kto": kto}
    assert found.gold["klash"] == {"dpo": [-0.2, 0.8], "kto": [-0.2, 0.8]}
    assert found.gold["trl"] == {"dpo": [0.5, 1.5], "kto": [0.2, 1.2]}


def test_the_ratio_is_the_peers_seconds_over_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found, _ = told(tiny(tmp_path, DPO), 3, 3, monkeypatch)
    assert found.ratio == 3.0
    assert found.shares["trl"] == {"reward": 0.25, "direct": 0.5, "ppo": 0.25}
    text = experiment_table(found)
    assert "Klash ends 3.00 times as fast as TRL's trainers (trl 1." in text
    assert "| share of direct methods, references too | 50% | 50% |\n" in text
    assert "| gold of dpo | 0.300 (beta=0.2) | 1.000 (beta=0.5) |\n" in text


def test_a_finished_comparison_lies_in_two_files_and_leaves_no_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found, _ = told(tiny(tmp_path, DPO), 3, 3, monkeypatch)
    monkeypatch.setattr(speed, "compare_trainings", lambda *_: found)
    (tmp_path / "speed" / f"trl-{TRL}").mkdir(parents=True)  # installed before
    text = speed.speed_experiment(Choice(tmp_path, 1, quick=True))
    assert text == experiment_table(found) == (tmp_path / "speed" / "experiment.md").read_text()
    assert (
        ExperimentSpeed.model_validate(read_json(tmp_path / "speed" / "experiment.json")) == found
    )
    names = {path.name for path in (tmp_path / "speed").iterdir()}
    assert names == {f"trl-{TRL}", "experiment.json", "experiment.md"}


def test_different_numbers_of_optimiser_steps_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(RuntimeError, match=r"reward model, seed 0: 3 optimiser steps, .* took 4"):
        told(tiny(tmp_path, DPO), 3, 4, monkeypatch)
    ours, theirs = (
        [FinishedTraining(Path(), steps, 1.0) for steps in row] for row in ((5, 6), (5, 7))
    )
    trainings = [PolicyTraining("dpo", {"beta": beta}, 1) for beta in (0.2, 0.5)]
    with pytest.raises(RuntimeError, match=r"dpo beta=0.5, seed 1: 6 optimiser steps, .* took 7"):
        check_steps(trainings, ours, theirs)
    check_steps(trainings, ours, ours)


def test_a_setting_is_chosen_by_its_mean_over_the_first_seeds(tmp_path: Path):
    experiment = tiny(tmp_path, DPO)
    low, high = experiment.arms["dpo"].settings
    tried = [PolicyTraining("dpo", setting, seed) for setting in (low, high) for seed in (0, 1)]
    assert best_settings(experiment, tried, [0.0, 0.9, 0.4, 0.4]) == {"dpo": low}
    assert best_settings(experiment, tried, [0.0, 0.7, 0.4, 0.4]) == {"dpo": high}
    assert best_settings(experiment, [], []) == {"dpo": low}


# With TRL 1.12.0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_sides_end_to_end_with_ppo(tmp_path: Path):
    """64 episodes are 2 updates, of 2 epochs and 2 minibatches each."""
    library = install_trl(tmp_path / "trl")
    found = compare_trainings(tiny(tmp_path, PPO), library, tmp_path)
    assert (found.trainings, found.steps) == (4, 2 * 3 + 2 * 8)
    assert found.shares["trl"]["ppo"] > 0 == found.shares["trl"]["direct"]
    assert all(math.isfinite(value) for side in found.gold.values() for value in side["ppo"])
    policy, tries = tmp_path / "trl" / "trl-ppo kl_coef=0.1, seed 1" / "final", tmp_path / "stages"
    (start,) = tries.glob("sft-*")
    start, end = (weights(AutoModelForCausalLM.from_pretrained(f)) for f in (start, policy))
    assert (end - start).norm() > 0.01
    assert torch.isfinite(end).all()
    assert read_json(next(tries.glob("ppo-*")) / "stopped.json")["failed"] == ""
