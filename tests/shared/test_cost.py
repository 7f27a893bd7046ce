"""The cost meter: FLOPs against PyTorch's own counter and by hand, memory against a known block."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import kept_tokens
from families import CONFIGS
from test_packing import batch_of, policy
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from shared.generation.engine import Sampling
from shared.generation.hf import HFEngine
from shared.models.cost import At, Meter, forward_flops, matmul_rate, peak_memory_bytes
from shared.models.load import (
    SpecialIds,
    last_states,
    load_policy,
    load_scalar_model,
    sequence_scores,
    state_values,
)
from shared.models.logprobs import logprobs_and_values, policy_values, token_logprobs
from shared.models.lora import add_value_head
from shared.models.ops import Shortcuts, linear, using
from shared.models.packing import let_pack
from shared.models.sequences import Sequences, collate

MEGABYTE = 1024 * 1024


def llama(tied: bool = True, key_values: int = 4) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=key_values, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batch(rows: list[tuple[int, int]]) -> Sequences:
    """Rows of so many prompt and completion tokens."""
    prompts, completions = ([[5] * row[side] for row in rows] for side in (0, 1))
    return collate(prompts, completions, 0)


# --- FLOPs ------------------------------------------------------------------------------------


def test_forward_flops_by_hand():
    """2 m n a token for each m x n matrix; causal attention: 4 h for each pair (i, j <= i)."""
    n, h, wide, vocabulary, layers = 200, 64, 96, 100, 3
    matrices = layers * (4 * h * h + 3 * h * wide) + vocabulary * h  # q k v o, gated MLP, output
    pairs = n * (n + 1) / 2
    expected = 2 * n * matrices + layers * 4 * h * pairs
    assert forward_flops(llama(), [n]) == pytest.approx(expected, rel=0.005)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "tied": lambda: llama(),
    "untied": lambda: llama(tied=False),
    "grouped": lambda: llama(key_values=2),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_positions=512, n_embd=64, n_layer=3, n_head=4)
    ).eval(),
}


def counted(model: PreTrainedModel, n: int) -> float:
    """PyTorch's count of one row of n tokens, less the masked half of the attention's square."""
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused kernel
    plain = using(Shortcuts(c=False))  # nor what is written in C
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        model(torch.full((1, n), 5), use_cache=False)
    config = model.config
    return counter.get_total_flops() - 2 * n * n * config.num_hidden_layers * config.hidden_size


@pytest.mark.parametrize("name", MODELS)
def test_forward_flops_agree_with_pytorchs_counter(name: str):
    model = MODELS[name]()
    assert forward_flops(model, [128]) == pytest.approx(counted(model, 128), rel=0.005)


def test_a_reward_model_pays_for_no_vocabulary(reward_folder: Path):
    model = load_scalar_model(reward_folder).eval()
    assert forward_flops(model, [128]) == pytest.approx(counted(model, 128), rel=0.005)


def test_rows_add_up():
    model = llama()
    alone = [forward_flops(model, [n]) for n in (3, 10, 7)]
    assert forward_flops(model, [3, 10, 7]) == pytest.approx(sum(alone))
    assert forward_flops(model, []) == 0


def test_attention_grows_with_the_square():
    """Second difference of a quadratic: 2 * (2 h layers) n^2."""
    model, n = llama(), 50
    single, double = (forward_flops(model, [k * n]) for k in (1, 2))
    assert double - 2 * single == pytest.approx(2 * 2 * 64 * 3 * n * n, rel=0.03)


def test_padding_counts_nothing():
    model = llama()
    rows = [(3, 4), (9, 2), (1, 20)]
    together = Meter()
    token_logprobs(model, batch(rows))
    apart = Meter()
    for row in rows:
        token_logprobs(model, batch([row]))
    assert together.flops == pytest.approx(apart.flops)
    assert together.flops == pytest.approx(forward_flops(model, [7, 11, 21], At(39, 39, 26)))


def test_a_backward_pass_costs_twice_its_forward_pass_and_trains_tokens():
    model, meter = llama(), Meter()
    numbers = token_logprobs(model, batch([(3, 4), (2, 2)]))
    one_way, trained = meter.flops, meter.train_tokens
    numbers.sum().backward()
    assert meter.flops == pytest.approx(3 * one_way)
    assert (trained, meter.train_tokens) == (0, 11)


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_head_counts_where_tokens_are_predicted(tied: bool):
    """2 h vocabulary for each of the 20 completion tokens, none for the prompt's 9."""
    model, rows = llama(tied), batch([(9, 20)])
    whole = Meter()
    token_logprobs(model, rows)
    trunk = Meter()
    last_states(model, rows, rows.predicting)
    assert whole.flops - trunk.flops == pytest.approx(20 * 2 * 64 * 100)
    every = forward_flops(model, [29])
    assert every - whole.flops == pytest.approx(9 * 2 * 64 * 100)


