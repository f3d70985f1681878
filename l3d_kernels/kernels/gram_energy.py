"""Squared norm of every sample's reconstruction, over the pairs of subnetworks that are kept together.

    e_i = Σ_{j in s(i)} c_j <V_k(i), V_k(j)>,   ‖ĝ_s‖² = Σ_{i in s} c_i e_i      [S]
    <V_k, V_j> = Σ_rr' (left_kr . left_jr') (right_kr . right_jr'),   left [K, R, O], right [K, R, I]

i, j are kept entries, s(i) and k(i) their sample and subnetwork. A sample's rows (i, r) meet each other in tiles: both
products stay in registers. No sum is over pairs that are not kept together, no [K, K] is formed.

Gradients: d_c_i = 2 g_s e_i; and for a subnetwork k, over its entries i and the rows q = (j, r') of their samples,

    d_left[k, r] = Σ_i 2 g_s c_i Σ_q c_q (right_kr . right_q) left_q,   d_right with the sides exchanged.

Torch equivalent: `l3d_kernels.reference.gram_energy_coactive`; `gram_energy` takes the full Gram matrix (gram.py)
where that is less.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels import reference
from l3d_kernels.dispatch import TRITON
from l3d_kernels.kernels import common
from l3d_kernels.kernels.common import add_dot, add_row_products, ceil_div, empty, feed, load, zeros
from l3d_kernels.kernels.gram import gram
from l3d_kernels.kernels.table import KINDS, TABLE, Launch, lookup
from l3d_kernels.sparse import SparseCoefficients

PROGRAMS = 264  # that the backward pass wants at least: twice the processors of a large GPU


@triton.jit
def coactive_energy(
    parts_ptr,  # [S, splits] wide: the splits' shares of ‖ĝ_s‖²
    sums_ptr,  # [N*R] wide: Σ_q c_q (left_p . left_q) (right_p . right_q) of every row p = (i, r)
    values_ptr,  # [N]
    columns_ptr,  # [N] int64
    row_offsets_ptr,  # [S+1] int64
    left_ptr,  # [K, R, O]
    right_ptr,  # [K, R, I]
    O,
    I,
    R,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Let a sample's rows meet each other; a split takes every so many-th tile of rows."""
    sample, split = tl.program_id(0), tl.program_id(1)
    first = tl.load(row_offsets_ptr + sample)
    n_rows = ((tl.load(row_offsets_ptr + sample + 1) - first) * R).to(tl.int32)
    energy = tl.sum(zeros(left_ptr, BLOCK_P, 1), 1)
    for start_p in range(split * BLOCK_P, n_rows, tl.num_programs(1) * BLOCK_P):
        entry_p, rows_p, mask_p = rows_of(columns_ptr, first, start_p + tl.arange(0, BLOCK_P), n_rows, R)
        total = tl.sum(zeros(left_ptr, BLOCK_P, 1), 1)
        for start_q in range(0, n_rows, BLOCK_Q):
            entry_q, rows_q, mask_q = rows_of(columns_ptr, first, start_q + tl.arange(0, BLOCK_Q), n_rows, R)
            lefts = zeros(left_ptr, BLOCK_P, BLOCK_Q)
            lefts = add_row_products(
                lefts, left_ptr, rows_p * O, mask_p, left_ptr, rows_q * O, mask_q, O, PRECISION, BLOCK_D
            )
            rights = zeros(left_ptr, BLOCK_P, BLOCK_Q)
            rights = add_row_products(
                rights, right_ptr, rows_p * I, mask_p, right_ptr, rows_q * I, mask_q, I, PRECISION, BLOCK_D
            )
            weight = load(values_ptr + entry_q, mask_q).to(lefts.dtype)  # [Q]
            total += tl.sum(lefts * rights * weight[None, :], 1)
        tl.store(sums_ptr + first * R + start_p + tl.arange(0, BLOCK_P), total, mask=mask_p)
        energy += total * load(values_ptr + entry_p, mask_p).to(total.dtype)
    tl.store(parts_ptr + sample.to(tl.int64) * tl.num_programs(1) + split, tl.sum(energy, 0))


@triton.jit
def rows_of(columns_ptr, first, offs, n_rows, R):
    """Return the entries, the rows of the factors [K*R, ...], and the mask of some of a sample's rows (i, r)."""
    mask = offs < n_rows
    entry = first + offs // R
    column = tl.load(columns_ptr + entry, mask=mask, other=0)
    return entry, column * R + offs % R, mask


