"""How a kernel that has made coefficients leaves them: stored, added to what other tensors gave, and counted.

The histogram of |c| is what batch top-k starts from (`l3d_kernels.kernels.project.topk`); counting it here saves the
selection a pass over the coefficients.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.shared.common import load, store
from l3d_kernels.kernels.topk import radix
from l3d_kernels.kernels.topk.radix import count_magnitudes


@triton.jit
def finish(
    out_ptr,  # [S, K] with rows `stride` apart
    histogram_ptr,  # [2^BITS] int64, counted up where BITS > 0
    base_ptr,  # as out, added where BASED
    total,  # [BLOCK_S, BLOCK_K]
    S,
    K,
    stride,
    BASED: tl.constexpr,
    INFINITY: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store a program's coefficients, with `base` added and their magnitudes counted if asked."""
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    places = offs_s[:, None] * stride + offs_k[None, :]
    mask = (offs_s < S)[:, None] & (offs_k < K)[None, :]
    if BASED:
        total += load(base_ptr + places, mask)
    store(out_ptr + places, total, mask)
    if BITS > 0:
        count_magnitudes(histogram_ptr, total, mask, out_ptr, INFINITY, SHIFT, BITS)


def epilogue(out: Tensor, base: Tensor | None, histogram: Tensor | None) -> dict[str, Any]:
    """Return the arguments by which a kernel adds `base` to `out` and counts magnitudes, or does not."""
    return {
        "base_ptr": out if base is None else base,
        "histogram_ptr": out if histogram is None else histogram,
        "BASED": base is not None,
        **counting(out.dtype, histogram is not None),
    }


def counting(dtype: torch.dtype, count: bool) -> dict[str, int]:
    """Return the constants by which magnitudes of `dtype` are counted."""
    shift, bits = radix.DIGITS[dtype.itemsize][0]
    return {"INFINITY": radix.INFINITIES[dtype], "SHIFT": shift, "BITS": bits if count else 0}
