"""Compute the squared norm of every sample's gradient without forming the gradient.

    ‖G_s‖² = Σ_tt' (x[b, t] . x[b, t']) (dy[s, t] . dy[s, t']) = Σ_oi (Σ_t dy[s, t, o] x[b, t, i])²      [S]

    x [B, T, I] or integers [B, T], dy [S, T, O], b = s // (S // B)
    torch.einsum("sti,sto->soi", x.repeat_interleave(S // B, 0), dy).square().sum((1, 2))

From pairs of positions that takes T²(I+O) multiply-adds a sample, from tiles of G T·I·O; the cheaper is taken. One
position needs two sums of squares. Memory traffic bounds the time up to some hundred positions. Parameters of equal T
share a launch of pairs. The gradients, which training never asks for, are library products.

Specification: `l3d_kernels.reference.squared_gradient_norm`.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import add_dot, load, nth, row_products, store, zeros
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch
from l3d_kernels.splitting import pieces


@triton.jit
def norm_pairs(
    parts_ptr,  # [S, tensors * tiles, tiles] wide
    x_ptrs,  # of each parameter [B, T, I]; [B, T] integers where INDEXED
    dy_ptrs,  # [S, T, O]
    T,
    I_of,  # of each parameter
    O_of,
    share_of,  # samples of one sequence
    INDEXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over the pairs of two tiles of a sample's positions; pairs above the diagonal count twice, none below it."""
    sample, tile_b, tiles = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    tensor, tile_a = tl.program_id(1) // tiles, tl.program_id(1) % tiles
    x_ptr, dy_ptr, I, O = nth(x_ptrs, tensor), nth(dy_ptrs, tensor), nth(I_of, tensor), nth(O_of, tensor)
    share = nth(share_of, tensor)
    total = tl.sum(zeros(dy_ptr, BLOCK_T, 1))
    if tile_a <= tile_b:
        offs_a, offs_b = tile_a * BLOCK_T + tl.arange(0, BLOCK_T), tile_b * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_a, mask_b = offs_a < T, offs_b < T
        first, first_x = sample.to(tl.int64) * T, (sample // share).to(tl.int64) * T
        if INDEXED:
            index_a = tl.load(x_ptr + first_x + offs_a, mask=mask_a, other=-1)  # [T]
            index_b = tl.load(x_ptr + first_x + offs_b, mask=mask_b, other=-2)  # [T]
            x_products = (index_a[:, None] == index_b[None, :]).to(total.dtype)
        else:
            rows_a, rows_b = (first_x + offs_a) * I, (first_x + offs_b) * I
            x_products = row_products(x_ptr, rows_a, mask_a, x_ptr, rows_b, mask_b, I, PRECISION, BLOCK_D)
        rows_a, rows_b = (first + offs_a) * O, (first + offs_b) * O
        dy_products = row_products(dy_ptr, rows_a, mask_a, dy_ptr, rows_b, mask_b, O, PRECISION, BLOCK_D)
        total += tl.sum(x_products * dy_products) * tl.where(tile_a < tile_b, 2, 1)
    place = (sample.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * tiles + tile_b
    tl.store(parts_ptr + place, total)


@triton.jit
def norm_outer(
    parts_ptr,  # [S, tiles of O, tiles of I] wide
    x_ptr,  # [B, T, I]
    dy_ptr,  # [S, T, O]
    T,
    I,
    O,
    share,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Form a tile of a sample's gradient and sum its squares."""
    sample, tile_o, tile_i = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_o, offs_i = tile_o * BLOCK_O + tl.arange(0, BLOCK_O), tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    first, first_x = sample.to(tl.int64) * T, (sample // share).to(tl.int64) * T
    grad = zeros(dy_ptr, BLOCK_O, BLOCK_I)
    for start in range(0, T, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        dy = load(dy_ptr + (first + offs_t)[None, :] * O + offs_o[:, None], mask_t[None, :] & (offs_o < O)[:, None])
        x = load(x_ptr + (first_x + offs_t)[:, None] * I + offs_i[None, :], mask_t[:, None] & (offs_i < I)[None, :])
        grad = add_dot(dy, x, grad, PRECISION)  # [O, T], [T, I]
    place = (sample.to(tl.int64) * tl.num_programs(1) + tile_o) * tl.num_programs(2) + tile_i
    tl.store(parts_ptr + place, tl.sum(grad * grad))


@triton.jit
def norm_single(
    out_ptr,  # [S]
    x_ptr,  # [B, I]; not read where INDEXED
    dy_ptr,  # [S, O]
    I,
    O,
    share,
    INDEXED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute ‖x‖² ‖dy‖² of a sample with one position."""
    sample = tl.program_id(0)
    norm = sum_squares(dy_ptr, sample.to(tl.int64) * O, O, BLOCK_D)
    if not INDEXED:
        norm *= sum_squares(x_ptr, (sample // share).to(tl.int64) * I, I, BLOCK_D)
    store(out_ptr + sample + tl.arange(0, 1), norm + tl.sum(zeros(dy_ptr, 1, 1), 1), tl.arange(0, 1) == 0)


@triton.jit
def sum_squares(row_ptr, start, D, BLOCK_D: tl.constexpr):
    """Sum the squares of D elements."""
    acc = tl.sum(zeros(row_ptr, BLOCK_D, 1), 1)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        row = load(row_ptr + start + offs_d, offs_d < D).to(acc.dtype)  # [D]
        acc += row * row
    return tl.sum(acc, 0)


# --- launch -----------------------------------------------------------------------------------------------------

TABLE["norm_pairs"] = {
    ("interpreter", None): Launch({"BLOCK_D": 16}),
    ("sm_80", "32"): Launch({"BLOCK_D": 32}, warps=8, stages=3),
    ("sm_120", "16"): Launch({"BLOCK_D": 128}, warps=8, stages=3),
    ("gfx1100", "16"): Launch({"BLOCK_D": 64}, warps=8, stages=2),
    ("gfx1100", "32"): Launch({"BLOCK_D": 16}, warps=8, stages=2),
    (None, "16"): Launch({"BLOCK_D": 128}, warps=4, stages=3),
    (None, "32"): Launch({"BLOCK_D": 32}, warps=4, stages=3),  # twice as deep spills in triton 3.9
}
TABLE["norm_outer"] = {
    ("interpreter", None): Launch({"BLOCK_O": 16, "BLOCK_I": 16, "BLOCK_T": 16}),
    ("gfx1100", "16"): Launch({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_T": 64}, warps=8, stages=2),
    ("gfx1100", "32"): Launch({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_T": 16}, warps=8, stages=2),
    (None, "16"): Launch({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_T": 64}, warps=4, stages=3),
    (None, "32"): Launch({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_T": 32}, warps=4, stages=3),
}
TABLE["norm_single"] = {("interpreter", None): Launch({"BLOCK_D": 16}), (None, None): Launch({"BLOCK_D": 2048}, 4, 1)}
LARGEST_TILE = 64  # positions


@common.operator("squared_gradient_norm", lambda x, dy: dy[0].new_empty(len(dy[0])))
def norm_forward(x: Sequence[Tensor], dy: Sequence[Tensor]) -> Tensor:
    """Launch for every parameter the kernel that has least to do, that of pairs once for all of one T: [S]."""

    def by_pairs(x: Tensor, dy: Tensor) -> bool:
        (_, T, O), I = dy.shape, x.shape[-1]
        return T > 1 and len(dy) > 0 and (not x.is_floating_point() or I * O >= T * (I + O))

    kinds = [(dy[i].shape[1], x[i].dtype) if by_pairs(x[i], dy[i]) else i for i in range(len(x))]
    norms = []
    for places in common.together(kinds):
        own, first = ([x[i] for i in places], [dy[i] for i in places]), places[0]
        norms.append(_pairs(*own) if by_pairs(x[first], dy[first]) else _alone(x[first], dy[first]))
    return reduce(torch.add, norms)


def _pairs(x: list[Tensor], dy: list[Tensor]) -> Tensor:
    (S, T, _), indexed = dy[0].shape, not x[0].is_floating_point()
    row, block = common.row_for(norm_pairs, dy[0]), min(LARGEST_TILE, common.power_of_two(T, 16))
    tiles = common.ceil_div(T, block)
    sizes: dict[str, Any] = {"T": T, "INDEXED": indexed, "BLOCK_T": block}
    sizes |= {"I_of": tuple(0 if indexed else own.shape[2] for own in x), "O_of": tuple(own.shape[2] for own in dy)}
    sizes |= {"share_of": tuple(S // len(own) for own in x), "x_ptrs": tuple(x), "dy_ptrs": tuple(dy)}
    parts = common.empty((S, len(x) * tiles, tiles), dy[0], common.wide(dy[0].dtype))
    common.launch(norm_pairs, parts.shape, row, parts.device, parts_ptr=parts, **sizes)
    return parts.sum((1, 2)).to(dy[0].dtype)


def _alone(x: Tensor, dy: Tensor) -> Tensor:
    S, T, O = dy.shape
    if S == 0 or T == 0:
        return dy.new_zeros(S)
    indexed = not x.is_floating_point()
    I = 0 if indexed else x.shape[2]
    shared = {"x_ptr": x, "dy_ptr": dy, "I": I, "O": O, "share": S // len(x)}
    if T == 1:
        out, row = common.empty((S,), dy), common.row_for(norm_single, dy)
        common.launch(norm_single, (S,), row, dy.device, out_ptr=out, INDEXED=indexed, **shared)
        return out
    row = common.row_for(norm_outer, dy)
    parts = common.empty((S, *row.tiles(O=O, I=I)), dy, common.wide(dy.dtype))
    common.launch(norm_outer, parts.shape, row, dy.device, parts_ptr=parts, T=T, **shared)
    return parts.sum((1, 2)).to(dy.dtype)


# --- autograd ---------------------------------------------------------------------------------------------------


def _backward(needs: Any, saved: tuple[Tensor, ...], d_out: Tensor) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for i in range(0, len(saved), 2):
        own = needs[i : i + 2]
        found += _gradients(d_out, own, *saved[i : i + 2]) if any(own) else [None, None]
    return found


def _gradients(d_out: Tensor, needs: Any, x: Tensor, dy: Tensor) -> list[Tensor | None]:
    """Compute the gradients by library products: d_dy = 2 g (x xᵀ) dy, d_x = Σ_s 2 g (dy dyᵀ) x."""
    B, T = x.shape[:2]
    share = dy.shape[0] // B if B else 1
    d_x, d_dy = [], []
    for piece in pieces(B, share * T * T):
        part, samples = x[piece], slice(piece.start * share, piece.stop * share)
        own = dy[samples].unflatten(0, (len(part), share))  # [b, P, T, O]
        scaled = 2 * d_out[samples].view(len(part), share, 1, 1) * own
        if needs[1]:
            same = part @ part.mT if x.is_floating_point() else (part[:, :, None] == part[:, None]).to(dy.dtype)
            d_dy.append((same[:, None] @ scaled).flatten(0, 1))
        if needs[0]:
            d_x.append((own @ scaled.mT).sum(1) @ part)
    return [
        (torch.cat(d_x) if d_x else torch.zeros_like(x)) if needs[0] else None,
        (torch.cat(d_dy) if d_dy else torch.zeros_like(dy)) if needs[1] else None,
    ]


_norm = common.differentiable(common.paired(lambda x, dy: norm_forward(x, dy)), _backward)


def squared_gradient_norm(x: Tensor | Sequence[Tensor], dy: Tensor | Sequence[Tensor]) -> Tensor:
    """Run `l3d_kernels.reference.squared_gradient_norm` with Triton kernels."""
    pairs = list(zip(*common.lists(x, dy), strict=True))
    starts = range(0, len(pairs), common.MOST_PAIRS)
    return reduce(torch.add, (_norm(*common.padded(pairs[n : n + common.MOST_PAIRS])) for n in starts))


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernels are launched on a kind of device."""
    pairs = [({"INDEXED": False, "BLOCK_T": block}, False) for block in (16, 64)]
    cases = cases_of_kernel(norm_outer, kind) + cases_of_kernel(norm_pairs, kind, pairs)
    cases += cases_of_kernel(norm_pairs, kind, [({"INDEXED": True, "BLOCK_T": 32}, True)], x_ptr="*i64")
    return cases + cases_of_kernel(norm_single, kind, [({"INDEXED": False}, False)])
