"""`klash doctor`: RLHF's known traps, one after the other, on one's own models and data.

A check compares two computations of one number, or counts what must not be there. Each reports
what it found and, where it fails, what to change.
"""

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.data import findings
from benchmarks.data.giveaways import Answers, accuracies, count_sides
from benchmarks.doctor import models, reward, tokens
from benchmarks.doctor.finding import Finding, finding_text
from benchmarks.doctor.patient import Patient, token_id
from shared.data.cleaning import Report
from shared.data.pairs import Pair
from shared.generation.hf import HFEngine
from shared.models.adapters import require_adapter, with_saved_adapter
from shared.models.folders import embedding_count, places_known, require_folder, text_config
from shared.models.load import SpecialIds, frozen, load_policy, load_scalar_model
from shared.models.opening import load_with_info, open_tokenizer
from shared.models.scorer import same_tokens
from shared.models.sequences import Limit

SAMPLED = 32  # tokens a prompt, at most


class SampleSize(NamedTuple):
    """The most pairs, and the most tokens of a padded batch of them, that are run together."""

    pairs: int
    tokens: int


POLICY_SAMPLE = SampleSize(pairs=8, tokens=4096)
REWARD_SAMPLE = SampleSize(pairs=32, tokens=8192)  # without an output layer a pass costs less


def print_findings(patient: Patient) -> bool:
    """Print each finding as it is made; True if every check passes."""
    findings = []
    for finding in examine(patient):
        print(finding_text(finding), flush=True)
        findings.append(finding)
    failed = sum(bool(finding.fix) for finding in findings)
    print(f"{len(findings) - failed} of {len(findings)} checks pass")
    return not failed


def examine(patient: Patient) -> Iterator[Finding]:
    """All checks that apply. What cannot be measured after a failure is left out.

    InputError, before the first one, if a folder holds no model of its kind.
    """
    require_models(patient)
    tokenizer, eos = patient.tokenizer, token_id(patient.tokenizer, "eos_token_id")
    context = places_known(patient.policy)
    limit = min(context, patient.max_length or context)
    yield tokens.eos_and_pad(tokenizer)
    if patient.report is not None:
        yield from of_report(patient, patient.report)
    if patient.labels:
        yield from findings.of_label_counts(patient.labels.count(True), patient.labels.count(False))
    if not patient.pairs:
        return
    yield tokens.one_bos(tokenizer, patient.pairs, patient.examples)
    if patient.report is None:
        yield tokens.boundary(tokenizer, patient.pairs)
    answers = answers_of(patient)
    if eos is not None and answers:
        yield tokens.one_eos(answers, patient.all_ends, patient.cap)
    pad = token_id(tokenizer, "pad_token_id")
    if pad is not None and pad != eos and answers:
        yield tokens.ends_in_pad(answers, pad)
    yield tokens.lengths(patient.pairs, limit, patient.max_new_tokens)
    kept = tokens.truncated(patient.pairs, limit)
    if patient.compares:
        kept, finding = tokens.usable(kept)
        yield finding
    kept = [pair for pair in kept if pair.chosen_ids and pair.rejected_ids]
    if not kept:
        return
    yield from check_policy(patient, select_pairs(kept, POLICY_SAMPLE))
    if patient.reward_model is not None:
        yield from check_reward_model(patient, patient.reward_model, kept)


def answers_of(patient: Patient) -> list[list[int]]:
    """The token ids of every answer, each once; prompts alone have none."""
    if patient.labels:
        return [pair.chosen_ids for pair in patient.pairs]
    if patient.report is None:
        return [side for pair in patient.pairs for side in (pair.chosen_ids, pair.rejected_ids)]
    if patient.report.kind == "prompts":
        return []
    both = ((one.chosen_ids, one.rejected_ids) for one in patient.examples)
    return [side for sides in both for side in sides if side is not None]


def of_report(patient: Patient, report: Report) -> Iterator[Finding]:
    """What became of the rows of a file, and what its labels and texts hold."""
    yield from findings.of_rows(report, 0, strict=True)
    yield from findings.of_labels(report)
    better, worse = Answers(), Answers()
    for example in patient.examples:
        count_sides(better, worse, example.chosen, example.rejected, example.label)
    yield from findings.of_giveaways(accuracies(better, worse))
    for finding in findings.of_tokens(report):
        if finding.check != "one eos":  # counted from the tokens below
            yield finding


def require_models(patient: Patient) -> None:
    """InputError unless each folder holds what it is named as, as far as its files say."""
    require_folder(patient.policy, "policy")
    if patient.reference is not None:
        require_folder(patient.reference, "policy")
    if patient.reward_model is not None:
        require_folder(patient.reward_model, "reward model")
    if patient.adapter is not None:
        require_adapter(patient.adapter, text_config(patient.policy)["vocab_size"])


