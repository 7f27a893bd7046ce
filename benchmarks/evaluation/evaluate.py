"""Held-out generations -> one row per prompt: the one meter that every method is read with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.evaluation.exact import World
from benchmarks.evaluation.optimum import best_of_n_logps
from benchmarks.evaluation.text import distinct, repetition
from dpo.reference import read_reference
from rlhf.best_of_n import best_of_n
from shared.data.batches import HELD_OUT, PairRows, read_rows
from shared.data.samples import null_for_nan, read_samples
from shared.data.splits import Split
from shared.generation.engine import Completions
from shared.generation.start import Drawing, make_engine
from shared.kl import exact_kl, k1, k3, masked_sum
from shared.models import ops, ranks
from shared.models.cost import Meter
from shared.models.load import load_policy, load_tokenizer, special_ids
from shared.models.logprobs import completion_logits, gather_logprobs, score_logps
from shared.models.scorer import Scorer, scorer_of
from shared.models.sequences import SCORING, Limit, by_length, collate
from shared.stages import write_json, write_jsonl
from shared.tasks.own import Own
from shared.tasks.registry import TaskInput, make_task
from shared.tasks.task import Task


@dataclass(frozen=True)
class Prompts:
    """The first `count` prompts of a split, each answered `samples` times; `seed` is the task's.

    `listing` is the stage that lists all completions of these prompts, if the task is finite.
    """

    task: TaskInput
    split: Split
    count: int
    samples: int
    seed: int
    listing: Path | None = None

    def texts(self) -> list[str]:
        """The prompts, each once."""
        return make_task(self.task).prompts(self.split, self.count, self.seed)


@dataclass(frozen=True)
class HeldOut:
    """`held_out.jsonl` of `preferences`, and the stage with the reference's log-probabilities."""

    preferences: Path
    reference: Path


def evaluate(
    folder: Path,
    policy: Path,
    checkpoint: str,
    ref: Path,
    reward_model: Path | None,
    held_out: HeldOut | None,
    prompts: Prompts,
    drawing: Drawing,
) -> None:
    """Stage: `rows.jsonl`, and `displacement.json` where there are `held_out` preferences.

    Completions are sampled at temperature 1; a greedy one lies beside them. Where all completions
    are listed, each row holds the expectations over them too, as `exact`.
    """
    tokenizer, source = load_tokenizer(ref), make_task(prompts.task)
    model, ref_model = load_policy(policy / checkpoint).eval(), load_policy(ref).eval()
    special = special_ids(tokenizer, policy / checkpoint)
    engine = make_engine(drawing.generation, model, special, policy / checkpoint)
    texts, samples = prompts.texts(), prompts.samples
    ids = source.encode(tokenizer, texts)
    many = [p for p in ids for _ in range(samples)]
    judge = None
    if reward_model is not None:
        judge = Scorer(reward_model, reader=tokenizer, ends=special.ends)
    drawn = engine.generate(many, drawing.at(temperature=1.0).sampling)
    columns = describe(source, tokenizer, judge, texts, ids, drawn, samples)
    columns.update(measure_kl(model, ref_model, many, drawn.ids, special.pad))
    greedy = engine.generate(ids, drawing.at(temperature=0.0).sampling)
    greedy_texts = tokenizer.batch_decode(greedy.ids, skip_special_tokens=True)
    rows = _rows(texts, columns, samples)
    add_sets(rows, drawn.ids, samples)
    add_chosen(rows, source)
    greedy_gold = null_for_nan(source.gold(texts, greedy_texts))
    for row, text, gold in zip(rows, greedy_texts, greedy_gold, strict=True):
        row.update(greedy=text, greedy_gold=gold)
    if prompts.listing is not None:
        world = World(prompts.listing)
        logps = world.logps(policy / checkpoint, drawing.sampling)
        scores = world.scores(reward_model) if reward_model else None
        add_exact(rows, world.expectations(logps, scores, special.eos))
    write_jsonl(folder / "rows.jsonl", rows)
    if held_out is not None:
        write_json(folder / "displacement.json", _displacement(model, held_out, special.pad))


def evaluate_best_of_n(
    folder: Path, ref: Path, reward_model: Path, n: int, prompts: Prompts, drawing: Drawing
) -> None:
    """Stage: `rows.jsonl` of the reward model's favourites among `n` reference samples. No KL,
    unless all completions are listed: then it is exact, ties included.

    Its cost is that of answering the test prompts: this arm pays when it is used."""
    tokenizer, source, meter = load_tokenizer(ref), make_task(prompts.task), Meter()
    model, special = load_policy(ref).eval(), special_ids(tokenizer, ref)
    scorer = Scorer(reward_model, reader=tokenizer, ends=special.ends)
    engine = make_engine(drawing.generation, model, special, ref)
    meter.models_held = 2
    texts, samples = prompts.texts(), prompts.samples
    ids = source.encode(tokenizer, texts)
    many = [p for p in ids for _ in range(samples)]
    with meter.phase("generate and score"):
        sampling = drawing.at(temperature=1.0).sampling
        favourites = best_of_n(engine, scorer, many, n, sampling)
    write_json(folder / "cost.json", meter.summary())
    columns = describe(source, tokenizer, scorer, texts, ids, favourites, samples)
    rows = _rows(texts, columns, samples)
    add_sets(rows, favourites.ids, samples)
    add_chosen(rows, source)
    if prompts.listing is not None:
        world = World(prompts.listing)
        scores = world.scores(reward_model)
        logps = best_of_n_logps(world.log_ref, scores, n)
        add_exact(rows, world.expectations(logps, scores, special.eos))
    write_jsonl(folder / "rows.jsonl", rows)


