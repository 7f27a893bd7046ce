"""One's own pairs, from the file to what trains: read once, cleaned, encoded, put on sides."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from shared.config import InputError
from shared.data.examples import dropped_lines, read_examples, require_usable
from shared.data.pairs import Pair, swapped
from shared.data.rows import DataConfig
from shared.data.samples import null_for_nan
from shared.data.splits import split_of
from shared.models.load import load_tokenizer, special_ids
from shared.models.scorer import write_chats
from shared.seeds import seed_of
from shared.stages import Given, write_json, write_jsonl
from shared.tasks.own import SIDES, OwnData, OwnExample, Side, examples_of, pair_of, read_own
from shared.tasks.registry import make_task

FEWEST = 2  # prompts on each side: a spread needs two


def prepare_data(
    folder: Path,
    sources: Sequence[Given],
    data: DataConfig,
    policy: Path,
    judge_share: float = 0.0,
) -> None:
    """Stage: `examples.jsonl`, every comparison that can be used with its side; what was dropped
    and why in `data.json` and `dropped.jsonl`.

    `policy` brings tokenizer and chat template.
    """
    tokenizer, names = load_tokenizer(policy), [source.source for source in sources]
    ends = special_ids(tokenizer, policy).ends
    with (folder / "dropped.jsonl").open("w", encoding="utf-8") as dropped:
        write = partial(print, file=dropped)
        found, report = read_examples(
            names, Path(), data, tokenizer, ends, lambda row: write(row.as_json())
        )
    require_usable(names, report)
    pairs = [e for e in found if e.rejected is not None and e.rejected_ids is not None]
    if not pairs:
        raise InputError(
            f"{sources[0].source}: no comparisons of two answers ({report.format}), which the "
            "reward model and the losses on pairs need"
        )
    rows = [
        OwnExample(
            where=e.where,
            side=SIDES[split_of(e.key, judge_share)],
            prompt=e.prompt,
            messages=e.prompt_messages,
            prompt_ids=e.prompt_ids,
            chosen=e.chosen,
            chosen_ids=e.chosen_ids,
            rejected=e.rejected or "",
            rejected_ids=e.rejected_ids or [],
        )
        for e in pairs
    ]
    sides = Counter(row.side for row in rows)
    prompts = Counter(side for side, _ in {(row.side, row.prompt) for row in rows})
    wanted: list[Side] = ["train", "validation", "test", *(["judge"] if judge_share else [])]
    for side in wanted:
        if prompts[side] < FEWEST:
            raise InputError(
                f"{sources[0].source}: {report.kept} usable rows leave {prompts[side]} prompts for "
                f"{side}, and {FEWEST} are needed; give more rows"
                + "".join(f"\n{line}" for line in dropped_lines(report))
            )
    write_jsonl(folder / "examples.jsonl", [row._asdict() for row in rows])
    chats = {tuple(row.prompt_ids): row.messages for row in rows if row.messages is not None}
    if chats:
        write_chats(folder, chats)
    write_json(folder / "data.json", {**report.as_json(), "sides": sides, "prompts": prompts})


def take_preferences(
    folder: Path, data: Path, pairs: int, held_out_pairs: int, seed: int, side: Side = "train"
) -> None:
    """Stage: `train.jsonl` and `held_out.jsonl`, pairs of the file: a run's own draw of them."""
    rows = read_own(data)
    rng = np.random.default_rng(seed_of(seed, f"pairs of {side}"))

    def draw(found: list[OwnExample], count: int) -> list[Pair]:
        order = rng.permutation(len(found))[:count]
        return [pair_of(found[i]) for i in order]

    train = draw(examples_of(rows, side), pairs)
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
    rejected = null_for_nan(source.gold(prompts, [e.rejected for e in found]))
    rows = [
        pair_of(e)._replace(chosen_gold=a, rejected_gold=b)
        for e, a, b in zip(found, chosen, rejected, strict=True)
    ]
    flip = rng.random(len(rows)) < 0.5
    rows = [flipped(row) if turn else row for row, turn in zip(rows, flip, strict=True)]
    write_jsonl(folder / "pairs.jsonl", [row._asdict() for row in rows])


def flipped(pair: Pair) -> Pair:
    """The same label told the other way: the second side wins."""
    return swapped(pair)._replace(p=1.0 - pair.p)
