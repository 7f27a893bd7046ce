"""The KL meter against enumeration, and log-probabilities against plain forward passes."""

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from checks import close
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shared.kl import exact_kl, k1, k2, k3, masked_mean, masked_sum
from shared.models.load import load_policy
from shared.models.logprobs import (
    completion_logits,
    gather_logprobs,
    picked,
    score_logps,
    sequence_logps,
    token_logprobs,
)
from shared.models.sequences import Limit, Sequences, by_length, collate

PAD, EOS = 0, 1
PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14, 15, 16, 17]]
COMPLETIONS = [[20, 21, EOS], [EOS], [22, 23, 24, 25, 26], [27, 28, 29, EOS]]


@pytest.fixture(scope="module")
def policy(policy_folder: Path) -> PreTrainedModel:
    return load_policy(policy_folder)


@pytest.fixture(scope="module")
def plain(policy_folder: Path) -> PreTrainedModel:
    """The same weights as anyone would load them, in float64."""
    return AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float64).eval()


def slow_logprobs(
    model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int], temperature=1.0
) -> Tensor:
    """log p of each completion token, one forward pass a token, on the row alone, no padding."""
    found = []
    with torch.no_grad():
        for t, token in enumerate(completion):
            ids = torch.tensor([[*prompt, *completion[:t]]])
            logits = model(input_ids=ids).logits[0, -1]
            found.append((logits / temperature).softmax(-1)[token].log())
    return torch.stack(found)


# KL


