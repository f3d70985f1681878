"""Compute the squared norm of every sample's reconstruction, over the pairs of subnetworks that are kept together.

    e_i = Σ_{j in s(i)} c_j <V_k(i), V_k(j)>,   ‖ĝ_s‖² = Σ_{i in s} c_i e_i      [S]
    <V_k, V_j> = Σ_rr' (left_kr . left_jr') (right_kr . right_jr'),   left [K, R, O], right [K, R, I]

i and j are kept entries, s(i) and k(i) the sample and the subnetwork of entry i. The rows (i, r) of a sample are
multiplied with each other in tiles, and both products stay in registers. Pairs that are not kept together cost nothing,
and no [K, K] is formed.

Gradients: d_c_i = 2 g_s e_i; `gram_energy_backward` computes those to left and right.

Specification: `l3d_kernels.reference.gram_energy_coactive`. `gram_energy` takes the full Gram matrix (gram.py) where
that costs less.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.cpu import energy_from_gram
from l3d_kernels.kernels.energy.gram import gram
from l3d_kernels.kernels.energy.gram_energy_backward import energy_backward, rows_of
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import load, row_products, zeros
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch
from l3d_kernels.sparse import SparseCoefficients


@triton.jit
def coactive_energy(
    parts_ptr,  # [S, splits] wide: each split's part of ‖ĝ_s‖²
    sums_ptr,  # [N*R] wide: Σ_q c_q (left_p . left_q) (right_p . right_q) of every row p = (i, r)
    values_ptr,  # [N]
    columns_ptr,  # [N] int64
    row_offsets_ptr,  # [S+1] int64
    left_ptr,  # [K, R, O]
    right_ptr,  # [K, R, I]
    N,
    O,
    I,
    R,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Multiply a sample's rows with each other; of n splits, each takes every n-th tile of rows."""
    sample, split = tl.program_id(0), tl.program_id(1)
    first = tl.load(row_offsets_ptr + sample)
    n_rows = ((tl.load(row_offsets_ptr + sample + 1) - first) * R).to(tl.int32)
    energy = tl.sum(zeros(left_ptr, BLOCK_P, 1), 1)
    for start_p in range(split * BLOCK_P, n_rows, tl.num_programs(1) * BLOCK_P):
        entry_p, rows_p, mask_p = rows_of(columns_ptr, first, start_p + tl.arange(0, BLOCK_P), n_rows, R)
        total = tl.sum(zeros(left_ptr, BLOCK_P, 1), 1)
        for start_q in range(0, n_rows, BLOCK_Q):
            entry_q, rows_q, mask_q = rows_of(columns_ptr, first, start_q + tl.arange(0, BLOCK_Q), n_rows, R)
            lefts = row_products(left_ptr, rows_p * O, mask_p, left_ptr, rows_q * O, mask_q, O, PRECISION, BLOCK_D)
            rights = row_products(right_ptr, rows_p * I, mask_p, right_ptr, rows_q * I, mask_q, I, PRECISION, BLOCK_D)
            weight = load(values_ptr + entry_q, mask_q).to(lefts.dtype)  # [Q]
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


def _fake_energy(values: Tensor, columns: Tensor, row_offsets: Tensor, left: Tensor, right: Tensor) -> Any:
    rows = values.numel() * left.shape[1]
    return left.new_empty(len(row_offsets) - 1), left.new_empty(rows, dtype=common.wide(left.dtype))


@common.operator("gram_energy_coactive", _fake_energy)
def energy_forward(
    values: Tensor, columns: Tensor, row_offsets: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: (energy [S], sums of every row [N*R])."""
    n_samples, n_rows = len(row_offsets) - 1, values.numel() * left.shape[1]
    row = common.row_for(coactive_energy, left)
    sums = common.empty((n_rows,), left, common.wide(left.dtype))
    (splits,) = row.tiles(P=max(1, common.ceil_div(n_rows, max(1, n_samples))))  # the tiles of an average sample
    parts = common.empty((n_samples, splits), sums)
    pointers = {"parts_ptr": parts, "sums_ptr": sums, "values_ptr": values, "columns_ptr": columns}
    pointers |= {"row_offsets_ptr": row_offsets, "left_ptr": left, "right_ptr": right}
    sizes = {"N": values.numel(), "O": left.shape[2], "I": right.shape[2], "R": left.shape[1]}
    common.launch(coactive_energy, (n_samples, splits), row, left.device, **pointers, **sizes)
    return parts.sum(1).to(left.dtype), sums


# --- autograd ---------------------------------------------------------------------------------------------------


def _backward(needs: Any, saved: tuple[Tensor, ...], d_out: Tensor) -> list[Tensor | None]:
    values, left, right, *order, sums = saved
    return [
        (2 * d_out[order[0]] * sums.view(len(values), left.shape[1]).sum(1)).to(values.dtype) if needs[0] else None,
        energy_backward(d_out, values, *order, left, right) if needs[1] else None,
        energy_backward(d_out, values, *order, right, left) if needs[2] else None,
    ]


_coactive = common.differentiable(
    lambda values, left, right, rows, columns, row_offsets, column_order, column_offsets: energy_forward(
        values, columns, row_offsets, left, right
    ),
    _backward,
    lambda inputs, output: (*inputs, output[1]),
)


def gram_energy_coactive(kept: SparseCoefficients, left: Tensor, right: Tensor) -> Tensor:
    """Run `l3d_kernels.reference.gram_energy_coactive` with Triton kernels."""
    return _coactive(*common.contiguous(kept.values, left, right, *kept.indices()))[0]


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
