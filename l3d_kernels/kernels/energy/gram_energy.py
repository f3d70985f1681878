"""Compute the squared norm of every sample's reconstruction, over the pairs of subnetworks that are kept together.

    e_i = Σ_{j in s(i)} c_j <V_k(i), V_k(j)>,   ‖ĝ_s‖² = Σ_{i in s} c_i e_i      [S]
    <V_k, V_j> = Σ_rr' (left_kr . left_jr') (right_kr . right_jr'),   left [K, R, O], right [K, R, I]

i and j are kept entries, s(i) and k(i) the sample and the subnetwork of entry i. The rows (i, r) of a sample are
multiplied with each other in tiles, and both products stay in registers. Pairs that are not kept together cost nothing,
and no [K, K] is formed. For tensors that the subnetworks share both sums run over all of them, inside the kernel.

Gradients: d_c_i = 2 g_s e_i; `gram_energy_backward` computes those to left and right.

Specification: `l3d_kernels.reference.gram_energy_coactive`. `gram_energy` takes the full Gram matrix (gram.py) where
that costs less.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.cpu import energy_from_gram
from l3d_kernels.kernels.energy.gram import gram
from l3d_kernels.kernels.energy.gram_energy_backward import energy_backward, rows_of
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import load, nth, row_products, zeros
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch
from l3d_kernels.sparse import SparseCoefficients


@triton.jit
def coactive_energy(
    parts_ptr,  # [S, splits] wide: each split's part of ‖ĝ_s‖²
    sums_ptr,  # [N*R] wide: Σ_q c_q (left_p . left_q) (right_p . right_q) of every row p = (i, r)
    values_ptr,  # [N]
    columns_ptr,  # [N] int64
    row_offsets_ptr,  # [S+1] int64
    left_ptrs,  # of each tensor [K, R, O]
    right_ptrs,  # of each tensor [K, R, I]
    N,
    R,
    O_of,  # of each tensor
    I_of,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Multiply a sample's rows with each other; of n splits, each takes every n-th tile of rows."""
    sample, split = tl.program_id(0), tl.program_id(1)
    first = tl.load(row_offsets_ptr + sample)
    n_rows = ((tl.load(row_offsets_ptr + sample + 1) - first) * R).to(tl.int32)
    energy = tl.sum(zeros(left_ptrs[0], BLOCK_P, 1), 1)
    for start_p in range(split * BLOCK_P, n_rows, tl.num_programs(1) * BLOCK_P):
        entry_p, rows_p, mask_p = rows_of(columns_ptr, first, start_p + tl.arange(0, BLOCK_P), n_rows, R)
        total = tl.sum(zeros(left_ptrs[0], BLOCK_P, 1), 1)
        for start_q in range(0, n_rows, BLOCK_Q):
            entry_q, rows_q, mask_q = rows_of(columns_ptr, first, start_q + tl.arange(0, BLOCK_Q), n_rows, R)
            weight = load(values_ptr + entry_q, mask_q).to(total.dtype)  # [Q]
            for tensor in range(len(left_ptrs)):
                left, O, right, I = (
                    nth(left_ptrs, tensor),
                    nth(O_of, tensor),
                    nth(right_ptrs, tensor),
                    nth(I_of, tensor),
                )
                lefts = row_products(left, rows_p * O, mask_p, left, rows_q * O, mask_q, O, PRECISION, BLOCK_D)
                rights = row_products(right, rows_p * I, mask_p, right, rows_q * I, mask_q, I, PRECISION, BLOCK_D)
                total += tl.sum(lefts * rights * weight[None, :], 1)
        places = first * R + start_p + tl.arange(0, BLOCK_P)
        tl.store(sums_ptr + places, total, mask=mask_p & (places < tl.cast(N, tl.int64) * R))
        energy += total * load(values_ptr + entry_p, mask_p).to(total.dtype)
    tl.store(parts_ptr + sample.to(tl.int64) * tl.num_programs(1) + split, tl.sum(energy, 0))


# --- launch -----------------------------------------------------------------------------------------------------

TABLE["coactive_energy"] = {
    ("interpreter", None): Launch({"BLOCK_P": 16, "BLOCK_Q": 16, "BLOCK_D": 16}),
    ("sm_80", "32"): Launch({"BLOCK_P": 64, "BLOCK_Q": 32, "BLOCK_D": 32}, warps=8, stages=3),
    ("gfx1100", "32"): Launch({"BLOCK_P": 64, "BLOCK_Q": 64, "BLOCK_D": 16}, warps=8, stages=2),
    (None, "16"): Launch({"BLOCK_P": 64, "BLOCK_Q": 64, "BLOCK_D": 64}, warps=8, stages=3),
    (None, "32"): Launch({"BLOCK_P": 64, "BLOCK_Q": 64, "BLOCK_D": 32}, warps=8, stages=3),
}


