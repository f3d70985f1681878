"""Form low-rank directions V_k = Σ_r left[k, r] ⊗ right[k, r], and turn gradients to V into those to its factors.

The other files here form V for a few rows of O at a time, so that [K, O, I] exists only where it is small.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from l3d_kernels.splitting import pieces


def directions(left: Tensor, right: Tensor) -> Tensor:
    """Materialise the directions: left [K, R, O], right [K, R, I] -> V [K, O, I]."""
    return left.mT @ right


def tiles_of(left: Tensor, right: Tensor, n_rows: int = 0) -> list[slice]:
    """Cut the outputs O so that a tile of V [K, o, I], or of as many gradients as `n_rows`, fits in one piece."""
    return pieces(left.shape[2], max(n_rows, left.shape[0]) * right.shape[2])


def dense_pieces(grad: Tensor, left: Tensor) -> list[tuple[slice, Tensor]]:
    """Cut gradients [S, O, I] along O: pairs of a slice of O and the entries there [S, o * I], a view."""
    width, flat = grad.shape[2], grad.flatten(1)
    cut = tiles_of(left, grad, grad.shape[0])
    return [(piece, flat[:, piece.start * width : piece.stop * width]) for piece in cut]


def to_factors(tiles: Iterable[tuple[slice, Tensor]], left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Turn gradients to V, given as pairs of a slice of O and d_v [K, o, I], into those to left and right."""
    lefts: list[Tensor] = []
    d_right: Tensor | None = None
    for piece, d_v in tiles:
        # Not made contiguous: that costs a tenth. Below about rank 8 the transposed product is as fast or faster.
        lefts.append(right @ d_v.mT if right.shape[1] < 8 else (d_v @ right.mT).mT)
        own = left[:, :, piece] @ d_v
        d_right = own if d_right is None else d_right.add_(own)
    if d_right is None:
        return torch.zeros_like(left), torch.zeros_like(right)
    return lefts[0] if len(lefts) == 1 else torch.cat(lefts, 2), d_right
