"""Recover circuits planted in networks that no other test uses, by default settings, from any seed.

The weights are set by hand, as in `methods.planted`: there are perceptrons, here also convolutions and embeddings.
Features and sizes are drawn by the seed; all gains are alike.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import l3d
from bench.methods.planted import Direction, Planted, circuits_of, orthonormal, perceptron, sparse


def drawn(seed: int, n_layers: int, activation: Callable[[], nn.Module], signed: bool = False) -> Planted:
    """A perceptron with 7 to 11 features."""
    n = int(torch.randint(7, 12, (), generator=torch.Generator().manual_seed(seed)))
    return perceptron(seed, n, 0.05, n_layers, activation, signed)


class Images(nn.Module):
    """Two convolutions, a mean over the picture, a head."""

    def __init__(self, n_channels: int, n: int, n_outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_channels, 2 * n, 3, bias=False)
        self.mix = nn.Conv2d(2 * n, n, 1, bias=False)
        self.head = nn.Linear(n, n_outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(torch.relu(self.conv(x)))).mean((2, 3)))


def pictures(seed: int) -> Planted:
    """A feature is a mixture of channels, of one strength all over the picture but for noise."""
    generator = torch.Generator().manual_seed(seed)
    n, n_channels, n_outputs, size = 6, 9, 10, 5
    u, v = orthonormal(n_channels, n, generator), orthonormal(n_outputs, n, generator)
    model = Images(n_channels, n, n_outputs).eval()
    kernels = 0.2 + torch.rand(n, 2, 3, 3, generator=generator)
    kernels = kernels / kernels.flatten(2).norm(dim=2)[:, :, None, None]
    model.conv.weight.data = torch.einsum("ch,hikl->hickl", u, kernels).flatten(0, 1)
    weights = 0.6 + 0.8 * torch.rand(n, 2, generator=generator)
    weights = weights / weights.norm(dim=1, keepdim=True)
    model.mix.weight.data = (torch.eye(n)[:, :, None] * weights).flatten(1)[:, :, None, None]
    model.head.weight.data = v
    features = sparse(2000, n, 0.04, generator)
    noise = 0.75 + 0.5 * torch.rand(len(features), n, size, size, generator=generator)
    rows = torch.einsum("nf,nfhw,cf->nchw", features, noise, u)
    alone = u.mT[:, :, None, None].expand(-1, -1, size, size)
    return Planted(model, rows, circuits_of(model, alone, v.mT), float((features != 0).float().mean()))


class Tokens(nn.Module):
    """The sum of a row's embeddings, and a head."""

    def __init__(self, n: int, width: int, n_classes: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(n + 1, width), nn.Linear(width, n_classes, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).sum(1))


def classes(seed: int) -> Planted:
    """One telling token among blanks; its circuit is the gradient of KL from the mean prediction, written out."""
    generator = torch.Generator().manual_seed(seed)
    n, width, n_classes, length = 9, 14, 13, 4
    u, v = orthonormal(width, n, generator), 3 * orthonormal(n_classes, n, generator)
    model = Tokens(n, width, n_classes).eval()
    model.table.weight.data = torch.cat([u.mT, torch.zeros(1, width)])
    model.head.weight.data = v @ u.mT
    rows = torch.full((3000, length), n)
    telling = torch.arange(3000) % n
    rows[torch.arange(3000), torch.randint(length, (3000,), generator=generator)] = telling
    predicted = v.mT.softmax(1)
    circuits = []
    for i, change in enumerate(predicted - predicted.mean(0)):
        back = change @ v @ u.mT
        table = torch.zeros(n + 1, width)
        table[i], table[n] = back, (length - 1) * back  # the blanks of the row feel it too
        circuits.append({"table.weight": table, "head.weight": torch.outer(change, u[:, i])})
    return Planted(model, rows, circuits, 1 / n, "kl", "mean")


def mmcs(circuits: list[Direction], decomposition: l3d.Decomposition) -> float:
    """The mean over circuits of the best |cos| with a subnetwork, over all entries of all matrices."""

    def rows(directions: list[Direction]) -> Tensor:
        flat = [torch.cat([each[name].flatten() for name in circuits[0]]) for each in directions]
        return nn.functional.normalize(torch.stack(flat).double(), dim=1)

    found = [decomposition.subnetwork(i) for i in range(decomposition.n_subnetworks)]
    return float((rows(circuits) @ rows(found).mT).abs().amax(1).mean())


NETWORKS: dict[str, Callable[[int], Planted]] = {
    "relu": lambda seed: drawn(seed, 2, nn.ReLU),
    "deep": lambda seed: drawn(seed, 3, nn.ReLU),
    "linear": lambda seed: drawn(seed, 2, nn.Identity, signed=True),
    "conv": pictures,
    "embedding": classes,
}


@pytest.mark.parametrize(
    "name, seed",
    [("relu", 101), ("relu", 202), ("deep", 101), ("deep", 202), ("linear", 101), ("conv", 101), ("embedding", 101)],
)
def test_planted_circuits_are_recovered(name: str, seed: int) -> None:
    """One subnetwork per circuit of rank 1, k what the features' own share is, a single start."""
    planted = NETWORKS[name](seed)
    d = l3d.decompose(
        planted.model,
        planted.data,
        n_subnetworks=len(planted.circuits),
        rank=1,
        k=round(planted.share, 3),
        divergence=planted.divergence,
        reference=planted.reference,
        seed=seed,
        steps=1000,
        progress=False,
    )
    assert mmcs(planted.circuits, d) >= 0.98
