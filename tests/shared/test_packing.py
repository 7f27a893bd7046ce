"""Packed passes: the same numbers as one row at a time, from fewer tokens."""

import copy
import json
from pathlib import Path

import pytest
import torch
from checks import beginnings, kept_tokens
from families import CONFIGS, EOS, GROUPED, PAD, SIZE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.pytorch_utils import Conv1D

from shared.generation.engine import Sampling
from shared.generation.hf import HFEngine
from shared.models import ops
from shared.models.load import SpecialIds, sequence_scores, state_values, without_dropout
from shared.models.logprobs import token_logprobs
from shared.models.packing import let_pack, pack, packs
from shared.models.sequences import Sequences, collate

# Rows that begin alike: as one prompt, with longer prompts, past their prompts, and to the end
PROMPTS = [[7, 8, 9], [7, 8, 9, 10, 11], [9], [7, 8, 9], [9], [PAD, 8, 9], [8, 9], [7, 8], [9]]
COMPLETIONS = [
    *([5, 6, 7, EOS], [EOS], [5] * 8, [6, EOS], [12, 13, EOS], [5, 6], [PAD, 5, EOS]),
    *([9, 5, 6, 7, 4], [12, 13, EOS]),
]
ROWS = [[*p, *c] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


def policy(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = without_dropout(AutoModelForCausalLM.from_config(config))
    with torch.no_grad():  # random but not small, so that attention matters
        for weights in model.parameters():
            if weights.ndim == 2:
                weights *= 5
    return model


def classifier(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    return without_dropout(model)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return request.param


def batch_of() -> Sequences:
    return collate(PROMPTS, COMPLETIONS, PAD)


def test_log_probabilities_are_those_of_each_row_alone(config: PreTrainedConfig):
    model = policy(config)
    with torch.no_grad():
        alone = [
            model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1].log_softmax(-1)
            for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
        ]
        found = token_logprobs(let_pack(model), batch_of())
    assert packs(model)
    for row, (truth, completion) in enumerate(zip(alone, COMPLETIONS, strict=True)):
        expected = truth[range(len(completion)), completion]
        torch.testing.assert_close(found[row, : len(completion)], expected, atol=2e-5, rtol=1e-5)
        assert (found[row, len(completion) :] == 0).all()


def test_gradients_are_those_of_padded_rows(config: PreTrainedConfig):
    model = policy(config)
    weights = torch.rand(batch_of().mask.shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for _ in range(2):
        (token_logprobs(model, batch_of()) * weights).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        let_pack(model)
    for padded, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, padded, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("logits_at_once", [SIZE["vocab_size"], 7 * SIZE["vocab_size"] + 3, 1])
def test_logits_in_blocks_give_the_same_numbers_and_gradients(
    config: PreTrainedConfig, logits_at_once: int
):
    model = let_pack(policy(config))
    weights = torch.rand(batch_of().mask.shape, generator=torch.Generator().manual_seed(0))
    heads: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _, __, logits: heads.append(logits.shape[0])
    )
    found = []
    for most in (ops.Shortcuts().block, logits_at_once):
        model.zero_grad()
        with ops.using(ops.Shortcuts(block=most)):
            numbers = token_logprobs(model, batch_of(), 0.7)
            (numbers * weights).sum().backward()
        found.append([numbers.detach(), *(p.grad.clone() for p in model.parameters())])
    hook.remove()
    tokens = sum(map(len, COMPLETIONS))
    assert heads[0] == tokens
    assert max(heads[1:]) == max(1, logits_at_once // SIZE["vocab_size"])
    assert sum(heads[1:]) == 2 * tokens  # once more for the gradient
    for whole, blocks in zip(*found, strict=True):
        torch.testing.assert_close(blocks, whole, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_values_and_scores_are_those_of_padded_rows(config: PreTrainedConfig):
    model, batch = classifier(config), batch_of()
    values, scores = state_values(model, batch), sequence_scores(model, batch)
    let_pack(model)
    torch.testing.assert_close(sequence_scores(model, batch), scores, atol=1e-5, rtol=1e-5)
    found = state_values(model, batch)
    torch.testing.assert_close(found[batch.mask], values[batch.mask], atol=1e-5, rtol=1e-5)


def test_what_rows_begin_with_is_computed_once_and_padding_never():
    batch, tokens = batch_of(), len(beginnings(ROWS))
    packed = pack(batch, batch.last)
    assert packed.ids.shape == packed.positions.shape == (1, tokens)
    assert packed.back.shape == (tokens,)
    assert packed.rows.shape == (9, 9)  # the longest row: a prompt of 1 with a completion of 8


def test_each_row_reads_its_own_tokens_in_their_order():
    batch = batch_of()
    packed = pack(batch, batch.last)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        whole = prompt + completion
        number = packed.rows[row, : len(whole)]
        assert packed.ids[0, number].tolist() == whole
        assert packed.positions[0, number].tolist() == list(range(len(whole)))
        assert packed.place[row][batch.attention[row].bool()].tolist() == number.tolist()
    every = packed.rows.flatten()[packed.back]
    assert every.tolist() == list(range(len(every)))  # each token's attention comes back to it


@pytest.mark.parametrize("first", range(4))
def test_no_token_at_the_start_of_a_prompt_is_taken_for_padding(first: int):
    """[first, 8, 9] beside [8, 9], which padding makes as long: two prompts, pad and EOS too."""
    batch = collate([[first, 8, 9], [8, 9]], [[5], [6]], PAD)
    packed = pack(batch, batch.last)
    assert packed.ids.shape == (1, 3 + 2 + 2)
    assert packed.ids[0, packed.rows].tolist()[0] == [first, 8, 9, 5]
    assert packed.ids[0, packed.rows].tolist()[1][:3] == [8, 9, 6]


def test_what_lies_under_the_padding_changes_nothing():
    model, batch = let_pack(policy(CONFIGS["llama"])), batch_of()
    other = batch.ids.where(batch.attention.bool(), torch.tensor(30))
    with torch.no_grad():
        found, again = (token_logprobs(model, batch._replace(ids=i)) for i in (batch.ids, other))
    assert torch.equal(found, again)


@pytest.mark.parametrize("name", CONFIGS)
def test_sampling_is_the_same_with_packing_on(name: str):
    draws = []
    for switch in (lambda model: model, let_pack):
        engine = HFEngine(switch(policy(CONFIGS[name])), SpecialIds(PAD, EOS))
        draws.append(engine.generate(PROMPTS, Sampling(max_new_tokens=6, seed=3)))
    plain, packed = draws
    assert (plain.ids, plain.truncated) == (packed.ids, packed.truncated)
    for alone, found in zip(plain.logprobs, packed.logprobs, strict=True):
        assert found == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(**SIZE, hidden_size=32, n_layer=2, n_head=4),
        Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ],
    ids=["unknown family", "sliding window"],
)
def test_models_that_need_more_than_causal_rows_stay_as_they_are(config: PreTrainedConfig):
    model = AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    assert not packs(let_pack(model))
    assert model.config._attn_implementation == before


def test_a_saved_model_knows_nothing_of_it(tmp_path: Path):
    let_pack(policy(CONFIGS["llama"])).save_pretrained(tmp_path)
    assert "klash" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert not packs(AutoModelForCausalLM.from_pretrained(tmp_path))


BLOOM = BloomConfig(**SIZE, hidden_size=32, n_layer=2, n_head=4)


@torch.no_grad()
def test_log_probabilities_where_positions_are_not_read_are_those_of_each_row_alone():
    """BLOOM runs unpacked and has no position ids: only the mask keeps padding out of its rows."""
    model = let_pack(policy(BLOOM))
    assert not packs(model)
    found = token_logprobs(model, batch_of())
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(completion)), completion]
        torch.testing.assert_close(found[row, : len(completion)], expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_scores_where_positions_are_not_read_are_those_of_each_row_alone():
    model = let_pack(classifier(BLOOM))
    found = sequence_scores(model, batch_of())
    rows = zip(PROMPTS, COMPLETIONS, strict=True)
    alone = [sequence_scores(model, collate([p], [c], PAD))[0] for p, c in rows]
    torch.testing.assert_close(found, torch.stack(alone), atol=2e-5, rtol=1e-5)


def test_distinct_tokens_are_those_that_packing_leaves():
    batch, every, rows = batch_of(), beginnings(ROWS), zip(PROMPTS, COMPLETIONS, strict=True)
    before = {(*p, *c[:end]) for p, c in rows for end in range(len(c))}
    needed, lengths = beginnings(row[:-1] for row in ROWS), [*map(len, ROWS)]
    assert kept_tokens(batch, batch.predicting) == (
        len(needed), len(before), [n - 1 for n in lengths]
    )  # fmt: skip
    assert kept_tokens(batch, batch.last) == (len(every), len(set(map(tuple, ROWS))), lengths)
    same = collate([[5, 6]] * 3 + [[6]], [[7], [8], [9], [7]], PAD)
    assert kept_tokens(same, same.predicting) == (2 + 1, 2, [2, 2, 2, 1])


@torch.no_grad()
def test_a_token_that_nothing_reads_is_not_computed(config: PreTrainedConfig):
    """The end of a completion predicts nothing; a score is read there."""
    policy_, reward, seen = let_pack(policy(config)), let_pack(classifier(config)), []
    for model in (policy_, reward):
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].flatten().tolist())
        )
    batch = collate([[7, 8], [7, 8], [9]], [[5, EOS], [6, 5, EOS], [EOS]], PAD)
    token_logprobs(policy_, batch)
    state_values(reward, batch)
    sequence_scores(reward, batch)
    read, every = [5, 5, 6, 7, 8, 9], [EOS, EOS, EOS, 5, 5, 6, 7, 8, 9]
    assert [*map(sorted, seen)] == [read, read, every]


