"""Nothing is timed that is not right: what a provider computes is held to the truth first."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 2e-5  # of the largest true element; sums of float32 products
AGREEMENT = 1e-3  # of losses, relative
LEARNED = 0.9  # of its first error is what a training run may end at


class Refused(AssertionError):
    """A provider computes something else than what it is timed for."""


def check(who: str, actual: Mapping[str, Tensor], truth: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Raise Refused unless a provider's value and gradients are the truth's, up to a share of the largest element."""
    for what, expected in truth.items():
        found, expected = actual[what].detach().double(), expected.detach().double()
        if found.shape != expected.shape:
            raise Refused(f"{who}, {what}: shape {list(found.shape)}, expected {list(expected.shape)}; not timed")
        difference = (found - expected).abs().nan_to_num(nan=torch.inf)
        error, scale = float(difference.max()), float(expected.abs().max())
        if not error <= tolerance * scale:
            raise Refused(f"{who}, {what}: off by {error:.3e} where the largest is {scale:.3e}; not timed")


def check_loss(who: str, actual: Any, expected: Any, tolerance: float = AGREEMENT) -> None:
    """Raise Refused unless a method gives the expected loss."""
    check(who, {"loss": torch.as_tensor(actual)}, {"loss": torch.as_tensor(expected)}, tolerance)
