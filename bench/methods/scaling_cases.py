"""What is timed against S, T, K, R and width, at which sizes, and what it costs by formula, in multiply-adds.

One linear layer [width, width], every sample with a sequence of its own, a tenth of the coefficients kept. Formulas
are those by which training chooses its paths (costs.py), and bench/scale.py holds them to torch's own counts; a
gathered element is charged as there. Selecting multiplies nothing: the numbers it reads are counted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import l3d_kernels as lk
from bench.scale import Case, gram_cost, planned, predict, sizes_of
from l3d.decomposition.costs import Path, projection_costs
from l3d.gradients.extract import Extractor
from l3d.train import turn

AXES = ("S", "T", "K", "R", "width")
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the base's size


class Work(NamedTuple):
    """A call to time, and its cost by formula."""

    call: Callable[[], Any]
    cost: float
    unseen_bytes: int = 0  # read and written by numpy, which `bench.measure.counting` does not see


class Quantity(NamedTuple):
    """Something that is timed: its sizes at the base, and what it depends on."""

    base: Case
    axes: tuple[str, ...]
    prepare: Callable[[Case], Work]

    def cases(self) -> dict[str, list[Case]]:
        """Return the sizes along each axis, the others at the base."""
        return {
            axis: [self.base._replace(**{axis: round(factor * getattr(self.base, axis))}) for factor in FACTORS]
            for axis in self.axes
        }


def _normal(*shape: int, fan: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) / fan**0.5


def _rows(case: Case) -> tuple[Tensor, Tensor]:
    """Draw x and dy: [S, T, width] each."""
    return _normal(case.S, case.T, case.width), _normal(case.S, case.T, case.width, fan=case.T)


def _factors(case: Case) -> tuple[Tensor, Tensor]:
    """Draw left and right: [K, R, width] each."""
    shape = case.K, case.R, case.width
    return _normal(*shape, fan=case.width), _normal(*shape, fan=case.width).flip(0)


def _kept(case: Case) -> lk.SparseCoefficients:
    return lk.batch_topk(_normal(case.S, case.K), sizes_of(case).n_kept)


def projection(case: Case) -> Work:
    """<V_k, G_s> of all pairs, from the factors of both."""
    inputs = *_rows(case), *_factors(case)
    return Work(lambda: lk.project(*inputs), projection_costs(sizes_of(case))[_ALL] / 4)  # a step does it four times


def sampled_projection(case: Case) -> Work:
    """<V_k, G_s> of the kept pairs."""
    inputs = *_rows(case), *_factors(case), _kept(case)
    costs = projection_costs(sizes_of(case))
    return Work(lambda: lk.project_at(*inputs), (costs[_SAMPLED] - costs[_ALL] / 4) / 4)


def top_k(case: Case) -> Work:
    """The largest tenth of the coefficients."""
    coefficients, n = _normal(case.S, case.K), sizes_of(case).n_kept
    # bytes per coefficient: its magnitude 4 + 4, selection 4 + 4, comparison 4 + 1, two passes over what that gives
    return Work(lambda: lk.batch_topk(coefficients, n), case.S * case.K, unseen_bytes=23 * case.S * case.K)


def gram_energy(case: Case) -> Work:
    """‖ĝ‖² by the Gram matrix."""
    kept, factors = _kept(case), _factors(case)
    return Work(lambda: lk.cpu.energy_from_gram(kept, lk.gram(*factors)), gram_cost(case))


def extraction(case: Case) -> Work:
    """Gradients of the first of two layers: a forward pass of both, a backward pass of the second."""
    model = nn.Sequential(*(nn.Linear(case.width, case.width, bias=False) for _ in range(2)))
    extractor, (data, _) = Extractor(model, "mse", "sample", "0.weight"), _rows(case)
    extractor(data, torch.Generator())  # the first batch is run once more, to see whether the model is a fixed function
    return Work(lambda: extractor(data, torch.Generator().manual_seed(0)), 3 * case.S * case.T * case.width**2)


def step(case: Case) -> Work:
    """A whole training step: extraction, loss, derivatives, Adam."""
    run, _, path, pairs = planned(case, steps=1_000_000)
    cost = predict(case, path, pairs)["flops"] / 2 + case.S * case.T * case.width**2
    return Work(lambda: turn(run, run.gradients(run.step)), cost)


_ALL, _SAMPLED = Path(materialised=False, sampled=False), Path(materialised=False, sampled=True)
QUANTITIES = {
    "projection": Quantity(Case(256, 128, 8, 64, 8), AXES, projection),
    "sampled projection": Quantity(Case(256, 128, 8, 128, 8), AXES, sampled_projection),
    "top-k": Quantity(Case(1, 1024, 1, 1024, 1), ("S", "K"), top_k),
    "gram energy": Quantity(Case(256, 256, 1, 192, 4), ("S", "K", "R", "width"), gram_energy),
    "extraction": Quantity(Case(256, 256, 8, 1, 1), ("S", "T", "width"), extraction),
    "step": Quantity(Case(256, 128, 8, 64, 4), AXES, step),
}
