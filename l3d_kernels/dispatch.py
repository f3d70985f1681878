"""Which implementation runs a call, and the checks every public op makes before it does.

The choice is made per call, from the tensors' device: "auto" takes the Triton kernel where there is one for the
device, else the plain-torch twin. An explicit request that cannot be met raises; nothing falls back in silence.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from l3d_kernels import reference

BACKENDS = ("auto", "torch", "triton")

# op name -> launcher. Each Triton kernel registers itself here when its file lands; the twin is always there.
TRITON: dict[str, Callable[..., Any]] = {}


def implementation(op: str, backend: str, tensor: Tensor) -> Callable[..., Any]:
    """Return the function that runs `op` for `tensor`'s device.

    Raises ValueError for an unknown backend, RuntimeError where backend="triton" cannot be honoured.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    kernel = TRITON.get(op)
    if backend == "triton" and kernel is None:
        raise RuntimeError(f"backend='triton': no Triton kernel for {op} in this version; use 'auto' or 'torch'")
    if backend == "triton" and tensor.device.type == "cpu":
        raise RuntimeError(f"backend='triton': {op} got a CPU tensor; move it to a GPU or use 'auto' or 'torch'")
    if kernel is not None and backend != "torch" and tensor.device.type != "cpu":
        return kernel
    return getattr(reference, op)


def check_factors(left: Tensor, right: Tensor) -> None:
    """Refuse low-rank factors whose shapes do not belong together."""
    if left.ndim != 3:
        raise ValueError(f"left: expected shape [K, R, O], got {list(left.shape)}")
    if right.ndim != 3 or right.shape[:2] != left.shape[:2]:
        raise ValueError(
            f"right: expected shape [{left.shape[0]}, {left.shape[1]}, I] to match left, got {list(right.shape)}"
        )


def check_rows(x: Tensor, dy: Tensor) -> None:
    """Refuse per-sample rows whose shapes do not belong together."""
    is_index = x.dtype in (torch.int64, torch.int32)  # narrower integers and booleans would be taken for masks
    if x.ndim != (2 if is_index else 3) or not (is_index or x.is_floating_point()):
        raise ValueError(f"x: expected shape [B, T, I], or int64 [B, T], got {x.dtype} {list(x.shape)}")
    n_sequences, n_positions = x.shape[:2]
    if dy.ndim != 3 or dy.shape[1] != n_positions or (dy.shape[0] % n_sequences if n_sequences else dy.shape[0]):
        raise ValueError(
            f"dy: expected shape [S, {n_positions}, O] with S a multiple of {n_sequences}, got {list(dy.shape)}"
        )


def check_rows_fit(x: Tensor, dy: Tensor, left: Tensor, right: Tensor) -> None:
    """Refuse rows that are not as wide as the factors they meet."""
    if dy.shape[2] != left.shape[2]:
        raise ValueError(f"left: expected shape [K, R, {dy.shape[2]}] to match dy, got {list(left.shape)}")
    if x.is_floating_point() and x.shape[2] != right.shape[2]:
        raise ValueError(f"right: expected shape [K, R, {x.shape[2]}] to match x, got {list(right.shape)}")


def check_dense(grad: Tensor, left: Tensor, right: Tensor) -> None:
    """Refuse a materialised gradient that does not have the directions' shape."""
    if grad.ndim != 3 or grad.shape[1:] != (left.shape[2], right.shape[2]):
        raise ValueError(
            f"grad: expected shape [S, {left.shape[2]}, {right.shape[2]}] to match the factors, got {list(grad.shape)}"
        )


def check_kept(shape: tuple[int, int], n_samples: int | None, left: Tensor) -> None:
    """Refuse kept coefficients that belong to other samples or subnetworks."""
    expected = (shape[0] if n_samples is None else n_samples, left.shape[0])
    if tuple(shape) != expected:
        raise ValueError(f"kept: expected coefficients of shape {list(expected)}, got {list(shape)}")
