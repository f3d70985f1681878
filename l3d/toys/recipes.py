"""Build each toy by one function: the task, the network, its true circuits, and settings to decompose it with.

K, rank and k are the paper's. Task, training and points are drawn by three generators, each seeded from the toy's seed.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from l3d.data.batches import mix
from l3d.toys import recovery
from l3d.toys.cache import trained
from l3d.toys.networks import Deep, Network, Superposition, split_scale, train_network
from l3d.toys.sampling import grouped_features, signed_features, sparse_features
from l3d.toys.toy import Sample, Toy

TASK, TRAINING, POINTS = range(3)


def tms(seed: int) -> Toy:
    """Build the toy model of superposition: five sparse features through two hidden units and back."""
    model = trained("tms", seed, partial(Superposition, 5, 2), lambda: _fit_tms(_generator(seed, TRAINING)))
    return _superposition("tms", seed, model, n_points=1000, steps=1000)


def tms_40_10(seed: int) -> Toy:
    """Build a larger model of superposition: forty features through ten hidden units.

    A thousand points are too few to decompose it. So 100,000 are drawn, at least as many as the recommended training
    uses, and none is used twice.
    """
    fit = partial(_fit_superposition, 40, 10, _generator(seed, TRAINING), steps=2000, lr=0.002, n_starts=4)
    model = trained("tms_40_10", seed, partial(Superposition, 40, 10), fit)
    return _superposition("tms_40_10", seed, model, n_points=100_000, steps=3000)


def tms_parallel(seed: int) -> Toy:
    """Build three `tms` side by side: one network of block-diagonal matrices, each block trained separately."""
    n_copies = 3

    def build() -> Network:
        return Superposition(5 * n_copies, 2 * n_copies)

    def fit() -> Network:
        copies = [_fit_tms(_generator(mix(seed, i), TRAINING)) for i in range(n_copies)]
        whole = build()
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                blocks = [copy.get_parameter(name).detach() for copy in copies]
                parameter.copy_(torch.block_diag(*blocks) if parameter.ndim == 2 else torch.cat(blocks))
        return whole

    model = trained("tms_parallel", seed, build, fit)
    describe = f"{n_copies} toy models of superposition side by side in one network"
    return _superposition("tms_parallel", seed, model, n_points=50_000, steps=1500, describe=describe)


def tmcs(seed: int) -> Toy:
    """Build the toy model of circuit superposition: x -> Ax, ten features through five hidden units."""
    matrix = _task_matrix(seed, 10)
    sample = partial(sparse_features, n_features=10)
    model = _linear_map("tmcs", seed, matrix, 5, sample)
    return Toy(
        name="tmcs",
        describe="toy model of circuit superposition: x -> Ax, 10 sparse features in 5 hidden units",
        model=model,
        data=sample(1000, generator=_generator(seed, POINTS)),
        draw=sample,
        settings=_settings(10, steps=1000) | {"divergence": "mse_published"},
        measure=partial(recovery.find_columns, matrix=matrix),
        truth=_column_norms(model),
    )


def high_rank(seed: int) -> Toy:
    """Build circuits of higher rank: x -> Ax, five groups of five features that are present together."""
    sample = partial(grouped_features, n_features=25, size=5)
    return Toy(
        name="high_rank",
        describe="circuits of higher rank: x -> Ax, 25 features present in groups of five, in 10 hidden units",
        model=_linear_map("high_rank", seed, _task_matrix(seed, 25), 10, sample),
        data=sample(1000, generator=_generator(seed, POINTS)),
        draw=sample,
        settings=_settings(10, steps=1000),
        measure=partial(recovery.find_groups, size=5),
    )


def squared(seed: int) -> Toy:
    """Build a complex loss landscape: x -> x² by a GELU network with four hidden layers of width 5, as in the paper.

    At this width the network learns three to five of the five squares. At width 10 it learns all five, but its
    gradients are harder to reconstruct.
    """
    sample = partial(signed_features, n_features=5)
    generator = _generator(seed, TRAINING)

    def fit() -> Network:
        x = sample(10_000, generator=generator)
        return train_network(build, x, x.square(), generator, steps=4000, lr=0.004, n_starts=1)

    build = partial(Deep, 5, 5, 4)
    return Toy(
        name="squared",
        describe="complex loss landscape: x -> x², 5 sparse features in four hidden GELU layers of 5",
        model=trained("squared", seed, build, fit),
        data=sample(1000, generator=_generator(seed, POINTS)),
        draw=sample,
        settings=_settings(5, steps=1000) | {"rank": 2},
        measure=recovery.find_inputs,
    )


RECIPES = {recipe.__name__: recipe for recipe in (tms, tms_parallel, tms_40_10, tmcs, high_rank, squared)}


def _generator(seed: int, purpose: int) -> torch.Generator:
    """Return the CPU generator for one purpose (TASK, TRAINING or POINTS) of a toy's seed."""
    return torch.Generator().manual_seed(mix(seed, purpose))


