"""Directions taken from data: the low-rank part of single samples' gradients.

A decomposition may start from them, and a dead subnetwork is given a new life by one: it becomes a sample that the
others reconstruct badly. Samples are drawn with probability proportional to a weight, as k-means++ draws its centres.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from l3d.decomposition.chunked import Chunks
from l3d.decomposition.directions import Directions, LowRank, Tucker, Whole
from l3d.gradients.factors import Gradients, Rows, matrix_shape
from l3d_kernels.splitting import pieces

NOISE = 0.1  # of random entries, relative: factors that are zero would have no gradient, and never leave it


@torch.no_grad()
def draw_samples(weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw n samples with probability proportional to weights [S]: [n], each once as long as they last.

    Negative and non-finite weights count as zero; where all are, every sample is as likely.
    """
    if n == 0:
        return torch.zeros(0, dtype=torch.int64)
    weights = weights.detach().double().cpu().nan_to_num(0, 0, 0).clamp_min(0)
    if not weights.any():
        weights = torch.ones_like(weights)
    chosen: list[Tensor] = []
    available = int((weights > 0).sum())
    for start in range(0, n, available):
        chosen.append(torch.multinomial(weights, min(available, n - start), generator=generator))
    return torch.cat(chosen)


@torch.no_grad()
def set_from_samples(
    sides: Sequence[Directions],
    columns: Tensor,
    gradients: Gradients | Chunks,
    samples: Tensor,
    generator: torch.Generator,
) -> None:
    """Set directions `columns` [n] of all sides, alike, to the low-rank parts of the gradients of `samples` [n].

    Each is of unit norm, and has a tenth of a random direction mixed in. Columns that the sides do not have are passed
    over: another process holds them.
    """
    first = sides[0]
    selected = gradients.select(samples)
    wide = torch.promote_types(selected.dtype, torch.float32)  # the decompositions take nothing narrower
    chosen = selected.to(torch.empty(0, dtype=wide, device=selected.device))
    start = Directions(first.shapes, first.ranks(), len(columns), generator).to(selected.device, wide)
    norms = chosen.squared_norm().sqrt().clamp_min(torch.finfo(wide).tiny)
    for name, piece in start.items():
        parts = _low_rank(chosen, name, piece, norms)
        for parameter, part in zip(piece.parameters(), parts, strict=True):
            parameter.mul_(NOISE)
            parameter.add_(part)
    start.normalize_()
    held = (columns >= 0) & (columns < first.n_subnetworks)
    for side in sides:
        for parameter, value in zip(side.parameters(), start.parameters(), strict=True):
            parameter[columns[held]] = value[held].to(parameter)


def _low_rank(gradients: Gradients, name: str, piece: torch.nn.Module, norms: Tensor) -> list[Tensor]:
    """Approximate one parameter's gradients, divided by norms [n], by the factors of a piece, in its order."""
    if isinstance(piece, Whole):
        return [gradients.matrix(name)[:, :, 0] / norms[:, None]]
    if isinstance(piece, LowRank):
        u, s, v = singular(gradients, name)
        rank = piece.left.shape[1]
        root = (s / norms[:, None]).sqrt()[:, :rank, None]
        return [_padded(u.mT[:, :rank] * root, rank), _padded(v.mT[:, :rank] * root, rank)]
    assert isinstance(piece, Tucker)
    scale = norms.view(-1, *[1] * len(gradients.shapes[name]))
    return truncated(gradients.matrix(name).reshape(-1, *gradients.shapes[name]) / scale, piece.core.shape[1:])


def truncated(tensors: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Approximate tensors [n, d0, d1, ...] as Tucker products: the core [n, r0, r1, ...], then the modes [n, r, d].

    By the truncated higher-order singular value decomposition; the modes' rows are orthonormal.
    """
    core, modes = tensors, []
    for axis, rank in enumerate(ranks, 1):
        vectors = torch.linalg.svd(core.movedim(axis, 1).flatten(2), full_matrices=False).U[:, :, :rank]
        modes.append(_padded(vectors.mT, rank))
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


def _padded(rows: Tensor, n: int) -> Tensor:
    """Append zero rows: [K, m <= n, D] -> [K, n, D]."""
    return torch.nn.functional.pad(rows, (0, 0, 0, n - rows.shape[1]))
