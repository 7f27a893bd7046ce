"""Checks of a tokenizer, its chat template and the tokenised pairs. No model runs."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.data.findings import FIXES
from benchmarks.doctor.finding import Finding, make_finding
from shared.data.examples import Example
from shared.data.pairs import Pair, clean


def eos_and_pad(tokenizer: PreTrainedTokenizerBase, owner: str = "") -> Finding:
    """Both are there, they differ, and the text of each is one token."""
    check, eos, pad = f"{owner}eos and pad", tokenizer.eos_token_id, tokenizer.pad_token_id
    observed = f"eos {tokenizer.eos_token!r} ({eos}), pad {tokenizer.pad_token!r} ({pad})"
    if eos is None:
        return Finding(
            check, observed, "name the token that ends an answer: tokenizer.eos_token = ..."
        )
    if pad is None or pad == eos:
        return Finding(
            check,
            observed,
            "give it a pad token of its own, tokenizer.add_special_tokens({'pad_token': '<pad>'}), "
            "resize the embeddings, set model.config.pad_token_id and save both: with pad == eos "
            "no score is read at EOS and no EOS is learnt",
        )
    if tokenizer("a").input_ids[-1:] == [eos]:
        observed += "; it ends every text with EOS, prompts are encoded without it"
    words = (str(tokenizer.eos_token), str(tokenizer.pad_token))
    split = [w for w in words if len(tokenizer(w, add_special_tokens=False).input_ids) != 1]
    return make_finding(
        check,
        not split,
        observed,
        f"{split} is read as several tokens; add it with tokenizer.add_special_tokens",
    )


def stop_token(tokenizer: PreTrainedTokenizerBase, config: Any, generation: Any) -> Finding:
    """Generation elsewhere stops at the token that the tokenizer calls EOS."""
    eos = tokenizer.eos_token_id
    stops = {
        name: value if isinstance(value, list) else [value]
        for name, value in (
            ("config", config.eos_token_id),
            ("generation_config", generation.eos_token_id if generation else None),
        )
        if value is not None
    }
    wrong = [name for name, ids in stops.items() if eos not in ids]
    return make_finding(
        "stop token",
        not wrong,
        f"tokenizer's eos {eos}, " + (", ".join(f"{n}'s {i}" for n, i in stops.items()) or "alone"),
        f"model.{' and model.'.join(wrong)}: set eos_token_id = {eos} (or a list with it) and "
        "save; samples would run on past the end of the answer",
    )


def vocabulary(tokenizer: PreTrainedTokenizerBase, embeddings: int, owner: str = "") -> Finding:
    """Every token id has an embedding."""
    top = max(tokenizer.get_vocab().values())
    return make_finding(
        f"{owner}vocabulary",
        top < embeddings,
        f"largest token id {top}, {embeddings} embeddings",
        "model.resize_token_embeddings(len(tokenizer)) and save the model",
    )


def one_bos(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], examples: Sequence[Example]
) -> Finding:
    """No sequence begins with two BOS: not the encoded prompts, nor their texts read as texts.

    A chat's text may have one by the template; it is encoded without another.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return Finding("one bos", "the tokenizer has no BOS")
    twice = sum(p.prompt_ids[:2] == [bos, bos] for p in pairs)
    chats = [e.prompt for e in examples if e.prompt_messages is not None]
    texts = [e.prompt for e in examples if e.prompt_messages is None] or (
        [p.prompt for p in pairs] if not chats else []
    )
    again, rendered = (
        sum(ids[:2] == [bos, bos] for ids in _ids(tokenizer, found)) if found else 0
        for found in (texts, chats)
    )
    note = (
        "; sent through the tokenizer as text, a rendered chat would get a second: pass "
        "add_special_tokens = False there"
    )
    return make_finding(
        "one bos",
        not twice and not again,
        f"two at the start of {max(twice, again)} of {len(pairs)} prompts{note * bool(rendered)}",
        "the tokenizer adds a BOS to a prompt that holds one: take it out of the data or the chat "
        "template, or set tokenizer.add_bos_token = False and save",
    )


