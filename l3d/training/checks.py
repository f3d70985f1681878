"""Validate a run's dtype, losses and directions; errors name the tensor and the step."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from l3d.data.batch import tensors_of, without_label
from l3d.data.batches import count_rows, take
from l3d.decomposition.subnetworks import Subnetworks
from l3d.gradients.chunks import Chunks
from l3d.gradients.factors import Gradients
from l3d.gradients.fixed import NotFiniteRowsError


def dtype_of_sums(asked: str | None, parameters: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype to train in: the one asked for, else the parameters', but at least float32.

    Raises ValueError for a dtype that is not floating, and for float16.
    """
    if asked is None:
        return torch.promote_types(next(iter(parameters.values())).dtype, torch.float32)
    dtype = getattr(torch, asked, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating dtype such as 'float32', got {asked!r}")
    if dtype == torch.float16:
        raise ValueError("dtype: float16 cannot hold the gradients' range; use float32 or bfloat16")
    return torch.promote_types(dtype, torch.float32)  # bfloat16 is the dtype of what is stored, not of sums


@contextmanager
def naming_step(step: int) -> Iterator[None]:
    """Put the step in front of the message of a ValueError, unless it names one."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("step "):
            raise
        kept = isinstance(error, (NotFiniteRowsError, NothingToLearnError))  # callers tell these from others
        kind = type(error) if kept else ValueError
        raise kind(f"step {step}: {error}") from error


def not_finite(data: Any) -> str | None:
    """Say which row of the data is the first that holds NaN or infinity; None for a stream, which cannot be asked."""
    for row in range(count_rows(data) or 0):
        if not all(
            torch.isfinite(t).all() for t in tensors_of(without_label(take(data, [row]))) if t.is_floating_point()
        ):
            return f"data: row {row} (from 0) holds NaN or infinity"
    return None


def check_finite(decomposition: Subnetworks) -> None:
    """Raise ValueError, naming the tensor, where a direction holds NaN or infinity; the last checkpoint stays."""
    for name, parameter in decomposition.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"decomposition: NaN or infinity in {name!r}; lower lr. The last checkpoint stays")


class NothingToLearnError(ValueError):
    """All gradients of a batch are zero."""


def finite_losses(losses: list[float], gradients: Gradients | Chunks) -> list[float]:
    """Return the restarts' losses; raise ValueError where one is not finite, naming the tensor that is not.

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
