"""One way to sample, whatever runs underneath: `generate(prompts, sampling) -> Completions`."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from pydantic import Field

from shared.config import Config


class Sampling(Config):
    """Temperature 0 is greedy. Training never truncates the distribution, so there is no top-p."""

    max_new_tokens: int = Field(default=16, gt=0)
    temperature: float = Field(default=1.0, ge=0)
    seed: int = 0


class Completions(NamedTuple):
    """Sampled token ids, one list a prompt, EOS included where the policy ended by itself."""

    ids: list[list[int]]
    truncated: list[bool]  # cut at the length cap, so without EOS


class Engine(Protocol):
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Completions:
        """One completion for each prompt (token ids), in order."""
        ...
