"""Set subnetworks to the low-rank parts of single samples' gradients.

A dead subnetwork restarts so: from a sample that the others reconstruct badly. Samples are drawn with probability
proportional to a weight, as k-means++ draws its centres.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from l3d.decomposition.directions import FLOAT32_CPU, Directions, LowRank, Tucker, Whole
from l3d.decomposition.low_rank import padded, singular, truncated
from l3d.gradients.chunks import Chunks
from l3d.gradients.factors import Gradients

NOISE = 0.1  # share of random entries mixed in: a factor of zeros has no gradient and would stay zero


@torch.no_grad()
def draw_samples(weights: Tensor, n: int, generator: Generator) -> Tensor:
    """Draw n samples with probability proportional to weights [S]: [n] int64, without replacement while there are any.

    Negative and non-finite weights count as zero; if all are zero, every sample is equally likely.
    """
    if n == 0:
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    weights = weights.detach().double().cpu().nan_to_num(0, 0, 0).clamp_min(0)
    if not weights.any():
        weights = torch.ones_like(weights)
    available = int((weights > 0).sum())
    counts = [min(available, n - start) for start in range(0, n, available)]
    return torch.cat([torch.multinomial(weights, count, generator=generator) for count in counts])


@torch.no_grad()
def set_from_samples(
    sides: Sequence[Directions], columns: Tensor, gradients: Gradients | Chunks, samples: Tensor, generator: Generator
) -> None:
    """Set directions `columns` [n] of all sides, alike, to the low-rank parts of the gradients of `samples` [n].

    Each has unit norm, with a tenth of a random direction mixed in. Columns that the sides do not hold are skipped:
    another process holds them.
    """
    first = sides[0]
    selected = gradients.select(samples)
    wide = torch.promote_types(selected.dtype, torch.float32)  # the decompositions take nothing narrower
    chosen = selected.to(torch.empty(0, dtype=wide, device=selected.device))
    start = Directions(first.shapes, first.ranks(), len(columns), generator, factory=FLOAT32_CPU)
    start = start.to(selected.device, wide)
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
        return [padded(u.mT[:, :rank] * root, rank), padded(v.mT[:, :rank] * root, rank)]
    assert isinstance(piece, Tucker)
    scale = norms.view(-1, *[1] * len(gradients.shapes[name]))
    return truncated(gradients.matrix(name).reshape(-1, *gradients.shapes[name]) / scale, piece.core.shape[1:])
