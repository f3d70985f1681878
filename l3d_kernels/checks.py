"""Check the arguments of the public ops: kinds, shapes, dtypes and devices. An error names what does not fit.

Every message has one form: `dy: expected shape [S, T, O] with S a multiple of 4, got [6, 16, 256]`. Numbers in tensors
of indices and offsets are checked on a CPU only: on a GPU the check would wait for the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from l3d_kernels.sparse import SparseCoefficients, check_entries
from l3d_kernels.transforms import readable

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INDICES = (torch.int64, torch.int32)  # torch would take narrower integers and booleans for masks

# --- kinds ------------------------------------------------------------------------------------------------------


def check_alike(**tensors: Tensor) -> None:
    """Refuse anything but dense tensors of one floating dtype on one device; x may hold integers.

    Under autocast the floating dtypes may differ: autocast casts them.
    """
    like: Tensor | None = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            check_tensor(name, tensor)
        if like is None:
            first, like, device, dtype = name, tensor, tensor.device, tensor.dtype
            if dtype not in FLOATS:
                raise ValueError(f"{name}: expected float32, float64, bfloat16 or float16, got {dtype}")
        elif tensor.device != device:
            raise ValueError(f"{name}: expected device {device} to match {first}, got {tensor.device}")
        elif tensor.dtype is not dtype and not (name == "x" and not tensor.is_floating_point()):
            _check_cast(name, tensor, first, like)


def _check_cast(name: str, tensor: Tensor, first: str, like: Tensor) -> None:
    """Refuse a dtype that autocast does not bring to that of `like`."""
    if tensor.dtype not in FLOATS or not torch.is_autocast_enabled(like.device.type):
        raise ValueError(f"{name}: expected dtype {like.dtype} to match {first}, got {tensor.dtype}")


def check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse anything but a dense tensor."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {tensor.layout}")


def integer(name: str, value: Any) -> int:
    """Return a count as an int; refuse what is no integer, such as 2.0, and booleans."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[no-any-return, return-value, unused-ignore]
    try:
        if isinstance(value, bool):
            raise TypeError
        return int(value.__index__())
    except (AttributeError, TypeError, ValueError):  # ValueError: a tensor of several entries
        raise ValueError(f"{name}: expected an integer, got {value!r}") from None


def check_functions(**functions: Callable[..., Any]) -> None:
    """Refuse what cannot be called."""
    for name, function in functions.items():
        if not callable(function):
            raise ValueError(f"{name}: expected a function, got {type(function).__name__}")


# --- shapes -----------------------------------------------------------------------------------------------------


def check_factors(left: Tensor, right: Tensor) -> None:
    """Refuse low-rank factors that do not fit each other: left [K, R, O], right [K, R, I]."""
    check_alike(left=left, right=right)
    _check_factor_shapes(left, right)


def check_pairs(check: Callable[[Tensor, Tensor], None], like: str, **pairs: Tensor | Sequence[Tensor]) -> Tensor:
    """Refuse two tensors, or two lists of them, that `check` refuses; return the first of those named `like`.

    Their first axes must have one size.
    """
    (name, every), (other, others) = pairs.items()
    if not all(isinstance(own, (list, tuple)) and all(isinstance(t, Tensor) for t in own) for own in pairs.values()):
        check(every, others)  # type: ignore[arg-type]
        return pairs[like]  # type: ignore[return-value]
    if not every or len(every) != len(others):
        short, expected, got = (other, len(every), len(others)) if len(every) else (name, "at least 1", 0)
        raise ValueError(f"{short}: expected {expected} tensors, got {got}")
    first = pairs[like][0]
    for i, own in enumerate(zip(every, others, strict=True)):
        same = pairs[like][i]
        try:
            check_alike(first=first, **{like: same})
            check(*own)
        except ValueError as error:
            which, _, said = str(error).partition(":")
            raise ValueError(f"{which}[{i}]:{said}" if which in (name, other) else str(error)) from None
        if len(same) != len(first):
            raise ValueError(f"{like}[{i}]: expected a first axis of {len(first)} as in {like}[0], got {len(same)}")
    return first


def _check_factor_shapes(left: Tensor, right: Tensor) -> None:
    if left.ndim != 3:
        raise ValueError(f"left: expected shape [K, R, O], got {list(left.shape)}")
    if right.ndim != 3 or right.shape[:2] != left.shape[:2]:
        expected = f"[{left.shape[0]}, {left.shape[1]}, I]"
        raise ValueError(f"right: expected shape {expected} to match left, got {list(right.shape)}")


def check_rows(x: Tensor, dy: Tensor) -> None:
    """Refuse a layer input and an output gradient that do not fit each other: x [B, T, I] or [B, T]."""
    check_alike(dy=dy, x=x)
    _check_row_shapes(x, dy)
    if not x.is_floating_point():
        _check_range("x", x, None)


