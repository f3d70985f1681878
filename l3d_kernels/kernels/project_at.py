"""Coefficients at the kept pairs only, grouped by subnetwork as tokens are by expert; and their gradients.

    c[n] = Σ_t Σ_r (x[b, t] . right[k, r]) (dy[s, t] . left[k, r]),  (s, k) = pair n, b = s // (S // B)      [N]

    x [B, T, I] or integers [B, T], dy [S, T, O], left [K, R, O], right [K, R, I], upstream gradient g [N]
    d_left[k, r]  = Σ_{n of k} Σ_t g[n] (x[b, t] . right[k, r]) dy[s, t]
    d_right[k, r] = Σ_{n of k} Σ_t g[n] (dy[s, t] . left[k, r]) x[b, t]

`project(x, dy, left, right)[kept.rows, kept.columns]`, at the cost of the kept pairs. A program takes pairs of one
subnetwork, in the order of kept.column_order; which ones is computed on the device, so that nothing waits for counts.
The backward pass writes both weighted products, [N, T, R] (in pieces of at most common.WORKSPACE elements), and sums
their outer products with dy and x, one program for each subnetwork and tile of columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.dispatch import TRITON
from l3d_kernels.kernels import common
from l3d_kernels.kernels.common import add_dot, add_row_products, ceil_div, empty, load, store, zeros
from l3d_kernels.kernels.project_fused import slots
from l3d_kernels.kernels.segments import sum_by_key
from l3d_kernels.kernels.table import TABLE, Launch, lookup
from l3d_kernels.sparse import SparseCoefficients

PRODUCT, LOOK_UP, INDEX = 0, 1, 2  # how a tile of x.right comes: multiplied, read by position, read by index

# --- kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def products_of_pairs(
    x_ptr,
    seen_ptr,
    dy_ptr,
    left_ptr,
    right_ptr,
    rows,  # [ROWS] rows of dy
    rows_x,  # [ROWS] rows of x
    mask_rows,
    k,
    offs_r,  # [COLS]
    T,
    I,
    O,
    R,
    stride_row,
    stride_col,
    SEEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the tiles (x.right, dy.left), each [ROWS, COLS], of positions of subnetwork k's pairs."""
    mask_cols = offs_r < R
    cols = k * R + offs_r
    returned = zeros(dy_ptr, rows.shape[0], offs_r.shape[0])
    returned = add_row_products(
        returned, dy_ptr, rows * O, mask_rows, left_ptr, cols * O, mask_cols, O, PRECISION, BLOCK_D
    )
    if SEEN == 0:
        seen = zeros(dy_ptr, rows.shape[0], offs_r.shape[0])
        seen = add_row_products(
            seen, x_ptr, rows_x * I, mask_rows, right_ptr, cols * I, mask_cols, I, PRECISION, BLOCK_D
        )
    else:
        if SEEN == 2:
            rows_x = tl.load(x_ptr + rows_x, mask=mask_rows, other=0).to(tl.int64)
        places = (seen_ptr + rows_x * stride_row)[:, None] + (cols * stride_col)[None, :]
        seen = load(places, mask_rows[:, None] & mask_cols[None, :]).to(returned.dtype)
    return seen, returned


