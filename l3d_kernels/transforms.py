"""Tell which calls see tensors as they are: torch.func's transforms, forward-mode derivatives and torch.compile do not.

Under a transform, or in forward mode, an op runs its definition in `l3d_kernels.reference`: plain torch, whose every
operation torch can batch and differentiate in both modes, any number of times.
"""

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad


def forward_mode() -> bool:
    """Return whether forward-mode derivatives are being taken (torch.func.jvp, or a dual level of torch.autograd)."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Return whether the call is inside a transform of torch.func, or in forward mode. Takes 0.1 µs."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# torch.compile takes what these return as constants: a compiled function is compiled again under other transforms.
forward_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def readable(tensor: Tensor) -> bool:
    """Return whether the numbers in a tensor can be looked at without waiting for a device."""
    if tensor.device.type != "cpu" or type(tensor) is not Tensor:
        return False
    return not (transformed() or torch.compiler.is_compiling())
