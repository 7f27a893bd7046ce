"""LoRA and the value head of a policy: what trains, what is saved, and what stays as it was."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import close, weights
from families import CONFIGS
from safetensors import safe_open
from test_packing import batch_of, policy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpo.filtered import Filter, FilterConfig, train_filtered
from dpo.train import DirectConfig, DirectData, train_direct
from shared.generation.engine import Sampling
from shared.generation.hf import HFEngine
from shared.generation.start import Drawing
from shared.models.cost import Meter
from shared.models.load import SpecialIds, Start, save
from shared.models.logprobs import logprobs_and_values, policy_values, token_logprobs
from shared.models.lora import (
    LoRAConfig,
    add_value_head,
    merged,
    plain_weights,
    value_head,
    with_lora,
)
from shared.models.packing import let_pack
from shared.models.sequences import Sequences
from shared.training.finished import read_log
from shared.training.fit import OptimizerConfig, prepare, step

LORA = LoRAConfig(rank=4, alpha=8)
STEADY = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_share=0.0)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return request.param


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with an adapter that says something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name or "value_head" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def start(config: PreTrainedConfig) -> PreTrainedModel:
    """A policy whose biases, where it has any, are not the zeros that they begin as."""
    model, generator = policy(config), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".bias"):
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return let_pack(model)


# The adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapted_layer_says_and_learns_what_pefts_does(dtype: torch.dtype):
    """In float32 by our operation, in a region of bfloat16 by peft's own."""
    model: Any = moved(with_lora(start(CONFIGS["qwen2"]), LORA, seed=0))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.base_layer.bias.abs().min() > 0
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    learned = x, layer.lora_A.default.weight, layer.lora_B.default.weight
    found = []
    for forward in (layer, partial(type(layer).forward, layer)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = forward(x)
        assert y.dtype in (torch.float32, dtype)  # C does not round sums
        found.append([y, *torch.autograd.grad(y.float().square().sum(), learned)])
    for ours, pefts in zip(*found, strict=True):
        close(ours, pefts, 0 if dtype == torch.bfloat16 else 1e-4)


@torch.no_grad()
def test_a_fresh_adapter_and_one_switched_off_are_the_start_to_the_bit(config: PreTrainedConfig):
    base = start(config)
    expected = token_logprobs(base, batch_of())
    model = with_lora(base, LORA, seed=0)
    assert torch.equal(token_logprobs(model, batch_of()), expected)
    moved(model)
    assert (token_logprobs(model, batch_of()) - expected).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(token_logprobs(model, batch_of()), expected)


def test_only_the_adapter_trains_and_it_is_as_large_as_its_rank_says():
    base = start(CONFIGS["llama"])
    shapes = [m.weight.shape for n, m in base.named_modules() if n.endswith("_proj")]
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = with_lora(base, LORA, seed=0)
    training = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sum(training) == sum(4 * (out + into) for out, into in shapes)
    trainee = prepare(model, STEADY, steps=2)
    for _ in range(2):  # B = 0 lets nothing through to A in the first
        step(trainee, [(batch_of(), 1.0)], lambda m, b: (-token_logprobs(m, b).sum(), {}))
    for name, p in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if ".lora_" in name:
            assert p.abs().max() > 0
        else:
            assert torch.equal(p, before[plain])


def test_the_difference_is_scaled_by_alpha_over_rank():
    """W + alpha / rank * B A, equation 3 of Hu et al. 2021 and the lines below it."""
    model = moved(with_lora(start(CONFIGS["llama"]), LoRAConfig(rank=4, alpha=6), seed=0))
    name = "model.layers.1.mlp.down_proj.weight"
    parts = dict(model.named_parameters())
    inside = f"base_model.model.{name.removesuffix('.weight')}"
    a, b = (parts[f"{inside}.lora_{side}.default.weight"] for side in "AB")
    expected = parts[f"{inside}.base_layer.weight"] + 6 / 4 * b @ a
    close(dict(plain_weights(model))[name], expected)


def test_the_seed_draws_the_adapter_and_moves_no_other_random_number():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    same, again, other = (with_lora(start(CONFIGS["llama"]), LORA, seed=s) for s in (1, 1, 2))
    torch.manual_seed(5)
    model = start(CONFIGS["llama"])
    torch.manual_seed(5)
    with_lora(model, LORA, seed=9)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weights(same), weights(again))
    assert not torch.equal(weights(same), weights(other))