def categoricals(seed: int = 0, size: int = 6) -> tuple[Tensor, Tensor]:
    """Logits of two distributions."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, size, generator=generator, dtype=torch.float64))


def test_exact_kl_is_the_sum_of_p_log_p_over_q_at_each_position():
    p, q = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    found = exact_kl(p, q)
    assert found.shape == (3, 4)
    for row, column in itertools.product(range(3), range(4)):
        a, b = p[row, column].softmax(-1), q[row, column].softmax(-1)
        close(found[row, column], sum(x * (x / y).log() for x, y in zip(a, b, strict=True)), 1e-12)


def test_exact_kl_is_0_for_equal_distributions_and_ignores_a_shift_of_the_logits():
    p, q = categoricals()
    close(exact_kl(p, p + 3), torch.tensor(0.0), 1e-12)
    close(exact_kl(p, q), exact_kl(p - 5, q + 2), 1e-12)


def test_exact_kl_goes_from_policy_to_reference():
    """Half of the tokens, each twice as likely: log 2 one way."""
    half, whole = torch.tensor([0.5, 0.5, 1e-30, 1e-30]).log(), torch.zeros(4)
    close(exact_kl(half, whole), torch.tensor(2.0).log())


class Process:
    """Two tiny language models over tokens pad, EOS, 2, 3: every completion can be listed."""

    prompt, vocabulary, cap = (2, 3), range(4), 3

    def __init__(self) -> None:
        config = LlamaConfig(
            vocab_size=4,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=1.0,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
        )
        torch.manual_seed(3)
        self.policy, self.ref = (LlamaForCausalLM(config).eval() for _ in range(2))

    def completions(self, so_far: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
        """All that the process can write: it stops at EOS or, without it, at the cap."""
        if so_far and (so_far[-1] == EOS or len(so_far) == self.cap):
            return [so_far]
        return [c for token in self.vocabulary for c in self.completions((*so_far, token))]

    def enumerated_kl(self, temperature: float) -> Tensor:
        """sum of p log(p / q) over all completions, each probability a product of softmaxes."""
        total = torch.zeros((), dtype=torch.float64)
        policy, ref = (copy_in_float64(m) for m in (self.policy, self.ref))
        for c in self.completions():
            log_p, log_q = (
                slow_logprobs(m, self.prompt, c, temperature).sum() for m in (policy, ref)
            )
            total += log_p.exp() * (log_p - log_q)
        return total


def copy_in_float64(model: LlamaForCausalLM) -> LlamaForCausalLM:
    other = LlamaForCausalLM(model.config).double().eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_summed_exact_kl_is_the_kl_of_the_process_stopped_at_the_cap(temperature: float):
    process = Process()
    completions = process.completions()
    assert len(completions) == 1 + 3 * (1 + 3 * 4)
    batch = collate([process.prompt] * len(completions), completions, PAD)
    with torch.no_grad():
        logits, ref_logits = (
            completion_logits(m, batch, temperature) for m in (process.policy, process.ref)
        )
        logprobs, ref_logprobs = (gather_logprobs(x, batch) for x in (logits, ref_logits))
    probability = logprobs.sum(1).exp()
    close(probability.sum(), torch.tensor(1.0))  # EOS counts, and cut rows are rows
    truth = process.enumerated_kl(temperature)
    assert truth > 0.05
    exact = batch.spread(exact_kl(logits, ref_logits))
    estimates = exact, k1(logprobs, ref_logprobs), k3(logprobs, ref_logprobs)
    for terms in estimates:  # with all completions at hand, each is exact
        close((probability * masked_sum(terms, batch.mask)).sum(), truth)


@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k3_of_samples_are_unbiased_within_three_standard_errors(seed: int):
    policy, ref = (x.log_softmax(-1) for x in categoricals(seed))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(policy.exp(), 100_000, replacement=True, generator=generator)
    truth = exact_kl(policy, ref)
    for estimator in (k1, k3):
        values = estimator(policy[drawn], ref[drawn])
        error = values.std() / len(drawn) ** 0.5
        assert abs(values.mean() - truth) < 3 * error
    assert truth > 0.05


@given(log_p=st.floats(-50, 0), log_q=st.floats(-50, 0))
def test_k3_is_never_negative(log_p: float, log_q: float):
    p, q = torch.tensor(log_p), torch.tensor(log_q)
    assert k3(p, q) >= 0
    assert k2(p, q) >= 0
    assert k3(p, p) == k2(p, p) == k1(p, p) == 0


def test_the_estimators_by_hand():
    """The policy thinks twice as much of the token as the reference."""
    p, q = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    log_2 = torch.tensor(2.0).log()
    close(k1(p, q), log_2)
    close(k2(p, q), log_2**2 / 2)
    close(k3(p, q), 0.5 - 1 + log_2)


def test_the_mean_gradient_of_k2_is_the_gradient_of_the_kl():
    policy, ref = categoricals()
    policy.requires_grad_()
    (truth,) = torch.autograd.grad(exact_kl(policy, ref), policy)
    weights = policy.softmax(-1).detach()  # where samples come from has no gradient
    terms = k2(policy.log_softmax(-1), ref.log_softmax(-1))
    (found,) = torch.autograd.grad((weights * terms).sum(), policy)
    close(found, truth, 1e-12)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_masked_sums_and_means_count_tokens_and_nothing_else(garbage: float):
    values = torch.tensor([[1.0, garbage, garbage], [2.0, 4.0, 5.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    close(masked_sum(values, mask), torch.tensor([1.0, 11.0]))
    close(masked_mean(values, mask), torch.tensor(3.0))  # 12 / 4, not the mean of 1 and 11/3


# Log-probabilities


def test_collate_lays_prompts_left_and_completions_right():
    batch = collate([[5, 6], [7]], [[8], [9, 1]], PAD)
    assert batch.ids.tolist() == [[5, 6, 8, PAD], [PAD, 7, 9, 1]]
    assert batch.attention.tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert batch.mask.tolist() == [[True, False], [True, True]]
    assert batch.completion_ids.tolist() == [[8, PAD], [9, 1]]
    assert batch.lengths.tolist() == [1, 2]
    real = batch.attention.bool()
    assert batch.positions[0][real[0]].tolist() == batch.positions[1][real[1]].tolist() == [0, 1, 2]


def test_a_token_that_looks_like_padding_counts_by_its_place():
    batch = collate([[PAD, 5]], [[PAD, 6, PAD]], PAD)
    assert batch.attention.tolist() == [[1] * 5]
    assert batch.lengths.tolist() == [3]


def test_an_empty_completion_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        collate([[5]], [[]], PAD)


def test_an_empty_prompt_is_refused():
    """Its completion's first token would be read off the padding, and no one would notice."""
    with pytest.raises(ValueError, match="prompt has no tokens"):
        collate([[5], []], [[6], [6]], PAD)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_token_logprobs_equal_a_plain_forward_pass_on_each_row_alone(
    policy: PreTrainedModel, plain: PreTrainedModel, temperature: float
):
    """First token after the prompt (of one token, too), EOS, and the cut row's last token."""
    found = token_logprobs(policy, collate(PROMPTS, COMPLETIONS, PAD), temperature)
    assert found.shape == (4, 5)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        n = len(completion)
        close(found[row, :n], slow_logprobs(plain, prompt, completion, temperature))
        assert (found[row, n:] == 0).all()


