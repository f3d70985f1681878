"""Deal the kept pairs to programs, grouped by subnetwork as tokens are by expert.

The kernels of `project_at` share this. Pairs are taken in the order of kept.column_order. A program gets a tile of
pairs, all of one subnetwork. The device computes which ones, so that no launch waits for counts.
"""

from typing import Any

import torch
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
def lines_of_tile(tile_ptr, sample_ptr, SLOT_T: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Return (subnetwork or -1, each line's place among the pairs, whether it has one, its sample), lines [ROWS]."""
    tile_ptr += tl.program_id(0).to(tl.int64) * 3
    places = tl.load(tile_ptr + 1) + tl.arange(0, BLOCK_ROWS) // SLOT_T
    mask_pairs = places < tl.load(tile_ptr + 2)
    return tl.load(tile_ptr), places, mask_pairs, tl.load(sample_ptr + places, mask=mask_pairs, other=0)


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


def schedule(offsets: Tensor, per_tile: int, n_pairs: int) -> Tensor:
    """Deal each subnetwork's pairs to tiles of `per_tile`: (subnetwork, its first place, where they end) [tiles, 3].

    offsets [columns+1] int64. There are as many tiles as could be needed; a tile that is not needed has subnetwork -1.
    No count leaves the device.
    """
    counts = offsets.diff()
    ends = torch.div(counts + per_tile - 1, per_tile, rounding_mode="floor").cumsum(0)
    tiles = torch.arange(n_pairs // per_tile + min(len(counts), n_pairs), device=counts.device)
    column = torch.searchsorted(ends, tiles, right=True)
    own = column.clamp_max(len(counts) - 1)
    before = torch.where(own > 0, ends[(own - 1).clamp_min(0)], 0)
    column = torch.where(column < len(counts), column, -1)
    return torch.stack([column, offsets[own] + (tiles - before) * per_tile, offsets[own + 1]], 1)


class Pairs:
    """The kept pairs in column order, and the arguments that all launches on them take."""

    def __init__(self, x: Tensor, dy: Tensor, left: Tensor, right: Tensor, kept: tuple[Tensor, Tensor, Tensor]) -> None:
        order, self.offsets, rows = kept
        (_, T, O), (K, R, I) = dy.shape, right.shape
        self.samples, self.share = rows[order], len(dy) // len(x)
        if not x.is_floating_point():
            source, mode, width = x, INDEX, I
        elif len(x) * K <= len(rows) and self.share > 1:
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
        tiles = schedule(self.offsets[start : stop + 1], row.blocks["BLOCK_ROWS"] // slot, n_pairs)
        if start or first:  # else there is nothing to add, and the copy would wait for the GPU
            tiles += torch.where(tiles[:, :1] < 0, 0, tiles.new_tensor([start, -first, -first]))
        tiles[:, 2].clamp_max_(n_pairs)  # no pair is written beyond the outputs, also where the offsets are wrong
        pointers = {"tile_ptr": tiles, "sample_ptr": self.samples[first : first + n_pairs], **outputs, **self.tensors}
        common.launch(kernel, (len(tiles),), row, dy.device, **pointers, SLOT_T=slot, **self.flags, **self.sizes)


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