def add_sets(rows: list[dict[str, Any]], drawn: list[list[int]], samples: int) -> None:
    """Add how different a prompt's answers are from each other."""
    for i, row in enumerate(rows):
        row["distinct_2"] = distinct(drawn[i * samples : (i + 1) * samples])


def add_chosen(rows: list[dict[str, Any]], source: Task) -> None:
    """Add the gold of the file's own chosen answers, where there are a file and a judge."""
    if not isinstance(source, Own) or not source.has_gold:
        return
    texts = [row["prompt"] for row in rows]
    for row, gold in zip(rows, source.chosen_gold(texts), strict=True):
        row["chosen_gold"] = gold


def add_exact(rows: list[dict[str, Any]], exact: list[dict[str, float]]) -> None:
    """Add a finite task's expectations to each prompt's row, as `exact`."""
    for row, expectations in zip(rows, exact, strict=True):
        row["exact"] = expectations


def score_samples(
    folder: Path,
    reward_model: Path,
    samples: Path,
    per_prompt: int | None,
    policy: Path | None = None,
) -> None:
    """Stage: `scores.json`, the reward model's scores of reference samples, (P, per_prompt).

    None: of all that there are. `policy`: whose tokens they are, if not the reward model's own.
    """
    rows, scorer = read_samples(samples), scorer_of(reward_model, policy)
    per_prompt = per_prompt or len(rows[0].completions)
    prompts = [row.prompt_ids for row in rows for _ in range(per_prompt)]
    scores = scorer.score_all(prompts, [c for row in rows for c in row.completions[:per_prompt]])
    write_json(folder / "scores.json", scores.view(len(rows), per_prompt).tolist())


def describe(
    source: Task,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer | None,
    texts: list[str],
    ids: list[list[int]],
    drawn: Completions,
    samples: int,
) -> dict[str, list[Any]]:
    """Everything about completions but their KL: one list a column, `samples` entries a prompt."""
    completions = tokenizer.batch_decode(drawn.ids, skip_special_tokens=True)
    columns: dict[str, list[Any]] = {
        "completions": completions,
        "gold": null_for_nan(source.gold([t for t in texts for _ in range(samples)], completions)),
        "length": [len(c) for c in drawn.ids],
        "truncated": drawn.truncated,
        "repetition": [repetition(ids) for ids in drawn.ids],
        "empty": [not text.strip() for text in completions],
        "well_formed": [
            not cut and source.well_formed(text)
            for text, cut in zip(completions, drawn.truncated, strict=True)
        ],
    }
    if scorer is not None:
        prompts = [p for p in ids for _ in range(samples)]
        columns["score"] = scorer.score_all(prompts, drawn.ids).tolist()
    return columns


@torch.no_grad()
def measure_kl(
    model: PreTrainedModel,
    ref_model: PreTrainedModel,
    prompts: list[list[int]],
    completions: list[list[int]],
    pad_id: int,
    limit: Limit = SCORING,
) -> dict[str, list[Any]]:
    """Nats per sequence: the exact KL summed over positions, the sums of k1 and k3, and log ref."""
    sums = {name: torch.zeros(len(prompts)) for name in ("kl", "k1", "k3", "ref_logp")}
    row = model.config.get_text_config().vocab_size * max(map(len, completions))
    limit = limit._replace(rows=max(1, min(limit.rows, ops.active().block // row)))
    own = ranks.mine(range(len(prompts)))
    lengths = [len(completions[i]) for i in own], [len(prompts[i]) for i in own]
    for group in by_length(*lengths, limit):
        rows = [own[i] for i in group]
        batch = collate([prompts[i] for i in rows], [completions[i] for i in rows], pad_id)
        batch = batch.to(model.device)
        logits, ref_logits = (completion_logits(m, batch) for m in (model, ref_model))
        logprobs, ref_logprobs = (gather_logprobs(z, batch) for z in (logits, ref_logits))
        index = torch.tensor(rows)
        sums["kl"][index] = batch.spread(exact_kl(logits, ref_logits)).sum(1).cpu()
        sums["k1"][index] = masked_sum(k1(logprobs, ref_logprobs), batch.mask).cpu()
        sums["ref_logp"][index] = masked_sum(ref_logprobs, batch.mask).cpu()
        sums["k3"][index] = masked_sum(k3(logprobs, ref_logprobs), batch.mask).cpu()
    return {name: ranks.total(values).tolist() for name, values in sums.items()}


def _rows(texts: list[str], columns: dict[str, list[Any]], samples: int) -> list[dict[str, Any]]:
    return [
        {"prompt": text, **{k: v[i * samples : (i + 1) * samples] for k, v in columns.items()}}
        for i, text in enumerate(texts)
    ]


def _displacement(
    model: PreTrainedModel, held_out: HeldOut, pad_id: int
) -> dict[str, float | None]:
    """Mean change of log policy(chosen) and log policy(rejected) on held-out pairs, in nats, and
    `accuracy`: how often that of the chosen one is larger; ties count half.

    Of answers with a label they are the desirable and the undesirable ones, a mean is None where
    there are none, and so is `accuracy`: no two are of one comparison.
    """
    rows = read_rows(held_out.preferences, pad_id, SCORING, HELD_OUT)
    logps = score_logps(model, rows.prompts, rows.completions, pad_id)
    sides = (logps - read_reference(held_out.reference)).split([rows.count, rows.undesirable])
    chosen, rejected = (values.mean().item() if len(values) else None for values in sides)
    accuracy = None
    if isinstance(rows, PairRows):
        accuracy = (0.5 + 0.5 * (sides[0] - sides[1]).sign()).mean().item()
    return {"chosen": chosen, "rejected": rejected, "accuracy": accuracy}