def test_the_temperature_divides_the_logits(policy: PreTrainedModel):
    batch = collate(PROMPTS, COMPLETIONS, PAD)
    close(completion_logits(policy, batch, 0.5), 2 * completion_logits(policy, batch))


def test_half_precision_ends_at_the_logits(policy: PreTrainedModel):
    """A bfloat16 model's logits are normalised in float32: no more is lost than the model lost."""
    half = copy.deepcopy(policy).to(torch.bfloat16)
    batch = collate(PROMPTS, COMPLETIONS, PAD)
    with torch.no_grad():
        logits, found = completion_logits(half, batch), token_logprobs(half, batch)
    assert logits.dtype == found.dtype == torch.float32
    exact = logits.double().log_softmax(-1).gather(1, batch.completion_ids[batch.mask][:, None])
    close(found[batch.mask], exact.squeeze(1))


def test_sequence_logps_sum_every_completion_token(policy: PreTrainedModel, plain: PreTrainedModel):
    found = sequence_logps(policy, collate(PROMPTS, COMPLETIONS, PAD))
    rows = zip(PROMPTS, COMPLETIONS, strict=True)
    close(found, torch.stack([slow_logprobs(plain, *row).sum() for row in rows]))


@pytest.mark.parametrize("columns", [1, 7])
def test_padding_on_the_left_changes_nothing(policy: PreTrainedModel, columns: int):
    batch = collate(PROMPTS, COMPLETIONS, PAD)
    ids = torch.cat([torch.full((4, columns), PAD), batch.ids], 1)
    attention = torch.cat([torch.zeros(4, columns, dtype=torch.long), batch.attention], 1)
    padded = Sequences(ids, attention, batch.mask)
    close(token_logprobs(policy, padded), token_logprobs(policy, batch))


@pytest.mark.parametrize("columns", [1, 7])
@pytest.mark.parametrize("filler", [PAD, EOS, 30])
def test_padding_on_the_right_changes_nothing_whatever_token_it_is(
    policy: PreTrainedModel, columns: int, filler: int
):
    batch = collate(PROMPTS, COMPLETIONS, PAD)
    expected = token_logprobs(policy, batch)
    ids = torch.cat(
        [batch.ids.masked_fill(batch.attention == 0, filler)]
        + columns * [torch.full((4, 1), filler)],
        1,
    )
    zeros = torch.zeros(4, columns, dtype=torch.long)
    padded = Sequences(
        ids, torch.cat([batch.attention, zeros], 1), torch.cat([batch.mask, zeros.bool()], 1)
    )
    found = token_logprobs(policy, padded)
    close(found[:, :5], expected)
    assert (found[:, 5:] == 0).all()


def test_the_other_rows_of_a_batch_change_nothing(policy: PreTrainedModel):
    together = sequence_logps(policy, collate(PROMPTS, COMPLETIONS, PAD))
    for rows in ([0], [1], [3, 1], [2, 0, 1]):
        batch = collate([PROMPTS[i] for i in rows], [COMPLETIONS[i] for i in rows], PAD)
        close(sequence_logps(policy, batch), together[rows])


