"""Choose the implementation that runs a call: the table of Triton kernels, and when a call takes them.

The choice is made per call, from the device and dtype of the tensors. "auto" takes the Triton kernel on a GPU, unless
the table of paths names plain torch as the faster; elsewhere it takes plain torch. An explicit request that cannot be
met raises an error; no call falls back silently. Under a transform of torch.func, and in forward mode, "auto" and
"torch" take the op's definition, which torch can transform at every size.

Nothing here imports `l3d_kernels.kernels` with a statement: the first call that wants it imports it by name, and it
adds its ops to the table.
"""

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from l3d_kernels import reference
from l3d_kernels.transforms import forward_mode, transformed

BACKENDS = ("auto", "torch", "triton")
DEVICES = ("cuda", "meta")  # where "auto" takes kernels; torch calls AMD's GPUs "cuda" too, "meta" has shapes only
WIDTHS = (("narrow", 1024), ("wide", 3072))  # classes of an op's last dimension; "widest" from there on

# op name -> function that launches its kernels; filled when l3d_kernels.kernels is imported
TRITON: dict[str, Callable[..., Any]] = {}

Implementation = TypeVar("Implementation", bound=Callable[..., Any])


def load_kernels() -> str:
    """Import the Triton kernels, which register themselves; return the reason why there are none, or ""."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it"
    importlib.import_module("l3d_kernels.kernels")
    return ""


def interpreted() -> bool:
    """Return whether the loaded kernels run in Triton's interpreter; that is settled when they are imported."""
    return bool(importlib.import_module("l3d_kernels.kernels.shared.device").INTERPRETED.value)


def torch_is_faster(op: str, device: torch.device, dtype: torch.dtype, width: str) -> bool:
    """Return whether the loaded kernels' table names plain torch for an op, on a device, for a dtype and a width."""
    table = importlib.import_module("l3d_kernels.kernels.shared.path_table")
    return bool(table.path_of(op, device, dtype, width) == table.TWIN)


# torch.compile calls these three while it traces and treats what they return as constants, which they are. The mark is
# what torch.compiler.assume_constant_result sets; calling that would import the whole compiler.
load_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]
interpreted._dynamo_marked_constant = True  # type: ignore[attr-defined]
torch_is_faster._dynamo_marked_constant = True  # type: ignore[attr-defined]


def width_class(width: int) -> str:
    """Return the class of a width: "narrow", "wide" or "widest"."""
    return next((name for name, below in WIDTHS if width < below), "widest")


def implementation(twin: Implementation, backend: str, tensor: Tensor) -> Implementation:
    """Return the function that runs an op for `tensor`'s device and dtype: its kernel, or `twin`, its plain torch.

    The kernel is the one registered under the name of `twin`. Raises ValueError for an unknown backend, RuntimeError
    where backend="triton" cannot be met, or where a transform cannot be.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if transformed() and (backend != "triton" or not hasattr(reference, twin.__name__)):
        return _definition(twin.__name__)
    if backend == "torch" or (backend == "auto" and tensor.device.type not in DEVICES):
        return twin
    missing = load_kernels()
    op: str = twin.__name__
    kernel: Any = TRITON.get(op)
    if backend == "auto":
        if kernel is None or tensor.dtype == torch.float64:
            return twin
        return twin if torch_is_faster(op, tensor.device, tensor.dtype, width_class(tensor.shape[-1])) else kernel
    reason = missing or _why_not(op, kernel is not None, tensor)
    if reason:
        raise RuntimeError(f"backend='triton': {reason}, or use 'auto' or 'torch'")
    return kernel


def _definition(op: str) -> Any:
    """Return an op's definition, for a call under a transform; raise RuntimeError for an op that has none."""
    defined = getattr(reference, op, None)
    if defined is None:
        raise RuntimeError(f"{op}: cannot run under torch.func or in forward mode, for it waits for other processes")
    return defined


def _why_not(op: str, has_kernel: bool, tensor: Tensor) -> str:
    """Return why the Triton kernel of an op cannot run on a tensor, and what would help; "" where it can."""
    kind = tensor.device.type
    if has_kernel and forward_mode():
        return f"the kernels of {op} have no forward-mode derivative (torch.func.jvp); take it by torch.func.grad"
    if not has_kernel:
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
