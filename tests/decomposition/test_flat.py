"""Compare the path of small problems with the path for any size: loss, gradients, kept coefficients."""

import pytest
import torch

from l3d.api import Decomposition
from l3d.decomposition import flat
from l3d.decomposition.costs import Plan
from l3d.decomposition.objective import Objective, objective
from l3d.gradients.extract import extract_gradients

from helpers import assert_relative
from problems import PROBLEMS, setup, several


@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize("k", [1e-6, 0.15, 1.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_both_paths_agree(name: str, k: float, n_groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, residuals, what is kept and all gradients agree to 1e-10, for one decomposition and for several."""
    gradients, whole = several(name, n_groups)
    taken: list[int] = []
    path = flat.flat_residual
    monkeypatch.setattr("l3d.decomposition.objective.flat_residual", lambda *given: taken.append(1) or path(*given))

    def run(limit: int) -> tuple[Objective, tuple[torch.Tensor, ...]]:
        monkeypatch.setattr(flat, "SMALL", limit)
        result = objective(gradients, whole.encoder, whole.decoder, k, Plan(n_groups=n_groups))
        return result, torch.autograd.grad(result.loss.sum(), list(whole.parameters()))

    (small, small_grads), (any_size, grads) = run(1 << 30), run(0)
    assert len(taken) == 1
    for field in ("loss", "residual", "squared_norm"):
        assert_relative(getattr(small, field), getattr(any_size, field), 1e-10)
    assert torch.equal(small.kept.rows, any_size.kept.rows)
    assert torch.equal(small.kept.columns, any_size.kept.columns)
    assert_relative(small.kept.values, any_size.kept.values, 1e-10)
    for a, b in zip(small_grads, grads, strict=True):
        assert_relative(a, b, 1e-10)


def test_what_is_small() -> None:
    """S · K · P multiply-adds decide, on a CPU; kernels that are asked for are not passed by."""
    gradients, d = setup("linear")
    n_entries = sum(shape.numel() for shape in gradients.shapes.values())
    assert gradients.n_samples * d.n_subnetworks * n_entries < flat.SMALL
    assert flat.is_small(gradients, d.encoder)
    assert flat.is_small(gradients, d.encoder, "torch")
    assert not flat.is_small(gradients, d.encoder, "triton")
    many = Decomposition(gradients.shapes, flat.SMALL // (gradients.n_samples * n_entries) + 1, 1).encoder
    assert not flat.is_small(gradients, many)


def test_parameters_may_stand_in_another_order_than_the_gradients() -> None:
    """Directions that hold bias before weight meet gradients of weight before bias: the loss is the same."""
    gradients = extract_gradients(torch.nn.Linear(3, 2), torch.randn(8, 3), reference="mean")
    d = Decomposition(gradients.shapes, 3, 1)
    turned = Decomposition(dict(reversed(d.shapes.items())), 3, 1)
    for turned_side, side in ((turned.encoder, d.encoder), (turned.decoder, d.decoder)):
        for name, piece in turned_side.items():
            piece.load_state_dict(dict(side.items())[name].state_dict())
    assert list(turned.shapes) == ["bias", "weight"] != list(gradients.shapes)
    assert flat.is_small(gradients, turned.encoder)
    assert_relative(turned.loss(gradients, 0.5), d.loss(gradients, 0.5), 1e-6)