def test_no_gradient_flows_from_padding(policy: PreTrainedModel):
    """A padding token's embedding learns nothing from rows that are padded with it."""
    filler = 30
    batch = collate(PROMPTS, COMPLETIONS, filler)
    model = LlamaForCausalLM(policy.config)
    model.load_state_dict(policy.state_dict())
    model.model.embed_tokens.weight = torch.nn.Parameter(policy.model.embed_tokens.weight.clone())
    model.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.detach().clone())
    token_logprobs(model, batch).sum().backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient[filler].abs().max() == 0
    assert gradient[5].abs().max() > 0


@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_score_logps_keeps_the_order_of_its_rows(policy: PreTrainedModel, batch_size: int):
    order = [3, 1, 2, 0, 1]
    prompts, completions = [PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order]
    found = score_logps(policy, prompts, completions, PAD, Limit(batch_size, 10**6))
    alone = [
        sequence_logps(policy, collate([p], [c], PAD))
        for p, c in zip(prompts, completions, strict=True)
    ]
    close(found, torch.cat(alone))
    assert not found.requires_grad


@given(
    rows=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=30),
    size=st.integers(1, 7),
    tokens=st.integers(1, 200),
    each=st.integers(1, 2),
)
def test_by_length_deals_every_item_once_and_as_many_at_a_time_as_the_limit_lets(
    rows: list[tuple[int, int]], size: int, tokens: int, each: int
):
    """Of one row or, as pairs are, of two.

    Alike lengths together, and of neighbouring batches the second's first row had no room.
    """
    lengths, beside = [row[0] for row in rows], [row[1] for row in rows]
    batches = list(by_length(lengths, beside, Limit(size, tokens), rows_each=each))
    dealt = [row for batch in batches for row in batch]
    assert sorted(dealt) == list(range(len(lengths)))
    assert [lengths[row] for row in dealt] == sorted(lengths)

    def fits(batch: list[int]) -> bool:
        wide = max(lengths[row] for row in batch) + max(beside[row] for row in batch)
        rows_held = each * len(batch)
        return rows_held <= size and rows_held * wide <= tokens

    assert all(fits(batch) or len(batch) == 1 for batch in batches)
    assert not any(fits([*batch, after[0]]) for batch, after in itertools.pairwise(batches))


@pytest.mark.parametrize("words", [1, 5, 16, 17, 1024, 1025, 5000])
def test_picked_is_log_softmax_at_the_token(words: int):
    tokens = torch.tensor([0, words - 1, words // 2, words // 2])

    def plain(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)[range(4), tokens]

    generator = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(4, words, generator=generator)).requires_grad_()
    found, truth = picked(logits, tokens), plain(logits)
    close(found, truth)
    weights = torch.randn(4, generator=generator)
    (mine,), (theirs,) = (torch.autograd.grad((y * weights).sum(), logits) for y in (found, truth))
    close(mine, theirs)


def test_picked_of_many_words_loses_no_digits():
    """Of 150,000, each by far less likely than one: all in one sum lose 1e-4 nats."""
    logits = (-torch.rand(20, 1, generator=torch.Generator().manual_seed(0))).repeat(1, 150_000)
    logits[:, 0] = 0
    tokens = torch.arange(20)
    truth = logits.double().log_softmax(-1)[range(20), tokens]
    assert (picked(logits, tokens) - truth).abs().max() < 5e-6


def test_picked_stands_large_logits():
    logits = torch.tensor([[1e4, 0.0], [-1e4, 1e4]], requires_grad=True)
    found = picked(logits, torch.tensor([0, 0]))
    assert found.tolist() == [0.0, -2e4]
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 0.0], [1.0, -1.0]]


@pytest.mark.parametrize("broken", [0, 20])
def test_a_logit_that_is_no_number_is_heard_of(broken: int):
    """Training ends there: nothing may take it for a small one."""
    logits = torch.zeros(2, 21)
    logits[0, broken] = torch.nan
    found = picked(logits, torch.tensor([1, 1]))
    assert found.isnan().tolist() == [True, False]
