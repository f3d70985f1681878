"""Toy models whose circuits are known, to see whether a decomposition finds them.

`make("tms")` is the toy model of superposition: five sparse features through two hidden units and back,
y = ReLU(W_out W_in x + b). Its circuits are the features. What feature i does is its gain a_i = W_out[i] . W_in[:, i],
so its circuit in parameter space is the direction in which a_i grows: W_out[i] in column i of W_in, and W_in[:, i] in
row i of W_out, nothing elsewhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from l3d.decomposition import Decomposition

NAMES = ("tms",)


@dataclass
class Toy:
    """A trained toy model, the data to decompose it on, and what a decomposition should find."""

    name: str
    describe: str
    model: nn.Module
    data: Tensor  # [n, features]
    truth: list[dict[str, Tensor]]  # per circuit: {parameter: tensor of its shape}
    settings: dict[str, Any] = field(default_factory=dict)  # recommended arguments of decompose

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n fresh points [n, features] as the data was drawn."""
        return sparse_features(n, self.data.shape[1], generator)

    def similarity(self, decomposition: "Decomposition") -> Tensor:
        """Return |cos| between every true circuit and every subnetwork: [circuits, K].

        The cosine runs over the tensors the circuit is given in, all entries of them: a subnetwork that
        holds other features besides scores lower.
        """
        found = [decomposition.subnetwork(i) for i in range(decomposition.n_subnetworks)]
        rows = []
        for circuit in self.truth:
            t = torch.cat([circuit[name].flatten() for name in circuit])
            v = torch.stack([torch.cat([f[name].flatten() for name in circuit]) for f in found]).to(t)
            rows.append((v @ t).abs() / (v.norm(dim=1) * t.norm()).clamp_min(1e-30))
        return torch.stack(rows)

    def mmcs(self, decomposition: "Decomposition") -> float:
        """Return the mean over true circuits of the best |cos| among the subnetworks, in [0, 1]."""
        return float(self.similarity(decomposition).max(1).values.mean())


class Superposition(nn.Module):
    """y = ReLU(W_out W_in x + b): [n, features] -> [n, features]."""

    def __init__(self, n_features: int, n_hidden: int) -> None:
        super().__init__()
        self.W_in = nn.Linear(n_features, n_hidden, bias=False)
        self.W_out = nn.Linear(n_hidden, n_features)

    def forward(self, x: Tensor) -> Tensor:
        """Compress and reconstruct."""
        return torch.relu(self.W_out(self.W_in(x)))


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread in the block: tiny tensors gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def make(name: str, seed: int = 0) -> Toy:
    """Build and train a toy model, the same for the same seed.

    Args:
        name: one of `NAMES`.
        seed: of the model's start, its training data and the data to decompose.
    """
    if name not in NAMES:
        raise ValueError(f"toy: expected one of {', '.join(NAMES)}, got {name!r}")
    return _tms(seed)


def _tms(seed: int, n_features: int = 5, n_hidden: int = 2, n_points: int = 1000) -> Toy:
    generator = torch.Generator().manual_seed(seed)
    model = _train_superposition(n_features, n_hidden, generator)
    w_in, w_out = model.W_in.weight.detach(), model.W_out.weight.detach()
    truth = []
    for i in range(n_features):
        only = torch.zeros(n_features)
        only[i] = 1
        # the gradient of feature i's gain, W_out[i] . W_in[:, i]
        truth.append({"W_in.weight": w_out.mT * only, "W_out.weight": w_in.mT * only[:, None]})
    return Toy(
        name="tms",
        describe=f"toy model of superposition: {n_features} sparse features in {n_hidden} hidden units",
        model=model,
        data=sparse_features(n_points, n_features, generator),
        truth=truth,
        settings={"n_subnetworks": n_features, "rank": 1, "k": 0.1, "batch_size": 32, "steps": 1000},
    )


def _train_superposition(
    n_features: int, n_hidden: int, generator: torch.Generator, n_starts: int = 8, steps: int = 4000
) -> Superposition:
    """Train several starts side by side and keep the one of lowest loss.

    W_out starts as the transpose of W_in: from unrelated starts most runs lose features to outputs that are always 0.
    """
    w_in = torch.randn(n_starts, n_hidden, n_features, generator=generator)
    w_out = w_in.mT.contiguous()
    bias = torch.zeros(n_starts, 1, n_features)
    parameters = [tensor.requires_grad_() for tensor in (w_in, w_out, bias)]
    optimizer = torch.optim.AdamW(parameters, lr=0.003, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    points = sparse_features(10_000, n_features, generator)

    def losses(x: Tensor) -> Tensor:
        return (torch.relu(x @ w_in.mT @ w_out.mT + bias) - x).square().mean((1, 2))

    with one_thread():
        for _ in range(steps):
            optimizer.zero_grad()
            losses(points[torch.randint(len(points), (256,), generator=generator)]).sum().backward()
            optimizer.step()
            schedule.step()
    with torch.random.fork_rng(devices=[]):  # the start is overwritten: draw it from nobody's generator
        model = Superposition(n_features, n_hidden)
    with torch.no_grad():
        best = int(losses(points).argmin())
        model.W_in.weight.copy_(w_in[best])
        model.W_out.weight.copy_(w_out[best])
        model.W_out.bias.copy_(bias[best, 0])
    return model.eval()
