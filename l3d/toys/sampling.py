"""Draw inputs of the toy models: features that are rarely present, alone or in groups."""

import torch
from torch import Tensor


def sparse_features(n: int, n_features: int, generator: torch.Generator, probability: float = 0.05) -> Tensor:
    """Draw n points; a feature is present with a probability, then uniform in [0, 1], else 0: [n, n_features].

    Points without any feature are dropped and drawn again.
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
    """Draw `sparse_features` with values uniform in [-1, 1] where present: [n, n_features]."""
    values = sparse_features(n, n_features, generator)
    return torch.where(torch.rand(values.shape, generator=generator) < 0.5, values, -values)


def grouped_features(n: int, n_features: int, generator: torch.Generator, size: int) -> Tensor:
    """Draw points whose features come in groups of `size` neighbours that are present together: [n, n_features].

    Each group is present with probability 0.05; its features are then independent and uniform in [0, 1].
    """
    present = sparse_features(n, n_features // size, generator) > 0
    return torch.rand(n, n_features, generator=generator) * present.repeat_interleave(size, 1)