def test_the_last_mlp_sees_the_tokens_that_are_read_and_no_other(config: PreTrainedConfig):
    """A first layer's sees all; generation, which is not packed, goes through it as ever."""
    policy_, reward = let_pack(policy(config)), let_pack(let_pack(classifier(config)))
    seen: list[int] = []
    for model in (policy_, reward):
        below = getattr(model, model.base_model_prefix)
        for layer in below.h if config.model_type == "gpt2" else below.layers:
            inner = next(m for m in layer.mlp.modules() if isinstance(m, torch.nn.Linear | Conv1D))
            inner.register_forward_hook(lambda _, __, out: seen.append(out.shape[-2]))
    batch = batch_of()
    needed, predicting, _ = kept_tokens(batch, batch.predicting)
    tokens, ends, _ = kept_tokens(batch, batch.last)
    token_logprobs(policy_, batch_of())
    sequence_scores(reward, batch_of())
    state_values(reward, batch_of())
    assert seen == [needed, predicting, tokens, ends, needed, predicting]
    assert ends < predicting < needed < tokens
    seen.clear()
    policy_(torch.tensor([[5, 6, 7, 8]]))
    assert seen == [4, 4]


def test_without_c_the_same_is_said(config: PreTrainedConfig):
    found, drawn = [], []
    for c in (True, False):
        with ops.using(ops.Shortcuts(c=c)):
            model = let_pack(policy(config))
            numbers = token_logprobs(model, batch_of())
            numbers.sum().backward()
            found.append([numbers.detach(), *(p.grad for p in model.parameters())])
            engine = HFEngine(model, SpecialIds(PAD, EOS))
            drawn.append(engine.generate([[5, 6], [7], [5, 6, 8]], Sampling(max_new_tokens=6)).ids)
    assert drawn[0] == drawn[1]
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=2e-4, rtol=1e-4)
