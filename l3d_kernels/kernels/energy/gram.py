"""Compute the Gram matrix: the inner products of all directions with each other.

    M[k, j] = <V_k, V_j> = Σ_rr' (left_kr . left_jr') (right_kr . right_jr')      [K, K]

    left [K, R, O], right [K, R, I]
    (left.flatten(0, 1) @ left.flatten(0, 1).T * (right.flatten(0, 1) @ right.flatten(0, 1).T)), summed over r and r'

A tile holds as many ranks of as many subnetworks as fit, with ranks padded to a power of two. Both products stay in
registers, are multiplied there and summed over ranks; entries below the diagonal are copied from those above it. No
array [K*R, K*R] is formed; the backward pass forms at most CHUNK elements of such at a time. For tensors that the
subnetworks share the sum over them is taken inside the kernel. Specification: `l3d_kernels.reference.gram`.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, Forms, cases_of_kernel
from l3d_kernels.kernels.shared.device import nth, row_products, store, sum_groups, zeros
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch
from l3d_kernels.splitting import pieces

CHUNK = 1 << 26  # elements of the rows' products that the backward pass forms at a time


@triton.jit
def gram_tile(
    out_ptr,  # [K, K]
    left_ptrs,  # of each tensor [K, R, O]
    right_ptrs,  # of each tensor [K, R, I]
    K,
    R,
    O_of,  # of each tensor
    I_of,
    PRECISION: tl.constexpr,
    RANKS: tl.constexpr,  # of one subnetwork in a tile, a power of two
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the inner products of two groups of subnetworks on or above the diagonal; store the mirror image too."""
    GROUPS_A: tl.constexpr = BLOCK_A // RANKS
    GROUPS_B: tl.constexpr = BLOCK_B // RANKS
    first_a, first_b = tl.program_id(0) * GROUPS_A, tl.program_id(1) * GROUPS_B
    if first_a < first_b + GROUPS_B:
        slot_a, slot_b = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_B)
        total = zeros(left_ptrs[0], GROUPS_A, GROUPS_B)
        for n in range(len(left_ptrs)):
            left, O, right, I = nth(left_ptrs, n), nth(O_of, n), nth(right_ptrs, n), nth(I_of, n)
            for start_a in range(0, R, RANKS):
                rows_a, mask_a = rows_of(first_a, slot_a, start_a, K, R, RANKS)
                for start_b in range(0, R, RANKS):
                    rows_b, mask_b = rows_of(first_b, slot_b, start_b, K, R, RANKS)
                    lefts = row_products(left, rows_a * O, mask_a, left, rows_b * O, mask_b, O, PRECISION, BLOCK_D)
                    rights = row_products(right, rows_a * I, mask_a, right, rows_b * I, mask_b, I, PRECISION, BLOCK_D)
                    total += sum_groups(lefts * rights, RANKS, RANKS)
        own_a, own_b = tl.arange(0, GROUPS_A)[:, None], tl.arange(0, GROUPS_B)[None, :]
        offs_a, offs_b = first_a + own_a, first_b + own_b
        mask = (offs_b < K) & (offs_a <= offs_b)
        # One int64 address for the tile; offsets within it fit int32, which takes half the registers.
        upper, lower = out_ptr + first_a.to(tl.int64) * K, out_ptr + first_b.to(tl.int64) * K
        store(upper + (own_a * K + offs_b), total, mask)
        store(lower + (own_b * K + offs_a), total, mask & (offs_a < offs_b))


@triton.jit
def rows_of(first, slot, start, K, R, RANKS: tl.constexpr):
    """Return the rows of the factors [K*R, ...] for the slots of a tile, and their mask."""
    column, rank = first + slot // RANKS, start + slot % RANKS
    return column.to(tl.int64) * R + rank, (column < K) & (rank < R)


# --- launch -----------------------------------------------------------------------------------------------------

