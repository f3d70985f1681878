"""Compute squared norms of gradients and of their reconstructions without forming either whole.

    ‖G_s‖² = Σ_tt' (x_t . x_t') (dy_t . dy_t')        ‖ĝ_s‖² = c_sᵀ M c_s,   M[k, j] = <V_k, V_j>

Each has several paths that agree in value; the counted multiply-adds decide which one a call takes.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from l3d_kernels.cpu.directions import directions, tiles_of, to_factors
from l3d_kernels.sparse import SparseCoefficients
from l3d_kernels.splitting import energy_costs, outer, pieces


def gram(left: Tensor | Sequence[Tensor], right: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the inner products <V_k, V_j> of all directions: [K, K]; of lists the sum over their tensors, in order.

    From the factors that takes K²R²(I+O) multiply-adds, from tiles of V K(K+R)·I·O; the cheaper is taken.
    """
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return summed(gram(*own) for own in zip(left, right, strict=True))
    n_subnetworks, rank, n_outputs = left.shape
    n_inputs = right.shape[2]
    if rank == 1:
        return (left[:, 0] @ left[:, 0].mT) * (right[:, 0] @ right[:, 0].mT)
    by_tiles = (n_subnetworks + rank) * n_outputs * n_inputs
    if left.numel() == 0 or by_tiles < n_subnetworks * rank**2 * (n_inputs + n_outputs):
        return gram_by_tiles(left, right)
    return gram_by_factors(left, right)


def gram_by_factors(left: Tensor, right: Tensor) -> Tensor:
    """Compute the Gram matrix as Σ_rr' (left_kr . left_jr')(right_kr . right_jr'): [K, K]."""
    n_subnetworks, rank, _ = left.shape
    flat_left, flat_right = left.flatten(0, 1), right.flatten(0, 1)
    out = []
    for piece in pieces(n_subnetworks, n_subnetworks * rank * rank):
        products = (left[piece].flatten(0, 1) @ flat_left.mT) * (right[piece].flatten(0, 1) @ flat_right.mT)
        out.append(products.view(-1, rank, n_subnetworks, rank).sum((1, 3)))
    return torch.cat(out)


def gram_by_tiles(left: Tensor, right: Tensor) -> Tensor:
    """Compute the Gram matrix as V Vᵀ, with V formed for a few rows of O at a time: [K, K]."""
    return _GramByTiles.apply(left, right)


class _GramByTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        out = left.new_zeros(left.shape[0], left.shape[0])
        for piece in tiles_of(left, right):
            v = directions(left[:, :, piece], right).flatten(1)
            out.addmm_(v, v.mT)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        both = d_out + d_out.mT
        tiles = ((piece, directions(left[:, :, piece], right)) for piece in tiles_of(left, right))
        return to_factors(((piece, (both @ v.flatten(1)).view_as(v)) for piece, v in tiles), left, right)


def gram_energy(kept: SparseCoefficients, left: Tensor, right: Tensor) -> Tensor:
    """Return ‖ĝ_s‖² of every sample: [S].

    Over co-active pairs where their number Σ_s n_s² is below K²/2 (n_s: kept in sample s). Else from the full Gram
    matrix, or, for few samples, from tiles of ĝ.
    """
    co_active = int(kept.row_offsets.diff().square().sum())
    if 2 * co_active < left.shape[0] ** 2:
        return gram_energy_coactive(kept, left, right)
    backward = torch.is_grad_enabled() and any(each.requires_grad for each in (kept.values, left, right))
    by_gram, by_tiles = energy_costs(kept.shape, [(left.shape[1], left.shape[2], right.shape[2])], backward)
    if by_tiles < by_gram:
        return energy_by_tiles(kept.dense(), left, right)
    return energy_from_gram(kept, gram(left, right))


def energy_from_gram(kept: SparseCoefficients, gram_matrix: Tensor) -> Tensor:
    """Return the quadratic form c_sᵀ M c_s of every sample's kept coefficients: [S]; gram_matrix [K, K]."""
    coefficients = kept.dense()
    return ((coefficients @ gram_matrix) * coefficients).sum(1)


