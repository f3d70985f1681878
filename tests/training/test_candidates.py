"""Check that candidates' steps ascend and that they find what residuals share, for every kind of direction."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from l3d.decomposition.directions import Directions, Rank, resolve_ranks
from l3d.gradients.chunks import Chunks
from l3d.gradients.extract import Extractor
from l3d.training.candidates import NO_CHUNKS, ProbeGradients, Residuals, learn
from l3d.training.options import Replacement

SHARE = 0.3


def residuals(model: nn.Module, x: Tensor, rank: Rank, multiplied_out: int = Replacement.multiplied_out) -> Residuals:
    """What three random subnetworks leave of a model's gradients, in float64."""
    generator = torch.Generator().manual_seed(0)
    gradients = Extractor(model.double(), "mse", "sample", None, "all")(x.double(), generator)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    decoder = Directions(shapes, resolve_ranks(rank, shapes), 3, generator).double()
    samples = ProbeGradients.of(Chunks.held([gradients]), decoder, "torch", multiplied_out)
    return Residuals.of(samples, samples.project(decoder).detach(), decoder)


def linear() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(40, 6)


def convolution() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4))
    return model, torch.randn(40, 3, 4, 4)


def depthwise() -> tuple[nn.Module, Tensor]:
    """A kernel of more channels than entries each: read as a matrix it is [12, 4]."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(12, 12, 2, groups=12, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))
    return model, torch.randn(40, 12, 2, 2)


def whole(directions: Directions) -> Tensor:
    every = [directions.tensors(i) for i in range(directions.n_subnetworks)]
    return torch.stack([torch.cat([tensor.flatten() for tensor in each.values()]) for each in every]).detach()


def learned(left: Residuals, how: Replacement = Replacement()) -> Tensor:
    weights = torch.ones(len(left.values))
    return whole(learn(left, weights, SHARE, torch.Generator().manual_seed(1), how))


@pytest.mark.parametrize("rank", [1, 2])
def test_every_step_ascends(rank: int) -> None:
    """J of each candidate, from residuals and gradients in full; none falls from one step to the next."""
    left = residuals(*linear(), rank)
    assert left.flat is not None
    assert left.samples.flat is not None
    norms = left.samples.flat.square().sum(1)
    before = torch.zeros(3, dtype=torch.float64)
    for steps in range(Replacement.steps_alone, Replacement.steps_alone + 12):
        found = learned(left, Replacement(steps=steps))
        torch.testing.assert_close(found.norm(dim=1), torch.ones(3, dtype=torch.float64))
        value = ((left.flat @ found.mT).square() / norms[:, None]).sort(0).values[-12:].sum(0)  # of 40 samples
        assert (value >= before - 1e-12).all()
        before = value


def test_many_steps_end_at_the_best_direction_there_is() -> None:
    """Of full rank and for all samples J is a quadratic form: its largest eigenvalue, by a solver."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3, bias=False), torch.randn(40, 4)
    left = residuals(model, x, 3)
    assert left.flat is not None
    assert left.samples.flat is not None
    scaled = left.flat / left.samples.flat.norm(dim=1, keepdim=True)
    found = whole(learn(left, torch.ones(40), 1.0, torch.Generator().manual_seed(1), Replacement(steps=400)))
    largest = torch.linalg.eigvalsh(scaled.mT @ scaled)[-1]
    torch.testing.assert_close((scaled @ found.mT).square().sum(0), largest.expand(3))


@pytest.mark.parametrize(
    "make, rank",
    [(linear, 1), (linear, 2), (convolution, 1), (convolution, {"*": 2}), (depthwise, {"0*": [7, 1, 2, 2], "*": 2})],
)
def test_gradients_need_not_be_multiplied_out(make: Callable[[], tuple[nn.Module, Tensor]], rank: Rank) -> None:
    """The same candidates from the gradients' factors; convolutions, held as Tucker products, included."""
    model, x = make()
    flat = residuals(model, x, rank)
    factored = residuals(model, x, rank, multiplied_out=0)
    assert flat.flat is not None
    assert factored.flat is None
    torch.testing.assert_close(learned(flat), learned(factored))


def test_one_circuit_among_noise_is_found() -> None:
    """A tenth of the samples share a direction that nothing reconstructs; every candidate drawn from them finds it."""
    generator = torch.Generator().manual_seed(0)
    circuit = torch.outer(torch.randn(6, generator=generator), torch.randn(5, generator=generator)).flatten()
    circuit = circuit / circuit.norm()
    flat = torch.randn(200, 30, generator=generator) / 30**0.5
    flat[:20] = 0.4 * flat[:20] + circuit
    decoder = Directions({"w": torch.Size([6, 5])}, {"w": (1,)}, 3, generator)
    left = Residuals.of(ProbeGradients(NO_CHUNKS, flat, "torch"), torch.zeros(200, 3), decoder)
    weights = (torch.arange(200) < 20).float()
    found = whole(learn(left, weights, 0.1, torch.Generator().manual_seed(1)))
    assert ((found @ circuit).abs() > 0.98).all()


def test_parameters_that_no_gradient_reaches_can_still_be_learned() -> None:
    """Of a tensor without gradients one factor at most is zero: what training finds no gradient of it never leaves."""
    decoder = Directions({"w": torch.Size([4, 3]), "v": torch.Size([4, 3])}, {"w": (1,), "v": (1,)}, 2)
    flat = torch.cat([torch.randn(20, 12), torch.zeros(20, 12)], 1)
    left = Residuals.of(ProbeGradients(NO_CHUNKS, flat, "torch"), torch.zeros(20, 2), decoder)
    found = learn(left, torch.ones(20), 0.5, torch.Generator().manual_seed(1))
    _, idle = found.items()[1]
    norms = torch.stack([factor.flatten(1).norm(dim=1) for factor in idle.factors()])
    assert (norms.amax(0) > 0.01).all()
