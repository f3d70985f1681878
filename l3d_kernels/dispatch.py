"""Which implementation runs a call, and the checks every public op makes before it does.

The choice is made per call, from the tensors' device: "auto" takes the Triton kernel where there is one for the
device (and `path_table` does not name the twin as the faster), else the plain-torch twin. An explicit
request that cannot be met raises; nothing falls back in silence.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from l3d_kernels import reference

BACKENDS = ("auto", "torch", "triton")
DEVICES = ("cuda", "meta")  # where "auto" takes kernels; AMD's GPUs are "cuda" to torch, "meta" knows shapes only

# op name -> function that launches its kernels. Filled when l3d_kernels.kernels is imported; the twin is always there.
TRITON: dict[str, Callable[..., Any]] = {}


def load_kernels() -> str:
    """Import the Triton kernels, which register themselves; return why there are none, or nothing."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it"
    importlib.import_module("l3d_kernels.kernels")
    return ""


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, which is settled when they are first imported."""
    from l3d_kernels.kernels.shared import common

    return bool(common.INTERPRETED.value)


def twin_is_faster(op: str, device: torch.device, dtype: torch.dtype, width: str) -> bool:
    """Whether the table of paths names the twin for an operation on a device, for a dtype and a width class."""
    from l3d_kernels.kernels.shared import path_table as paths

    return paths.path_of(op, device, dtype, width) == paths.TWIN


# torch.compile calls these while it traces and takes what they return for constants, which they are. The mark is
# what torch.compiler.assume_constant_result sets; calling that would import the whole compiler.
load_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]
interpreted._dynamo_marked_constant = True  # type: ignore[attr-defined]
twin_is_faster._dynamo_marked_constant = True  # type: ignore[attr-defined]


def implementation(op: str, backend: str, tensor: Tensor) -> Callable[..., Any]:
    """Return the function that runs `op` for `tensor`'s device and dtype.

    Raises ValueError for an unknown backend, RuntimeError where backend="triton" cannot be honoured.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    twin: Callable[..., Any] = getattr(reference, op)
    if backend == "torch" or (backend == "auto" and tensor.device.type not in DEVICES):
        return twin
    missing = load_kernels()
    kernel = TRITON.get(op)
    if backend == "auto":
        if kernel is None or tensor.dtype == torch.float64:
            return twin
        from l3d_kernels.kernels.shared.path_table import width_class

        width = width_class(tensor.shape[-1])
        return twin if twin_is_faster(op, tensor.device, tensor.dtype, width) else kernel
    reason = missing or _why_not(op, kernel, tensor)
    if reason:
        raise RuntimeError(f"backend='triton': {reason}, or use 'auto' or 'torch'")
    assert kernel is not None
    return kernel


def _why_not(op: str, kernel: Callable[..., Any] | None, tensor: Tensor) -> str:
    """Return why the Triton kernel of an op cannot run on a tensor, with what would help, or nothing."""
    kind = tensor.device.type
    if kernel is None:
        return f"no Triton kernel for {op} in this version"
    if kind == "cpu" and not interpreted():
        return (
            f"{op} got a CPU tensor; move it to a GPU, or set TRITON_INTERPRET=1 before the kernels are first used to "
            "run them in Triton's interpreter"
        )
    if kind not in (*DEVICES, "cpu"):
        return f"{op} got a tensor on {kind}; move it to a CUDA or HIP device"
    if kind == "cuda" and tensor.dtype == torch.float64:
        return f"{op} got float64, which the kernels take in the interpreter only; use float32"
    return ""


def check_alike(**tensors: Tensor) -> None:
    """Refuse tensors that are not on the first one's device, or floating ones not in its dtype (autocast may cast)."""
    (first, like), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != like.device:
            raise ValueError(f"{name}: expected device {like.device} to match {first}, got {tensor.device}")
        differs = tensor.is_floating_point() and tensor.dtype != like.dtype
        if differs and not torch.is_autocast_enabled(like.device.type):
            raise ValueError(f"{name}: expected dtype {like.dtype} to match {first}, got {tensor.dtype}")


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
    check_alike(dy=dy, x=x, left=left, right=right)
    if dy.shape[2] != left.shape[2]:
        raise ValueError(f"left: expected shape [K, R, {dy.shape[2]}] to match dy, got {list(left.shape)}")
    if x.is_floating_point() and x.shape[2] != right.shape[2]:
        raise ValueError(f"right: expected shape [K, R, {x.shape[2]}] to match x, got {list(right.shape)}")


def check_dense(grad: Tensor, left: Tensor, right: Tensor) -> None:
    """Refuse a materialised gradient that does not have the directions' shape."""
    check_alike(grad=grad, left=left, right=right)
    if grad.ndim != 3 or grad.shape[1:] != (left.shape[2], right.shape[2]):
        raise ValueError(
            f"grad: expected shape [S, {left.shape[2]}, {right.shape[2]}] to match the factors, got {list(grad.shape)}"
        )


def check_kept(shape: tuple[int, int], n_samples: int | None, left: Tensor) -> None:
    """Refuse kept coefficients that belong to other samples or subnetworks."""
    expected = (shape[0] if n_samples is None else n_samples, left.shape[0])
    if tuple(shape) != expected:
        raise ValueError(f"kept: expected coefficients of shape {list(expected)}, got {list(shape)}")
