"""Compute the loss of a batch: the squared reconstruction error of its gradients, relative to their squared norm.

    loss = Σ_s ‖g_s − ĝ_s‖² / Σ_s ‖g_s‖²,   ĝ_s = Σ_{k kept for s} c_sk Vout_k,   c_sk = <Vin_k, g_s>
    ‖g_s − ĝ_s‖² = ‖g_s‖² − 2 Σ_k c_sk <Vout_k, g_s> + c_sᵀ M c_s,   M[k, j] = <Vout_k, Vout_j>

No reconstruction is formed. Everything on the right is summed over the parameter tensors.
"""

import math
from collections.abc import Sequence
from functools import cache, reduce
from typing import NamedTuple

import torch
from torch import Tensor

import l3d_kernels as lk
from l3d.decomposition.costs import Plan, coactive_is_cheaper
from l3d.decomposition.directions import Directions, Piece, Whole
from l3d.decomposition.flat import flat_residual
from l3d.decomposition.project import project, project_at, project_topk
from l3d.gradients.factors import Gradients
from l3d_kernels import SparseCoefficients, cpu
from l3d_kernels.splitting import energy_costs


class Objective(NamedTuple):
    """The loss of one batch and its kept coefficients."""

    loss: Tensor  # [] differentiable: the squared ratio; [groups] where there are several
    kept: SparseCoefficients
    squared_norm: Tensor  # [] Σ_s ‖g_s‖², which the loss is relative to
    residual: Tensor  # [S] or [S, groups], differentiable: ‖g_s − ĝ_s‖²

    def or_zero(self) -> Tensor:
        """Return the loss, but 0 where all gradients are zero: [] or [groups], with derivatives that are then zero."""
        norm = torch.where(self.squared_norm == 0, 1, self.squared_norm)
        return self.residual.sum(0) / norm


def n_kept(k: float, n_samples: int, n_subnetworks: int) -> int:
    """Return how many coefficients of a batch are kept: floor(k·S·K + ½), at least one.

    >>> n_kept(0.1, 32, 5)
    16
    """
    return max(1, math.floor(k * n_samples * n_subnetworks + 0.5))


