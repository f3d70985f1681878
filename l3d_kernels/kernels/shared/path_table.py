"""Which path a call takes where an operation has several: a committed table, by device, arithmetic and width.

No row was measured on a GPU yet. They are by counted cost, for project: FUSED keeps S*T*K*R products in registers;
CHUNKED writes and reads them once more, 2 * itemsize bytes each, and leaves the 2*O operations for each to the library.
If the fused kernel reaches the 70 % of the library's rate that it aims for, it spends 0.43 * 2*O operations' time more
for each; at the balance of an H100's data sheet (about 295 operations of bfloat16, or 148 of tf32, in the time of a
byte) that is more than the bytes take from a width O of 1,400 on. Exact float32 products have no matrix units in the
library, and tf32x3 in the kernel: there, FUSED throughout. `python3 -m bench.gpu` times the paths, and prints the rows
that its device should have instead.
"""

import torch

from l3d_kernels.kernels.shared.launch_table import kind_of

FUSED = "fused"  # one kernel that keeps its products in registers
CHUNKED = "chunked"  # library products in chunks, and a kernel behind them
TWIN = "twin"  # plain torch; taken by backend="auto" only

WIDTHS = (("narrow", 1024), ("wide", 3072))  # and "widest" from there on: of the operation's last dimension

# (operation, kind of device, arithmetic, width class) -> path. None stands for all that have no row of their own;
# an operation without rows has one path, its kernels.
PATHS: dict[tuple[str, str | None, str | None, str | None], str] = {
    ("project", None, None, None): FUSED,
    ("project", None, "16", "wide"): CHUNKED,
    ("project", None, "16", "widest"): CHUNKED,
    ("project", None, "tf32", "wide"): CHUNKED,
    ("project", None, "tf32", "widest"): CHUNKED,
}


def width_class(width: int) -> str:
    """Return the class of a width: "narrow", "wide" or "widest"."""
    for name, below in WIDTHS:
        if width < below:
            return name
    return "widest"


def arithmetic(dtype: torch.dtype) -> str:
    """Return how products of a dtype are made: "16", "tf32", "fp32" (exact) or "64"."""
    if dtype != torch.float32:
        return str(8 * dtype.itemsize)
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def path_of(op: str, device: torch.device, dtype: torch.dtype, width: str) -> str:
    """Return the path of an operation on a device, for a dtype and a width class; the row of most matches counts."""
    kind, products = kind_of(device), arithmetic(dtype)
    rows = [
        (sum(part is not None for part in key[1:]), key[1] is not None, path)
        for key, path in PATHS.items()
        if key[0] == op and key[1] in (None, kind) and key[2] in (None, products) and key[3] in (None, width)
    ]
    return max(rows)[2] if rows else FUSED
