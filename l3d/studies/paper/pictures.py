"""Make the figures that several studies share: network diagrams of subnetworks, and interventions."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

from l3d.api import Decomposition
from l3d.report.plots import network_diagram
from l3d.studies.paper import draw, measure
from l3d.studies.recovery_suite import short
from l3d.toys import Toy, recovery

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Picture(NamedTuple):
    """One figure of a study, with its numbers."""

    name: str  # base name of its files
    title: str
    caption: str  # what is drawn, and the result
    figure: Figure
    numbers: dict[str, Any]


def diagrams(toy: Toy, d: Decomposition, owner: list[int], thing: str) -> Picture:
    """Draw the subnetworks of features, groups or inputs as network diagrams. thing: feature, group or input."""
    found = toy.recovery(d)
    error = d.evaluate(toy.model, toy.data, n_references=30).error
    shapes = {name: tuple(shape) for name, shape in d.shapes.items()}
    shown = ", ".join(f"{recovery.MEASURES[name].split(':')[0].split(',')[0]}: {short(v)}" for name, v in found.items())
    return Picture(
        "subnetworks",
        "Subnetworks",
        f"One diagram per {thing}, in order; blue is positive, red negative, rings are biases. "
        f"Error {short(error)}; {shown}.",
        network_diagram([d.subnetwork(k) for k in owner], shapes),
        {"error": error, "subnetwork_of": owner, **found},
    )


def sweeps(toy: Toy, d: Decomposition, owner: list[int], thing: str, size: int = 1) -> Picture:
    """Move along each feature's subnetwork alone, and draw the output changes."""
    held, deltas = measure.holds(toy, size), measure.sweep_deltas(toy)
    curves = [measure.sweep(toy, d, k, held[:, i], deltas) for i, k in enumerate(owner)]
    ratios = [curve.ratio for curve in curves]
    return Picture(
        "sweeps",
        "Single interventions",
        f"Output change when the weights move along each subnetwork: samples with its {thing} change "
        f"{short(min(ratios))} to {short(max(ratios))} times as much as samples without it.",
        draw.sweeps(curves, [f"{thing} {i}" for i in range(len(owner))]),
        {"ratio": ratios, "sweeps": [curve._asdict() for curve in curves]},
    )


def hidden(toy: Toy, d: Decomposition, owner: list[int]) -> Picture:
    """Move along one subnetwork after another, in the hidden layers only."""
    held, deltas = measure.holds(toy), measure.sweep_deltas(toy)
    layers = toy.model.order[1:-1]
    whole, hidden = (
        [measure.sweep(toy, d, k, held[:, i], deltas, params) for i, k in enumerate(owner)]
        for params in (None, [f"{name}.*" for name in layers])
    )
    ratios = [curve.ratio for curve in hidden]
    return Picture(
        "hidden",
        "Hidden layers only",
        f"The same with only {layers[0]} to {layers[-1]} moved (dashed), which touch neither input nor output: "
        f"samples with the input change {short(min(ratios))} to {short(max(ratios))} times as much as samples "
        "without it.",
        draw.sweeps(whole, [f"input {i}" for i in range(len(owner))], hidden),
        {"layers": layers, "ratio": ratios, "sweeps": [curve._asdict() for curve in hidden]},
    )


def pairwise(toy: Toy, d: Decomposition, owner: list[int]) -> Picture:
    """Move along the subnetworks of features 0 and 1 together, and draw output changes and interactions."""
    found = measure.pairwise(toy, d, owner, 0, 1)
    pairs = [found.interaction[i][j] for i in range(len(owner)) for j in range(i)]
    return Picture(
        "pairs",
        "Pairwise interventions",
        "The subnetworks of 0 and 1 moved together, for samples with only one of the two, both, or neither. Right: "
        "each pair's interaction, the norm of the joint change minus the sum of the single changes, as a fraction of "
        f"the joint change's norm (median {short(statistics.median(pairs))}, at most {short(max(pairs))}).",
        draw.pairs(found, "0", "1"),
        found._asdict(),
    )
