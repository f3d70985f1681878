"""Check the arguments of the public ops: shapes, dtypes and devices. An error names the argument that does not fit.

Every message has one form: `dy: expected shape [S, T, O] with S a multiple of 4, got [6, 16, 256]`.
"""

import torch
from torch import Tensor


def check_alike(**tensors: Tensor) -> None:
    """Refuse tensors on another device than the first one, and floating tensors of another dtype.

    Under autocast dtypes may differ: autocast casts them.
    """
    (first, like), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != like.device:
            raise ValueError(f"{name}: expected device {like.device} to match {first}, got {tensor.device}")
        differs = tensor.is_floating_point() and tensor.dtype != like.dtype
        if differs and not torch.is_autocast_enabled(like.device.type):
            raise ValueError(f"{name}: expected dtype {like.dtype} to match {first}, got {tensor.dtype}")


def check_factors(left: Tensor, right: Tensor) -> None:
    """Refuse low-rank factors whose shapes do not fit each other: left [K, R, O], right [K, R, I]."""
    if left.ndim != 3:
        raise ValueError(f"left: expected shape [K, R, O], got {list(left.shape)}")
    if right.ndim != 3 or right.shape[:2] != left.shape[:2]:
        expected = f"[{left.shape[0]}, {left.shape[1]}, I]"
        raise ValueError(f"right: expected shape {expected} to match left, got {list(right.shape)}")


def check_rows(x: Tensor, dy: Tensor) -> None:
    """Refuse a layer input and an output gradient whose shapes do not fit each other: x [B, T, I] or [B, T]."""
    is_index = x.dtype in (torch.int64, torch.int32)  # torch would take narrower integers and booleans for masks
    if x.ndim != (2 if is_index else 3) or not (is_index or x.is_floating_point()):
        raise ValueError(f"x: expected shape [B, T, I], or int64 [B, T], got {x.dtype} {list(x.shape)}")
    n_sequences, n_positions = x.shape[:2]
    if dy.ndim != 3 or dy.shape[1] != n_positions or (dy.shape[0] % n_sequences if n_sequences else dy.shape[0]):
        expected = f"[S, {n_positions}, O] with S a multiple of {n_sequences}"
        raise ValueError(f"dy: expected shape {expected}, got {list(dy.shape)}")


def check_projection(x: Tensor, dy: Tensor, left: Tensor, right: Tensor) -> None:
    """Refuse a layer's x and dy, or factors, that do not fit each other in shape, dtype or device."""
    check_rows(x, dy)
    check_factors(left, right)
    check_alike(dy=dy, x=x, left=left, right=right)
    if dy.shape[2] != left.shape[2]:
        raise ValueError(f"left: expected shape [K, R, {dy.shape[2]}] to match dy, got {list(left.shape)}")
    if x.is_floating_point() and x.shape[2] != right.shape[2]:
        raise ValueError(f"right: expected shape [K, R, {x.shape[2]}] to match x, got {list(right.shape)}")


def check_dense(grad: Tensor, left: Tensor, right: Tensor) -> None:
    """Refuse materialised gradients that do not have the directions' shape [O, I]."""
    check_factors(left, right)
    check_alike(grad=grad, left=left, right=right)
    if grad.ndim != 3 or grad.shape[1:] != (left.shape[2], right.shape[2]):
        expected = f"[S, {left.shape[2]}, {right.shape[2]}]"
        raise ValueError(f"grad: expected shape {expected} to match the factors, got {list(grad.shape)}")


def check_kept(shape: tuple[int, int], n_samples: int, left: Tensor) -> None:
    """Refuse kept coefficients of another number of samples or subnetworks."""
    expected = (n_samples, left.shape[0])
    if tuple(shape) != expected:
        raise ValueError(f"kept: expected coefficients of shape {list(expected)}, got {list(shape)}")


def check_matrix(coefficients: Tensor) -> None:
    """Refuse coefficients that are not a matrix [S, K]."""
    if coefficients.ndim != 2:
        raise ValueError(f"coefficients: expected shape [S, K], got {list(coefficients.shape)}")


def check_count(n: int, size: int, of: str) -> None:
    """Refuse a number of entries to keep that is below 0 or above `size`."""
    if not 0 <= n <= size:
        raise ValueError(f"n: expected 0 <= n <= {of}, got {n}")


def check_codes(indices: Tensor, values: Tensor, weight: Tensor, row_offsets: Tensor | None) -> None:
    """Refuse sparse codes and a dictionary whose shapes do not fit each other."""
    if indices.ndim != (2 if row_offsets is None else 1):
        expected = "[A, k]" if row_offsets is None else "[N] with row_offsets"
        raise ValueError(f"indices: expected shape {expected}, got {list(indices.shape)}")
    if values.shape != indices.shape:
        raise ValueError(f"values: expected shape {list(indices.shape)} to match indices, got {list(values.shape)}")
    if weight.ndim != 2:
        raise ValueError(f"weight: expected shape [L, D], got {list(weight.shape)}")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse the input and the parameters of a linear head whose shapes, dtypes or devices do not fit each other."""
    if hidden.ndim != 2:
        raise ValueError(f"hidden: expected shape [S, D], got {list(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or len(weight) == 0:
        raise ValueError(f"weight: expected shape [V, {hidden.shape[1]}] with V at least 1, got {list(weight.shape)}")
    check_alike(hidden=hidden, weight=weight, **({} if bias is None else {"bias": bias}))
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{len(weight)}], got {list(bias.shape)}")
