"""Project materialised gradients, with the directions built a tile at a time.

    c[s, k] = Σ_o Σ_i grad[s, o, i] V[k, o, i],  V[k, o, i] = Σ_r left[k, r, o] right[k, r, i]      [S, K]

    grad [S, O, I], left [K, R, O], right [K, R, I]      einsum("soi,kro,kri->sk", grad, left, right)

A program builds V for some subnetworks on a patch of BLOCK_O x BLOCK_I elements, one small product a subnetwork, and
multiplies it with the same patch of its samples' gradients. Rows of O are dealt to several programs, whose partial sums
are added in order. Programs that share a patch are neighbours, so that it is read from memory once. The backward pass
needs d_V = gᵀ grad; the library forms it for a few rows of O at a time. Specification:
`l3d_kernels.reference.project_dense`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import add_dot, feed, load, store, zeros
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch
from l3d_kernels.splitting import pieces

# --- kernel -----------------------------------------------------------------------------------------------------


@triton.jit
def project_dense_sum(
    out_ptr,  # [splits, S, K]
    grad_ptr,  # [S, O, I]
    left_ptr,  # [K, R, O]
    right_ptr,  # [K, R, I]
    S,
    O,
    I,
    K,
    R,
    rows_split,  # rows of O that one program sums over, a multiple of BLOCK_O
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Sum a tile [S, K] of the coefficients over some rows of O."""
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_k, mask_s = offs_k < K, offs_s < S
    patch = tl.arange(0, BLOCK_O * BLOCK_I)
    rows_s = offs_s.to(tl.int64) * O * I
    total = zeros(grad_ptr, BLOCK_S, BLOCK_K)
    first = tl.program_id(2) * rows_split
    for start_o in range(first, tl.minimum(first + rows_split, O), BLOCK_O):
        offs_o = start_o + tl.arange(0, BLOCK_O)
        for start_i in range(0, I, BLOCK_I):
            offs_i = start_i + tl.arange(0, BLOCK_I)
            v = zeros(grad_ptr, BLOCK_K, BLOCK_O * BLOCK_I)
            v = tl.reshape(v, [BLOCK_K, BLOCK_O, BLOCK_I])
            for start_r in range(0, R, BLOCK_R):
                offs_r = start_r + tl.arange(0, BLOCK_R)
                rows = offs_k.to(tl.int64)[:, None] * R + offs_r[None, :]
                mask = mask_k[:, None] & (offs_r < R)[None, :]
                places = left_ptr + (rows * O)[:, None, :] + offs_o[None, :, None]
                left = load(places, mask[:, None, :] & (offs_o < O)[None, :, None])  # [K, O, R]
                places = right_ptr + (rows * I)[:, :, None] + offs_i[None, None, :]
                right = load(places, mask[:, :, None] & (offs_i < I)[None, None, :])  # [K, R, I]
                v = add_dot(left, right, v, PRECISION)
            v = feed(tl.trans(tl.reshape(v, [BLOCK_K, BLOCK_O * BLOCK_I])), grad_ptr)  # [patch, K]
            mask = mask_s[:, None] & ((patch // BLOCK_I < O - start_o) & (patch % BLOCK_I < I - start_i))[None, :]
            corner = grad_ptr + tl.cast(start_o, tl.int64) * I + start_i  # O·I may pass 2^31
            grad = load(
                corner + rows_s[:, None] + (patch // BLOCK_I * I + patch % BLOCK_I)[None, :], mask
            )  # [S, patch]
            total = add_dot(grad, v, total, PRECISION)
    places = out_ptr + (tl.program_id(2).to(tl.int64) * S + offs_s)[:, None] * K + offs_k[None, :]
    store(places, total, mask_s[:, None] & mask_k[None, :])


# --- launch -----------------------------------------------------------------------------------------------------


def tile(s: int, k: int, o: int, i: int, warps: int, stages: int = 2) -> Launch:
    """Return a launch row for s samples, k subnetworks and patches of o x i elements."""
    return Launch({"BLOCK_S": s, "BLOCK_K": k, "BLOCK_O": o, "BLOCK_I": i}, warps, stages)


TABLE["project_dense_sum"] = {
    ("interpreter", None): tile(16, 16, 4, 8, 4),
    ("gfx942", None): tile(64, 16, 16, 16, 4, 1),
    ("gfx1100", "16"): tile(32, 16, 16, 16, 8, 1),
    ("gfx1100", "32"): tile(32, 16, 8, 8, 8, 1),
    ("sm_90", "32"): tile(32, 16, 4, 16, 8),  # twice as high spills in triton 3.6
    ("sm_100", "32"): tile(64, 16, 8, 16, 8),
    ("sm_86", "32"): tile(32, 16, 8, 16, 8, 1),
    (None, "16"): tile(128, 16, 16, 16, 8),
    (None, "32"): tile(32, 16, 8, 16, 8),
}


@common.operator("project_dense", lambda grad, left, right: grad.new_empty(grad.shape[0], left.shape[0]))
def project_dense_forward(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Launch the coefficients: [S, K]."""
    return partial_sums(grad, left, right).sum(0).to(grad.dtype)


def partial_sums(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Launch the coefficients summed over parts of O: [splits, S, K], in the accumulator's type."""
    (S, O, I), (K, R, _) = grad.shape, left.shape
    if O * I * R == 0:
        return grad.new_zeros((1, S, K), dtype=common.wide(grad.dtype))
    row = common.row_for(project_dense_sum, grad)
    tiles = row.tiles(K=K, S=S)
    rows_split, splits = common.split(O, row.blocks["BLOCK_O"], tiles[0] * tiles[1])
    out = common.empty((splits, S, K), grad, common.wide(grad.dtype))
    pointers = {"out_ptr": out, "grad_ptr": grad, "left_ptr": left, "right_ptr": right}
    sizes = {"S": S, "O": O, "I": I, "K": K, "R": R, "rows_split": rows_split}
    sizes["BLOCK_R"] = min(32 if grad.element_size() == 2 else 16, common.power_of_two(R, 16))
    common.launch(project_dense_sum, (*tiles, splits), row, grad.device, **pointers, **sizes)
    return out


def _fake_backward(d_out: Tensor, grad: Tensor, left: Tensor, right: Tensor, needs: list[bool]) -> Any:
    return grad.new_empty(grad.shape if needs[0] else 0), torch.empty_like(left), torch.empty_like(right)


@common.operator("project_dense_backward", _fake_backward)
def project_dense_backward(
    d_out: Tensor, grad: Tensor, left: Tensor, right: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients by library products, a few rows of O at a time; that of `grad` only if it is needed.

    The products move S + 3*K numbers for each of the O*I elements: grad is read once, d_V is written once and read
    twice. A kernel that kept d_V in registers would read grad once for every 16 subnetworks, S*K/16 numbers, and write
    2*K*R/16 partial sums of d_right. At S=256, K=100, R=25 that is 1,600 + 312 against 556; at K=1,000, R=8 it is
    16,000 + 1,000 against 3,256.
    """
    (_, O, I), K = grad.shape, len(left)
    d_grad = grad.new_empty(grad.shape if needs[0] else 0)
    own = pieces(O, K * I, common.WORKSPACE)
    if len(own) == 1 and not needs[0]:
        d_v = torch.einsum("sk,soi->koi", d_out, grad)
        return d_grad, right @ d_v.mT, left @ d_v
    d_left, d_right = torch.empty_like(left), torch.zeros_like(right, dtype=common.wide(right.dtype))
    for rows in own:
        d_v = torch.einsum("sk,soi->koi", d_out, grad[:, rows])
        d_left[:, :, rows] = right @ d_v.mT
        d_right += left[:, :, rows] @ d_v
        if needs[0]:
            v = left[:, :, rows].mT @ right
            d_grad[:, rows] = (d_out @ v.flatten(1)).view_as(d_grad[:, rows])
    return d_grad, d_left, d_right.to(right.dtype)


# --- autograd ---------------------------------------------------------------------------------------------------


_project_dense = common.differentiable(
    lambda grad, left, right: project_dense_forward(grad, left, right),
    lambda needs, saved, d_out: project_dense_backward(d_out, *saved, list(needs)),
)


def project_dense(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Run `l3d_kernels.reference.project_dense` with Triton kernels."""
    return _project_dense(*common.contiguous(grad, left, right))


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernel is launched on a kind of device."""
    cases = cases_of_kernel(project_dense_sum, kind, [({"BLOCK_R": 16}, False)], out_ptr="*fp32")
    wide = cases_of_kernel(project_dense_sum, kind, [({"BLOCK_R": 32}, False)], out_ptr="*fp32")
    cases = [case._replace(long=case.long or case.dtype != "fp32") for case in cases]
    return cases + [case for case in wide if case.dtype != "fp32"]
