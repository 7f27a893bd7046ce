"""One way to sample, whatever runs underneath: `generate(prompts, sampling) -> Completions`."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from shared.config import Config

TRUNCATING = ("top_p", "top_k", "min_p", "typical_p")
Dtype = Literal["float32", "bfloat16", "float16"]


class Sampling(Config):
    """Temperature 0 is greedy. Training never truncates the distribution, so there is no top-p."""

    max_new_tokens: int = Field(default=16, gt=0)
    """Most tokens of a completion, EOS included; longer ones are cut there, without EOS."""
    temperature: float = Field(default=1.0, ge=0)
    """Temperature of preference pairs and rollouts, where it is above 0; evaluation has 1."""
    seed: int = 0
    """Replaced by one derived from the run's seed wherever an experiment samples."""

    @model_validator(mode="before")
    @classmethod
    def nothing_is_cut_off(cls, values: Any) -> Any:
        for key in TRUNCATING:
            if isinstance(values, dict) and key in values:
                raise ValueError(
                    f"`{key}` cuts the distribution off: what is sampled would not be what "
                    "log-probabilities, KL and PPO's ratio are computed of; leave it out"
                )
        return values


class Completions(NamedTuple):
    """Sampled token ids, one list a prompt, EOS included where the policy ended by itself."""

    ids: list[list[int]]
    truncated: list[bool]  # cut at the length cap, so without EOS
    logprobs: list[list[float]]  # of each token where it was sampled, at the temperature

    def rows(self, index: Sequence[int]) -> "Completions":
        """Some of them, in the order of `index`."""
        ids, truncated, logprobs = ([column[i] for i in index] for column in self)
        return Completions(ids, truncated, logprobs)  # pyright: ignore[reportArgumentType]


Drawn = tuple[list[int], bool, list[float]]  # one of them: token ids, whether cut, logprobs


def in_order(drawn: Mapping[int, Drawn]) -> Completions:
    """Completions by the number of their prompt, 0 to N - 1."""
    rows = [drawn[number] for number in range(len(drawn))]
    return Completions([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


class StaleEngine(Exception):
    """The engine does not sample from the policy's weights: nothing drawn from it can be used."""


class EngineLost(Exception):
    """The engine stopped answering: the stage waits until it is there again."""


class Engine(Protocol):
    """Samples from `model`, maybe from a copy of its weights."""

    model: PreTrainedModel
    exact: bool  # its log-probabilities are those of the model in float32, but for rounding

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Completions:
        """One completion for each prompt (token ids), in order."""
        ...

    def sync(self) -> float:
        """Bring the copy to the model's weights; returns how far apart, in nats a token, it is."""
        ...


def require_tokens(prompts: Sequence[Sequence[int]]) -> None:
    """ValueError if a prompt is empty."""
    if any(len(p) == 0 for p in prompts):
        raise ValueError("a prompt has no tokens: a completion's first token needs one before it")
