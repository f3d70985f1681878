"""Count what a step asks of a GPU without one: launches, and waits for the device, on tensors that have shapes only.

A launch is an aten operation that is no view, or one Triton kernel inside our ops. A wait is what makes the host stop
until the device has answered: a number read from it (`.item`, `.tolist`, `.cpu`), a shape that depends on its values
(`nonzero`, boolean indexing), or a copy from the host without `non_blocking`.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHAPE_DEPENDS = ("nonzero", "masked_select", "unique_dim", "_unique2")
NOTHING = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "detach",
    "_unsafe_view",
    "promote_types",
)


class Launches(TorchDispatchMode):
    """Counts launches and waits, with the line of our code that each comes from.

    On meta tensors a number that is read is 1, and a tensor that is copied to the CPU holds ones. What works on CPU
    tensors alone is no launch, unless the device is a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.launches: Counter[str] = Counter()  # by name of the operation or kernel
        self.waits: Counter[str] = Counter()  # by what waits, and where

    @property
    def count(self) -> int:
        return self.launches.total()

    def own(self, name: str) -> None:
        """Count a launch of one of our kernels."""
        self.launches[f"l3d::{name}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "l3d":
            from l3d_kernels.kernels.shared import common

            with self:  # the operator's own launches; on meta tensors torch would call a fake, which makes none
                return common.OPERATORS[name](*args, **kwargs)
        if func.is_view or func.namespace not in ("aten", "prims") or name in NOTHING:
            return func(*args, **kwargs)
        target, source = self._copied(name, args, kwargs)
        if source is not None and source.type != target.type and "cpu" in (source.type, target.type):
            if target.type == "cpu" or not kwargs.get("non_blocking"):
                self._wait(f"copy from {source.type} to {target.type}")
            if target.type == "cpu":
                return torch.ones_like(args[0], device="cpu", dtype=kwargs.get("dtype"))
        elif name == "_local_scalar_dense":
            self._wait("a number read")
            if args[0].is_meta:
                return 1.0 if args[0].dtype.is_floating_point else 1
        elif name in SHAPE_DEPENDS or (name in ("index", "index_put_") and _boolean(args[1])):
            self._wait(name)
        result = func(*args, **kwargs)
        if any(t.device.type == self.device.type for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)):
            self.launches[name] += 1
        return result

    @staticmethod
    def _copied(name: str, args: Any, kwargs: Any) -> tuple[torch.device, torch.device | None]:
        """Return (target, source) of a copy; no source for another operation."""
        if name == "copy_":
            return args[0].device, args[1].device
        if name == "_to_copy" and kwargs.get("device") is not None:
            return torch.device(kwargs["device"]), args[0].device
        return torch.device("cpu"), None

    def _wait(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/l3d" in frame.filename]
        where = next((f for f in reversed(frames) if "/bench/" not in f.filename), None)
        self.waits[f"{what}, {where.filename.rpartition('/')[2]}:{where.lineno}" if where else what] += 1


def _boolean(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


@contextmanager
def counting(device: torch.device) -> Iterator[Launches]:
    """Count the launches and waits of what runs inside on a device, those of our own kernels included."""
    from l3d_kernels import registry

    seen = Launches(device)
    watchers: list[Any] = []
    if registry.load_kernels() == "":
        from l3d_kernels.kernels.shared import common

        watchers = common.WATCHERS
    watchers.append(seen.own)
    try:
        with seen:
            yield seen
    finally:
        watchers.remove(seen.own)


@contextmanager
def weights_of_shapes_only() -> Iterator[None]:
    """Let a model on the meta device through, whose missing values a run refuses."""
    with patch("l3d.gradients.extract.check_fixed"), patch("l3d.gradients.extract.forget"):
        yield