def test_without_a_configuration_the_model_is_left_alone():
    model = start(CONFIGS["llama"])
    assert with_lora(model, None, seed=0) is model


# Saving


def test_a_saved_lora_policy_is_a_plain_folder_that_says_the_same(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    plain = start(config)
    save(plain, tokenizer, tmp_path / "plain")
    model = moved(add_value_head(with_lora(plain, LORA, seed=0)))
    with torch.no_grad():
        expected = token_logprobs(model, batch_of())
    save(model, tokenizer, tmp_path / "lora")
    names = []
    for folder in ("plain", "lora"):
        with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1]
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
    with torch.no_grad():
        close(token_logprobs(read, batch_of()), expected, 5e-5)
        close(token_logprobs(model, batch_of()), expected, 0)  # saving changed nothing


# Sampling


class Asked(TorchDispatchMode):
    """Counts products of tokens with a part of the adapter: B A alone is not one."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        parts = (p for name, p in model.named_parameters() if ".lora_" in name)
        self.parts = {p.untyped_storage().data_ptr() for p in parts}
        self.times = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith(("mm", "addmm")):
            factors = [t.untyped_storage().data_ptr() in self.parts for t in args[-2:]]
            self.times += factors.count(True) == 1
        return func(*args, **(kwargs or {}))


def test_within_merged_the_policy_says_the_same_and_no_adapter_is_asked(config: PreTrainedConfig):
    model = moved(with_lora(start(config), LORA, seed=0))
    before = weights(model).clone()
    with torch.no_grad():
        with Asked(model) as asked:
            expected = token_logprobs(model, batch_of())
        assert asked.times > 0
        with pytest.raises(ZeroDivisionError), merged(model):
            with Asked(model) as asked:
                close(token_logprobs(model, batch_of()), expected, 5e-5)
            assert asked.times == 0
            raise ZeroDivisionError
        assert torch.equal(weights(model), before)
        assert torch.equal(token_logprobs(model, batch_of()), expected)
    assert [n for n, p in model.named_parameters() if p.requires_grad == (".lora_" not in n)] == []


def test_samples_are_drawn_from_merged_weights():
    model = moved(with_lora(start(CONFIGS["llama"]), LORA, seed=0))
    with torch.no_grad():
        alone = model(torch.tensor([[7, 8, 9]])).logits[0, -1].log_softmax(-1)
        with Asked(model) as asked:
            engine = HFEngine(model, SpecialIds(0, 1))
            drawn = engine.generate([[7, 8, 9]], Sampling(max_new_tokens=1))
    assert asked.times == 0
    assert drawn.logprobs[0][0] == pytest.approx(alone[drawn.ids[0][0]].item(), abs=2e-5)


# FLOPs


def test_a_backward_pass_through_lora_leaves_out_what_does_not_train(without_c: None):
    """Beside PyTorch's own count, in which the first layer's input gradients are missing too."""
    counts = []
    for lora in (None, LoRAConfig(rank=8)):
        model = with_lora(policy(CONFIGS["llama"]), lora, seed=0).train()
        model.set_attn_implementation("eager")
        ids = torch.full((1, 128), 5)
        batch = Sequences(ids, torch.ones_like(ids), torch.ones(1, 64, dtype=torch.bool))
        meter = Meter()
        with FlopCounterMode(display=False) as forward:
            loss = token_logprobs(model, batch).sum()
        one_way = meter.flops
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        ours = (meter.flops - one_way) / one_way
        counts.append((ours, backward.get_total_flops() / forward.get_total_flops()))
    (whole, whole_counted), (adapted, adapted_counted) = counts
    assert whole == pytest.approx(2)
    assert whole == pytest.approx(whole_counted, rel=0.15)
    assert adapted == pytest.approx(adapted_counted, rel=0.15)
    assert adapted < 0.8 * whole


# A value head


def test_values_are_read_where_the_policy_chooses_a_token(config: PreTrainedConfig):
    """Row by row, on the last hidden state before each completion token."""
    model = moved(add_value_head(start(config)))
    batch = batch_of()
    with torch.no_grad():
        logprobs, values = logprobs_and_values(model, batch)
        close(logprobs, token_logprobs(model, batch))
        close(policy_values(model, batch), values)
        for row in range(len(batch.ids)):
            ids = batch.ids[row][batch.attention[row].bool()][None]
            length = int(batch.lengths[row])
            alone = model(input_ids=ids, output_hidden_states=True, use_cache=False)
            before = alone.hidden_states[-1][0, -length - 1 : -1]
            close(values[row, :length], value_head(model)(before)[:, 0], 2e-5)
            assert (values[row, length:] == 0).all()


def test_a_fresh_value_head_says_0_and_the_policy_what_it_said():
    model = start(CONFIGS["llama"])
    with torch.no_grad():
        before = token_logprobs(model, batch_of())
        logprobs, values = logprobs_and_values(add_value_head(model), batch_of())
    assert torch.equal(logprobs, before)
    assert (values == 0).all()
    assert all(p.requires_grad for p in value_head(model).parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_one_pass_has_the_gradients_of_two(name: str):
    model = moved(add_value_head(start(CONFIGS[name])))
    batch, generator = batch_of(), torch.Generator().manual_seed(0)
    scale = torch.rand(2, *batch.mask.shape, generator=generator)
    logprobs, values = logprobs_and_values(model, batch)
    ((logprobs * scale[0]).sum() + (values * scale[1]).sum()).backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (token_logprobs(model, batch) * scale[0]).sum().backward()
    (policy_values(model, batch) * scale[1]).sum().backward()
    for one, two in zip(together, model.parameters(), strict=True):
        torch.testing.assert_close(one, two.grad, atol=2e-4, rtol=1e-4)


# Whole stages


@pytest.mark.parametrize("filtered", [False, True])
def test_a_direct_policy_trained_by_lora_learns_and_is_saved_whole(
    filtered: bool,
    tmp_path: Path,
    policy_folder: Path,
    preferences_folder: Path,
    reference_folder: Path,
    reward_folder: Path,
):
    direct = DirectConfig(optimizer=STEADY, epochs=4, batch_size=8)
    begun = Start(policy_folder, LORA)
    data = DirectData(preferences_folder, reference_folder)
    if filtered:
        keep_all = FilterConfig(epochs=4, floor=0.1, margin=-1e9)
        filtering = Filter(reward_folder, keep_all, Drawing(Sampling(max_new_tokens=10)))
        train_filtered(tmp_path, begun, data, filtering, {"beta": 0.1}, direct, ())
    else:
        train_direct(tmp_path, begun, data, "dpo", {"beta": 0.1}, direct, (0.5,))
        assert (tmp_path / "checkpoint-6").is_dir()
    log = read_log(tmp_path)
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    final, base = (
        AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "final", begun.policy)
    )
    after, before = dict(final.named_parameters()), dict(base.named_parameters())
    for name in before:  # linear layers alone have moved, the embeddings' head not
        assert torch.equal(after[name], before[name]) == ("_proj" not in name)
    rank = torch.linalg.matrix_rank(
        (after["model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"]),
        rtol=1e-3,
    )
    assert rank <= 4
