"""Models: saved folders are plain transformers folders; a score is the same wherever it is read."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from shared.config import InputError
from shared.models.load import (
    ModelConfig,
    frozen,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    new_policy,
    new_scalar_model,
    save,
    scalar_head,
    sequence_scores,
    special_ids,
    state_values,
)
from shared.models.logprobs import completion_logits, sequence_logps
from shared.models.scorer import Scorer
from shared.models.sequences import Limit, collate
from shared.tasks.registry import TaskConfig, make_task

Rows = tuple[list[list[int]], list[list[int]]]


@pytest.fixture(scope="module")
def rows(task_config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """40 prompts of several lengths with completions of several lengths, most with their EOS."""
    corpus = make_task(task_config).corpus(40, seed=1)
    prompts = [tokenizer(prompt).input_ids for prompt, _ in corpus]
    eos = [special_ids(tokenizer).eos]
    completions = [
        tokenizer(text).input_ids + (eos if number % 5 else [])
        for number, (_, text) in enumerate(corpus)
    ]
    return prompts, completions


def right_padded(rows: Rows, pad: int) -> tuple[Tensor, Tensor]:
    """(ids, attention), prompt and completion in one row, padded behind: anyone else's layout."""
    whole = [p + c for p, c in zip(*rows, strict=True)]
    width = max(map(len, whole))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in whole])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole])


# --- saved folders ----------------------------------------------------------------------------


