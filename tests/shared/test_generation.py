"""Sampling: what comes out is a draw from the model that is scored, and nothing else is touched."""

import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from scipy import stats
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shared.generation import hf
from shared.generation.decoding import Decoding
from shared.generation.engine import Completions, Sampling
from shared.generation.hf import HFEngine, moved_up
from shared.kl import masked_sum
from shared.models import ops
from shared.models.load import load_policy, save, special_ids
from shared.models.logprobs import completion_logits, gather_logprobs, score_logps
from shared.models.packing import let_pack, packs
from shared.models.sequences import Limit, collate
from shared.tasks.registry import TaskConfig, make_task

CAP = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Random weights so large that prompts matter; greedy and sampled completions do end."""
    ids = special_ids(tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            pad_token_id=ids.pad,
            eos_token_id=ids.eos,
            bos_token_id=None,
        )
    )
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 2:
                weights *= 12
        model.lm_head.weight[ids.eos] *= 2
    path = tmp_path_factory.mktemp("lively")
    save(model, tokenizer, path)
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["packs", "padded"])
def model(folder: Path, request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model that packs, and one as transformers loads it: they decode in their own ways."""
    model = load_policy(folder) if request.param else AutoModelForCausalLM.from_pretrained(folder)
    assert packs(model) == request.param
    return model.eval()


@pytest.fixture(scope="module")
def engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> HFEngine:
    return HFEngine(model, special_ids(tokenizer))


