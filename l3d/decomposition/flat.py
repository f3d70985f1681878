"""Compute the loss of a small problem with everything multiplied out, where calls cost more than the arithmetic.

    ‖G − C Vout‖² per sample,   C = top-k of G Vinᵀ,   G [S, P] and V [K, P] over all P entries of the parameters

The same value as `objective`'s, which takes this path by `is_small`. The toys are small; `numpy_step` trains them.
"""

import torch
from torch import Tensor

import l3d_kernels as lk
from l3d.decomposition.directions import Directions, Whole
from l3d.gradients.factors import Gradients

# Multiply-adds of G Vᵀ up to which this is the faster path. A step by the general path and by `numpy_step`, in ms of
# one core (a 4 or 10 behind the name: so many starts side by side):
#     tms 4,000: 1.66, 0.13;  tmcs 35,000: 1.66, 0.14;  high_rank 4 670,000: 1.90, 0.53;
#     tms_40_10 1,100,000: 2.00, 0.70;  tms_40_10 4 4,300,000: 2.94, 2.25;  tms_40_10 10 10,800,000: 5.60, 5.26
SMALL = 5 << 20


def is_small(gradients: Gradients, directions: Directions, backend: str = "auto") -> bool:
    """Tell whether a batch is small enough: on a CPU, unless the kernels are asked for."""
    if gradients.device.type != "cpu" or backend not in ("auto", "torch"):
        return False
    n_entries = sum(shape.numel() for shape in gradients.shapes.values())
    return gradients.n_samples * directions.n_subnetworks * n_entries <= SMALL


def flat_residual(
    gradients: Gradients, encoder: Directions, decoder: Directions, n: int, n_groups: int = 1
) -> tuple[lk.SparseCoefficients, Tensor, Tensor]:
    """Return the kept coefficients, ‖g_s − ĝ_s‖² [S, groups] and ‖g_s‖² [S]; all differentiable."""
    flat = flattened(gradients, encoder)
    kept = lk.batch_topk(flat @ multiplied_out(encoder).mT, n, n_groups, backend="torch")
    code = kept.dense().view(len(flat), n_groups, -1).transpose(0, 1)  # [groups, S, K]
    decoders = multiplied_out(decoder).view(n_groups, -1, flat.shape[1])  # [groups, K, P]
    return kept, (flat - code @ decoders).square().sum(2).mT, flat.square().sum(1)


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


def by_factors(by_direction: Tensor, directions: Directions) -> list[Tensor]:
    """Return the derivatives by the factors, in the directions' order, from those by the directions: [K, P].

    No tensor may be held as a Tucker product.
    """
    found: list[Tensor] = []
    shares = by_direction.split([shape.numel() for shape in directions.shapes.values()], 1)
    for own, (_, piece) in zip(shares, directions.items(), strict=True):
        if isinstance(piece, Whole):
            found.append(own)
            continue
        left, right = piece.factors()
        matrices = own.unflatten(1, (left.shape[2], right.shape[2]))  # [K, O, I]
        found += [right @ matrices.mT, left @ matrices]
    return found


def flattened(gradients: Gradients, directions: Directions) -> Tensor:
    """Return the gradients as rows over the entries of all parameters, in the directions' order: [S, P]."""
    return gradients.flat(list(directions.shapes))
