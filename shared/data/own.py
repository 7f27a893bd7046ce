"""One's own pairs, or answers with a label, from the file to what trains: read once, cleaned,
encoded, put on sides.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from shared.config import InputError
from shared.data.cleaning import Report
from shared.data.examples import Reading, Room, dropped_lines, read_examples, require_usable
from shared.data.pairs import Labelled, Pair, swapped
from shared.data.rows import DataConfig
from shared.data.samples import null_for_nan
from shared.data.splits import split_of
from shared.models.folders import places_known
from shared.models.load import load_tokenizer, special_ids
from shared.models.reward_files import write_chats
from shared.seeds import seed_of
from shared.stages import Given, write_json, write_jsonl
from shared.tasks.judge import Judge
from shared.tasks.own import (
    SIDES,
    OwnData,
    OwnExample,
    Side,
    examples_of,
    labelled_of,
    pair_of,
    read_own,
)
from shared.tasks.registry import make_task

Kind = Literal["pairs", "labels"]
FEWEST = 2  # prompts on each side: a spread needs two


def prepare_data(
    folder: Path,
    sources: Sequence[Given],
    data: DataConfig,
    policy: Path,
    judge_share: float = 0.0,
    wanted: Kind = "pairs",
    most_sampled: int = 0,
) -> None:
    """Stage: `examples.jsonl`, every comparison, or answer with a label, that can be used with its
    side; what was dropped and why in `data.json` and `dropped.jsonl`.

    `policy` brings tokenizer, chat template and the places it knows: rows that end behind them, or
    whose prompt leaves none for `most_sampled` tokens, are over-long. InputError unless the rows
    are `wanted`.
    """
    tokenizer, names = load_tokenizer(policy), [source.source for source in sources]
    ends = special_ids(tokenizer, policy).ends
    with (folder / "dropped.jsonl").open("w", encoding="utf-8") as dropped:
        write = partial(print, file=dropped)
        found, report = read_examples(
            names,
            Path(),
            data,
            tokenizer,
            ends,
            lambda row: write(row.as_json()),
            Room(places_known(policy), most_sampled),
        )
    require_usable(names, report)
    require_kind(sources[0].source, report, wanted)
    rows = [
        OwnExample(
            where=e.where,
            side=SIDES[split_of(e.key, judge_share)],
            prompt=e.prompt,
            messages=e.prompt_messages,
            prompt_ids=e.prompt_ids,
            chosen=e.chosen,
            chosen_ids=e.chosen_ids,
            rejected=e.rejected,
            rejected_ids=e.rejected_ids,
            label=e.label,
        )
        for e in found
    ]
    sides = Counter(row.side for row in rows)
    distinct: set[tuple[Side, str]] = {(row.side, row.prompt) for row in rows}
    prompts: Counter[Side] = Counter(side for side, _ in distinct)
    needed: list[Side] = ["train", "validation", "test", *(["judge"] if judge_share else [])]
    require_prompts(sources[0].source, report, prompts, needed)
    write_jsonl(folder / "examples.jsonl", [row._asdict() for row in rows])
    chats = {tuple(row.prompt_ids): row.messages for row in rows if row.messages is not None}
    if chats:
        write_chats(folder, chats)
    write_json(folder / "data.json", {**report.as_json(), "sides": sides, "prompts": prompts})


def require_prompts(
    source: str, report: Report, prompts: Counter[Side], needed: Sequence[Side]
) -> None:
    """InputError unless every side has prompts enough."""
    for side in needed:
        if prompts[side] < FEWEST:
            raise InputError(
                f"{source}: {report.kept} usable rows leave {prompts[side]} prompts for {side}, "
                f"and {FEWEST} are needed; give more rows"
                + "".join(f"\n{line}" for line in dropped_lines(report))
            )


def require_kind(source: str, report: Report, wanted: Kind) -> None:
    """InputError unless all rows that are kept are `wanted`, and labels are of both kinds."""
    if report.kind != wanted:
        holds = {
            "pairs": "comparisons of two answers",
            "labels": "single answers with a label",
            "answers": "answers without a label",
            "prompts": "prompts without answers",
        }
        raise InputError(
            f"{source}: {holds[report.kind]} ({report.format}), and {holds[wanted]} are needed"
        )
    if wanted == "labels" and not (report.desirable and report.undesirable):
        raise InputError(one_label_text(source, bool(report.desirable)))


def one_label_text(where: str, desirable: bool) -> str:
    """Why answers of one kind alone are refused."""
    missing = "undesirable" if desirable else "desirable"
    return (
        f"{where}: no answer is labelled {missing}, so nothing can be learnt from the labels: add "
        "some, or train on good answers as SFT"
    )


def find_kind(sources: Sequence[str], beside: Path, data: DataConfig) -> str:
    """What the first row that can be used holds: `pairs`, `labels`, `answers`, `prompts`; "" if
    there is none. InputError for what cannot be read.
    """
    for one in Reading(data, finish=True).rows(sources, beside):
        return one.row.kind
    return ""


def take_preferences(
    folder: Path, data: Path, pairs: int, held_out_pairs: int, seed: int, side: Side = "train"
) -> None:
    """Stage: `train.jsonl` and `held_out.jsonl`, pairs of the file: a run's own draw of them.

    Of answers with a label they are twice as many, so that as many completions are read.
    """
    rows = read_own(data)
    rng = np.random.default_rng(seed_of(seed, f"pairs of {side}"))

    def draw(found: list[OwnExample], count: int) -> list[Pair] | list[Labelled]:
        order = rng.permutation(len(found))
        if rows[0].label is None:
            return [pair_of(found[i]) for i in order[:count]]
        return [labelled_of(found[i]) for i in order[: 2 * count]]

    train = draw(examples_of(rows, side), pairs)
    kinds = {answer.desirable for answer in train if isinstance(answer, Labelled)}
    if len(kinds) == 1:
        raise InputError(one_label_text(f"of {len(train)} answers to train on", *kinds))
    held_out = draw(examples_of(rows, "test"), held_out_pairs)
    write_jsonl(folder / "train.jsonl", [p._asdict() for p in train])
    write_jsonl(folder / "held_out.jsonl", [p._asdict() for p in held_out])


def take_reward_test(folder: Path, task: OwnData, pairs: int, seed: int) -> None:
    """Stage: `pairs.jsonl`, labelled pairs that nothing trained on; with gold if there is a judge.

    Which side comes first is tossed, so that the first is no more often the better one.
    """
    source, found = make_task(task), examples_of(read_own(task.data), "test")
    rng = np.random.default_rng(seed_of(seed, "pairs of reward-test"))
    found = [found[i] for i in rng.permutation(len(found))[:pairs]]
    prompts = [e.prompt for e in found]
    chosen = null_for_nan(source.gold(prompts, [e.chosen for e in found]))
    rejected = null_for_nan(source.gold(prompts, [e.rejected or "" for e in found]))
    rows = [
        pair_of(e)._replace(chosen_gold=a, rejected_gold=b)
        for e, a, b in zip(found, chosen, rejected, strict=True)
    ]
    flip = rng.random(len(rows)) < 0.5
    rows = [flipped(row) if turn else row for row, turn in zip(rows, flip, strict=True)]
    write_jsonl(folder / "pairs.jsonl", [row._asdict() for row in rows])


def examine_judge_on_labels(folder: Path, task: OwnData, pairs: int, seed: int) -> None:
    """Stage: `scores.json`, what the judge makes of a desirable and an undesirable answer that
    nothing trained on, in couples: see `couples`. P(a wins) is 1 if `a` is the desirable one.
    """
    source, found = make_task(task), examples_of(read_own(task.data), "test")
    rng = np.random.default_rng(seed_of(seed, "couples of reward-test"))
    both = couples([found[i] for i in rng.permutation(len(found))])[:pairs]
    every = [e for couple in both for e in couple]
    gold: list[float] = []
    if every:
        gold = source.gold([e.prompt for e in every], [e.chosen for e in every]).tolist()
    good, bad = gold[::2], gold[1::2]
    first = (rng.random(len(both)) < 0.5).tolist()
    judge = task.judge or Judge()
    scores = {
        "gold_a": [g if a else b for g, b, a in zip(good, bad, first, strict=True)],
        "gold_b": [b if a else g for g, b, a in zip(good, bad, first, strict=True)],
        "p_a_wins": [float(a) for a in first],
        "log_odds": judge.log_odds,
    }
    write_json(folder / "scores.json", scores)


def couples(examples: Sequence[OwnExample]) -> list[tuple[OwnExample, OwnExample]]:
    """A desirable answer with an undesirable one each, no answer twice: of one prompt where there
    are two, then of any.
    """
    left: dict[bool, list[OwnExample]] = {True: [], False: []}
    by_prompt: dict[str, dict[bool, list[OwnExample]]] = {}
    for e in examples:
        by_prompt.setdefault(e.prompt, {True: [], False: []})[e.good].append(e)
    found: list[tuple[OwnExample, OwnExample]] = []
    for sides in by_prompt.values():
        both = min(map(len, sides.values()))
        found += zip(sides[True][:both], sides[False][:both], strict=True)
        for label, rest in sides.items():
            left[label] += rest[both:]
    return [*found, *zip(left[True], left[False], strict=False)]


def flipped(pair: Pair) -> Pair:
    """The same label told the other way: the second side wins."""
    return swapped(pair)._replace(p=1.0 - pair.p)
