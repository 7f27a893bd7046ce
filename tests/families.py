"""A small configuration of each family of models that runs on packed tokens."""

from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

PAD, EOS = 0, 1
SIZE = {"vocab_size": 50, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
WIDE = {**SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**WIDE, "intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "gpt_neox": GPTNeoXConfig(**WIDE, intermediate_size=48),
    "gpt2": GPT2Config(**SIZE, n_embd=32, n_layer=2, n_head=4),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
}
