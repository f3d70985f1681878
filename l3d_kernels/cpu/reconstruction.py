"""Reconstruct gradients from kept coefficients, ĝ_s = Σ_k c_sk V_k, and measure the squared distance to the gradients.

V is formed for a few rows of O at a time.
"""

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
        total = total + torch.linalg.vector_norm(torch.addmm(rows, coefficients, v, alpha=-1), dim=1).square()
    return total
