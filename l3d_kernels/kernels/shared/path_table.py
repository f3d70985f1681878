"""Choose a path where an op has several: a committed table, by device, arithmetic and width.

No row was measured on a GPU yet; the rows follow from counted cost. For `project`, FUSED keeps the S*T*K*R products in
registers. CHUNKED writes them and reads them once more, 2 * itemsize bytes each, and leaves the 2*O operations of each
product to the library. The fused kernel aims for 70 % of the library's rate; if it reaches that, it spends the time of
0.43 * 2*O more operations on each product. An H100's data sheet gives about 295 operations of bfloat16, or 148 of tf32,
in the time of one byte. So from a width O of 1,400 on, CHUNKED is the cheaper. Exact float32 products have no matrix
units in the library and tf32x3 in the kernel; there FUSED is taken throughout. `python3 -m bench.gpu` times the paths
and prints the rows that its device should have instead.
"""

import torch

from l3d_kernels.kernels.shared.launch_table import kind_of

FUSED = "fused"  # one kernel that keeps its products in registers
CHUNKED = "chunked"  # library products in chunks, then a kernel that multiplies and sums them
TWIN = "twin"  # plain torch; taken by backend="auto" only

# (op, kind of device, arithmetic, width class of `registry`) -> path. None stands for all that have no row of their
# own; an op without rows has one path, its kernels.
PATHS: dict[tuple[str, str | None, str | None, str | None], str] = {
    ("project", None, None, None): FUSED,
    ("project", None, "16", "wide"): CHUNKED,
    ("project", None, "16", "widest"): CHUNKED,
    ("project", None, "tf32", "wide"): CHUNKED,
    ("project", None, "tf32", "widest"): CHUNKED,
}


def arithmetic(dtype: torch.dtype) -> str:
    """Return how products of a dtype are computed: "16", "tf32", "fp32" (exact) or "64"."""
    if dtype != torch.float32:
        return str(8 * dtype.itemsize)
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def path_of(op: str, device: torch.device, dtype: torch.dtype, width: str) -> str:
    """Return the path of an op on a device, for a dtype and a width class, from the most specific row that matches."""
    kind, products = kind_of(device), arithmetic(dtype)
    rows = [
        (sum(part is not None for part in key[1:]), key[1] is not None, path)
        for key, path in PATHS.items()
        if key[0] == op and key[1] in (None, kind) and key[2] in (None, products) and key[3] in (None, width)
    ]
    return max(rows)[2] if rows else FUSED
