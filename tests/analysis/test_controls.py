"""Check the controls: what each destroys and keeps, and that a real decomposition scores differently."""

import pytest
import torch
from torch import Tensor, nn

import l3d
from l3d.analysis.controls import redrawn
from l3d.gradients.factors import Dense, Rows
from l3d.gradients.shuffled import shuffled

from helpers import assert_relative


def gradients() -> l3d.Gradients:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7)).double().eval()
    return l3d.extract_gradients(model, torch.randn(40, 6, dtype=torch.float64), reference="mean")


def sorted_rows(tensor: Tensor) -> Tensor:
    flat = tensor.flatten(1)
    return flat[flat[:, 0].argsort()]


def test_shuffling_deals_the_same_rows_to_other_samples() -> None:
    """Per tensor the rows of x and dy are the same set, x in its order, dy in another; the input is left alone."""
    g = gradients()
    before = {name: value.clone() for name, value in g.materialize().items()}
    torn = shuffled(g, torch.Generator().manual_seed(0))
    for name, (old, new) in ((name, (g.parts[name][0], torn.parts[name][0])) for name in g.shapes):
        if isinstance(old, Rows):
            assert isinstance(new, Rows)
            assert torch.equal(old.x, new.x)
            old_dealt, new_dealt = old.dy, new.dy
        else:
            assert isinstance(old, Dense)
            assert isinstance(new, Dense)
            old_dealt, new_dealt = old.grad, new.grad
        assert not torch.equal(old_dealt, new_dealt)
        assert torch.equal(sorted_rows(old_dealt), sorted_rows(new_dealt))
        assert torch.equal(g.materialize()[name], before[name])
    orders = [part.dy[:, 0, 0].argsort() for parts in torn.parts.values() for part in parts if isinstance(part, Rows)]
    assert len(orders) == 2
    assert not torch.equal(*orders)  # each tensor in an order of its own


def test_a_decomposition_of_shuffled_gradients_finds_no_circuits() -> None:
    """The toy's circuits join two tensors: shuffled, none is found, and the real gradients are explained worse."""
    toy = l3d.toys.make("tms")
    chosen = toy.settings | {"n_restarts": 1, "steps": 400}
    real, torn = (l3d.decompose(toy.model, toy.data, **chosen, shuffle=s, progress=False) for s in (False, True))
    assert torn.settings["shuffle"]
    assert toy.mmcs(real) > 0.95
    assert toy.mmcs(torn) < 0.85
    assert torn.evaluate(toy.model, toy.data).error > real.evaluate(toy.model, toy.data).error + 0.2


def test_redrawn_weights_have_the_old_moments_and_the_old_ones_return() -> None:
    """Only the chosen tensors are drawn anew, by the seed; the very same bits are back after the block."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 3)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with redrawn(model, "0.weight", seed=1):
        drawn, old = model[0].weight.detach().clone(), before["0.weight"]
        assert_relative(drawn.std(), old.std(), 0.02)
        assert abs(float(drawn.mean() - old.mean())) < 0.02 * float(old.std())
        assert abs(float(torch.corrcoef(torch.stack([drawn.flatten(), old.flatten()]))[0, 1])) < 0.02
        assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items() if n != "0.weight")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    draws = []
    for seed in (1, 2):
        with redrawn(model, "0.weight", seed=seed):
            draws.append(model[0].weight.detach().clone())
    assert_relative(draws[0], drawn, 1e-12)
    assert not torch.equal(*draws)
    with pytest.raises(RuntimeError), redrawn(model, None):
        raise RuntimeError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
