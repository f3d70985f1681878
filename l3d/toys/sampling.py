"""Inputs of the toy models: features that are each present rarely, alone or in groups."""

import torch
from torch import Tensor


def sparse_features(n: int, n_features: int, generator: torch.Generator, probability: float = 0.05) -> Tensor:
    """Draw n points whose features are each present with some probability and then uniform in [0, 1].

    All-zero points are dropped and drawn again: [n, n_features].
    """
    kept: list[Tensor] = []
    count = 0
    while count < n:
        values = torch.rand(2 * n, n_features, generator=generator)
        values = values * (torch.rand(2 * n, n_features, generator=generator) < probability)
        values = values[values.any(1)]
        kept.append(values)
        count += len(values)
    return torch.cat(kept)[:n]


def signed_features(n: int, n_features: int, generator: torch.Generator) -> Tensor:
    """Draw `sparse_features` whose present values are uniform in [-1, 1]: [n, n_features]."""
    values = sparse_features(n, n_features, generator)
    return torch.where(torch.rand(values.shape, generator=generator) < 0.5, values, -values)


def grouped_features(n: int, n_features: int, generator: torch.Generator, size: int) -> Tensor:
    """Draw points whose features come in groups of neighbours that are present together: [n, n_features].

    Each group is present with probability .05, and its features are then uniform in [0, 1], each by itself.
    """
    present = sparse_features(n, n_features // size, generator) > 0
    return torch.rand(n, n_features, generator=generator) * present.repeat_interleave(size, 1)
