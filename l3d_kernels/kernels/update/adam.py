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
from l3d_kernels.kernels.shared.device import add_dot, chosen, feed, load, store, zeros
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
    parameter_ptrs,  # of each tensor [K, N], written
    first_ptrs,  # [K, N], written
    second_ptrs,  # [K, N], written
    grad_ptrs,  # [K, N]
    scale_ptrs,  # [K] wide, or [1] with a stride of 0
    moves_ptr,  # [K] wide
    correction_ptr,  # [K] wide: (1 − β₂^c)^½
    size_ptr,  # [K] wide: the correction over 1 − β₁^c
    N_of,  # of each tensor
    stride_of,  # of its scale
    start_of,  # the tiles of a slice in the tensors before it
    tiles,  # of a slice in all tensors
    numbers,  # lr, 1 − β₁, 1 − β₂, eps
    BLOCK: tl.constexpr,
):
    """Update a tile of one slice of one tensor, without a Gram matrix."""
    k, place = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if tl.load(moves_ptr + k) != 0:
        parameter_ptr, grad_ptr = chosen(parameter_ptrs, start_of, place), chosen(grad_ptrs, start_of, place)
        first_ptr, second_ptr = chosen(first_ptrs, start_of, place), chosen(second_ptrs, start_of, place)
        scale_ptr, stride_scale = chosen(scale_ptrs, start_of, place), chosen(stride_of, start_of, place)
        N, tile = chosen(N_of, start_of, place), place - chosen(start_of, start_of, place)
        lr, weight1, weight2, eps = numbers
        rate = tl.load(scale_ptr + k * stride_scale) * tl.load(size_ptr + k) * lr
        offs_n = tile * BLOCK + tl.arange(0, BLOCK)
        places = k.to(tl.int64) * N + offs_n
        floor = tl.load(correction_ptr + k) * eps
        step_tile(parameter_ptr, first_ptr, second_ptr, grad_ptr, places, offs_n < N, rate, floor, weight1, weight2)


@triton.jit
def adam_gram(
    parameter_ptrs,  # of each tensor [K, R, D], written
    first_ptrs,  # [K, R, D], written
    second_ptrs,  # [K, R, D], written
    gram_ptrs,  # [K, splits, R, R] wide: each split's part
    grad_ptrs,  # [K, R, D]
    scale_ptrs,  # [K] wide, or [1] with a stride of 0
    moves_ptr,  # [K] wide
    correction_ptr,  # [K] wide
    size_ptr,  # [K] wide
    R_of,  # of each tensor
    D_of,
    share_of,  # of D, for each split
    splits_of,
    stride_of,  # of its scale
    start_of,  # the splits of the tensors before it
    numbers,  # lr, 1 − β₁, 1 − β₂, eps
    PRECISION: tl.constexpr,
    RANKS: tl.constexpr,  # R padded to a power of two
    BLOCK: tl.constexpr,
):
    """Update a share of one slice of one tensor, and sum the products of its rows."""
    BLOCK_D: tl.constexpr = BLOCK // RANKS if BLOCK > 16 * RANKS else 16
    k, place = tl.program_id(0), tl.program_id(1)
    parameter_ptr, gram_ptr = chosen(parameter_ptrs, start_of, place), chosen(gram_ptrs, start_of, place)
    R, split = chosen(R_of, start_of, place), place - chosen(start_of, start_of, place)
    offs_r = tl.arange(0, RANKS)
    mask_r = offs_r < R
    gram = zeros(parameter_ptr, RANKS, RANKS)
    if tl.load(moves_ptr + k) != 0:
        first_ptr, second_ptr = chosen(first_ptrs, start_of, place), chosen(second_ptrs, start_of, place)
        scale_ptr, stride_scale = chosen(scale_ptrs, start_of, place), chosen(stride_of, start_of, place)
        grad_ptr, D = chosen(grad_ptrs, start_of, place), chosen(D_of, start_of, place)
        share = chosen(share_of, start_of, place)
        lr, weight1, weight2, eps = numbers
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
    own = (k.to(tl.int64) * chosen(splits_of, start_of, place) + split) * R * R
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
    """Launch a kernel for tensors of a kind together; return the Gram matrices [K, R, R] of the first ones."""
    found: dict[int, Tensor] = {}
    rows = [as_rows(parameter) for parameter in parameters]
    ranks = [common.power_of_two(p.shape[1], 16) if i < grams else 0 for i, p in enumerate(rows)]
    lists: dict[str, Sequence[Tensor]]
    lists = {"parameter_ptrs": parameters, "first_ptrs": first, "second_ptrs": second, "grad_ptrs": grads}
    lists["scale_ptrs"] = scales
    vectors = {"moves_ptr": moves, "correction_ptr": correction, "size_ptr": size}
    shared: dict[str, Any] = {**vectors, "numbers": (lr, weight1, weight2, eps)}
    kinds = [(r if r <= MOST_RANKS else 0, *(own[i].dtype for own in lists.values())) for i, r in enumerate(ranks)]
    for places in common.together(kinds):
        own: dict[str, Any] = {name: tuple(tensors[i] for i in places) for name, tensors in lists.items()}
        own["stride_of"] = tuple(int(scale.numel() > 1) for scale in own["scale_ptrs"])
        if kinds[places[0]][0]:
            found |= zip(places, _launch_with_gram(ranks[places[0]], own | shared), strict=True)
            continue
        row = common.row_for(adam_slices, parameters[places[0]])
        sizes = tuple(rows[i].shape[1:].numel() for i in places)
        start_of, tiles = common.starts(common.ceil_div(N, row.blocks["BLOCK"]) for N in sizes)
        place = {"N_of": sizes, "start_of": start_of, "tiles": tiles}
        common.launch(adam_slices, (len(moves) * tiles,), row, moves.device, **place, **own, **shared)
    for i in set(range(grams)) - set(found):
        wide = rows[i].to(common.wide(rows[i].dtype))
        found[i] = wide @ wide.mT
    return [found[i] for i in range(grams)]


def _launch_with_gram(ranks: int, arguments: dict[str, Any]) -> list[Tensor]:
    parameters = arguments["parameter_ptrs"]
    row = common.row_for(adam_gram, parameters[0])
    block, parts, shares = max(16, row.blocks["BLOCK"] // ranks), [], []
    for parameter in parameters:
        K, R, D = as_rows(parameter).shape
        most = max(1, R * D // LEAST_SHARE)  # a few large slices are shared among programs
        splits = min(most, common.ceil_div(common.PROGRAMS, max(1, K)))
        shares.append(common.ceil_div(common.ceil_div(max(1, D), splits), block) * block)
        splits = common.ceil_div(max(1, D), shares[-1])
        parts.append(common.empty((K, splits, R, R), parameter, common.wide(parameter.dtype)))
    start_of, programs = common.starts(part.shape[1] for part in parts)
    sizes = {
        "R_of": tuple(part.shape[2] for part in parts),
        "D_of": tuple(as_rows(parameter).shape[2] for parameter in parameters),
        "share_of": tuple(shares),
        "splits_of": tuple(part.shape[1] for part in parts),
    }
    arguments = arguments | sizes | {"gram_ptrs": tuple(parts), "start_of": start_of, "RANKS": ranks}
    common.launch(adam_gram, (len(parts[0]), programs), row, parts[0].device, **arguments)
    return [part.sum(1) if part.shape[1] > 1 else part[:, 0] for part in parts]


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