def check_policy(patient: Patient, pairs: list[Pair]) -> Iterator[Finding]:
    """Checks that run the policy, its reference and an adapter."""
    tokenizer, pad = patient.tokenizer, padding_token(patient.tokenizer)
    plain, info = load_with_info(patient.policy, "policy")
    if token_id(tokenizer, "eos_token_id") is not None:
        yield tokens.stop_token(tokenizer, plain.config, plain.generation_config)
    vocabulary = tokens.vocabulary(tokenizer, embedding_count(plain))
    for finding in (vocabulary, models.weights(plain, info)):
        yield finding
        if finding.fix:
            return
    if "position_ids" not in inspect.signature(plain.forward).parameters:
        yield Finding(
            "padding",
            f"{type(plain).__name__} takes no position_ids",
            "take a model that does: batches here are padded on the left",
        )
        return
    policy = load_policy(patient.policy)
    yield models.padding(policy, plain, pairs, pad)
    del plain
    reference = frozen(policy if patient.reference is None else load_policy(patient.reference))
    yield models.step_0(policy, reference, pairs, pad)
    yield models.dropout(policy, pairs, pad)
    base = frozen(policy)
    yield models.adapter_off(base, with_adapter(policy, patient.adapter), pairs, pad)
    length = min(patient.sampling.max_new_tokens, SAMPLED)
    prompts = [p.prompt_ids for p in pairs] * 2
    at_once = Limit(len(prompts), len(prompts) * (max(map(len, prompts)) + length))
    yield models.engine_parity(
        HFEngine(base, SpecialIds(pad, eos=-1), at_once),
        base,
        prompts,
        patient.sampling.model_copy(update={"max_new_tokens": length}),
        pad,
    )


def check_reward_model(patient: Patient, folder: Path, pairs: list[Pair]) -> Iterator[Finding]:
    """Checks of the reward model, on pairs with two tokens a side and more that end in no pad."""
    tokenizer, owner = open_tokenizer(folder), "reward model's "
    plain, info = load_with_info(folder, "reward model")
    decoder = isinstance(getattr(plain, "score", None), nn.Linear)
    if decoder:
        yield tokens.eos_and_pad(tokenizer, owner)
    vocabulary = tokens.vocabulary(tokenizer, embedding_count(plain), owner)
    for finding in (vocabulary, models.weights(plain, info, owner)):
        yield finding
        if finding.fix:
            return
    pad, eos = padding_token(tokenizer), token_id(tokenizer, "eos_token_id")
    own = decoder and same_tokens(patient.tokenizer, tokenizer)
    yield reward.tokens_read(patient.tokenizer, tokenizer, decoder)
    if not own and decoder and pad == eos:
        return
    long = [
        p
        for p in pairs
        if min(len(p.chosen_ids), len(p.rejected_ids)) > 1
        and (pad == eos or not own or pad not in (p.chosen_ids[-1], p.rejected_ids[-1]))
    ]
    if not long:
        yield Finding(
            "score at eos",
            "every pair has a side of one token, or one that ends in pad",
            "add rows whose completions hold a text and then EOS",
        )
        return
    long = select_pairs(long, REWARD_SAMPLE)
    if own:
        scores = reward.score(load_scalar_model(folder).eval(), long, pad)
        yield reward.score_at_eos(plain.eval(), scores, long, pad, eos)
    else:
        scores, finding = reward.score_texts(
            folder, patient.tokenizer, patient.all_ends, long, prompt_chats(patient), plain
        )
        yield finding
    yield reward.score_moves(scores)
    if patient.compares:
        yield reward.preference_accuracy(scores)
    yield reward.normalisation(folder, scores)


def prompt_chats(patient: Patient) -> dict[tuple[int, ...], Any]:
    """The messages of prompts that are chats, by their token ids."""
    return {
        tuple(example.prompt_ids): example.prompt_messages
        for example in patient.examples
        if example.prompt_messages is not None
    }


def select_pairs(pairs: list[Pair], size: SampleSize) -> list[Pair]:
    """A few pairs, from the shortest to the longest that a small machine can run in one batch."""

    def length(p: Pair) -> int:
        return len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids))

    ordered = sorted(pairs, key=length)
    fit = [p for p in ordered if 2 * size.pairs * length(p) <= size.tokens] or ordered[:1]
    places = {i * (len(fit) - 1) // (size.pairs - 1) for i in range(size.pairs)} if fit else ()
    return [fit[place] for place in sorted(places)]


def padding_token(tokenizer: Any) -> int:
    """A token to fill batches with, even where the tokenizer names none."""
    return token_id(tokenizer, "pad_token_id") or 0


def with_adapter(policy: PreTrainedModel, adapter: Path | None) -> Any:
    """A copy of the policy under its LoRA adapter, or under a random one on every linear layer."""
    from peft import LoraConfig, get_peft_model  # takes seconds to import

    below = copy.deepcopy(policy)
    if adapter is not None:
        return with_saved_adapter(below, adapter)
    torch.manual_seed(0)
    random = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(below, random).eval()
