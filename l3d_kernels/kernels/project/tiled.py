"""Project from gradients that are multiplied out a few rows of O at a time, with directions built on the fly.

    c[s, k] = <V_k, G_s>,  G_s = Σ_t dy[s, t] ⊗ x[b, t],  b = s // (S // B)      [S, K]

    x [B, T, I], dy [S, T, O], left [K, R, O], right [K, R, I]      project_dense(outer(x, dy), left, right)

One batched library product forms a piece of G, [S, rows, I] of at most common.WORKSPACE elements; the kernel of
`l3d_kernels.kernels.project.dense` projects it. So neither [S, O, I] nor [K, O, I] ever exists. The backward pass forms
each piece of G again. Specification: `l3d_kernels.reference.project_tiled`.
"""

from functools import reduce

import torch
from torch import Tensor

from l3d_kernels.kernels.project.dense import partial_sums, project_dense_backward
from l3d_kernels.kernels.shared import common
from l3d_kernels.splitting import outer, pieces


@common.operator("project_tiled", lambda x, dy, left, right: dy.new_empty(dy.shape[0], left.shape[0]))
def project_tiled_forward(x: Tensor, dy: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Launch the coefficients, a piece at a time: [S, K]."""
    own = pieces(dy.shape[2], len(dy) * right.shape[2], common.WORKSPACE)
    if not own:
        return dy.new_zeros((dy.shape[0], left.shape[0]))
    sums = (partial_sums(outer(x, dy[:, :, rows]), left[:, :, rows].contiguous(), right).sum(0) for rows in own)
    return reduce(torch.add, sums).to(dy.dtype)


@common.operator("project_tiled_backward", lambda *inputs: tuple(torch.empty_like(side) for side in inputs[3:]))
def project_tiled_backward(d_out: Tensor, x: Tensor, dy: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients to left and right, a piece at a time."""
    own = pieces(dy.shape[2], len(dy) * right.shape[2], common.WORKSPACE)
    if len(own) == 1:
        return project_dense_backward(d_out, outer(x, dy), left, right, [False, True, True])[1:]
    d_left, d_right = torch.empty_like(left), torch.zeros_like(right, dtype=common.wide(right.dtype))
    for rows in own:
        grad = outer(x, dy[:, :, rows])
        _, d_left[:, :, rows], part = project_dense_backward(d_out, grad, left[:, :, rows], right, [False, True, True])
        d_right += part
    return d_left, d_right.to(right.dtype)


_project_tiled = common.differentiable(
    lambda x, dy, left, right: project_tiled_forward(x, dy, left, right),
    lambda needs, saved, d_out: [None, None, *project_tiled_backward(d_out, *saved)],
)


def project_tiled(x: Tensor, dy: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Run `l3d_kernels.reference.project_tiled` with Triton kernels."""
    return _project_tiled(*common.contiguous(x, dy, left, right))
