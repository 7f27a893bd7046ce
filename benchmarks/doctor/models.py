"""Checks of a policy, its reference and its adapter: each computes one number in two ways."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.doctor.finding import Finding, make_finding
from dpo.losses import LogRatios, dpo_loss
from shared.data.pairs import Pair
from shared.generation.engine import Engine, Sampling
from shared.kl import exact_kl
from shared.models.logprobs import completion_logits, sequence_logps, token_logprobs
from shared.models.opening import leftover_weights, missing_weights, weight_fault
from shared.models.sequences import Sequences, collate

LOGPROB_TOLERANCE = 1e-3  # nats a token, float32: sound models differ by 1e-5 to 1e-4
MAX_SURPRISE = 5.0  # standard errors


def weights(model: PreTrainedModel, info: dict[str, Any], owner: str = "") -> Finding:
    """All weights are finite and came from the file, all of which was loaded; tied as configured.

    The fault is the one that would stop any command that loads the folder.
    """
    values = dict(model.named_parameters())
    broken = [name for name, value in values.items() if not value.isfinite().all()]
    return Finding(
        f"{owner}weights",
        f"{sum(v.numel() for v in values.values()):,} in {len(values)} tensors: {len(broken)} not "
        f"finite, {len(missing_weights(model, info))} not in the file, "
        f"{len(leftover_weights(model, info))} of the file not loaded",
        weight_fault(model, info),
    )


def both_sides(pairs: Sequence[Pair], pad: int) -> Sequences:
    """(2 B) rows: the chosen completions, then the rejected ones."""
    sides = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    return collate([p.prompt_ids for p in pairs] * 2, sides, pad)


@torch.no_grad()
def padding(
    policy: PreTrainedModel, plain: PreTrainedModel, pairs: list[Pair], pad: int
) -> Finding:
    """A row's log-probabilities are its own: alone, in batches, with padding left or right.

    `policy` is read as Klash trains it; `plain` is transformers' own model, on the same weights.
    """
    batch = both_sides(pairs, pad)
    rows = [row[real.bool()] for row, real in zip(batch.ids, batch.attention, strict=True)]
    one_by_one = [
        _plain_logprobs(plain, row[None])[0, -int(n) :]
        for row, n in zip(rows, batch.lengths, strict=True)
    ]
    alone = batch.spread(torch.cat(one_by_one))
    right = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    left = torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=pad, padding_side="left"
    )
    width, length = right.shape[1], torch.tensor([len(row) for row in rows])
    column = torch.arange(width)
    on_right = (column < length[:, None]).long()
    on_left = (column >= width - length[:, None]).long()
    shifted = (on_left.cumsum(1) - 1).clamp(min=0)
    variants = {
        "in one batch": token_logprobs(policy, batch),
        "with half of the rows": _in_two_batches(policy, pairs, pad, batch.mask.shape),
        "right-padded": _completion_part(_plain_logprobs(plain, right, on_right), length, batch),
        "left-padded": _completion_part(
            _plain_logprobs(plain, left, on_left, shifted), torch.full_like(length, width), batch
        ),
    }
    differences = {name: _largest(found - alone) for name, found in variants.items()}
    worst = max(differences, key=lambda name: differences[name])
    return make_finding(
        "padding",
        differences[worst] <= LOGPROB_TOLERANCE,
        f"log-probabilities of {len(rows)} completions alone and {worst} differ by at most "
        f"{differences[worst]:.1e} nats a token",
        "the model's positions depend on padding or on the rest of the batch (rope_type dynamic or "
        "longrope, position ids that are ignored): use fixed positions, or a batch size of 1",
    )


@torch.no_grad()
def step_0(
    policy: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair], pad: int
) -> Finding:
    """Before the first step the reference is the policy: KL 0, and DPO's loss is ln 2."""
    batch = both_sides(pairs, pad)
    ours, theirs = completion_logits(policy, batch), completion_logits(reference, batch)
    check = "step 0"
    fix = (
        "start the policy from the reference's own folder (after SFT, not before it), and keep "
        "the reference frozen, in float32"
    )
    if ours.shape != theirs.shape:
        return Finding(check, f"{ours.shape[1]} tokens, the reference has {theirs.shape[1]}", fix)
    kl = _largest(exact_kl(ours, theirs))
    ratios = sequence_logps(policy, batch) - sequence_logps(reference, batch)
    chosen, rejected = ratios.chunk(2)
    chosen_tokens, rejected_tokens = batch.lengths.chunk(2)
    log_ratios = LogRatios(chosen, rejected, chosen_tokens, rejected_tokens)
    loss = dpo_loss(log_ratios, beta=0.1).mean().item()
    return make_finding(
        check,
        kl <= 1e-6 and abs(loss - math.log(2)) <= 1e-6,
        f"KL to the reference at most {kl:.1e} nats a token, DPO loss {loss:.6f} (ln 2: 0.693147)",
        fix,
    )


@torch.no_grad()
def dropout(policy: PreTrainedModel, pairs: list[Pair], pad: int) -> Finding:
    """In train mode two passes give the same numbers, and those of eval mode."""
    batch, before = both_sides(pairs, pad), policy.training
    passes = [token_logprobs(policy.train(mode), batch) for mode in (True, True, False)]
    policy.train(before)
    difference = max(_largest(passes[0] - other) for other in passes[1:])
    return make_finding(
        "dropout",
        difference <= 1e-6,
        f"two passes in train mode and one in eval mode differ by {difference:.1e} nats a token",
        "some noise stays on in train mode: set every dropout (and router_jitter_noise) of "
        "config.json to 0",
    )


