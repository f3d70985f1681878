"""Store the coefficients that a kernel has computed: add those of other weight tensors, count their magnitudes.

Batch top-k starts from the histogram of |c| (`l3d_kernels.kernels.project.topk`). Counting it here saves the selection
a pass over the coefficients.
"""

import triton
import triton.language as tl

from l3d_kernels.kernels.shared.device import load, store
from l3d_kernels.kernels.topk.radix import count_magnitudes


@triton.jit
def finish(
    out_ptr,  # [S, K] with rows `stride` apart
    histogram_ptr,  # [2^bits] int64, to be counted up; or None
    base_ptr,  # as out, to be added; or None
    total,  # [BLOCK_S, BLOCK_K]
    S,
    K,
    stride,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store a program's coefficients, with `base` added and their magnitudes counted where those are given."""
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    places = offs_s[:, None] * stride + offs_k[None, :]
    mask = (offs_s < S)[:, None] & (offs_k < K)[None, :]
    if base_ptr is not None:
        total += load(base_ptr + places, mask)
    store(out_ptr + places, total, mask)
    if histogram_ptr is not None:
        count_magnitudes(histogram_ptr, total, mask, out_ptr)


# the constants of a form compiled ahead of time, by whether it counts and adds
COUNTED: tuple[dict[str, None], dict[str, None]] = ({"base_ptr": None, "histogram_ptr": None}, {})
