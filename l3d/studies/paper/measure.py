"""Measure the numbers of the paper's figures: how moves along subnetworks change samples with and without a feature."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from l3d.analysis.consistency import match
from l3d.analysis.intervention import intervene
from l3d.api import Decomposition
from l3d.decomposition.directions import Directions
from l3d.gradients.model import Params
from l3d.toys import Deep, Toy
from l3d.toys.toy import cosines

REACH = 0.2  # largest |δ| of a sweep, as a fraction of the norm of all weights
REACH_DEEP = 0.03  # the same for a deep network, where larger moves change all samples
POINTS = 21  # number of distances in a sweep


class Sweep(NamedTuple):
    """Output changes along one subnetwork, for samples with its feature and for samples without it."""

    deltas: list[float]
    holding: list[float]  # root mean square output change, over the samples with the feature
    without: list[float]  # root mean square output change, over the samples without it

    def __repr__(self) -> str:
        """Return the number of distances and the ratio of the changes."""
        return f"Sweep({len(self.deltas)} deltas; ratio {self.ratio:.4g})"

    @property
    def ratio(self) -> float:
        """Norm of `holding` over the norm of `without`, both over the whole sweep."""
        return _norm(self.holding) / max(_norm(self.without), 1e-30)


class Pairwise(NamedTuple):
    """Output changes along two subnetworks moved together."""

    deltas: list[float]
    changes: dict[str, list[list[float]]]  # kind of sample -> rms change at [δ of the first][δ of the second]
    interaction: list[list[float]]  # per pair, ‖joint change − sum of single changes‖ / ‖joint change‖

    def __repr__(self) -> str:
        """Return the sizes and the largest interaction."""
        largest = max(map(max, self.interaction), default=0.0)
        return f"Pairwise({len(self.deltas)} deltas, kinds {list(self.changes)}; largest interaction {largest:.4g})"


def holds(toy: Toy, size: int = 1) -> Tensor:
    """Return which features (groups of `size` neighbours) are nonzero in each sample: [n, features] bool."""
    return (toy.data != 0).unflatten(1, (-1, size)).any(2)


def owners(toy: Toy, decomposition: Decomposition, size: int = 1) -> list[int]:
    """Match each feature or group to the subnetwork of largest impact on samples with that feature alone.

    One to one. Raises ValueError for fewer subnetworks than features.
    """
    held = holds(toy, size)
    impacts = decomposition.impact(toy.model, toy.data)
    alone = held & (held.sum(1, keepdim=True) == 1)  # the samples with one feature
    scores = torch.stack([impacts[column].mean(0) for column in alone.unbind(1)])
    scores = scores / scores.norm(dim=0).clamp_min(1e-30)
    if scores.shape[0] > scores.shape[1]:
        raise ValueError(f"n_subnetworks: expected at least {scores.shape[0]}, one per feature")
    return match(scores).tolist()


def sweep_deltas(toy: Toy, n: int = POINTS) -> list[float]:
    """Return n evenly spaced distances from −r to r, where r is `REACH` or `REACH_DEEP` times the weights' norm."""
    reach = REACH_DEEP if isinstance(toy.model, Deep) else REACH
    norm = float(torch.stack([p.detach().square().sum() for p in toy.model.parameters()]).sum().sqrt())
    return (torch.linspace(-reach, reach, n, dtype=torch.float64) * norm).tolist()


@torch.no_grad()
def sweep(
    toy: Toy, decomposition: Decomposition, index: int, held: Tensor, deltas: Sequence[float], params: Params = None
) -> Sweep:
    """Move along one subnetwork, and measure output changes. held: [n] bool, the samples with its feature."""
    before, holding, without = toy.model(toy.data), [], []
    for delta in deltas:
        with intervene(toy.model, decomposition, {index: delta}, params):
            squares = (toy.model(toy.data) - before).square().mean(1)
        holding.append(float(squares[held].mean().sqrt()))
        without.append(float(squares[~held].mean().sqrt()))
    return Sweep(list(deltas), holding, without)


@torch.no_grad()
def pairwise(toy: Toy, decomposition: Decomposition, owner: Sequence[int], first: int, second: int) -> Pairwise:
    """Move along two features' subnetworks together over a grid, and along every pair of subnetworks once."""
    held = holds(toy)
    alone = held.sum(1) == 1
    kinds = {
        f"only {first}": held[:, first] & alone,
        f"only {second}": held[:, second] & alone,
        "both": held[:, first] & held[:, second],
        "neither": ~held[:, first] & ~held[:, second],
    }
    kinds = {kind: chosen for kind, chosen in kinds.items() if chosen.any()}  # small data may lack samples with both
    before = toy.model(toy.data)

    def change(moves: dict[int, float]) -> Tensor:
        with intervene(toy.model, decomposition, moves):
            return toy.model(toy.data) - before

    deltas = sweep_deltas(toy, 11)
    changes: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    for a in deltas:
        rows = [change({owner[first]: a, owner[second]: b}).square().mean(1) for b in deltas]
        for kind, chosen in kinds.items():
            changes[kind].append([float(row[chosen].mean().sqrt()) for row in rows])
    reach = deltas[-1] / 2
    single = [change({k: reach}) for k in owner]
    interaction = [[0.0] * len(owner) for _ in owner]
    for i in range(len(owner)):
        for j in range(i):
            both = change({owner[i]: reach, owner[j]: reach})
            share = float((both - single[i] - single[j]).norm() / both.norm().clamp_min(1e-30))
            interaction[i][j] = interaction[j][i] = share
    return Pairwise(deltas, changes, interaction)


def direction_cosines(toy: Toy, directions: Directions) -> Tensor:
    """Return |cos| between the features' circuits and directions, over the circuits' tensors: [features, K]."""
    with torch.no_grad():
        return cosines(toy.truth, [directions.tensors(k) for k in range(directions.n_subnetworks)])


def columns(toy: Toy, decomposition: Decomposition, owner: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return for a linear map the task's matrix A, the weights' product W_out W_in, and the subnetworks' estimate Â.

    Column i of Â is ΔW_out W_in[:, i] of feature i's subnetwork, scaled by least squares to column i of A. Shapes: all
    [out, in].
    """
    task: Tensor = cast(Any, toy.measure).keywords["matrix"]
    w_in, w_out = (toy.model.get_parameter(f"{name}.weight").detach() for name in ("W_in", "W_out"))
    moves = [decomposition.subnetwork(k)["W_out.weight"].to(w_in) @ w_in[:, i] for i, k in enumerate(owner)]
    found = torch.stack(moves, 1)
    scale = (found * task).sum(0) / found.square().sum(0).clamp_min(1e-30)
    return task, w_out @ w_in, found * scale


def _norm(values: Sequence[float]) -> float:
    return sum(value * value for value in values) ** 0.5