def _settings(n_subnetworks: int, steps: int) -> dict[str, Any]:
    """Return the paper's settings at rank 1. Four restarts cost little more than one, which may miss a circuit."""
    return {
        "n_subnetworks": n_subnetworks,
        "rank": 1,
        "k": 0.1,
        "divergence": "mse",
        "batch_size": 32,
        "steps": steps,
        "n_restarts": 4,
    }


# --- superposition: y = ReLU(W_out W_in x + b), y ≈ x --------------------------------------------------------------


def _superposition(name: str, seed: int, model: Network, n_points: int, steps: int, describe: str = "") -> Toy:
    """Return the toy of a trained `Superposition`, with points and true circuits."""
    n_hidden, n_features = model.get_parameter("W_in.weight").shape
    return Toy(
        name=name,
        describe=describe or f"toy model of superposition: {n_features} sparse features in {n_hidden} hidden units",
        model=model,
        data=sparse_features(n_points, n_features, _generator(seed, POINTS)),
        draw=partial(sparse_features, n_features=n_features),
        settings=_settings(n_features, steps),
        measure=recovery.find_features,
        truth=_feature_gains(model),
    )


def _fit_tms(generator: torch.Generator) -> Network:
    """Train the 5-2 model."""
    return _fit_superposition(5, 2, generator, steps=6000, lr=0.006, n_starts=64)


def _fit_superposition(n_features: int, n_hidden: int, generator: torch.Generator, **how: Any) -> Network:
    """Train several starts and keep one that represents all features, about equally strongly.

    Most starts of 5-2 lose a feature (its output is always 0), or represent it by weights so small that its gradients
    almost vanish. Such a model has no circuit for the feature that a decomposition could find.
    """

    def build() -> Superposition:
        network = Superposition(n_features, n_hidden)
        torch.nn.init.normal_(network.W_in.weight, std=(2 / n_hidden) ** 0.5)
        # with unrelated initial matrices most features are lost
        network.W_out.weight.data.copy_(network.W_in.weight.mT)
        torch.nn.init.zeros_(network.W_out.bias)
        return network

    def score(stacked: Mapping[str, Tensor], losses: Tensor) -> Tensor:
        """Score the starts, lowest best: first all features represented, then balanced, then the least loss."""
        w_in, w_out = stacked["W_in.weight"].mT, stacked["W_out.weight"]  # [starts, features, hidden]
        represented = ((w_in * w_out).sum(2) > 0.8).all(1)
        strength = (w_in.square().sum(2) + w_out.square().sum(2)).sqrt()
        balance = strength.amin(1) / strength.amax(1)
        return losses + 2.0 * ~represented + (0.5 - balance).clamp_min(0)

    x = sparse_features(10_000, n_features, generator)
    return split_scale(train_network(build, x, x, generator, score=score, **how))


def _feature_gains(model: Network) -> list[dict[str, Tensor]]:
    """Return, per feature, the gradient of its gain W_out[i] · W_in[:, i]."""
    w_in, w_out = (model.get_parameter(f"{name}.weight").detach() for name in ("W_in", "W_out"))
    only = torch.eye(w_in.shape[1])
    return [{"W_in.weight": w_out.mT * row, "W_out.weight": w_in.mT * row[:, None]} for row in only]


# --- linear maps: y = W_out W_in x + b, y ≈ A x ---------------------------------------------------------------------


def _task_matrix(seed: int, n_features: int) -> Tensor:
    """Return the task's matrix A, entries uniform in [0, 3]: [n_features, n_features]."""
    return 3 * torch.rand(n_features, n_features, generator=_generator(seed, TASK))


def _linear_map(name: str, seed: int, matrix: Tensor, n_hidden: int, sample: Sample) -> Network:
    """Train y = W_out W_in x + b to approximate A x, A = `matrix`, or load it from the cache."""
    generator = _generator(seed, TRAINING)

    def fit() -> Network:
        x = sample(10_000, generator=generator)
        return split_scale(train_network(build, x, x @ matrix.mT, generator, steps=3000, lr=0.01, n_starts=1))

    build = partial(Superposition, len(matrix), n_hidden, rectify=False)
    return trained(name, seed, build, fit)


def _column_norms(model: Network) -> list[dict[str, Tensor]]:
    """Return, per feature, the gradient of ½‖(W_out W_in)[:, i]‖², its total effect on the outputs."""
    w_in, w_out = (model.get_parameter(f"{name}.weight").detach() for name in ("W_in", "W_out"))
    each = zip((w_out @ w_in).unbind(1), torch.eye(w_in.shape[1]), w_in.unbind(1), strict=True)
    return [
        {"W_in.weight": torch.outer(w_out.mT @ column, only), "W_out.weight": torch.outer(column, weights)}
        for column, only, weights in each
    ]
