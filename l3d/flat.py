"""The loss of a small problem by few operations, everything multiplied out: where calls cost more than the work.

    ‖G − C Vout‖² per sample,   C = top-k of G Vinᵀ,   G [S, P] and V [K, P] over all P entries of the parameters

The same value as `l3d.objective`'s, which takes this path by `is_small`. The toys are small.
"""

import torch
from torch import Tensor

import l3d_kernels as lk
from l3d.directions import Directions, Whole
from l3d.factors import Gradients

# Multiply-adds of G Vᵀ up to which this is the faster path. Forward and backward, on one of two cores, in ms:
#     tms, one start 4,000: 1.20 -> .53;  ten starts 40,000: 1.40 -> .68;  tms_40_10, four starts 4,300,000: 2.2 -> 2.0
SMALL = 1 << 20


def is_small(gradients: Gradients, directions: Directions, backend: str = "auto") -> bool:
    """Tell whether this is the path to take: on a CPU, where the kernels are not asked for."""
    if gradients.device.type != "cpu" or backend not in ("auto", "torch"):
        return False
    n_entries = sum(shape.numel() for shape in gradients.shapes.values())
    return gradients.n_samples * directions.n_subnetworks * n_entries <= SMALL


def flat_residual(
    gradients: Gradients, encoder: Directions, decoder: Directions, n: int, n_groups: int = 1
) -> tuple[lk.SparseCoefficients, Tensor, Tensor]:
    """Return what is kept, ‖g_s − ĝ_s‖² [S, groups] (differentiable) and ‖g_s‖² [S]; see `l3d.objective`."""
    flat = flattened(gradients, encoder)
    coefficients = flat @ multiplied_out(encoder).mT
    kept = lk.batch_topk(coefficients, n, n_groups, backend="torch")
    mask = torch.zeros_like(coefficients)
    mask[kept.rows, kept.columns] = 1
    code = (coefficients * mask).unflatten(1, (n_groups, -1)).transpose(0, 1)  # [groups, S, K]
    reconstruction = code @ multiplied_out(decoder).unflatten(0, (n_groups, -1))  # [groups, S, P]
    return kept, (flat - reconstruction).square().sum(2).mT, flat.square().sum(1)


def flattened(gradients: Gradients, directions: Directions) -> Tensor:
    """Return the gradients as rows over the entries of all parameters, in the directions' order: [S, P]."""
    return torch.cat([gradients.matrix(name).flatten(1) for name, _ in directions.items()], 1)


def multiplied_out(directions: Directions) -> Tensor:
    """Return the directions as rows over the entries of all parameters: [K, P]."""
    rows: list[Tensor] = []
    for _, piece in directions.items():
        if isinstance(piece, Whole):
            rows.append(piece.vector)
        else:
            left, right = piece.factors()
            rows.append((left.mT @ right).flatten(1))
    return torch.cat(rows, 1)
