"""Find the samples of largest impact on each subnetwork, without repeated texts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Contexts(NamedTuple):
    """Each subnetwork's samples of largest impact, at most one per row of the data."""

    rows: Tensor  # [K, n] int64
    positions: Tensor  # [K, n] int64
    impacts: Tensor  # [K, n], descending; -inf fills up where there are fewer than n

    def __repr__(self) -> str:
        """Return the sizes and the largest impact."""
        n_subnetworks, n = self.impacts.shape
        return f"Contexts({n_subnetworks} subnetworks, {n} samples each; largest impact {self.impacts.max():.4g})"


def top_contexts(impacts: Tensor, n: int, tokens: Tensor | None = None) -> Contexts:
    """Return each subnetwork's n samples of largest impact, all from different rows.

    impacts: [rows, positions, K]. tokens: [rows, positions], for a language model. Its output at a position depends
    only on the tokens up to there, so rows with the same beginning give the same samples. Such a sample counts once,
    with the mean of the rows' impacts.
    """
    n_rows, n_positions, n_subnetworks = impacts.shape
    if tokens is not None:
        impacts = _merge_shared_prefixes(impacts, tokens)
    by_row, positions = impacts.max(1)  # [rows, K]
    best, rows = by_row.topk(min(n, n_rows), dim=0)
    return Contexts(rows.mT, positions.gather(0, rows).mT, best.mT)


def _merge_shared_prefixes(impacts: Tensor, tokens: Tensor) -> Tensor:
    """Average the impacts of positions with the same tokens up to there: the first gets the mean, the others −inf."""
    code = torch.zeros(len(tokens), dtype=torch.int64, device="cpu")
    codes = []
    for column in tokens.cpu().to(torch.int64).unbind(1):  # a rolling 64-bit hash of the prefix; overflow wraps
        code = (code ^ (column + 0x9E3779B9)) * 6364136223846793005 + 1442695040888963407
        codes.append(code)
    values = impacts.flatten(0, 1)
    real = (values > -torch.inf).any(1).nonzero()[:, 0]  # without padding: its prefix may equal another row's
    flat = torch.stack(codes, 1).flatten()[real]
    _, group, count = flat.unique(return_inverse=True, return_counts=True)
    mean = values.new_zeros(len(count), values.shape[1]).index_add_(0, group, values[real]) / count[:, None]
    places = torch.arange(len(flat), device="cpu")
    first = torch.full((len(count),), len(flat), device="cpu").scatter_reduce_(0, group, places, "amin")
    out = torch.full_like(values, -torch.inf)
    out[real[first]] = mean
    return out.view(impacts.shape)
