"""Models: the policy, its frozen reference, the scalar head of reward and value models, saving.

Everything is saved as a plain transformers folder (safetensors), so that `from_pretrained` of any
other project loads it. A reward model's normalisation lies beside it in `normalisation.json`.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shared.config import Config, InputError, Misfit
from shared.models import ranks
from shared.models.cost import At, Work, count_pass
from shared.models.device import device
from shared.models.folders import listed_ends
from shared.models.lora import LoRAConfig, below_lora, plain_weights, with_lora
from shared.models.opening import open_model, open_tokenizer
from shared.models.packing import let_pack, pack, packed_inputs, packs
from shared.models.sequences import Sequences
from shared.seeds import seed_of

WeightDtype = Literal["float32", "bfloat16"]


class ModelConfig(Config):
    """A `pretrained` model, or a Llama from scratch (head size 32: vLLM's CPU kernels know it)."""

    pretrained: str | None = None
    """The model to start from: a hub name, a transformers folder or a .gguf file; by default a
    small Llama is trained from scratch."""
    adapter: str | None = None
    """A LoRA adapter that was trained on `pretrained`, a folder; it is merged into it."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; by default its main branch."""
    dtype: WeightDtype = "float32"
    """Precision of frozen weights: references, reward models, the base under LoRA; what trains
    whole keeps float32."""
    sft: bool = True
    """Whether SFT comes first; without it the pretrained model is the start and the reference."""
    hidden_size: int = Field(default=128, gt=0, multiple_of=32)
    """Width of the hidden states, a multiple of the head size, 32."""
    layers: int = Field(default=4, gt=0)
    """Transformer blocks."""
    intermediate_size: int = Field(default=384, gt=0)
    """Width inside the feed-forward layers."""

    @model_validator(mode="after")
    def what_is_said_of_a_pretrained_model_needs_one(self) -> "ModelConfig":
        if self.pretrained is None:
            for key in ("adapter", "revision"):
                if getattr(self, key) is not None:
                    raise Misfit("needs `pretrained`", key)
            if not self.sft:
                raise Misfit("needs `pretrained`: random weights must be trained", "sft")
        return self


def new_policy(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A small Llama with random weights, tied embeddings and no dropout."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.hidden_size // 32,
            num_key_value_heads=config.hidden_size // 32,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=special_ids(tokenizer).pad,
            eos_token_id=special_ids(tokenizer).eos,
            bos_token_id=None,
        )
    )


@dataclass(frozen=True)
class Start:
    """What a policy begins as: the model in a folder, under an adapter that `seed` draws."""

    policy: Path
    lora: LoRAConfig | None = None
    seed: int = 0
    dtype: WeightDtype = "float32"  # of the base under the adapter; what trains is float32

    def load(self) -> PreTrainedModel:
        """The policy, ready to train."""
        policy = load_policy(self.policy, self.dtype if self.lora else "float32")
        return with_lora(policy, self.lora, seed_of(self.seed, "adapter"))


def load_policy(folder: Path, dtype: WeightDtype = "float32") -> PreTrainedModel:
    """A causal language model from a transformers folder, on the device, dropout off.

    InputError if it is none.
    """
    return ready(open_model(folder, "policy", getattr(torch, dtype)))


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """A model as all of Klash computes with it: on the device, packed, without dropout."""
    return let_pack(without_dropout(model.to(device())))  # pyright: ignore[reportArgumentType]


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy: the reference of the policy that `model` goes on to be."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    return without_dropout(reference)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Pad and EOS must be two tokens: a score is read at EOS."""
    tokenizer = open_tokenizer(folder)
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise InputError(
            f"{folder}: the tokenizer needs an EOS token and a pad token that differs from it "
            f"(eos {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}); "
            "give it one with tokenizer.add_special_tokens({'pad_token': '<pad>'})"
        )
    return tokenizer


@dataclass(frozen=True)
class SpecialIds:
    """Token ids that the pipeline needs to know."""

    pad: int
    eos: int  # what is put behind a text
    others: frozenset[int] = frozenset()  # further tokens that end a completion

    @property
    def ends(self) -> frozenset[int]:
        """Every token that ends a completion."""
        return self.others | {self.eos}