@triton.jit
def coactive_backward(
    d_a_ptr,  # [splits, K, R, A] wide, zeros: gradient to one side
    upstream_ptr,  # [S]
    values_ptr,  # [N]
    rows_ptr,  # [N] int64
    columns_ptr,  # [N] int64
    row_offsets_ptr,  # [S+1] int64
    column_order_ptr,  # [N] int64
    column_offsets_ptr,  # [K+1] int64
    a_ptr,  # [K, R, A] this side
    b_ptr,  # [K, R, B] the other side
    A,
    B,
    R,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of a subnetwork's rows; a split takes every so many-th of its entries.

    The sum over entries is kept in memory: no other program touches it, and registers could not hold [R, A].
    """
    column, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows_k, mask_r = column * R + offs_r, offs_r < R
    sum_ptr = d_a_ptr + split.to(tl.int64) * tl.num_programs(0) * R * A
    n_before = tl.load(column_offsets_ptr + column)
    n_entries = (tl.load(column_offsets_ptr + column + 1) - n_before).to(tl.int32)
    for place in range(split, n_entries, tl.num_programs(2)):
        entry = tl.load(column_order_ptr + n_before + place)
        sample = tl.load(rows_ptr + entry)
        first = tl.load(row_offsets_ptr + sample)
        n_rows = ((tl.load(row_offsets_ptr + sample + 1) - first) * R).to(tl.int32)
        scale = 2 * tl.load(upstream_ptr + sample).to(sum_ptr.dtype.element_ty)
        scale *= tl.load(values_ptr + entry).to(sum_ptr.dtype.element_ty)
        for start_q in range(0, n_rows, BLOCK_Q):
            entry_q, rows_q, mask_q = rows_of(columns_ptr, first, start_q + tl.arange(0, BLOCK_Q), n_rows, R)
            other = zeros(a_ptr, BLOCK_R, BLOCK_Q)
            other = add_row_products(other, b_ptr, rows_k * B, mask_r, b_ptr, rows_q * B, mask_q, B, PRECISION, BLOCK_D)
            weight = scale * load(values_ptr + entry_q, mask_q).to(other.dtype)  # [Q]
            weighted = feed(other * weight[None, :], a_ptr)  # [R, Q]
            for start_d in range(0, A, BLOCK_D):
                offs_d = start_d + tl.arange(0, BLOCK_D)
                mask_d = offs_d < A
                side = load(a_ptr + rows_q[:, None] * A + offs_d[None, :], mask_q[:, None] & mask_d[None, :])  # [Q, D]
                places = sum_ptr + rows_k[:, None] * A + offs_d[None, :]
                mask = mask_r[:, None] & mask_d[None, :]
                before = tl.load(places, mask=mask, other=0)  # [R, D]
                tl.store(places, add_dot(weighted, side, before, PRECISION), mask=mask)
            tl.debug_barrier()  # what one thread stored another may load in the next round


# --- launch -----------------------------------------------------------------------------------------------------

TABLE["coactive_energy"] = {
    ("interpreter", None): Launch({"BLOCK_P": 16, "BLOCK_Q": 16, "BLOCK_D": 16}),
    ("sm_80", "32"): Launch({"BLOCK_P": 64, "BLOCK_Q": 32, "BLOCK_D": 32}, warps=8, stages=3),
    (None, "16"): Launch({"BLOCK_P": 64, "BLOCK_Q": 64, "BLOCK_D": 64}, warps=8, stages=3),
    (None, "32"): Launch({"BLOCK_P": 64, "BLOCK_Q": 64, "BLOCK_D": 32}, warps=8, stages=3),
}
TABLE["coactive_backward"] = {
    ("interpreter", None): Launch({"BLOCK_Q": 16, "BLOCK_D": 16}),
    ("sm_80", "32"): Launch({"BLOCK_Q": 32, "BLOCK_D": 32}, warps=8, stages=3),
    (None, "16"): Launch({"BLOCK_Q": 64, "BLOCK_D": 64}, warps=8, stages=3),
    (None, "32"): Launch({"BLOCK_Q": 64, "BLOCK_D": 32}, warps=8, stages=3),
}


def _no_energy(
    values: Tensor, columns: Tensor, row_offsets: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    rows = values.numel() * left.shape[1]
    return left.new_empty(len(row_offsets) - 1), left.new_empty(rows, dtype=common.wide(left.dtype))


@common.operator("gram_energy_coactive", _no_energy)
def energy_forward(
    values: Tensor, columns: Tensor, row_offsets: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: (energy [S], sums of every row [N*R])."""
    n_samples, n_rows = len(row_offsets) - 1, values.numel() * left.shape[1]
    row, precision = common.row_for("coactive_energy", left)
    sums = empty((n_rows,), left, common.wide(left.dtype))
    splits = max(1, ceil_div(n_rows, max(1, n_samples) * row.blocks["BLOCK_P"]))  # the tiles of an average sample
    parts = empty((n_samples, splits), sums)
    common.launch(
        coactive_energy,
        (n_samples, splits),
        row,
        left.device,
        parts_ptr=parts,
        sums_ptr=sums,
        values_ptr=values,
        columns_ptr=columns,
        row_offsets_ptr=row_offsets,
        left_ptr=left,
        right_ptr=right,
        O=left.shape[2],
        I=right.shape[2],
        R=left.shape[1],
        PRECISION=precision,
    )
    return parts.sum(1).to(left.dtype), sums


def _no_side(
    upstream: Tensor,
    values: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_offsets: Tensor,
    column_order: Tensor,
    column_offsets: Tensor,
    side: Tensor,
    other: Tensor,
) -> Tensor:
    return torch.empty_like(side)


@common.operator("gram_energy_coactive_backward", _no_side)
def energy_backward(
    upstream: Tensor,
    values: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_offsets: Tensor,
    column_order: Tensor,
    column_offsets: Tensor,
    side: Tensor,
    other: Tensor,
) -> Tensor:
    """Launch the backward kernel for one side: as `side`."""
    K, R, A = side.shape
    row, precision = common.row_for("coactive_backward", side)
    block_r = min(64, common.power_of_two(R, 16))
    tiles_r = ceil_div(R, block_r)
    splits = max(1, min(ceil_div(PROGRAMS, max(1, K * tiles_r)), ceil_div(values.numel(), max(1, K))))
    sums = torch.zeros(splits, K, R, A, dtype=common.wide(side.dtype), device=side.device)
    common.launch(
        coactive_backward,
        (K, tiles_r, splits),
        row,
        side.device,
        d_a_ptr=sums,
        upstream_ptr=upstream.contiguous(),
        values_ptr=values,
        rows_ptr=rows,
        columns_ptr=columns,
        row_offsets_ptr=row_offsets,
        column_order_ptr=column_order,
        column_offsets_ptr=column_offsets,
        a_ptr=side,
        b_ptr=other,
        A=A,
        B=other.shape[2],
        R=R,
        PRECISION=precision,
        BLOCK_R=block_r,
    )
    return sums.sum(0).to(side.dtype)


# --- autograd ---------------------------------------------------------------------------------------------------


class _Coactive(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        values: Tensor,
        left: Tensor,
        right: Tensor,
        rows: Tensor,
        columns: Tensor,
        row_offsets: Tensor,
        column_order: Tensor,
        column_offsets: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return energy_forward(values, columns, row_offsets, left, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        values, left, right, *indices, sums = ctx.saved_tensors
        rows, grads = indices[0], [None, None, None]
        if ctx.needs_input_grad[0]:
            grads[0] = (2 * upstream[rows] * sums.view(-1, left.shape[1]).sum(1)).to(values.dtype)
        if ctx.needs_input_grad[1]:
            grads[1] = energy_backward(upstream, values, *indices, left, right)
        if ctx.needs_input_grad[2]:
            grads[2] = energy_backward(upstream, values, *indices, right, left)
        return (*grads, None, None, None, None, None)


def gram_energy_coactive(kept: SparseCoefficients, left: Tensor, right: Tensor) -> Tensor:
    """Run `l3d_kernels.reference.gram_energy_coactive` with Triton kernels."""
    values, left, right = common.autocast_alike(kept.values, left, right)
    order = (kept.rows, kept.columns, kept.row_offsets, kept.column_order, kept.column_offsets)
    return _Coactive.apply(values, left, right, *(index.contiguous() for index in order))[0]


def gram_energy(kept: SparseCoefficients, left: Tensor, right: Tensor) -> Tensor:
    """Run `l3d_kernels.reference.gram_energy` with Triton kernels.

    From the full Gram matrix where even the fewest co-active pairs that N entries can make, N²/S, are K²/2 or more;
    so nothing is copied to the host to choose.
    """
    n_samples, n_subnetworks = kept.shape
    if 2 * kept.rows.numel() ** 2 < n_subnetworks**2 * n_samples or n_samples == 0:
        return gram_energy_coactive(kept, left, right)
    return reference.energy_from_gram(kept, gram(left, right))


TRITON["gram_energy_coactive"] = gram_energy_coactive
TRITON["gram_energy"] = gram_energy


def compile_cases(kind: str) -> list[common.CompileCase]:
    """Return every form in which the kernels are launched on a kind of device."""
    assert kind in KINDS
    cases = []
    integers = ("rows_ptr", "columns_ptr", "row_offsets_ptr", "column_order_ptr", "column_offsets_ptr")
    for dtype, bits, precision, long in common.compile_dtypes(kind):
        types = {"parts_ptr": "*fp32", "sums_ptr": "*fp32", **dict.fromkeys(integers[1:3], "*i64")}
        row = lookup("coactive_energy", kind, bits)
        cases.append(common.CompileCase(coactive_energy, dtype, {"PRECISION": precision}, row, types, long=long))
        types = {"d_a_ptr": "*fp32", **dict.fromkeys(integers, "*i64")}
        row = lookup("coactive_backward", kind, bits)
        for block_r in (16, 32, 64):
            constants = {"PRECISION": precision, "BLOCK_R": block_r}
            form: dict[str, Any] = {"long": long or block_r == 32, "divisible": ("A", "B")}
            cases.append(common.CompileCase(coactive_backward, dtype, constants, row, types, **form))
    return cases