def _check_row_shapes(x: Tensor, dy: Tensor) -> None:
    is_index = x.dtype in INDICES
    if x.ndim != (2 if is_index else 3) or not (is_index or x.is_floating_point()):
        raise ValueError(f"x: expected shape [B, T, I], or int64 [B, T], got {x.dtype} {list(x.shape)}")
    n_sequences, n_positions = x.shape[:2]
    if dy.ndim != 3 or dy.shape[1] != n_positions or (dy.shape[0] % n_sequences if n_sequences else dy.shape[0]):
        expected = f"[S, {n_positions}, O] with S a multiple of {n_sequences}"
        raise ValueError(f"dy: expected shape {expected}, got {list(dy.shape)}")


def check_projection(x: Tensor, dy: Tensor, left: Tensor, right: Tensor) -> None:
    """Refuse a layer's x and dy, or factors, that do not fit each other in kind, shape, dtype or device."""
    check_alike(dy=dy, x=x, left=left, right=right)
    _check_row_shapes(x, dy)
    _check_factor_shapes(left, right)
    if dy.shape[2] != left.shape[2]:
        raise ValueError(f"left: expected shape [K, R, {dy.shape[2]}] to match dy, got {list(left.shape)}")
    if not x.is_floating_point():
        _check_range("x", x, right.shape[2])
    elif x.shape[2] != right.shape[2]:
        raise ValueError(f"right: expected shape [K, R, {x.shape[2]}] to match x, got {list(right.shape)}")


def check_dense(grad: Tensor, left: Tensor, right: Tensor) -> None:
    """Refuse materialised gradients that do not have the directions' shape [O, I]."""
    check_alike(grad=grad, left=left, right=right)
    _check_factor_shapes(left, right)
    if grad.ndim != 3 or grad.shape[1:] != (left.shape[2], right.shape[2]):
        expected = f"[S, {left.shape[2]}, {right.shape[2]}]"
        raise ValueError(f"grad: expected shape {expected} to match the factors, got {list(grad.shape)}")


def check_base(base: Tensor, dy: Tensor, left: Tensor) -> None:
    """Refuse coefficients to add that are not [S, K], of dy's dtype and on its device."""
    check_tensor("base", base)
    shape = (dy.shape[0], left.shape[0])
    if base.shape != shape or base.dtype != dy.dtype:
        raise ValueError(f"base: expected shape {list(shape)} and {dy.dtype}, got {list(base.shape)} and {base.dtype}")
    if base.device != dy.device:
        raise ValueError(f"base: expected device {dy.device} to match dy, got {base.device}")


def check_matrix(coefficients: Tensor) -> None:
    """Refuse coefficients that are not a floating matrix [S, K]."""
    check_alike(coefficients=coefficients)
    if coefficients.ndim != 2:
        raise ValueError(f"coefficients: expected shape [S, K], got {list(coefficients.shape)}")


def check_count(n: int, size: int, of: str, name: str = "n") -> int:
    """Return a number of entries to keep as an int; refuse one that is below 0 or above `size`, or no integer."""
    n = integer(name, n)
    if not 0 <= n <= size:
        raise ValueError(f"{name}: expected 0 <= {name} <= {of}, got {n}")
    return n


# --- entries and offsets ----------------------------------------------------------------------------------------


def check_kept(kept: SparseCoefficients, left: Tensor, n_samples: int | None = None, values: bool = True) -> None:
    """Refuse kept coefficients of another number of samples or subnetworks, or whose indices contradict each other.

    values: whether the op reads them, so that they must have the dtype of `left`.
    """
    if not isinstance(kept, SparseCoefficients):
        raise ValueError(f"kept: expected SparseCoefficients, as batch_topk returns them, got {type(kept).__name__}")
    expected = (kept.shape[0] if n_samples is None else n_samples, left.shape[0])
    if tuple(kept.shape) != expected:
        raise ValueError(f"kept: expected coefficients of shape {list(expected)}, got {list(kept.shape)}")
    check_entries(kept, left.device)
    if values and kept.values.dtype is not left.dtype:
        _check_cast("kept.values", kept.values, "left", left)


