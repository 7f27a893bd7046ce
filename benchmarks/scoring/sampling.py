"""A policy's own answers to the prompts of a file, as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.scoring.models import require_positive
from benchmarks.scoring.rows import TOO_LONG, Unscored, answered
from shared.config import InputError
from shared.data.chat import Encoder, said_by
from shared.data.rows import Row, Unusable
from shared.generation.engine import Engine, Sampling
from shared.generation.start import GenerationConfig, make_engine
from shared.models.load import WeightDtype, load_policy, load_tokenizer, special_ids
from shared.models.opening import require_embeddings
from shared.models.scorer import Answered, context_length


@dataclass(frozen=True)
class Sampled:
    """How a policy answers."""

    samples: int = 1
    """Answers of a policy to each prompt."""
    max_new_tokens: int = 256
    """Most tokens of an answer, EOS included; a longer one is cut and scored without EOS."""
    temperature: float = 1.0
    """Of sampling; 0 is greedy."""
    seed: int = 0
    """Of all that is drawn."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples."""
    dtype: WeightDtype = "float32"
    """Precision of the models' weights and arithmetic."""

    def check(self) -> None:
        """InputError for numbers out of range."""
        require_positive(samples=self.samples, max_new_tokens=self.max_new_tokens)
        if not self.temperature >= 0:
            raise InputError(f"--temperature cannot be below 0 (found {self.temperature:g})")
        if self.samples > 1 and self.temperature == 0:
            raise InputError("--samples above 1 at --temperature 0 are all the same: leave it at 1")


class Policy:
    """A policy with what it takes to ask it."""

    def __init__(self, folder: Path, sampled: Sampled):
        self.tokenizer = load_tokenizer(folder)
        self.ids = special_ids(self.tokenizer, folder)
        self.model = load_policy(folder, sampled.dtype).eval()
        self.model.requires_grad_(False)
        require_embeddings(folder, self.tokenizer, self.model)
        self.encoder = Encoder(self.tokenizer, self.ids.ends)
        self.sampled = sampled
        generation = GenerationConfig(engine=sampled.engine, dtype=sampled.dtype)
        self.engine: Engine = make_engine(
            generation, self.model, self.ids, folder, sampled.temperature
        )
        self.room = context_length(self.model, self.tokenizer)

    def prompt_ids(self, row: Row) -> list[int] | Unscored:
        """The prompt as this policy reads it, or why it cannot be asked."""
        alone = row._replace(chosen=None, rejected=None, label=None)
        try:
            encoded = self.encoder.encode([alone], [self.encoder.render(alone)])[0]
        except Unusable as fault:
            return Unscored(fault.reason, str(fault))
        length = len(encoded.prompt_ids) + self.sampled.max_new_tokens
        if self.room and length > self.room:
            said = f"prompt and answer may have {length} tokens; the policy reads {self.room}"
            return Unscored(TOO_LONG, said)
        return encoded.prompt_ids

    def answers(self, prompts: Sequence[list[int]], seed: int) -> "Answers":
        """`samples` answers to each prompt, prompt by prompt."""
        sampled = self.sampled
        many = [prompt for prompt in prompts for _ in range(sampled.samples)]
        sampling = Sampling(
            max_new_tokens=sampled.max_new_tokens, temperature=sampled.temperature, seed=seed
        )
        drawn = self.engine.generate(many, sampling)
        texts = [said_by(self.tokenizer, p, c) for p, c in zip(many, drawn.ids, strict=True)]
        return Answers(many, drawn.ids, texts, drawn.truncated)


@dataclass(frozen=True)
class Answers:
    """Sampled answers, one entry each; a prompt's follow each other."""

    prompts: list[list[int]]
    ids: list[list[int]]
    texts: list[str]
    truncated: list[bool]


def answered_by_sample(row: Row, text: str, truncated: bool) -> Answered:
    """A sampled answer in the place of the row's own."""
    chat = not isinstance(row.prompt, str)
    answer = {"role": "assistant", "content": text} if chat else text
    return answered(row, answer, ended=not truncated)
