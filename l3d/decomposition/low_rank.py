"""Compute low-rank parts of single samples' gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from l3d.gradients.factors import Gradients, Rows, matrix_shape
from l3d_kernels.splitting import pieces


def truncated(tensors: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Approximate tensors [n, d0, d1, ...] as Tucker products: the core [n, r0, r1, ...], then the modes [n, r, d].

    By the truncated higher-order singular value decomposition; the modes' rows are orthonormal.
    """
    core, modes = tensors, []
    for axis, rank in enumerate(ranks, 1):
        vectors = torch.linalg.svd(core.movedim(axis, 1).flatten(2), full_matrices=False).U[:, :, :rank]
        modes.append(padded(vectors.mT, rank))
        core = torch.einsum("n...d,nrd->n...r", core.movedim(axis, -1), modes[-1]).movedim(-1, axis)
    return [core, *modes]


def singular(gradients: Gradients, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a matrix's gradients: U [n, O, m], singular values [n, m], V [n, I, m]."""
    shape = matrix_shape(gradients.shapes[name])
    parts = gradients.parts[name]
    lone = parts[0] if len(parts) == 1 else None
    if isinstance(lone, Rows) and lone.x.is_floating_point() and lone.dy.shape[1] < min(shape):
        # from the factors: G = dyᵀ x = Q_dy (R_dy R_xᵀ) Q_xᵀ, never multiplied out
        q_dy, r_dy = torch.linalg.qr(lone.dy.mT)
        q_x, r_x = torch.linalg.qr(lone.x.mT)
        u, s, vh = torch.linalg.svd(r_dy @ r_x.mT)
        u, v = q_dy @ u, q_x @ vh.mT
        return (u, s, v) if lone.x_axis == 1 else (v, s, u)
    results = []
    for piece in pieces(gradients.n_samples, shape[0] * shape[1]):
        some = gradients.select(torch.arange(piece.start, piece.stop, device=gradients.device))
        results.append(torch.linalg.svd(some.matrix(name), full_matrices=False))
    u, s, vh = (torch.cat(each) for each in zip(*results, strict=True))
    return u, s, vh.mT


def padded(rows: Tensor, n: int) -> Tensor:
    """Append zero rows: [K, m <= n, D] -> [K, n, D]."""
    return torch.nn.functional.pad(rows, (0, 0, 0, n - rows.shape[1]))
