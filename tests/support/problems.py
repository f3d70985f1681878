"""Set up small decomposition problems, one for each kind of tensor: a model, its gradients, random directions."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import l3d
from l3d.api import Decomposition
from l3d.gradients.factors import Gradients

Rank = int | dict[str, int | tuple[int, ...]]


class Tied(nn.Module):
    """A language model of two positions-wise layers whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 7)
        self.norm = nn.LayerNorm(7)
        self.mix = nn.Linear(7, 7)
        self.head = nn.Linear(7, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.embedding(tokens))
        return self.head(h + torch.tanh(self.mix(h.cumsum(1))))


class Problem(NamedTuple):
    """A model, a batch for it, and how to decompose it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    rank: Rank
    divergence: str = "mse"
    n_subnetworks: int = 6
    n_rows: int = 8


def normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator, dtype=torch.float64)


PROBLEMS = {
    "linear": Problem(lambda: nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)), normal(8, 5), 2),
    "linear on positions": Problem(
        lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Flatten(), nn.Linear(42, 3)), normal(8, 6, 5), 3
    ),
    "convolution": Problem(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.GELU(),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        normal(6, 2, 6, 6),
        {"0.weight": (3, 2, 2, 3), "3.weight": (2, 1, 3, 2), "*": 2},
        n_rows=6,
    ),
    "tied language model": Problem(
        Tied,
        lambda g: torch.randint(9, (4, 5), generator=g),
        {"embedding*": 3, "*": 2},
        "kl",
        n_subnetworks=7,
        n_rows=4,
    ),
    "vectors only": Problem(lambda: nn.Sequential(nn.LayerNorm(5), nn.Softplus()), normal(8, 5), 1),
}


def setup(name: str, seed: int = 0) -> tuple[Gradients, Decomposition]:
    """Extract fresh gradients and draw an encoder and a decoder that differ, in float64."""
    problem = PROBLEMS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = problem.build().double().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    gradients = l3d.extract_gradients(
        model, problem.inputs(generator), divergence=problem.divergence, generator=generator
    )
    decomposition = Decomposition(gradients.shapes, problem.n_subnetworks, problem.rank).double()
    with torch.no_grad():
        for parameter in decomposition.parameters():
            parameter.normal_(generator=generator)
    decomposition.normalize_()
    return gradients, decomposition


def several(name: str, n_groups: int) -> tuple[Gradients, Decomposition]:
    """Set up a problem for so many decompositions side by side."""
    gradients, d = setup(name)
    return gradients, Decomposition.side_by_side([d, *(setup(name, seed)[1] for seed in range(1, n_groups))])
