"""Is the engine where the trainer is? What is sent to it, and what is compared afterwards."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from shared.config import InputError
from shared.generation.engine import Engine, Sampling, StaleEngine
from shared.models import ranks
from shared.models.load import SpecialIds
from shared.models.logprobs import token_logprobs
from shared.models.sequences import collate

PROBES, PROBE_TOKENS = 2, 8  # fixed prompts, and the most tokens of each
DRAWN = 2  # tokens after each: every weight says its part of the first, the cache of the second
SHAPE = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size",
    "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings",
)  # fmt: skip


@torch.no_grad()
def largest_difference(
    engine: Engine, prompts: Sequence[Sequence[int]], draw: Sampling, pad_id: int
) -> float:
    """Between the log-probabilities of `engine` and of its model, of sampled tokens, in nats."""
    with ranks.alone():  # each rank looks at its own engine
        drawn = engine.generate(prompts, draw)
    batch = collate(prompts, drawn.ids, pad_id)
    ours = ranks.run(token_logprobs, engine.model, batch, draw.temperature).cpu()[batch.mask]
    theirs = torch.tensor([number for row in drawn.logprobs for number in row])
    return ranks.largest((ours - theirs).abs().max().item())


def probe(engine: Engine, ids: SpecialIds, temperature: float) -> float:
    """Largest difference, in nats a token, between `engine` and its model on fixed prompts.

    The engine samples, the model says how likely each token was. Prompt and sampled tokens pass
    through every layer, so that old weights show wherever they are.
    """
    size = engine.model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    words = [token for token in range(size) if token not in (ids.pad, *ids.ends)]
    stride = max(1, len(words) // (PROBES * PROBE_TOKENS))
    spread = words[::stride]
    prompts = [spread[i::PROBES][:PROBE_TOKENS] for i in range(PROBES)]
    draw = Sampling(max_new_tokens=DRAWN, temperature=temperature)
    return largest_difference(engine, prompts, draw, ids.pad)


def require_fresh(engine: Engine, ids: SpecialIds, temperature: float, tolerance: float) -> float:
    """The probe's difference; StaleEngine if it exceeds `tolerance`."""
    difference = probe(engine, ids, temperature)
    if not difference <= tolerance:
        raise StaleEngine(
            f"after the weight sync vLLM's log-probabilities differ from the policy's by "
            f"{difference:.2g} nats a token (at most {tolerance:g} is allowed): it does not sample "
            "from the policy; the run stops here"
        )
    return difference


def require_same_architecture(model: PreTrainedModel, there: dict[str, Any], where: str) -> None:
    """InputError if an engine was started from a model of another shape."""
    here = model.config.to_dict()
    for key in SHAPE:
        if key in here and key in there and here[key] != there[key]:
            raise InputError(
                f"{where} holds another model: {key} is {there[key]} there and {here[key]} here; "
                "start it from this policy's folder"
            )
