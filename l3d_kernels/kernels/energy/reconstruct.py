"""Launch `reconstruct` and `squared_residual_norm`, and compute their gradients.

The formulas, the shapes and the kernels are in `reconstruct_kernels`.
"""

from typing import Any

import torch
from torch import Tensor

from l3d_kernels.kernels.energy import reconstruct_kernels as kernels
from l3d_kernels.kernels.shared import common
from l3d_kernels.sparse import SparseCoefficients
from l3d_kernels.splitting import pieces

compile_cases = kernels.compile_cases

# --- launch -----------------------------------------------------------------------------------------------------


def _launch_tiles(
    kernel: Any, values: Tensor, columns: Tensor, row_offsets: Tensor, left: Tensor, right: Tensor, **own: Any
) -> None:
    """Launch a kernel that forms tiles of the reconstructions of all samples."""
    row, (_, R, O), I = common.row_for(kernel, left), left.shape, right.shape[2]
    grid = (len(row_offsets) - 1, *row.tiles(O=O, I=I))
    own |= {"values_ptr": values, "columns_ptr": columns, "row_offsets_ptr": row_offsets}
    common.launch(kernel, grid, row, left.device, left_ptr=left, right_ptr=right, O=O, I=I, R=R, **own)


def _fake_tiles(values: Tensor, columns: Tensor, row_offsets: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(len(row_offsets) - 1, left.shape[2], right.shape[2])


@common.operator("reconstruct", _fake_tiles)
def reconstruct_forward(values: Tensor, columns: Tensor, row_offsets: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Launch the forward kernel: [S, O, I]."""
    out = common.empty((len(row_offsets) - 1, left.shape[2], right.shape[2]), left)
    _launch_tiles(kernels.reconstruct_tile, values, columns, row_offsets, left, right, out_ptr=out)
    return out


@common.operator("squared_residual_norm", lambda *inputs: inputs[5].new_empty(len(inputs[5])))
def residual_norm_forward(
    values: Tensor, columns: Tensor, row_offsets: Tensor, left: Tensor, right: Tensor, grad: Tensor
) -> Tensor:
    """Launch the forward kernel: [S]."""
    tiles = common.row_for(kernels.residual_norm_tile, left).tiles(O=left.shape[2], I=right.shape[2])
    parts = common.empty((len(grad), *tiles), grad, common.wide(grad.dtype))
    own = {"parts_ptr": parts, "grad_ptr": grad}
    _launch_tiles(kernels.residual_norm_tile, values, columns, row_offsets, left, right, **own)
    return parts.sum((1, 2)).to(grad.dtype)


@common.operator("squared_residual", lambda scale, grad, *_: grad.new_empty(grad.shape))
def residual(
    scale: Tensor, grad: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    """Launch the kernel of the scaled residual: [S, O, I]. grad: rows of O of a packed array, all of them or some."""
    if grad.stride()[1:] != (grad.shape[2], 1):
        grad = grad.contiguous()
    out = common.empty(grad.shape, grad)
    own = {"out_ptr": out, "scale_ptr": scale, "grad_ptr": grad, "stride_grad_s": grad.stride(0)}
    _launch_tiles(kernels.residual_tile, values, columns, row_offsets, left, right, **own)
    return out


def _fake_side(d_out: Tensor, values: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    *_, left, right, to_left = inputs
    wide, side = common.wide(left.dtype), left if to_left else right
    return side.new_empty(side.shape, dtype=wide), values.new_empty(values.numel() if to_left else 0, dtype=wide)


@common.operator("reconstruct_backward", _fake_side)
def side_backward(
    d_out: Tensor,
    values: Tensor,
    rows: Tensor,
    column_order: Tensor,
    column_offsets: Tensor,
    left: Tensor,
    right: Tensor,
    to_left: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel for one side: (gradient to it, wide; gradients to the values with the left side's)."""
    d_out, (side, other) = d_out.contiguous(), (left, right) if to_left else (right, left)
    K, R, A = side.shape
    row = common.row_for(kernels.reconstruct_backward, left)
    block_r = min(kernels.LARGEST_RANKS, common.power_of_two(R, 16))
    tiles = (*row.tiles(A=A), common.ceil_div(R, block_r))
    out = common.empty(side.shape, side, common.wide(side.dtype))
    parts = common.empty((values.numel() if to_left else 0, *tiles), out)
    pointers = {"d_a_ptr": out, "parts_ptr": parts, "d_out_ptr": d_out, "values_ptr": values, "rows_ptr": rows}
    pointers |= {"column_order_ptr": column_order, "column_offsets_ptr": column_offsets, "a_ptr": side, "b_ptr": other}
    stride_d_a, stride_d_b = (d_out.shape[2], 1) if to_left else (1, d_out.shape[2])
    sizes = {"stride_d_a": stride_d_a, "stride_d_b": stride_d_b, "N": values.numel(), "A": A, "B": other.shape[2]}
    sizes |= {"R": R, "WITH_VALUES": to_left, "BLOCK_R": block_r}
    common.launch(kernels.reconstruct_backward, (K, *tiles), row, left.device, **pointers, **sizes)
    return out, parts.sum((1, 2))


# --- autograd ---------------------------------------------------------------------------------------------------


def _backward(needs: Any, saved: tuple[Tensor, ...], d_out: Tensor) -> list[Tensor | None]:
    values, left, right, rows, _, _, *by_column = saved
    d_values = d_left = d_right = None
    if needs[0] or needs[1]:
        d_left, d_values = side_backward(d_out, values, rows, *by_column, left, right, True)
        d_left, d_values = d_left.to(left.dtype), d_values.to(values.dtype)
    if needs[2]:
        d_right = side_backward(d_out, values, rows, *by_column, left, right, False)[0].to(right.dtype)
    return [d_values, d_left, d_right]


def _backward_norm(needs: Any, saved: tuple[Tensor, ...], upstream: Tensor) -> list[Tensor | None]:
    """Form the scaled residual for a few rows of O at a time, and read it once for each side."""
    values, left, right, grad, rows, columns, row_offsets, *by_column = saved
    if 0 in grad.shape[1:]:
        return [torch.zeros_like(own) for own in (values, left, right, grad)]
    scale = 2 * upstream.to(common.wide(grad.dtype))
    d_values, d_left, d_right, d_grad = (list[Tensor]() for _ in range(4))
    for piece in pieces(grad.shape[1], len(grad) * grad.shape[2], common.WORKSPACE):
        part = left[:, :, piece].contiguous()
        rest = residual(scale, grad[:, piece], values, columns, row_offsets, part, right)
        if needs[3]:
            d_grad.append(rest)
        if needs[0] or needs[1]:
            to_left, to_values = side_backward(rest, values, rows, *by_column, part, right, True)
            d_left.append(-to_left)
            d_values.append(-to_values)
        if needs[2]:
            d_right.append(-side_backward(rest, values, rows, *by_column, part, right, False)[0])
    return [
        torch.stack(d_values).sum(0).to(values.dtype) if needs[0] else None,
        torch.cat(d_left, 2).to(left.dtype) if needs[1] else None,
        torch.stack(d_right).sum(0).to(right.dtype) if needs[2] else None,
        torch.cat(d_grad, 1) if needs[3] else None,
    ]


_reconstruct = common.differentiable(
    lambda values, left, right, rows, columns, row_offsets, column_order, column_offsets: reconstruct_forward(
        values, columns, row_offsets, left, right
    ),
    _backward,
)
_residual_norm = common.differentiable(
    lambda values, left, right, grad, rows, columns, row_offsets, column_order, column_offsets: residual_norm_forward(
        values, columns, row_offsets, left, right, grad
    ),
    _backward_norm,
)


def reconstruct(kept: SparseCoefficients, left: Tensor, right: Tensor) -> Tensor:
    """Run `l3d_kernels.reference.reconstruct` with Triton kernels."""
    return _reconstruct(*common.contiguous(kept.values, left, right, *kept.indices()))


def squared_residual_norm(kept: SparseCoefficients, left: Tensor, right: Tensor, grad: Tensor) -> Tensor:
    """Run `l3d_kernels.reference.squared_residual_norm` with Triton kernels."""
    return _residual_norm(*common.contiguous(kept.values, left, right, grad, *kept.indices()))
