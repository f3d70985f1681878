"""Take a step of Adam in place, and leave each slice's Gram matrix of the new parameters.

    m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   p ← p − lr · scale · m̂ / (v̂^½ + eps)        [K, R, D] each
    m̂ = m / (1 − β₁^c),   v̂ = v / (1 − β₂^c),   c the steps of the slice k;   gram_k = p_k p_kᵀ      [K, R, R]

A program owns a share of one slice. It reads gradient, parameter and both moments once and writes the last three: seven
numbers for each parameter. Nothing of a slice that rests is read or written, but for its Gram matrix, which is zero.
Sums have one order, so that two runs give the same bits. Specification: `l3d_kernels.reference.adam_step`.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import add_dot, feed, load, store, zeros
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch
from l3d_kernels.splitting import as_rows

MOST_RANKS = 64  # of a slice whose Gram matrix fits into registers; beyond, it is a library product
LEAST_SHARE = 1 << 14  # elements of a slice that are worth a program of their own


@triton.jit
def step_tile(parameter_ptr, first_ptr, second_ptr, grad_ptr, places, mask, rate, floor, weight1, weight2):
    """Update a tile of parameters and moments in place; return the new parameters, zeros where `mask` is false."""
    grad = load(grad_ptr + places, mask).to(rate.dtype)
    first = load(first_ptr + places, mask).to(rate.dtype) * (1 - weight1) + grad * weight1
    second = load(second_ptr + places, mask).to(rate.dtype) * (1 - weight2) + grad * grad * weight2
    parameter = load(parameter_ptr + places, mask).to(rate.dtype) - first / (tl.sqrt(second) + floor) * rate
    store(first_ptr + places, first, mask)
    store(second_ptr + places, second, mask)
    store(parameter_ptr + places, parameter, mask)
    return tl.where(mask, parameter, 0)


@triton.jit
def adam_slices(
    parameter_ptr,  # [K, N], written
    first_ptr,  # [K, N], written
    second_ptr,  # [K, N], written
    grad_ptr,  # [K, N]
    scale_ptr,  # [K] wide, or [1] with a stride of 0
    moves_ptr,  # [K] wide
    correction_ptr,  # [K] wide: (1 − β₂^c)^½
    size_ptr,  # [K] wide: the correction over 1 − β₁^c
    N,
    tiles,
    stride_scale,
    lr,
    weight1,  # 1 − β₁
    weight2,
    eps,
    BLOCK: tl.constexpr,
):
    """Update a tile of one slice, without a Gram matrix."""
    k, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if tl.load(moves_ptr + k) != 0:
        rate = tl.load(scale_ptr + k * stride_scale) * tl.load(size_ptr + k) * lr
        offs_n = tile * BLOCK + tl.arange(0, BLOCK)
        places = k.to(tl.int64) * N + offs_n
        floor = tl.load(correction_ptr + k) * eps
        step_tile(parameter_ptr, first_ptr, second_ptr, grad_ptr, places, offs_n < N, rate, floor, weight1, weight2)


@triton.jit
def adam_gram(
    parameter_ptr,  # [K, R, D], written
    first_ptr,  # [K, R, D], written
    second_ptr,  # [K, R, D], written
    gram_ptr,  # [K, splits, R, R] wide: each split's part
    grad_ptr,  # [K, R, D]
    scale_ptr,  # [K] wide, or [1] with a stride of 0
    moves_ptr,  # [K] wide
    correction_ptr,  # [K] wide
    size_ptr,  # [K] wide
    R,
    D,
    share,  # of D, for each split
    stride_scale,
    lr,
    weight1,
    weight2,
    eps,
    PRECISION: tl.constexpr,
    RANKS: tl.constexpr,  # R padded to a power of two
    BLOCK: tl.constexpr,
):
    """Update a share of one slice, and sum the products of its rows."""
    BLOCK_D: tl.constexpr = BLOCK // RANKS if BLOCK > 16 * RANKS else 16
    k, split = tl.program_id(0), tl.program_id(1)
    offs_r = tl.arange(0, RANKS)
    mask_r = offs_r < R
    gram = zeros(parameter_ptr, RANKS, RANKS)
    if tl.load(moves_ptr + k) != 0:
        rate = tl.load(scale_ptr + k * stride_scale) * tl.load(size_ptr + k) * lr
        floor = tl.load(correction_ptr + k) * eps
        rows = (k.to(tl.int64) * R + offs_r) * D
        for start in range(split * share, tl.minimum(D, split * share + share), BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            mask = mask_r[:, None] & (offs_d < D)[None, :]
            places = rows[:, None] + offs_d[None, :]
            tile = step_tile(
                parameter_ptr, first_ptr, second_ptr, grad_ptr, places, mask, rate, floor, weight1, weight2
            )  # [R, D]
            tile = feed(tile, parameter_ptr)
            gram = add_dot(tile, tl.trans(tile), gram, PRECISION)
    own = (k.to(tl.int64) * tl.num_programs(1) + split) * R * R
    store(gram_ptr + own + offs_r[:, None] * R + offs_r[None, :], gram, mask_r[:, None] & mask_r[None, :])


# --- launch -----------------------------------------------------------------------------------------------------

TABLE["adam_slices"] = {("interpreter", None): Launch({"BLOCK": 32}), (None, None): Launch({"BLOCK": 1024})}
TABLE["adam_gram"] = {
    ("interpreter", None): Launch({"BLOCK": 256}),
    (None, None): Launch({"BLOCK": 1024}, stages=1),
}


def _fake(parameters: Sequence[Tensor], grams: int) -> list[Tensor]:
    sizes = [as_rows(p).shape[:2] for p in parameters[:grams]]
    return [p.new_empty(K, R, R, dtype=common.wide(p.dtype)) for (K, R), p in zip(sizes, parameters, strict=False)]


@common.operator("adam_step", lambda *args: _fake(args[0], args[-1]), mutates=("parameters", "first", "second"))
def step_all(
    parameters: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    grads: Sequence[Tensor],
    scales: Sequence[Tensor],
    moves: Tensor,
    correction: Tensor,
    size: Tensor,
    lr: float,
    weight1: float,
    weight2: float,
    eps: float,
    grams: int,
) -> list[Tensor]:
    """Launch a kernel for each tensor; return the Gram matrices [K, R, R] of the first ones."""
    found = []
    vectors = {"moves_ptr": moves, "correction_ptr": correction, "size_ptr": size}
    numbers = {"lr": lr, "weight1": weight1, "weight2": weight2, "eps": eps}
    for i, (parameter, m, v, grad, scale) in enumerate(zip(parameters, first, second, grads, scales, strict=True)):
        pointers = {"parameter_ptr": parameter, "first_ptr": m, "second_ptr": v, "grad_ptr": grad}
        own = {**pointers, **vectors, **numbers, "scale_ptr": scale, "stride_scale": int(scale.numel() > 1)}
        K, R, D = as_rows(parameter).shape
        if i < grams and R <= MOST_RANKS:
            found.append(_launch_with_gram(parameter, own))
            continue
        row = common.row_for(adam_slices, parameter)
        tiles = common.ceil_div(R * D, row.blocks["BLOCK"])
        common.launch(adam_slices, (K * tiles,), row, parameter.device, N=R * D, tiles=tiles, **own)
        if i < grams:
            rows = as_rows(parameter).to(common.wide(parameter.dtype))
            found.append(rows @ rows.mT)
    return found


def _launch_with_gram(parameter: Tensor, arguments: dict[str, Any]) -> Tensor:
    K, R, D = as_rows(parameter).shape
    ranks = common.power_of_two(R, 16)
    row = common.row_for(adam_gram, parameter)
    block = max(16, row.blocks["BLOCK"] // ranks)
    most = max(1, R * D // LEAST_SHARE)  # a few large slices are shared among programs
    splits = min(most, common.ceil_div(common.PROGRAMS, max(1, K)))
    share = common.ceil_div(common.ceil_div(max(1, D), splits), block) * block
    splits = common.ceil_div(max(1, D), share)
    parts = common.empty((K, splits, R, R), parameter, common.wide(parameter.dtype))
    sizes = {"R": R, "D": D, "share": share, "RANKS": ranks}
    common.launch(adam_gram, (K, splits), row, parameter.device, gram_ptr=parts, **arguments, **sizes)
    return parts.sum(1) if splits > 1 else parts[:, 0]


def adam_step(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    scales: Sequence[Tensor],
    counts: Tensor,
    moves: Tensor,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    grams: int = 0,
) -> list[Tensor]:
    """Run `l3d_kernels.reference.adam_step` with Triton kernels."""
    correction = (1 - betas[1] ** counts).sqrt_()
    size = correction / (1 - betas[0] ** counts)  # of slices that never moved NaN, which nothing reads
    packed = [grad.contiguous() for grad in grads]
    numbers = (float(lr), 1 - betas[0], 1 - betas[1], float(eps))
    found: list[Tensor] = step_all(
        list(parameters), list(first), list(second), packed, list(scales), moves, correction, size, *numbers, grams
    )
    return found


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernels are launched on a kind of device."""
    ranks = [({"RANKS": ranks}, ranks == 32) for ranks in (16, 32, MOST_RANKS)]
    return cases_of_kernel(adam_slices, kind) + cases_of_kernel(adam_gram, kind, ranks)
