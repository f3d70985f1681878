"""Store the coefficients that a kernel has computed: add those of other weight tensors, count their magnitudes.

Batch top-k starts from the histogram of |c| (`l3d_kernels.kernels.project.topk`). Counting it here saves the selection
a pass over the coefficients.
"""

import triton
import triton.language as tl

from l3d_kernels.kernels.shared.device import load, store
from l3d_kernels.kernels.topk.radix import count_magnitudes


@triton.jit
def lines(tile, SLOT: tl.constexpr, BLOCK: tl.constexpr):
    """Return (group, member) of each of a tile's BLOCK lines: samples and positions, or subnetworks and ranks."""
    line = tl.arange(0, BLOCK)
    return tile * (BLOCK // SLOT) + line // SLOT, line % SLOT


@triton.jit
def finish(
    out_ptr,  # [S, K] with rows `stride` apart
    histogram_ptr,  # [2^bits] int64, to be counted up; or None
    base_ptr,  # as out, to be added; or None
    total,  # a program's tile
    S,
    K,
    stride,
):
    """Store a program's coefficients, with `base` added and their magnitudes counted where those are given."""
    offs_s = tl.program_id(0).to(tl.int64) * total.shape[0] + tl.arange(0, total.shape[0])
    offs_k = tl.program_id(1).to(tl.int64) * total.shape[1] + tl.arange(0, total.shape[1])
    places = offs_s[:, None] * stride + offs_k[None, :]
    mask = (offs_s < S)[:, None] & (offs_k < K)[None, :]
    if base_ptr is not None:
        total += load(base_ptr + places, mask)
    store(out_ptr + places, total, mask)
    if histogram_ptr is not None:
        count_magnitudes(histogram_ptr, total, mask, out_ptr)


# the constants of a form compiled ahead of time, by whether it counts and adds
COUNTED: tuple[dict[str, None], dict[str, None]] = ({"base_ptr": None, "histogram_ptr": None}, {})
