"""Look up launch configurations: one row per kernel, kind of device and size class; no program tunes while it runs.

Every row compiles ahead of time for its devices without register spills and within the limit of shared memory, which
tests/kernels/test_compile.py checks. No row has been timed on a GPU yet.
"""

import itertools
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
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        if kind.startswith("sm_"):
            options["maxnreg"] = min(255, 65536 // (32 * self.warps))
        return options


# What is compiled ahead of time, and the kind whose rows a kind takes where it has none of its own: its matrix
# instructions are the same, or the closest. sm_86, sm_89, sm_120 and gfx1100 are the GPUs of desktops.
KINDS = {
    "sm_80": None,
    "sm_86": "sm_80",
    "sm_89": "sm_86",
    "sm_90": None,
    "sm_100": None,
    "sm_120": "sm_89",
    "gfx942": None,
    "gfx950": "gfx942",
    "gfx1100": "gfx942",
}

# kernel -> {(kind, class): Launch}. A kind or class of None stands for all that have no row of their own. The kind
# "interpreter" has small blocks, so that a test's sizes need several of them.
Rows = dict[tuple[str | None, str | None], Launch]
TABLE: dict[str, Rows] = {}


def kind_of(device: torch.device) -> str:
    """Return the device's kind: its architecture, or the nearest older one that the table knows."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return name if name in KINDS else "gfx942" if name.startswith("gfx9") else "gfx1100"
    major, minor = torch.cuda.get_device_capability(device)
    known = [int(kind[3:]) for kind in KINDS if kind.startswith("sm_")]
    return f"sm_{max((number for number in known if number <= 10 * major + minor), default=min(known))}"


def size_class(dtype: torch.dtype) -> str:
    """Return how many bits an element has: "16", "32" or "64"."""
    return str(8 * dtype.itemsize)


def lookup(kernel: str, kind: str, bits: str) -> Launch:
    """Return the kernel's row for a kind of device and a size class: its own, else that of the kind it resembles."""
    rows, kinds = TABLE[kernel], [kind]
    while resembled := KINDS.get(kinds[-1]):
        kinds.append(resembled)
    for key in itertools.product((*kinds, None), (bits, None)):
        if key in rows:
            return rows[key]
    raise KeyError(f"no launch configuration for {kernel} on {kind} with {bits}-bit elements")
