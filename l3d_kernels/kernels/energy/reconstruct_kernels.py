"""Reconstruct materialised gradients, and measure the squared distance from the gradients: the kernels.

    ĝ_s = Σ_{i kept for s} c_i V_k(i) = Σ_q c_q left_q ⊗ right_q      [S, O, I]
    ‖G_s − ĝ_s‖²                                                      [S]

    kept: N coefficients c_i; left [K, R, O], right [K, R, I], grad [S, O, I]; q runs over a sample's rows (i, r)
    torch.einsum("sk,kro,kri->soi", kept.dense(), left, right)

A program forms a tile [O, I] of one sample's ĝ from the rows that the sample keeps, R·O·I multiply-adds an entry. It
stores the tile, or subtracts it from `grad` and sums the squares. V is never formed. Gradients from the upstream
gradient D = ∂/∂ĝ [S, O, I], over a subnetwork's entries i:

    d_left[k, r] = Σ_i c_i D_s right_kr,   d_right[k, r] = Σ_i c_i D_sᵀ left_kr,   d_c_i = Σ_r left_kr . (D_s right_kr)

For the distance, D = −2 g_s (G_s − ĝ_s) is formed for a few rows of O at a time. Specifications: `reconstruct` and
`squared_residual_norm` of `l3d_kernels.reference`.
"""

import triton
import triton.language as tl

from l3d_kernels.kernels.energy.gram_energy_backward import rows_of
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import add_dot, feed, load, store, zeros
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch


@triton.jit
def reconstruction(
    values_ptr, columns_ptr, row_offsets_ptr, left_ptr, right_ptr, O, I, R,
    PRECISION: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Return (sample, offs_o, offs_i, tile [O, I] of the sample's reconstruction) for this program's tile."""
    sample = tl.program_id(0).to(tl.int64)
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tl.program_id(2) * BLOCK_I + tl.arange(0, BLOCK_I)
    acc = zeros(left_ptr, BLOCK_O, BLOCK_I)
    first = tl.load(row_offsets_ptr + sample)
    n_rows = ((tl.load(row_offsets_ptr + sample + 1) - first) * R).to(tl.int32)
    for start in range(0, n_rows, BLOCK_Q):
        entry, rows, mask = rows_of(columns_ptr, first, start + tl.arange(0, BLOCK_Q), n_rows, R)
        value = load(values_ptr + entry, mask).to(acc.dtype)  # [Q]
        left = load(left_ptr + rows[None, :] * O + offs_o[:, None], mask[None, :] & (offs_o < O)[:, None])  # [O, Q]
        right = load(right_ptr + rows[:, None] * I + offs_i[None, :], mask[:, None] & (offs_i < I)[None, :])  # [Q, I]
        acc = add_dot(feed(left.to(acc.dtype) * value[None, :], left_ptr), right, acc, PRECISION)
    return sample, offs_o, offs_i, acc


@triton.jit
def reconstruct_tile(
    out_ptr,  # [S, O, I]
    values_ptr,  # [N]
    columns_ptr,  # [N] int64
    row_offsets_ptr,  # [S+1] int64
    left_ptr,  # [K, R, O]
    right_ptr,  # [K, R, I]
    O,
    I,
    R,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Store a tile of a sample's reconstruction."""
    sample, offs_o, offs_i, acc = reconstruction(
        values_ptr, columns_ptr, row_offsets_ptr, left_ptr, right_ptr, O, I, R, PRECISION, BLOCK_O, BLOCK_I, BLOCK_Q
    )
    places = (sample * O + offs_o[:, None]) * I + offs_i[None, :]
    store(out_ptr + places, acc, (offs_o < O)[:, None] & (offs_i < I)[None, :])


@triton.jit
def residual_tile(
    out_ptr,  # [S, O, I]: scale_s (G_s − ĝ_s)
    scale_ptr,  # [S] wide
    grad_ptr,  # [S, O, I], rows of a sample stride_grad_s apart
    values_ptr,  # [N]
    columns_ptr,  # [N] int64
    row_offsets_ptr,  # [S+1] int64
    left_ptr,  # [K, R, O]
    right_ptr,  # [K, R, I]
    stride_grad_s,
    O,
    I,
    R,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Store a tile of a sample's scaled residual."""
    sample, offs_o, offs_i, acc = reconstruction(
        values_ptr, columns_ptr, row_offsets_ptr, left_ptr, right_ptr, O, I, R, PRECISION, BLOCK_O, BLOCK_I, BLOCK_Q
    )
    mask, places = (offs_o < O)[:, None] & (offs_i < I)[None, :], offs_o.to(tl.int64)[:, None] * I + offs_i[None, :]
    grad = load(grad_ptr + sample * stride_grad_s + places, mask).to(acc.dtype)  # [O, I]
    store(out_ptr + sample * O * I + places, tl.load(scale_ptr + sample) * (grad - acc), mask)


@triton.jit
def residual_norm_tile(
    parts_ptr,  # [S, tiles of O, tiles of I] wide
    grad_ptr,  # [S, O, I]
    values_ptr,  # [N]
    columns_ptr,  # [N] int64
    row_offsets_ptr,  # [S+1] int64
    left_ptr,  # [K, R, O]
    right_ptr,  # [K, R, I]
    O,
    I,
    R,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Sum the squares of a tile of a sample's residual; the difference is taken first, so nothing cancels."""
    sample, offs_o, offs_i, acc = reconstruction(
        values_ptr, columns_ptr, row_offsets_ptr, left_ptr, right_ptr, O, I, R, PRECISION, BLOCK_O, BLOCK_I, BLOCK_Q
    )
    places = (sample * O + offs_o[:, None]) * I + offs_i[None, :]
    grad = load(grad_ptr + places, (offs_o < O)[:, None] & (offs_i < I)[None, :]).to(acc.dtype)  # [O, I]
    difference = grad - acc
    place = (sample * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(parts_ptr + place, tl.sum(difference * difference))


@triton.jit
def reconstruct_backward(
    d_a_ptr,  # [K, R, A] wide: gradient to one side
    parts_ptr,  # [N, tiles of A, tiles of R] wide: shares of the gradients to the values
    d_out_ptr,  # [S, O, I]: D, read as [S, A, B]
    values_ptr,  # [N]
    rows_ptr,  # [N] int64
    column_order_ptr,  # [N] int64
    column_offsets_ptr,  # [K+1] int64
    a_ptr,  # [K, R, A] this side
    b_ptr,  # [K, R, B] the other side
    stride_d_a,
    stride_d_b,
    N,
    A,
    B,
    R,
    WITH_VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Multiply the upstream gradients of a subnetwork's samples with its other side, and sum over them in order."""
    column, tile_a, tile_r = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    offs_a, offs_r = tile_a * BLOCK_A + tl.arange(0, BLOCK_A), tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_a, mask_r = offs_a < A, offs_r < R
    places = (column * R + offs_r[None, :]) * A + offs_a[:, None]
    mask = mask_a[:, None] & mask_r[None, :]
    total = zeros(a_ptr, BLOCK_A, BLOCK_R)
    for place in range(tl.load(column_offsets_ptr + column), tl.load(column_offsets_ptr + column + 1)):
        entry = tl.load(column_order_ptr + place)
        sample = tl.load(rows_ptr + entry)
        d_out = d_out_ptr + sample * A * B
        product = zeros(a_ptr, BLOCK_A, BLOCK_R)
        for start in range(0, B, BLOCK_B):
            offs_b = start + tl.arange(0, BLOCK_B)
            mask_b = offs_b < B
            corner = d_out + tl.cast(tile_a * BLOCK_A, tl.int64) * stride_d_a + tl.cast(start, tl.int64) * stride_d_b
            line_a, line_b = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_B)
            up = load(corner + line_a[:, None] * stride_d_a + line_b[None, :] * stride_d_b, mask_a[:, None] & mask_b)
            other = load(b_ptr + (column * R + offs_r[None, :]) * B + offs_b[:, None], mask_b[:, None] & mask_r)
            product = add_dot(up, other, product, PRECISION)  # [A, B], [B, R]
        if WITH_VALUES:
            side = load(a_ptr + places, mask).to(product.dtype)  # [A, R]
            part = (entry * tl.num_programs(1) + tile_a) * tl.num_programs(2) + tile_r
            tl.store(parts_ptr + part, tl.sum(product * side), mask=entry < N)
        total += product * tl.load(values_ptr + entry).to(product.dtype)
    tl.store(d_a_ptr + places, total, mask=mask)


# --- launch table and ahead-of-time cases; the launches are in reconstruct.py ------------------------------------

LARGEST_RANKS = 32  # of a subnetwork in a tile of the backward pass
TILES = (reconstruct_tile, residual_tile, residual_norm_tile)
for kernel in TILES:
    TABLE[kernel.fn.__name__] = {
        ("interpreter", None): Launch({"BLOCK_O": 16, "BLOCK_I": 16, "BLOCK_Q": 16}),
        ("sm_80", "32"): Launch({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_Q": 32}, warps=8, stages=3),
        ("gfx1100", "16"): Launch({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_Q": 32}, warps=8, stages=2),
        ("gfx1100", "32"): Launch({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_Q": 16}, warps=8, stages=2),
        (None, "16"): Launch({"BLOCK_O": 128, "BLOCK_I": 64, "BLOCK_Q": 64}, warps=8, stages=3),
        (None, "32"): Launch({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_Q": 32}, warps=8, stages=3),
    }
TABLE["reconstruct_backward"] = {
    ("interpreter", None): Launch({"BLOCK_A": 16, "BLOCK_B": 16}),
    ("gfx1100", None): Launch({"BLOCK_A": 64, "BLOCK_B": 32}, warps=8, stages=2),
    (None, "16"): Launch({"BLOCK_A": 64, "BLOCK_B": 64}, warps=4, stages=3),
    (None, "32"): Launch({"BLOCK_A": 64, "BLOCK_B": 32}, warps=8, stages=3),
}


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernels are launched on a kind of device."""
    tiles = [case for kernel in TILES for case in cases_of_kernel(kernel, kind)]
    forms = [
        ({"BLOCK_R": block_r, "WITH_VALUES": left, "stride_d_b" if left else "stride_d_a": 1}, block_r == LARGEST_RANKS)
        for block_r, left in ((16, True), (16, False), (LARGEST_RANKS, True))
    ]
    return tiles + cases_of_kernel(reconstruct_backward, kind, forms)