@pytest.fixture(scope="module")
def prompts(task_config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """64 prompts of several lengths, not in the order of their lengths."""
    ids = [tokenizer(text).input_ids for text in make_task(task_config).prompts("test", 64, 0)]
    lengths = [len(p) for p in ids]
    assert len(set(lengths)) > 2
    assert lengths != sorted(lengths)
    return ids


def draw(engine: HFEngine, prompts: list[list[int]], **sampling: float) -> Completions:
    return engine.generate(prompts, Sampling(max_new_tokens=CAP).model_copy(update=sampling))


# --- seeds ------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_tokens(engine: HFEngine, prompts: list[list[int]]):
    assert draw(engine, prompts, seed=3) == draw(engine, prompts, seed=3)


def test_other_seeds_draw_other_tokens(engine: HFEngine, prompts: list[list[int]]):
    draws = [draw(engine, prompts, seed=seed).ids for seed in range(5)]
    assert all(a != b for i, a in enumerate(draws) for b in draws[:i])


def test_equal_prompts_of_one_call_get_their_own_draws(engine: HFEngine, prompts: list[list[int]]):
    assert len({tuple(ids) for ids in draw(engine, [prompts[0]] * 50).ids}) > 25


def test_the_random_numbers_of_others_are_untouched(engine: HFEngine, prompts: list[list[int]]):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = draw(engine, prompts, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.rand(3), expected)
    assert draw(engine, prompts, seed=1) == first  # nor do they matter


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode(
    model: PreTrainedModel, engine: HFEngine, prompts: list[list[int]], training: bool
):
    model.train(training)
    draw(engine, prompts[:2])
    modes = {module.training for module in model.modules()}
    model.eval()
    assert modes == {training}


def test_sampling_changes_no_weight_and_keeps_no_gradient(
    model: PreTrainedModel, engine: HFEngine, prompts: list[list[int]]
):
    before = {name: p.clone() for name, p in model.named_parameters()}
    draw(engine, prompts[:4])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# --- where completions end --------------------------------------------------------------------


def test_a_completion_ends_at_its_eos_or_at_the_cap(
    engine: HFEngine, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase
):
    ids, truncated, _ = draw(engine, prompts * 4, seed=2)
    eos = tokenizer.eos_token_id
    assert 0.1 < sum(truncated) / len(truncated) < 0.9  # both happen
    for tokens, cut in zip(ids, truncated, strict=True):
        assert eos not in tokens[:-1]
        assert cut == (tokens[-1] != eos)
        assert len(tokens) == CAP if cut else 1 <= len(tokens) <= CAP


def test_an_eos_at_the_cap_is_an_end_and_no_cut(
    engine: HFEngine, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase
):
    ids, truncated, _ = draw(engine, prompts * 20, max_new_tokens=1)
    ended = [tokens == [tokenizer.eos_token_id] for tokens in ids]
    assert any(ended)
    assert truncated == [not end for end in ended]


def test_no_prompts_no_completions(engine: HFEngine):
    assert draw(engine, []) == Completions([], [], [])


def test_an_empty_prompt_is_refused(engine: HFEngine):
    with pytest.raises(ValueError, match="prompt has no tokens"):
        draw(engine, [[5, 6], []])


def test_the_cap_of_the_sampling_holds(engine: HFEngine, prompts: list[list[int]]):
    assert max(len(ids) for ids in draw(engine, prompts, max_new_tokens=3).ids) == 3


# --- greedy -----------------------------------------------------------------------------------


@torch.no_grad()
def argmax_by_hand(folder: Path, prompt: list[int], cap: int, eos: int) -> list[int]:
    """Plain transformers, one row, no cache, no padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(prompt)
    while len(ids) < len(prompt) + cap and (len(ids) == len(prompt) or ids[-1] != eos):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_temperature_0_takes_the_likeliest_token_at_each_step(
    engine: HFEngine,
    folder: Path,
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
):
    """In the order of the prompts, whatever batches and left padding they went through."""
    small = HFEngine(engine.model, special_ids(tokenizer), Limit(5, 10**6))
    expected = [argmax_by_hand(folder, p, CAP, tokenizer.eos_token_id) for p in prompts[:24]]
    assert len({tuple(ids) for ids in expected}) > 6  # or their order would not show
    for several in (engine, small):
        assert draw(several, prompts[:24], temperature=0.0).ids == expected


def test_greedy_takes_no_seed(engine: HFEngine, prompts: list[list[int]]):
    first = draw(engine, prompts, temperature=0.0, seed=1)
    assert draw(engine, prompts, temperature=0.0, seed=2) == first


def test_the_company_of_other_prompts_does_not_matter(engine: HFEngine, prompts: list[list[int]]):
    together = draw(engine, prompts, temperature=0.0).ids
    assert [draw(engine, [p], temperature=0.0).ids[0] for p in prompts[:16]] == together[:16]
    turned = draw(engine, prompts[::-1], temperature=0.0).ids
    assert turned[::-1] == together


def test_nor_does_it_change_what_a_prompt_draws(engine: HFEngine, prompts: list[list[int]]):
    """Else a token that rounding changes, and with it an end, would change all that follow."""
    together = draw(engine, prompts).ids
    assert len({len(ids) for ids in together}) > 3
    assert draw(engine, prompts[:16]).ids == together[:16]
    few = HFEngine(engine.model, engine.ids, Limit(5, 10**6))
    assert draw(few, prompts).ids == together
    small = HFEngine(engine.model, engine.ids, Limit(512, 100))
    assert draw(small, prompts).ids == together
    other = [prompts[0], *prompts[:1:-1], prompts[1]]
    assert draw(engine, other).ids[0] == together[0]


@pytest.mark.parametrize("limit", [Limit(5, 10**6), Limit(512, 100), Limit(512, 1)])
def test_a_batch_holds_no_more_than_the_limit_but_for_a_row_alone(
    engine: HFEngine, prompts: list[list[int]], limit: Limit, monkeypatch: pytest.MonkeyPatch
):
    batches, inner = [], HFEngine._generate_batch

    def seen(self: HFEngine, rows: list[list[int]], numbers: torch.Tensor, temperature: float):
        batches.append((len(rows), max(map(len, rows)) + numbers.shape[1]))
        return inner(self, rows, numbers, temperature)

    monkeypatch.setattr(HFEngine, "_generate_batch", seen)
    few = HFEngine(engine.model, engine.ids, limit)
    draw(few, prompts)
    assert sum(rows for rows, _ in batches) == len(prompts)
    for rows, tokens in batches:
        assert rows == 1 or (rows <= limit.rows and rows * tokens <= limit.tokens)


# --- the distribution -------------------------------------------------------------------------


def fits(found: list[int], expected: list[float]) -> float:
    """p-value of Pearson's chi-square; counts that are expected below 8 are taken as one."""
    pairs = sorted(zip(expected, found, strict=True))
    rare = [pair for pair in pairs if pair[0] < 8]
    often = [pair for pair in pairs if pair[0] >= 8]
    assert len(often) > 10
    if rare:
        often.append((sum(e for e, _ in rare), sum(f for _, f in rare)))
    return stats.chisquare([f for _, f in often], [e for e, _ in often]).pvalue


def first_token_fits(engine: HFEngine, prompt: list[int], temperature: float, seed: int) -> float:
    """p-value of 4,000 first tokens under softmax(logits / temperature)."""
    with torch.no_grad():
        logits = engine.model(torch.tensor([prompt])).logits[0, -1].double()
    tokens = draw(engine, [prompt] * 4000, max_new_tokens=1, temperature=temperature, seed=seed)
    found = torch.bincount(torch.tensor(tokens.ids).flatten(), minlength=len(logits))
    return fits(found.tolist(), (torch.softmax(logits / temperature, 0) * 4000).tolist())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_first_tokens_are_drawn_from_the_softmax(
    engine: HFEngine, prompts: list[list[int]], temperature: float
):
    for seed, prompt in enumerate(prompts[:3]):
        assert first_token_fits(engine, prompt, temperature, seed) > 1e-4


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-53])
def test_a_token_without_probability_is_never_drawn(
    uniform: float,
):
    """At the ends of the random numbers too: 0 falls on the first that has some."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0]] * 3)
    numbers = torch.full((3,), uniform, dtype=torch.float64)
    tokens, logprobs = hf._draw(logits, numbers, 1.0)
    assert tokens.tolist() == [1 if uniform < 0.5 else 3] * 3
    torch.testing.assert_close(logprobs, torch.full((3,), 0.5).log())


def test_the_test_of_the_softmax_sees_another_temperature(
    engine: HFEngine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    """So the test above could fail."""
    right = engine.generate
    monkeypatch.setattr(
        engine,
        "generate",
        lambda p, s: right(p, s.model_copy(update={"temperature": 1.25 * s.temperature})),
    )
    assert first_token_fits(engine, prompts[0], 1.0, 0) < 1e-4


def test_left_padding_does_not_change_the_distribution(engine: HFEngine, prompts: list[list[int]]):
    """The same prompt beside a longer one: 2,000 first tokens with padding, 2,000 without."""
    short, long = min(prompts, key=len), max(prompts, key=len)
    assert len(short) < len(long)
    alone = draw(engine, [short] * 2000, max_new_tokens=1, seed=1).ids
    padded = draw(engine, [short] * 2000 + [long] * 2000, max_new_tokens=1, seed=2).ids[:2000]
    counts = torch.stack(
        [torch.bincount(torch.tensor(ids).flatten(), minlength=200) for ids in (alone, padded)]
    )
    common = counts[:, counts.sum(0) >= 20]
    assert common.shape[1] > 5
    assert stats.chi2_contingency(common.numpy()).pvalue > 1e-4


def test_whole_completions_are_as_likely_as_the_model_says(
    engine: HFEngine, prompts: list[list[int]]
):
    """All completions under a cap of two tokens, enumerated: their probabilities add to 1, and
    samples fit them. It holds the sampler's cache, positions and EOS to the scorer's."""
    eos, size = engine.ids.eos, engine.model.config.vocab_size
    every = [(a, b) for a in range(size) for b in range(size) if a != eos] + [(eos,)]
    rows = [prompts[0]] * len(every)
    logps = score_logps(
        engine.model, rows, [list(c) for c in every], engine.ids.pad, Limit(2000, 10**6)
    )
    probabilities = logps.double().exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    drawn = draw(engine, [prompts[0]] * 6000, max_new_tokens=2, seed=4).ids
    counts = Counter(map(tuple, drawn))
    expected = (6000 * probabilities / probabilities.sum()).tolist()
    assert fits([counts[c] for c in every], expected) > 1e-4


@torch.no_grad()
def test_long_completions_are_no_more_surprising_than_the_model_expects(
    engine: HFEngine, prompts: list[list[int]]
):
    """E[-log p(token)] is the entropy at each step, also after other rows have ended and left."""
    many = prompts * 20
    ids, truncated, _ = draw(engine, many, seed=9)
    assert 0.2 < sum(truncated) / len(truncated) < 0.8
    batch = collate(many, ids, engine.ids.pad)
    logits = completion_logits(engine.model, batch).double()
    logprobs = logits.log_softmax(-1)
    entropy = batch.spread(-(logprobs.exp() * logprobs).sum(-1))
    excess = -gather_logprobs(logits, batch) - entropy
    for late in (slice(0, 3), slice(3, 8), slice(8, CAP)):
        sums = masked_sum(excess[:, late], batch.mask[:, late])[batch.mask[:, late].any(1)]
        assert len(sums) > 300
        assert abs(sums.mean()) < 4 * sums.std() / len(sums) ** 0.5


def test_a_generation_config_beside_the_weights_does_not_leak_in(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    tmp_path: Path,
):
    """Chat models ship top-p, top-k and repetition penalties: training samples from the policy."""
    model = load_policy(folder)
    plain = HFEngine(load_policy(folder), special_ids(tokenizer))
    settings = {"do_sample": True, "top_k": 2, "top_p": 0.5, "temperature": 0.6, "min_p": 0.2,
                "repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "max_length": 9,
                "min_new_tokens": 5, "typical_p": 0.4, "epsilon_cutoff": 0.01,
                "suppress_tokens": list(range(3, 40))}  # fmt: skip
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    save(model, tokenizer, tmp_path)
    shipped = HFEngine(load_policy(tmp_path), special_ids(tokenizer))
    assert shipped.model.generation_config.repetition_penalty == 3.0  # it did come along
    greedy = [draw(e, prompts[:8], temperature=0.0) for e in (plain, shipped)]
    assert greedy[0] == greedy[1]
    sampled = [draw(e, prompts[:8], seed=1) for e in (plain, shipped)]
    assert sampled[0] == sampled[1]


# --- what is said of each token ---------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_each_token_comes_with_the_log_probability_it_was_drawn_with(
    engine: HFEngine, prompts: list[list[int]], temperature: float
):
    """At temperature 0 that of temperature 1."""
    drawn = draw(engine, prompts, temperature=temperature)
    batch = collate(prompts, drawn.ids, engine.ids.pad)
    with torch.no_grad():
        expected = gather_logprobs(
            completion_logits(engine.model, batch, temperature or 1.0), batch
        )
    for row, logprobs in zip(expected, drawn.logprobs, strict=True):
        assert logprobs == pytest.approx(row[: len(logprobs)].tolist(), abs=1e-4)


def test_a_prompt_is_read_once_for_all_of_its_completions(engine: HFEngine):
    seen: list[int] = []
    hook = engine.model.get_input_embeddings().register_forward_hook(
        lambda _, __, out: seen.append(out.shape[0] * out.shape[1])
    )
    drawn = engine.generate([[5, 6, 7]] * 8 + [[8, 9]], Sampling(max_new_tokens=3, seed=1))
    hook.remove()
    assert seen[0] == (3 + 2 if packs(engine.model) else 2 * 3)
    assert len({tuple(ids) for ids in drawn.ids[:8]}) > 1


def test_rows_that_go_on_stay_where_they_are_and_others_fill_the_gaps():
    going = torch.tensor([True, False, True, True, False, True, False, True])
    order = moved_up(going).tolist()
    assert sorted(order) == going.nonzero().squeeze(1).tolist()
    assert order == [0, 5, 2, 3, 7]
    assert moved_up(torch.ones(3, dtype=torch.bool)).tolist() == [0, 1, 2]


@torch.no_grad()
@pytest.mark.parametrize("written_in_c", [True, False])
@pytest.mark.parametrize("size", [16, 40, 64])
@pytest.mark.parametrize(("heads", "kv"), [(2, 2), (6, 2), (9, 1)])
def test_a_step_says_what_a_forward_pass_over_the_whole_row_says(
    heads: int, kv: int, size: int, written_in_c: bool, monkeypatch: pytest.MonkeyPatch
):
    """Rows of 1 to 40 tokens that grow by 20, some of which end on the way; queries in groups."""
    monkeypatch.setattr(ops, "_active", ops.Shortcuts(c=written_in_c))
    shape = {"hidden_size": 144, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": size}
    torch.manual_seed(0)
    plain = LlamaForCausalLM(
        LlamaConfig(vocab_size=70, num_attention_heads=heads, num_key_value_heads=kv, **shape)
    ).eval()
    for weights in plain.parameters():
        weights *= 8 if weights.ndim == 2 else 1
    model = let_pack(copy.deepcopy(plain))
    prompts, rows = [[5], [*range(7, 47)], [5, 6, 7], [*range(8, 25)]], [0, 1, 1, 2, 3, 0]
    texts, tokens = [prompts[row] for row in rows], torch.randint(70, (20, 6))
    run = Decoding(model, prompts, torch.tensor(rows), room=20)
    logits = run.start()
    for step, drawn in enumerate(tokens):
        for text, found in zip(texts, logits, strict=True):
            truth = plain(torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(found, truth, atol=1e-3, rtol=1e-4)
        if step == 10:  # the second ends, and the last takes its place
            stay = [0, 5, 2, 3, 4]
            run.keep(torch.tensor(stay))
            texts = [texts[i] for i in stay]
        drawn = drawn[: len(texts)]
        texts = [[*text, token] for text, token in zip(texts, drawn.tolist(), strict=True)]
        logits = run.step(drawn)


def test_threads_change_no_bit_of_a_step():
    layer, found = SimpleNamespace(layer_idx=0), []
    config = LlamaConfig(num_hidden_layers=1)
    model = cast(PreTrainedModel, SimpleNamespace(config=config, device=torch.device("cpu")))
    query, key = torch.randn(7, 6, 32), torch.randn(7, 2, 32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            run = Decoding(model, [[5] * 9, [6] * 30], torch.tensor([0, 1, 0, 0, 1, 1, 0]), room=4)
            run.first = torch.tensor([21, 0, 21, 21, 0, 0, 21])
            run.tokens = torch.arange(30).expand(7, 30)
            values = torch.arange(30.0)[:, None, None].expand(30, 2, 32)
            run.take(layer, torch.ones(30, 2, 32), values)
            found.append(run.attend(layer, query, key, key, 0.2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
