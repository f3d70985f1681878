"""Compute the gradients of `project` for an upstream gradient g [S, K]; shapes as in `project`.

    x_right[b, t, kr] = x[b, t] . right[kr]                   dy_left[b, t, kr] = Σ_{s of b} g[s, k] dy[s, t] . left[kr]
    d_left[kr]  = Σ_s Σ_t g[s, k] x_right[b, t, kr] dy[s, t]  d_right[kr] = Σ_b Σ_t dy_left[b, t, kr] x[b, t]
    d_dy[s, t]  = Σ_kr g[s, k] x_right[b, t, kr] left[kr]     d_x[b, t]   = Σ_kr dy_left[b, t, kr] right[kr]

Subnetworks are taken a few at a time, so that `x_right` and `dy_left` fit in common.WORKSPACE; only d_x and d_dy are
carried from one piece to the next. Two of the three steps are plain products and are left to the library.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.project.fused import OTHERS, sequence_products, tile
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import add_dot, feed, load, row_products, store, zeros
from l3d_kernels.kernels.shared.launch_table import TABLE
from l3d_kernels.kernels.shared.segment_sum import sum_by_key
from l3d_kernels.splitting import pieces

# --- kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def project_returned(
    out_ptr,  # [B, T, K*R]
    d_out_ptr,  # [S, K_all], from this piece's first subnetwork on
    dy_ptr,  # [S, T, O]
    left_ptr,  # [K*R, O]
    rows_out,  # B*T
    cols_out,  # K*R
    T,
    O,
    R,
    K_all,
    share,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum a tile of `dy_left` over the samples of a sequence: dy·left times the upstream gradient."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask_rows, mask_cols = rows < rows_out, cols < cols_out
    mask = mask_rows[:, None] & mask_cols[None, :]
    starts_left = cols.to(tl.int64) * O
    total = zeros(dy_ptr, BLOCK_ROWS, BLOCK_COLS)
    for member in range(0, share):
        offs_s = (rows // T) * share + member
        starts_dy = (offs_s * T + rows % T) * O
        product = row_products(dy_ptr, starts_dy, mask_rows, left_ptr, starts_left, mask_cols, O, PRECISION, BLOCK_D)
        weight = load((d_out_ptr + offs_s * K_all)[:, None] + (cols // R)[None, :], mask)  # [ROWS, COLS]
        total += weight * product
    store((out_ptr + rows * cols_out)[:, None] + cols[None, :], total, mask)


@triton.jit
def project_weighted(
    out_ptr,  # [splits, K*R, O]
    d_out_ptr,  # [S, K_all], from this piece's first subnetwork on
    x_right_ptr,  # [rows, K*R]
    index_ptr,  # [B, T] integers, rows of `x_right`; read where INDEXED
    dy_ptr,  # [S, T, O]
    rows_in,  # S*T
    cols_out,  # K*R
    T,
    O,
    R,
    K_all,
    share,
    rows_split,  # rows that one program sums
    INDEXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum a tile [K*R, O] of d_left over some rows (s, t): g x_right dy."""
    cols = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_o = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    first = tl.program_id(2).to(tl.int64) * rows_split
    stop = tl.minimum(first + rows_split, rows_in)
    mask_cols, mask_o = cols < cols_out, offs_o < O
    total = zeros(dy_ptr, BLOCK_ROWS, BLOCK_COLS)
    for start in range(0, rows_split, BLOCK_D):
        rows = first + start + tl.arange(0, BLOCK_D)
        mask_rows = rows < stop
        offs_s = rows // T
        x_rows = (offs_s // share) * T + rows % T
        if INDEXED:
            x_rows = tl.load(index_ptr + x_rows, mask=mask_rows, other=0).to(tl.int64)
        mask = mask_cols[:, None] & mask_rows[None, :]
        x_right = load((x_right_ptr + x_rows * cols_out)[None, :] + cols[:, None], mask)  # [K*R, D]
        weight = load((d_out_ptr + offs_s * K_all)[None, :] + (cols // R)[:, None], mask)  # [K*R, D]
        dy = load((dy_ptr + rows * O)[:, None] + offs_o[None, :], mask_rows[:, None] & mask_o[None, :])  # [D, O]
        total = add_dot(feed(x_right.to(total.dtype) * weight.to(total.dtype), dy_ptr), dy, total, PRECISION)
    places = (out_ptr + (tl.program_id(2).to(tl.int64) * cols_out + cols) * O)[:, None] + offs_o[None, :]
    store(places, total, mask_cols[:, None] & mask_o[None, :])


# --- launch -----------------------------------------------------------------------------------------------------


TABLE["project_returned"] = OTHERS | {
    ("sm_80", "16"): tile(64, 64, 64, 8),  # twice as wide spills in triton 3.6
    (None, "32"): tile(64, 64, 32, 8),
    ("sm_80", "32"): tile(64, 32, 32, 8),
}
TABLE["project_weighted"] = {
    ("interpreter", None): tile(16, 16, 16, 4),
    ("gfx942", None): tile(128, 128, 32, 8, 2),
    ("gfx1100", "16"): tile(128, 64, 32, 8, 2),
    ("gfx1100", "32"): tile(64, 64, 16, 8, 2),
    (None, "16"): tile(128, 64, 32, 8),  # twice as wide, and below twice as deep, spills in triton 3.9
    (None, "32"): tile(128, 64, 16, 8),
    ("sm_80", "32"): tile(64, 64, 32, 8),
    ("sm_120", "32"): tile(64, 64, 32, 8, 2),
}


class Piece:
    """The gradients of some subnetworks: their part of the inputs, and the steps of the backward pass."""

    def __init__(self, x: Tensor, dy: Tensor, left: Tensor, right: Tensor, d_out: Tensor):
        self.x, self.dy, self.R, self.share, self.d_out = x, dy, left.shape[1], len(dy) // len(x), d_out
        self.left, self.right = left.flatten(0, 1), right.flatten(0, 1)
        self.shared = {"d_out_ptr": d_out, "dy_ptr": dy, "T": dy.shape[1], "O": dy.shape[2], "R": self.R}
        self.shared |= {"K_all": d_out.stride(0), "cols_out": len(self.left), "share": self.share}

    def dy_left(self) -> Tensor:
        """Launch `dy_left`: [B*T, K*R]."""
        rows = self.x.shape[0] * self.x.shape[1]
        out = common.empty((rows, len(self.left)), self.dy)
        row = common.row_for(project_returned, self.dy)
        own = {"out_ptr": out, "left_ptr": self.left, "rows_out": rows, **self.shared}
        common.launch(project_returned, row.tiles(ROWS=rows, COLS=len(self.left)), row, out.device, **own)
        return out

    def d_left(self, x_right: Tensor) -> Tensor:
        """Launch d_left of these subnetworks: [K*R, O]."""
        (S, T, O), dy = self.dy.shape, self.dy
        row = common.row_for(project_weighted, dy)
        tiles = row.tiles(ROWS=len(self.left), COLS=O)
        most = common.ceil_div(common.PROGRAMS, max(1, tiles[0] * tiles[1]))
        splits = max(1, min(most, S * T // (4 * row.blocks["BLOCK_D"])))
        out = common.empty((splits, len(self.left), O), dy, None if splits == 1 else common.wide(dy.dtype))
        own = {"out_ptr": out, "x_right_ptr": x_right, "index_ptr": self.x, "INDEXED": not self.x.is_floating_point()}
        own |= {"rows_in": S * T, "rows_split": common.ceil_div(S * T, splits)}
        common.launch(project_weighted, (*tiles, splits), row, dy.device, **own, **self.shared)
        return out[0] if splits == 1 else out.sum(0).to(dy.dtype)

    def d_right(self, dy_left: Tensor) -> Tensor:
        """Compute d_right of these subnetworks: [K*R, I]."""
        if self.x.is_floating_point():
            return dy_left.mT @ self.x.flatten(0, 1)
        return sum_by_key(dy_left, self.x.flatten(), self.right.shape[1]).mT

    def d_dy(self, x_right: Tensor) -> Tensor:
        """Compute the part of d_dy that these subnetworks give: [S, T, O]."""
        if not self.x.is_floating_point():
            x_right = x_right[self.x.flatten()]
        by_sequence = x_right.view(len(self.x), 1, self.dy.shape[1], -1, self.R)
        weights = self.d_out.unflatten(0, (len(self.x), self.share))[:, :, None, :, None]
        return ((by_sequence * weights).flatten(3) @ self.left).flatten(0, 1)


def _zeros(inputs: Sequence[Tensor], needs: list[bool], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Return zeros in the shape of each input that needs a gradient, and nothing for the others."""
    each = zip(inputs, needs, dtypes, strict=True)
    return [t.new_zeros(t.shape if need else 0, dtype=dtype) for t, need, dtype in each]


def _fake_backward(d_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *tensors, needs = inputs
    return tuple(_zeros(tensors, needs, [tensors[1].dtype] * 4))


@common.operator("project_backward", _fake_backward)
def project_backward(
    d_out: Tensor, x: Tensor, dy: Tensor, left: Tensor, right: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of (x, dy, left, right) that `needs` asks for; the others are returned empty."""
    dtypes = (*(common.wide(dy.dtype),) * 2, *(dy.dtype,) * 2)
    d_x, d_dy, d_left, d_right = _zeros((x, dy, left, right), needs, dtypes)
    (S, T, _), (K, R, _) = dy.shape, left.shape
    per_subnetwork = R * T * (S if needs[1] else len(x))
    for own in pieces(K if S * T * R else 0, per_subnetwork, common.WORKSPACE):
        piece = Piece(x, dy, left[own], right[own], d_out.contiguous()[:, own])
        if needs[1] or needs[2]:
            x_right = sequence_products(x, right[own])
            if needs[1]:
                d_dy += piece.d_dy(x_right)
            if needs[2]:
                d_left[own] = piece.d_left(x_right).view_as(d_left[own])
        if needs[0] or needs[3]:
            dy_left = piece.dy_left()
            if needs[0]:
                d_x += (dy_left @ piece.right).view_as(x)
            if needs[3]:
                d_right[own] = piece.d_right(dy_left).unflatten(0, (-1, R))
    return d_x.to(dy.dtype), d_dy.to(dy.dtype), d_left, d_right


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernels are launched on a kind of device."""
    forms = [({"INDEXED": indexed}, indexed) for indexed in (False, True)]
    cases = cases_of_kernel(project_returned, kind) + cases_of_kernel(project_weighted, kind, forms)
    split = cases_of_kernel(project_weighted, kind, forms, out_ptr="*fp32")
    return cases + [case._replace(long=True) for case in split if case.dtype != "fp32"]