def special_ids(tokenizer: PreTrainedTokenizerBase, folder: Path | None = None) -> SpecialIds:
    """Pad and EOS of a tokenizer that `load_tokenizer` let pass.

    `folder`: the model's, whose generation_config.json may list further tokens that end a turn.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if not isinstance(pad, int) or not isinstance(eos, int):
        raise InputError("the tokenizer's pad and EOS must be one token each")
    others = frozenset() if folder is None else listed_ends(folder) - {eos}
    if pad in others:
        raise InputError(
            f"{folder}/generation_config.json: the pad token, {pad}, is among eos_token_id: a "
            "completion that it ends would end in padding; give the tokenizer another pad token"
        )
    return SpecialIds(pad, eos, others)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain transformers folder: LoRA merged in, PPO's value head left out."""
    with ranks.whole(model):
        if ranks.is_first():
            below_lora(model).save_pretrained(folder, state_dict=dict(plain_weights(model)))
            tokenizer.save_pretrained(folder)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Dropout off in train mode too: two forward passes of the same batch must agree."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    for name, value in list(vars(model.config).items()):
        if ("drop" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(model.config, name, 0.0)
    return model


def new_scalar_model(policy_folder: Path, seed: int) -> PreTrainedModel:
    """The policy's trunk under a scalar head ~ N(0, 1/sqrt(hidden + 1)) (Stiennon et al. 2020).

    Details: Huang et al. 2024 (arXiv:2403.17031), "The N+ implementation details of RLHF with PPO".
    """
    model = load_scalar_model(policy_folder, new_head=True)
    head = scalar_head(model)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(head.weight.shape).normal_(
        std=(head.in_features + 1) ** -0.5, generator=generator
    )
    with torch.no_grad():
        head.weight.copy_(drawn)  # drawn on the CPU: a seed means the same on every device
        if head.bias is not None:
            head.bias.zero_()
    return model


def load_scalar_model(
    folder: Path, dtype: WeightDtype = "float32", *, new_head: bool = False
) -> PreTrainedModel:
    """A one-label sequence classifier, on the device, dropout off: a reward or a value model.

    `new_head`: on the trunk of a policy, or of anything; the head is the caller's to set.
    """
    return ready(open_model(folder, "reward model", getattr(torch, dtype), new_head=new_head))


def scalar_head(model: PreTrainedModel) -> nn.Linear:
    """The one-output layer, which transformers calls `score` in decoder models."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise InputError(f"{type(model).__name__} has no `score` layer with one output")
    return head


def trunk(model: PreTrainedModel) -> nn.Module:
    """Everything below the head, of a LoRA model with the adapters in it."""
    below = below_lora(model)
    return getattr(below, below.base_model_prefix)


def last_states(model: PreTrainedModel, batch: Sequences, at: Tensor, *, logits: int = 0) -> Tensor:
    """The last hidden states of the tokens where `at` (B, P + T), (M, H), row by row.

    `logits`: of how many of them the caller goes on to make logits, which count as this pass's.
    """
    real = int(batch.attention.sum())
    if packs(model):
        packed = pack(batch, at)
        tokens = packed.place[at]
        states = trunk(model)(**packed_inputs(packed, tokens)).last_hidden_state[0, tokens]
        computed = At(packed.ids.shape[1], len(tokens.unique()), logits)
        count_pass(model, Work(packed.lengths.tolist(), computed, real), states)
        return states
    states = trunk(model)(
        input_ids=batch.ids,
        attention_mask=batch.attention,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state[at]
    count_pass(model, Work(batch.attention.sum(1).tolist(), At(real, real, logits), real), states)
    return states


def token_scalars(model: PreTrainedModel, batch: Sequences, at: Tensor) -> Tensor:
    """The head's output at the tokens where `at` (B, P + T), (M,), row by row."""
    batch, at = batch.to(model.device), at.to(model.device)
    return scalar_head(model)(last_states(model, batch, at)).squeeze(-1).float()


def state_values(model: PreTrainedModel, batch: Sequences) -> Tensor:
    """V(prompt, tokens before t) for each completion token t, (B, T); 0 where `mask` is False."""
    return batch.to(model.device).spread(token_scalars(model, batch, batch.predicting))


def sequence_scores(model: PreTrainedModel, batch: Sequences) -> Tensor:
    """The raw score at each row's last token (EOS unless it was cut), found by length, (B,)."""
    return token_scalars(model, batch, batch.last)
