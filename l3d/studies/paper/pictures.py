"""The figures that several studies make: subnetworks as networks, and interventions."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

from l3d.report.plots import network_diagram
from l3d.studies.paper import draw, measure
from l3d.studies.recovery_suite import short
from l3d.toys import Toy, recovery

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from l3d.api import Decomposition


class Picture(NamedTuple):
    """One figure of a study, with the numbers in it."""

    name: str  # of its files
    title: str
    caption: str  # what is drawn, and what came out
    figure: Figure
    numbers: dict[str, Any]


def diagrams(toy: Toy, d: Decomposition, owner: list[int], thing: str) -> Picture:
    """Draw the subnetworks of features, groups or inputs as networks."""
    found = toy.recovery(d)
    error = d.evaluate(toy.model, toy.data, n_references=30).error
    shapes = {name: tuple(shape) for name, shape in d.shapes.items()}
    shown = ", ".join(f"{recovery.MEASURES[name].split(':')[0].split(',')[0]}: {short(v)}" for name, v in found.items())
    return Picture(
        "subnetworks",
        "Subnetworks",
        f"One network per {thing}, in their order; blue is positive, red negative, rings are biases. "
        f"Error {short(error)}; {shown}.",
        network_diagram([d.subnetwork(k) for k in owner], shapes),
        {"error": error, "subnetwork_of": owner, **found},
    )


def sweeps(toy: Toy, d: Decomposition, owner: list[int], thing: str, size: int = 1) -> Picture:
    """Move along one subnetwork after another."""
    held, deltas = measure.holds(toy, size), measure.sweep_deltas(toy)
    curves = [measure.sweep(toy, d, k, held[:, i], deltas) for i, k in enumerate(owner)]
    ratios = [curve.ratio for curve in curves]
    return Picture(
        "sweeps",
        "Single interventions",
        f"How far the output moves with the weights along each subnetwork: samples that hold its {thing} move "
        f"{short(min(ratios))} to {short(max(ratios))} times as far as those that do not.",
        draw.sweeps(curves, [f"{thing} {i}" for i in range(len(owner))]),
        {"ratio": ratios, "sweeps": [curve._asdict() for curve in curves]},
    )


def hidden(toy: Toy, d: Decomposition, owner: list[int]) -> Picture:
    """Move along one subnetwork after another, in the hidden layers only."""
    held, deltas = measure.holds(toy), measure.sweep_deltas(toy)
    layers = toy.model.order[1:-1]
    inner = [f"{name}.*" for name in layers]
    whole = [measure.sweep(toy, d, k, held[:, i], deltas) for i, k in enumerate(owner)]
    hidden = [measure.sweep(toy, d, k, held[:, i], deltas, inner) for i, k in enumerate(owner)]
    ratios = [curve.ratio for curve in hidden]
    return Picture(
        "hidden",
        "Hidden layers only",
        f"The same with only {layers[0]} to {layers[-1]} moved (dashed), which read no input and write no "
        f"output: samples that hold the input move {short(min(ratios))} to {short(max(ratios))} times as far as "
        "those that do not.",
        draw.sweeps(whole, [f"input {i}" for i in range(len(owner))], hidden),
        {"layers": layers, "ratio": ratios, "sweeps": [curve._asdict() for curve in hidden]},
    )


def pairwise(toy: Toy, d: Decomposition, owner: list[int]) -> Picture:
    """Move along two features' subnetworks together."""
    found = measure.pairwise(toy, d, owner, 0, 1)
    pairs = [found.interaction[i][j] for i in range(len(owner)) for j in range(i)]
    return Picture(
        "pairs",
        "Pairwise interventions",
        "The subnetworks of 0 and 1 moved together, for samples that hold only one of them, both, or neither. "
        "Right: for every pair, how far the change of both is from the sum of the single changes, as a share "
        f"of it (median {short(statistics.median(pairs))}, at most {short(max(pairs))}).",
        draw.pairs(found, "0", "1"),
        found._asdict(),
    )
