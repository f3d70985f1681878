"""Project at the kept pairs only.

    c[n] = Σ_t Σ_r (x[b, t] . right[k, r]) (dy[s, t] . left[k, r]),  (s, k) = pair n, b = s // (S // B)      [N]

    x [B, T, I] or integers [B, T], dy [S, T, O], left [K, R, O], right [K, R, I]
    project(x, dy, left, right)[kept.rows, kept.columns]

The cost is that of the kept pairs; each program takes a tile of one subnetwork's pairs (`pairs`). `at_backward`
computes the gradients to left and right. Where nearly all pairs are kept, `project` and a gather cost less; the caller
makes that choice by counted cost, so there is no second path here. Specification: `l3d_kernels.reference.project_at`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.project.at_backward import project_at_backward
from l3d_kernels.kernels.project.pairs import Pairs, cases_of, lines_of_tile, pairs_of_tile, products_of_lines, tile
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase
from l3d_kernels.kernels.shared.device import store, zeros
from l3d_kernels.kernels.shared.launch_table import TABLE
from l3d_kernels.sparse import SparseCoefficients


@triton.jit
def project_at_values(
    out_ptr,  # [N]
    pairs,  # pointers, int64: places of each subnetwork's pairs [columns+1], pair at each place [N], pairs' samples [N]
    x_ptr,  # as in products_of_lines
    dy_ptr,
    left_ptr,
    right_ptr,
    part,  # (first, stop, first_k, columns): places first..stop, those of `columns` subnetworks from first_k on
    T,
    I,
    O,
    R,
    share,
    SOURCE: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOT_T: tl.constexpr,  # positions of a pair in one tile
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the coefficients of BLOCK_ROWS / SLOT_T pairs of one subnetwork."""
    offsets_ptr, order_ptr, rows_ptr = pairs[0], pairs[1], pairs[2]
    first, stop, first_k, columns = part[0], part[1], part[2], part[3]
    PER_TILE: tl.constexpr = BLOCK_ROWS // SLOT_T
    column, place, end = pairs_of_tile(offsets_ptr, first, stop, columns, PER_TILE)
    if place < end:
        k = first_k + column
        _, mask_pairs, _, offs_s = lines_of_tile(order_ptr, rows_ptr, place, end, SLOT_T, BLOCK_ROWS)
        total = tl.sum(zeros(dy_ptr, BLOCK_ROWS, 1), 1)  # [ROWS]
        for start_t in range(0, T, SLOT_T):
            offs_t = start_t + tl.arange(0, BLOCK_ROWS) % SLOT_T
            mask_rows = mask_pairs & (offs_t < T)
            for start_r in range(0, R, BLOCK_COLS):
                offs_r = start_r + tl.arange(0, BLOCK_COLS)
                x_right, dy_left = products_of_lines(
                    x_ptr, dy_ptr, left_ptr, right_ptr, offs_s, offs_t, mask_rows, k, offs_r,
                    T, I, O, R, share, SOURCE, PRECISION, BLOCK_D,
                )  # fmt: skip
                total += tl.sum(x_right * dy_left, 1)
        values = tl.sum(tl.reshape(total, [PER_TILE, SLOT_T]), 1)
        own_places = place + tl.arange(0, PER_TILE)
        entries = tl.load(order_ptr + own_places, mask=own_places < end, other=0)
        store(out_ptr + entries, values, (own_places < end) & (entries < stop - first))


# --- launch -----------------------------------------------------------------------------------------------------

TABLE["project_at_values"] = TABLE["project_at_rows"] | {(None, "16"): tile(128, 64, 8)}


@common.operator("project_at", lambda x, dy, left, right, order, offsets, rows: dy.new_empty(rows.shape[0]))
def project_at_forward(
    x: Tensor, dy: Tensor, left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, rows: Tensor
) -> Tensor:
    """Launch the coefficients: [N]."""
    n_pairs = rows.numel()
    if n_pairs == 0 or dy.shape[1] == 0 or left.shape[1] == 0:
        return dy.new_zeros(n_pairs)
    pairs = Pairs(x, dy, left, right, (order, offsets, rows))
    out = common.empty((n_pairs,), dy)
    pairs.launch(project_at_values, 0, len(left), 0, n_pairs, out_ptr=out)
    return out


# --- autograd ---------------------------------------------------------------------------------------------------


_project_at = common.differentiable(
    lambda x, dy, left, right, order, offsets, rows: project_at_forward(x, dy, left, right, order, offsets, rows),
    lambda needs, saved, d_out: [None, None, *project_at_backward(d_out, *saved)],
)


def project_at(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, kept: SparseCoefficients) -> Tensor:
    """Run `l3d_kernels.reference.project_at` with Triton kernels; there are no gradients to x and dy."""
    if torch.is_grad_enabled() and (x.requires_grad or dy.requires_grad):
        raise ValueError("x, dy: the kernels of project_at have no gradient to them; detach them, or use 'torch'")
    order = kept.column_order, kept.column_offsets, kept.rows
    return _project_at(*common.contiguous(x, dy, left, right, *order))


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernel is launched on a kind of device."""
    return cases_of(project_at_values, kind)
