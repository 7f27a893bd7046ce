"""What an experiment with a pretrained model is by default; `docs/methods.md` has the sources.

The classes' own defaults are for a Llama from scratch, which learns a hundred times as fast.
"""

from collections.abc import Mapping
from typing import Any

# Rates by what trains: all weights, or LoRA's, which take about ten times as much.
RATES = {
    "whole": {"sft": 2e-5, "reward": 1e-5, "ppo": 3e-6, "value": 1e-5, "direct": (1e-6, 5e-6)},
    "lora": {"sft": 2e-5, "reward": 1e-5, "ppo": 3e-5, "value": 1e-5, "direct": (1e-5, 5e-5)},
}


def with_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw`, an experiment as its file has it, over the defaults of pretrained models."""
    model = raw.get("model")
    if not isinstance(model, Mapping) or model.get("pretrained") is None:
        return dict(raw)
    rates: dict[str, Any] = RATES["lora" if isinstance(raw.get("lora"), Mapping) else "whole"]
    found = merged(_pretrained(rates), raw)
    arms = default_arms(rates["direct"])
    if changes(raw.get("arms", {}), arms):
        found["arms"] = merged(arms, raw.get("arms", {}))
    return found


def changes(arms: Any, defaults: Mapping[str, Any]) -> bool:
    """Whether `arms` alters default arms, as `--arms.dpo.settings` does, and says of none what kind
    it is: an experiment's own arms take the place of all defaults.
    """
    return isinstance(arms, Mapping) and all(
        name in defaults and isinstance(arm, Mapping) and "kind" not in arm
        for name, arm in arms.items()
    )


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, section by section; where both have a value, that of `above`."""
    found = dict(below)
    for key, value in above.items():
        under = found.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        found[key] = merged(under, value) if both else value  # pyright: ignore[reportArgumentType]
    return found


def _pretrained(rates: Mapping[str, Any]) -> dict[str, Any]:
    passes = {"micro_batch_size": 8, "micro_batch_tokens": 4096}
    half = {"precision": "bfloat16"}  # of matrix products; weights and optimiser stay float32
    return {
        "sampling": {"max_new_tokens": 64},
        "sft": {
            "examples": 10000,
            "epochs": 1,
            "batch_size": 16,
            "learning_rate": rates["sft"],
            **half,
        },
        "preferences": {"pairs": 10000, "held_out_pairs": 256},
        "reward": {
            "optimizer": {"learning_rate": rates["reward"], **half},
            "epochs": 1,
            "batch_size": 32,
            "center": 0.01,
            **passes,
        },
        "ppo": {
            "optimizer": {"learning_rate": rates["ppo"], "schedule": "linear", **half},
            "value_learning_rate": rates["value"],
            "episodes": 10240,
            "rollout_size": 128,
            "minibatch_size": 32,
            "epochs": 2,
            **passes,
        },
        "direct": {
            "optimizer": {"learning_rate": rates["direct"][0], "warmup_share": 0.1, **half},
            "epochs": 1,
            "batch_size": 32,
            **passes,
        },
        "evaluation": {
            "prompts": 128,
            "samples": 2,
            "checkpoint_samples": 1,
            "validation_prompts": 64,
            "checkpoints": (),
            "reward_pairs": 1000,
            "scale_prompts": 64,
            "scale_samples": 4,
            "frontier_samples": 0,
        },
        "quick": {"pairs": 1000, "episodes": 2048, "sft_examples": 2000, "prompts": 64},
    }


def default_arms(rates: tuple[float, float]) -> dict[str, Any]:
    """Every method, at one strength that is common in papers and two rates."""

    def direct(loss: str, **strength: float) -> dict[str, Any]:
        settings = [{**strength, "learning_rate": rate} for rate in rates]
        return {"kind": "direct", "loss": loss, "settings": settings}

    return {
        "best-of-n": {"kind": "best-of-n", "settings": [{"n": 4}, {"n": 16}]},
        "ppo": {"kind": "ppo", "settings": [{"kl_coef": 0.05}, {"kl_coef": 0.2}]},
        "dpo": direct("dpo", beta=0.1),
        "ipo": direct("ipo", tau=0.1),
        "kto": direct("kto", beta=0.1),
        "fdpo": {"kind": "filtered", "settings": [{"beta": 0.1, "learning_rate": rates[0]}]},
    }