@torch.no_grad()
def test_plain_transformers_loads_a_saved_policy_and_gives_the_same_logits(
    policy_folder: Path, rows: Rows, tokenizer: PreTrainedTokenizerBase
):
    plain = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32).eval()
    batch = collate(*rows, special_ids(tokenizer).pad)
    logits = completion_logits(load_policy(policy_folder).eval(), batch)
    ours = logits.split(batch.lengths.tolist())
    for found, prompt, completion in zip(ours, *rows, strict=True):
        alone = plain(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_plain_transformers_scores_a_padded_batch_as_we_do(
    reward_folder: Path, rows: Rows, tokenizer: PreTrainedTokenizerBase
):
    """It finds the last token by the pad id, we by length: pad is never EOS, so both agree."""
    plain = AutoModelForSequenceClassification.from_pretrained(
        reward_folder, num_labels=1, dtype=torch.float32
    ).eval()
    ids, attention = right_padded(rows, special_ids(tokenizer).pad)
    theirs = plain(input_ids=ids, attention_mask=attention).logits.squeeze(-1)
    ours = Scorer(reward_folder).score_all(*rows, limit=Limit(7, 10**6))
    torch.testing.assert_close(ours * 2.0 + 0.25, theirs, atol=1e-5, rtol=1e-5)
    assert theirs.std() > 0.01


def test_a_saved_folder_holds_safetensors_and_nothing_that_runs(reward_folder: Path):
    suffixes = {path.suffix for path in reward_folder.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".jinja"}


def test_a_saved_tokenizer_is_the_same_tokenizer(
    policy_folder: Path, tokenizer: PreTrainedTokenizerBase
):
    again, plain = load_tokenizer(policy_folder), AutoTokenizer.from_pretrained(policy_folder)
    text = "the plot was not very dull but"
    assert again(text).input_ids == plain(text).input_ids == tokenizer(text).input_ids
    assert special_ids(again) == special_ids(tokenizer)


def test_saving_and_loading_changes_no_bit(
    policy_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    first = load_policy(policy_folder)
    save(first, tokenizer, tmp_path)
    for name, weights in load_policy(tmp_path).state_dict().items():
        assert torch.equal(weights, first.state_dict()[name]), name


# --- scores -----------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model: PreTrainedModel, ids: list[int]) -> float:
    """The head at the last token of one row without any padding."""
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    return float(hidden @ model.score.weight[0])


def test_a_score_is_read_at_the_last_token_whatever_stands_inside_the_row(
    reward_folder: Path, rows: Rows, tokenizer: PreTrainedTokenizerBase
):
    """A policy may sample PAD, and a prompt may hold EOS: neither ends a row."""
    pad, eos = special_ids(tokenizer).pad, special_ids(tokenizer).eos
    prompts = [[eos, *rows[0][0]], [*rows[0][1][:2], pad, 9], rows[0][2], [pad, 4], rows[0][4]]
    completions = [[5, pad, 6, eos], [7, eos, 8], [pad, pad, 9], [pad], [3, 4, 5, 6, 7, 8, eos]]
    scorer = Scorer(reward_folder)
    expected = [
        (by_hand(scorer.model, p + c) - 0.25) / 2.0
        for p, c in zip(prompts, completions, strict=True)
    ]
    found = scorer.score_all(prompts, completions)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_the_company_of_other_rows_does_not_change_a_score(reward_folder: Path, rows: Rows):
    scorer = Scorer(reward_folder)
    whole = scorer.score_all(*rows)
    for batch_size in (1, 3, 17):
        torch.testing.assert_close(
            scorer.score_all(*rows, limit=Limit(batch_size, 10**6)), whole, atol=1e-5, rtol=1e-5
        )
    turned = scorer.score_all(rows[0][::-1], rows[1][::-1], limit=Limit(7, 10**6))
    torch.testing.assert_close(turned.flip(0), whole, atol=1e-5, rtol=1e-5)


def test_normalisation_is_raw_minus_offset_over_scale(
    policy_folder: Path, rows: Rows, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    save(new_scalar_model(policy_folder, seed=1), tokenizer, tmp_path)
    raw = Scorer(tmp_path).score_all(*rows)  # no normalisation.json: raw scores
    (tmp_path / "normalisation.json").write_text(json.dumps({"offset": -3.0, "scale": 0.5}))
    torch.testing.assert_close(Scorer(tmp_path).score_all(*rows), (raw + 3.0) / 0.5)


def test_a_scorer_does_not_train(reward_folder: Path, rows: Rows):
    scorer = Scorer(reward_folder)
    assert not scorer.model.training
    assert not any(p.requires_grad for p in scorer.model.parameters())
    assert not scorer.score_all(*rows).requires_grad


@torch.no_grad()
def test_a_state_value_sees_the_tokens_before_and_not_the_token_itself(
    reward_folder: Path, rows: Rows, tokenizer: PreTrainedTokenizerBase
):
    model = load_scalar_model(reward_folder).eval()
    values = state_values(model, collate(*rows, special_ids(tokenizer).pad))
    for i, (prompt, completion) in enumerate(zip(*rows, strict=True)):
        expected = [by_hand(model, prompt + completion[:t]) for t in range(len(completion))]
        torch.testing.assert_close(
            values[i, : len(completion)], torch.tensor(expected), atol=1e-5, rtol=1e-5
        )


def test_a_policys_folder_is_not_taken_for_a_reward_model(policy_folder: Path):
    """Its head would be random numbers: scores without any meaning."""
    with pytest.raises(InputError, match="reward"):
        Scorer(policy_folder)


# --- the scalar head --------------------------------------------------------------------------


def test_a_new_head_is_normal_with_deviation_1_over_sqrt_hidden_plus_1(policy_folder: Path):
    heads = [scalar_head(new_scalar_model(policy_folder, seed)) for seed in range(40)]
    assert all(head.bias is None or not head.bias.any() for head in heads)
    weights = torch.cat([head.weight.flatten() for head in heads])
    hidden = heads[0].in_features
    assert weights.numel() == 40 * hidden
    expected = (hidden + 1) ** -0.5
    assert weights.std().item() == pytest.approx(expected, rel=4 / (2 * 40 * hidden) ** 0.5)
    assert abs(weights.mean().item()) < 4 * expected / (40 * hidden) ** 0.5


def test_a_new_heads_seed_decides_it(policy_folder: Path):
    first, again, other = (
        scalar_head(new_scalar_model(policy_folder, seed)).weight for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_new_scalar_model_keeps_the_policys_trunk(policy_folder: Path):
    trunk = load_policy(policy_folder).model.state_dict()
    model = new_scalar_model(policy_folder, seed=0)
    assert all(torch.equal(w, trunk[name]) for name, w in model.model.state_dict().items())


def test_a_head_with_two_outputs_is_refused(policy_folder: Path):
    model = AutoModelForSequenceClassification.from_pretrained(policy_folder, num_labels=2)
    with pytest.raises(InputError, match="score"):
        scalar_head(model)


# --- the frozen reference ---------------------------------------------------------------------


def test_a_frozen_copy_shares_no_memory_and_gets_no_gradient(
    policy_folder: Path, rows: Rows, tokenizer: PreTrainedTokenizerBase
):
    model = load_policy(policy_folder).train()
    reference = frozen(model)
    theirs = {p.data_ptr() for p in model.parameters()}
    assert theirs.isdisjoint(p.data_ptr() for p in reference.parameters())
    assert not any(p.requires_grad for p in reference.parameters())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())  # the copy alone is frozen
    assert not reference.training
    batch = collate(*rows, special_ids(tokenizer).pad)
    before = sequence_logps(reference, batch)
    (sequence_logps(model, batch) - before).square().sum().backward()
    assert all(p.grad is None for p in reference.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    torch.testing.assert_close(sequence_logps(reference, batch), before, rtol=0, atol=0)


# --- dropout ----------------------------------------------------------------------------------


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=120, n_positions=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.5,
            embd_pdrop=0.5, attn_pdrop=0.5, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, attention_dropout=0.5, hidden_dropout=0.5, pad_token_id=0,
            eos_token_id=1, bos_token_id=None,
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, intermediate_size=64, attention_dropout=0.5, pad_token_id=0,
            eos_token_id=1, bos_token_id=None,
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64,
            max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5,
            activation_dropout=0.5, layerdrop=0.5, pad_token_id=0, eos_token_id=1,
            bos_token_id=None,
        )
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Path:
    """A folder with a tiny model of another family, with as much dropout as it has places for."""
    torch.manual_seed(0)
    save(FAMILIES[request.param](), tokenizer, tmp_path)
    return tmp_path


def differs(model: PreTrainedModel) -> bool:
    """Whether two forward passes in train mode disagree."""
    ids = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = model.train()(ids).logits, model(ids).logits
    return not torch.equal(first, second)


def test_dropout_is_off_in_train_mode_in_every_family(family: Path):
    assert differs(AutoModelForCausalLM.from_pretrained(family))  # it was there
    policy = load_policy(family)
    assert not differs(policy)
    assert not differs(frozen(policy))


def test_a_reward_model_of_every_family_trains_without_dropout(family: Path):
    model = new_scalar_model(family, seed=0).train()
    batch = collate([[3, 4, 5], [6]], [[7, 8, 1], [9, 1]], 0)
    with torch.no_grad():
        first, second = sequence_scores(model, batch), sequence_scores(model, batch)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        alone = [sequence_scores(model, collate([p], [c], 0))
                 for p, c in [([3, 4, 5], [7, 8, 1]), ([6], [9, 1])]]  # fmt: skip
    torch.testing.assert_close(first, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_policy_from_scratch_has_no_dropout(tokenizer: PreTrainedTokenizerBase):
    model = new_policy(ModelConfig(hidden_size=32, layers=1), tokenizer, seed=0)
    assert not differs(model)


# --- a policy from scratch --------------------------------------------------------------------


def test_a_new_policys_seed_decides_it(tokenizer: PreTrainedTokenizerBase):
    config = ModelConfig(hidden_size=32, layers=1, intermediate_size=64)
    first, again, other = (
        new_policy(config, tokenizer, seed).get_input_embeddings().weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_new_policy_is_of_the_size_that_was_asked(tokenizer: PreTrainedTokenizerBase):
    config = ModelConfig(hidden_size=64, layers=3, intermediate_size=96)
    model = new_policy(config, tokenizer, seed=0)
    layer = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64  # attention, gated MLP, two norms
    assert sum(p.numel() for p in model.parameters()) == len(tokenizer) * 64 + 3 * layer + 64
    assert model.config.head_dim == 32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = special_ids(tokenizer)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (ids.pad, ids.eos)


# --- what is refused --------------------------------------------------------------------------


def test_a_tokenizer_whose_pad_is_its_eos_is_refused_with_the_way_out(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    same.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="add_special_tokens") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("token", ["pad_token", "eos_token"])
def test_a_tokenizer_without_pad_or_eos_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, token: str
):
    without = copy.deepcopy(tokenizer)
    setattr(without, token, None)
    without.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="EOS"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("load", [load_policy, load_scalar_model, load_tokenizer, Scorer])
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_a_model_is_the_users_error(
    tmp_path: Path, load: Callable[[Path], object], there: bool
):
    folder = tmp_path / "nosuch"
    if there:
        folder.mkdir()
    with pytest.raises(InputError, match="nosuch"):
        load(folder)
