"""Project per-sample gradients on directions, summed over tensors, each by its own path."""

from collections.abc import Collection, Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

import l3d_kernels as lk
from l3d.decomposition.costs import Plan
from l3d.decomposition.directions import Directions, Whole
from l3d.gradients.factors import Dense, Gradients, Rows


def project(gradients: Gradients, directions: Sequence[Directions], names: Collection[str], plan: Plan) -> Tensor:
    """Return the share of <V_k, g_s> that the tensors `names` contribute, for all directions of all sets: [S, Σ K]."""
    contributions = _contributions(gradients, directions, names, plan)
    first = next(contributions, None)
    if first is None:
        shape = (gradients.n_samples, sum(each.n_subnetworks for each in directions))
        return torch.zeros(shape, dtype=gradients.dtype, device=gradients.device)
    return reduce(torch.add, contributions, first)


def _contributions(
    gradients: Gradients, directions: Sequence[Directions], names: Collection[str], plan: Plan
) -> Iterator[Tensor]:
    for (name, first), *others in zip(*(each.items() for each in directions), strict=True):
        if name not in names or not gradients.parts[name]:
            continue
        pieces = [first, *(piece for _, piece in others)]
        if isinstance(first, Whole):
            yield gradients.matrix(name)[:, :, 0] @ _stacked([piece.vector for piece in pieces]).mT
            continue
        factors = [piece.factors() for piece in pieces]
        left, right = _stacked([left for left, _ in factors]), _stacked([right for _, right in factors])
        if plan.path(name).materialised and gradients.fits_whole(name):
            yield lk.project_dense(gradients.matrix(name), left, right, backend=plan.backend)
            continue
        project_rows = lk.project_tiled if plan.path(name).materialised else lk.project
        for part in gradients.widened(name):
            if isinstance(part, Dense):
                yield lk.project_dense(part.grad.flatten(2), left, right, backend=plan.backend)
            else:
                yield project_rows(part.x, part.dy, *_oriented(part, left, right), backend=plan.backend)


def project_topk(
    gradients: Gradients, directions: Directions, base: Tensor, n: int, names: Sequence[str], plan: Plan
) -> lk.SparseCoefficients:
    """Keep the n largest |base + the share of the tensors `names`| in each group; base [S, K], at least one name.

    The last tensor's share is added and counted as it is made, which saves the selection a pass over the coefficients.
    """
    *others, last = names
    parts = gradients.parts[last]
    if plan.n_groups > 1 or plan.path(last).materialised or len(parts) != 1:
        share = project(gradients, (directions,), names, plan)
        return lk.batch_topk(base + share, n, plan.n_groups, backend=plan.backend)
    if others:
        base = base + project(gradients, (directions,), others, plan)
    (part,) = parts
    assert isinstance(part, Rows)
    left, right = _oriented(part, *dict(directions.items())[last].factors())
    return lk.project_topk(part.x, part.dy, left, right, n, base, backend=plan.backend)


def project_at(
    gradients: Gradients, directions: Directions, kept: lk.SparseCoefficients, names: Collection[str], plan: Plan
) -> Tensor:
    """Return the share of <V_k, g_s> that the tensors `names` contribute, at the kept pairs only: [N].

    Every tensor's gradient must be in rows.
    """
    shares = []
    for name, piece in directions.items():
        for part in gradients.widened(name) if name in names else ():
            assert isinstance(part, Rows)
            sides = _oriented(part, *piece.factors())
            shares.append(lk.project_at(part.x, part.dy, *sides, kept, backend=plan.backend))
    if not shares:
        return torch.zeros(kept.rows.shape, dtype=gradients.dtype, device=gradients.device)
    return reduce(torch.add, shares)


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _oriented(part: Rows, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Order a direction's factors as (meets dy, meets x); `left` is always axis 0 of the stored tensor."""
    return (left, right) if part.x_axis == 1 else (right, left)
