"""What a training run is held against: its dtype, its losses and its directions, named where they are wrong."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from l3d.decomposition.subnetworks import Subnetworks
from l3d.gradients.chunks import Chunks
from l3d.gradients.factors import Gradients


def dtype_of_sums(asked: str | None, parameters: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype to train in, for the one asked for or the parameters': at least float32."""
    if asked is None:
        return torch.promote_types(next(iter(parameters.values())).dtype, torch.float32)
    dtype = getattr(torch, asked, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating dtype such as 'float32', got {asked!r}")
    if dtype == torch.float16:
        raise ValueError("dtype: float16 cannot hold the gradients' range; use float32 or bfloat16")
    return torch.promote_types(dtype, torch.float32)  # bfloat16 is for what is held, not for sums


@contextmanager
def naming_step(step: int) -> Iterator[None]:
    """Say at which step an error was met."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"step {step}: {error}") from error


def check_finite(decomposition: Subnetworks) -> None:
    """Refuse a decomposition that the last steps have blown up; the last checkpoint stays."""
    for name, parameter in decomposition.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"decomposition: NaN or infinity in {name!r}; lower lr. The last checkpoint stays")


class NothingToLearnError(ValueError):
    """All gradients of a batch are zero."""


def finite_losses(losses: list[float], gradients: Gradients | Chunks) -> list[float]:
    """Return the restarts' losses; raises ValueError where one is not finite, naming the tensor at fault.

    Raises NothingToLearnError where all gradients are zero.
    """
    if all(map(math.isfinite, losses)):
        return losses
    for name, tensor in gradients.tensors():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"gradients: NaN or infinity in those of {name!r}; the last checkpoint stays")
    if not gradients.squared_norm().any():
        raise NothingToLearnError(
            "gradients: all zero in this batch, so there is nothing to reconstruct; check params and data"
        )
    raise ValueError("loss: not finite although the gradients are; lower lr")