def check_codes(indices: Tensor, values: Tensor, weight: Tensor, row_offsets: Tensor | None) -> None:
    """Refuse sparse codes and a dictionary that do not fit each other, and offsets that do not rise from 0 to N."""
    check_alike(weight=weight, values=values)
    for name, tensor in {"indices": indices, **({} if row_offsets is None else {"row_offsets": row_offsets})}.items():
        check_tensor(name, tensor)
        if tensor.dtype not in INDICES or tensor.device != weight.device:
            raise ValueError(f"{name}: expected int64 on {weight.device}, got {tensor.dtype} on {tensor.device}")
    if indices.ndim != (2 if row_offsets is None else 1):
        expected = "[A, k]" if row_offsets is None else "[N] with row_offsets"
        raise ValueError(f"indices: expected shape {expected}, got {list(indices.shape)}")
    if values.shape != indices.shape:
        raise ValueError(f"values: expected shape {list(indices.shape)} to match indices, got {list(values.shape)}")
    if weight.ndim != 2:
        raise ValueError(f"weight: expected shape [L, D], got {list(weight.shape)}")
    _check_range("indices", indices, weight.shape[0])
    if row_offsets is not None:
        _check_offsets(row_offsets, indices.shape[0])


def _check_range(name: str, indices: Tensor, stop: int | None) -> None:
    """Refuse indices below 0 or from `stop` on; torch would count negative ones from the end."""
    if not readable(indices) or indices.numel() == 0:
        return
    low, high = (int(end) for end in indices.aminmax())
    if low < 0 or (stop is not None and high >= stop):
        expected = "indices from 0" if stop is None else f"indices from 0 to {stop - 1}"
        raise ValueError(f"{name}: expected {expected}, got {low if low < 0 else high}")


def _check_offsets(row_offsets: Tensor, n_entries: int) -> None:
    if row_offsets.ndim != 1 or row_offsets.shape[0] == 0:
        raise ValueError(f"row_offsets: expected shape [A+1], got {list(row_offsets.shape)}")
    if readable(row_offsets):
        ends = row_offsets.numpy()
        if ends[0] != 0 or ends[-1] != n_entries or (ends[1:] < ends[:-1]).any():
            expected = f"offsets that rise from 0 to the {n_entries} entries and never fall"
            raise ValueError(f"row_offsets: expected {expected}, got {_shown(ends.tolist())}")


def _shown(numbers: list[int]) -> str:
    """Return a list in a line; of a long one both ends."""
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:4]))}, .., {numbers[-1]}]"


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse the input and the parameters of a linear head that do not fit each other."""
    check_alike(hidden=hidden, weight=weight, **({} if bias is None else {"bias": bias}))
    if hidden.ndim != 2:
        raise ValueError(f"hidden: expected shape [S, D], got {list(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or len(weight) == 0:
        raise ValueError(f"weight: expected shape [V, {hidden.shape[1]}] with V at least 1, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{len(weight)}], got {list(bias.shape)}")


# --- updates in place -------------------------------------------------------------------------------------------


def check_slices(lists: dict[str, Sequence[Tensor]], vectors: dict[str, Tensor]) -> None:
    """Refuse lists of tensors [K, ...] that do not match one by one, and vectors that are not [K] in a wide dtype.

    All but `grads` must be contiguous, since they are written. `scales` are [K, 1, ..] or of one element, and wide.
    """
    for name, every in lists.items():
        if not isinstance(every, (list, tuple)):
            raise ValueError(f"{name}: expected a list of tensors, got {type(every).__name__}")
        if len(every) != len(lists["parameters"]) or not every:
            expected = len(lists["parameters"]) or "at least 1"
            raise ValueError(f"{name}: expected {expected} tensors, got {len(every)}")
    check_alike(**vectors)
    key, vector = next(iter(vectors.items()))
    for name, each in vectors.items():
        if each.ndim != 1 or len(each) != len(vector):
            raise ValueError(f"{name}: expected shape [K] like the others, got {list(each.shape)}")
    tensors = {name: every for name, every in lists.items() if name != "scales"}
    for i, own in enumerate(zip(*tensors.values(), strict=True)):
        check_alike(**{f"{name}[{i}]": tensor for name, tensor in zip(tensors, own, strict=True)})
        wide = torch.float64 if own[0].dtype == torch.float64 else torch.float32
        if vector.dtype != wide or vector.device != own[0].device:
            raise ValueError(f"{key}: expected {wide} on {own[0].device}, got {vector.dtype} on {vector.device}")
        shape = [len(vector), *own[0].shape[1:]]
        for name, tensor in zip(tensors, own, strict=True):
            if list(tensor.shape) != shape:
                raise ValueError(f"{name}[{i}]: expected shape {shape}, got {list(tensor.shape)}")
            if name != "grads" and not tensor.is_contiguous():
                raise ValueError(f"{name}[{i}]: expected a contiguous tensor, got strides {tensor.stride()}")
    for i, scale in enumerate(lists.get("scales", ())):
        check_alike(**{key: vector, f"scales[{i}]": scale})
        if scale.numel() != 1 and list(scale.shape) != [len(vector), *[1] * (lists["parameters"][i].ndim - 1)]:
            raise ValueError(f"scales[{i}]: expected one element, or one per slice, got {list(scale.shape)}")
