"""What several test files read numbers and weights with."""

from typing import Any

import torch
from torch import Tensor


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