Tensors = Sequence[Tensor]


def _fake_energy(values: Tensor, columns: Tensor, row_offsets: Tensor, left: Tensors, right: Tensors) -> Any:
    rows = values.numel() * left[0].shape[1]
    return left[0].new_empty(len(row_offsets) - 1), left[0].new_empty(rows, dtype=common.wide(left[0].dtype))


@common.operator("gram_energy_coactive", _fake_energy)
def energy_forward(
    values: Tensor, columns: Tensor, row_offsets: Tensor, left: Sequence[Tensor], right: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel for tensors of one K and R: (energy [S], sums of every row [N*R])."""
    R = left[0].shape[1]
    n_samples, n_rows = len(row_offsets) - 1, values.numel() * R
    row = common.row_for(coactive_energy, left[0])
    sums = common.empty((n_rows,), left[0], common.wide(left[0].dtype))
    (splits,) = row.tiles(P=max(1, common.ceil_div(n_rows, max(1, n_samples))))  # the tiles of an average sample
    parts = common.empty((n_samples, splits), sums)
    pointers: dict[str, Any] = {"parts_ptr": parts, "sums_ptr": sums, "values_ptr": values, "columns_ptr": columns}
    pointers |= {"row_offsets_ptr": row_offsets, "left_ptrs": tuple(left), "right_ptrs": tuple(right)}
    sizes: dict[str, Any] = {"N": values.numel(), "R": R}
    sizes |= {"O_of": tuple(each.shape[2] for each in left), "I_of": tuple(each.shape[2] for each in right)}
    common.launch(coactive_energy, (n_samples, splits), row, values.device, **pointers, **sizes)
    return parts.sum(1).to(left[0].dtype), sums


# --- autograd ---------------------------------------------------------------------------------------------------


def _forward(
    values: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_offsets: Tensor,
    column_order: Tensor,
    column_offsets: Tensor,
    left0: Tensor,
    right0: Tensor,
    left1: Tensor | None,
    right1: Tensor | None,
    left2: Tensor | None,
    right2: Tensor | None,
    left3: Tensor | None,
    right3: Tensor | None,
) -> Any:
    forward = common.paired(lambda left, right: energy_forward(values, columns, row_offsets, left, right))
    return forward(left0, right0, left1, right1, left2, right2, left3, right3)


def _backward(needs: Any, saved: tuple[Tensor, ...], d_out: Tensor) -> list[Tensor | None]:
    sums, values, *order = saved[:7]
    sides = saved[7:]
    found: list[Tensor | None] = [None] * len(needs)
    if needs[0]:
        found[0] = (2 * d_out[order[0]] * sums.view(len(values), sides[0].shape[1]).sum(1)).to(values.dtype)
    wanted = [i for i in range(len(sides)) if needs[6 + i]]
    if wanted:
        own, others = [sides[i] for i in wanted], [sides[i ^ 1] for i in wanted]
        grads = energy_backward(d_out, values, *order, own, others)
        for i, grad in zip(wanted, grads, strict=True):
            found[6 + i] = grad
    return found


_coactive = common.differentiable(_forward, _backward, lambda inputs, output: (output[1], *inputs))


def gram_energy_coactive(kept: SparseCoefficients, left: Tensor | Tensors, right: Tensor | Tensors) -> Tensor:
    """Run `l3d_kernels.reference.gram_energy_coactive` with Triton kernels."""
    lefts, rights = common.lists(left, right)
    packed, energies = common.contiguous(kept.values, *kept.indices()), []
    for own in common.together((each.shape[1] for each in lefts), common.MOST_PAIRS):
        energies.append(_coactive(*packed, *common.padded((lefts[i], rights[i]) for i in own))[0])
    return reduce(torch.add, energies)


def gram_energy(kept: SparseCoefficients, left: Tensor, right: Tensor) -> Tensor:
    """Run `l3d_kernels.reference.gram_energy` with Triton kernels.

    N kept entries in S samples make at least N²/S co-active pairs. Where that is K²/2 or more, the full Gram matrix is
    taken; so the choice needs no number from the device.
    """
    n_samples, n_subnetworks = kept.shape
    if 2 * kept.rows.numel() ** 2 < n_subnetworks**2 * n_samples or n_samples == 0:
        return gram_energy_coactive(kept, left, right)
    return energy_from_gram(kept, gram(left, right))


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernel is launched on a kind of device."""
    return cases_of_kernel(coactive_energy, kind)
