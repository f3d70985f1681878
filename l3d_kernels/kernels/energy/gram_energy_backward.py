"""Compute the gradient of `gram_energy_coactive` to one side of the directions; letters as in `gram_energy`.

    d_left[k, r] = Σ_i 2 g_s c_i Σ_q c_q (right_kr . right_q) left_q,   d_right with the sides exchanged

for a subnetwork k, over its kept entries i and the rows q = (j, r') of their samples; g [S] is the upstream gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import add_dot, feed, load, nth, row_products
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch


@triton.jit
def rows_of(columns_ptr, first, offs, n_rows, R):
    """Return (entries, rows of the factors [K*R, ...], mask) for some of a sample's rows (i, r)."""
    mask = offs < n_rows
    entry = first + offs // R
    column = tl.load(columns_ptr + entry, mask=mask, other=0)
    return entry, column * R + offs % R, mask


@triton.jit
def coactive_backward(
    d_a_ptrs,  # of each side [splits, K, R, A] wide: its gradient
    upstream_ptr,  # [S]
    values_ptr,  # [N]
    rows_ptr,  # [N] int64
    columns_ptr,  # [N] int64
    row_offsets_ptr,  # [S+1] int64
    column_order_ptr,  # [N] int64
    column_offsets_ptr,  # [K+1] int64
    a_ptrs,  # of each side [K, R, A]
    b_ptrs,  # [K, R, B], the other side of its tensor
    A_of,  # of each side
    B_of,
    R,
    splits,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradient of a subnetwork's rows of one side; of n splits, each takes every n-th of its entries.

    The sum over entries is kept in memory, since registers could not hold [R, A]. No other program touches it.
    """
    column, side, split = tl.program_id(0).to(tl.int64), tl.program_id(2) // splits, tl.program_id(2) % splits
    a_ptr, A, b_ptr, B = nth(a_ptrs, side), nth(A_of, side), nth(b_ptrs, side), nth(B_of, side)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows_k, mask_r = column * R + offs_r, offs_r < R
    sum_ptr = nth(d_a_ptrs, side) + split.to(tl.int64) * tl.num_programs(0) * R * A
    n_before = tl.load(column_offsets_ptr + column)
    n_entries = (tl.load(column_offsets_ptr + column + 1) - n_before).to(tl.int32)
    for start_d in range(0, A, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        nothing = tl.zeros([BLOCK_R, BLOCK_D], dtype=sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows_k[:, None] * A + offs_d[None, :], nothing, mask=mask_r[:, None] & (offs_d < A)[None, :])
    tl.debug_barrier()  # a thread may load what another has stored
    for place in range(split, n_entries, splits):
        entry = tl.load(column_order_ptr + n_before + place)
        sample = tl.load(rows_ptr + entry)
        first = tl.load(row_offsets_ptr + sample)
        n_rows = ((tl.load(row_offsets_ptr + sample + 1) - first) * R).to(tl.int32)
        scale = 2 * tl.load(upstream_ptr + sample).to(sum_ptr.dtype.element_ty)
        scale *= tl.load(values_ptr + entry).to(sum_ptr.dtype.element_ty)
        for start_q in range(0, n_rows, BLOCK_Q):
            entry_q, rows_q, mask_q = rows_of(columns_ptr, first, start_q + tl.arange(0, BLOCK_Q), n_rows, R)
            other = row_products(b_ptr, rows_k * B, mask_r, b_ptr, rows_q * B, mask_q, B, PRECISION, BLOCK_D)
            weight = scale * load(values_ptr + entry_q, mask_q).to(other.dtype)  # [Q]
            weighted = feed(other * weight[None, :], a_ptr)  # [R, Q]
            for start_d in range(0, A, BLOCK_D):
                offs_d = start_d + tl.arange(0, BLOCK_D)
                mask_d = offs_d < A
                rows = load(a_ptr + rows_q[:, None] * A + offs_d[None, :], mask_q[:, None] & mask_d[None, :])  # [Q, D]
                places = sum_ptr + rows_k[:, None] * A + offs_d[None, :]
                mask = mask_r[:, None] & mask_d[None, :]
                before = tl.load(places, mask=mask, other=0)  # [R, D]
                tl.store(places, add_dot(weighted, rows, before, PRECISION), mask=mask)
            tl.debug_barrier()  # in the next round a thread may load what another has stored


# --- launch -----------------------------------------------------------------------------------------------------

TABLE["coactive_backward"] = {
    ("interpreter", None): Launch({"BLOCK_Q": 16, "BLOCK_D": 16}),
    ("sm_80", "32"): Launch({"BLOCK_Q": 32, "BLOCK_D": 32}, warps=8, stages=3),
    ("gfx1100", None): Launch({"BLOCK_Q": 32, "BLOCK_D": 32}, warps=8, stages=2),
    (None, "16"): Launch({"BLOCK_Q": 64, "BLOCK_D": 64}, warps=8, stages=3),
    (None, "32"): Launch({"BLOCK_Q": 64, "BLOCK_D": 32}, warps=8, stages=3),
}


@common.operator("gram_energy_coactive_backward", lambda *inputs: [torch.empty_like(side) for side in inputs[7]])
def energy_backward(
    upstream: Tensor,
    values: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_offsets: Tensor,
    column_order: Tensor,
    column_offsets: Tensor,
    sides: Sequence[Tensor],
    others: Sequence[Tensor],
) -> list[Tensor]:
    """Launch the backward kernel for sides of one K and R, each with the other of its tensor: in the sides' shapes."""
    K, R, _ = sides[0].shape
    row = common.row_for(coactive_backward, sides[0])
    block_r = min(64, common.power_of_two(R, 16))
    tiles_r = common.ceil_div(R, block_r)
    most = common.ceil_div(common.PROGRAMS, max(1, K * tiles_r))
    splits = max(1, min(most, common.ceil_div(values.numel(), max(1, K))))
    sums = tuple(common.empty((splits, *side.shape), side, common.wide(side.dtype)) for side in sides)
    pointers = {"d_a_ptrs": sums, "upstream_ptr": upstream.contiguous(), "values_ptr": values, "rows_ptr": rows}
    pointers |= {"columns_ptr": columns, "row_offsets_ptr": row_offsets, "column_order_ptr": column_order}
    pointers |= {"column_offsets_ptr": column_offsets, "a_ptrs": tuple(sides), "b_ptrs": tuple(others)}
    sizes: dict[str, Any] = {"R": R, "splits": splits, "BLOCK_R": block_r}
    sizes |= {"A_of": tuple(a.shape[2] for a in sides), "B_of": tuple(b.shape[2] for b in others)}
    grid = (K, tiles_r, splits * len(sides))
    common.launch(coactive_backward, grid, row, values.device, **pointers, **sizes)
    return [(own[0] if splits == 1 else own.sum(0)).to(side.dtype) for own, side in zip(sums, sides, strict=True)]


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernel is launched on a kind of device."""
    return cases_of_kernel(coactive_backward, kind, [({"BLOCK_R": rows}, rows == 32) for rows in (16, 32, 64)])
