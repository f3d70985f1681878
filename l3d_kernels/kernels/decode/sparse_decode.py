"""Decode sparse codes: sum a few weighted rows of a weight for each code.

    out[a] = Σ_j values[a, j] weight[indices[a, j]]      [A, D];  weight [L, D]

    indices, values [A, k]; or [N] with row_offsets [A+1]: code a owns entries row_offsets[a]:row_offsets[a+1]
    torch.nn.functional.embedding_bag(indices, weight, row_offsets, mode="sum", per_sample_weights=values)

Gradients: d_values[a, j] = d_out[a] . weight[indices[a, j]]; `sparse_decode_weight` computes the one to the weight.
Memory traffic bounds the time: every entry reads a row of D elements. Indices outside 0..L-1 read nothing and count as
rows of zeros. Specification: `l3d_kernels.reference.sparse_decode`.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.decode.sparse_decode_weight import d_weight
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import load, store, zeros


@triton.jit
def entries_of(code, row_offsets_ptr, per_code, FIXED: tl.constexpr):
    """Return where a code's entries begin and end: every `per_code` entries where FIXED, else from the offsets."""
    if FIXED:
        return code * per_code, (code + 1) * per_code
    else:
        return tl.load(row_offsets_ptr + code), tl.load(row_offsets_ptr + code + 1)


@triton.jit
def load_rows(weight_ptr, indices_ptr, offs_n, mask_n, offs_d, L, D):
    """Load the rows of the weight that the entries' indices name: [N, D]."""
    index = tl.load(indices_ptr + offs_n, mask=mask_n, other=-1).to(tl.int64)  # [N]
    mask = ((index >= 0) & (index < L))[:, None] & (offs_d < D)[None, :]
    return load(weight_ptr + index[:, None] * D + offs_d[None, :], mask)


@triton.jit
def decode_codes(
    out_ptr,  # [A, D]
    indices_ptr,  # [N] int64
    values_ptr,  # [N]
    weight_ptr,  # [L, D]
    row_offsets_ptr,  # [A+1] int64; read unless FIXED
    per_code,
    L,
    D,
    FIXED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum a code's weighted rows over a tile of D."""
    code = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = entries_of(code, row_offsets_ptr, per_code, FIXED)
    acc = zeros(weight_ptr, BLOCK_N, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        value = load(values_ptr + offs_n, offs_n < last).to(acc.dtype)  # [N]
        acc += value[:, None] * load_rows(weight_ptr, indices_ptr, offs_n, offs_n < last, offs_d, L, D).to(acc.dtype)
    store(out_ptr + code * D + offs_d, tl.sum(acc, 0), offs_d < D)


@triton.jit
def decode_d_values(
    d_values_ptr,  # [N]
    d_out_ptr,  # [A, D]
    indices_ptr,  # [N] int64
    weight_ptr,  # [L, D]
    row_offsets_ptr,  # [A+1] int64; read unless FIXED
    per_code,
    N,
    L,
    D,
    FIXED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Multiply a code's upstream gradient with each of its rows."""
    code = tl.program_id(0).to(tl.int64)
    first, last = entries_of(code, row_offsets_ptr, per_code, FIXED)
    for start in range(first, last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        acc = zeros(weight_ptr, BLOCK_N, BLOCK_D)
        for start_d in range(0, D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            d_out = load(d_out_ptr + code * D + offs_d, offs_d < D).to(acc.dtype)  # [D]
            rows = load_rows(weight_ptr, indices_ptr, offs_n, offs_n < last, offs_d, L, D)  # [N, D]
            acc += d_out[None, :] * rows.to(acc.dtype)
        store(d_values_ptr + offs_n, tl.sum(acc, 1), (offs_n < last) & (offs_n < N))


# --- launch; the rows of the table are in sparse_decode_weight --------------------------------------------------------


def _entries(indices: Tensor, row_offsets: Tensor | None) -> tuple[int, dict[str, Any]]:
    """Return the number of codes, and the arguments from which a kernel computes where their entries begin and end."""
    if row_offsets is None:
        return len(indices), {"row_offsets_ptr": indices, "per_code": indices.shape[1], "FIXED": True}
    return len(row_offsets) - 1, {"row_offsets_ptr": row_offsets, "per_code": 0, "FIXED": False}


def _fake_decode(indices: Tensor, values: Tensor, weight: Tensor, row_offsets: Tensor | None) -> Tensor:
    return weight.new_empty(_entries(indices, row_offsets)[0], weight.shape[1])


@common.operator("sparse_decode", _fake_decode)
def decode(indices: Tensor, values: Tensor, weight: Tensor, row_offsets: Tensor | None) -> Tensor:
    """Launch the forward kernel: [A, D]."""
    (L, D), (n_codes, entries) = weight.shape, _entries(indices, row_offsets)
    out, row = common.empty((n_codes, D), weight), common.row_for(decode_codes, weight)
    pointers = {"out_ptr": out, "indices_ptr": indices, "values_ptr": values, "weight_ptr": weight}
    common.launch(decode_codes, (n_codes, *row.tiles(D=D)), row, weight.device, L=L, D=D, **pointers, **entries)
    return out


@common.operator("sparse_decode_d_values", lambda d_out, indices, weight, _: weight.new_empty(indices.shape))
def d_values(d_out: Tensor, indices: Tensor, weight: Tensor, row_offsets: Tensor | None) -> Tensor:
    """Launch the kernel of the gradient to the values: in the shape of `indices`."""
    (L, D), (n_codes, entries) = weight.shape, _entries(indices, row_offsets)
    out, row = common.empty(indices.shape, weight), common.row_for(decode_d_values, weight)
    entries |= {"d_values_ptr": out, "d_out_ptr": d_out.contiguous(), "indices_ptr": indices, "weight_ptr": weight}
    common.launch(decode_d_values, (n_codes,), row, weight.device, N=indices.numel(), L=L, D=D, **entries)
    return out


# --- autograd ---------------------------------------------------------------------------------------------------


def _backward(needs: Any, saved: tuple[Any, ...], d_out: Tensor) -> list[Tensor | None]:
    indices, values, weight, row_offsets = saved
    to_values = d_values(d_out, indices, weight, row_offsets) if needs[1] else None
    to_weight = d_weight(d_out, indices, values, len(weight), row_offsets) if needs[2] else None
    return [None, to_values, to_weight]


_decode = common.differentiable(
    lambda indices, values, weight, row_offsets: decode(indices, values, weight, row_offsets), _backward
)


def sparse_decode(indices: Tensor, values: Tensor, weight: Tensor, row_offsets: Tensor | None = None) -> Tensor:
    """Run `l3d_kernels.reference.sparse_decode` with Triton kernels."""
    values, weight = common.contiguous(values, weight)
    offsets = None if row_offsets is None else row_offsets.contiguous()
    return _decode(indices.contiguous(), values, weight, offsets)


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernels are launched on a kind of device."""
    forms = [({"FIXED": fixed}, not fixed) for fixed in (True, False)]
    return cases_of_kernel(decode_codes, kind, forms) + cases_of_kernel(decode_d_values, kind, forms)