def boundary(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> Finding:
    """Of sampled pairs: the text that a user sees is read as the tokens that were sampled.

    Tokens of prompt + completion begin with the prompt's tokens: none spans the boundary.
    """
    prompts = [p.prompt_ids for p in pairs] * 2
    sides = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    texts = tokenizer.batch_decode(
        [p + s for p, s in zip(prompts, sides, strict=True)], skip_special_tokens=True
    )
    together = _ids(tokenizer, texts)
    merged = [
        n for n, (p, ids) in enumerate(zip(prompts, together, strict=True)) if ids[: len(p)] != p
    ]
    first = f" (first in {pairs[merged[0] % len(pairs)].id})" if merged else ""
    return make_finding(
        "boundary",
        not merged,
        f"tokens span it in {len(merged)} of {len(texts)} completions{first}",
        FIXES["boundary"],
    )


def one_eos(sides: Sequence[list[int]], ends: frozenset[int], cap: int | None) -> Finding:
    """A completion ends with EOS and holds no other; one of `cap` tokens was cut, without EOS."""
    counts = [sum(token in ends for token in side) for side in sides]
    cut = sum(not count and len(side) == cap for side, count in zip(sides, counts, strict=True))
    none = counts.count(0) - cut
    more = sum(count > 1 for count in counts)
    inside = sum(
        count == 1 and side[-1] not in ends for side, count in zip(sides, counts, strict=True)
    )
    return make_finding(
        "one eos",
        not none and not more and not inside,
        f"of {len(sides)} completions {none} without, {more} with several, {inside} with text "
        f"after it, {cut} cut at the sampling length",
        FIXES["without-end" if none else "two-ends"],
    )


def ends_in_pad(sides: Sequence[list[int]], pad: int) -> Finding:
    """No completion ends in the pad token, which a policy can sample like any other.

    transformers' classifiers read a score at the last token that is not pad.
    """
    inside, last = sum(pad in side for side in sides), sum(side[-1:] == [pad] for side in sides)
    return make_finding(
        "pad in completions",
        not last,
        f"of {len(sides)} completions {inside} hold the pad token, {last} end in it",
        "drop these pairs, and train the policy that sampled them longer: transformers scores such "
        "a completion before its end",
    )


def lengths(pairs: Sequence[Pair], limit: int, max_new_tokens: int | None) -> Finding:
    """Nothing is cut: prompt and completion fit `limit`, the completion `max_new_tokens`."""
    totals = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
    answers = [max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
    prompts = sum(len(p.prompt_ids) >= limit for p in pairs)
    cut = sum(total > limit for total in totals) - prompts
    long = 0 if max_new_tokens is None else sum(n > max_new_tokens for n in answers)
    advice = []
    if cut or prompts:
        advice.append(
            f"drop these rows, or raise max_length to {max(totals)} if the model reaches so far"
        )
    if long:
        advice.append(f"raise max_new_tokens to {max(answers)}: no sample can be as long")
    return make_finding(
        "lengths",
        not advice,
        f"of {len(pairs)} pairs {prompts} have no room after the prompt, {cut} are cut at {limit} "
        f"tokens, {long} are longer than max_new_tokens; the longest has {max(totals)}",
        "; ".join(advice),
    )


def truncated(pairs: Sequence[Pair], limit: int) -> list[Pair]:
    """The pairs as a length limit leaves them: the end of the completion goes."""
    return [
        p._replace(
            chosen_ids=p.chosen_ids[: max(0, limit - len(p.prompt_ids))],
            rejected_ids=p.rejected_ids[: max(0, limit - len(p.prompt_ids))],
        )
        for p in pairs
    ]


def usable(pairs: Sequence[Pair]) -> tuple[list[Pair], Finding]:
    """Pairs that teach something, once cut; and how many do not, by reason."""
    kept, dropped = clean(pairs)
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    return kept, make_finding(
        "pairs",
        not dropped,
        f"of {len(pairs)} as cut to length: {counts or 'none empty, identical or repeated'}",
        "drop them: an identical pair costs ln 2 whatever the policy, a contradicted one cancels",
    )


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts).input_ids if texts else []
