"""Compare steps in numpy with those for any size: losses, derivatives, kept coefficients, trained tensors."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import l3d
from l3d.api import Decomposition
from l3d.decomposition import flat
from l3d.decomposition.costs import Plan
from l3d.decomposition.flat import flattened
from l3d.decomposition.objective import n_kept, objective
from l3d.gradients.factors import Gradients
from l3d.training.numpy_step import SmallSteps, has_pairs_only
from l3d.training.optimizer import RelativeAdam

from helpers import assert_relative
from problems import PROBLEMS, setup, several

PAIRS = [name for name in PROBLEMS if has_pairs_only(setup(name)[1].encoder)]


def numpy_step(
    small: SmallSteps, gradients: Gradients, whole: Decomposition, k: float, lr: float = 0.0
) -> tuple[Any, list[Tensor]]:
    """Learn from a batch and take a step; return what was learned, and the derivatives by the parameters."""
    n_groups = small.n_groups
    n = n_kept(k, gradients.n_samples, whole.n_subnetworks // n_groups)
    learned = small.learn(flattened(gradients, whole.encoder).numpy(), n)
    rest = iter(torch.from_numpy(learned.derivatives).split([p.numel() for p in in_pairs(whole)]))
    by_id = {id(parameter): next(rest).view(parameter.shape) for parameter in in_pairs(whole)}
    small.step(learned, lr)
    return learned, [by_id[id(parameter)] for parameter in whole.parameters()]


def in_pairs(whole: Decomposition) -> list[Tensor]:
    pairs = zip(whole.encoder.parameters(), whole.decoder.parameters(), strict=True)
    return [side for pair in pairs for side in pair]


def test_which_problems_these_are() -> None:
    """Tucker products are left to the other path."""
    assert PAIRS
    assert set(PROBLEMS) - set(PAIRS) == {
        name for name in PROBLEMS if any(len(shape) > 2 for shape in setup(name)[1].shapes.values())
    }


@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize("k", [1e-6, 0.15, 1.0])
@pytest.mark.parametrize("name", PAIRS)
def test_losses_and_derivatives(name: str, k: float, n_groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, residuals, kept coefficients and derivatives are those of the path for any size."""
    gradients, whole = several(name, n_groups)
    monkeypatch.setattr(flat, "SMALL", 0)
    expected = objective(gradients, whole.encoder, whole.decoder, k, Plan(n_groups=n_groups))
    truths = torch.autograd.grad(expected.loss.sum(), list(whole.parameters()))
    small = SmallSteps(whole, RelativeAdam(whole.parameters()), n_groups)
    learned, derivatives = numpy_step(small, gradients, whole, k)
    assert_relative(torch.from_numpy(learned.losses), expected.loss.view(-1), 1e-10)
    assert_relative(torch.from_numpy(learned.residual), expected.residual.view(-1, n_groups), 1e-10)
    assert torch.equal(
        torch.from_numpy(learned.kept).nonzero(), torch.stack([expected.kept.rows, expected.kept.columns], 1)
    )
    assert_relative(torch.from_numpy(learned.thresholds), expected.kept.threshold.view(-1), 1e-12)
    for derivative, truth in zip(derivatives, truths, strict=True):
        assert_relative(derivative, truth, 1e-10)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_steps(name: str, n_groups: int, lazy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps, of which every third is taken by the other path on the same tensors, end where six of that one do.

    So few coefficients are kept that subnetworks rest.
    """
    monkeypatch.setattr(flat, "SMALL", 0)
    gradients, plain = several(name, n_groups)
    mixed = several(name, n_groups)[1]
    adams = [RelativeAdam(d.parameters(), True, n_groups, lazy) for d in (plain, mixed)]
    small = SmallSteps(mixed, adams[1], n_groups)
    k, rests = 0.1, 0
    for step in range(6):
        lr = 0.1 / (1 + step)
        for d, adam in zip((plain, mixed), adams, strict=True):
            if d is plain or step % 3 == 2:
                result = objective(gradients, d.encoder, d.decoder, k, Plan(n_groups=n_groups))
                rests += d.n_subnetworks - len(result.kept.columns.unique())
                adam.step(torch.autograd.grad(result.loss.sum(), adam.parameters), lr, result.kept.columns)
                d.normalize_()
            else:
                numpy_step(small, gradients, d, k, lr)
    for one, other in zip(plain.parameters(), mixed.parameters(), strict=True):
        assert_relative(other, one, 1e-9)
    (tensors, values), (mixed_tensors, mixed_values) = adams[0].state(), adams[1].state()
    assert mixed_values == values == {"count": 6}
    for key, tensor in tensors.items():
        assert_relative(mixed_tensors[key], tensor, 1e-9)
    assert rests or name == "vectors only"


def test_a_decoder_of_higher_rank_has_unit_norm() -> None:
    """After a step, as multiplied out; the encoder's norm is its own."""
    gradients, d = setup("linear")
    assert any(piece.factors()[0].shape[1] > 1 for _, piece in d.decoder.items())
    numpy_step(SmallSteps(d, RelativeAdam(d.parameters())), gradients, d, 0.5, lr=0.2)
    norms = flat.multiplied_out(d.decoder).norm(dim=1)
    assert_relative(norms, torch.ones_like(norms), 1e-12)
    assert not torch.allclose(flat.multiplied_out(d.encoder).norm(dim=1), norms)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_no_number_shows_in_the_loss(value: float) -> None:
    """Of every group: what is not finite is selected, or at least multiplied by zero, and either way is told."""
    gradients, whole = several("linear", 2)
    rows = flattened(gradients, whole.encoder).clone()
    rows[1, 2] = value
    learned = SmallSteps(whole, RelativeAdam(whole.parameters()), 2).learn(rows.numpy(), 3)
    assert not np.isfinite(learned.losses).any()


def test_a_run_takes_these_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small run takes every step here; with a batch that is too large for it the path changes, and nothing else."""
    taken: list[int] = []
    step = SmallSteps.step
    monkeypatch.setattr(SmallSteps, "step", lambda *given: taken.append(1) or step(*given))
    generator = torch.Generator().manual_seed(0)
    model, rows = torch.nn.Linear(4, 3).double(), torch.randn(44, 4, dtype=torch.float64, generator=generator)

    def run() -> Decomposition:
        return l3d.decompose(model, rows, 3, rank=1, k=0.3, steps=12, batch_size=16, warm_start=2, progress=False)

    small = run()
    assert len(taken) == 12
    monkeypatch.setattr(flat, "SMALL", 16 * 3 * 15 - 1)  # batches of 16 rows are too large, those of 12 are not
    changing = run()
    assert len(taken) == 12 + 4
    for one, other in zip(small.parameters(), changing.parameters(), strict=True):
        assert_relative(other, one, 1e-9)
