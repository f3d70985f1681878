"""Project by library products, a chunk at a time, and a small kernel that multiplies and sums them.

    x_right[b, t, kr] = x[b, t] . right[kr],  dy_left[s, t, kr] = dy[s, t] . left[kr]      (library products)
    c[s, k] = Σ_t Σ_r x_right[b, t, kr] dy_left[s, t, kr],  b = s // (S // B)      [S, K]

This is the path of `project` for wide layers: there the library's lead over a fused kernel outweighs the cost of
writing the products and reading them once. Both chunks together have at most common.WORKSPACE elements (or those of one
sequence and one subnetwork, if that is more). x·right is computed once for each sequence. The products are rounded to
their inputs' dtype, as in `l3d_kernels.cpu`, then multiplied and summed in float32.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.project.epilogue import COUNTED, finish, lines
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import load, sum_groups, zeros
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch


@triton.jit
def project_multiply(
    out_ptr,  # [S, K] with rows `stride` apart
    histogram_ptr,  # [2^bits] int64, to be counted up; or None
    base_ptr,  # as out, to be added; or None
    x_right_ptr,  # [B*T, K*R]
    dy_left_ptr,  # [S*T, K*R]
    S,
    T,
    K,
    R,
    stride,
    share,  # samples of one sequence
    SLOT_R: tl.constexpr,  # ranks of a subnetwork in one tile
    BLOCK_T: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Compute the coefficients of one sample and some subnetworks."""
    sample = tl.program_id(0).to(tl.int64)
    offs_k, line_r = lines(tl.program_id(1), SLOT_R, BLOCK_COLS)
    total = zeros(out_ptr, BLOCK_T, BLOCK_COLS)
    for start_r in range(0, R, SLOT_R):
        offs_r = start_r + line_r
        mask_cols = (offs_k < K) & (offs_r < R)
        cols = offs_k * R + offs_r
        for start_t in range(0, T, BLOCK_T):
            offs_t = start_t + tl.arange(0, BLOCK_T)
            mask = (offs_t < T)[:, None] & mask_cols[None, :]
            rows = (sample // share * T + offs_t) * (K * R)
            x_right = load(x_right_ptr + rows[:, None] + cols[None, :], mask)  # [T, COLS]
            rows = (sample * T + offs_t) * (K * R)
            dy_left = load(dy_left_ptr + rows[:, None] + cols[None, :], mask)  # [T, COLS]
            total += x_right.to(total.dtype) * dy_left.to(total.dtype)
    finish(out_ptr, histogram_ptr, base_ptr, sum_groups(total, BLOCK_T, SLOT_R), S, K, stride)


# --- launch -----------------------------------------------------------------------------------------------------

TABLE["project_multiply"] = {
    ("interpreter", None): Launch({"BLOCK_T": 4, "BLOCK_COLS": 16}),
    (None, None): Launch({"BLOCK_T": 8, "BLOCK_COLS": 256}, warps=4, stages=2),
}


def slot(R: int, block: int) -> int:
    """Return how many ranks of a subnetwork a tile holds: a power of two."""
    return min(block, common.power_of_two(R))


def coefficients(
    x: Tensor, dy: Tensor, left: Tensor, right: Tensor, base: Tensor | None, histogram: Tensor | None
) -> Tensor:
    """Launch products and sums: `base` plus the coefficients, [S, K]; their magnitudes are counted in `histogram`."""
    (S, T, _), (K, R, _), B = dy.shape, left.shape, len(x)
    out, share = common.empty((S, K), dy), S // B if B else 0
    row = common.row_for(project_multiply, dy)
    ranks = slot(R, row.blocks["BLOCK_COLS"])
    per_subnetwork = (share + 1) * T * R  # of one sequence
    step_k = max(1, min(K, common.WORKSPACE // max(1, per_subnetwork)))
    step_b = max(1, common.WORKSPACE // max(1, per_subnetwork * step_k))
    for k in range(0, K, step_k):
        lefts, rights = left[k : k + step_k].flatten(0, 1), right[k : k + step_k].flatten(0, 1)
        for b in range(0, B, step_b):
            x_right = products(x[b : b + step_b], rights)
            samples, columns = slice(b * share, (b + step_b) * share), slice(k, k + step_k)
            part, own = out[samples, columns], None if base is None else base[samples, columns]
            pointers = {"out_ptr": part, "x_right_ptr": x_right, "dy_left_ptr": products(dy[samples], lefts)}
            sizes = {"S": part.shape[0], "T": T, "K": part.shape[1], "R": R, "stride": K, "share": share}
            grid = (part.shape[0], *row.tiles(COLS=part.shape[1] * ranks))
            flags = {"SLOT_R": ranks, "base_ptr": own, "histogram_ptr": histogram}
            common.launch(project_multiply, grid, row, dy.device, **pointers, **sizes, **flags)
    return out


def products(side: Tensor, factor: Tensor) -> Tensor:
    """Multiply rows [n, T, D], or the one-hot rows of indices [n, T], with a factor [K*R, D]: [n*T, K*R]."""
    if side.is_floating_point():
        return side.flatten(0, 1) @ factor.mT
    return factor.mT[side.flatten()]


def compile_cases(kind: str, count: bool = False, slots: Sequence[int] = (1, 8, 256)) -> list[CompileCase]:
    """Return every form in which the kernel is launched on a kind of device; `count`: as `project_topk` does."""
    forms = [({"SLOT_R": ranks, **COUNTED[count]}, ranks != 8) for ranks in slots]
    return cases_of_kernel(project_multiply, kind, forms)
