"""Compute the gradients of `project_at` for an upstream gradient g [N]; shapes as in `l3d_kernels.kernels.project.at`.

    d_left[k, r]  = Σ_{n of k} Σ_t g[n] (x[b, t] . right[k, r]) dy[s, t]
    d_right[k, r] = Σ_{n of k} Σ_t g[n] (dy[s, t] . left[k, r]) x[b, t]

Both weighted products are written to memory, [N, T, R], in pieces of at most common.WORKSPACE elements. Their outer
products with dy and x are summed, one program for each subnetwork and tile of columns. There are no gradients to x and
dy: training needs none, and the public function raises an error where one is asked for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.project.pairs import (
    Pairs,
    cases_of,
    lines_of_tile,
    pairs_of_tile,
    products_of_lines,
    tile,
    wide_ranks,
)
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import add_dot, load, store, zeros
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch
from l3d_kernels.kernels.shared.segment_sum import sum_by_key

# --- kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def project_at_rows(
    x_right_out_ptr,  # [places, T, R] g x·right, in column order
    dy_left_out_ptr,  # [places, T, R] g dy·left
    weight_ptr,  # [N] g
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
    """Compute both weighted products of BLOCK_ROWS / SLOT_T pairs of one subnetwork."""
    offsets_ptr, order_ptr, rows_ptr = pairs[0], pairs[1], pairs[2]
    first, stop, first_k, columns = part[0], part[1], part[2], part[3]
    column, place, end = pairs_of_tile(offsets_ptr, first, stop, columns, BLOCK_ROWS // SLOT_T)
    if place < end:
        k = first_k + column
        places, mask_pairs, entries, offs_s = lines_of_tile(order_ptr, rows_ptr, place, end, SLOT_T, BLOCK_ROWS)
        weight = load(weight_ptr + entries, mask_pairs)  # [ROWS]
        for start_t in range(0, T, SLOT_T):
            offs_t = start_t + tl.arange(0, BLOCK_ROWS) % SLOT_T
            mask_rows = mask_pairs & (offs_t < T)
            for start_r in range(0, R, BLOCK_COLS):
                offs_r = start_r + tl.arange(0, BLOCK_COLS)
                x_right, dy_left = products_of_lines(
                    x_ptr, dy_ptr, left_ptr, right_ptr, offs_s, offs_t, mask_rows, k, offs_r,
                    T, I, O, R, share, SOURCE, PRECISION, BLOCK_D,
                )  # fmt: skip
                starts = (((places - first) * T + offs_t) * R)[:, None] + offs_r[None, :]
                mask = mask_rows[:, None] & (offs_r < R)[None, :]
                store(x_right_out_ptr + starts, x_right * weight[:, None], mask)
                store(dy_left_out_ptr + starts, dy_left * weight[:, None], mask)


@triton.jit
def project_at_outer(
    out_ptr,  # [columns, R, D]
    product_ptr,  # [places, T, R]
    side_ptr,  # [S / divide, T, D] dy or x
    offsets_ptr,  # [columns+1] int64, places of each subnetwork's pairs
    order_ptr,  # [N] int64, the pair at each place
    rows_ptr,  # [N] int64, each pair's sample
    before,  # the first of the launch's places
    T,
    R,
    D,
    divide,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum a tile [R, D] of one subnetwork's gradient: the outer products of its rows with dy or x, in order."""
    k = tl.program_id(0).to(tl.int64)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.program_id(2) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask_r, mask_d = offs_r < R, offs_d < D
    first, stop = tl.load(offsets_ptr + k) * T, tl.load(offsets_ptr + k + 1) * T
    total = zeros(side_ptr, BLOCK_R, BLOCK_COLS)
    for start in range(0, (stop - first).to(tl.int32), BLOCK_D):
        lines = first + start + tl.arange(0, BLOCK_D)
        mask = lines < stop
        entries = tl.load(order_ptr + lines // T, mask=mask, other=0)
        offs_s = tl.load(rows_ptr + entries, mask=mask, other=0) // divide
        places = (product_ptr + (lines - before * T) * R)[None, :] + offs_r[:, None]
        rows = load(places, mask[None, :] & mask_r[:, None])  # [R, lines]
        places = (side_ptr + (offs_s * T + lines % T) * D)[:, None] + offs_d[None, :]
        side = load(places, mask[:, None] & mask_d[None, :])  # [lines, D]
        total = add_dot(rows, side, total, PRECISION)
    store((out_ptr + (k * R + offs_r) * D)[:, None] + offs_d[None, :], total, mask_r[:, None] & mask_d[None, :])


# --- launch -----------------------------------------------------------------------------------------------------

TABLE["project_at_rows"] = {
    ("interpreter", None): tile(16, 32, 4),
    ("gfx942", None): tile(64, 32, 4, 2),
    ("gfx1100", "16"): tile(64, 32, 8, 2),
    ("gfx1100", "32"): tile(64, 16, 8, 2),
    (None, "16"): tile(64, 64, 8),
    (None, "32"): tile(64, 32, 8),
}
TABLE["project_at_outer"] = {
    ("interpreter", None): Launch({"BLOCK_COLS": 16, "BLOCK_D": 16}, 4, 3),
    ("gfx942", None): Launch({"BLOCK_COLS": 128, "BLOCK_D": 32}, 4, 2),
    ("gfx1100", "16"): Launch({"BLOCK_COLS": 128, "BLOCK_D": 32}, 8, 2),
    ("gfx1100", "32"): Launch({"BLOCK_COLS": 128, "BLOCK_D": 16}, 8, 2),
    (None, "16"): Launch({"BLOCK_COLS": 128, "BLOCK_D": 64}, 4, 3),
    (None, "32"): Launch({"BLOCK_COLS": 128, "BLOCK_D": 32}, 8, 3),
}


def sum_outer(out: Tensor, rows: Tensor, side: Tensor, pairs: Pairs, start: int, first: int, divide: int) -> None:
    """Launch the gradient to one factor into `out` [columns, R, D]: of rows [places, T, R] and `side`, dy or x."""
    (_, T, R), (columns, _, D) = rows.shape, out.shape
    row, block = common.row_for(project_at_outer, rows), wide_ranks(R, 64)
    grid = (columns, common.ceil_div(R, block), *row.tiles(COLS=D))
    pointers = {"out_ptr": out, "product_ptr": rows, "side_ptr": side, "offsets_ptr": pairs.offsets[start:]}
    pointers |= {"order_ptr": pairs.order, "rows_ptr": pairs.rows}
    sizes = {"before": first, "T": T, "R": R, "D": D, "divide": divide, "BLOCK_R": block}
    common.launch(project_at_outer, grid, row, out.device, **pointers, **sizes)


def sum_by_index(rows: Tensor, index: Tensor, offsets: Tensor, n_inputs: int) -> Tensor:
    """Sum rows [places, T, R] by the inputs that indices [places, T] name: [columns, R, n_inputs]."""
    columns = len(offsets) - 1
    places = torch.arange(len(rows), device=rows.device)
    column = torch.searchsorted(offsets, places, right=True) - 1
    by_key = sum_by_key(rows.flatten(0, 1), (column[:, None] * n_inputs + index).flatten(), columns * n_inputs)
    return by_key.unflatten(0, (columns, n_inputs)).mT


def pieces(offsets: Tensor, n_pairs: int, per_pair: int) -> list[tuple[int, int, int, int]]:
    """Cut the subnetworks so that a piece's products fit in the workspace: (start, stop, first pair, n_pairs)."""
    K = len(offsets) - 1
    if n_pairs * per_pair <= common.WORKSPACE:
        return [(0, K, 0, n_pairs)]
    ends, out, start = offsets.tolist(), [], 0
    while start < K:
        stop = start + 1
        while stop < K and (ends[stop + 1] - ends[start]) * per_pair <= common.WORKSPACE:
            stop += 1
        if ends[stop] > ends[start]:
            out.append((start, stop, ends[start], ends[stop] - ends[start]))
        start = stop
    return out


@common.operator("project_at_backward", lambda *inputs: tuple(torch.empty_like(side) for side in inputs[3:5]))
def project_at_backward(
    d_out: Tensor, x: Tensor, dy: Tensor, left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the gradients to left and right."""
    (_, T, _), (_, R, I), n_pairs = dy.shape, right.shape, rows.numel()
    own = pieces(offsets, n_pairs, T * R) if T and R else []
    # one piece covers all subnetworks, several leave out those without pairs
    d_left, d_right = ((torch.empty_like if len(own) == 1 and n_pairs else torch.zeros_like)(s) for s in (left, right))
    if n_pairs == 0 or not own:
        return d_left, d_right
    pairs = Pairs(x, dy, left, right, (order, offsets, rows))
    for start, stop, first, n in own:
        x_right, dy_left = (common.empty((n, T, R), dy) for _ in range(2))
        outputs = {"x_right_out_ptr": x_right, "dy_left_out_ptr": dy_left, "weight_ptr": d_out.contiguous()}
        pairs.launch(project_at_rows, start, stop, first, n, **outputs)
        sum_outer(d_left[start:stop], x_right, dy, pairs, start, first, 1)
        if x.is_floating_point():
            sum_outer(d_right[start:stop], dy_left, x, pairs, start, first, pairs.share)
        else:
            samples = rows[order[first : first + n]]
            ends = offsets[start : stop + 1] - first
            d_right[start:stop] = sum_by_index(dy_left, x[samples // pairs.share], ends, I)
    return d_left, d_right


# --- ahead of time ----------------------------------------------------------------------------------------------


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernels are launched on a kind of device."""
    forms = [({"BLOCK_R": cols}, cols != 32) for cols in (16, 32, 64)]
    return cases_of(project_at_rows, kind) + cases_of_kernel(project_at_outer, kind, forms)
