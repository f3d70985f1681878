"""What a call does, counted as torch runs it: FLOPs of products, bytes read and written, operations; and their time.

Every operation reads its tensors once and writes its results once. Views move nothing; what is gathered or scattered is
counted by the elements that are taken, not by the tensor they come from.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

TAKEN = ("index", "gather", "embedding", "index_select", "_embedding_bag")  # read as many elements as they return
PUT = ("index_put", "scatter", "index_add", "index_put_", "scatter_", "index_add_", "_unsafe_index_put")
NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "_local_scalar_dense")
ROUNDS = 50  # of a call that is timed


class Counts(NamedTuple):
    """What was counted of a call."""

    flops: int
    bytes: int
    operations: int

    def and_bytes(self, more: int) -> "Counts":
        """Add bytes that were not counted."""
        return self._replace(bytes=self.bytes + more)


class Rates(NamedTuple):
    """What this machine does at best, in the thread that measures."""

    flops_per_second: float  # of a square product of 512
    bytes_per_second: float  # read and written, copying 64 MiB
    seconds_per_operation: float  # of an addition of one number

    def seconds(self, counts: Counts) -> float:
        """Return the time of what was counted, nothing overlapping."""
        by_bytes = counts.bytes / self.bytes_per_second
        return counts.flops / self.flops_per_second + by_bytes + counts.operations * self.seconds_per_operation


class _Traffic(TorchDispatchMode):
    """Add up bytes and operations, and the FLOPs that are not counted elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NOTHING:
            self.operations += 1
            if name == "addmm_":  # which FlopCounterMode passes over
                self.flops += 2 * args[1].numel() * args[2].shape[1]
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            if name in TAKEN:
                self.bytes += 2 * _bytes(written) + _bytes(read[1:])
            elif name in PUT:
                self.bytes += 3 * _bytes(read[1:])
            else:
                self.bytes += _bytes(read) + _bytes(written)
        return result


def _bytes(tensors: list[Tensor]) -> int:
    """Count tensors' bytes, of one that repeats itself by strides of zero those that there are."""
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)


def count(call: Callable[[], Any]) -> Counts:
    """Run a call twice and count what it does."""
    with FlopCounterMode(display=False) as products:
        call()
    with _Traffic() as traffic:
        call()
    return Counts(products.get_total_flops() + traffic.flops, traffic.bytes, traffic.operations)


def rates() -> Rates:
    """Measure this machine's rates in processor time, with the threads that torch has."""
    a, b, one = torch.randn(512, 512), torch.empty(1 << 24), torch.zeros(1)
    target = torch.empty_like(b)
    products, copies = _fastest(lambda: a @ a), _fastest(lambda: target.copy_(b))
    return Rates(2 * 512**3 / products, 2 * b.nbytes / copies, _fastest(lambda: one + 1))


def _fastest(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(ROUNDS):
        before = time.process_time()
        call()
        times.append(time.process_time() - before)
    return min(times)