def test_a_backward_pass_costs_what_pytorch_counts():
    """Twice its forward pass, but for the gradient of the input that no one needs."""
    model, n = llama(tied=False).train(), 128
    with FlopCounterMode(display=False) as forward:
        loss = model(torch.full((1, n), 5), use_cache=False).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    ratio = backward.get_total_flops() / forward.get_total_flops()
    assert ratio == pytest.approx(2, rel=0.15)


def test_generation_counts_prompt_and_completion_once():
    model, sampling = llama(), Sampling(max_new_tokens=20)
    prompts = [[5] * 5, [5, *[6] * 5], [5] * 5]  # of the 16 tokens one is the second's and first's
    eos = HFEngine(model, SpecialIds(0, 1)).generate(prompts, sampling).ids[0][9]
    meter = Meter()
    lengths = [*map(len, HFEngine(model, SpecialIds(0, eos)).generate(prompts, sampling).ids)]
    assert lengths[0] < max(lengths)  # some end by themselves, and count no further
    assert meter.generated_tokens == sum(lengths)
    assert meter.train_tokens == 0
    rows, tokens = [len(p) + n for p, n in zip(prompts, lengths, strict=True)], 5 + 5 + sum(lengths)
    expected = forward_flops(model, rows, At(tokens, tokens, sum(lengths)))
    assert meter.flops == pytest.approx(expected)
    assert expected < forward_flops(model, rows)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_pass_counts_what_it_computes(name: str):
    """Its distinct tokens; those that are read in the last MLP; logits where there are any."""
    model, rows = add_value_head(let_pack(policy(CONFIGS[name]))), batch_of()
    tokens, read, lengths = kept_tokens(rows, rows.predicting)
    logits = int(rows.mask.sum())
    for run, seen in (
        (token_logprobs, logits),
        (logprobs_and_values, logits),
        (policy_values, 0),
    ):
        meter = Meter()
        run(model, rows)
        assert meter.flops == pytest.approx(forward_flops(model, lengths, At(tokens, read, seen)))
    assert read < tokens < sum(lengths)


def test_a_packed_score_is_read_at_the_ends_and_a_packed_value_before_its_token(
    reward_folder: Path,
):
    model, rows = load_scalar_model(reward_folder), batch_of()
    for run, at in ((sequence_scores, rows.last), (state_values, rows.predicting)):
        meter = Meter()
        run(model, rows)
        tokens, read, lengths = kept_tokens(rows, at)
        assert meter.flops == pytest.approx(forward_flops(model, lengths, At(tokens, read, 0)))


# --- what is counted, and by whom ---------------------------------------------------------------


def test_a_pass_without_a_gradient_trains_nothing():
    model, meter = llama(), Meter()
    with torch.no_grad():
        token_logprobs(model, batch([(3, 4)]))
    token_logprobs(model, batch([(3, 4)]))  # one that could, and does not
    token_logprobs(model.requires_grad_(False), batch([(3, 4)]))
    assert meter.flops == pytest.approx(3 * forward_flops(model, [7], At(7, 7, 4)))
    assert meter.train_tokens == 0


@pytest.mark.parametrize("block", [2**26, 100])
def test_a_gradient_counts_once_however_many_losses_and_blocks_it_comes_from(block: int):
    model, rows = add_value_head(let_pack(policy(CONFIGS["llama"]))), batch_of()
    meter = Meter()
    with using(Shortcuts(block=block)):
        logprobs, values = logprobs_and_values(model, rows)
        one_way = meter.flops
        (logprobs.sum() + values.sum() + logprobs.square().sum()).backward()
    assert meter.flops == pytest.approx(3 * one_way)
    assert meter.train_tokens == int(rows.attention.sum())