def energy_by_tiles(coefficients: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ‖ĝ_s‖² from ĝ itself, a few rows of O at a time: [S]; coefficients [S, K]. S·K·I·O multiply-adds."""
    return _EnergyByTiles.apply(coefficients, left, right)


class _EnergyByTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(coefficients, left, right)
        out = left.new_zeros(coefficients.shape[0])
        for piece in tiles_of(left, right):
            tile = coefficients @ directions(left[:, :, piece], right).flatten(1)  # [S, o * I] of ĝ
            out += torch.linalg.vector_norm(tile, dim=1).square()
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        coefficients, left, right = ctx.saved_tensors
        d_coefficients = d_out.new_zeros(coefficients.shape)  # batched where d_out is

        def d_v() -> Iterator[tuple[slice, Tensor]]:
            for piece in tiles_of(left, right):
                v = directions(left[:, :, piece], right)
                d_tile = (2 * d_out[:, None] * coefficients) @ v.flatten(1)
                d_coefficients.addmm_(d_tile, v.flatten(1).mT)
                yield piece, (coefficients.mT @ d_tile).view_as(v)

        return d_coefficients, *to_factors(d_v(), left, right)


def gram_energy_coactive(
    kept: SparseCoefficients, left: Tensor | Sequence[Tensor], right: Tensor | Sequence[Tensor]
) -> Tensor:
    """Return ‖ĝ_s‖² over the pairs of subnetworks kept in the same sample: [S]. R²(I+O) Σ_s n_s² multiply-adds.

    Of lists the sum over their tensors, in order.
    """
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return summed(gram_energy_coactive(kept, *own) for own in zip(left, right, strict=True))
    n_samples, _ = kept.shape
    rank = left.shape[1]
    counts = kept.row_offsets.diff()
    if kept.rows.numel() == 0:
        return left.new_zeros(n_samples) + 0 * (left.sum() + right.sum())
    longest = int(counts.max())
    slot = torch.arange(longest, device=left.device)
    per_sample = longest * rank * (left.shape[2] + right.shape[2] + 2 * longest * rank)
    chunks = []
    for piece in pieces(n_samples, per_sample):
        valid = slot < counts[piece, None]  # [s, m]
        entries = (kept.row_offsets[:-1][piece, None] + slot * valid).clamp_max(kept.rows.numel() - 1)
        values = torch.where(valid, kept.values[entries], 0)  # [s, m]
        columns = kept.columns[entries]
        # The left factor carries the coefficient, so that padding contributes exact zeros.
        weighted = (left[columns] * values[:, :, None, None]).flatten(1, 2)  # [s, m*R, O]
        other = right[columns].flatten(1, 2)  # [s, m*R, I]
        chunks.append(((weighted @ weighted.mT) * (other @ other.mT)).sum((1, 2)))
    return torch.cat(chunks)


def squared_gradient_norm(x: Tensor | Sequence[Tensor], dy: Tensor | Sequence[Tensor]) -> Tensor:
    """Return ‖G_s‖² of every sample: [S]; of lists the sum over their tensors, in order.

    From the factors that takes T²(I+O) multiply-adds a sample, from G T·I·O; the cheaper is taken.
    """
    if not (isinstance(x, Tensor) and isinstance(dy, Tensor)):
        return summed(squared_gradient_norm(*own) for own in zip(x, dy, strict=True))
    n_sequences, n_positions = x.shape[:2]
    if n_sequences == 0:
        return dy.sum((1, 2))
    share = dy.shape[0] // n_sequences
    if n_positions == 1:
        squares = x.square().sum((1, 2)) if x.is_floating_point() else dy.new_ones(n_sequences)
        return squares.repeat_interleave(share) * dy.square().sum((1, 2))
    out = []
    if x.is_floating_point() and x.shape[2] * dy.shape[2] < n_positions * (x.shape[2] + dy.shape[2]):
        for piece in pieces(n_sequences, share * x.shape[2] * dy.shape[2]):
            grad = outer(x[piece], dy[piece.start * share : piece.stop * share])
            out.append(grad.square().sum((1, 2)))
        return torch.cat(out)
    for piece in pieces(n_sequences, share * n_positions * n_positions):
        part = x[piece]
        same = part @ part.mT if x.is_floating_point() else (part[:, :, None] == part[:, None, :]).to(dy.dtype)
        own = dy[piece.start * share : piece.stop * share]
        out.append((same.repeat_interleave(share, 0) * (own @ own.mT)).sum((1, 2)))
    return torch.cat(out)


def summed(terms: Iterable[Tensor]) -> Tensor:
    """Add tensors in their order; at least one."""
    total, *others = terms
    for each in others:
        total = total + each
    return total