@triton.jit
def project_at_values(
    out_ptr,  # [N]
    x_ptr,  # [B, T, I], or integers [B, T]
    seen_ptr,  # x.right with strides of a row and of a column k*R + r; read unless SEEN is PRODUCT
    dy_ptr,  # [S, T, O]
    left_ptr,  # [K, R, O]
    right_ptr,  # [K, R, I]
    tile_column_ptr,  # [tiles] int64, K for a tile that is not needed
    tile_first_ptr,  # [tiles] int64, place of a tile's first pair in column order
    offsets_ptr,  # [K+1] int64, kept.column_offsets
    order_ptr,  # [N] int64, kept.column_order
    row_ptr,  # [N] int64, kept.rows
    T,
    I,
    O,
    K,
    R,
    share,
    stride_row,
    stride_col,
    SEEN: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOT_T: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The coefficients of BLOCK_ROWS / SLOT_T pairs of one subnetwork."""
    k = tl.load(tile_column_ptr + tl.program_id(0))
    if k < K:
        line = tl.arange(0, BLOCK_ROWS)
        places = tl.load(tile_first_ptr + tl.program_id(0)) + line // SLOT_T
        mask_pairs = places < tl.load(offsets_ptr + k + 1)
        pairs = tl.load(order_ptr + places, mask=mask_pairs, other=0)
        offs_s = tl.load(row_ptr + pairs, mask=mask_pairs, other=0)
        total = tl.sum(zeros(dy_ptr, BLOCK_ROWS, 1), 1)  # [ROWS]
        for start_t in range(0, T, SLOT_T):
            offs_t = start_t + line % SLOT_T
            mask_rows = mask_pairs & (offs_t < T)
            for start_r in range(0, R, BLOCK_COLS):
                seen, returned = products_of_pairs(
                    x_ptr,
                    seen_ptr,
                    dy_ptr,
                    left_ptr,
                    right_ptr,
                    offs_s * T + offs_t,
                    (offs_s // share) * T + offs_t,
                    mask_rows,
                    k,
                    start_r + tl.arange(0, BLOCK_COLS),
                    T,
                    I,
                    O,
                    R,
                    stride_row,
                    stride_col,
                    SEEN,
                    PRECISION,
                    BLOCK_D,
                )
                total += tl.sum(seen * returned, 1)
        values = tl.sum(tl.reshape(total, [BLOCK_ROWS // SLOT_T, SLOT_T]), 1)
        places = tl.load(tile_first_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_ROWS // SLOT_T)
        mask_pairs = places < tl.load(offsets_ptr + k + 1)
        pairs = tl.load(order_ptr + places, mask=mask_pairs, other=0)
        store(out_ptr + pairs, values, mask_pairs)


@triton.jit
def project_at_rows(
    seen_out_ptr,  # [places, T, R] g x.right, in column order
    returned_out_ptr,  # [places, T, R] g dy.left
    d_out_ptr,  # [N]
    x_ptr,
    seen_ptr,
    dy_ptr,
    left_ptr,
    right_ptr,
    tile_column_ptr,
    tile_first_ptr,
    offsets_ptr,
    order_ptr,
    row_ptr,
    base,  # place that is first in the outputs
    T,
    I,
    O,
    K,
    R,
    share,
    stride_row,
    stride_col,
    SEEN: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOT_T: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Both weighted products of BLOCK_ROWS / SLOT_T pairs of one subnetwork; arguments as in project_at_values."""
    k = tl.load(tile_column_ptr + tl.program_id(0))
    if k < K:
        line = tl.arange(0, BLOCK_ROWS)
        places = tl.load(tile_first_ptr + tl.program_id(0)) + line // SLOT_T
        mask_pairs = places < tl.load(offsets_ptr + k + 1)
        pairs = tl.load(order_ptr + places, mask=mask_pairs, other=0)
        offs_s = tl.load(row_ptr + pairs, mask=mask_pairs, other=0)
        weight = load(d_out_ptr + pairs, mask_pairs)  # [ROWS]
        for start_t in range(0, T, SLOT_T):
            offs_t = start_t + line % SLOT_T
            mask_rows = mask_pairs & (offs_t < T)
            for start_r in range(0, R, BLOCK_COLS):
                offs_r = start_r + tl.arange(0, BLOCK_COLS)
                seen, returned = products_of_pairs(
                    x_ptr,
                    seen_ptr,
                    dy_ptr,
                    left_ptr,
                    right_ptr,
                    offs_s * T + offs_t,
                    (offs_s // share) * T + offs_t,
                    mask_rows,
                    k,
                    offs_r,
                    T,
                    I,
                    O,
                    R,
                    stride_row,
                    stride_col,
                    SEEN,
                    PRECISION,
                    BLOCK_D,
                )
                starts = ((places - base) * T + offs_t) * R
                mask = mask_rows[:, None] & (offs_r < R)[None, :]
                store((seen_out_ptr + starts)[:, None] + offs_r[None, :], seen * weight[:, None], mask)
                store((returned_out_ptr + starts)[:, None] + offs_r[None, :], returned * weight[:, None], mask)


@triton.jit
def project_at_outer(
    out_ptr,  # [columns, R, D]
    rows_ptr,  # [places, T, R]
    side_ptr,  # [S / divide, T, D] dy or x
    offsets_ptr,  # [columns+1] int64
    order_ptr,  # [N] int64
    row_ptr,  # [N] int64
    base,
    T,
    R,
    D,
    divide,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile [R, D] of one subnetwork's gradient: its rows' outer products with dy or x, one after another."""
    k = tl.program_id(0).to(tl.int64)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.program_id(2) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask_r, mask_d = offs_r < R, offs_d < D
    first, stop = tl.load(offsets_ptr + k) * T, tl.load(offsets_ptr + k + 1) * T
    total = zeros(side_ptr, BLOCK_R, BLOCK_COLS)
    for start in range(0, (stop - first).to(tl.int32), BLOCK_D):
        lines = first + start + tl.arange(0, BLOCK_D)
        mask = lines < stop
        pairs = tl.load(order_ptr + lines // T, mask=mask, other=0)
        offs_s = tl.load(row_ptr + pairs, mask=mask, other=0) // divide
        places = (rows_ptr + (lines - base * T) * R)[None, :] + offs_r[:, None]
        rows = load(places, mask[None, :] & mask_r[:, None])  # [R, lines]
        places = (side_ptr + (offs_s * T + lines % T) * D)[:, None] + offs_d[None, :]
        side = load(places, mask[:, None] & mask_d[None, :])  # [lines, D]
        total = add_dot(rows, side, total, PRECISION)
    store((out_ptr + (k * R + offs_r) * D)[:, None] + offs_d[None, :], total, mask_r[:, None] & mask_d[None, :])


# --- launch -----------------------------------------------------------------------------------------------------


def tile(rows: int, depth: int, warps: int, stages: int = 3) -> Launch:
    """Return a launch row for tiles of `rows` lines; how many ranks they are wide depends on R."""
    return Launch({"BLOCK_ROWS": rows, "BLOCK_D": depth}, warps, stages)


TABLE["project_at_values"] = {
    ("interpreter", None): tile(16, 32, 4),
    ("gfx942", None): tile(64, 32, 4, 2),
    (None, "16"): tile(128, 64, 8),
    (None, "32"): tile(64, 32, 8),
}
TABLE["project_at_rows"] = TABLE["project_at_values"] | {(None, "16"): tile(64, 64, 8)}
TABLE["project_at_outer"] = {
    ("interpreter", None): Launch({"BLOCK_COLS": 16, "BLOCK_D": 16}, 4, 3),
    ("gfx942", None): Launch({"BLOCK_COLS": 128, "BLOCK_D": 32}, 4, 2),
    (None, "16"): Launch({"BLOCK_COLS": 128, "BLOCK_D": 64}, 4, 3),
    (None, "32"): Launch({"BLOCK_COLS": 128, "BLOCK_D": 32}, 8, 3),
}


def wide_ranks(R: int, most: int) -> int:
    """Return how many ranks a tile is wide: a power of two from 16 to `most`."""
    return min(most, common.power_of_two(R, 16))


def schedule(column_offsets: Tensor, per_tile: int, n_pairs: int, first: int) -> tuple[Tensor, Tensor]:
    """Deal the pairs of each subnetwork to tiles of `per_tile`: each tile's subnetwork, and its first place.

    As many tiles as could be needed; those that are not have the number of subnetworks. No count leaves the device.
    """
    counts = column_offsets.diff()
    ends = torch.div(counts + per_tile - 1, per_tile, rounding_mode="floor").cumsum(0)
    tiles = torch.arange(n_pairs // per_tile + min(len(counts), n_pairs), device=counts.device)
    column = torch.searchsorted(ends, tiles, right=True)
    own = column.clamp_max(len(counts) - 1)
    before = torch.where(own > 0, ends[(own - 1).clamp_min(0)], 0)
    return column, column_offsets[own] + (tiles - before) * per_tile


class Pairs:
    """The kept pairs of a range of subnetworks, and the inputs their launches share."""

    def __init__(self, x: Tensor, dy: Tensor, left: Tensor, right: Tensor, kept: tuple[Tensor, Tensor, Tensor]):
        self.x, self.dy, self.left, self.right = x, dy, left, right
        self.order, self.offsets, self.rows = kept
        (_, T, O), (K, R, I) = dy.shape, right.shape
        self.sizes = {"T": T, "I": I, "O": O, "R": R, "share": len(dy) // len(x)}
        self.N = self.rows.numel()
        if not x.is_floating_point():
            self.seen, self.mode, strides = right, INDEX, (1, I)
        elif len(x) * K <= self.N and len(x) < len(dy):
            self.seen, self.mode, strides = x.flatten(0, 1) @ right.flatten(0, 1).mT, LOOK_UP, (K * R, 1)
        else:
            self.seen, self.mode, strides = right, PRODUCT, (0, 0)
        self.sizes |= {"stride_row": strides[0], "stride_col": strides[1]}

    def launch(self, kernel: Any, start: int, stop: int, first: int, n_pairs: int, **outputs: Any) -> None:
        """Launch one of the first two kernels on subnetworks start..stop, which own pairs first..first + n_pairs."""
        row, precision = common.row_for(kernel.fn.__name__, self.dy)
        slot = slots(self.sizes["T"], row.blocks["BLOCK_ROWS"])
        offsets = self.offsets[start : stop + 1]
        column, begin = schedule(offsets, row.blocks["BLOCK_ROWS"] // slot, n_pairs, first)
        pointers = {
            "x_ptr": self.x,
            "seen_ptr": self.seen,
            "dy_ptr": self.dy,
            "left_ptr": self.left,
            "right_ptr": self.right,
            "tile_column_ptr": column + start,
            "tile_first_ptr": begin,
            "offsets_ptr": self.offsets,
            "order_ptr": self.order,
            "row_ptr": self.rows,
        }
        flags: dict[str, Any] = {
            "SEEN": self.mode,
            "PRECISION": precision,
            "SLOT_T": slot,
            "BLOCK_COLS": wide_ranks(self.sizes["R"], 32),
        }
        common.launch(kernel, (len(column),), row, self.dy.device, **outputs, **pointers, K=stop, **flags, **self.sizes)

    def outer(self, rows: Tensor, side: Tensor, divide: int, start: int, stop: int, first: int) -> Tensor:
        """Launch the gradient of subnetworks start..stop from `rows` and dy or x: [stop - start, R, D]."""
        R, D = rows.shape[2], side.shape[2]
        out = empty((stop - start, R, D), rows)
        row, precision = common.row_for("project_at_outer", rows)
        block = wide_ranks(R, 64)
        grid = (stop - start, ceil_div(R, block), ceil_div(D, row.blocks["BLOCK_COLS"]))
        pointers = {"out_ptr": out, "rows_ptr": rows, "side_ptr": side, "offsets_ptr": self.offsets[start:]}
        sizes = {"base": first, "T": self.sizes["T"], "R": R, "D": D, "divide": divide}
        pointers |= {"order_ptr": self.order, "row_ptr": self.rows}
        common.launch(project_at_outer, grid, row, out.device, BLOCK_R=block, PRECISION=precision, **pointers, **sizes)
        return out

    def pieces(self) -> list[tuple[int, int, int, int]]:
        """Cut the subnetworks so that a piece's products fit in the workspace: (start, stop, first pair, pairs)."""
        per_pair, K = self.sizes["T"] * self.sizes["R"], len(self.left)
        if self.N * per_pair <= common.WORKSPACE:
            return [(0, K, 0, self.N)]
        offsets, out, start = self.offsets.tolist(), [], 0
        while start < K:
            stop = start + 1
            while stop < K and (offsets[stop + 1] - offsets[start]) * per_pair <= common.WORKSPACE:
                stop += 1
            out.append((start, stop, offsets[start], offsets[stop] - offsets[start]))
            start = stop
        return out


def _no_values(
    x: Tensor, dy: Tensor, left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, rows: Tensor
) -> Tensor:
    return dy.new_empty(rows.shape[0])


@common.operator("project_at", _no_values)
def project_at_forward(
    x: Tensor, dy: Tensor, left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, rows: Tensor
) -> Tensor:
    """Launch the coefficients: [N]."""
    n_pairs = rows.numel()
    if n_pairs == 0 or dy.shape[1] == 0 or left.shape[1] == 0:
        return dy.new_zeros(n_pairs)
    out = empty((n_pairs,), dy)
    pairs = Pairs(x, dy, left, right, (order, offsets, rows))
    pairs.launch(project_at_values, 0, len(left), 0, n_pairs, out_ptr=out)
    return out


def _no_gradients(
    d_out: Tensor, x: Tensor, dy: Tensor, left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(left), torch.empty_like(right)


@common.operator("project_at_backward", _no_gradients)
def project_at_backward(
    d_out: Tensor, x: Tensor, dy: Tensor, left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the gradients to left and right."""
    d_left, d_right = torch.zeros_like(left), torch.zeros_like(right)
    (_, T, _), (_, R, I) = dy.shape, right.shape
    if rows.numel() == 0 or T == 0 or R == 0:
        return d_left, d_right
    pairs = Pairs(x, dy, left, right, (order, offsets, rows))
    for start, stop, first, n_pairs in pairs.pieces():
        if n_pairs == 0:
            continue
        seen, returned = (empty((n_pairs, T, R), dy) for _ in range(2))
        outputs = {"seen_out_ptr": seen, "returned_out_ptr": returned, "d_out_ptr": d_out.contiguous(), "base": first}
        pairs.launch(project_at_rows, start, stop, first, n_pairs, **outputs)
        d_left[start:stop] = pairs.outer(seen, dy, 1, start, stop, first)
        if x.is_floating_point():
            d_right[start:stop] = pairs.outer(returned, x, pairs.sizes["share"], start, stop, first)
        else:
            own = order[first : first + n_pairs]
            column = torch.searchsorted(offsets, torch.arange(first, first + n_pairs, device=x.device), right=True)
            key = (column - 1 - start)[:, None] * I + x[rows[own] // pairs.sizes["share"]]  # [pairs, T]
            by_key = sum_by_key(returned.flatten(0, 1), key.flatten(), (stop - start) * I)
            d_right[start:stop] = by_key.unflatten(0, (stop - start, I)).mT
    return d_left, d_right


# --- autograd ---------------------------------------------------------------------------------------------------


class _ProjectAt(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, dy: Tensor, left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, rows: Tensor
    ) -> Tensor:
        return project_at_forward(x, dy, left, right, order, offsets, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        d_left, d_right = project_at_backward(d_out, *ctx.saved_tensors)
        return None, None, d_left, d_right, None, None, None


def project_at(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, kept: SparseCoefficients) -> Tensor:
    """Run `l3d_kernels.reference.project_at` with Triton kernels; no gradients to x and dy."""
    if torch.is_grad_enabled() and (x.requires_grad or dy.requires_grad):
        raise ValueError("x, dy: the kernels of project_at have no gradient to them; detach them, or use 'torch'")
    floats = common.autocast_alike(*(t for t in (x, dy, left, right) if t.is_floating_point()))
    x, dy, left, right = floats if len(floats) == 4 else (x.contiguous(), *floats)
    indices = (kept.column_order.contiguous(), kept.column_offsets.contiguous(), kept.rows.contiguous())
    return _ProjectAt.apply(x, dy, left, right, *indices)


TRITON["project_at"] = project_at


def compile_cases(kind: str) -> list[common.CompileCase]:
    """Return every form in which the kernels are launched on a kind of device."""
    names = ("tile_column_ptr", "tile_first_ptr", "offsets_ptr", "order_ptr", "row_ptr")
    cases, types = [], dict.fromkeys(names, "*i64")
    outer_types = dict.fromkeys(("offsets_ptr", "order_ptr", "row_ptr"), "*i64")
    for dtype, bits, precision, long in common.compile_dtypes(kind):
        for mode in (PRODUCT, LOOK_UP, INDEX):
            for slot, cols in ((16, 32), (1, 16), (64, 32)):
                late = long or mode == LOOK_UP or (slot, cols) != (16, 32)
                constants = {"SEEN": mode, "PRECISION": precision, "SLOT_T": slot, "BLOCK_COLS": cols}
                own = types | ({"x_ptr": "*i64"} if mode == INDEX else {})
                for kernel in (project_at_values, project_at_rows):
                    row = lookup(kernel.fn.__name__, kind, bits)
                    cases.append(common.CompileCase(kernel, dtype, constants, row, own, long=late))
        for cols in (16, 32, 64):
            constants = {"BLOCK_R": cols, "PRECISION": precision}
            row, late = lookup("project_at_outer", kind, bits), long or cols != 32
            cases.append(
                common.CompileCase(project_at_outer, dtype, constants, row, outer_types, long=late, divisible=("D",))
            )
    return cases
