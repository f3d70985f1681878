"""Run the paper's studies of toy models: each decomposes one toy and yields its figures."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from l3d.api import Decomposition
from l3d.decomposition.directions import Directions
from l3d.studies.paper import draw, measure, pictures
from l3d.studies.paper.pictures import Picture
from l3d.studies.recovery_suite import short
from l3d.toys import Toy, make, one_thread, recovery
from l3d.train import decompose
from l3d.training.options import PRESETS, Replacement

WITHOUT_REPLACEMENT = replace(PRESETS["default"], replacement=Replacement(enabled=False))
SEEDS = 3  # number of toy networks over which errors against rank or K are averaged

Study = Callable[[int], Iterator[Picture]]


def tms(seed: int) -> Iterator[Picture]:
    """The toy model of superposition: five features in two hidden units, five subnetworks of rank 1."""
    toy, d = _decomposed("tms", seed)
    owner = measure.owners(toy, d)
    yield pictures.diagrams(toy, d, owner, "feature")
    w_in, w_out = (toy.model.get_parameter(f"{name}.weight").detach() for name in ("W_in", "W_out"))
    truth = [w_out, w_in.mT]
    planes = {"subnetwork": _hidden_directions(d.decoder, owner), "encoder": _hidden_directions(d.encoder, owner)}
    cosines = {
        name: torch.cat([torch.cosine_similarity(t, v).abs() for t, v in zip(truth, vectors, strict=True)])
        for name, vectors in planes.items()
    }
    yield Picture(
        "directions",
        "Feature directions",
        "Directions in the plane of the two hidden units. Grey: each feature. Blue: its subnetwork, with |cos| at "
        f"least {short(float(cosines['subnetwork'].min()))}. Red: the subnetwork's encoder, which may be tilted away "
        f"from other features, with |cos| at least {short(float(cosines['encoder'].min()))} and "
        f"{short(statistics.median(cosines['encoder'].tolist()))} in the median.",
        draw.planes(truth, planes["subnetwork"], planes["encoder"], ["in W_in, beside W_out", "in W_out, beside W_in"]),
        {name: values.tolist() for name, values in cosines.items()},
    )
    yield pictures.sweeps(toy, d, owner, "feature")
    yield pictures.pairwise(toy, d, owner)


def tmcs(seed: int) -> Iterator[Picture]:
    """The toy model of circuit superposition: x -> Ax, ten features in five hidden units."""
    toy, d = _decomposed("tmcs", seed)
    owner = measure.owners(toy, d)
    yield pictures.diagrams(toy, d, owner, "feature")
    sides = {"subnetworks (Vout)": d.decoder, "encoders (Vin)": d.encoder}
    cosines = {name: measure.direction_cosines(toy, side)[:, owner] for name, side in sides.items()}
    own, read = (values.diagonal() for values in cosines.values())
    yield Picture(
        "directions",
        "Feature directions",
        f"|cos| of each feature's circuit with each subnetwork, at least {short(float(own.min()))} for its own, "
        f"and with each encoder, {short(statistics.median(read.tolist()))} in the median for its own: encoders are "
        "tilted away from the other features.",
        draw.heat(cosines, "subnetwork, by its feature", "feature's circuit", "|cos|"),
        {name: values.tolist() for name, values in cosines.items()},
    )
    task, weights, found = measure.columns(toy, d, owner)
    r2 = recovery.r_squared(found, task)
    rescaled = found * ((found * weights).sum(0) / found.square().sum(0))
    r2_weights = recovery.r_squared(rescaled, weights)
    yield Picture(
        "matrix",
        "A against Â",
        f"Left: every entry of the task's matrix A against the subnetworks' estimate Â (r² = {r2:.3f}; published "
        "0.92), each column up to its scale. Right: A against the weights' W_out W_in, of rank 5 where A has rank 10; "
        "a decomposition cannot find what the network has not learned. Between Â and W_out W_in r² is "
        f"{r2_weights:.3f}.",
        draw.scatter(task, [("Â", found, r2), ("W_out W_in", weights, recovery.r_squared(weights, task))], "A"),
        {"A": task.tolist(), "A_hat": found.tolist(), "W_out_W_in": weights.tolist()}
        | {"r2": r2, "r2_weights": r2_weights},
    )
    yield pictures.sweeps(toy, d, owner, "feature")
    yield pictures.pairwise(toy, d, owner)


def high_rank(seed: int) -> Iterator[Picture]:
    """Circuits of higher rank: 25 features present in groups of five, ten subnetworks."""
    size = 5
    toy, d = _decomposed("high_rank", seed, rank=3, preset=WITHOUT_REPLACEMENT)
    owner = measure.owners(toy, d, size)
    yield pictures.diagrams(toy, d, owner, "group")
    squares = [d.subnetwork(k)["W_in.weight"].square().sum(0) for k in range(d.n_subnetworks)]
    energy = torch.stack([each.view(-1, size).sum(1) for each in squares], 1)
    rates = d.evaluate(toy.model, toy.data).activation_rate
    order = [*owner, *(k for k in range(d.n_subnetworks) if k not in owner)]
    purity = (energy / energy.sum(0)).mul(rates >= recovery.LIVE)[:, order]
    live = int((rates >= recovery.LIVE).sum())
    yield Picture(
        "groups",
        "Groups of features",
        f"Share of each live subnetwork's input weights in each group of features; {live} of {d.n_subnetworks} "
        "are live (no dead one is restarted here), the others are left blank. Published: one per group, the rest dead.",
        draw.heat({"": purity}, "subnetwork", "group", "share of W_in"),
        {"purity": purity.tolist(), "live": live, "activation_rate": rates[order].tolist()},
    )
    yield pictures.sweeps(toy, d, owner, "group", size)
    ranks = [1, 2, 3, 4, 5]
    figures = _figures("high_rank", seed, "rank", ranks)
    errors = figures["error"]
    found = [int(min(column)) for column in zip(*figures["groups_found"], strict=True)]
    yield Picture(
        "error-rank",
        "Error against rank",
        f"Error for ranks 1 to 5, ten subnetworks, {SEEDS} networks: {_means(ranks, errors)}. Of the five groups, "
        f"this many are found in every network: {found}. Published: rank 1 is nearly as good as rank 5.",
        draw.against(ranks, errors, "rank of every subnetwork", {}),
        {"rank": ranks, "error_by_seed": errors, "groups_found_by_seed": figures["groups_found"]},
    )


def squared(seed: int) -> Iterator[Picture]:
    """A complex loss landscape: x -> x² through four hidden layers, five subnetworks of rank 2."""
    toy, d = _decomposed("squared", seed)
    owner = measure.owners(toy, d)
    yield pictures.diagrams(toy, d, owner, "input")
    yield pictures.sweeps(toy, d, owner, "input")
    yield pictures.hidden(toy, d, owner)
    yield pictures.pairwise(toy, d, owner)
    counts = [3, 5, 10, 15]
    errors = _figures("squared", seed, "n_subnetworks", counts, rank=1)["error"]
    yield Picture(
        "error-k",
        "Error against K",
        f"Error for 3 to 15 subnetworks of rank 1, {SEEDS} networks: {_means(counts, errors)}. Published: it "
        "falls with K; its one printed value is 0.32, for five subnetworks of rank 2 (cross).",
        draw.against(counts, errors, "subnetworks", {5: 0.32}),
        {"n_subnetworks": counts, "error_by_seed": errors},
    )


STUDIES: dict[str, Study] = {study.__name__: study for study in (tms, tmcs, high_rank, squared)}


def _decomposed(name: str, seed: int, **arguments: Any) -> tuple[Toy, Decomposition]:
    """Return a toy and its decomposition by the toy's settings; `arguments` replace some of them."""
    toy = make(name, seed)
    with one_thread():
        return toy, decompose(toy.model, toy.data, seed=seed, callbacks=[], **toy.settings | arguments)


def _figures(name: str, seed: int, argument: str, values: list[int], **fixed: Any) -> dict[str, list[list[float]]]:
    """Return the error and the toy's own figures over the values of one argument: name -> [seed][value]."""
    found: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in range(SEEDS)])
    for i, value in product(range(SEEDS), values):
        toy, d = _decomposed(name, seed + i, n_restarts=2, **fixed | {argument: value})
        error = d.evaluate(toy.model, toy.data, n_references=30).error
        for key, figure in {"error": error, **toy.recovery(d)}.items():
            found[key][i].append(figure)
    return found


def _means(values: list[int], errors: list[list[float]]) -> str:
    means = [statistics.mean(each) for each in zip(*errors, strict=True)]
    return ", ".join(f"{short(mean)} at {value}" for value, mean in zip(values, means, strict=True))


def _hidden_directions(side: Directions, owner: list[int]) -> list[torch.Tensor]:
    """Return from each feature's direction its column of W_in and its row of W_out: two of [features, 2]."""
    found = [side.tensors(k) for k in owner]
    into = [v["W_in.weight"][:, i].detach() for i, v in enumerate(found)]
    return [torch.stack(into), torch.stack([v["W_out.weight"][i].detach() for i, v in enumerate(found)])]