@torch.no_grad()
def adapter_off(base: PreTrainedModel, adapted: Any, pairs: list[Pair], pad: int) -> Finding:
    """A LoRA policy with its adapter off is its base, bit for bit: it serves as the reference."""
    batch = both_sides(pairs, pad)
    truth, on = completion_logits(base, batch), completion_logits(adapted, batch)
    with adapted.disable_adapter():
        off = completion_logits(adapted, batch)
    same = truth.shape == off.shape and torch.equal(truth, off)
    acts = truth.shape != on.shape or not torch.equal(truth, on)
    difference = _largest(off - truth) if truth.shape == off.shape else math.inf
    fix = (
        "train with bias='none' and without modules_to_save, and never merge and unmerge: load the "
        "base again and put the adapter on it"
    )
    return make_finding(
        "adapter off",
        same,
        f"logits differ from the base's by {difference:.1e} (must be 0); "
        f"on, by {_largest(on - truth) if truth.shape == on.shape else math.inf:.1e}"
        + ("" if acts else " (it does nothing yet)"),
        fix,
    )


@torch.no_grad()
def engine_parity(
    engine: Engine,
    policy: PreTrainedModel,
    prompts: list[list[int]],
    sampling: Sampling,
    pad: int,
) -> Finding:
    """What is sampled has the log-probability that training gives it, at the same temperature.

    `engine` runs `policy` with no EOS to stop at, all prompts in one batch: its logits, token by
    token from its cache, are compared with the trainer's. And the sampled tokens must be as
    surprising as the trainer's distribution is on average: z is standard normal, unless the engine
    draws at another temperature or cuts the distribution off.
    """
    step_logits: list[Tensor] = []
    hook = policy.get_output_embeddings().register_forward_hook(  # pyright: ignore
        lambda _, __, logits: step_logits.append(logits.flatten(0, -2).float())
    )
    drawn = engine.generate(prompts, sampling).ids
    hook.remove()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # as it batches them
    batch = collate([prompts[i] for i in order], [drawn[i] for i in order], pad)
    logits = completion_logits(policy, batch, sampling.temperature)
    distinct = {p: n for n, p in enumerate(dict.fromkeys(tuple(prompts[i]) for i in order))}
    step_logits[0] = step_logits[0][
        [distinct[tuple(prompts[i])] for i in order]
    ]  # a prompt is read once
    ours = (torch.stack(step_logits, 1) / sampling.temperature).log_softmax(-1)[batch.mask]
    trainer, tokens = logits.log_softmax(-1), batch.completion_ids[batch.mask].unsqueeze(1)
    difference = _largest(ours.gather(1, tokens) - trainer.gather(1, tokens))
    p, surprise = trainer.exp(), -trainer.masked_fill(trainer.isinf(), 0.0)
    entropy = (p * surprise).sum(1)
    variance = ((p * surprise**2).sum(1) - entropy**2).clamp(min=0)
    excess = (-trainer.gather(1, tokens).squeeze(1) - entropy).sum()
    z = (excess / variance.sum().sqrt().clamp(min=1e-9)).item()
    return make_finding(
        "engine parity",
        difference <= LOGPROB_TOLERANCE and abs(z) <= MAX_SURPRISE,
        f"{len(tokens)} tokens at temperature {sampling.temperature:g}: engine's and trainer's "
        f"log-probabilities differ by at most {difference:.1e} nats, their mean surprise by "
        f"{z:+.1f} standard errors",
        "sample at the temperature that training divides by, without top-p, top-k or penalties"
        if difference <= LOGPROB_TOLERANCE
        else "the cache and a full pass disagree: use fixed positions (no dynamic or longrope)",
    )


def _plain_logprobs(
    model: PreTrainedModel,
    ids: Tensor,
    attention: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """log p of each token but the first, (B, L - 1), by transformers alone."""
    more = {} if positions is None else {"position_ids": positions}
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False, **more).logits
    logits = logits[:, :-1].float()
    chosen = logits.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def _completion_part(logprobs: Tensor, ends: Tensor, batch: Sequences) -> Tensor:
    """The completions' part of rows that end in column `ends`, (B, T), 0 where there is none."""
    column = torch.arange(batch.mask.shape[1])
    place = (ends - batch.lengths - 1)[:, None] + column
    found = logprobs.gather(1, place.clamp(0, logprobs.shape[1] - 1))
    return found.masked_fill(~batch.mask, 0.0)


def _in_two_batches(
    policy: PreTrainedModel, pairs: list[Pair], pad: int, shape: Sequence[int]
) -> Tensor:
    """Log-probabilities from two batches, the chosen and the rejected completions, (2 B, T)."""
    logprobs = torch.zeros(*shape)
    prompts, count = [p.prompt_ids for p in pairs], len(pairs)
    for start, sides in (
        (0, [p.chosen_ids for p in pairs]),
        (count, [p.rejected_ids for p in pairs]),
    ):
        found = token_logprobs(policy, collate(prompts, sides, pad))
        logprobs[start : start + count, : found.shape[1]] = found
    return logprobs


def _largest(values: Tensor) -> float:
    """The largest size; infinite where something is not a number."""
    return values.nan_to_num(math.inf, math.inf, -math.inf).abs().max().item()