TABLE["gram_tile"] = {
    ("interpreter", None): Launch({"BLOCK_A": 32, "BLOCK_B": 16, "BLOCK_D": 16}),
    ("sm_80", "32"): Launch({"BLOCK_A": 64, "BLOCK_B": 32, "BLOCK_D": 32}, warps=8, stages=3),
    ("sm_80", "16"): Launch({"BLOCK_A": 128, "BLOCK_B": 64, "BLOCK_D": 32}, warps=8, stages=4),
    ("sm_90", "32"): Launch({"BLOCK_A": 128, "BLOCK_B": 64, "BLOCK_D": 16}, warps=8, stages=4),
    ("gfx942", "16"): Launch({"BLOCK_A": 128, "BLOCK_B": 64, "BLOCK_D": 32}, warps=8, stages=2),
    ("gfx1100", "16"): Launch({"BLOCK_A": 64, "BLOCK_B": 64, "BLOCK_D": 32}, warps=16, stages=2),
    ("gfx1100", "32"): Launch({"BLOCK_A": 128, "BLOCK_B": 64, "BLOCK_D": 16}, warps=16, stages=2),
    (None, "16"): Launch({"BLOCK_A": 128, "BLOCK_B": 64, "BLOCK_D": 64}, warps=8, stages=3),
    (None, "32"): Launch({"BLOCK_A": 128, "BLOCK_B": 64, "BLOCK_D": 32}, warps=8, stages=3),
}


@common.operator("gram", lambda left, right: left[0].new_empty(len(left[0]), len(left[0])))
def gram_forward(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Launch the forward kernel for tensors of one K and R: [K, K]."""
    K, R, _ = left[0].shape
    row = common.row_for(gram_tile, left[0])
    ranks = min(row.blocks["BLOCK_A"], row.blocks["BLOCK_B"], common.power_of_two(R))
    out, tiles = common.empty((K, K), left[0]), row.tiles(A=K * ranks, B=K * ranks)
    sizes: dict[str, Any] = {"K": K, "R": R, "RANKS": ranks, "left_ptrs": tuple(left), "right_ptrs": tuple(right)}
    sizes |= {"O_of": tuple(each.shape[2] for each in left), "I_of": tuple(each.shape[2] for each in right)}
    common.launch(gram_tile, tiles, row, out.device, out_ptr=out, **sizes)
    return out


def side_gradients(both: Tensor, sides: list[Tensor], others: list[Tensor]) -> Sequence[Tensor]:
    """Compute the gradients to sides of one shape from library products, some rows at a time: in the sides' shape.

    Σ_jr' both[k, j] (other_kr . other_jr') side_jr', with both = d_out + d_outᵀ [K, K].
    """
    (K, R, _), n = sides[0].shape, len(sides)
    if not (sides[0].numel() and others[0].numel()):
        return [torch.zeros_like(side) for side in sides]
    side, other = (own[0] if n == 1 else torch.stack(own) for own in (sides, others))  # [.., K, R, A]
    out = []
    for piece in pieces(K, n * K * R * R, CHUNK):
        products = other[..., piece, :, :].flatten(-3, -2) @ other.flatten(-3, -2).mT
        products = products.unflatten(-1, (K, R)).unflatten(-3, (-1, R)) * both[piece, None, :, None]
        out.append((products.flatten(-2).flatten(-3, -2) @ side.flatten(-3, -2)).unflatten(-2, (-1, R)))
    grad = out[0] if len(out) == 1 else torch.cat(out, -3)
    return [grad] if n == 1 else grad.unbind()


# --- autograd ---------------------------------------------------------------------------------------------------


def _backward(needs: Any, saved: tuple[Tensor, ...], d_out: Tensor) -> list[Tensor | None]:
    both, found = d_out + d_out.mT, list[Tensor | None]([None] * len(saved))
    wanted = [i for i, need in enumerate(needs) if need]
    for places in common.together(((saved[i].shape, saved[i ^ 1].shape) for i in wanted), len(saved)):
        own = [wanted[place] for place in places]
        grads = side_gradients(both, [saved[i] for i in own], [saved[i ^ 1] for i in own])
        for i, grad in zip(own, grads, strict=True):
            found[i] = grad
    return found


_gram = common.differentiable(common.paired(lambda left, right: gram_forward(left, right)), _backward)


def gram(left: Tensor | Sequence[Tensor], right: Tensor | Sequence[Tensor]) -> Tensor:
    """Run `l3d_kernels.reference.gram` with Triton kernels."""
    lefts, rights = common.lists(left, right)
    by_rank = common.together((each.shape[1] for each in lefts), common.MOST_PAIRS)
    return reduce(torch.add, (_gram(*common.padded((lefts[i], rights[i]) for i in own)) for own in by_rank))


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernel is launched on a kind of device."""

    def forms(row: Launch, _: int) -> Forms:
        widest = min(row.blocks["BLOCK_A"], row.blocks["BLOCK_B"])
        return [({"RANKS": ranks}, ranks == 1) for ranks in (1, 8, widest)]

    return cases_of_kernel(gram_tile, kind, forms)
