"""Which samples show best what a subnetwork acts on: the ones of largest impact, no text twice."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Contexts(NamedTuple):
    """The places in the data of largest impact on each subnetwork, at most one per row of the data."""

    rows: Tensor  # [K, n] int64
    positions: Tensor  # [K, n] int64
    impacts: Tensor  # [K, n], descending; -inf where there are fewer than n


def top_contexts(impacts: Tensor, n: int, tokens: Tensor | None = None) -> Contexts:
    """Return the n places of largest impact for each subnetwork, in different rows.

    impacts: [rows, positions, K]. tokens: [rows, positions] of a language model, whose output at a position depends on
    the tokens up to it: where rows begin alike, the shared beginning counts once, with the mean of their impacts.
    """
    n_rows, n_positions, n_subnetworks = impacts.shape
    if tokens is not None:
        impacts = _shared_beginnings(impacts, tokens)
    by_row, positions = impacts.max(1)  # [rows, K]
    best, rows = by_row.topk(min(n, n_rows), dim=0)
    return Contexts(rows.mT, positions.gather(0, rows).mT, best.mT)


def _shared_beginnings(impacts: Tensor, tokens: Tensor) -> Tensor:
    """Give the first of all places with the same tokens so far the mean of their impacts, and the others −inf."""
    code = torch.zeros(len(tokens), dtype=torch.int64)
    codes = []
    for column in tokens.cpu().to(torch.int64).unbind(1):  # a rolling hash of 64 bits, which wraps around
        code = (code ^ (column + 0x9E3779B9)) * 6364136223846793005 + 1442695040888963407
        codes.append(code)
    values = impacts.flatten(0, 1)
    real = (values > -torch.inf).any(1).nonzero()[:, 0]  # padding may look like the end of another row
    flat = torch.stack(codes, 1).flatten()[real]
    _, group, count = flat.unique(return_inverse=True, return_counts=True)
    mean = values.new_zeros(len(count), values.shape[1]).index_add_(0, group, values[real]) / count[:, None]
    first = torch.full((len(count),), len(flat)).scatter_reduce_(0, group, torch.arange(len(flat)), "amin")
    out = torch.full_like(values, -torch.inf)
    out[real[first]] = mean
    return out.view(impacts.shape)
