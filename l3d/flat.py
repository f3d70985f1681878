"""The loss of a small problem by few operations, everything multiplied out: where calls cost more than the work.

    ‖G − C Vout‖² per sample,   C = top-k of G Vinᵀ,   G [S, P] and V [K, P] over all P entries of the parameters

The same value as `l3d.objective`'s, which takes this path by `is_small`. The toys are small. Its derivatives are
written out, since walking an autograd graph of so small operations takes longer than they do.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import l3d_kernels as lk
from l3d.directions import Directions, Tucker, Whole
from l3d.factors import Gradients
from l3d_kernels import reference

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
    """Return what is kept, ‖g_s − ĝ_s‖² [S, groups] and ‖g_s‖² [S], of which only the second is differentiable."""
    sides = [_factors(encoder), _factors(decoder)]
    with torch.no_grad():
        batch, coefficients, _ = _reconstruct(gradients, encoder, sides, n, n_groups)
        kept = lk.batch_topk(coefficients, n, n_groups, backend="torch")
    residual = _SquaredNorm.apply(batch, *sides[0], *sides[1])
    return kept, residual, batch.flat.square().sum(1)


def has_pairs_only(directions: Directions) -> bool:
    """Tell whether every tensor is held as a pair of factors or a vector, none as a Tucker product."""
    return not any(isinstance(piece, Tucker) for piece in directions.pieces)


@torch.no_grad()
def flat_differentiated(
    gradients: Gradients, encoder: Directions, decoder: Directions, n: int, n_groups: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Return losses and derivatives at once. No tensor may be held as a Tucker product: `l3d.objective` does those.

    That is: the losses, [] or [groups]; ‖g_s − ĝ_s‖² [S, groups]; which coefficients are kept, bool [S, groups * K];
    each group's least kept magnitude [groups]; the derivatives by the decoder's parameters and then the encoder's.
    """
    sides = [_factors(encoder), _factors(decoder)]
    batch, _, thresholds = _reconstruct(gradients, encoder, sides, n, n_groups)
    residual = batch.difference.square().sum(2).mT
    squared_norm = batch.flat.square().sum()
    by_encoder, by_decoder = _by_directions(batch, batch.difference * (-2 / squared_norm))
    derivatives = [*_derivatives(by_decoder, sides[1]), *_derivatives(by_encoder, sides[0])]
    loss = residual.sum(0) / squared_norm
    return loss if n_groups > 1 else loss[0], residual, batch.mask, thresholds, derivatives


def _reconstruct(
    gradients: Gradients, encoder: Directions, sides: list[list[Tensor]], n: int, n_groups: int
) -> tuple["_Batch", Tensor, Tensor]:
    """Encode and reconstruct a batch; return it, all its coefficients [S, groups * K], and the thresholds."""
    flat = flattened(gradients, encoder)
    encoders, decoders = (_multiplied_out(side) for side in sides)
    coefficients = flat @ encoders.mT
    mask, thresholds = reference.largest(coefficients, n, n_groups)
    code = (coefficients * mask).view(len(flat), n_groups, -1).transpose(0, 1)  # [groups, S, K]
    decoders = decoders.view(n_groups, -1, flat.shape[1])  # [groups, K, P]
    return _Batch(flat, mask, code, decoders, flat - code @ decoders, len(sides[0])), coefficients, thresholds


class _Batch(NamedTuple):
    """What the derivatives of a batch's residuals are made of."""

    flat: Tensor  # [S, P] gradients
    mask: Tensor  # [S, groups * K] bool: where a coefficient is kept
    code: Tensor  # [groups, S, K] kept coefficients, and zeros
    decoders: Tensor  # [groups, K, P]
    difference: Tensor  # [groups, S, P] g − ĝ
    n_factors: int  # of the encoder; the rest are the decoder's


class _SquaredNorm(torch.autograd.Function):
    """‖g_s − ĝ_s‖² [S, groups] as a function of the factors of encoder and decoder."""

    @staticmethod
    def forward(ctx: Any, batch: _Batch, *factors: Tensor) -> Tensor:
        ctx.batch = batch
        ctx.save_for_backward(*factors)
        return batch.difference.square().sum(2).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        batch, factors = ctx.batch, list(ctx.saved_tensors)
        by_encoder, by_decoder = _by_directions(batch, batch.difference * (-2 * upstream.mT[..., None]))
        n = batch.n_factors
        return None, *_derivatives(by_encoder, factors[:n]), *_derivatives(by_decoder, factors[n:])


def _by_directions(batch: _Batch, by_reconstruction: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives by encoder and decoder directions [groups * K, P] from those by ĝ [groups, S, P]."""
    by_decoder = (batch.code.mT @ by_reconstruction).flatten(0, 1)
    by_code = (by_reconstruction @ batch.decoders.mT).transpose(0, 1).flatten(1)  # [S, groups * K]
    return (by_code * batch.mask).mT @ batch.flat, by_decoder


def multiplied_out(directions: Directions) -> Tensor:
    """Return the directions as rows over the entries of all parameters: [K, P]."""
    return _multiplied_out(_factors(directions))


def pulled_back(by_direction: Tensor, directions: Directions) -> list[Tensor]:
    """Return the derivatives by the factors, in the directions' order, from those by the directions: [K, P]."""
    return _derivatives(by_direction, _factors(directions))


def flattened(gradients: Gradients, directions: Directions) -> Tensor:
    """Return the gradients as rows over the entries of all parameters, in the directions' order: [S, P]."""
    return gradients.flat([name for name, _ in directions.items()])


def _factors(directions: Directions) -> list[Tensor]:
    """List every tensor's left and right, or its vectors."""
    factors: list[Tensor] = []
    for _, piece in directions.items():
        factors.extend([piece.vector] if isinstance(piece, Whole) else piece.factors())
    return factors


def _multiplied_out(factors: list[Tensor]) -> Tensor:
    """Return directions, given as `_factors` lists them, as rows over the entries of all parameters: [K, P]."""
    rows, rest = [], iter(factors)
    for factor in rest:  # vectors [K, P]; or left [K, R, O], which right [K, R, I] follows
        rows.append(factor if factor.ndim == 2 else (factor.mT @ next(rest)).flatten(1))
    return torch.cat(rows, 1)


def _derivatives(by_direction: Tensor, factors: list[Tensor]) -> list[Tensor]:
    """Return the derivatives by the factors from those by the directions [K, P]."""
    found: list[Tensor] = []
    start, rest = 0, iter(factors)
    for factor in rest:
        if factor.ndim == 2:
            found.append(by_direction[:, start : start + factor.shape[1]])
            start += factor.shape[1]
            continue
        right = next(rest)
        size = factor.shape[2] * right.shape[2]
        own = by_direction[:, start : start + size].view(-1, factor.shape[2], right.shape[2])  # [K, O, I]
        found += [right @ own.mT, factor @ own]
        start += size
    return found
