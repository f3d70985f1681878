"""Project with both products of a tile kept in registers: the path of `project` that writes neither of them.

    c[s, k] = Σ_t Σ_r (x[b, t] . right[k, r]) (dy[s, t] . left[k, r]),  b = s // (S // B)      [S, K]

A program computes the coefficients of a few samples and a few subnetworks. The rows of a tile are some positions of
each of its samples (SLOT_T, a power of two), its columns some ranks of each of its subnetworks (SLOT_R); the program
walks over tiles until all positions and ranks are done. Both products stay in registers, are multiplied there and
summed by sample and subnetwork. Where samples share a sequence, the library computes x·right first, [B·T, K·R], and
each tile loads its part of it; for indices that product is a look-up in `right`.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.project.epilogue import COUNTED, finish, lines
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import load, row_products, sum_groups, zeros
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch, Rows

# --- kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def project_pair(
    out_ptr,  # [S, K]
    histogram_ptr,  # [2^bits] int64, to be counted up; or None
    base_ptr,  # [S, K], to be added; or None
    x_ptr,  # [S, T, I]
    dy_ptr,  # [S, T, O]
    left_ptr,  # [K, R, O]
    right_ptr,  # [K, R, I]
    S,
    T,
    I,
    O,
    K,
    R,
    PRECISION: tl.constexpr,
    SLOT_T: tl.constexpr,  # positions of a sample in one tile
    SLOT_R: tl.constexpr,  # ranks of a subnetwork in one tile
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the coefficients of a tile of samples and subnetworks, where every sample has its own sequence."""
    offs_s, line_t = lines(tl.program_id(0).to(tl.int64), SLOT_T, BLOCK_ROWS)
    offs_k, line_r = lines(tl.program_id(1).to(tl.int64), SLOT_R, BLOCK_COLS)
    total = zeros(dy_ptr, BLOCK_ROWS // SLOT_T, BLOCK_COLS // SLOT_R)
    for start_t in range(0, T, SLOT_T):
        offs_t = start_t + line_t
        mask_rows = (offs_s < S) & (offs_t < T)
        rows = offs_s * T + offs_t
        for start_r in range(0, R, SLOT_R):
            offs_r = start_r + line_r
            mask_cols = (offs_k < K) & (offs_r < R)
            cols = offs_k * R + offs_r
            x_right = row_products(x_ptr, rows * I, mask_rows, right_ptr, cols * I, mask_cols, I, PRECISION, BLOCK_D)
            dy_left = row_products(dy_ptr, rows * O, mask_rows, left_ptr, cols * O, mask_cols, O, PRECISION, BLOCK_D)
            total += sum_groups(x_right * dy_left, SLOT_T, SLOT_R)
    finish(out_ptr, histogram_ptr, base_ptr, total, S, K, K)


@triton.jit
def project_seen(
    out_ptr,  # [S, K]
    histogram_ptr,  # [2^bits] int64, to be counted up; or None
    base_ptr,  # [S, K], to be added; or None
    x_right_ptr,  # [rows, K*R] x·right: a row per b*T + t, or per index
    index_ptr,  # [B, T] integers, rows of x_right; read where INDEXED
    dy_ptr,  # [S, T, O]
    left_ptr,  # [K, R, O]
    S,
    T,
    O,
    K,
    R,
    share,  # samples of one sequence
    INDEXED: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOT_T: tl.constexpr,
    SLOT_R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the coefficients of a tile of samples and subnetworks from a given x·right."""
    offs_s, line_t = lines(tl.program_id(0).to(tl.int64), SLOT_T, BLOCK_ROWS)
    offs_k, line_r = lines(tl.program_id(1), SLOT_R, BLOCK_COLS)
    total = zeros(dy_ptr, BLOCK_ROWS // SLOT_T, BLOCK_COLS // SLOT_R)
    for start_t in range(0, T, SLOT_T):
        offs_t = start_t + line_t
        mask_rows = (offs_s < S) & (offs_t < T)
        rows = offs_s * T + offs_t
        x_rows = (offs_s // share) * T + offs_t
        if INDEXED:
            x_rows = tl.load(index_ptr + x_rows, mask=mask_rows, other=0).to(tl.int64)
        for start_r in range(0, R, SLOT_R):
            offs_r = start_r + line_r
            mask_cols = (offs_k < K) & (offs_r < R)
            cols = offs_k * R + offs_r  # int32; added to the rows' int64 below
            dy_left = row_products(
                dy_ptr, rows * O, mask_rows, left_ptr, cols.to(tl.int64) * O, mask_cols, O, PRECISION, BLOCK_D
            )
            places = (x_right_ptr + x_rows * (K * R))[:, None] + cols[None, :]
            x_right = load(places, mask_rows[:, None] & mask_cols[None, :])  # [ROWS, COLS]
            total += sum_groups(x_right * dy_left, SLOT_T, SLOT_R)
    finish(out_ptr, histogram_ptr, base_ptr, total, S, K, K)


# --- launch -----------------------------------------------------------------------------------------------------


def tile(rows: int, cols: int, depth: int, warps: int, stages: int = 3) -> Launch:
    """Return a launch row for tiles of rows x cols that walk `depth` elements at a time."""
    return Launch({"BLOCK_ROWS": rows, "BLOCK_COLS": cols, "BLOCK_D": depth}, warps, stages)


# what the kernels of the projection have in common; rows of their own take precedence
OTHERS: Rows = {
    ("interpreter", None): tile(16, 16, 32, 4),
    ("gfx942", "16"): tile(128, 64, 64, 8, 2),
    ("gfx942", "32"): tile(128, 64, 32, 8, 2),
    ("gfx1100", "16"): tile(64, 64, 32, 8, 2),
    ("gfx1100", "32"): tile(64, 32, 16, 8, 2),
    (None, "16"): tile(128, 64, 64, 8),
    (None, "32"): tile(128, 64, 32, 8),
}
TABLE["project_pair"] = OTHERS | {
    ("sm_80", "16"): tile(128, 64, 32, 8),
    ("sm_80", "32"): tile(64, 32, 32, 8),
    ("sm_90", "16"): tile(128, 128, 32, 8, 4),
}
TABLE["project_seen"] = OTHERS | {("sm_80", "32"): tile(64, 32, 32, 8)}
# "spread": few positions share a sum, so that the sums need registers beside the products
SPREAD: Rows = OTHERS | {
    ("sm_80", "32"): tile(64, 32, 32, 8),
    ("sm_90", "32"): tile(64, 64, 32, 8),
    ("sm_100", "32"): tile(64, 32, 32, 8),
}
TABLE["project_pair spread"] = SPREAD | {("sm_120", "16"): tile(64, 64, 32, 8)}
TABLE["project_seen spread"] = SPREAD | {(None, "16"): tile(64, 64, 32, 8), ("sm_90", "32"): tile(64, 32, 32, 4)}


def is_spread(slot_t: int, slot_r: int) -> bool:
    """Return whether so few lines of a tile share a sum that the tile must be smaller."""
    return slot_t < 16 or slot_t * slot_r < 32


def tiling(kernel: Any, dy: Tensor, left: Tensor) -> tuple[Launch, dict[str, Any], tuple[int, ...]]:
    """Return the launch row, the constants and the grid of a kernel."""
    (S, T, _), (K, R, _) = dy.shape, left.shape
    row = common.row_for(kernel, dy)
    slot_t, slot_r = slots(T, row.blocks["BLOCK_ROWS"]), slots(R, row.blocks["BLOCK_COLS"])
    if is_spread(slot_t, slot_r):
        row = common.row_for(kernel, dy, " spread")
        slot_t, slot_r = slots(T, row.blocks["BLOCK_ROWS"]), slots(R, row.blocks["BLOCK_COLS"])
    return row, {"SLOT_T": slot_t, "SLOT_R": slot_r}, row.tiles(ROWS=S * slot_t, COLS=K * slot_r)


def slots(size: int, block: int) -> int:
    """Return how many positions (or ranks) of one group a tile of `block` lines holds: a power of two.

    It is the largest for which at most an eighth of the lines is padding.
    """
    slot = block if size else 1
    while common.ceil_div(size, slot) * slot > 1.125 * size:
        slot //= 2
    return slot


def sequence_products(x: Tensor, right: Tensor) -> Tensor:
    """Compute x·right once per sequence, a row per position; for indices, a row per index instead: [rows, K*R]."""
    if not x.is_floating_point():
        return right.flatten(0, 1).mT.contiguous()
    return x.flatten(0, 1) @ right.flatten(0, 1).mT


def coefficients(
    x: Tensor, dy: Tensor, left: Tensor, right: Tensor, base: Tensor | None, histogram: Tensor | None
) -> Tensor:
    """Launch the kernel: `base` plus the coefficients, [S, K]; their magnitudes are counted in `histogram`."""
    (S, T, O), (K, R, I) = dy.shape, right.shape
    out = common.empty((S, K), dy)
    pair = x.is_floating_point() and len(x) == S
    row, constants, grid = tiling(project_pair if pair else project_seen, dy, left)
    shared = {"out_ptr": out, "dy_ptr": dy, "left_ptr": left, "S": S, "T": T, "O": O, "K": K, "R": R, **constants}
    shared |= {"base_ptr": base, "histogram_ptr": histogram}
    if pair:
        common.launch(project_pair, grid, row, dy.device, x_ptr=x, right_ptr=right, I=I, **shared)
    elif S:
        look_up = {"x_right_ptr": sequence_products(x, right), "index_ptr": x, "INDEXED": not x.is_floating_point()}
        common.launch(project_seen, grid, row, dy.device, share=S // len(x), **look_up, **shared)
    return out


TILES = ((16, 4), (1, 1), (16, 2), (16, 32), (32, 1), (64, 32), (8, 32), (16, 1))  # (SLOT_T, SLOT_R)


def compile_cases(kind: str, count: bool = False, tiles: Sequence[tuple[int, int]] = TILES) -> list[CompileCase]:
    """Return every form in which the kernels are launched on a kind of device; `count`: as `project_topk` does.

    Of TILES only the first two are in the short test; of other tiles, all are.
    """
    cases = []
    for slot_t, slot_r in tiles:
        spread = " spread" if is_spread(slot_t, slot_r) else ""
        constants = {"SLOT_T": slot_t, "SLOT_R": slot_r, **COUNTED[count]}
        late = tiles is TILES and (slot_t, slot_r) not in TILES[:2]
        indexed = [({**constants, "INDEXED": indexed}, late or indexed) for indexed in (False, True)]
        cases += cases_of_kernel(project_pair, kind, [(constants, late)], spread)
        cases += cases_of_kernel(project_seen, kind, indexed, spread)
    return cases
