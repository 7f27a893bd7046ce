"""Each optimisation on against off: the switches switch, and the report says what was found."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checks import TINY, close, kept_tokens
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor

from benchmarks.pipeline.arms import CommonStages
from benchmarks.pipeline.loading import load_experiment
from benchmarks.studies.onoff.report import (
    Job,
    JobStages,
    StudiedSeed,
    arms_of,
    compare_sides,
    end,
    loss_difference,
    markdown,
    verdict,
)
from benchmarks.studies.onoff.study import UnderVariant, jobs_of, onoff, run_seed
from benchmarks.studies.onoff.switches import (
    COMPARISONS,
    DEFAULT,
    VARIANTS,
    Probed,
    in_force,
    largest_differences,
    read_logprobs,
    switched,
)
from dpo.train import DirectConfig, DirectData
from rlhf.ppo import PPOConfig
from rlhf.reward import RewardConfig
from shared.config import InputError
from shared.data.batches import PairRows
from shared.data.pairs import read_pairs
from shared.generation import decoding, hf
from shared.generation.engine import Sampling
from shared.generation.hf import HFEngine
from shared.generation.start import Drawing
from shared.models import ops
from shared.models.load import Start, load_policy, load_tokenizer, special_ids
from shared.models.logprobs import token_logprobs
from shared.models.packing import packs
from shared.models.sequences import SCORING, Sequences, collate
from shared.stages import read_json, write_json, write_jsonl
from shared.tasks.registry import TaskConfig

EXPERIMENT = load_experiment("onoff", [], quick=False)
NAMED = {c.name: c for c in COMPARISONS}
DIRECT = DirectConfig(batch_size=11, micro_batch_size=11)
PPO = PPOConfig(episodes=32, rollout_size=32, minibatch_size=16, epochs=1)
DRAWN = Sampling(max_new_tokens=10)


@pytest.fixture
def batch(policy_folder: Path, preferences_folder: Path, reference_folder: Path) -> Sequences:
    pad_id = special_ids(load_tokenizer(policy_folder)).pad
    rows = PairRows(read_pairs(preferences_folder / "train.jsonl"), pad_id, SCORING)
    return collate(rows.prompts, rows.completions, pad_id)


# --- the switches -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_pack_but_where_rows_are_padded(variant: str, policy_folder: Path):
    with in_force(variant):
        found = load_policy(policy_folder)
    assert packs(found) == (variant not in ("padded", "all off"))
    if not packs(found):
        assert found.config._attn_implementation == "sdpa"
    assert packs(load_policy(policy_folder))


@pytest.mark.parametrize(
    ("variant", "written", "products"),
    [(DEFAULT, True, True), ("PyTorch's products", True, False), ("PyTorch", False, False)],
)
def test_gradients_are_autograds_where_that_is_switched(
    policy_folder: Path,
    batch: Sequences,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    written: bool,
    products: bool,
):
    if ops.computed_by() == "PyTorch":
        pytest.skip("no C compiler")
    monkeypatch.setattr("shared.cpu.kernels.products_are_faster", lambda: True)
    with in_force(variant):
        logps = token_logprobs(load_policy(policy_folder), batch)
    seen, waiting = set(), [logps.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(before for before, _ in node.next_functions)
    ours = {f"_{name}Backward" for name in ("Attend", "RMSNorm", "Rotate", "SwiGLU")}
    names = {node.name() for node in seen}
    assert ours & names == (ours if written else set())
    assert ("_ProductsBackward" in names) == products


@pytest.mark.parametrize(
    ("variant", "kind"), [(DEFAULT, "Decoding"), ("transformers' cache", "PaddedDecoding")]
)
def test_sampling_goes_through_the_librarys_cache_where_that_is_switched(
    monkeypatch: pytest.MonkeyPatch, policy_folder: Path, variant: str, kind: str
):
    started: list[str] = []
    for known in (decoding.Decoding, hf.PaddedDecoding):
        real = known.start

        def start(self: Any, name: str = known.__name__, real: Any = real) -> Any:
            started.append(name)
            return real(self)

        monkeypatch.setattr(known, "start", start)
    with in_force(variant):
        model = load_policy(policy_folder)
        ids = special_ids(load_tokenizer(policy_folder))
        hf.HFEngine(model, ids).generate([[5, 6, 7]], Sampling(max_new_tokens=2))
    assert started == [kind]


@pytest.mark.parametrize(("variant", "all_of_them"), [(DEFAULT, False), ("every token", True)])
def test_every_token_is_computed_where_that_is_switched(
    policy_folder: Path, batch: Sequences, variant: str, all_of_them: bool
):
    seen: list[int] = []
    with in_force(variant):
        model: Any = load_policy(policy_folder)
        for part in (model.model.embed_tokens, model.model.layers[-1].mlp.up_proj):
            part.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
        token_logprobs(model, batch)
    tokens = kept_tokens(batch, batch.last)[0]
    needed, predicting, _ = kept_tokens(batch, batch.predicting)
    assert seen == ([tokens, tokens] if all_of_them else [needed, predicting])
    assert predicting < needed < tokens


@pytest.mark.parametrize(("variant", "whole"), [(DEFAULT, True), ("blocks", False)])
def test_logits_come_in_blocks_where_that_is_switched(
    policy_folder: Path, batch: Sequences, variant: str, whole: bool
):
    with in_force(variant):
        model, rows = load_policy(policy_folder), []
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda _, __, logits: rows.append(len(logits)))
        token_logprobs(model, batch)
    assert sum(rows) == int(batch.mask.sum())
    assert (len(rows) == 1) == whole
    assert whole or max(rows) * model.config.vocab_size <= 2**12


def test_each_row_is_read_for_itself_where_that_is_switched(policy_folder: Path, batch: Sequences):
    special, tokens = special_ids(load_tokenizer(policy_folder)), []
    prompts, drawn = [[5, 6], [5, 6], [7], [5, 6]], []
    whole = int(batch.attention.sum()) - len(batch.ids)  # but each row's last
    distinct = kept_tokens(batch, batch.predicting)[0]
    assert distinct < whole
    for variant, *counts in (
        (DEFAULT, 3, distinct),
        ("each row", 7, whole),
        ("all off", 8, batch.ids.numel()),  # with padding where no model packs
    ):
        tokens.clear()
        with in_force(variant):
            model = load_policy(policy_folder)
            model.get_input_embeddings().register_forward_hook(
                lambda _, inputs, __: tokens.append(inputs[0].numel())
            )
            drawn.append(HFEngine(model, special).generate(prompts, DRAWN))
            token_logprobs(model, batch)
        assert [tokens[0], tokens[-1]] == counts
    assert drawn[0].ids == drawn[1].ids == drawn[2].ids
    assert all(type(token) is int for row in drawn[1].ids for token in row)


def test_keys_are_changed_and_fit_the_experiment():
    changed = {v: load_experiment("onoff", list(VARIANTS[v].keys), quick=False) for v in VARIANTS}
    assert [v for v, e in changed.items() if not e.ppo.reuse_logprobs] == ["no reuse", "all off"]
    sizes = ("direct", "ppo", "reward")
    as_it_comes = [getattr(changed[DEFAULT], s).micro_batch_size for s in sizes]
    halves = [getattr(changed["halves"], s).micro_batch_size for s in sizes]
    assert halves == [size // 2 for size in as_it_comes]
    minibatches = [EXPERIMENT.direct.batch_size, EXPERIMENT.ppo.minibatch_size]
    assert as_it_comes == [*minibatches, EXPERIMENT.reward.batch_size]  # else nothing is halved


@pytest.mark.parametrize("variant", VARIANTS)
def test_afterwards_everything_is_as_it_was(variant: str):
    before = ops.active(), torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), in_force(variant):
        assert torch.get_num_threads() == (2 if variant in ("two threads", "all off") else 1)
        raise ZeroDivisionError
    assert (ops.active(), torch.get_num_threads()) == before


# --- first steps ------------------------------------------------------------------------------


def train_first(
    folder: Path, variant: str, stage: str, folders: dict[str, Path], task: TaskConfig
) -> Path:
    """A stage at its smallest."""
    folder.mkdir()
    start: Any = {"start": Start(folders["policy"]), "checkpoints": ()}
    if stage == "reward":
        write_jsonl(folder.parent / "samples.jsonl", SAMPLES)
        start = {"policy": folders["policy"], "seed": 0}
        inputs: Any = {
            "preferences": folders["preferences"],
            "references": folder.parent,
            "reward": RewardConfig(epochs=1, batch_size=11, micro_batch_size=11),
        }
    elif stage == "ppo":
        inputs = {"reward_model": folders["reward"], "task": task, "ppo": PPO, "kl_coef": 0.1}
        inputs["drawing"] = Drawing(DRAWN)
    else:
        data = DirectData(folders["preferences"], folders["reference"], folders["reference"])
        inputs = {"data": data, "loss": "kto", "setting": {"beta": 0.5}, "direct": DIRECT}
    switched(folder, variant, stage, **start, **inputs)
    return folder


SAMPLES = [
    {"prompt": "a", "prompt_ids": [5, 6], "completions": [[7, 1], [8, 9, 1]], "gold": [0.0, 1.0]}
]


@pytest.mark.parametrize("stage", ["reward", "direct", "ppo"])
def test_padded_rows_have_nearly_the_losses_of_packed_ones_in_the_first_step(
    tmp_path: Path,
    policy_folder: Path,
    reward_folder: Path,
    preferences_folder: Path,
    reference_folder: Path,
    task_config: TaskConfig,
    stage: str,
):
    folders = {"policy": policy_folder, "reward": reward_folder}
    folders |= {"preferences": preferences_folder, "reference": reference_folder}
    on, off = (
        train_first(tmp_path / v.replace(" ", "-"), v, stage, folders, task_config)
        for v in (DEFAULT, "padded")
    )
    assert 0 < loss_difference(on, off) < 1e-4


def test_log_probabilities_of_padded_rows_are_close_and_not_the_same(
    tmp_path: Path, policy_folder: Path, preferences_folder: Path, reference_folder: Path
):
    folders = [tmp_path / name for name in ("on", "off", "no-reuse")]
    variants = DEFAULT, "padded", "no reuse"
    for folder, variant in zip(folders, variants, strict=True):
        folder.mkdir()
        ppo = PPO.model_copy(update={"reuse_logprobs": variant != "no reuse"})
        data = DirectData(preferences_folder, reference_folder)
        read_logprobs(
            folder, variant, Probed(policy_folder, ".", policy_folder, data), DIRECT, ppo, DRAWN
        )
    padded, no_reuse = (largest_differences(folders[0], other) for other in folders[1:])
    assert 0 < padded["pairs"] < 1e-4
    assert padded["samples"] < 1e-4
    assert padded["reference"] == padded["other_samples"] == 0
    assert 0 < no_reuse["samples"] < 1e-4
    assert no_reuse["pairs"] == no_reuse["reference"] == 0
    table = load_file(folders[0] / "probe.safetensors")
    sums = table["pairs"].sum(1)
    assert table["pairs"].shape[0] == 44
    close(sums, table["reference"], 1e-4)  # the policy is the reference
    assert sums.max() < -0.1


def probe_of(folder: Path, pairs: float, tokens: list[list[int]], samples: list[list[float]]):
    tables = {"pairs": torch.tensor([[pairs, -2.0]]), "reference": torch.tensor([-3.0])}
    folder.mkdir()
    drawn: dict[str, Tensor] = {"tokens": torch.tensor(tokens), "samples": torch.tensor(samples)}
    save_file({**tables, **drawn}, folder / "probe.safetensors")
    return folder


def test_samples_are_compared_where_their_tokens_are_the_same(tmp_path: Path):
    on = probe_of(tmp_path / "on", -1.5, [[4, 1], [5, 1]], [[-1.0, -2.0], [-3.0, -4.0]])
    off = probe_of(tmp_path / "off", -1.0, [[4, 1], [6, 1]], [[-1.25, -2.0], [-9.0, -4.0]])
    expected = {"pairs": 0.5, "reference": 0.0, "samples": 0.25, "other_samples": 0.5}
    assert largest_differences(on, off) == pytest.approx(expected)


# --- what is found ----------------------------------------------------------------------------


def rows_of(folder: Path, gold: list[list[float]], kl: list[list[float]]) -> Path:
    """One seed: (prompts, samples) each."""
    folder.mkdir(parents=True)
    rows = [{"gold": g, "kl": k} for g, k in zip(gold, kl, strict=True)]
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


def test_ends_are_compared_seed_by_seed(tmp_path: Path):
    """Two seeds, two prompts, two samples. Gold: 0.3 - 0.2 and 0.5 - 0.5; KL: 2 / 4 and 3 / 2."""
    on = [
        rows_of(tmp_path / "a", [[0.1, 0.3], [0.5, 0.3]], [[1, 1], [2, 4]]),
        rows_of(tmp_path / "b", [[0.5, 0.5], [0.5, 0.5]], [[3, 3], [3, 3]]),
    ]
    off = [
        rows_of(tmp_path / "c", [[0.1, 0.1], [0.3, 0.3]], [[4, 4], [4, 4]]),
        rows_of(tmp_path / "d", [[0.5, 0.5], [0.5, 0.5]], [[1, 1], [3, 3]]),
    ]
    found = end([on, off])
    assert found["gold"] == pytest.approx(0.4)
    assert found["gold_difference"]["mean"] == pytest.approx(0.05)
    assert found["gold_difference"]["per_seed"] == pytest.approx([0.1, 0])
    assert found["kl"] == pytest.approx(2.5)
    assert found["kl_share"]["per_seed"] == pytest.approx([-0.5, 0.5])
    low, high = stats.ttest_1samp([-0.5, 0.5], 0).confidence_interval(0.95)
    assert (found["kl_share"]["low"], found["kl_share"]["high"]) == pytest.approx((low, high))


def ended(gold: float, kl: float) -> dict[str, Any]:
    return {"gold_difference": {"mean": gold}, "kl_share": {"mean": kl}}


SAME = {"pairs": 0.0, "reference": 0.0, "samples": 0.0, "other_samples": 0.0}


@pytest.mark.parametrize(
    ("first", "probes", "ends", "expected"),
    [
        ({"dpo": 9e-5}, {**SAME, "pairs": 9e-5}, {"dpo": ended(0.029, 0.09)}, (True, True)),
        ({"dpo": 9e-5}, SAME, {"dpo": ended(-0.029, -0.09)}, (True, True)),
        ({"dpo": 0.0, "kto": 2e-4}, SAME, {"dpo": ended(0, 0)}, (False, True)),
        ({"dpo": 0.0}, {**SAME, "pairs": 2e-4}, {"dpo": ended(0, 0)}, (False, True)),
        ({"dpo": 0.0}, {**SAME, "reference": 2e-4}, {"dpo": ended(0, 0)}, (False, True)),
        ({"dpo": 0.0}, {**SAME, "samples": 2e-4}, {"dpo": ended(0, 0)}, (False, True)),
        ({"dpo": 0.0}, SAME, {"dpo": ended(0, 0), "ppo": ended(-0.04, 0)}, (True, False)),
        ({"dpo": 0.0}, SAME, {"dpo": ended(0, 0), "ppo": ended(0, -0.2)}, (True, False)),
    ],
)
def test_what_counts_as_the_same(
    first: dict[str, float], probes: dict, ends: dict, expected: tuple[bool, bool]
):
    assert tuple(verdict(first, probes, ends).values()) == expected


def made_up(folder: Path, number: int, arm: str, gold: float, loss: float) -> JobStages:
    losses = folder / f"{arm}-{number}-{gold}"
    done = JobStages(losses, losses)
    if arm == "reward":
        losses.mkdir(parents=True)
        scores = {"score_a": [1.0, gold], "score_b": [0.0, 0.0], "p_a_wins": [0.75, 0.75]}
        write_json(losses / "scores.json", scores)
    else:
        rows_of(losses, [[gold, gold]] * 2, [[2.0, 2.0]] * 2)
    write_jsonl(losses / "log.jsonl", [{"loss": 0.5 + loss}])
    return done


def study(folder: Path, gold_off: float, loss_off: float, name: str = "packed passes") -> dict:
    """One comparison of DPO and the reward model over two seeds, from made-up stages."""
    comparison = NAMED[name]._replace(kinds=("direct", "reward"))
    experiment = EXPERIMENT.model_copy(
        update={"arms": {"dpo": EXPERIMENT.arms["dpo"]}, "seeds": (3, 4)}
    )
    seeds = []
    for n in experiment.seeds:
        done = {
            Job(side, arm): made_up(folder, n, arm, gold, loss)
            for arm in ("dpo", "reward")
            for side, gold, loss in (
                (comparison.on, 0.5, 0.0),
                (comparison.off, gold_off, loss_off if n == 4 else 0.0),
            )
        }
        on = probe_of(folder / f"on{n}", -1.0, [[4]], [[-1.0]])
        off = probe_of(folder / f"off{n}", -1.0 - 2**-20, [[4]], [[-1.0]])
        sft = rows_of(folder / f"sft{n}", [[0.125]] * 2, [[0.0]] * 2)
        seeds.append(StudiedSeed(sft, done, {comparison.on: [on, on], comparison.off: [on, off]}))
    return compare_sides(experiment, [comparison], seeds)


def test_the_tables_say_what_was_found(tmp_path: Path):
    found = {
        "command": "klash study onoff",
        **study(tmp_path, -0.25, 2**-17),
    }
    assert not found["holds"]
    (row,) = found["comparisons"]
    assert row["starts_alike"]
    assert not row["ends_alike"]
    assert row["first_loss"] == {"dpo": 2**-17, "reward": 2**-17}
    assert row["logprobs"]["pairs"] == pytest.approx(2**-20)
    assert row["reward"]["per_seed"] == [0.25, 0.25]  # one of two pairs: 0.75 - 0.25
    text = markdown(found)
    assert "`klash study onoff`, 2 seeds." in text
    assert "SFT's gold is 0.125" in text
    lines = [line for line in text.splitlines() if line.startswith("| packed passes")]
    assert lines == [
        "| packed passes | padded rows, transformers' own pass "
        "| 8e-06 | 8e-06 | 1e-06 | 0e+00 | 0e+00 | yes |",
        "| packed passes | dpo | 0.500 | +0.750 [+0.750, +0.750] | 2.00 "
        "| +0.0% [+0.0%, +0.0%] | NO |",
        "| packed passes | +0.2500 [+0.2500, +0.2500] |",
    ]
    assert text.endswith("All optimisations within the limits: NO.\n")


def test_the_yardstick_is_shown_and_not_judged(tmp_path: Path):
    found = study(tmp_path, -0.25, 0.0, "order of sums")
    assert not found["comparisons"][0]["ends_alike"]
    assert found["holds"]
    assert "| order of sums \\* | dpo |" in markdown({"command": "", **found})


def test_a_first_step_that_differs_is_enough_to_fail(tmp_path: Path):
    found = study(tmp_path, 0.51, 2e-4)
    assert [found["comparisons"][0][k] for k in ("starts_alike", "ends_alike")] == [False, True]
    assert not found["holds"]


# --- the study --------------------------------------------------------------------------------


def test_every_training_is_needed_and_runs_once():
    jobs = jobs_of(EXPERIMENT, COMPARISONS)
    assert len(set(jobs)) == len(jobs)
    assert jobs[:4] == [Job(DEFAULT, arm) for arm in ("dpo", "kto", "ppo", "reward")]
    assert {job.variant for job in jobs} == set(VARIANTS)
    assert [j.arm for j in jobs if j.variant == "no reuse"] == ["ppo"]
    assert arms_of(EXPERIMENT, NAMED["all together"]) == ["dpo", "kto", "ppo", "reward"]


class Nowhere:
    """A runner whose stages are not done."""

    def each(self, function: Any, items: Any) -> list[Any]:
        return [function(item) for item in items]


def test_pairs_are_shared_but_where_sampling_is_switched():
    ran: list[tuple[Any, ...]] = []

    class Recorder(Nowhere):
        def run(self, name: str, work: Any, *, label: str = "", **inputs: Any) -> Path:
            ran.append((name, inputs.get("variant")))
            assert label == f", {variant}"
            return Path(name)

    for variant in (DEFAULT, "padded", "each row"):
        for name in ("sft", "preferences", "ppo"):
            UnderVariant(variant, Recorder()).run(name, print)
    assert ran == [
        ("sft", None), ("preferences", None), ("ppo", DEFAULT),
        ("sft", None), ("preferences", None), ("ppo", "padded"),
        ("sft", None), ("preferences", "each row"), ("ppo", "each row"),
    ]  # fmt: skip


def test_everything_that_is_compared_starts_from_the_same_models():
    """Pairs are an arm's own where sampling is switched; PPO's reward model is one for all."""
    trained: dict[tuple[str, str], dict[str, Any]] = {}

    class Recorder(Nowhere):
        def run(self, name: str, work: Any, *, label: str = "", **inputs: Any) -> Path:
            variant = str(inputs.get("variant", ""))
            if name in ("ppo", "direct"):
                trained[name, variant] = inputs
            return Path(f"{name} {variant}")

    variants = DEFAULT, "padded", "all off"
    folders = map(Path, ("sft", "scale", "frontier", "test"))
    common = CommonStages(TaskConfig(), *folders, judge_scores=None)
    jobs = [Job(v, arm) for v in variants for arm in ("dpo", "ppo", "reward")]
    seed = run_seed(dict.fromkeys(variants, EXPERIMENT), jobs, common, Recorder(), 0)
    ppo, direct = ([trained[kind, v] for v in variants] for kind in ("ppo", "direct"))
    assert {inputs["start"].policy for inputs in ppo + direct} == {Path("sft")}
    assert {inputs["reward_model"] for inputs in ppo} == {Path(f"reward {DEFAULT}")}
    pairs = [inputs["data"].preferences for inputs in direct]
    assert pairs == [Path("preferences "), Path("preferences "), Path("preferences all off")]
    rewards = [seed.done[Job(v, "reward")].trained for v in variants]
    assert rewards == [Path(f"reward {v}") for v in variants]


def test_an_unknown_optimisation_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="no optimisation 'packing'"):
        onoff(only=("packing",), out=tmp_path)


def test_the_whole_study_at_its_smallest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arms = """
[arms.dpo]
kind = "direct"
settings = [{ beta = 0.2 }]
"""
    file = tmp_path / "tiny.toml"
    file.write_text(TINY + arms)
    keys = ("--seeds", "[0]")
    onoff(str(file), ("packed passes",), tmp_path / "runs", tmp_path / "out", keys)
    said = capsys.readouterr().out
    (row,) = read_json(tmp_path / "out" / "onoff.json")["comparisons"]
    assert row["first_loss"].keys() == {"dpo", "reward"}
    assert 0 < row["logprobs"]["pairs"] < 1e-4
    assert row["starts_alike"]
    assert (tmp_path / "out" / "onoff.md").read_text() in said
    lines = [line for line in said.splitlines() if line.startswith("[")]
    assert lines[-1].startswith(f"[{len(lines)}/{len(lines)}]")
    folders = list((tmp_path / "runs" / ".stages").glob("direct-*"))
    assert len(folders) == 2
