"""Deal the kept pairs to programs, grouped by subnetwork as tokens are by expert.

The kernels of `project_at` share this. Pairs are taken in the order of kept.column_order. A program gets a tile of
pairs, all of one subnetwork; it finds out which by a binary search, so that no launch waits for counts.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.project.fused import slots
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import load, row_products
from l3d_kernels.kernels.shared.launch_table import Launch

# Where x·right comes from: multiplied here, read by position from a given product, or read from `right` by index.
PRODUCT, LOOK_UP, INDEX = 0, 1, 2

# --- device functions -------------------------------------------------------------------------------------------


@triton.jit
def first_tile(offsets_ptr, k, first, PER_TILE: tl.constexpr):
    """Return the first tile of subnetwork k: its pairs fill no more tiles than there are up to that of k + 1."""
    return (tl.load(offsets_ptr + k) - first) // PER_TILE + k


@triton.jit
def pairs_of_tile(offsets_ptr, first, stop, columns, PER_TILE: tl.constexpr):
    """Return (subnetwork, its tile's first place, where its places end) of this program; there may be none.

    offsets_ptr [columns+1] int64: the places of each subnetwork's pairs; the launch has those from `first` to `stop`.
    """
    tile = tl.program_id(0).to(tl.int64)
    low, high = tile * 0, tile * 0 + columns
    while high - low > 1:
        middle = (low + high) // 2
        starts_later = first_tile(offsets_ptr, middle, first, PER_TILE) > tile
        low, high = tl.where(starts_later, low, middle), tl.where(starts_later, middle, high)
    place = tl.load(offsets_ptr + low) + (tile - first_tile(offsets_ptr, low, first, PER_TILE)) * PER_TILE
    return low, place, tl.minimum(tl.load(offsets_ptr + low + 1), stop)


@triton.jit
def lines_of_tile(order_ptr, rows_ptr, place, end, SLOT_T: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Return (place among the pairs, whether there is one, entry, sample) of each line of a tile, [ROWS] each."""
    places = place + tl.arange(0, BLOCK_ROWS) // SLOT_T
    mask_pairs = places < end
    entries = tl.load(order_ptr + places, mask=mask_pairs, other=0)
    return places, mask_pairs, entries, tl.load(rows_ptr + entries, mask=mask_pairs, other=0)


@triton.jit
def products_of_lines(
    x_ptr,  # [B, T, I] where SOURCE is PRODUCT; x·right [B*T, K*R] where LOOK_UP; integers [B, T] where INDEX
    dy_ptr,  # [S, T, O]
    left_ptr,  # [K, R, O]
    right_ptr,  # [K, R, I]
    offs_s,  # [ROWS]
    offs_t,  # [ROWS]
    mask_rows,
    k,
    offs_r,  # [COLS]
    T,
    I,  # columns of x and of right; K*R, those of x·right, where LOOK_UP
    O,
    R,
    share,  # samples of one sequence
    SOURCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the tiles (x·right, dy·left), each [ROWS, COLS], of positions of one subnetwork's pairs."""
    mask_cols = offs_r < R
    cols, rows, rows_x = k * R + offs_r, offs_s * T + offs_t, (offs_s // share) * T + offs_t
    dy_left = row_products(dy_ptr, rows * O, mask_rows, left_ptr, cols * O, mask_cols, O, PRECISION, BLOCK_D)
    if SOURCE == 0:
        x_right = row_products(x_ptr, rows_x * I, mask_rows, right_ptr, cols * I, mask_cols, I, PRECISION, BLOCK_D)
    else:
        if SOURCE == 1:
            places = (x_ptr + rows_x * I)[:, None] + cols[None, :]
        else:
            index = tl.load(x_ptr + rows_x, mask=mask_rows, other=0).to(tl.int64)
            places = (right_ptr + index)[:, None] + (cols * I)[None, :]
        x_right = load(places, mask_rows[:, None] & mask_cols[None, :]).to(dy_left.dtype)
    return x_right, dy_left


# --- launch -----------------------------------------------------------------------------------------------------


def tile(rows: int, depth: int, warps: int, stages: int = 3) -> Launch:
    """Return a launch row for tiles of `rows` lines; how many ranks they are wide depends on R."""
    return Launch({"BLOCK_ROWS": rows, "BLOCK_D": depth}, warps, stages)


def wide_ranks(R: int, most: int) -> int:
    """Return how many ranks a tile holds: a power of two from 16 to `most`."""
    return min(most, common.power_of_two(R, 16))


class Pairs:
    """The kept pairs in column order, and the arguments that all launches on them take."""

    def __init__(self, x: Tensor, dy: Tensor, left: Tensor, right: Tensor, kept: tuple[Tensor, Tensor, Tensor]) -> None:
        self.order, self.offsets, self.rows = kept
        (_, T, O), (K, R, I) = dy.shape, right.shape
        self.share = len(dy) // len(x)
        if not x.is_floating_point():
            source, mode, width = x, INDEX, I
        elif len(x) * K <= len(self.rows) and self.share > 1:
            source, mode, width = x.flatten(0, 1) @ right.flatten(0, 1).mT, LOOK_UP, K * R
        else:
            source, mode, width = x, PRODUCT, I
        self.sizes = {"T": T, "I": width, "O": O, "R": R, "share": self.share}
        self.tensors = {"x_ptr": source, "dy_ptr": dy, "left_ptr": left, "right_ptr": right}
        self.flags = {"SOURCE": mode, "BLOCK_COLS": wide_ranks(R, 32)}

    def launch(self, kernel: Any, start: int, stop: int, first: int, n_pairs: int, **outputs: Any) -> None:
        """Launch a kernel on the pairs of subnetworks start..stop, which are first..first + n_pairs in column order."""
        dy = self.tensors["dy_ptr"]
        row = common.row_for(kernel, dy)
        slot = slots(dy.shape[1], row.blocks["BLOCK_ROWS"])
        columns = stop - start
        grid = (n_pairs // (row.blocks["BLOCK_ROWS"] // slot) + columns,)
        own = {"pairs": (self.offsets[start:], self.order, self.rows), "part": (first, first + n_pairs, start, columns)}
        arguments = {**own, **outputs, **self.tensors, **self.flags, **self.sizes}
        common.launch(kernel, grid, row, dy.device, SLOT_T=slot, **arguments)


# --- ahead of time ----------------------------------------------------------------------------------------------


def cases_of(kernel: Any, kind: str) -> list[CompileCase]:
    """Return every form in which a kernel on tiles of pairs is launched on a kind of device."""
    cases = []
    for mode in (PRODUCT, LOOK_UP, INDEX):
        forms = [
            ({"SOURCE": mode, "SLOT_T": slot, "BLOCK_COLS": cols}, mode == LOOK_UP or (slot, cols) != (16, 32))
            for slot, cols in ((16, 32), (1, 16), (64, 32))
        ]
        own = {"x_ptr": "*i64"} if mode == INDEX else {}
        cases += cases_of_kernel(kernel, kind, forms, divisible=("O",) if mode == LOOK_UP else ("I", "O"), **own)
    return cases
