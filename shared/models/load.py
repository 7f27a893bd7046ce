"""Models: the policy, its frozen reference, the scalar head of reward and value models, saving.

Everything is saved as a plain transformers folder (safetensors), so that `from_pretrained` of any
other project loads it. A reward model's normalisation lies beside it in `normalisation.json`.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shared.config import Config, InputError
from shared.models.cost import At, Work, count_pass
from shared.models.lora import LoRAConfig, below_lora, plain_weights, with_lora
from shared.models.packing import let_pack, pack, packed_inputs, packs
from shared.models.sequences import SCORING, Limit, Sequences, by_length, collate
from shared.seeds import seed_of


class ModelConfig(Config):
    """A Llama from scratch (head size 32: a size that vLLM's CPU kernels know)."""

    hidden_size: int = Field(default=128, gt=0, multiple_of=32)
    """Width of the hidden states, a multiple of the head size, 32."""
    layers: int = Field(default=4, gt=0)
    """Transformer blocks."""
    intermediate_size: int = Field(default=384, gt=0)
    """Width inside the feed-forward layers."""


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

    def load(self) -> PreTrainedModel:
        """The policy, ready to train."""
        return with_lora(load_policy(self.policy), self.lora, seed_of(self.seed, "adapter"))


def load_policy(folder: Path) -> PreTrainedModel:
    """A causal language model from a transformers folder, float32, dropout off."""
    require_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return let_pack(without_dropout(model))


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy: the reference of the policy that `model` goes on to be."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    return without_dropout(reference)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Pad and EOS must be two tokens: a score is read at EOS."""
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
        raise InputError(f"{folder}: no tokenizer here (tokenizer.json is missing)")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise InputError(
            f"{folder}: the tokenizer needs an EOS token and a pad token that differs from it "
            f"(eos {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}); "
            "give it one with tokenizer.add_special_tokens({'pad_token': '<pad>'})"
        )
    return tokenizer


class SpecialIds(NamedTuple):
    """Token ids that the pipeline needs to know."""

    pad: int
    eos: int


def special_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """Pad and EOS of a tokenizer that `load_tokenizer` let pass."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if not isinstance(pad, int) or not isinstance(eos, int):
        raise InputError("the tokenizer's pad and EOS must be one token each")
    return SpecialIds(pad, eos)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain transformers folder: LoRA merged in, PPO's value head left out."""
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
    model = load_scalar_model(policy_folder)
    head = scalar_head(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(std=(head.in_features + 1) ** -0.5, generator=generator)
        if head.bias is not None:
            head.bias.zero_()
    return model


def load_scalar_model(folder: Path) -> PreTrainedModel:
    """A one-label sequence classifier, float32, dropout off: a reward model or a value model."""
    require_model(folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    )
    return let_pack(without_dropout(model))


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


class Scorer:
    """Reward-model inference: `score` = (raw - offset) / scale, in SFT within-prompt deviations."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        require_reward_model(folder)
        self.model = load_scalar_model(folder).to(device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
        self.pad_id = special_ids(load_tokenizer(folder)).pad
        path = folder / "normalisation.json"
        values = json.loads(path.read_text()) if path.exists() else {"offset": 0.0, "scale": 1.0}
        self.offset, self.scale = float(values["offset"]), float(values["scale"])

    @torch.no_grad()
    def score(self, batch: Sequences) -> Tensor:
        """Normalised scores of one batch, (B,)."""
        return (sequence_scores(self.model, batch.to(self.model.device)) - self.offset) / self.scale

    def score_all(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        limit: Limit = SCORING,
    ) -> Tensor:
        """Normalised scores of any number of rows, in their order, (N,), on the CPU."""
        scores = torch.zeros(len(prompts))
        for rows in by_length([*map(len, completions)], [*map(len, prompts)], limit):
            batch = collate([prompts[i] for i in rows], [completions[i] for i in rows], self.pad_id)
            scores[torch.tensor(rows)] = self.score(batch).cpu()
        return scores


def save_normalisation(folder: Path, offset: float, scale: float) -> None:
    """Write what turns raw scores into `score` beside the reward model."""
    (folder / "normalisation.json").write_text(json.dumps({"offset": offset, "scale": scale}))


def require_reward_model(folder: Path) -> None:
    """InputError unless `folder` holds a one-label classifier: a policy would get a random head."""
    require_model(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        raise InputError(
            f"{folder}: not a reward model but {names}; it must be an "
            "AutoModelForSequenceClassification with one label"
        )


def require_model(folder: Path) -> None:
    """InputError unless `folder` looks like a transformers folder."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no model here (config.json is missing)")
