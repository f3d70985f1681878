"""Define the toy models' networks and train them from several starts at once, keeping the best."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]
N = TypeVar("N", bound="Network")


def identity(x: Tensor) -> Tensor:
    """Return x."""
    return x


class Network(nn.Module):
    """Named Linear layers with an activation between them and one at the end: [n, inputs] -> [n, outputs]."""

    def __init__(self, layers: Mapping[str, nn.Linear], between: Activation = identity, last: Activation = identity):
        super().__init__()
        self.order = list(layers)
        self.between, self.last = between, last
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers in order: [n, inputs] -> [n, outputs]."""
        for name in self.order:
            x = self.get_submodule(name)(x)
            x = (self.last if name == self.order[-1] else self.between)(x)
        return x

    def forward_many(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Apply several networks of this form, their parameters stacked along a first axis: [starts, n, outputs]."""
        for name in self.order:
            x = x @ parameters[f"{name}.weight"].mT
            if f"{name}.bias" in parameters:
                x = x + parameters[f"{name}.bias"][:, None]
            x = (self.last if name == self.order[-1] else self.between)(x)
        return x


class Superposition(Network):
    """y = ReLU(W_out W_in x + b), or without the ReLU: [n, features] -> [n, outputs]."""

    W_in: nn.Linear
    W_out: nn.Linear

    def __init__(self, n_features: int, n_hidden: int, rectify: bool = True) -> None:
        layers = {"W_in": nn.Linear(n_features, n_hidden, bias=False), "W_out": nn.Linear(n_hidden, n_features)}
        super().__init__(layers, last=torch.relu if rectify else identity)


def split_scale(network: Superposition) -> Superposition:
    """Balance the scale of W_in and W_out in a fixed way without changing W_out W_in; return the network.

    The network computes the same with M W_in and W_out M⁻¹ for any invertible M, but its gradients, and their
    reconstruction error, depend on M. To make them independent of the training run, both matrices get the square roots
    of the singular values of W_out W_in, in the proportion of Kaiming's fan-out initialisation, which preserves the
    scale of gradients in the backward pass: W_in W_inᵀ = (features / hidden units) W_outᵀ W_out, diagonal.
    """
    w_in, w_out = network.W_in.weight, network.W_out.weight
    n_hidden, n_features = w_in.shape
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(w_out.double() @ w_in.double())
        root, proportion = s[:n_hidden].sqrt(), (n_features / n_hidden) ** 0.25
        w_in.copy_(proportion * root[:, None] * vh[:n_hidden])
        w_out.copy_(u[:, :n_hidden] * root / proportion)
    return network


class Deep(Network):
    """A GELU network with hidden layers of one width: [n, features] -> [n, features]."""

    def __init__(self, n_features: int, width: int, n_hidden: int) -> None:
        widths = [n_features, *[width] * n_hidden, n_features]
        layers = {f"layer{i}": nn.Linear(a, b) for i, (a, b) in enumerate(pairwise(widths))}
        super().__init__(layers, between=nn.functional.gelu)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread while the block runs: more are no faster on tiny tensors, and slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def drawn_from(generator: torch.Generator) -> Iterator[None]:
    """Seed torch's global generator from `generator` while the block runs, for layers' initial weights."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def train_network(
    build: Callable[[], N],
    inputs: Tensor,
    targets: Tensor,
    generator: torch.Generator,
    *,
    steps: int,
    lr: float,
    n_starts: int,
    batch_size: int = 256,
    score: Callable[[Mapping[str, Tensor], Tensor], Tensor] | None = None,
) -> N:
    """Fit targets [n, outputs] from inputs [n, features] by mean squared error, from several starts in one run.

    Adam with a cosine learning-rate schedule. score(stacked parameters, losses [starts]) -> [starts] ranks the starts;
    the lowest is kept. By default it is the loss.
    """
    with drawn_from(generator):
        starts = [build() for _ in range(n_starts)]
    network = starts[0]
    stacked = {
        name: torch.stack([start.get_parameter(name).detach() for start in starts]).requires_grad_()
        for name, _ in network.named_parameters()
    }
    optimizer = torch.optim.Adam(stacked.values(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def losses(rows: Tensor | slice) -> Tensor:
        """Return each start's mean squared error over the given rows: [starts]."""
        return (network.forward_many(stacked, inputs[rows]) - targets[rows]).square().mean((1, 2))

    with one_thread():
        for _ in range(steps):
            optimizer.zero_grad()
            losses(torch.randint(len(inputs), (batch_size,), generator=generator)).sum().backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            final = losses(slice(None))
            best = int((final if score is None else score(stacked, final)).argmin())
            for name, parameter in network.named_parameters():
                parameter.copy_(stacked[name][best])
    return network.eval()
