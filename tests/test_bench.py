"""The baselines in bench/ compute the same loss as l3d: a benchmark of another thing proves nothing."""

import pytest
import torch

from bench.cases import CASES

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
