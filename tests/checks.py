"""What several test files read numbers and weights with."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from shared.models.packing import pack
from shared.models.sequences import Sequences

Klash = Callable[..., tuple[int, str, str]]  # the fixture `klash`

# exact.toml with a world of 85 completions a prompt and a small model
SMALL_WORLD = {
    "task.exact.words": 3, "task.exact.prompts": 4, "task.exact.cap": 3, "threads": 1,
    "sampling.max_new_tokens": 3, "model.hidden_size": 32, "model.layers": 1, "workers": 1,
    "ppo.episodes": 1024, "evaluation.prompts": 4, "evaluation.validation_prompts": 4,
    "evaluation.scale_prompts": 4, "evaluation.scale_samples": 20,
}  # fmt: skip

# an experiment of seconds, to which arms are added; its numbers mean nothing
TINY = """
name = "tiny"
seeds = [0, 1]
threads = 1
model = { hidden_size = 32, layers = 1, intermediate_size = 64 }
sft = { examples = 256, epochs = 1 }
preferences = { pairs = 64, held_out_pairs = 16 }
reward = { epochs = 1 }
ppo = { episodes = 64, rollout_size = 32, minibatch_size = 16 }
direct = { batch_size = 16, optimizer = { learning_rate = 5e-3 } }

[evaluation]
prompts = 16
samples = 2
validation_prompts = 8
reward_pairs = 64
scale_prompts = 8
scale_samples = 4
frontier_prompts = 8
frontier_samples = 32
reward_limit_samples = 16
"""


def close(actual: Any, expected: Any, tolerance: float | None = None) -> None:
    """Numbers or tensors agree in shape and to an absolute `tolerance`.

    Without one: 1e-5 for what was computed in float32, 1e-9 for the rest.
    """
    if tolerance is None:
        single = isinstance(actual, Tensor) and actual.dtype == torch.float32
        tolerance = 1e-5 if single else 1e-9
    pair = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    torch.testing.assert_close(*pair, atol=tolerance, rtol=0)


def weights(model: torch.nn.Module) -> Tensor:
    """All of them in one row."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def minimiser(loss: Callable[[Tensor], Tensor], *shape: int) -> Tensor:
    """The float64 tensor at which a smooth `loss` is least, from 0."""
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=3000,
        max_eval=6000,
        tolerance_grad=1e-13,
        tolerance_change=1e-18,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimizer.step(closure)
    return x.detach()


def kept_tokens(batch: Sequences, at: Tensor) -> tuple[int, int, list[int]]:
    """How many tokens `pack` leaves, how many of them are those `at` (B, P + T), and each row's."""
    packed = pack(batch, at)
    return packed.ids.shape[1], len(packed.place[at].unique()), packed.lengths.tolist()


def beginnings(rows: Iterable[list[int]]) -> set[tuple[int, ...]]:
    """What each token ends, all that stands before it included: equal ones are computed once."""
    return {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
