"""Compute the gradient of `sparse_decode` to its weight; letters as in `l3d_kernels.kernels.decode.sparse_decode`.

    d_weight[l] = Σ values[a, j] d_out[a] over the entries (a, j) whose index is l      [L, D]

A stable sort by index brings a row's entries together, and they are summed in that order. Where many codes use one row,
programs of their own sum stretches of its entries.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import load, store, zeros
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch


@triton.jit
def add_entries(
    acc, d_out_ptr, values_ptr, order_ptr, codes_ptr, first, last, offs_d, per_code, D,
    FIXED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return acc [N, D] + the weighted upstream gradients of the entries at `order[first:last]`."""
    for start in range(first, last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < last
        entry = tl.load(order_ptr + offs_n, mask=mask_n, other=0)  # [N]
        code = entry // per_code if FIXED else tl.load(codes_ptr + entry, mask=mask_n, other=0)  # [N]
        value = load(values_ptr + entry, mask_n).to(acc.dtype)  # [N]
        d_out = load(d_out_ptr + code[:, None] * D + offs_d[None, :], mask_n[:, None] & (offs_d < D)[None, :])  # [N, D]
        acc += value[:, None] * d_out.to(acc.dtype)
    return acc


@triton.jit
def decode_d_weight_stretch(
    parts_ptr,  # [stretches, D] wide
    d_out_ptr,  # [A, D]
    values_ptr,  # [N]
    order_ptr,  # [N] int64: entries sorted by index, stably
    codes_ptr,  # [N] int64: the code of each entry; read unless FIXED
    sorted_ptr,  # [N] int64: their indices
    segments_ptr,  # [L+1] int64: where in `order` each row's entries begin
    per_code,
    L,
    D,
    FIXED: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum a stretch of the entries of a row with more than STRETCH; the row's own program sums its first STRETCH."""
    stretch = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(sorted_ptr + stretch * STRETCH).to(tl.int64)  # no other row has such entries here
    if (row >= 0) & (row < L):
        first = tl.maximum(tl.load(segments_ptr + row) + STRETCH, stretch * STRETCH)
        last = tl.minimum(tl.load(segments_ptr + row + 1), (stretch + 1) * STRETCH)
        if first < last:
            acc = zeros(d_out_ptr, BLOCK_N, BLOCK_D)
            acc = add_entries(
                acc, d_out_ptr, values_ptr, order_ptr, codes_ptr, first, last, offs_d, per_code, D, FIXED, BLOCK_N
            )
            tl.store(parts_ptr + stretch * D + offs_d, tl.sum(acc, 0), mask=offs_d < D)


@triton.jit
def decode_d_weight(
    d_weight_ptr,  # [L, D]
    d_out_ptr,  # [A, D]
    values_ptr,  # [N]
    order_ptr,  # [N] int64
    codes_ptr,  # [N] int64
    segments_ptr,  # [L+1] int64
    parts_ptr,  # [stretches, D] wide
    per_code,
    D,
    FIXED: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the upstream gradients of the codes that use a row of the weight, then the stretches of its other entries."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(segments_ptr + row), tl.load(segments_ptr + row + 1)
    acc = zeros(d_out_ptr, BLOCK_N, BLOCK_D)
    acc = add_entries(
        acc, d_out_ptr, values_ptr, order_ptr, codes_ptr, first, tl.minimum(last, first + STRETCH), offs_d, per_code, D,
        FIXED, BLOCK_N,
    )  # fmt: skip
    total = tl.sum(acc, 0)
    if last - first > STRETCH:
        for stretch in range((first + STRETCH) // STRETCH, (last + STRETCH - 1) // STRETCH):
            total += tl.load(parts_ptr + stretch * D + offs_d, mask=offs_d < D, other=0)  # [D]
    store(d_weight_ptr + row * D + offs_d, total, offs_d < D)


# --- launch -----------------------------------------------------------------------------------------------------

STRETCH = 128  # entries of one row of the weight that one program sums; further entries go to other programs
for kernel_name in ("decode_codes", "decode_d_values", "decode_d_weight", "decode_d_weight_stretch"):
    TABLE[kernel_name] = {
        ("interpreter", None): Launch({"BLOCK_N": 2, "BLOCK_D": 16}),
        (None, "16"): Launch({"BLOCK_N": 4, "BLOCK_D": 1024}, warps=4, stages=3),
        (None, "32"): Launch({"BLOCK_N": 4, "BLOCK_D": 512}, warps=4, stages=3),
    }


@common.operator("sparse_decode_d_weight", lambda d_out, _, __, n_rows, ___: d_out.new_empty(n_rows, d_out.shape[1]))
def d_weight(d_out: Tensor, indices: Tensor, values: Tensor, n_rows: int, row_offsets: Tensor | None) -> Tensor:
    """Sort the entries by index and launch the kernel of the gradient to the weight: [L, D]."""
    D = d_out.shape[1]
    flat = indices.flatten()
    sorted_indices, order = flat.sort(stable=True)
    segments = torch.searchsorted(sorted_indices, torch.arange(n_rows + 1, device=flat.device).to(flat.dtype))
    codes = order
    if row_offsets is not None:
        codes = torch.searchsorted(row_offsets, torch.arange(flat.numel(), device=flat.device), right=True) - 1
    out = common.empty((n_rows, D), d_out)
    row, n_stretches = common.row_for(decode_d_weight, d_out), common.ceil_div(flat.numel(), STRETCH)
    parts = common.empty((n_stretches, D), d_out, common.wide(d_out.dtype))
    shared: dict[str, Any] = {"d_out_ptr": d_out.contiguous(), "values_ptr": values, "order_ptr": order}
    shared |= {"codes_ptr": codes, "segments_ptr": segments, "parts_ptr": parts, "D": D, "STRETCH": STRETCH}
    shared |= {"per_code": indices.shape[1] if row_offsets is None else 0, "FIXED": row_offsets is None}
    if n_stretches > 1:
        own, grid = {"sorted_ptr": sorted_indices, "L": n_rows}, (n_stretches, *row.tiles(D=D))
        common.launch(decode_d_weight_stretch, grid, row, d_out.device, **own, **shared)
    common.launch(decode_d_weight, (n_rows, *row.tiles(D=D)), row, d_out.device, d_weight_ptr=out, **shared)
    return out


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernels are launched on a kind of device."""
    forms = [({"FIXED": fixed, "STRETCH": STRETCH}, not fixed) for fixed in (True, False)]
    return cases_of_kernel(decode_d_weight, kind, forms) + cases_of_kernel(decode_d_weight_stretch, kind, forms)