def objective(
    gradients: Gradients, encoder: Directions, decoder: Directions, k: float, plan: Plan = Plan()
) -> Objective:
    """Compute the loss of a batch at the kept fraction k.

    With several groups, the directions are so many decompositions side by side, each with its own top-k and loss: only
    the gradients are shared. The value does not depend on the plan.
    """
    n = n_kept(k, gradients.n_samples, encoder.n_subnetworks // plan.n_groups)
    plan = plan.for_batch(gradients, encoder, n * plan.n_groups)
    if plan.small:
        return relative(*flat_residual(gradients, encoder, decoder, n, plan.n_groups))
    kept, overlap = keep(gradients, encoder, decoder, n, plan)
    norms = gradients.squared_norm_in_range(plan.backend)
    return relative(kept, residual_norms(norms, kept, overlap, energy(kept, decoder, plan)), norms)


def relative(kept: SparseCoefficients, residual: Tensor, squared_norms: Tensor) -> Objective:
    """Make the objective of residuals [S, groups] and norms [S]: their ratio, both summed over samples."""
    squared_norm = squared_norms.sum()
    loss = residual.sum(0) / squared_norm
    if residual.shape[1] == 1:
        loss, residual = loss[0], residual[:, 0]
    return Objective(loss, kept, squared_norm, residual)


def keep(
    gradients: Gradients, encoder: Directions, decoder: Directions, n: int, plan: Plan
) -> tuple[SparseCoefficients, Tensor]:
    """Return the n coefficients kept in each group, and <Vout_k, g_s> at the same pairs [N]; both differentiable."""
    sides = encoder, decoder
    sums, sampled = everywhere(gradients, sides, plan)
    if not sampled:
        kept = lk.batch_topk(sums[0], n, plan.n_groups, backend=plan.backend)
        return kept, sums[1][kept.rows, kept.columns]
    with torch.no_grad():
        kept = project_topk(gradients, encoder, sums[0].detach(), n, sampled, plan)
    values, overlap = at_pairs(gradients, sides, sums, kept, sampled, plan)
    return kept._replace(values=values), overlap


Sides = tuple[Directions, Directions]  # encoder and decoder


def everywhere(gradients: Gradients, sides: Sides, plan: Plan) -> tuple[tuple[Tensor, ...], list[str]]:
    """Return both sides' <V_k, g_s> [S, K] over the tensors that are projected everywhere, and the others' names.

    Encoder and decoder at once: a gradient that is multiplied out on the fly is so only once.
    """
    assert plan.paths is not None
    sampled = [name for name, path in plan.paths.items() if path.sampled]
    both = project(gradients, sides, [name for name in plan.paths if name not in sampled], plan)
    return both.split(sides[0].n_subnetworks, dim=1), sampled


def at_pairs(
    gradients: Gradients, sides: Sides, sums: Sequence[Tensor], kept: SparseCoefficients, sampled: list[str], plan: Plan
) -> tuple[Tensor, Tensor]:
    """Return <Vin_k, g_s> and <Vout_k, g_s> at the kept pairs, [N] each: `everywhere`'s and the sampled tensors'."""
    values, overlap = (each[kept.rows, kept.columns] for each in sums)
    if not sampled:
        return values, overlap
    encoder, decoder = (project_at(gradients, side, kept, sampled, plan) for side in sides)
    return values + encoder, overlap + decoder


def residual_norms(squared_norms: Tensor, kept: SparseCoefficients, overlap: Tensor, energies: Tensor) -> Tensor:
    """Return ‖g_s − ĝ_s‖²: [S, groups].

    From ‖g_s‖² [S], the kept coefficients, <Vout_k, g_s> at the kept pairs [N], and ‖ĝ_s‖² [S, groups].
    """
    explained = kept._replace(values=kept.values * overlap).dense().unflatten(1, (energies.shape[1], -1)).sum(2)
    return squared_norms[:, None] - 2 * explained + energies


def energy(kept: SparseCoefficients, decoder: Directions, plan: Plan) -> Tensor:
    """Return ‖ĝ_s‖² over all tensors together, for each group of directions: [S, groups]."""
    coactive, n_groups, backend = plan.coactive, plan.n_groups, plan.backend
    if coactive is None:
        coactive = coactive_is_cheaper(decoder, kept, n_groups)
    if not coactive:
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in (kept.values, *decoder.parameters()))
        by_gram, by_tiles = energy_costs(kept.shape, decoder.sizes(), trains)
        if n_groups > 1 or by_gram <= by_tiles or backend == "triton":  # which has no kernel for tiles
            coefficients = kept.dense().unflatten(1, (n_groups, -1)).transpose(0, 1)  # [groups, S, K]
            return ((coefficients @ decoder.grams(n_groups, backend)) * coefficients).sum(2).mT
    by_group = kept.by_group(n_groups)
    dense = by_group.dense if coactive else cache(by_group.dense)  # for tiles made once

    def of_piece(piece: Piece) -> Tensor:
        if isinstance(piece, Whole):
            return (dense() @ piece.vector).square().sum(1)
        if coactive:
            return lk.gram_energy_coactive(by_group, *piece.factors(), backend=backend)
        return cpu.energy_by_tiles(dense(), *piece.factors())

    alone, energies = [piece for _, piece in decoder.items()], []
    if coactive and (
        backend == "triton" or kept.values.device.type != "cpu"
    ):  # kernels take many matrices in one launch
        factors = [piece.factors() for piece in alone if not isinstance(piece, Whole)]
        if factors:
            energies.append(lk.gram_energy_coactive(by_group, *zip(*factors, strict=True), backend=backend))
        alone = [piece for piece in alone if isinstance(piece, Whole)]
    return reduce(torch.add, energies + [of_piece(piece) for piece in alone]).unflatten(0, (-1, n_groups))