def test_the_newest_meter_counts_and_a_gradient_is_that_of_its_own_passs_meter():
    model, rows = llama(), batch([(3, 4)])
    older = Meter()
    numbers = token_logprobs(model, rows)
    one_way = older.flops
    newer = Meter()
    token_logprobs(model, rows)
    HFEngine(model, SpecialIds(0, 1)).generate([[5, 6]], Sampling(max_new_tokens=3))
    assert newer.generated_tokens > 0
    assert (older.flops, older.generated_tokens) == (one_way, 0)
    counted_by_newer = newer.flops
    numbers.sum().backward()
    assert (older.train_tokens, newer.train_tokens) == (7, 0)
    assert older.flops == pytest.approx(3 * one_way)
    assert newer.flops == counted_by_newer


def test_a_meter_goes_on_from_the_state_of_another_one():
    model, rows = llama(), batch([(3, 4)])
    first = Meter()
    with first.phase("a"):
        token_logprobs(model, rows).sum().backward()
    state = json.loads(json.dumps(first.state()))
    second = Meter()
    second.restore(state)
    token_logprobs(model, rows).sum().backward()
    assert second.flops == pytest.approx(2 * first.flops)
    assert second.train_tokens == 2 * first.train_tokens == 14
    assert second.phases.keys() == {"a"}
    assert second.summary()["wall_s"] >= state["_start"]


def test_frozen_weights_multiply_too(policy_folder: Path):
    model = load_policy(policy_folder)
    free = forward_flops(model, [20])
    assert forward_flops(model.requires_grad_(False), [20]) == free


def test_the_matrix_rate_is_that_of_a_matrix_product():
    """Near the faster of two timed here, as far as a busy machine lets one say."""
    a = torch.randn(768, 768)
    ways = lambda: torch.mm(a, a), lambda: linear(a, a, None)
    best = min(timed(way) for way in ways for _ in range(10))
    assert 1 / 6 < matmul_rate(0.1) / (2 * 768**3 / best) < 3


@pytest.mark.parametrize("fast", ["shared.models.ops.linear", "torch.mm"])
def test_the_matrix_rate_is_that_of_the_faster_product(fast: str, monkeypatch: pytest.MonkeyPatch):
    usual = matmul_rate(0.1)
    monkeypatch.setattr(fast, lambda *_: None)
    assert matmul_rate(0.1) > 10 * usual


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# --- seconds ----------------------------------------------------------------------------------


def test_phases_add_up_by_name_and_lie_within_the_whole():
    meter = Meter()
    for name in ("a", "b", "a"):
        with meter.phase(name):
            time.sleep(0.03)
    summary = meter.summary()
    assert summary["phases"].keys() == {"a", "b"}
    assert summary["phases"]["a"] >= 0.06
    assert summary["phases"]["b"] >= 0.03
    assert summary["wall_s"] >= sum(summary["phases"].values())


def test_a_phase_that_fails_is_counted_and_fails():
    meter = Meter()
    with pytest.raises(ZeroDivisionError), meter.phase("a"):
        time.sleep(0.02)
        raise ZeroDivisionError
    assert meter.phases["a"] >= 0.02


def test_a_summary_does_not_change_afterwards():
    meter = Meter()
    summary = meter.summary()
    with meter.phase("later"):
        HFEngine(llama(), SpecialIds(0, 1)).generate([[5]], Sampling(max_new_tokens=2))
    assert meter.generated_tokens > 0
    assert summary["phases"] == {}
    assert summary["generated_tokens"] == 0


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="the meter reads the GPU's memory there")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="not Linux")
def test_peak_memory_sees_a_block_that_came_and_went_and_a_new_meter_forgets_it():
    Meter()
    before = peak_memory_bytes()
    block = torch.ones(200 * MEGABYTE // 4)  # 200 MB, written to
    during = peak_memory_bytes()
    del block
    after = peak_memory_bytes()
    assert during - before > 180 * MEGABYTE
    assert after > during - MEGABYTE  # a peak; the kernel counts pages in batches
    meter = Meter()
    assert meter.summary()["peak_memory_bytes"] < after - 150 * MEGABYTE


def test_peak_memory_is_in_bytes():
    """A process with torch holds more than 100 MB and less than the machine."""
    assert (
        100 * MEGABYTE
        < peak_memory_bytes()
        < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
