"""Circuits planted in networks that nothing else has seen are recovered, by default settings, from any seed.

The weights are set by hand. Feature i enters along a direction u_i, goes through hidden units of its own and leaves
along v_i; the u_i, and the v_i, are orthonormal but not along the axes. Its circuit is the gradient of its own gain
<v_i, f(u_i)> by the weights. Features and sizes are drawn by the seed; all gains are alike.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import l3d

Direction = dict[str, Tensor]


class Planted(NamedTuple):
    """A network, rows for it, its circuits, and the share of (sample, circuit) pairs in which the circuit acts."""

    model: nn.Module
    data: Tensor
    circuits: list[Direction]
    share: float
    divergence: str = "mse"
    reference: str = "sample"


def orthonormal(n: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw so many orthonormal columns: [n, count]."""
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q[:, :count].float()


def sparse(n: int, count: int, share: float, generator: torch.Generator, signed: bool = False) -> Tensor:
    """Draw features [n, count], each present with a probability and then uniform; no row is empty."""
    values = torch.rand(4 * n, count, generator=generator) * (2 if signed else 1) - (1 if signed else 0)
    values = values * (torch.rand(values.shape, generator=generator) < share)
    return values[values.any(1)][:n]


def circuits_of(model: nn.Module, alone: Tensor, out: Tensor) -> list[Direction]:
    """Differentiate each feature's gain by the matrices: alone [i, ..] its input, out [i, O] its output's direction."""
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    found = []
    for x, v in zip(alone, out, strict=True):
        gradients = torch.autograd.grad((model(x[None])[0] * v).sum(), list(weights.values()))
        found.append(dict(zip(weights, gradients, strict=True)))
    return found


def perceptron(seed: int, n_layers: int, activation: Callable[[], nn.Module], signed: bool = False) -> Planted:
    """Blocks of two units per feature in every hidden layer, those of the first shuffled."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(7, 12, (), generator=generator))
    n_inputs, n_outputs = 2 * n, n + 4
    u, v = orthonormal(n_inputs, n, generator), orthonormal(n_outputs, n, generator)
    sizes = [n_inputs, *[2 * n] * (n_layers - 1), n_outputs]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        first, last = i == 0, i == n_layers - 1
        blocks = 0.6 + 0.8 * torch.rand(n, 1 if last else 2, 1 if first else 2, generator=generator)
        weight = torch.block_diag(*(blocks / torch.linalg.matrix_norm(blocks, 2, keepdim=True)))
        linear = nn.Linear(a, b, bias=False)
        linear.weight.data = weight @ u.mT if first else v @ weight if last else weight
        layers += [linear, activation()]
    model = nn.Sequential(*layers[:-1])
    order = torch.randperm(2 * n, generator=generator)
    model[0].weight.data = model[0].weight.data[order]  # type: ignore[union-attr,operator]
    model[2].weight.data = model[2].weight.data[:, order]  # type: ignore[union-attr,operator]
    features = sparse(4000, n, 0.05, generator, signed)
    return Planted(model.eval(), features @ u.mT, circuits_of(model, u.mT, v.mT), float((features != 0).float().mean()))


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
    "relu": lambda seed: perceptron(seed, 2, nn.ReLU),
    "deep": lambda seed: perceptron(seed, 3, nn.ReLU),
    "linear": lambda seed: perceptron(seed, 2, nn.Identity, signed=True),
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
