"""The published baseline in bench/ computes the same loss as l3d: a benchmark of another thing proves nothing."""

import pytest
import torch

from bench.test_step import CASES

from helpers import assert_relative


@pytest.mark.parametrize("name", CASES)
def test_published_baseline_gives_our_loss_and_gradients(name):
    """In float64, loss and all gradients of the two methods agree to 1e-9."""
    case = CASES[name]()
    case.model.double()
    case.decomposition.double()
    if case.inputs.is_floating_point():
        case.inputs = case.inputs.double()
    else:
        case.inputs = case.inputs[:2, :5]
    parameters = list(case.decomposition.parameters())
    ours, published = case.ours(), case.published()
    assert_relative(ours, published, 1e-9)
    pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(published, parameters), strict=True)
    for mine, theirs in pairs:
        assert_relative(mine, theirs, 1e-8)
