"""Coefficients of per-sample gradients along a set of directions, summed over tensors, each by its own path."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

import l3d_kernels as lk
from l3d.costs import Path
from l3d.directions import Directions, Whole
from l3d.factors import Dense, Gradients, Rows


def project(
    gradients: Gradients,
    directions: Directions,
    paths: dict[str, Path],
    names: Collection[str],
    backend: str = "auto",
) -> Tensor:
    """Return the share of <V_k, g_s> that the tensors `names` contribute: [S, K]."""
    total: Tensor | None = None
    for contribution in _contributions(gradients, directions, paths, names, backend):
        total = contribution if total is None else total + contribution
    if total is None:
        shape = (gradients.n_samples, directions.n_subnetworks)
        return torch.zeros(shape, dtype=gradients.dtype, device=gradients.device)
    return total


def _contributions(
    gradients: Gradients, directions: Directions, paths: dict[str, Path], names: Collection[str], backend: str
) -> Iterator[Tensor]:
    for name, piece in directions.items():
        if name not in names or not gradients.parts[name]:
            continue
        if isinstance(piece, Whole):
            yield gradients.matrix(name)[:, :, 0] @ piece.vector.mT
            continue
        left, right = piece.factors()
        if paths[name].materialised and gradients.fits_whole(name):
            yield lk.project_dense(gradients.matrix(name), left, right, backend=backend)
            continue
        for part in gradients.parts[name]:
            if isinstance(part, Dense):
                yield lk.project_dense(part.grad.flatten(2), left, right, backend=backend)
            elif paths[name].materialised:
                yield lk.project_tiled(part.x, part.dy, *_oriented(part, left, right), backend=backend)
            else:
                yield lk.project(part.x, part.dy, *_oriented(part, left, right), backend=backend)


def project_at(
    gradients: Gradients,
    directions: Directions,
    kept: lk.SparseCoefficients,
    names: Collection[str],
    backend: str = "auto",
) -> Tensor:
    """Return the share of <V_k, g_s> that the tensors `names` contribute, at the kept pairs only: [N].

    Every tensor's gradient must be in rows.
    """
    total = torch.zeros(kept.rows.shape, dtype=gradients.dtype, device=gradients.device)
    for name, piece in directions.items():
        if name not in names:
            continue
        left, right = piece.factors()
        for part in gradients.parts[name]:
            assert isinstance(part, Rows)
            total = total + lk.project_at(part.x, part.dy, *_oriented(part, left, right), kept, backend=backend)
    return total


def _oriented(part: Rows, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Order a direction's factors as (meets dy, meets x); `left` is always axis 0 of the stored tensor."""
    return (left, right) if part.x_axis == 1 else (right, left)
