"""Look up launch configurations: one row per kernel, kind of device and size class; no program tunes while it runs.

Every row compiles ahead of time for its devices without register spills and within the limit of shared memory, which
tests/kernels/test_compile.py checks. No row has been timed on a GPU yet.
"""

from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """Block sizes (the kernel's constexprs of those names), and the number of warps and pipeline stages."""

    blocks: dict[str, Any]
    warps: int = 4
    stages: int = 3

    def tiles(self, **sizes: int) -> tuple[int, ...]:
        """Return how many blocks cover each size, that named X in blocks of BLOCK_X."""
        return tuple(-(-size // self.blocks[f"BLOCK_{name}"]) for name, size in sizes.items())

    def options(self, kind: str) -> dict[str, int]:
        """Return the compiler's options on a kind of device.

        The register limit is stated for NVIDIA: without it the assembler spills a few registers, so that one more block
        fits on a processor.
        """
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if kind.startswith("sm_"):
            options["maxnreg"] = min(255, 65536 // (32 * self.warps))
        return options


KINDS = ("sm_80", "sm_90", "sm_100", "gfx942")  # what is compiled ahead of time

# kernel -> {(kind, class): Launch}. A kind or class of None stands for all that have no row of their own. The kind
# "interpreter" has small blocks, so that a test's sizes need several of them.
Rows = dict[tuple[str | None, str | None], Launch]
TABLE: dict[str, Rows] = {}


def kind_of(device: torch.device) -> str:
    """Return the device's kind: its architecture, or the nearest older one that the table knows."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def size_class(dtype: torch.dtype) -> str:
    """Return how many bits an element has: "16", "32" or "64"."""
    return str(8 * dtype.itemsize)


def lookup(kernel: str, kind: str, bits: str) -> Launch:
    """Return the kernel's row for a kind of device and a size class."""
    rows = TABLE[kernel]
    for key in ((kind, bits), (kind, None), (None, bits), (None, None)):
        if key in rows:
            return rows[key]
    raise KeyError(f"no launch configuration for {kernel} on {kind} with {bits}-bit elements")
