"""Reconstruct gradients from kept coefficients, ĝ_s = Σ_k c_sk V_k, and measure the squared distance to the gradients.

V is formed for a few rows of O at a time.
"""

from typing import Any

import torch
from torch import Tensor

from l3d_kernels.cpu.directions import dense_pieces, directions
from l3d_kernels.sparse import SparseCoefficients
from l3d_kernels.splitting import pieces


def reconstruct(kept: SparseCoefficients, left: Tensor, right: Tensor) -> Tensor:
    """Return the reconstructions ĝ_s: [S, O, I].

    The result has S rows and V has K; where K is not larger than S, V may be formed whole.
    """
    coefficients = kept.dense()
    per_row = right.shape[2] * max(1, left.shape[0] - kept.shape[0])
    out = [
        (coefficients @ directions(left[:, :, piece], right).flatten(1)).unflatten(1, (-1, right.shape[2]))
        for piece in pieces(left.shape[2], per_row)
    ]
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def squared_residual_norm(kept: SparseCoefficients, left: Tensor, right: Tensor, grad: Tensor) -> Tensor:
    """Return ‖G_s − ĝ_s‖² for a few rows of O at a time: [S].

    The difference is taken before it is squared, so that nothing cancels where the residual is small.
    """
    coefficients, total = kept.dense(), grad.new_zeros(grad.shape[0])
    for piece, rows in dense_pieces(grad, left):
        v = directions(left[:, :, piece], right).flatten(1)
        total = total + _SquaredNorm.apply(torch.addmm(rows, coefficients, v, alpha=-1))
    return total


class _SquaredNorm(torch.autograd.Function):
    """Square the norms of rows; torch's second derivative of a norm is NaN where a row is zero."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(rows, dim=1)
        ctx.save_for_backward(rows, norms)
        return norms.square()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        rows, norms = ctx.saved_tensors
        if torch.is_grad_enabled():
            return 2 * d_out[:, None] * rows
        unit = (rows / norms[:, None]).masked_fill(norms[:, None] == 0, 0)  # with the bits of torch's own backward
        return unit * (d_out * (2 * norms))[:, None]
