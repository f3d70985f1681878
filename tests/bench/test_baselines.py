"""Check that the baselines of bench/ compute the same loss as l3d, so that their times can be compared."""

import pytest
import torch

from bench import exchanges, floor
from bench.methods.cases import CASES

from helpers import assert_relative


@pytest.mark.parametrize("method", ["published", "afternoon"])
@pytest.mark.parametrize("name", ["tms", "stories"])
def test_a_baseline_gives_our_loss_and_gradients(name, method):
    """In float64, loss and all gradients of the methods agree to 1e-9."""
    case = CASES[name]()
    case.model.double()
    case.decomposition.double()
    case.inputs = case.inputs.double() if case.inputs.is_floating_point() else case.inputs[:2, :5]
    parameters = list(case.decomposition.parameters())
    assert case.n_kept() == round(case.k * len(case.inputs) * (5 if case.kl else 1) * case.decomposition.n_subnetworks)
    ours, theirs = case.loss("l3d"), case.loss(method)
    assert_relative(ours, theirs, 1e-9)
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        assert_relative(a, b, 1e-8)


def test_the_bench_of_exchanges_starts_where_it_says() -> None:
    """Four starts that have hardly trained are far from the circuits, one from the circuits is at them."""
    made = exchanges.problem("10, with biases", seed=0)
    short = made._replace(chosen=made.chosen | {"steps": 10})
    starts = exchanges.train(short, "with", own=False)
    assert len(starts) == exchanges.STARTS
    assert all(start.mmcs < 0.8 for start in starts)
    (start,) = exchanges.train(short, "from the circuits", own=False)
    assert start.mmcs > 0.95
    assert start.missed == 0
    assert start.error < min(start.error for start in starts)


def test_the_bench_of_the_floor_takes_the_same_loss() -> None:
    """In a whole basis it is the loss by its definition; what a smaller basis leaves out is counted as left."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    encoder, decoder = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    coefficients = gradients @ encoder.mT
    kept = coefficients.abs() >= coefficients.abs().flatten().sort(descending=True).values[int(0.25 * 48) - 1]
    left = (gradients - (coefficients * kept) @ decoder).square().sum()
    norms = gradients.square().sum(1)
    found = floor.loss(floor.Projected(gradients, norms), encoder, decoder, 0.25)
    assert_relative(found, left / norms.sum(), 1e-12)
    outside = torch.rand(12, generator=generator, dtype=torch.float64)
    found = floor.loss(floor.Projected(gradients, norms + outside), encoder, decoder, 0.25)
    assert_relative(found, (left + outside.sum()) / (norms + outside).sum(), 1e-12)
