"""Networks whose circuits are set by hand, and the rows to decompose them on.

Feature i enters along a direction u_i, goes through hidden units of its own and leaves along v_i; the u_i, and the
v_i, are orthonormal but not along the axes. Its circuit is the gradient of its own gain <v_i, f(u_i)> by the weights.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

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
    rows: list[Tensor] = []
    while sum(map(len, rows)) < n:
        values = torch.rand(4 * n, count, generator=generator) * (2 if signed else 1) - (1 if signed else 0)
        values = values * (torch.rand(values.shape, generator=generator) < share)
        rows.append(values[values.any(1)])
    return torch.cat(rows)[:n]


def circuits_of(model: nn.Module, alone: Tensor, out: Tensor) -> list[Direction]:
    """Differentiate each feature's gain by the matrices: alone [i, ..] its input, out [i, O] its output's direction."""
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    found = []
    for x, v in zip(alone, out, strict=True):
        gradients = torch.autograd.grad((model(x[None])[0] * v).sum(), list(weights.values()))
        found.append(dict(zip(weights, gradients, strict=True)))
    return found


def perceptron(
    seed: int,
    n: int,
    share: float,
    n_layers: int = 2,
    activation: Callable[[], nn.Module] = nn.ReLU,
    signed: bool = False,
    gains: tuple[float, float] = (1.0, 1.0),
    bias: bool = False,
    n_rows: int = 4000,
) -> Planted:
    """Plant n features in blocks of two units in every hidden layer, those of the first shuffled.

    Args:
        seed: of the weights and the rows.
        n: features.
        share: the probability of each in a row; rows without any are dropped.
        n_layers: matrices.
        activation: between them.
        signed: features in [-1, 1], else in [0, 1].
        gains: the range that each feature's gain is drawn from.
        bias: a small bias of the last layer, and zeros elsewhere.
        n_rows: to decompose on.
    """
    generator = torch.Generator().manual_seed(seed)
    n_inputs, n_outputs = 2 * n, n + 4
    u, v = orthonormal(n_inputs, n, generator), orthonormal(n_outputs, n, generator)
    gain = gains[0] + (gains[1] - gains[0]) * torch.rand(n, generator=generator)
    sizes = [n_inputs, *[2 * n] * (n_layers - 1), n_outputs]
    linears: list[nn.Linear] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        first, last = i == 0, i == n_layers - 1
        blocks = 0.6 + 0.8 * torch.rand(n, 1 if last else 2, 1 if first else 2, generator=generator)
        weight = torch.block_diag(*(blocks / torch.linalg.matrix_norm(blocks, 2, keepdim=True)))
        linear = nn.Linear(a, b, bias=bias)
        linear.weight.data = weight @ u.mT if first else v * gain @ weight if last else weight
        if bias:
            linear.bias.data = 0.1 * torch.randn(b, generator=generator) * last
        linears.append(linear)
    order = torch.randperm(2 * n, generator=generator)
    linears[0].weight.data = linears[0].weight.data[order]
    linears[1].weight.data = linears[1].weight.data[:, order]
    model = nn.Sequential(*[layer for linear in linears for layer in (linear, activation())][:-1])
    features = sparse(n_rows, n, share, generator, signed)
    return Planted(model.eval(), features @ u.mT, circuits_of(model, u.mT, v.mT), float((features != 0).float().mean()))
