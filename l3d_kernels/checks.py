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


def check_shape(name: str, tensor: Tensor, *sizes: str | int, why: str = "") -> None:
    """Refuse a tensor whose sizes along its axes are not `sizes`; a letter there stands for any size."""
    fits = (isinstance(size, str) or size == own for size, own in zip(sizes, tensor.shape, strict=False))
    if tensor.ndim != len(sizes) or not all(fits):
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, sizes))}]{why}, got {list(tensor.shape)}")


def check_factors(left: Tensor, right: Tensor) -> None:
    """Refuse low-rank factors whose shapes do not fit each other: left [K, R, O], right [K, R, I]."""
    check_shape("left", left, "K", "R", "O")
    check_shape("right", right, *left.shape[:2], "I", why=" to match left")


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
    check_shape("left", left, "K", "R", dy.shape[2], why=" to match dy")
    if x.is_floating_point():
        check_shape("right", right, "K", "R", x.shape[2], why=" to match x")


def check_dense(grad: Tensor, left: Tensor, right: Tensor) -> None:
    """Refuse materialised gradients that do not have the directions' shape [O, I]."""
    check_factors(left, right)
    check_alike(grad=grad, left=left, right=right)
    check_shape("grad", grad, "S", left.shape[2], right.shape[2], why=" to match the factors")


def check_kept(shape: tuple[int, int], n_samples: int, left: Tensor) -> None:
    """Refuse kept coefficients of another number of samples or subnetworks."""
    expected = (n_samples, left.shape[0])
    if tuple(shape) != expected:
        raise ValueError(f"kept: expected coefficients of shape {list(expected)}, got {list(shape)}")


def check_count(n: int, size: int, of: str) -> None:
    """Refuse a number of entries to keep that is below 0 or above `size`."""
    if not 0 <= n <= size:
        raise ValueError(f"n: expected 0 <= n <= {of}, got {n}")


def check_codes(indices: Tensor, values: Tensor, weight: Tensor, row_offsets: Tensor | None) -> None:
    """Refuse sparse codes and a dictionary whose shapes do not fit each other."""
    if row_offsets is None:
        check_shape("indices", indices, "A", "k")
    else:
        check_shape("indices", indices, "N", why=" with row_offsets")
    check_shape("values", values, *indices.shape, why=" to match indices")
    check_shape("weight", weight, "L", "D")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse the input and the parameters of a linear head whose shapes, dtypes or devices do not fit each other."""
    check_shape("hidden", hidden, "S", "D")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or len(weight) == 0:
        raise ValueError(f"weight: expected shape [V, {hidden.shape[1]}] with V at least 1, got {list(weight.shape)}")
    check_alike(hidden=hidden, weight=weight, **({} if bias is None else {"bias": bias}))
    if bias is not None:
        check_shape("bias", bias, len(weight))
